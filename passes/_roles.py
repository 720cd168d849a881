"""What ranks are to a statement and to a group of statements: common, streamed, private."""

from __future__ import annotations

import math
from collections.abc import Iterable

from memcomp.ir.cascade import Cascade, Einsum, Knob
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, transform, variables, walk
from memcomp.ir.places import order_of

WHOLE = 256  # a rank of at most so many points may be a tile dim as it is
HELD = 12_288  # and in a loop one of at most so many (the features of a head)


def largest(c: Cascade, rank: str) -> int | None:
    """The greatest extent of a rank where that is a number: fixed, or a knob's largest choice."""
    x = c.rank(rank).extent
    if isinstance(x, Knob):
        return max(x.choices)
    if isinstance(x, Const) and isinstance(x.value, int):
        return x.value
    return None


def whole(c: Cascade, var: str) -> bool:
    """May the variable's rank be a tile dim without being cut?"""
    n = largest(c, var.upper())
    return n is not None and n <= WHOLE


def held(c: Cascade, var: str) -> bool:
    """May the variable's rank be a tile dim of a loop, whose tiles are walked once a step?"""
    n = largest(c, var.upper())
    return n is not None and n <= HELD


def out_vars(e: Einsum) -> tuple[str, ...]:
    """Variables of the result in the order of its index."""
    return tuple(dict.fromkeys(n.name for o in e.outs for i in o.index for n in walk(i) if isinstance(n, Var)))


def common(statements: Iterable[Einsum]) -> tuple[str, ...]:
    """Variables that every statement's result carries, in the order of the first, but those that count the results of
    a top-k: a task has the whole list."""
    members = list(statements)
    each, counted = [out_vars(e) for e in members], {order_of(e) for e in members}
    return tuple(v for v in each[0] if v not in counted and all(v in o for o in each)) if each else ()


def factors(e: Expr) -> list[Expr]:
    return [f for a in e.args for f in factors(a)] if isinstance(e, Call) and e.op == "mul" else [e]


def product_operands(e: Einsum) -> list[Expr]:
    """The factors of a sum of products that carry a summed variable; none where the statement is not one."""
    if e.reduce is None or e.reduce.monoid != "sum":
        return []
    found = [f for f in factors(e.body) if reads(f) and variables(f) & set(e.reduce.over)]
    return found if len(found) > 1 else []


def accesses(e: Einsum) -> list[Access]:
    """Every access in body, guard and output index (not the outputs themselves)."""
    return list(e.accesses())


def carried(c: Cascade) -> dict[str, tuple[str, Einsum, int]]:
    """Tensors written one step ahead: name -> (iterative variable, the writer, position of that index)."""
    out: dict[str, tuple[str, Einsum, int]] = {}
    for e in c.einsums:
        for o in e.outs:
            for k, i in enumerate(o.index):
                for v in variables(i):
                    if c.rank(v.upper()).iterative and i == call("add", Var(v), 1):
                        out[o.tensor] = v, e, k
    return out


def closed(c: Cascade, e: Expr) -> Expr:
    """Sizes of derived and fixed ranks replaced by what they are; only run-time symbols remain."""

    def f(n: Expr) -> Expr:
        if (
            isinstance(n, Size)
            and not isinstance(x := c.rank(n.rank).extent, Knob)
            and x is not None
            and not any(isinstance(a, Access) for a in walk(x))
        ):
            return closed(c, x)
        return n

    return transform(e, f)


def shared(c: Cascade, loop: list[Einsum], var: str) -> tuple[str, ...]:
    """Variables of which every task of a loop over `var` has its own values: those of all carried tensors, but for
    short ones that some product of the loop lacks (a task for each would compute that product again).

    A carried temporary that lacks some of them is computed by every task anew, if it is small beside the others.  What
    is joined after the loop over a short one (groups of a sum) stays with one task where its tiles are no larger than
    a row of features may be, and other variables are left to run in parallel."""
    mine = c.once(carried)
    states = [e for e in loop if any(n in mine and mine[n][1] is e and mine[n][0] == var for n in e.names)]
    products = [set(out_vars(e)) for e in loop if product_operands(e)]
    again = _repeatable(c, states, var)
    points = common([e for e in states if e not in again] or loop)
    within = {v for e in loop for v in (e.reduce.over if e.reduce else ()) if held(c, v)}  # every task has all of it
    own = tuple(v for v in points
                if v != var and v not in within and (not whole(c, v) or all(v in p for p in products)))
    joined = _joined(c, loop, var) if any(whole(c, v) for v in own) else set()
    rest = tuple(v for v in own if v not in joined)
    sizes = [math.prod(largest(c, v.upper()) or HELD for v in set(out_vars(e)) - {var, *rest}) for e in states]
    return rest if rest and max(sizes, default=0) <= HELD else own


def _joined(c: Cascade, loop: list[Einsum], var: str) -> set[str]:
    """Short variables over which what a loop leaves is summed after it, but for shares of the loop's own rank."""
    steps = c.rank(var.upper()).extent
    shares = set[str]()
    if steps is not None and not isinstance(steps, Knob):
        shares = {n.rank.lower() for n in walk(steps) if isinstance(n, Size)}
    mine, inside = {n for e in loop for n in e.names}, {id(e) for e in loop}
    out: set[str] = set()
    for e in c.einsums:
        if id(e) not in inside and e.reads() & mine and not any(c.rank(v.upper()).iterative for v in e.space()):
            mine |= set(e.names)
            out |= {v for v in (e.reduce.over if e.reduce else ()) if whole(c, v) and v not in shares}
    return out


def _repeatable(c: Cascade, states: list[Einsum], var: str) -> list[Einsum]:
    """Carried temporaries without variables that all larger ones have, read only at points that have them too."""
    points = {e.names: set(out_vars(e)) - {var} for e in states}
    out = []
    for e in states:
        larger = [p for p in points.values() if p > points[e.names]]
        full = set.intersection(*larger) if larger else set()
        if (
            full > points[e.names]
            and c.temporary(e.out.tensor)
            and all(full <= set(out_vars(o)) for n in e.names for o in c.readers(n) if o.names not in points)
        ):
            out.append(e)
    return out
