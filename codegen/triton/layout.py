"""How the dims of a kernel's tiles become axes of Triton tensors.

An axis has a size that is a power of two.  Dims that a contraction treats alike (query heads and query rows, against
one key) become one axis, since Triton multiplies matrices: the rows are then as many as there are, not the longest of
the dims.  The order of axes is one for the whole kernel, chosen so that contractions need the fewest transpositions
and what a kernel computes stands on the left, where tensor cores read it from registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from memcomp.ir.expr import Access, variables
from memcomp.ir.tile import Best, Dot, Fold, Load, Loop, Statement, TileKernel, When, made, statements

K_LEAST = 16  # contracted points of a tensor core instruction on 16-bit operands
ORDERED = 6   # axes whose order is searched


@dataclass(frozen=True, slots=True)
class Axis:
    """dims: the last one runs fastest; points: of them all; size: points, rounded up to what Triton takes."""

    dims: tuple[str, ...]
    points: int
    size: int

    @property
    def name(self) -> str:
        return "_".join(self.dims)


@dataclass(frozen=True, slots=True)
class Sides:
    """The dims of a contraction by what they are to it."""

    batch: tuple[str, ...]
    left: tuple[str, ...]   # of the first operand only
    right: tuple[str, ...]
    over: tuple[str, ...]


def sides(k: TileKernel, s: Dot) -> Sides | None:
    """What each dim is to a contraction, the contracted dims in both operands; None where one is in one operand alone:
    that is a sum, no product of matrices."""
    a, b = ({v.name for v in x.index if hasattr(v, "name")} for x in (s.a, s.b))
    own = k.tile(s.tile).dims
    if {*s.over} - (a & b):
        return None
    return Sides(tuple(d for d in own if d in a and d in b), tuple(d for d in own if d in a and d not in b),
                 tuple(d for d in own if d in b and d not in a), s.over)


@dataclass(frozen=True, slots=True)
class Matrices:
    """A contraction as a product of matrices: a over batch, left, over; b over batch, over, right; left before right in
    the order of axes."""

    a: Access
    b: Access
    batch: tuple[Axis, ...]
    left: Axis
    right: Axis
    over: Axis


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of a kernel in order."""

    axes: tuple[Axis, ...]

    def of(self, dims: Iterable[str]) -> tuple[Axis, ...]:
        """The axes of a tile with these dims; a tile of some dims of an axis is as long as the axis."""
        wanted = set(dims)
        return tuple(a for a in self.axes if wanted & set(a.dims))

    def axis(self, dim: str) -> Axis:
        return next(a for a in self.axes if dim in a.dims)

    def matrices(self, k: TileKernel, s: Dot) -> Matrices | None:
        """None where a contraction is no product of matrices, with at most one axis of batches."""
        x = sides(k, s)
        if x is None:
            return None
        batch, left, right, over = (self.of(d) for d in (x.batch, x.left, x.right, x.over))
        if len(batch) > 1 or not len(left) == len(right) == len(over) == 1:
            return None
        if self.axes.index(right[0]) < self.axes.index(left[0]):
            return Matrices(s.b, s.a, batch, right[0], left[0], over[0])
        return Matrices(s.a, s.b, batch, left[0], right[0], over[0])


def layout(k: TileKernel) -> Layout:
    """The axes of a kernel's tiles.

    Where a reduction takes a part of what a contraction would make one axis, that contraction is no product of
    matrices: its dims stay axes of their own, and `Layout.matrices` gives None for it.
    """
    found = [(s, x) for s in statements(k.body) if isinstance(s, Dot) and (x := sides(k, s)) is not None]
    dots, every = [s for s, _ in found], [x for _, x in found]
    together = _joined(k, every)
    while cut := _cut(k, together):
        kept = [n for n, x in enumerate(every) if not any(len({*g} & cut) > 1 for g in _groups(x))]
        dots, every = [dots[n] for n in kept], [every[n] for n in kept]
        together = _joined(k, every)
    contracted = {d for x in every for d in x.over}
    dims = [d.name for d in k.dims]
    axes: list[Axis] = []
    for d in dims:
        members = tuple(x for x in dims if x in together[d])
        if members[0] != d:
            continue
        points = math.prod(k.dim(x).capacity for x in members)
        size = 1 << max(points - 1, 0).bit_length()
        axes.append(Axis(members, points, max(size, K_LEAST) if contracted & set(members) else size))
    return Layout(_ordered(k, axes, dots, every))


def _groups(x: Sides) -> tuple[tuple[str, ...], ...]:
    return x.batch, x.left, x.right, x.over


def _joined(k: TileKernel, every: list[Sides]) -> dict[str, frozenset[str]]:
    """By dim, the dims that these contractions make one axis with it."""
    together: dict[str, frozenset[str]] = {d.name: frozenset({d.name}) for d in k.dims}
    for group in (g for x in every for g in _groups(x)):
        joined = frozenset[str]().union(*(together[d] for d in group))
        together |= dict.fromkeys(joined, joined)
    return together


def _cut(k: TileKernel, together: dict[str, frozenset[str]]) -> frozenset[str]:
    """Dims of one axis of which a reduction takes a part, or of which steps of a loop count some and what stands
    elsewhere has others; empty where there are none."""
    for s in statements(k.body):
        over = [set(s.over)] if isinstance(s, (Fold, Best, Dot)) else []
        over += [{s.order}] if isinstance(s, Best) else []
        for part in over:
            if cut := next((g for g in together.values() if len(g) > 1 and 0 < len(g & part) < len(g)), None):
                return cut
        if isinstance(s, Loop):
            counted = {d.name for d in k.dims if s.var in variables(d.count)}
            inside = {id(x) for x in statements(s.body)}
            others = {d for x in statements(k.body) if id(x) not in inside and not isinstance(x, (Loop, When))
                      for d in k.tile(x.tile).dims} - counted
            if cut := next((g for g in together.values() if g & counted and g & others), None):
                return cut
    return frozenset()


def _ordered(k: TileKernel, axes: list[Axis], dots: list[Dot], every: list[Sides]) -> tuple[Axis, ...]:
    used = [a for a in axes if any({*a.dims} & {*x.batch, *x.left, *x.right, *x.over} for x in every)]
    rest = [a for a in axes if a not in used]
    if not dots or len(used) > ORDERED:
        return (*used, *rest)
    computed = _computed(k.body)

    def price(order: tuple[Axis, ...]) -> float:
        at = {d: n for n, a in enumerate(order) for d in a.dims}
        return sum(_price(s, x, at, computed) for s, x in zip(dots, every, strict=True))

    return (*min(permutations(used), key=price), *rest)


def _price(s: Dot, x: Sides, at: dict[str, int], computed: set[str]) -> float:
    """Transpositions of one contraction, and the operands that must go through shared memory though computed."""
    left = max((at[d] for d in x.left), default=-1)
    right = max((at[d] for d in x.right), default=-1)
    over = max(at[d] for d in x.over) if x.over else -1
    first, second = (s.a.tensor, s.b.tensor) if left <= right else (s.b.tensor, s.a.tensor)
    m, n = sorted((left, right))
    turned = (3.0 if first in computed else 1.0) * (m > over) + (3.0 if second in computed else 1.0) * (over > n >= 0)
    batch = sum(at[d] > min((c for c in (m, n, over) if c >= 0), default=99) for d in x.batch)
    return turned + 8.0 * batch + 2.0 * (second in computed)


def _computed(body: tuple[Statement, ...]) -> set[str]:
    """Tiles that something other than a load writes."""
    return {t for s in statements(body) if not isinstance(s, Load) for t in made(s)}
