"""Tiles as boxes of tensors: what the copy engine of sm_90 and later fetches and stores by a descriptor.

A descriptor is made by the program instance before its loops: a base at the part of the index that stays, and extents
that end where the tile's points stop to count, not where the tensor does.  So what it fills with zeros, and leaves out
of a store, is what a mask would be.  Addresses then take no registers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

from memcomp.codegen.triton.layout import Axis
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, reads, symbols, variables
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
            if not symbols(p.shape[n]) <= set(told):
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
        limits = _limits(dims[d], sizes[d], at)
        if limits == [] and symbols(p.shape[n]) <= set(told):
            limits = [p.shape[n]]
        if not limits or any((variables(e) | reads(e)) & {*moving, *inside} for e in limits):
            return None
        sides.append(Side(n, d, sizes[d], reduce(lambda x, y: call("min", x, y), dict.fromkeys(limits)), at))
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


def _limits(d: Dim, size: int, at: Expr) -> list[Expr]:
    """Indices below which `at + point` is exactly for the points of a box that count; [] where they all do."""
    return [simplify(call("add", part, at), index=True) for part in _least(d.count)
            if not (isinstance(part, Const) and part.value >= size)]


def _least(e: Expr) -> Iterator[Expr]:
    """The parts of a minimum."""
    if isinstance(e, Call) and e.op == "min":
        for a in e.args:
            yield from _least(a)
    else:
        yield e
