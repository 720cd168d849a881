"""What a guard says about a tile: which loop steps it leaves empty, where it holds for the whole tile, and what a
dim's count is.  Comparisons of integers, by the least and the greatest value of their terms; everything in them may be
data (`m <= pos[p]`)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, substitute, variables, walk
from memcomp.ir.simplify import POINTS, linear, simplify

_FLIP = {"gt": "lt", "ge": "le"}
_NEGATION = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
End: TypeAlias = Callable[[Expr, bool], "Expr | None"]  # the least or greatest value of an expression in a tile


@dataclass(frozen=True, slots=True)
class Half:
    """The condition `step * loop variable + rest < 0` over integers; rest: free of the loop variable."""

    step: int
    rest: Expr


def half(cond: Expr, loop: str, integers: Collection[str]) -> Half | None:
    """`cond` as a `Half`, or None: not an inequality, not over integers, or the loop variable stands elsewhere."""
    d = difference(cond)
    terms = linear(call("sub", d, 1), integers=integers) if d is not None else None
    if terms is None:
        return None
    step = terms.pop(Var(loop), 0)
    rest = total([scaled(term, c) for term, c in terms.items()])
    return None if loop in variables(rest) else Half(step, rest)


def difference(cond: Expr) -> Expr | None:
    """An expression that is at most 0 exactly where an inequality of integers holds; None for other conditions, and
    for comparisons with numbers so large (`sys.maxsize`) that a difference from them may not be one of 64 bits."""
    if not isinstance(cond, Call) or cond.op not in ("lt", "le", "gt", "ge"):
        return None
    if any(isinstance(n, Const) and abs(n.value) >= 4 * POINTS for n in walk(cond)):
        return None
    a, b = cond.args[::-1] if cond.op in _FLIP else cond.args
    return call("add", call("sub", a, b), 1) if cond.op in ("lt", "gt") else call("sub", a, b)


def plainer(cond: Expr, integers: Collection[str]) -> Expr:
    """The same condition without `not`, `eq` and `ne` of integers."""
    if not isinstance(cond, Call):
        return cond
    if cond.op in ("and", "or"):
        return Call(cond.op, tuple(plainer(a, integers) for a in cond.args))
    inner = cond.args[0] if cond.op == "not" else None
    if isinstance(inner, Call) and inner.op in ("and", "or"):
        swapped = Call("or" if inner.op == "and" else "and", tuple(call("not", a) for a in inner.args))
        return plainer(swapped, integers)
    test = inner if isinstance(inner, Call) else cond
    if test.op not in _NEGATION or linear(call("sub", *test.args), integers=integers) is None:
        return cond
    if test is inner:
        return plainer(Call(_NEGATION[test.op], test.args), integers)
    if cond.op == "eq":
        return call("and", call("le", *cond.args), call("ge", *cond.args))
    return call("or", call("lt", *cond.args), call("gt", *cond.args)) if cond.op == "ne" else cond


def scaled(term: Expr | None, c: int) -> Expr:
    return Const(c) if term is None else term if c == 1 else call("mul", term, c)


def total(parts: list[Expr]) -> Expr:
    out: Expr = Const(0)
    for p in parts:
        out = call("add", out, p)
    return simplify(out, index=True)


def near(e: Expr) -> Expr:
    """What places are compared with, of which one number of data is a term: with that number no further away than
    anything can be from every place.  The comparison says the same, and no sum on the way to it wraps around."""
    terms = linear(e, integers=reads(e)) or {}
    data = [(t, c) for t, c in terms.items() if t is not None and reads(t)]
    if len(data) != 1 or abs(data[0][1]) != 1 or abs(terms.get(None, 0)) > POINTS:
        return e
    far, told = 4 * POINTS, data[0][0]
    return substitute(e, {told: call("max", call("min", told, far), -far)}) if isinstance(told, Access) else e


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


def count_of(h: Half, name: str, loop: str, capacity: int, end: End) -> Expr | None:
    """Count of dim `name` behind which the guard holds nowhere in the tile: `name < limit`, the limit free of data."""
    terms = linear(h.rest, integers={n.tensor for n in walk(h.rest) if isinstance(n, Access)})
    if terms is None or terms.pop(Var(name), 0) != 1:
        return None
    rest = end(total([scaled(term, c) for term, c in terms.items()]), False)
    if rest is None or name in variables(rest) or any(isinstance(n, Access) for n in walk(rest)):
        return None
    offset = call("add", call("mul", Var(loop), h.step), rest) if h.step else rest
    return simplify(call("min", capacity, call("neg", offset)), index=True)


def start_of(cond: Expr, name: str) -> Expr:
    """What is added to dim `name` on its side of the comparison: the global index of the dim's first point."""
    assert isinstance(cond, Call)
    side = next(a for a in cond.args if name in variables(a))
    return simplify(call("sub", side, Var(name)), index=True)


def natural(e: Expr) -> bool:
    """Is an integer of sizes, indices and counts surely not negative?"""
    if isinstance(e, Const):
        return e.value >= 0
    if isinstance(e, (Var, Size)):
        return True
    if isinstance(e, Call) and e.op in ("add", "mul", "floordiv", "mod", "max", "min", "ceildiv"):
        return all(natural(a) for a in e.args)
    return False
