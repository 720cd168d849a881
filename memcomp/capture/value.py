"""Pointful symbolic tensors: a shape, a dtype and a function from indices to an expression.

Every torch dimension is a list of *factors*, slowest first: `view(B*H, M, E)` of `[B, H, M, E]` keeps B and H apart, so
that views compose to plain variables instead of divisions and remainders.  Indices are given per factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

from memcomp.capture.extent import Extent, expression, product, quotient, same
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const, Expr, call

T = TypeVar("T")
Index: TypeAlias = "tuple[Expr, ...]"
ZERO = Const(0)


@dataclass(frozen=True)
class Factor:
    """Part of a dimension.  rank: the rank of the statement that wrote it, to be kept by readers."""

    extent: Extent
    rank: str | None = None


Dim: TypeAlias = "tuple[Factor, ...]"
UNIT = Factor(1)


@dataclass(frozen=True)
class Pieces:
    """What a value is made of, one after the other along torch dimension `dim`."""

    dim: int
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Value:
    """dims: factors per torch dimension (at least one; a unit factor only alone).  at: one index per factor of all
    dims in order -> the element there.  pieces: kept as long as operators work point by point, so that a reduction
    over them is a reduction of each."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype
    at: Callable[[Index], Expr]
    pieces: Pieces | None = None

    @property
    def factors(self) -> tuple[Factor, ...]:
        return tuple(f for d in self.dims for f in d)

    @property
    def shape(self) -> tuple[Extent, ...]:
        return tuple(product(*(f.extent for f in d)) for d in self.dims)

    @property
    def is_real(self) -> bool:
        return self.dtype.is_floating_point

    def split(self, index: tuple[T, ...]) -> tuple[tuple[T, ...], ...]:
        """One thing per factor, cut by dimension."""
        out, i = [], 0
        for d in self.dims:
            out.append(index[i:i + len(d)])
            i += len(d)
        return tuple(out)


def plain(shape: Sequence[Extent], dtype: torch.dtype, at: Callable[[Index], Expr]) -> Value:
    """A value with one factor per dimension."""
    return Value(tuple((Factor(e),) for e in shape), dtype, at)


def constant(x: bool | int | float, dtype: torch.dtype, shape: Sequence[Extent] = ()) -> Value:
    c = Const(number(x, dtype))
    return plain(shape, dtype, lambda _: c)


def number(x: bool | int | float, dtype: torch.dtype) -> bool | int | float:
    """A Python number as an element of `dtype`."""
    return bool(x) if dtype == torch.bool else float(x) if dtype.is_floating_point else int(x)


def spread(i: Expr, extents: Sequence[Extent]) -> list[Expr]:
    """One index over a product of extents -> one index per extent (the slowest needs no remainder)."""
    out: list[Expr] = []
    for k, e in enumerate(extents):
        stride = product(*extents[k + 1:])
        j = i if stride == 1 else call("floordiv", i, expression(stride))
        out.append(ZERO if e == 1 else j if k == 0 else call("mod", j, expression(e)))
    return out


def join(parts: Sequence[tuple[Expr, Extent]]) -> Expr:
    """Indices, slowest first, with their extents -> one index."""
    out = parts[0][0]
    for i, e in parts[1:]:
        out = call("add", call("mul", out, expression(e)), i)
    return out


def coarse(v: Value, dim: int) -> Value:
    """The same value with dimension `dim` in one factor."""
    d = v.dims[dim]
    if len(d) == 1:
        return v
    extents = [f.extent for f in d]
    first = sum(len(x) for x in v.dims[:dim])

    def at(ix: Index) -> Expr:
        return v.at((*ix[:first], *spread(ix[first], extents), *ix[first + 1:]))

    return Value((*v.dims[:dim], (Factor(product(*extents)),), *v.dims[dim + 1:]), v.dtype, at)


