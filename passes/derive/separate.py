"""Separation: write a reduced body as `sum_k a_k(x) c_k(g)`, x carried along the rank, g constant along it.

Structural recursion with the laws of the operator table; what has no law is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from memcomp.ir.expr import Call, Expr
from memcomp.ir.ops import OPS
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.linear import ONE, Linear, accumulate, added, flatten, keyed, number, ratio, scaled, to_expr
from memcomp.passes.derive.sides import NoLaw, Sides, short
from memcomp.passes.derive.terms import (
    Gauge,
    Term,
    collect,
    exponential_base,
    growing,
    logarithm_scale,
    masked,
    powered,
    product,
    pushed,
)

_DEEPEST_POWER = 6
_MOST_TERMS = 64


@dataclass(slots=True)
class Separator:
    sides: Sides
    facts: Facts
    gauges: Sequence[Gauge] = ()
    laws: dict[str, None] = field(default_factory=dict)  # laws used, in order

    def terms(self, e: Expr) -> list[Term]:
        """The separated form; raises NoLaw."""
        if self.sides.free(e):
            return [self.late(e)]
        if not isinstance(e, Call):
            return self._atom(e)
        if exponential_base(e.op) is not None:
            return self._exponential(e)
        if logarithm_scale(e.op) is not None:
            return self._logarithm(e)
        rule = getattr(self, f"_on_{e.op}", None)
        out: list[Term] = rule(e) if rule is not None else self._other(e)
        if len(out) > _MOST_TERMS:
            raise NoLaw(e.op, e, f"more than {_MOST_TERMS} terms")
        return out

    # -- c-side ---------------------------------------------------------------------------------------------------

    def late(self, e: Expr) -> Term:
        """A value constant along the rank as one term; sums and unknown functions are one factor."""
        if (n := number(e)) is not None:
            return Term(coef=n) if math.isfinite(n) else Term(c=((e, 1),))
        if isinstance(e, Call):
            a = e.args
            if e.op == "mul":
                return self.late(a[0]).times(self.late(a[1]))
            if e.op in ("div", "recip"):
                below = self.late(a[-1])
                if below.coef == 0 or below.if_:  # nothing to invert factor by factor
                    below = Term(c=((a[-1], 1),))
                return below.power(-1) if e.op == "recip" else self.late(a[0]).times(below.power(-1))
            if e.op == "neg":
                return self.late(a[0]).scaled(-1)
            if e.op == "square":
                return self.late(a[0]).power(2)
            if (base := exponential_base(e.op)) is not None:
                lin = added(*({x: k} for k, x in flatten(a[0], base, spread=self._multiplied)))
                return Term(ec=tuple(lin.items()))
            if e.op == "where":
                if number(a[2]) == 0:
                    t = self.late(a[1])
                    return replace(t, if_=(a[0], *t.if_))
                if number(a[1]) == 0:
                    t = self.late(a[2])
                    return replace(t, if_=(Call("not", (a[0],)), *t.if_))
        return Term(c=((e, 1),))

    def _multiplied(self, factor: Expr, rest: Expr) -> bool:
        """Multiply `factor * (x - g)` out inside an exponent: needed when the sum mixes sides."""
        if not self.sides.free(factor):
            return False
        parts = flatten(rest)
        return len(parts) > 1 and (self.sides(rest) == "mixed" or self.sides(rest) == "late")

    # -- sums and products ----------------------------------------------------------------------------------------

    def _on_add(self, e: Call) -> list[Term]:
        """Carried addends are one atom, constant ones one c-expression (so that they cancel before they multiply)."""
        carried: Linear = {}
        constant: Linear = {}
        out: list[Term] = []
        for k, x in flatten(e):
            side = self.sides(x)
            if side in ("neutral", "late"):
                accumulate(constant, x, k)
            elif side == "carried" and not growing(x):
                accumulate(carried, x, k)
            else:
                out += [t.scaled(k) for t in self.terms(x)]
        neutral_only = all(self.sides(x) == "neutral" for x in constant)
        if carried and neutral_only and not out and not self._gauged(carried):
            return [Term(a=((to_expr({**carried, **constant}.items()), 1),))]  # all on one side: one atom
        if carried:
            out[:0] = self._measured(carried, constant)
        if constant:
            out.append(self._constant(constant))
        if any(self.sides(x) == "mixed" for _, x in flatten(e)) or self.sides(e) == "mixed":
            self.laws.setdefault("sum splits over +")
        return collect(out)

    _on_sub = _on_neg = _on_add

    def _constant(self, lin: Linear) -> Term:
        if len(lin) == 1:
            (e, k), = lin.items()
            return self.late(e).scaled(k)
        return Term(c=((to_expr(lin.items()), 1),))

    def _gauged(self, lin: Linear) -> tuple[Gauge, float] | None:
        for g in self.gauges:
            k = ratio(keyed(lin), keyed(dict(g.level)))
            if k is not None:
                return g, k
        return None

    def _measured(self, carried: Linear, constant: Linear) -> list[Term]:
        """One atom, as d + rho where it has a gauge; rho joins the constant part."""
        hit = self._gauged(carried)
        if hit is None:
            return [Term(a=((to_expr(carried.items()), 1),))]
        g, k = hit
        for e, c in added({g.rho: k}, scaled(dict(g.offset), -k)).items():
            accumulate(constant, e, c)
        return [Term(coef=k, a=((g.shift, 1),))]

    def _atom(self, e: Expr) -> list[Term]:
        if self.sides(e) == "mixed":
            raise NoLaw("read", e, "an index that mixes both sides")
        constant: Linear = {}
        out = self._measured({e: 1}, constant) if self._gauged({e: 1}) else [Term(a=((e, 1),))]
        return [*out, self._constant(constant)] if constant else out

    def _on_mul(self, e: Call) -> list[Term]:
        if self.sides(e) == "mixed":
            self.laws.setdefault("constant factors leave the sum")
        left, right = self.terms(e.args[0]), self.terms(e.args[1])
        return collect([_exposed(x, y).times(_exposed(y, x)) for x in left for y in right])

    def _on_div(self, e: Call) -> list[Term]:
        below = self._single(e.args[1], "div", e)
        if self.sides(e) == "mixed":
            self.laws.setdefault("constant divisors leave the sum")
        inverse = below.power(-1)
        return [_exposed(t, inverse).times(inverse) for t in self.terms(e.args[0])]

    def _on_recip(self, e: Call) -> list[Term]:
        return [self._single(e.args[0], "recip", e).power(-1)]

    def _on_square(self, e: Call) -> list[Term]:
        return self._power(e, e.args[0], 2)

    def _on_pow(self, e: Call) -> list[Term]:
        n = number(e.args[1])
        if n is not None and n == int(n):
            return self._power(e, e.args[0], int(n))
        return self._other(e)

    def _power(self, e: Call, base: Expr, n: int) -> list[Term]:
        parts = self.terms(base)
        if n <= 0:
            return [self._single(base, e.op, e).power(n)] if n else [Term()]
        if len(parts) == 1:
            return [parts[0].power(n)]
        if not 0 < n <= _DEEPEST_POWER:
            raise NoLaw(e.op, e, f"a sum that mixes both sides to the power {n}")
        self.laws.setdefault("integer powers expand")
        out = parts
        for _ in range(n - 1):
            out = collect([x.times(y) for x in out for y in parts])
        return out

    def _single(self, e: Expr, op: str, whole: Expr) -> Term:
        parts = self.terms(e)
        if len(parts) == 1 and not parts[0].conditional and parts[0].coef != 0:
            return parts[0]
        if self.sides(e) == "carried":
            return Term(a=((e, 1),))
        raise NoLaw(op, whole, f"{op} of a sum or choice that mixes both sides")

    # -- exponentials and logarithms ------------------------------------------------------------------------------

    def _exponential(self, e: Call) -> list[Term]:
        """exp takes + to *: every addend must stand on one side."""
        arg = e.args[0]
        if isinstance(arg, Call) and arg.op == "where" and self.sides(arg) == "mixed" and masked(arg) is None:
            return self._on_where(pushed(e.op, arg))
        base = exponential_base(e.op)
        assert base is not None
        ea: Linear = {}
        ec: Linear = {}
        mask: list[Expr] = []
        todo = flatten(arg, spread=self._multiplied)
        while todo:
            k, x = todo.pop(0)
            hidden = masked(x) if k > 0 else None
            if hidden is not None and self.sides(hidden[0]) in ("carried", "neutral"):
                mask.append(hidden[0])
                self.laws.setdefault("exp(-inf) = 0: a mask is a guard")
                todo[:0] = flatten(hidden[1], k, spread=self._multiplied)
            elif self.sides.free(x):
                accumulate(ec, x, k * base)
            elif self.sides(x) == "carried":
                accumulate(ea, x, k * base)
            else:
                raise NoLaw(e.op, e, f"{e.op} takes + to *; {short(x)} mixes both sides")
        if self.sides(e) == "mixed":
            self.laws.setdefault(f"{e.op} takes + to *")
        return [Term(ea=tuple(ea.items()), ec=tuple(ec.items()), mask=tuple(dict.fromkeys(mask)))]

    def _logarithm(self, e: Call) -> list[Term]:
        """log takes * to + on positive values."""
        if self.sides(e) == "carried" and not self.gauges:
            return self._atom(e)
        t = self._single(e.args[0], e.op, e)
        if t.conditional or t.coef <= 0 or not all(self._nonneg(x, p) for x, p in t.a + t.c):
            raise NoLaw(e.op, e, f"{e.op} takes * to + only where every factor is proved positive")
        self.laws.setdefault(f"{e.op} takes * to +")
        k = logarithm_scale(e.op)
        assert k is not None
        carried = added(scaled(dict(t.ea), k), {Call(e.op, (x,)): p for x, p in t.a})
        constant = added(scaled(dict(t.ec), k), {Call(e.op, (x,)): p for x, p in t.c})
        if t.coef != 1:
            accumulate(constant, ONE, math.log(t.coef) * k)
        out: list[Term] = []
        if carried:
            out += self._measured(carried, constant)
        return [*out, self._constant(constant)] if constant else out

    def _nonneg(self, e: Expr, p: float) -> bool:
        return p % 2 == 0 or self.facts.nonneg(e)

    # -- choice and everything else -------------------------------------------------------------------------------

    def _on_where(self, e: Call) -> list[Term]:
        cond, yes, no = e.args
        if self.sides(cond) == "mixed":
            name = cond.op if isinstance(cond, Call) else "where"
            raise NoLaw(name, cond, "a comparison of a carried with a reduced value")
        if self.sides(e) == "carried" and not growing(e) and 0 not in (number(yes), number(no)):
            return self._atom(e)
        self.laws.setdefault("a choice splits into indicators")
        out: list[Term] = []
        for c, branch in ((cond, yes), (Call("not", (cond,)), no)):
            if number(branch) == 0:
                continue
            for t in self.terms(branch):
                if self.sides(c) == "late":
                    out.append(replace(t, if_=tuple(dict.fromkeys((c, *t.if_)))))
                else:
                    out.append(replace(t, when=tuple(dict.fromkeys((c, *t.when)))))
        return collect(out)

    def _other(self, e: Call) -> list[Term]:
        """Homogeneous functions let factors out: f(c x) = c**k f(x), or f(c x) = f(c) f(x)."""
        if self.sides(e) == "carried":
            return self._atom(e)
        row = OPS[e.op]
        if len(e.args) == 1 and isinstance(e.args[0], Call) and e.args[0].op == "where":
            return self._on_where(pushed(e.op, e.args[0]))
        if len(e.args) == 1 and (row.degree is not None or row.hom == ("mul", "mul")):
            t = self._single(e.args[0], e.op, e)
            everywhere = row.hom == ("mul", "mul") and row.domain == "real"
            known = everywhere or all(self._nonneg(x, p) for x, p in t.c)
            chosen = t.when or t.if_ or (t.mask and (row.degree or 0) <= 0)
            if known and not chosen and row.degree is not None:
                return [self._homogeneous(e.op, row.degree, t)]
            raise NoLaw(e.op, e, f"{e.op} lets a factor out only where it is proved >= 0")
        raise NoLaw(e.op, e, "neither additive nor multiplicative in the table" if row.hom is None else
                    f"takes {row.hom[0]} to {row.hom[1]} only")

    def _homogeneous(self, op: str, degree: float, t: Term) -> Term:
        self.laws.setdefault(f"{op} is homogeneous of degree {degree:g}")
        c = tuple((x if self.facts.nonneg(x) else Call("abs", (x,)), p * degree) for x, p in t.c)
        outside = Term(coef=abs(t.coef) ** degree, ea=powered(t.ea, degree), c=c, ec=powered(t.ec, degree),
                       mask=t.mask)
        body = product(t.a)
        if t.coef < 0:
            body = Call("neg", (body,))
        whole = Call(op, (body,))
        return outside.times(self.late(whole) if self.sides.free(body) else Term(a=((whole, 1),)))


def _exposed(t: Term, factor: Term) -> Term:
    """A choice made inside shields only its own factors: 0 over a divisor that comes later is NaN where that is 0."""
    if not t.when or all(p > 0 for _, p in factor.c):
        return t
    return replace(t, when=(), mask=tuple(dict.fromkeys((*t.mask, *t.when))))
