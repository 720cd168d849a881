"""Finalise maps: what a reduction's value is in terms of finished states.

Values are kept as (mantissa, exponent) where they are one term and substituted through, so that `N e^rho / (D e^rho)`
cancels by symbol and exponents meet before exp is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Var, children, rebuild, substitute
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.linear import ONE, Linear, accumulate, added, flatten, number, scaled, times, to_expr
from memcomp.passes.derive.terms import Term, exponential_base, logarithm_scale, product


@dataclass(frozen=True, slots=True)
class Value:
    """A finished value over its variables: as one term, as a linear form, or only by name (both None).

    cond: when the forms hold; elsewhere the value is another one.
    """

    vars: tuple[str, ...]
    term: Term | None = None
    lin: tuple[tuple[Expr, float], ...] | None = None
    cond: Expr | None = None


@dataclass(slots=True)
class Finals:
    """rho: the finished reference behind a gauge symbol, or None.

    assume: a condition under which values are asked for; `leaned` says that one needed it.
    """

    facts: Facts
    rho: Callable[[str], Expr | None]
    values: dict[str, Value] = field(default_factory=dict)
    assume: Expr | None = None
    leaned: bool = False

    # -- normal forms ---------------------------------------------------------------------------------------------

    def _value(self, e: Access) -> tuple[Value, dict[Expr, Expr]] | None:
        v = self.values.get(e.tensor)
        if v is None:
            return None
        table: dict[Expr, Expr] = {Var(x): i for x, i in zip(v.vars, e.index, strict=True)}
        if v.cond is not None:
            if substitute(v.cond, table) != self.assume:
                return None
            self.leaned = True
        return v, table

    def term(self, e: Expr) -> Term:
        if (n := number(e)) is not None:
            return Term(coef=n) if math.isfinite(n) else Term(c=((e, 1),))
        if isinstance(e, Access):
            if (rho := self.rho(e.tensor)) is not None:
                return Term(c=((rho, 1),))
            hit = self._value(e)
            if hit is None or hit[0].term is None:
                return Term(c=((self._indexed(e), 1),))
            return _moved(hit[0].term, hit[1])
        if not isinstance(e, Call):
            return Term(c=((e, 1),))
        a = e.args
        match e.op:
            case "mul":
                return self.term(a[0]).times(self.term(a[1]))
            case "div" | "recip":
                below = self.term(a[-1])
                if below.coef == 0 or below.if_:
                    below = Term(c=((self.build(below), 1),))
                below = below.power(-1)
                return below if e.op == "recip" else self._cancelled(self.term(a[0]).times(below))
            case "neg":
                return self.term(a[0]).scaled(-1)
            case "square":
                return self.term(a[0]).power(2)
            case "where" if number(a[2]) == 0:
                return self._chosen(self.expr(a[0]), self.term(a[1]))
            case "where" if number(a[1]) == 0:
                return self._chosen(Call("not", (self.expr(a[0]),)), self.term(a[2]))
            case "add" | "sub":
                return self._summed(self.linear(e))
        if (base := exponential_base(e.op)) is not None:
            return self.exponential(scaled(self.linear(a[0]), base))
        if logarithm_scale(e.op) is not None:
            return self._summed(self.linear(e))
        return Term(c=((Call(e.op, tuple(self.expr(x) for x in a)), 1),))

    def _cancelled(self, t: Term) -> Term:
        """x**p / x**q where x is surely positive."""
        both = {x for x, p in t.c if p < 0} & {x for x, p in t.c if p > 0}
        net = {x: sum(p for y, p in t.c if y == x) for x in both
               if isinstance(x, Access) and x.tensor in self.facts.sure}
        if not net:
            return t
        return replace(t, c=(*((x, p) for x, p in t.c if x not in net), *((x, p) for x, p in net.items() if p)))

    def _chosen(self, cond: Expr, t: Term) -> Term:
        return replace(t, if_=tuple(dict.fromkeys((cond, *t.if_))))

    def _summed(self, lin: Linear) -> Term:
        if not lin:
            return Term(coef=0.0)
        if len(lin) == 1:
            (e, k), = lin.items()
            return Term(coef=k) if e == ONE else Term(coef=k, c=((e, 1),))
        return Term(c=((to_expr(lin.items(), times), 1),))

    def exponential(self, lin: Linear) -> Term:
        """exp of a linear form; k * log(x) becomes x**k."""
        c: list[tuple[Expr, float]] = []
        ec: Linear = {}
        for e, k in lin.items():
            scale = logarithm_scale(e.op) if isinstance(e, Call) else None
            if isinstance(e, Call) and scale is not None and abs(k * scale) in (1, 2):
                c.append((e.args[0], k * scale))
            else:
                accumulate(ec, e, k)
        if set(ec) == {ONE}:
            return Term(coef=math.exp(ec[ONE]), c=tuple(c))
        return Term(c=tuple(c), ec=tuple(ec.items()))

    def linear(self, e: Expr) -> Linear:
        """Addends, finished values substituted."""
        out: Linear = {}
        for k, x in flatten(e):
            for y, c in self._addend(x).items():
                accumulate(out, y, c * k)
        return out

    def _addend(self, x: Expr) -> Linear:
        if isinstance(x, Access):
            if (rho := self.rho(x.tensor)) is not None:
                return {rho: 1}
            hit = self._value(x)
            if hit is not None and hit[0].lin is not None:
                return added(*({substitute(y, hit[1]): c} for y, c in hit[0].lin))
        if isinstance(x, Call) and (scale := logarithm_scale(x.op)) is not None:
            t = self.term(x.args[0])
            if t.coef > 0 and not t.if_ and (t.ec or len(t.c) == 1) and all(self.facts.nonneg(y) for y, _ in t.c):
                out = added(scaled(dict(t.ec), scale), {Call(x.op, (y,)): p for y, p in t.c})
                if t.coef != 1:
                    accumulate(out, ONE, math.log(t.coef) * scale)
                return out
            return {Call(x.op, (self.build(t),)): 1}
        if isinstance(x, Call) and x.op in ("add", "sub"):
            return self.linear(x)
        t = self.term(x)
        if t.coef == 0:
            return {}
        if not t.c and not t.ec and not t.if_:
            return {ONE: t.coef}
        return {self.build(replace(t, coef=1.0)): t.coef}

    def _indexed(self, e: Access) -> Expr:
        return Access(e.tensor, tuple(map(self._place, e.index)))

    def _place(self, i: Expr) -> Expr:
        """An index with what it reads in terms of finished states; its integers are not brought to a form of reals."""
        return self.expr(i) if isinstance(i, Access) else rebuild(i, tuple(map(self._place, children(i))))

    # -- back to expressions --------------------------------------------------------------------------------------

    def expr(self, e: Expr) -> Expr:
        """The same value in terms of finished states, exponents merged."""
        if isinstance(e, Call):
            if e.op in ("add", "sub") or logarithm_scale(e.op) is not None:
                return to_expr(self.linear(e).items(), times)
            if e.op in ("mul", "div", "recip", "neg", "square") or exponential_base(e.op) is not None:
                return self.build(self.term(e))
            return Call(e.op, tuple(self.expr(a) for a in e.args))
        return self.build(self.term(e)) if isinstance(e, Access) else e

    def build(self, t: Term) -> Expr:
        factors = list(t.c)
        if t.ec:
            grows = to_expr(t.ec)
            factors.append((Call("exp", (grows,)), 1))
        out = product(factors, t.coef, times)
        for cond in reversed(t.if_):
            out = Call("where", (cond, out, Const(0.0)))
        return out

    def normal(self, t: Term) -> Term:
        """A term with raw c-side expressions, with every finished value substituted."""
        out = Term(coef=t.coef, if_=tuple(self.expr(c) for c in t.if_))
        for e, p in t.c:
            x = self.term(e)
            if p < 0 and (x.coef == 0 or x.if_):
                x = Term(c=((self.build(x), 1),))
            out = out.times(x if p == 1 else x.power(p) if p == int(p) or not x.if_ else Term(c=((self.build(x), p),)))
        ec: Linear = {}
        for e, k in t.ec:
            for y, c in self._addend(e).items():
                accumulate(ec, y, c * k)
        return self._cancelled(out.times(self.exponential(ec)))

    # -- recording ------------------------------------------------------------------------------------------------

    def learn(self, s: Einsum, e: Expr | None, t: Term | None, cond: Expr | None = None) -> None:
        """Remember the value of a tensor written over plain variables, where substituting it is no larger than naming
        it: products of elements with exponents, or sums of elements and their logarithms."""
        if len(s.outs) != 1 or s.guard is not None and s.reduce is None:
            return
        vs = tuple(i.name for i in s.out.index if isinstance(i, Var))
        if len(vs) != len(s.out.index):
            return
        if t is not None and (t.if_ or not all(isinstance(x, Access) for x, _ in t.c)):
            t = None
        lin = None
        if e is not None:
            form = self.linear(e)
            if all(isinstance(x, Access) or x == ONE or _log_of_element(x) for x in form):
                lin = tuple(form.items())
        self.values[s.names[0]] = Value(vs, t, lin, cond)


def _log_of_element(e: Expr) -> bool:
    return isinstance(e, Call) and logarithm_scale(e.op) is not None and isinstance(e.args[0], Access)


def _moved(t: Term, table: dict[Expr, Expr]) -> Term:
    def sub(x: tuple[tuple[Expr, float], ...]) -> tuple[tuple[Expr, float], ...]:
        return tuple((substitute(e, table), p) for e, p in x)

    return replace(t, c=sub(t.c), ec=sub(t.ec))
