"""What a guard says about a tile: which loop steps it leaves empty, where it holds for the whole tile, and what a
dim's count is.  Affine in the loop variable and in tile dims; everything else in it may be data (`m <= pos[p]`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, variables, walk
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.tile import Dim

_FLIP = {"gt": "lt", "ge": "le"}


@dataclass(frozen=True, slots=True)
class Half:
    """The condition `step * loop variable + sum(coefficient * dim) + plain + data < 0` over integers.

    plain: free of dims and of the loop variable.  data: what is left, read from tiles over dims (`-pos[p0]`); free of
    the loop variable.  The dims of `data` are those of its accesses.
    """

    step: int
    dims: tuple[tuple[str, int], ...]
    plain: Expr
    data: Expr | None

    def data_dims(self) -> tuple[str, ...]:
        return tuple(sorted(variables(self.data))) if self.data is not None else ()


def half(
    cond: Expr, loop: str, dims: Collection[str], integers: Collection[str], varying: Collection[str]
) -> Half | None:
    """`cond` as a `Half`, or None: not an inequality, not over integers, or data that change along the loop.

    integers: names of tiles known to hold integers.  varying: tiles written inside the loop.
    """
    if not isinstance(cond, Call) or cond.op not in ("lt", "le", "gt", "ge"):
        return None
    a, b = cond.args
    if cond.op in _FLIP:
        a, b = b, a
    strict = cond.op in ("lt", "gt")
    terms = linear(a - b if strict else a - b - 1, integers=integers)
    if terms is None:
        return None
    step, along, plain, data = 0, dict[str, int](), list[Expr](), list[Expr]()
    for term, c in terms.items():
        if isinstance(term, Var) and term.name == loop:
            step = c
        elif isinstance(term, Var) and term.name in dims:
            along[term.name] = c
        else:
            e: Expr = Const(c) if term is None else term if c == 1 else call("mul", term, c)
            names = variables(e)
            tiles = {n.tensor for n in walk(e) if isinstance(n, Access)}
            if loop in names or tiles & set(varying):
                return None
            (data if names & set(dims) else plain).append(e)
    return Half(step, tuple(sorted(along.items())), _total(plain) or Const(0), _total(data))


def _total(parts: list[Expr]) -> Expr | None:
    out: Expr | None = None
    for p in parts:
        out = p if out is None else call("add", out, p)
    return None if out is None else simplify(out, index=True)


def extreme(
    h: Half,
    greatest: bool,
    dim: Callable[[str], Dim],
    fixed: Collection[str],
    fold: Callable[[Expr, tuple[str, ...], bool], Expr],
) -> Expr:
    """Least or greatest value of everything in `h` but the loop term, over the points of a tile.

    Dims in `fixed` have a count that the loop does not change; the others count as full.  `fold` makes the least or
    greatest value of data over dims available as an expression.
    """
    out = h.plain
    for name, c in h.dims:
        d = dim(name)
        if (c > 0) == greatest:
            last = call("sub", d.count, 1) if name in fixed else Const(d.capacity - 1)
            out = call("add", out, call("mul", last, c))
    if h.data is not None:
        out = call("add", out, fold(h.data, h.data_dims(), greatest))
    return simplify(out, index=True)


def first_step(step: int, least: Expr) -> Expr | None:
    """Loop steps before this one are empty (a lower bound on the loop variable), from `step * v + least < 0`."""
    if step >= 0:
        return None
    return simplify(call("add", call("floordiv", least, -step), 1), index=True)


def last_step(step: int, least: Expr) -> Expr | None:
    """Loop steps from this one on are empty."""
    if step <= 0:
        return None
    return simplify(call("ceildiv", call("neg", least), step), index=True)


def holds_everywhere(step: int, loop: str, greatest: Expr) -> Expr:
    """Condition on the loop variable under which the guard is true at all points of the tile."""
    return simplify(call("lt", call("add", call("mul", Var(loop), step), greatest), 0), index=True)


def count_of(h: Half, name: str, loop: str, capacity: int) -> Expr | None:
    """Count of dim `name` where the guard only cuts off its tail: `name < limit`, the limit free of dims and data."""
    if h.data is not None or h.dims != ((name, 1),) or any(isinstance(n, Access) for n in walk(h.plain)):
        return None
    offset = call("add", call("mul", Var(loop), h.step), h.plain) if h.step else h.plain
    return simplify(call("min", capacity, call("neg", offset)), index=True)


def start_of(cond: Expr, name: str) -> Expr:
    """What is added to dim `name` on its side of the comparison: the global index of the dim's first point."""
    assert isinstance(cond, Call)
    side = next(a for a in cond.args if name in variables(a))
    return simplify(call("sub", side, Var(name)), index=True)
