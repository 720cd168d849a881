"""Evaluate expressions over a block of an iteration space, all points at once.

Every value is an array with one dimension per axis of the block, of length 1 where it does not depend on that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from memcomp.ir.errors import VerifyError
from memcomp.ir.expr import Access, Const, Expr, Size, Var
from memcomp.ir.ops import op

Array: TypeAlias = npt.NDArray[Any]
_KEEP_BOOL = frozenset({"where", "max", "min", "and", "or", "not", "real", "int"})


class OutOfRange(Exception):
    """An access that no guard excludes leaves its tensor."""

    def __init__(self, access: Access, dim: int, index: int, size: int, at: dict[str, int]) -> None:
        self.access, self.dim, self.index, self.size, self.at = access, dim, index, size, at
        super().__init__()


@dataclass(frozen=True, slots=True)
class Block:
    """A box of points: `axes` variable -> half-open range, `fixed` variables of enclosing iterative ranks."""

    axes: Mapping[str, tuple[int, int]]
    fixed: Mapping[str, int]
    tensor: Callable[[str], Array]
    size: Callable[[str], Expr | int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(hi - lo for lo, hi in self.axes.values())

    def only(self, names: tuple[str, ...]) -> Block:
        """The block over some of the axes, in the order given."""
        return Block({n: self.axes[n] for n in names}, self.fixed, self.tensor, self.size)

    def along(self, name: str, values: Array) -> Array:
        shape = [1] * len(self.axes)
        shape[list(self.axes).index(name)] = -1
        return values.reshape(shape)

    def evaluate(self, e: Expr, live: Array | None = None) -> Array:
        """The value at every point.  live: points that take part; elsewhere an index may leave its tensor and the
        value is arbitrary.  Raises OutOfRange."""
        if isinstance(e, Const):
            return np.asarray(e.value, np.float64) if isinstance(e.value, float) else np.asarray(e.value)
        if isinstance(e, Var):
            if e.name in self.fixed:
                return np.asarray(self.fixed[e.name])
            if e.name not in self.axes:
                raise VerifyError(f"variable {e.name!r} is not in the iteration space",
                                  f"space: {', '.join([*self.fixed, *self.axes]) or 'one point'}",
                                  "a ragged rank needs the variables of its extent")
            return self.along(e.name, np.arange(*self.axes[e.name]))
        if isinstance(e, Size):
            n = self.size(e.rank)
            return np.asarray(n) if isinstance(n, int) else self.evaluate(n, live)
        if isinstance(e, Access):
            return self.read(e, live)
        row = op(e.op)
        args = [self.evaluate(a, live) for a in e.args]
        if e.op == "where":
            args[0] = args[0].astype(bool)
        if row.result != "bool" and e.op not in _KEEP_BOOL:
            args = [a.astype(np.int64) if a.dtype == bool else a for a in args]
        if row.result == "real":
            args = [a.astype(np.float64, copy=False) for a in args]
        return np.asarray(row.numpy(*args))

    def read(self, a: Access, live: Array | None) -> Array:
        x = self.tensor(a.tensor)
        index = self.index(a, x.shape, live)
        if all(isinstance(i, (slice, int)) for i in index):
            view = x[index]
            names = [self.name_of(i) for i in a.index]
            return self.spread(view, [n for n in names if n is not None])
        arrays = [self.along(self.name_of(a.index[k]) or "", np.arange(i.start, i.stop)) if isinstance(i, slice) else i
                  for k, i in enumerate(index)]
        if x.size == 0:  # no live point reads here, so any value will do
            return np.zeros(np.broadcast_shapes(*(np.shape(i) for i in arrays)), x.dtype)
        out: Array = x[tuple(arrays)]
        return out.reshape((1,) * (len(self.axes) - out.ndim) + out.shape)

    def name_of(self, i: Expr) -> str | None:
        """The axis that an index walks along unchanged."""
        return i.name if isinstance(i, Var) and i.name in self.axes else None

    def spread(self, view: Array, names: list[str]) -> Array:
        """An array whose dimensions are the axes `names` as one with a dimension per axis."""
        order = sorted(range(len(names)), key=lambda k: list(self.axes).index(names[k]))
        shape = [1] * len(self.axes)
        for k in order:
            shape[list(self.axes).index(names[k])] = view.shape[k]
        return view.transpose(order).reshape(shape) if order else view.reshape(shape)

    def index(self, a: Access, shape: tuple[int, ...], live: Array | None) -> tuple[Any, ...]:
        """One slice, int or array per dimension; checked against the shape at live points, clipped elsewhere."""
        if len(shape) != len(a.index):
            raise OutOfRange(a, len(shape), len(a.index), len(shape), {})
        out: list[Any] = []
        taken: set[str] = set()
        for dim, (i, n) in enumerate(zip(a.index, shape, strict=True)):
            name = self.name_of(i)
            if name is not None and name not in taken and self.axes[name][1] <= n:
                taken.add(name)
                out.append(slice(*self.axes[name]))
                continue
            at = self.evaluate(i, live)
            if at.dtype.kind == "f":
                at = at.astype(np.int64)
            bad = (at < 0) | (at >= n)
            if bad.any():
                self._blame(a, dim, at, n, bad, live)
                at = np.clip(at, 0, max(n - 1, 0))
            out.append(int(at.reshape(())) if at.ndim == 0 else at)
        return tuple(out)

    def _blame(self, a: Access, dim: int, at: Array, n: int, bad: Array, live: Array | None) -> None:
        worst = bad if live is None else bad & live
        if not worst.any():
            return
        point = np.argwhere(worst)[0] if worst.ndim else ()
        where = {v: lo + int(p) for (v, (lo, _)), p, k in zip(self.axes.items(), point, worst.shape, strict=False)
                 if k > 1 or self.axes[v][1] - lo == 1}
        value = np.broadcast_to(at, worst.shape)[tuple(point)] if worst.ndim else at
        raise OutOfRange(a, dim, int(value), n, {**self.fixed, **where})
