"""What a tile program means: run it, one grid point after the other, one tile statement at a time, in numpy.

Also the meter: every element that a kernel reads from or writes to a param is counted, so that passes and traffic are
measured on what runs and not copied from an analysis.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.errors import InputError, VerifyError
from memcomp.ir.expr import Access, Const, Expr, Size, Var
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.places import LEAST, ordered
from memcomp.ir.tile import (
    NOWHERE,
    Best,
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    Tile,
    TileKernel,
    TileProgram,
    When,
)

Array = npt.NDArray[Any]
_REDUCE = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.logical_and,
    "or": np.logical_or,
}


@dataclass(slots=True)
class Traffic:
    """Elements moved between params and tiles, by param name; `tasks`: grid points run, by kernel name."""

    reads: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)


def solve_sizes(
    tp: TileProgram,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Run-time sizes by name: those given, and those that a param's shape shows.

    Raises InputError where shapes disagree with each other, or a size stays unknown.
    """
    known = dict(sizes or {})
    for p in tp.params:
        for want, got in zip(p.shape, shapes.get(p.name, ()), strict=False):
            if isinstance(want, Size) and known.setdefault(want.rank, got) != got:
                raise InputError(f"size {want.rank} of {tp.name} is {known[want.rank]}, and {p.name!r} makes it {got}")
    if missing := [s for s in tp.sizes if s not in known]:
        raise InputError(f"size {missing[0]} of {tp.name} is in no shape", hint=f"pass sizes={{{missing[0]!r}: n}}")
    return {s: known[s] for s in tp.sizes}


def interpret_tile(
    tp: TileProgram,
    arrays: Mapping[str, Any],
    sizes: Mapping[str, int] | None = None,
    *,
    dtype: npt.DTypeLike = np.float64,
) -> dict[str, Array]:
    """Outputs and new states by name; `arrays` holds one array per `in` and `state` param and is not changed.

    dtype: the arithmetic of f32 tiles.  Raises InputError for wrong shapes, VerifyError for a read outside a tensor
    or of a tile that was never written.
    """
    return measure_tile(tp, arrays, sizes, dtype=dtype)[0]


def measure_tile(
    tp: TileProgram,
    arrays: Mapping[str, Any],
    sizes: Mapping[str, int] | None = None,
    *,
    dtype: npt.DTypeLike = np.float64,
) -> tuple[dict[str, Array], Traffic]:
    """`interpret_tile`, and what it moved."""
    known = solve_sizes(tp, {n: np.shape(a) for n, a in arrays.items()}, sizes)
    memory: dict[str, Array] = {}
    for p in tp.params:
        shape = tuple(int(_scalar(x, known)) for x in p.shape)
        kind = _numpy(p.dtype, np.dtype(dtype))
        if p.role in ("in", "state"):
            if p.name not in arrays:
                raise InputError(f"input {p.name!r} is missing")
            memory[p.name] = np.array(arrays[p.name], dtype=kind)
            if memory[p.name].shape != shape:
                raise InputError(f"{p.name!r} has shape {memory[p.name].shape}, expected {shape}")
        else:  # unwritten elements must show
            memory[p.name] = np.full(shape, np.nan, kind) if kind.kind == "f" else np.zeros(shape, kind)
    traffic = Traffic()
    with np.errstate(all="ignore"):
        for k in tp.kernels:
            extents = [range(int(_scalar(n, known))) for _, n in k.grid]
            for at in itertools.product(*extents):
                traffic.tasks[k.name] += 1
                env = known | {v: i for (v, _), i in zip(k.grid, at, strict=True)}
                _Task(k, memory, env, traffic, np.dtype(dtype)).run(k.body)
    return {p.name: memory[p.name] for p in tp.params if p.role in ("out", "state")}, traffic


def _numpy(dtype: str, real: np.dtype[Any]) -> np.dtype[Any]:
    if dtype == "bool":
        return np.dtype(bool)
    if dtype == "f64":
        return np.dtype(np.float64)
    return np.dtype(np.int64) if dtype[0] in "iu" else real


