"""Tiles as boxes of tensors: what the copy engine of sm_90 and later fetches and stores by a descriptor.

A descriptor is made by the program instance before its loops: a base at the part of the index that stays, and extents
that end where the tile's points stop to count, not where the tensor does.  So what it fills with zeros, and leaves out
of a store, is what a mask would be.  Addresses then take no registers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce

from memcomp.codegen.triton.layout import Axis
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, variables, walk
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Dim, Param

FORMATS = ("bf16", "f16")  # of what is fetched so: what tensor cores multiply
RANKS = 5       # of a descriptor
MOST = 256      # elements of a box along one of them
LEAST = 16      # bytes next to one another


@dataclass(frozen=True, slots=True)
class Side:
    """One rank of a descriptor.  position: in the tensor's index; dim: of the tile, "" for a single element; size: of
    the box; extent: where the descriptor ends; at: where the box begins."""

    position: int
    dim: str
    size: int
    extent: Expr
    at: Expr


@dataclass(frozen=True, slots=True)
class Box:
    """A tile in a tensor.  base: (position, index) of what stays; sides: slowest first, the last has stride 1."""

    tensor: str
    base: tuple[tuple[int, Expr], ...]
    sides: tuple[Side, ...]

    @property
    def descriptor(self) -> tuple[object, ...]:
        """Equal for boxes of one descriptor."""
        return self.tensor, self.base, tuple((s.position, s.size, s.extent) for s in self.sides)


def box(a: Access, p: Param, unit: int, axes: tuple[Axis, ...], dims: Mapping[str, Dim], moving: Collection[str],
        told: Collection[str]) -> Box | None:
    """The box of an access at the points of axes; None where it is none.

    unit: the position of stride 1.  moving: loop variables, and tiles that are written in loops.  told: the extents
    that the kernel knows.
    """
    inside = {d for x in axes for d in x.dims}
    sizes = _sizes(axes, dims)
    if sizes is None or any(len(variables(i) & inside) > 1 for i in a.index):
        return None
    base: list[tuple[int, Expr]] = []
    sides: list[Side] = []
    for n, index in enumerate(a.index):
        found = variables(index) & inside
        if not found:
            if n == unit:
                return None
            if not (variables(index) | reads(index)) & set(moving):
                base.append((n, index))
                continue
            if not _ranks(p.shape[n]) <= {*told}:
                return None
            sides.append(Side(n, "", 1, p.shape[n], index))
            continue
        d = min(found)
        terms = linear(index, integers=reads(index))
        if terms is None or terms.get(Var(d)) != 1:
            return None
        at = simplify(call("sub", index, Var(d)), index=True)
        if d in variables(at) or d in (s.dim for s in sides):
            return None
        extent = _behind(dims[d].count, sizes[d], at) or p.shape[n]
        if (variables(extent) | reads(extent)) & {*moving, *inside} or not _ranks(extent) <= {*told}:
            return None
        sides.append(Side(n, d, sizes[d], extent, at))
    sides.sort(key=lambda s: (s.position == unit, s.position))
    if not 2 <= len(sides) <= RANKS or {s.dim for s in sides if s.dim} != inside or sides[-1].position != unit:
        return None
    if sides[-1].size * BYTES[p.dtype] < LEAST or max(s.size for s in sides) > MOST:
        return None
    return Box(a.tensor, tuple(base), tuple(sides))


def _sizes(axes: tuple[Axis, ...], dims: Mapping[str, Dim]) -> dict[str, int] | None:
    """The points of each dim in a box; the first dim of an axis takes what the others leave.  None where they are no
    powers of two."""
    out: dict[str, int] = {}
    for a in axes:
        left = a.size
        for d in a.dims[:0:-1]:
            out[d] = dims[d].capacity
            if out[d] & (out[d] - 1) or out[d] > left:
                return None
            left //= out[d]
        out[a.dims[0]] = left
    return out


def _ranks(e: Expr) -> set[str]:
    return {n.rank for n in walk(e) if isinstance(n, Size)}


def _behind(count: Expr, size: int, at: Expr) -> Expr | None:
    """The index below which `at + point` is exactly for the points of a box that count; None where all do."""
    if isinstance(count, Const) and count.value >= size:
        return None
    if not isinstance(count, Call) or count.op not in ("min", "max"):
        return simplify(call("add", count, at), index=True)
    least = count.op == "min"
    found = [_behind(x, size, at) for x in count.args if least or not (isinstance(x, Const) and x.value <= 0)]
    ends = list(dict.fromkeys(x for x in found if x is not None))
    if not ends or (None in found and not least):
        return None
    return reduce(lambda x, y: call(count.op, x, y), ends)
