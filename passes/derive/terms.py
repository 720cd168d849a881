"""Terms: coef * a-factors * exp(a-exponent) * c-factors * exp(c-exponent) under conditions, and gauges of atoms.

Conditions are applied by choice, never by multiplication.  Which functions are exponentials, logarithms and their bases
is read off the operator table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from memcomp.ir.expr import Access, Call, Const, Expr, Var
from memcomp.ir.ops import OPS
from memcomp.passes.derive.linear import ONE, Linear, accumulate, added, flatten, number, to_expr

LN2 = math.log(2.0)
Powers: TypeAlias = tuple[tuple[Expr, float], ...]


def exponential_base(op: str) -> float | None:
    """log(base) of a function that takes + to *, None for any other."""
    row = OPS.get(op)
    return math.log(float(row.numpy(1.0))) if row is not None and row.hom == ("add", "mul") else None


def logarithm_scale(op: str) -> float | None:
    """k with f(x) = k log(x) for a function that takes * to +, None for any other."""
    row = OPS.get(op)
    return float(row.numpy(math.e)) if row is not None and row.hom == ("mul", "add") else None


@dataclass(frozen=True, slots=True)
class Gauge:
    """An atom y measured from a reference: y = d + rho.

    kind: max or min (an extreme of y), first (mean of the first live tile), running (mean so far) or weighted (mean so
    far under the weights that y's powers come with; `weight`: what these read).
    body: y; `level` is its part that varies along the rank as a linear form, `offset` the rest (kept inside y).
    guard: the points whose extreme or mean the reference is.
    """

    name: str
    kind: str
    body: Expr
    guard: tuple[Expr, ...]
    level: tuple[tuple[Expr, float], ...]
    offset: tuple[tuple[Expr, float], ...] = ()
    carried: str = ""
    weight: tuple[Expr, ...] = ()

    @property
    def shift(self) -> Access:
        """d, carried along the rank."""
        return Access(f"$d:{self.name}", (Var(self.carried),))

    @property
    def rho(self) -> Access:
        """The reference; on the c-side."""
        return Access(f"$rho:{self.name}", ())


@dataclass(frozen=True, slots=True)
class Term:
    """coef * prod a**p * exp(ea) * prod c**p * exp(ec) where `when` (carried) and `if_` (constant) hold.

    mask: where the exponential is not exp(-inf) = 0; unlike `when` it does not keep an infinite c-side out.
    """

    coef: float = 1.0
    a: Powers = ()
    ea: Powers = ()
    c: Powers = ()
    ec: Powers = ()
    when: tuple[Expr, ...] = ()
    if_: tuple[Expr, ...] = ()
    mask: tuple[Expr, ...] = ()

    def times(self, other: Term) -> Term:
        return Term(self.coef * other.coef, _multiplied(self.a, other.a), _joined(self.ea, other.ea),
                    _multiplied(self.c, other.c), _joined(self.ec, other.ec),
                    tuple(dict.fromkeys(self.when + other.when)), tuple(dict.fromkeys(self.if_ + other.if_)),
                    tuple(dict.fromkeys(self.mask + other.mask)))

    @property
    def conditional(self) -> bool:
        return bool(self.when or self.if_ or self.mask)

    def power(self, p: float) -> Term:
        return replace(self, coef=self.coef ** p if p != 1 else self.coef, a=powered(self.a, p),
                       ea=powered(self.ea, p), c=powered(self.c, p), ec=powered(self.ec, p))

    def scaled(self, k: float) -> Term:
        return replace(self, coef=self.coef * k)


def _joined(x: Powers, y: Powers) -> Powers:
    """The sum of two linear forms."""
    return tuple(added(dict(x), dict(y)).items()) if x and y else x or y


def _multiplied(x: Powers, y: Powers) -> Powers:
    """The product of two products; x**p * x**-q is kept, since it is NaN where x is 0."""
    if not (x and y):
        return x or y
    out: dict[tuple[Expr, bool], float] = {}
    for e, p in x + y:
        out[e, p > 0] = out.get((e, p > 0), 0) + p
    return tuple((e, p) for (e, _), p in out.items())


def powered(x: Powers, p: float) -> Powers:
    return tuple((e, k * p) for e, k in x)


def pushed(op: str, choice: Call) -> Call:
    c, u, v = choice.args
    return Call("where", (c, Call(op, (u,)), Call(op, (v,))))


def masked(e: Expr) -> tuple[Expr, Expr] | None:
    """(condition, value) of `where(condition, value, -inf)`."""
    if isinstance(e, Call) and e.op == "where":
        if number(e.args[2]) == -math.inf:
            return e.args[0], e.args[1]
        if number(e.args[1]) == -math.inf:
            return Call("not", (e.args[0],)), e.args[2]
    return None


def growing(e: Expr) -> bool:
    """An exponential stands where + - * / and choices can reach it (growth would stay hidden in an atom)."""
    if not isinstance(e, Call):
        return False
    if exponential_base(e.op) is not None:
        return True
    return e.op in ("add", "sub", "neg", "mul", "div", "square", "pow", "where") and any(growing(a) for a in e.args)


def _frozen(x: Powers) -> frozenset[tuple[Expr, float]]:
    return frozenset(x)


def collect(terms: list[Term]) -> list[Term]:
    """Like terms become one: equal a-side, exponents and conditions; the c-sides add up to one expression."""
    groups: dict[object, list[Term]] = {}
    for t in terms:
        if t.coef != 0 and not any(Call("not", (c,)) in conds for conds in (t.when, t.if_) for c in conds):
            tag = (_frozen(t.a), _frozen(t.ea), _frozen(t.ec), frozenset(t.when), frozenset(t.if_),
                   frozenset(t.mask))
            groups.setdefault(tag, []).append(t)
    out: list[Term] = []
    for group in groups.values():
        head = group[0]
        if len(group) == 1:
            out.append(head)
            continue
        shared = {x: p for x, p in head.c if all((x, p) in t.c for t in group)}
        total: Linear = {}
        for t in group:
            rest = [(x, p) for x, p in t.c if x not in shared]
            if len(rest) == 1 and rest[0][1] == 1:  # a sum is joined addend by addend, so that it cancels
                for k, x in flatten(rest[0][0], t.coef):
                    accumulate(total, x, k)
            else:
                accumulate(total, product(rest), t.coef)
        if not total:
            continue
        if list(total) == [ONE]:
            out.append(replace(head, coef=total[ONE], c=tuple(shared.items())))
        else:
            out.append(replace(head, coef=1.0, c=_joined(tuple(shared.items()), ((to_expr(total.items()), 1),))))
    return out


def product(factors: Iterable[tuple[Expr, float]], coef: float = 1.0,
            scale: Callable[[Expr, float], Expr] | None = None) -> Expr:
    """prod factor**power as an expression, divisors last.  scale: how a coefficient is written."""
    above: Expr | None = None
    below: Expr | None = None
    for e, p in factors:
        piece = raised(e, abs(p))
        if p > 0:
            above = piece if above is None else Call("mul", (above, piece))
        else:
            below = piece if below is None else Call("mul", (below, piece))
    if coef != 1 or above is None:
        if above is None:
            above = Const(coef)
        elif coef == -1:
            above = Call("neg", (above,))
        else:
            above = Call("mul", (above, Const(coef))) if scale is None else scale(above, coef)
    return above if below is None else Call("div", (above, below))


def raised(e: Expr, p: float) -> Expr:
    if p == 1:
        return e
    if p == 2:
        return Call("square", (e,))
    if p == 0.5:
        return Call("sqrt", (e,))
    return Call("pow", (e, Const(int(p) if p == int(p) else p)))