def _scalar(e: Expr, env: Mapping[str, int]) -> Any:
    if isinstance(e, Const):
        return e.value
    if isinstance(e, (Var, Size)):
        return env[e.name if isinstance(e, Var) else e.rank]
    if isinstance(e, Access):
        raise VerifyError(f"{e.tensor} is read where only sizes and grid variables may stand")
    return OPS[e.op].numpy(*(_scalar(a, env) for a in e.args))


class _Task:
    """One grid point: its variables and its tiles."""

    def __init__(
        self, k: TileKernel, memory: dict[str, Array], env: dict[str, int], traffic: Traffic, real: np.dtype[Any]
    ) -> None:
        self.k, self.memory, self.env, self.traffic, self.real = k, memory, env, traffic, real
        self.tiles: dict[str, Array] = {}
        self.known = {t.name: t for t in k.tiles}
        self.dims = {d.name: d for d in k.dims}

    def run(self, body: tuple[Statement, ...]) -> None:
        for s in body:
            if isinstance(s, Loop):
                for i in range(int(self.value(s.lo, ())), int(self.value(s.hi, ()))):
                    self.env[s.var] = i
                    self.run(s.body)
                self.env.pop(s.var, None)
            elif isinstance(s, When):
                self.run(s.body if bool(self.value(s.cond, ())) else s.orelse)
            elif isinstance(s, Store):
                self.store(s)
            elif isinstance(s, Best):
                self.best(s)
            else:
                t = self.known[s.tile]
                self.tiles[t.name] = self.result(s, t)

    def result(self, s: Load | Map | Fold | Dot, t: Tile) -> Array:
        if isinstance(s, Load):
            return self.fit(self.value(s.source, t.dims), t)
        if isinstance(s, Map):
            return self.fit(self.value(s.body, t.dims), t)
        if isinstance(s, Dot):
            dims = (*t.dims, *s.over)
            a, b = self.value(s.a, dims), self.value(s.b, dims)
            got, join = self._sum_of_products(a, b, dims, len(t.dims)), np.add
        else:
            dims = (*t.dims, *s.over)
            x = np.broadcast_to(self.value(s.body, dims), self.shape(dims))
            join = _REDUCE[s.monoid]  # type: ignore[assignment]
            axes = tuple(range(len(t.dims), len(dims)))
            identity = MONOIDS[s.monoid].identity
            if t.dtype == "i64" and np.isinf(identity):
                info = np.iinfo(np.int64)
                identity = info.max if identity > 0 else info.min
            got = join.reduce(x, axis=axes, initial=None if s.monoid in ("and", "or") else identity) if axes else x
        return self.fit(join(self.tile(t.name), got), t) if s.accumulate else self.fit(got, t)

    def best(self, s: Best) -> None:
        t, p = self.known[s.tile], self.known[s.place]
        last = t.dims.index(s.order)
        front = tuple(d for d in t.dims if d != s.order)
        dims = (*front, *s.over)
        row = (*self.shape(front), int(np.prod(self.shape(s.over))))
        x, at = (np.broadcast_to(self.value(e, dims), self.shape(dims)).reshape(row) for e in (s.body, s.at))
        k = self.count(s.order)
        if s.accumulate:
            old = tuple(np.moveaxis(self.tile(n), last, -1) for n in (s.tile, s.place))
        else:
            least = LEAST if t.dtype == "i64" else -np.inf
            old = np.full((*row[:-1], k), least), np.full((*row[:-1], k), NOWHERE)
        got = ordered(np.concatenate([old[0], x], -1), np.concatenate([old[1], at], -1))
        self.tiles[t.name], self.tiles[p.name] = (
            self.fit(np.moveaxis(y[..., :k], -1, last), z) for y, z in zip(got, (t, p), strict=True))

    def _sum_of_products(self, a: Array, b: Array, dims: tuple[str, ...], kept: int) -> Array:
        axes = tuple(range(kept, len(dims)))
        return np.asarray(np.sum(np.broadcast_to(a * b, self.shape(dims)), axis=axes))

    def fit(self, x: Any, t: Tile) -> Array:
        return np.array(np.broadcast_to(x, self.shape(t.dims)), dtype=_numpy(t.dtype, self.real))

    def count(self, dim: str) -> int:
        d = self.dims[dim]
        n = int(_scalar(d.count, self.env))
        if not 0 <= n <= d.capacity:
            raise VerifyError(f"dim {dim} of {self.k.name} has count {n}, its capacity is {d.capacity}")
        return n

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.count(d) for d in dims)

    def tile(self, name: str) -> Array:
        if name not in self.tiles:
            raise VerifyError(f"tile {name} of {self.k.name} is read before it is written")
        return self.tiles[name]

    def value(self, e: Expr, dims: tuple[str, ...]) -> Any:
        """An expression over the points of `dims`, broadcastable to their shape."""
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Size):
            return self.env[e.rank]
        if isinstance(e, Var):
            if e.name not in dims:
                return self.env[e.name]
            return np.arange(self.count(e.name)).reshape([-1 if d == e.name else 1 for d in dims])
        if isinstance(e, Access):
            return self.element(e, dims)
        return OPS[e.op].numpy(*(self.value(a, dims) for a in e.args))

    def element(self, e: Access, dims: tuple[str, ...]) -> Any:
        if e.tensor not in self.known:
            return self.gather(e, dims)
        x = self.tile(e.tensor)
        own = [i.name for i in e.index if isinstance(i, Var)]
        if tuple(own) != self.known[e.tensor].dims:
            raise VerifyError(f"tile {e.tensor} has dims {self.known[e.tensor].dims}, and is read at {own}")
        if x.shape != self.shape(tuple(own)):
            raise VerifyError(
                f"tile {e.tensor} was written with counts {x.shape} and is read with {self.shape(tuple(own))}"
            )
        order = sorted(range(len(own)), key=lambda i: dims.index(own[i]))
        return x.transpose(order).reshape([self.count(d) if d in own else 1 for d in dims])

    def gather(self, e: Access, dims: tuple[str, ...]) -> Any:
        index = self.address(e, dims)
        got = self.memory[e.tensor][index]
        self.traffic.reads[e.tensor] += int(np.size(got))
        return got

    def address(self, e: Access, dims: tuple[str, ...], keep: Array | None = None) -> tuple[Any, ...]:
        """One index for each dimension; with `keep`, of the points where it holds."""
        index = tuple(self.value(i, dims) for i in e.index)
        if keep is not None:
            index = tuple(np.broadcast_to(i, keep.shape)[keep] for i in index)
        points = int(np.prod(np.broadcast_shapes(*(np.shape(i) for i in index)))) if index else 1
        for d, (i, n) in enumerate(zip(index, self.memory[e.tensor].shape, strict=True)):
            if points and (np.min(i) < 0 or np.max(i) >= n):
                raise VerifyError(
                    f"{self.k.name} leaves {e.tensor!r}: index {np.min(i)} .. {np.max(i)} in dimension {d} "
                    f"of {n} elements"
                )
        return index

    def store(self, s: Store) -> None:
        t = self.known[s.tile]
        x = self.tile(t.name)
        if s.mask is None:
            self.memory[s.target.tensor][self.address(s.target, t.dims)] = x
            self.traffic.writes[s.target.tensor] += int(np.size(x))
            return
        keep = np.broadcast_to(self.value(s.mask, t.dims), x.shape)
        index = self.address(s.target, t.dims, keep)
        self.memory[s.target.tensor][index] = x[keep]
        self.traffic.writes[s.target.tensor] += int(np.count_nonzero(keep))


__all__ = ["Traffic", "interpret_tile", "measure_tile", "solve_sizes"]