def align(dims: Sequence[Dim]) -> tuple[Dim, list[Callable[[Index], Index]]]:
    """Factors that all of `dims` (same extent, or 1 = broadcast) can be read by, and per dim the map from an index over
    those factors to its own.  Cuts are kept where all agree: (B, H) with (B, H) stays, (H) with (J, G) becomes H."""
    wide = [d for d in dims if not same(product(*(f.extent for f in d)), 1)]
    if not wide:
        rank = next((d[0].rank for d in dims if d[0].rank), None)
        return (Factor(1, rank),), [lambda ix: ix for _ in dims]
    cuts = [_strides(d) for d in wide]
    total = product(*(f.extent for f in wide[0]))
    common = [s for s in cuts[0] if all(any(same(s, t) for t in c) for c in cuts[1:])]
    out: list[Factor] = []
    above = total
    for s in common:
        e = quotient(above, s)
        assert e is not None
        rank = next((f.rank for d, c in zip(wide, cuts, strict=True) for f, t in zip(d, c, strict=True)
                     if f.rank and same(t, s) and same(f.extent, e)), None)
        out.append(Factor(e, rank))
        above = s

    def reader(d: Dim) -> Callable[[Index], Index]:
        if d not in wide:
            return lambda ix: tuple(ZERO for _ in d)
        groups: list[list[Extent]] = []
        k = 0
        for s in common:
            group: list[Extent] = []
            while True:
                group.append(d[k].extent)
                k += 1
                if same(product(*(f.extent for f in d[k:])), s):
                    break
            groups.append(group)
        return lambda ix: tuple(j for i, g in zip(ix, groups, strict=True)
                                for j in (spread(i, g) if len(g) > 1 else [i]))

    return tuple(out), [reader(d) for d in dims]


def _strides(d: Dim) -> list[Extent]:
    return [product(*(f.extent for f in d[k + 1:])) for k in range(len(d))]


def pointwise(f: Callable[..., Expr], dtype: torch.dtype, *values: Value) -> Value:
    """f applied at every point, with torch's broadcasting."""
    n = max(len(v.dims) for v in values)
    padded = [((UNIT,),) * (n - len(v.dims)) + v.dims for v in values]
    dims: list[Dim] = []
    maps: list[list[Callable[[Index], Index]]] = []
    for column in zip(*padded, strict=True):
        d, m = align(column)
        dims.append(d)
        maps.append(m)
    widths = [len(d) for d in dims]

    def at(ix: Index) -> Expr:
        cut, i = [], 0
        for w in widths:
            cut.append(ix[i:i + w])
            i += w
        args = []
        for k, v in enumerate(values):
            skip = n - len(v.dims)
            args.append(v.at(tuple(j for c in range(skip, n) for j in maps[c][k](cut[c]))))
        return f(*args)

    return Value(tuple(dims), dtype, at, _pointwise_pieces(f, dtype, values, n))


def _pointwise_pieces(f: Callable[..., Expr], dtype: torch.dtype, values: Sequence[Value], n: int) -> Pieces | None:
    """The pieces of a point-by-point result, where an operand has some."""
    cut = next(((v, v.pieces) for v in values if v.pieces is not None), None)
    if cut is None:
        return None
    dim = cut[1].dim + n - len(cut[0].dims)
    parts: list[Value] = []
    start: Extent = 0
    for k, part in enumerate(cut[1].values):
        length = part.shape[cut[1].dim]
        row = []
        for v in values:
            own = dim - n + len(v.dims)
            if own < 0 or same(v.shape[own], 1):
                row.append(v)
            elif v.pieces is not None and v.pieces.dim == own and len(v.pieces.values) == len(cut[1].values):
                row.append(v.pieces.values[k])
            else:
                row.append(window(v, own, start, length))
        parts.append(pointwise(f, dtype, *row))
        start = product(1, start + length)
    return Pieces(dim, tuple(parts))


def window(v: Value, dim: int, start: Extent, length: Extent) -> Value:
    """`length` elements of a dimension from `start` on."""
    first = expression(start)
    return shift(v, dim, length, (lambda i: i) if first == ZERO else (lambda i: call("add", i, first)))


def permute(v: Value, order: Sequence[int]) -> Value:
    """Dimension k of the result is dimension order[k] of `v`."""
    widths = [len(v.dims[o]) for o in order]

    def at(ix: Index) -> Expr:
        parts: list[Index] = [()] * len(order)
        i = 0
        for o, w in zip(order, widths, strict=True):
            parts[o] = ix[i:i + w]
            i += w
        return v.at(tuple(j for p in parts for j in p))

    return Value(tuple(v.dims[o] for o in order), v.dtype, at)


