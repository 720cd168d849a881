"""Order lifting: an order reduction moves through maps that are monotone in the carried value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memcomp.ir.expr import Call, Expr
from memcomp.ir.laws import relied
from memcomp.ir.ops import OPS
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.linear import flatten, to_expr
from memcomp.passes.derive.sides import NoLaw, Sides


@dataclass(frozen=True, slots=True)
class Lifted:
    """`reduce body = rebuild(reduce inner)`, with max and min swapped when `flip`; `laws` are the steps taken."""

    inner: Expr
    rebuild: Callable[[Expr], Expr]
    flip: bool = False
    laws: tuple[str, ...] = ()


def lift(e: Expr, sides: Sides, facts: Facts, strict: bool = False) -> Lifted:
    """Walk from the root to the carried part; each step must be monotone with the rest constant.

    strict: only strictly monotone steps (indices are returned).  Raises NoLaw.
    """
    if sides(e) == "carried":
        return Lifted(e, lambda x: x)
    if sides.free(e) or not isinstance(e, Call):
        raise NoLaw("order", e, "nothing carried to reduce")
    row = OPS[e.op]
    if e.op in ("add", "sub", "neg"):
        return _sum(e, sides, facts, strict)
    if "sign" in row.monotone:
        return _scaled(e, sides, facts, strict)
    moving = [i for i, a in enumerate(e.args) if not sides.free(a)]
    if len(moving) == 1 and moving[0] < len(row.monotone) and row.monotone[moving[0]]:
        i = moving[0]
        if strict and not row.strict:
            raise NoLaw(e.op, e, f"{e.op} is not strictly monotone, and indices are asked for")
        inner = lift(e.args[i], sides, facts, strict)
        return _step(inner, lambda x: Call(e.op, (*e.args[:i], x, *e.args[i + 1:])), row.monotone[i] == "dec",
                     (*_rows(e, "monotone"), *(_rows(e, "strict") if strict else ())))
    raise NoLaw(e.op, e, f"{e.op} is not monotone in one carried argument")


def _rows(e: Call, kind: str) -> tuple[str, ...]:
    """The rows of the law table that a step relies on.  Raises NoLaw where there are none."""
    rows = relied(e.op, kind)
    if not rows:
        raise NoLaw(e.op, e, f"the table has no row {e.op}.{kind}")
    return rows


def _step(inner: Lifted, outer: Callable[[Expr], Expr], flip: bool, laws: tuple[str, ...]) -> Lifted:
    return Lifted(inner.inner, lambda x: outer(inner.rebuild(x)), inner.flip ^ flip, (*inner.laws, *laws))


def _sum(e: Call, sides: Sides, facts: Facts, strict: bool) -> Lifted:
    """Adding a constant keeps the order; a minus before the carried part turns it."""
    parts = flatten(e)
    laws = _rows(e, "linear")
    moving = [(k, x) for k, x in parts if not sides.free(x)]
    rest = [(x, k) for k, x in parts if sides.free(x)]
    if all(sides(x) == "carried" for _, x in moving):
        body = to_expr([(x, k) for k, x in moving])
        return Lifted(body, lambda x: to_expr([(x, 1), *rest]), False, laws)
    if len(moving) > 1:
        raise NoLaw(e.op, e, "a sum of a carried value and one that mixes both sides")
    k, x = moving[0]
    inner = lift(x, sides, facts, strict)
    return _step(inner, lambda y: to_expr([(y, k), *rest]), k < 0, laws)


def _scaled(e: Call, sides: Sides, facts: Facts, strict: bool) -> Lifted:
    a, b = e.args
    if sides.free(b):
        moving, factor, at = a, b, 0
    elif OPS[e.op].monotone[1:] == ("sign",) and sides.free(a):
        moving, factor, at = b, a, 1
    else:
        raise NoLaw(e.op, e, f"{e.op} of two carried values, one of which mixes both sides")
    sign = facts.interval(factor)
    needs_positive = strict or e.op == "div"
    up = sign.positive if needs_positive else sign.nonneg
    down = sign.hi < 0 or (not needs_positive and sign.hi <= 0)
    if not (up or down):
        raise NoLaw(e.op, e, "the sign of the constant factor is not proved")
    inner = lift(moving, sides, facts, strict)
    return _step(inner, lambda x: Call(e.op, (x, factor) if at == 0 else (factor, x)), not up,
                 (*_rows(e, "monotone"), *facts.because(factor)))
