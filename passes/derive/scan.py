"""Scans: a sum over `m < p`, p an output rank, whose terms only change frame when p moves on.

Where y(p + 1, m) - y(p, m) is free of m for every exponent y, the states over the points below p + 1 are those over the
points below p in a shifted frame, and one more point.  What the body says at m = p itself is merged in at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Einsum, Rank
from memcomp.ir.expr import (
    Access,
    Call,
    Const,
    Expr,
    Size,
    Var,
    call,
    conjunction,
    substitute,
    transform,
    variables,
    walk,
)
from memcomp.ir.ops import MONOIDS
from memcomp.ir.simplify import simplify
from memcomp.passes.derive.facts import bound
from memcomp.passes.derive.frames import exponential
from memcomp.passes.derive.linear import accumulate, added, flatten, key, scaled, to_expr
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import OrderState, SumState, finite, moved
from memcomp.passes.derive.terms import product


@dataclass(frozen=True, slots=True)
class Scan:
    """rank: the iterative rank of the scan.  reads: state -> its value at p, over the state's variables."""

    rank: Rank
    p: str
    statements: tuple[Einsum, ...]
    reads: Mapping[str, tuple[tuple[str, ...], Access]]

    def read(self, s: Einsum) -> Einsum:
        """The statement with finished states read at their p."""

        def at(e: Expr) -> Expr:
            if not isinstance(e, Access) or e.tensor not in self.reads:
                return e
            vs, value = self.reads[e.tensor]
            return substitute(value, dict(zip(map(Var, vs), e.index[1:], strict=True)))

        outs = tuple(transform(o, at) for o in s.outs)
        guard = None if s.guard is None else transform(s.guard, at)
        return Einsum(outs, transform(s.body, at), s.reduce, guard)  # type: ignore[arg-type]


def scanned(stage: Stage, extent: Expr, fresh: Callable[[str], str], rank: str) -> Scan | None:
    """The scan of all states of a stage; None where they are none.  rank: a free name for its rank."""
    found = _guards(stage)
    if found is None or stage.places or not stage.sums:
        return None
    p, last = found
    if stage.facts.extent(p.upper()) != extent or any(p not in s.vars for s in _states(stage)):
        return None
    w = _Scanner(stage, p, stage.carried, rank.lower(), last, fresh)
    try:
        for o in stage.orders:
            w.order(o)
        for s in stage.sums:
            w.sum(s)
    except _Still:
        return None
    return Scan(Rank(rank, Size(p.upper()), iterative=True), p, (*w.init, *w.body, *w.ends), w.reads)


class _Still(Exception):
    """A state does not move with p."""


def _states(stage: Stage) -> list[OrderState | SumState]:
    return [*stage.orders, *stage.sums]


def _guards(stage: Stage) -> tuple[str, bool] | None:
    """(p, whether m = p takes part) where every state runs over m < p, or every one over m <= p."""
    each = set()
    for s in _states(stage):
        ends = [b[1] for g in s.guard if (b := bound(g, stage.carried)) is not None and b[0] == "high"]
        if len(ends) != 1 or s.over != (stage.carried,):
            return None
        each.add(ends[0])
    end = each.pop() if len(each) == 1 else None
    if isinstance(end, Var):
        return end.name, False
    if isinstance(end, Call) and end.op == "add" and isinstance(end.args[0], Var) and end.args[1] == Const(1):
        return end.args[0].name, True
    return None


