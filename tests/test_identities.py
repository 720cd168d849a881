"""Each separated form and lifted order, certified by sympy: atoms opaque, numbers rational, conditions case by case."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import sympy

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var
from memcomp.passes.derive.separate import Separator
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import SumState
from tests.chains import NAMES, REFUSED
from tests.test_derivation_table import derived

Cases = Mapping[Expr, bool]


class Sympy:
    """Expressions as sympy's; what has no rule is one symbol (positive where that is proved)."""

    def __init__(self, stage: Stage, cases: Cases, states: Mapping[str, sympy.Expr]) -> None:
        self.stage, self.cases, self.states = stage, cases, states

    def true(self, e: Expr) -> bool:
        if isinstance(e, Call) and e.op in ("and", "or", "not"):
            args = [self.true(a) for a in e.args]
            return all(args) if e.op == "and" else any(args) if e.op == "or" else not args[0]
        return bool(e.value) if isinstance(e, Const) else self.cases[e]

    def symbol(self, e: Expr) -> sympy.Expr:
        fact = self.stage.facts.interval(e)
        kind = {"positive": True} if fact.positive or fact.lo > 0 else {"real": True}
        return sympy.Symbol(repr(e), **kind)

    def __call__(self, e: Expr) -> sympy.Expr:
        if isinstance(e, Const):
            if not math.isfinite(e.value):
                return -sympy.oo if e.value < 0 else sympy.oo
            return sympy.Rational(Fraction(e.value).limit_denominator(10**9))
        if isinstance(e, Access):
            return self.states.get(e.tensor, None) if e.tensor in self.states else self.symbol(e)
        if isinstance(e, (Var, Size)):
            return self.symbol(e)
        if e.op == "where":
            return self(e.args[1] if self.true(e.args[0]) else e.args[2])
        args = [self(a) for a in e.args]
        if any(a == -sympy.oo for a in args):
            return sympy.Integer(0) if e.op in ("exp", "exp2") else -sympy.oo
        match e.op, args:
            case "add", [x, y]:
                return x + y
            case "sub", [x, y]:
                return x - y
            case "mul", [x, y]:
                return x * y
            case "div", [x, y]:
                return x / y
            case "neg", [x]:
                return -x
            case "recip", [x]:
                return 1 / x
            case "square", [x]:
                return x**2
            case "pow", [x, n]:
                return x**n
            case "exp", [x]:
                return sympy.exp(x)
            case "exp2", [x]:
                return sympy.exp(x * sympy.log(2))
            case "log", [x]:
                return sympy.log(x)
            case "sqrt", [x]:
                return sympy.sqrt(x)
            case "rsqrt", [x]:
                return 1 / sympy.sqrt(x)
            case "abs", [x]:
                return sympy.Abs(x)
            case "relu", [x]:
                return (x + sympy.Abs(x)) / 2
            case "real", [x]:
                return x
        return self.symbol(e)


def conditions(e: Expr) -> set[Expr]:
    """The elementary conditions of the choices in an expression."""
    if isinstance(e, Call):
        inside = set().union(*(conditions(a) for a in e.args)) if e.args else set()
        return inside | _elementary(e.args[0]) if e.op == "where" else inside
    return set()


def _elementary(cond: Expr) -> set[Expr]:
    if isinstance(cond, Call) and cond.op in ("and", "or", "not"):
        return set().union(*(_elementary(a) for a in cond.args))
    return set() if isinstance(cond, Const) else {cond}


def summand(s: SumState, stage: Stage, to: Sympy) -> sympy.Expr:
    """What one point adds to a state: nothing where a condition of its guard fails."""
    if not all(to.true(g) for g in s.guard):
        return sympy.Integer(0)
    out = sympy.Integer(1)
    for x, p in s.a:
        out *= to(x) ** sympy.Rational(Fraction(p))
    level = {g: to(stage.gauges[g].body) - to(stage.gauges[g].rho) for g, _ in s.ds + s.es}
    for g, j in s.ds:
        out *= level[g] ** j
    grows = sum((to(x) * sympy.Rational(Fraction(k)) for x, k in s.bounded), sympy.Integer(0))
    grows += sum((level[g] * sympy.nsimplify(k) for g, k in s.es), sympy.Integer(0))
    return out * sympy.exp(grows)


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a == b:
        return True
    d = a - b
    for step in (sympy.expand, lambda x: sympy.expand(sympy.expand_log(x, force=False)), sympy.simplify):
        d = step(d)
        if d == 0:
            return True
    return False


def forms(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Stage, Expr, tuple[Expr, ...], Any]]:
    """(stage, body, guard, terms or lifted order) of every reduction that a derivation accepts."""
    found: list[Any] = []
    plain_sum, plain_order = Stage.sum, Stage.order

    def on_sum(self: Stage, s: Any, body: Expr, guard: Any) -> Any:
        out = plain_sum(self, s, body, guard)
        found.append((self, body, guard, out[0]))
        return out

    def on_order(self: Stage, s: Any, body: Expr, guard: Any) -> Any:
        out = plain_order(self, s, body, guard)
        found.append((self, body, guard, out[1]))
        return out

    monkeypatch.setattr(Stage, "sum", on_sum)
    monkeypatch.setattr(Stage, "order", on_order)
    derived(name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_identities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """body == sum_k a_k c_k point by point, and body == rebuild(inner), in every case of the conditions."""
    found = forms(name, monkeypatch)
    assert found or len(REFUSED[name]) == 2
    for stage, body, guard, form in found:
        known = {c for g in guard for c in _elementary(g)}
        open_ = conditions(body) | known
        if isinstance(form, list):
            open_ |= {c for t in form for g in (*t.when, *t.if_) for c in _elementary(g)}
            open_ |= {c for s in stage.sums for g in s.guard for c in _elementary(g)}
        names = sorted(open_, key=repr)
        for values in itertools.product((True, False), repeat=len(names)):
            to = Sympy(stage, dict(zip(names, values, strict=True)), {})
            if not all(to.true(g) for g in guard):
                continue
            if not isinstance(form, list):
                assert equal(to(form.rebuild(form.inner)), to(body)), (name, form)
                continue
            to.states = {stage.final(s).tensor: summand(s, stage, to) for s in stage.sums}
            total = sympy.Integer(0)
            for t in form:
                if all(to.true(c) for c in (*t.when, *t.if_)):
                    part = sympy.Rational(Fraction(t.coef).limit_denominator(10**9))
                    for x, p in t.c:
                        part *= to(x) ** sympy.Rational(Fraction(p))
                    total += part * sympy.exp(sum((to(x) * sympy.nsimplify(k) for x, k in t.ec), sympy.Integer(0)))
            assert equal(to(body), total), (name, body, form)


def test_a_wrong_term_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Separator.terms
    monkeypatch.setattr(Separator, "terms", lambda self, e: [t.scaled(2) for t in plain(self, e)][:2])
    with pytest.raises(AssertionError):
        test_identities("variance", monkeypatch)
