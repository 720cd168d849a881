"""Separation: write a reduced body as `sum_k a_k(x) c_k(g)`, x carried along the rank, g constant along it.

A term is coef * product of a-factors * exp(a-exponent) * product of c-factors * exp(c-exponent), with indicator
conditions that are applied by choice and never by multiplication.  Laws come from the operator table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from memcomp.ir.expr import Access, Call, Const, Expr, Var
from memcomp.ir.ops import OPS
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.linear import (
    ONE,
    Linear,
    accumulate,
    added,
    flatten,
    keyed,
    number,
    ratio,
    scaled,
    to_expr,
)
from memcomp.passes.derive.sides import NoLaw, Sides, short

LN2 = math.log(2.0)
BASE = {"exp": 1.0, "exp2": LN2}  # exp-like rows and the logarithm of their base
LOGS = {"log": 1.0, "log2": 1 / LN2}
_DEEPEST_POWER = 6
_MOST_TERMS = 64


@dataclass(frozen=True, slots=True)
class Gauge:
    """An atom y measured from a reference: y = d + rho.

    kind: max or min (an extreme of y), first (mean of the first live tile) or running (mean so far).
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

    @property
    def shift(self) -> Access:
        """d, carried along the rank."""
        return Access(f"$d:{self.name}", (Var(self.carried),))

    @property
    def rho(self) -> Access:
        """The reference; on the c-side."""
        return Access(f"$rho:{self.name}", ())


Powers = tuple[tuple[Expr, float], ...]


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
        return replace(self, coef=self.coef ** p if p != 1 else self.coef, a=_powered(self.a, p),
                       ea=_powered(self.ea, p), c=_powered(self.c, p), ec=_powered(self.ec, p))

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


def _powered(x: Powers, p: float) -> Powers:
    return tuple((e, k * p) for e, k in x)


def _sum_of(items: Iterable[tuple[float, Expr]]) -> Linear:
    out: Linear = {}
    for k, e in items:
        accumulate(out, e, k)
    return out


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
            if e.op in BASE:
                lin = scaled(_sum_of(flatten(a[0], spread=self._multiplied)), BASE[e.op])
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
            elif side == "carried" and not _growing(x):
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
        return collect([x.times(y) for x in left for y in right])

    def _on_div(self, e: Call) -> list[Term]:
        below = self._single(e.args[1], "div", e)
        if self.sides(e) == "mixed":
            self.laws.setdefault("constant divisors leave the sum")
        return [t.times(below.power(-1)) for t in self.terms(e.args[0])]

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

    def _on_exp(self, e: Call) -> list[Term]:
        """exp takes + to *: every addend must stand on one side."""
        arg = e.args[0]
        if isinstance(arg, Call) and arg.op == "where" and self.sides(arg) == "mixed" and masked(arg) is None:
            return self._on_where(_pushed(e.op, arg))
        base = BASE[e.op]
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
        for g in self.gauges:
            if ea and (lam := ratio(keyed(ea), keyed(dict(g.level)))) is not None:
                ec = added(ec, {g.rho: lam}, scaled(dict(g.offset), -lam))
                ea = {g.shift: lam}
        return [Term(ea=tuple(ea.items()), ec=tuple(ec.items()), mask=tuple(dict.fromkeys(mask)))]

    _on_exp2 = _on_exp

    def _on_log(self, e: Call) -> list[Term]:
        """log takes * to + on positive values."""
        if self.sides(e) == "carried" and not self.gauges:
            return self._atom(e)
        t = self._single(e.args[0], e.op, e)
        if t.conditional or t.coef <= 0 or not all(self._nonneg(x, p) for x, p in t.a + t.c):
            raise NoLaw(e.op, e, f"{e.op} takes * to + only where every factor is proved positive")
        self.laws.setdefault(f"{e.op} takes * to +")
        k = LOGS[e.op]
        carried = added(scaled(dict(t.ea), k), {Call(e.op, (x,)): p for x, p in t.a})
        constant = added(scaled(dict(t.ec), k), {Call(e.op, (x,)): p for x, p in t.c})
        if t.coef != 1:
            accumulate(constant, ONE, math.log(t.coef) * k)
        out: list[Term] = []
        if carried:
            shifts = {g.shift: g for g in self.gauges}
            if all(x in shifts for x in carried):
                out += [Term(coef=c, a=((x, 1),)) for x, c in carried.items()]
            else:
                out += self._measured(carried, constant)
        return [*out, self._constant(constant)] if constant else out

    _on_log2 = _on_log

    def _nonneg(self, e: Expr, p: float) -> bool:
        return p % 2 == 0 or self.facts.nonneg(e)

    # -- choice and everything else -------------------------------------------------------------------------------

    def _on_where(self, e: Call) -> list[Term]:
        cond, yes, no = e.args
        if self.sides(cond) == "mixed":
            name = cond.op if isinstance(cond, Call) else "where"
            raise NoLaw(name, cond, "a comparison of a carried with a reduced value")
        if self.sides(e) == "carried" and not _growing(e) and 0 not in (number(yes), number(no)):
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
            return self._on_where(_pushed(e.op, e.args[0]))
        if len(e.args) == 1 and (row.degree is not None or row.hom == ("mul", "mul")):
            t = self._single(e.args[0], e.op, e)
            everywhere = row.hom == ("mul", "mul") and row.domain == "real"
            known = everywhere or all(self._nonneg(x, p) for x, p in t.c)
            if known and not t.when and not t.if_ and (not t.mask or row.degree and row.degree > 0) and row.degree is not None:
                return [self._homogeneous(e.op, row.degree, t)]
            raise NoLaw(e.op, e, f"{e.op} lets a factor out only where it is proved >= 0")
        raise NoLaw(e.op, e, "neither additive nor multiplicative in the table" if row.hom is None else
                    f"takes {row.hom[0]} to {row.hom[1]} only")

    def _homogeneous(self, op: str, degree: float, t: Term) -> Term:
        self.laws.setdefault(f"{op} is homogeneous of degree {degree:g}")
        c = tuple((x if self.facts.nonneg(x) else Call("abs", (x,)), p * degree) for x, p in t.c)
        outside = Term(coef=abs(t.coef) ** degree, ea=_powered(t.ea, degree), c=c, ec=_powered(t.ec, degree),
                       mask=t.mask)
        body = product(t.a)
        if t.coef < 0:
            body = Call("neg", (body,))
        whole = Call(op, (body,))
        return outside.times(self.late(whole) if self.sides.free(body) else Term(a=((whole, 1),)))


def _pushed(op: str, choice: Call) -> Call:
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


def _growing(e: Expr) -> bool:
    """An exponential stands where + - * / and choices can reach it (growth would stay hidden in an atom)."""
    if not isinstance(e, Call):
        return False
    if e.op in BASE:
        return True
    return e.op in ("add", "sub", "neg", "mul", "div", "square", "pow", "where") and any(_growing(a) for a in e.args)


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


def product(factors: Iterable[tuple[Expr, float]], coef: float = 1.0) -> Expr:
    """prod factor**power as an expression, divisors last."""
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
            above = Call("mul", (above, Const(coef)))
    return above if below is None else Call("div", (above, below))


def raised(e: Expr, p: float) -> Expr:
    if p == 1:
        return e
    if p == 2:
        return Call("square", (e,))
    if p == 0.5:
        return Call("sqrt", (e,))
    return Call("pow", (e, Const(int(p) if p == int(p) else p)))