@dataclass(slots=True)
class _Scanner:
    stage: Stage
    p: str
    m: str
    t: str
    last: bool
    fresh: Callable[[str], str]
    init: list[Einsum] = field(default_factory=list)
    body: list[Einsum] = field(default_factory=list)
    ends: list[Einsum] = field(default_factory=list)
    reads: dict[str, tuple[tuple[str, ...], Access]] = field(default_factory=dict)
    _moves: dict[str, tuple[Expr, Expr, Expr, Expr]] = field(default_factory=dict)

    # -- a body below p, at the new point, and at p itself --------------------------------------------------------

    def below(self, e: Expr) -> Expr:
        return simplify(e, {**self.stage.facts.ranges(), self.m: (0, Var(self.p))})

    def entering(self, e: Expr) -> Expr:
        """At m = t, when p becomes t + 1."""
        return simplify(substitute(self.below(e), {Var(self.p): call("add", Var(self.t), 1), Var(self.m): Var(self.t)}),
                        self.stage.facts.ranges())

    def own(self, e: Expr) -> Expr:
        """At m = p."""
        return simplify(substitute(e, {Var(self.m): Var(self.p)}), self.stage.facts.ranges())

    def shift(self, y: Expr) -> Expr | None:
        """y(t + 1, m) - y(t, m), None for 0; raises _Still where it depends on m."""
        y = self.below(y)
        if any(isinstance(n, Access) and any(self.p in variables(i) for i in n.index) for n in walk(y)):
            raise _Still
        d = added(_expanded(substitute(y, {Var(self.p): call("add", Var(self.p), 1)})), scaled(_expanded(y), -1))
        if any(self.m in variables(x) for x in d):
            raise _Still
        return substitute(to_expr(d.items()), {Var(self.p): Var(self.t)}) if d else None

    def live(self, s: OrderState | SumState, at: Callable[[Expr], Expr]) -> Expr | None:
        """The rest of the guard at the new point."""
        conds = [g for g in s.guard if bound(g, self.m) is None or bound(g, self.m)[0] != "high"]  # type: ignore[index]
        if any(self.p in variables(g) for g in conds):
            raise _Still
        return conjunction([at(g) for g in conds])

    def at(self, name: str, step: Expr, vs: tuple[str, ...]) -> Access:
        return Access(name, (step, *(Var(v) for v in vs if v != self.p)))

    def _named(self, where: list[Einsum], hint: str, body: Expr, vs: tuple[str, ...], step: str) -> Access:
        out = Access(self.fresh(hint), tuple(dict.fromkeys((Var(step), *(Var(v) for v in vs if v != self.p)))))
        where.append(Einsum((out,), body))
        return out

    # -- states ---------------------------------------------------------------------------------------------------

    def order(self, o: OrderState) -> None:
        monoid = MONOIDS[o.monoid]
        if o.monoid not in ("max", "min") or o.whole:
            raise _Still
        identity, shift = Const(monoid.identity), self.shift(o.body)
        old, new = self.at(o.name, Var(self.t), o.vars), self.at(o.name, call("add", Var(self.t), 1), o.vars)
        here = old if shift is None else call("add", old, shift)
        y = _chosen(self.live(o, self.entering), self.entering(o.body), identity)
        self.init.append(Einsum((self.at(o.name, Const(0), o.vars),), identity))
        self.body.append(Einsum((new,), call(monoid.join, here, y)))
        frame = self._named(self.body, "F" + o.name[1:], finite(new, o.monoid), o.vars, self.t)
        end = self.at(o.name, Var(self.p), o.vars)
        value, done = end, finite(end, o.monoid)
        if self.last:
            mine = _chosen(self.live(o, self.own), self.own(o.body), identity)
            value = self._named(self.ends, "G" + o.name[1:], call(monoid.join, end, mine), o.vars, self.p)
            done = self._named(self.ends, "F" + o.name[1:], finite(value, o.monoid), o.vars, self.p)
        self.reads[o.name] = o.vars, value
        self._moves[o.name] = here, frame, end, done

    def sum(self, s: SumState) -> None:
        if any(self.p in variables(x) for x, _ in s.a) or any(g not in self._moves for g, _ in s.ds + s.es):
            raise _Still
        grow = [(d, k) for x, k in s.bounded if (d := self.shift(x)) is not None]
        new = self.at(s.name, call("add", Var(self.t), 1), s.vars)
        self.init.append(Einsum((self.at(s.name, Const(0), s.vars),), Const(0.0)))
        inside = {g: (here, frame) for g, (here, frame, _, _) in self._moves.items()}
        before = self._moved(s, lambda x: self.at(x.name, Var(self.t), x.vars), inside, grow)
        joined = call("add", before, self._point(s, self.entering, {g: f for g, (_, f) in inside.items()}))
        self.body.append(Einsum((new,), joined))
        value = self.at(s.name, Var(self.p), s.vars)
        if self.last:
            inside = {g: (end, done) for g, (_, _, end, done) in self._moves.items()}
            before = self._moved(s, lambda x: self.at(x.name, Var(self.p), x.vars), inside, [])
            joined = call("add", before, self._point(s, self.own, {g: f for g, (_, f) in inside.items()}))
            value = self._named(self.ends, "G" + s.name[1:], joined, s.vars, self.p)
        self.reads[s.name] = s.vars, value

    def _moved(self, s: SumState, read: Callable[[SumState], Access], frames: Mapping[str, tuple[Expr, Expr]],
               grow: list[tuple[Expr, float]]) -> Expr:
        """The old state in the new frame."""
        def delta(g: str) -> Expr:
            return call("sub", finite(frames[g][0], self.stage.gauges[g].kind), frames[g][1])

        out = moved(s, self.stage.sums, read, delta)
        parts = [(call("sub", *frames[g]), k) for g, k in s.es] + grow
        return call("mul", out, exponential(parts)) if parts else out

    def _point(self, s: SumState, at: Callable[[Expr], Expr], frames: Mapping[str, Expr]) -> Expr:
        """The summand of one point."""
        factors = [(at(x), k) for x, k in s.a]
        parts: list[tuple[Expr, float]] = [(call("sub", at(self.stage.gauges[g].body), frames[g]), k) for g, k in s.es]
        parts += [(at(x), k) for x, k in s.bounded]
        if parts:
            factors.insert(0, (exponential(parts), 1.0))
        for g, j in s.ds:
            y = at(self.stage.gauges[g].body)
            none = Const(MONOIDS[self.stage.gauges[g].kind].identity)
            factors.append((call("where", call("eq", y, none), 0.0, call("sub", y, frames[g])), j))
        return _chosen(self.live(s, at), product(factors) if factors else Const(1.0), Const(0.0))


def _chosen(cond: Expr | None, x: Expr, otherwise: Expr) -> Expr:
    return x if cond is None else call("where", cond, x, otherwise)


def _expanded(e: Expr) -> dict[Expr, float]:
    """Addends with every product of sums multiplied out, integers as reals."""
    out: dict[Expr, float] = {}
    for k, x in flatten(transform(e, _real), spread=lambda factor, rest: True):
        accumulate(out, key(x), k)
    return out


def _real(e: Expr) -> Expr:
    """real(a + b) = real(a) + real(b)."""
    if isinstance(e, Call) and e.op == "real":
        x = e.args[0]
        if isinstance(x, Call) and x.op in ("add", "sub", "neg"):
            return replace(x, args=tuple(_real(call("real", a)) for a in x.args))
        if isinstance(x, Const):
            return Const(float(x.value))
    return e
