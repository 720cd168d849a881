"""Tiles as the memory unit fetches them: boxes of tensors, by a descriptor that the host makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memcomp.codegen.triton.layout import Axis
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, Var, call, variables, walk
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Load, TileKernel, TileProgram

RANKS = 5          # of a tensor that a descriptor can have
ALIGNED = 16       # bytes: where a tensor begins, and of each stride but the last
_SWIZZLES = (128, 64, 32)
_LONGEST = 256     # elements along a rank of what is fetched at once
NAMES = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True, slots=True)
class Box:
    """A tile in a tensor, or `parts` boxes that make it.

    places: the positions of the param's index that the descriptor has, in its order: the last has stride 1.
    shape: elements along each; at: where it begins.  sides: the tile as a matrix in shared memory: the axis that runs
    slowly, and the one that runs fast.
    """

    param: str
    dtype: str
    places: tuple[int, ...]
    shape: tuple[int, ...]
    at: tuple[Expr, ...]
    sides: tuple[Axis, Axis]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def swizzle(self) -> int:
        """Bytes within which the memory unit permutes what it writes, so that tensor cores read without conflicts."""
        return next(w for w in _SWIZZLES if self.shape[-1] * BYTES[self.dtype] >= w)

    @property
    def piece(self) -> tuple[int, ...]:
        """What the unit fetches at once: as wide as a swizzle, and 256 elements long at most."""
        return (*(min(n, _LONGEST) for n in self.shape[:-1]),
                min(self.shape[-1], self.swizzle // BYTES[self.dtype]))

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns in shared memory."""
        return math.prod(self.shape) // self.shape[-1], self.shape[-1]


def box(tp: TileProgram, k: TileKernel, s: Load, axes: tuple[Axis, Axis], unit: int, rows: int = 0) -> Box:
    """The box of a load.  axes: of the tile; unit: the position of stride 1 in the param; rows: how many points of
    axes[0] one box takes, all of them where 0.

    Raises Refusal where an index is data, or no dim of the tile and a scalar, or where the box would hold elements that
    the tile has not.
    """
    p = tp.param(s.source.tensor)

    def refuse(why: str) -> Refusal:
        return Refusal(f"{s.source.tensor} cannot be fetched as a box: {why}", k.name, "the triton backend takes it")

    if p.dtype not in NAMES:
        raise refuse(f"it is stored as {p.dtype}, and its products take {' or '.join(NAMES)}")
    dims = {d for a in axes for d in a.dims}
    extents = _extents(k, axes, rows)
    places: list[tuple[int, int, Expr, str]] = []
    for n, index in enumerate(s.source.index):
        inside = variables(index) & dims
        if any(isinstance(x, Access) for x in walk(index)):
            raise refuse(f"position {n} of its index is data")
        if not inside:
            if p.shape[n] != Const(1):
                places.append((n, 1, index, ""))
            continue
        terms, d = linear(index), min(inside)
        if terms is None or len(inside) > 1 or terms.get(Var(d)) != 1:
            raise refuse(f"position {n} of its index is no dim of the tile plus a number")
        size, capacity = extents[d], k.dim(d).capacity
        start = simplify(call("sub", index, Var(d)), index=True)
        if size > capacity and (start != Const(0) or p.shape[n] != Const(capacity)):
            raise refuse(f"{d} has {capacity} points and a box {size}")
        places.append((n, size, start, d))
    places.sort(key=lambda x: (x[0] == unit, x[0]))
    order = [d for *_, d in places if d]
    slow, fast = axes if order[-1:] == [axes[1].dims[-1]] else axes[::-1]
    if not places or places[-1][0] != unit or order != [*slow.dims, *fast.dims] or len(fast.dims) > 1:
        raise refuse("its dims do not lie in memory as rows and columns do")
    if len(places) > RANKS:
        raise refuse(f"it has {len(places)} ranks, and a descriptor has {RANKS}")
    if places[-1][1] * BYTES[p.dtype] < _SWIZZLES[-1]:
        raise refuse(f"{places[-1][1]} elements lie next to one another")
    return Box(p.name, p.dtype, tuple(x[0] for x in places), tuple(x[1] for x in places), tuple(x[2] for x in places),
               (slow, fast))


def _extents(k: TileKernel, axes: tuple[Axis, Axis], rows: int) -> dict[str, int]:
    """Points of each dim in a box; the first dim of an axis takes what the others leave."""
    out: dict[str, int] = {}
    for a, left in zip(axes, (rows or axes[0].size, axes[1].size), strict=True):
        for d in reversed(a.dims[1:]):
            out[d] = min(k.dim(d).capacity, left)
            if left % out[d] or k.dim(d).capacity % out[d]:
                raise Refusal(f"{left} points do not divide into {k.dim(d).capacity} of {d}", k.name)
            left //= out[d]
        out[a.dims[0]] = left
    return out


def offsets(k: TileKernel, a: Axis, point: int) -> dict[str, int]:
    """The place of a point of an axis in each of its dims."""
    out: dict[str, int] = {}
    for d in reversed(a.dims[1:]):
        point, out[d] = divmod(point, k.dim(d).capacity)
    out[a.dims[0]] = point
    return out