def expand(v: Value, shape: Sequence[Extent]) -> Value:
    """Repeat unit dimensions and prepend new ones."""
    lead = len(shape) - len(v.dims)
    dims: list[Dim] = [(Factor(e),) for e in shape[:lead]]
    repeated = []
    for d, e in zip(v.dims, shape[lead:], strict=True):
        # torch's guards may equate extents that are spelled differently: only a unit dimension repeats
        wide = same(product(*(f.extent for f in d)), 1) and not same(e, 1)
        repeated.append(wide)
        dims.append((Factor(e),) if wide else d)
    widths = [len(d) for d in v.dims]

    def at(ix: Index) -> Expr:
        i = lead
        out: list[Expr] = []
        for w, wide in zip(widths, repeated, strict=True):
            out += [ZERO] if wide else ix[i:i + w]
            i += 1 if wide else w
        return v.at(tuple(out))

    return Value(tuple(dims), v.dtype, at)


def reshape(v: Value, shape: Sequence[Extent]) -> Value:
    """The same elements in row-major order under another shape; factors are kept or cut where they fit."""
    if any(same(e, 0) for e in shape):
        zeros = tuple(ZERO for _ in v.factors)
        return plain(shape, v.dtype, lambda _: v.at(zeros))
    cut = _cut(v, shape)
    if cut is None:
        extents = [f.extent for f in v.factors]
        return plain(shape, v.dtype, lambda ix: v.at(tuple(spread(join(list(zip(ix, shape, strict=True))), extents))
                                                     if shape else tuple(ZERO for _ in extents)))
    dims, owner = cut
    flat = [f for d in dims for f in d]

    def at(ix: Index) -> Expr:
        parts: list[list[tuple[Expr, Extent]]] = [[] for _ in v.factors]
        for i, f, k in zip(ix, flat, owner, strict=True):
            if k is not None:
                parts[k].append((i, f.extent))
        return v.at(tuple(join(p) if p else ZERO for p in parts))

    return Value(tuple(dims), v.dtype, at)


def _cut(v: Value, shape: Sequence[Extent]) -> tuple[list[Dim], list[int | None]] | None:
    """Per target dimension its factors, and per target factor the source factor it is (a part of); None: no fit."""
    queue = list(enumerate(v.factors))
    dims: list[Dim] = []
    owner: list[int | None] = []
    for e in shape:
        need: Extent = e
        dim: list[Factor] = []
        if same(e, 1) and queue and same(queue[0][1].extent, 1):
            owner.append(queue[0][0])
            dim.append(queue.pop(0)[1])
        while not same(need, 1):
            while queue and same(queue[0][1].extent, 1):
                queue.pop(0)
            if not queue:
                return None
            k, f = queue.pop(0)
            left = quotient(need, f.extent)
            if left is not None:
                dim.append(f)
            else:
                rest = quotient(f.extent, need)
                if rest is None:
                    return None
                dim.append(Factor(need))
                queue.insert(0, (k, Factor(rest)))
                left = 1
            owner.append(k)
            need = left
        if not dim:
            dim = [UNIT]
            owner.append(None)
        dims.append(tuple(dim))
    return (dims, owner) if all(same(f.extent, 1) for _, f in queue) else None


def shift(v: Value, dim: int, length: Extent, source: Callable[[Expr], Expr]) -> Value:
    """Dimension `dim` replaced by one of `length` whose index i reads `source(i)`: slices, flips, gathers by rule."""
    w = coarse(v, dim)
    first = sum(len(d) for d in w.dims[:dim])
    whole = same(w.shape[dim], length) and source(_PROBE) == _PROBE
    keep = w.dims[dim] if whole else (Factor(length),)

    def at(ix: Index) -> Expr:
        return w.at((*ix[:first], source(ix[first]), *ix[first + 1:]))

    return Value((*w.dims[:dim], keep, *w.dims[dim + 1:]), v.dtype, at)


_PROBE: Expr = call("neg", ZERO)


def wrap(dim: int, n: int) -> int:
    if not -n <= dim < max(n, 1):
        raise Refusal(f"dimension {dim} of a value with {n} dimensions")
    return dim % n if n else 0
