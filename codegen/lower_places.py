"""Reductions to values and places, made ready for tiles: places written out, short rows filled, steps joined."""

from __future__ import annotations

from dataclasses import replace

from memcomp.ir.cascade import Einsum, Rank
from memcomp.ir.expr import Access, Const, Expr, Size, Var, call, conjunction, substitute, variables
from memcomp.ir.places import Placed, explicit, order_of, placed, row_major
from memcomp.ir.simplify import simplify
from memcomp.ir.tile import NOWHERE


def filled(e: Einsum, values: tuple[Expr, Expr], empty: tuple[Expr, Expr], total: Expr) -> tuple[Expr, Expr]:
    """Both results, the rest of a list of too few points left empty, places inside the row."""
    order = order_of(e)
    assert order is not None
    place = call("min", values[1], simplify(call("sub", total, 1), index=True))
    enough = call("lt", Var(order), total)
    return call("where", enough, values[0], empty[0]), call("where", enough, place, empty[1])


def stream(e: Einsum, sub: dict[Expr, Expr], over: tuple[str, ...], guard: Expr | None, steps: Rank,
           empty: tuple[Expr, Expr], identity: Expr, mine: list[Expr]) -> list[Einsum]:
    """The statement over a cut rank as a list that each step is joined to.

    sub: the rank's variable as step and point; over, guard: of a step; mine: guards of the results.
    """
    assert e.reduce is not None
    given, order = placed(explicit(e).body), order_of(e)
    assert order is not None
    plain = tuple(dict.fromkeys(v for i in e.out.index for v in sorted(variables(i))))

    def at(step: Expr) -> tuple[Access, Access]:
        lead = tuple(Var(v) for v in plain if v != order)
        value, place = (Access(f"{n}_run", (*lead, step, Var(order))) for n in e.names)
        return value, place

    first = given.old or (identity, Const(NOWHERE))
    here, there = at(Var(steps.var)), at(call("add", Var(steps.var), 1))
    body = Placed(substitute(given.value, sub), substitute(given.place, sub) if given.place else None, here).body()
    ends: tuple[Expr, Expr] = at(Size(steps.name))
    if given.old is None:
        ends = filled(e, ends, empty, row_major(e.reduce.over)[1])
    return [
        *(Einsum((o,), x) for o, x in zip(at(Const(0)), first, strict=True)),
        Einsum(there, body, replace(e.reduce, over=over), guard),
        *(Einsum((o,), x, None, conjunction(mine)) for o, x in zip(e.outs, ends, strict=True)),
    ]
