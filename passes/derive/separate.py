"""Separation: write a reduced body as `sum_k a_k(x) c_k(g)`, x carried along the rank, g constant along it.

Structural recursion with the laws of the operator table; what has no law is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from memcomp.ir.expr import Call, Expr
from memcomp.ir.laws import law, relied
from memcomp.ir.ops import OPS, Op
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

    def _use(self, e: Call, kind: str) -> None:
        """Rely on a row of the law table where `e` mixes both sides.  Raises NoLaw where there is none."""
        if self.sides(e) == "mixed":
            rows = relied(e.op, kind)
            if not rows:
                raise NoLaw(e.op, e, f"the table has no row {e.op}.{kind}")
            self.laws.update(dict.fromkeys(rows))

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
        if OPS[e.op].hom == ("add", "add"):
            return self._additive(e)
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
        self._use(e, "linear")
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
        self._use(e, "linear")
        left, right = self.terms(e.args[0]), self.terms(e.args[1])
        return collect([_exposed(x, y).times(_exposed(y, x)) for x in left for y in right])

    def _on_div(self, e: Call) -> list[Term]:
        below = self._single(e.args[1], "div", e)
        self._use(e, "linear")
        inverse = below.power(-1)
        return [_exposed(t, inverse).times(inverse) for t in self.terms(e.args[0])]

    def _on_recip(self, e: Call) -> list[Term]:
        self._use(e, "hom")
        return [self._single(e.args[0], "recip", e).power(-1)]

    def _on_square(self, e: Call) -> list[Term]:
        return self._power(e, e.args[0], 2)

    def _on_pow(self, e: Call) -> list[Term]:
        n = number(e.args[1])
        if n is not None and n == int(n):
            return self._power(e, e.args[0], int(n))
        if n is None or self.sides(e) == "carried":
            return self._other(e)
        t = self._single(e.args[0], e.op, e)
        real = OPS[e.op].domain == "real"
        if t.conditional or t.coef <= 0 or not (real or all([self._nonneg(x, 1) for x, _ in t.a + t.c])):
            raise NoLaw(e.op, e, f"{e.op} takes * to * only where every factor is proved positive")
        self._use(e, "hom")
        return [t.power(n)]

    def _additive(self, e: Call) -> list[Term]:
        """f(x + g) = f(x) + f(g) in the first argument."""
        parts = flatten(e.args[0])
        if len(parts) == 1 or self.sides(e) == "carried":
            return self._other(e)
        self._use(e, "hom")
        return collect([t for k, x in parts for t in self.terms(Call(e.op, (to_expr([(x, k)]), *e.args[1:])))])

    def _power(self, e: Call, base: Expr, n: int) -> list[Term]:
        parts = self.terms(base)
        if n <= 0 or len(parts) == 1:
            self._use(e, "hom")
        if n <= 0:
            return [self._single(base, e.op, e).power(n)] if n else [Term()]
        if len(parts) == 1:
            return [parts[0].power(n)]
        if not 0 < n <= _DEEPEST_POWER:
            raise NoLaw(e.op, e, f"a sum that mixes both sides to the power {n}")
        self.laws.setdefault("integer powers expand")
        self.laws.update(dict.fromkeys(relied("mul", "linear")))
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
        law = OPS[op].degree is not None and op != "div"
        why = f"{op} lets factors out, not addends, and its argument is" if law else f"{op} of"
        raise NoLaw(op, whole, f"{why} a sum or choice that mixes both sides")

    # -- exponentials and logarithms ------------------------------------------------------------------------------

    def _exponential(self, e: Call) -> list[Term]:
        """exp takes + to *: every addend must stand on one side."""
        arg = e.args[0]
        if isinstance(arg, Call) and arg.op == "where" and self.sides(arg) == "mixed" and masked(arg) is None:
            return self._on_where(pushed(e.op, arg))
        base = exponential_base(e.op)
        assert base is not None
        empty = law(e.op, "limits") if (-math.inf, 0.0) in OPS[e.op].limits else None
        ea: Linear = {}
        ec: Linear = {}
        mask: list[Expr] = []
        todo = flatten(arg, spread=self._multiplied)
        while todo:
            k, x = todo.pop(0)
            hidden = masked(x) if k > 0 and empty is not None else None
            if hidden is not None and self.sides(hidden[0]) in ("carried", "neutral"):
                mask.append(hidden[0])
                self.laws.setdefault(f"{empty}: a mask is a guard")
                todo[:0] = flatten(hidden[1], k, spread=self._multiplied)
            elif self.sides.free(x):
                accumulate(ec, x, k * base)
            elif self.sides(x) == "carried":
                accumulate(ea, x, k * base)
            else:
                raise NoLaw(e.op, e, f"{e.op} takes + to *; {short(x)} mixes both sides")
        self._use(e, "hom")
        return [Term(ea=tuple(ea.items()), ec=tuple(ec.items()), mask=tuple(dict.fromkeys(mask)))]

    def _logarithm(self, e: Call) -> list[Term]:
        """log takes * to + on positive values."""
        if self.sides(e) == "carried" and not self.gauges:
            return self._atom(e)
        t = self._single(e.args[0], e.op, e)
        real = OPS[e.op].domain == "real"
        if t.conditional or t.coef <= 0 or not (real or all(self._nonneg(x, p) for x, p in t.a + t.c)):
            raise NoLaw(e.op, e, f"{e.op} takes * to + only where every factor is proved positive")
        self._use(e, "hom")
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
        if p % 2 == 0:
            return True
        known = self.facts.nonneg(e)
        if known:
            self.laws.update(self.facts.because(e))
        return known

    # -- choice and everything else -------------------------------------------------------------------------------

    def _on_where(self, e: Call) -> list[Term]:
        cond, yes, no = e.args
        if self.sides(cond) == "mixed":
            name = cond.op if isinstance(cond, Call) else "where"
            raise NoLaw(name, cond, "a comparison of a carried with a reduced value")
        if self.sides(e) == "carried" and not growing(e) and 0 not in (number(yes), number(no)):
            return self._atom(e)
        self._use(e, "linear")
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
        if row.degree is None:
            raise NoLaw(e.op, e, "neither additive nor multiplicative in the table" if row.hom is None else
                        f"takes {row.hom[0]} to {row.hom[1]} only")
        parts = [self._single(a, e.op, e) for a in e.args if number(a) != 0]
        if any((p.c, p.ec, p.ea) != (parts[0].c, parts[0].ec, parts[0].ea) for p in parts):
            raise NoLaw(e.op, e, f"{e.op} lets out only a factor that all its arguments have")
        t = parts[0]
        everywhere = row.hom == ("mul", "mul") and row.domain == "real"
        known = everywhere or all([self._nonneg(x, p) for x, p in t.c])
        if not known or any(p.when or p.if_ or (p.mask and (row.degree <= 0 or len(parts) > 1)) for p in parts):
            raise NoLaw(e.op, e, f"{e.op} lets a factor out only where it is proved >= 0")
        for kind in ("degree", "hom") if everywhere else ("degree",):
            self._use(e, kind)
        return [self._homogeneous(e, row, parts, everywhere)]

    def _homogeneous(self, e: Call, row: Op, parts: list[Term], everywhere: bool) -> Term:
        t, k = parts[0], row.degree
        assert k is not None
        c = tuple((x, p * k) if self.facts.nonneg(x) else
                  (Call(e.op, (x,)), p) if everywhere else (Call("abs", (x,)), p * k) for x, p in t.c)
        common = abs(t.coef) if len(e.args) == 1 else 1.0
        outside = Term(coef=common ** k, ea=powered(t.ea, k), c=c, ec=powered(t.ec, k), mask=t.mask)
        bodies = (product(p.a, p.coef / common) for p in parts)
        whole = Call(e.op, tuple(a if number(a) == 0 else next(bodies) for a in e.args))
        return outside.times(self.late(whole) if self.sides.free(whole) else Term(a=((whole, 1),)))


def _exposed(t: Term, factor: Term) -> Term:
    """A choice made inside shields only its own factors: 0 over a divisor that comes later is NaN where that is 0."""
    if not t.when or all(p > 0 for _, p in factor.c):
        return t
    return replace(t, when=(), mask=tuple(dict.fromkeys((*t.mask, *t.when))))
