"""Closing a reduction: its value from finished states, chosen to be the identity where no point took part.

A state over no points is the monoid's identity.  What multiplies or maps it may then be inf or NaN (1/0, log 0), while
the reduction itself is the identity: such values are chosen by a condition, in closed form where the guards are
affine, else by a count of points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from memcomp.ir.cascade import Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, conjunction, reads, substitute, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.simplify import simplify
from memcomp.passes.derive.finals import Finals
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import State, finite
from memcomp.passes.derive.terms import Term


@dataclass(frozen=True, slots=True)
class Closing:
    """ends: state or reference -> how its finished value is read."""

    stage: Stage
    finals: Finals
    ends: Mapping[str, Access]

    def sum(self, s: Einsum, terms: list[Term], guard: tuple[Expr, ...]) -> Einsum:
        """The finalise map of an accepted sum."""
        self.finals.assume, self.finals.leaned = self.some(s, guard), False
        done = [replace(self._grounded(self.finals.normal(t)), when=t.when) for t in terms]
        leaned, self.finals.assume = self.finals.leaned, None
        conds = [self._alive(s, t, guard, leaned) for t in done]
        body: Expr | None = None
        same = len(set(conds)) == 1
        for t, cond in zip(done, conds, strict=True):
            part = self.finals.build(t if same or cond is None else replace(t, if_=(cond, *t.if_)))
            body = part if body is None else Call("add", (body, part))
        plain = replace(s, body=Const(0.0) if body is None else body, reduce=None, guard=self._fits(s))
        one = done[0] if len(done) == 1 else None
        if same and conds[0] is not None:
            self.finals.learn(plain, None, one, conds[0])
            return replace(plain, body=Call("where", (conds[0], plain.body, Const(0.0))))
        if not any(conds):
            self.finals.learn(plain, plain.body, one)
        return plain

    def order(self, s: Einsum, value: Expr, guard: tuple[Expr, ...]) -> Einsum:
        """The finalise map of an accepted order reduction; nothing is cancelled, so that -inf - -inf stays NaN."""
        assert s.reduce is not None
        plain = replace(s, body=value, reduce=None, guard=self._fits(s))
        if isinstance(value, Access):
            self.finals.learn(plain, value, self.finals.term(value))
            return plain
        cond = self.some(s, guard)
        if cond is None:
            return plain
        return replace(plain, body=Call("where", (cond, value, Const(MONOIDS[s.reduce.monoid].identity))))

    def shared(self, s: Einsum, fresh: Callable[[str], str]) -> list[Einsum]:
        """A sum over another rank of finished values: finished factors without that rank leave it, so that they can
        cancel in what divides by it."""
        assert s.reduce is not None
        over, ends = set(s.reduce.over), {e.tensor for e in self.ends.values()}
        t = self.finals.term(s.body)
        outside = tuple((x, p) for x, p in t.c if not variables(x) & over and reads(x) & ends)
        inside = replace(t, coef=1.0, c=tuple(f for f in t.c if f not in outside))
        some, _ = self.stage.facts.alive(s.reduce.over, ())
        if s.guard is not None or t.if_ or some is not None or not outside or not (inside.c or inside.ec):
            return [s]
        rest = Access(fresh(s.names[0] + "S"), s.out.index)
        if any(not isinstance(i, Var) for i in rest.index):
            return [s]
        whole = Term(coef=t.coef, c=((rest, 1), *outside))
        plain = replace(s, body=self.finals.build(whole), reduce=None)
        self.finals.learn(plain, None, whole)
        return [replace(s, outs=(rest,), body=self.finals.build(inside)), plain]

    def _fits(self, s: Einsum) -> Expr | None:
        """Where a guarded reduction has an element to write: its guard may be what keeps an index in its tensor."""
        assert s.reduce is not None
        own = [c for c in s.guards() if not variables(c) & set(s.reduce.over)]
        if any(reads(i) for i in s.out.index):
            return conjunction(own)
        if all(isinstance(i, Var) for i in s.out.index):
            return None
        parts: list[Expr] = []
        for i, r in zip(s.out.index, self.stage.facts.cascade.tensor(s.out.tensor).ranks, strict=True):
            if not isinstance(i, Var) and any(variables(i) & variables(c) for c in own):
                parts += [Call("le", (Const(0), i)), Call("lt", (i, Size(r)))]
        ranges = self.stage.facts.ranges()
        return conjunction([c for p in parts if (c := simplify(p, ranges)) != Const(True)])

    def some(self, s: Einsum, guard: tuple[Expr, ...]) -> Expr | None:
        """The condition that a point takes part; None where one always does."""
        assert s.reduce is not None
        cond, rest = self.stage.facts.alive(s.reduce.over, guard)
        if rest:
            return Call("gt", (self.stage.final(self.stage.count(s, guard, self._rows(s))), Const(0.0)))
        return cond

    def _rows(self, s: Einsum) -> tuple[str, ...]:
        """Variables of the result that every state carries: a count is kept where they are."""
        states: list[State] = [*self.stage.orders, *self.stage.sums]
        common = set.intersection(*(set(x.vars) for x in states)) if states else set()
        return tuple(v for v in s.space() if v in common)

    def _alive(self, s: Einsum, t: Term, guard: tuple[Expr, ...], leaned: bool) -> Expr | None:
        points = tuple(dict.fromkeys(guard + t.when))
        return None if (self._tame(t) and not leaned) or self._chosen(t, points) else self.some(s, points)

    def _tame(self, t: Term) -> bool:
        """Is the c-side finite where no point takes part?  Products of neutral values and of empty sums are, and the
        exponential of a greatest value, which is -inf there."""
        kind: dict[Expr, str] = {self.ends[o.name]: o.monoid for o in self.stage.orders if o.name in self.ends}
        if any(not (kind.get(x) == "max" and k > 0 or kind.get(x) == "min" and k < 0) for x, k in t.ec):
            return False
        sums = {self.ends[s.name].tensor for s in self.stage.sums if s.name in self.ends}
        return all(
            p > 0 and all(n.tensor in sums or not self.stage.late(n.tensor) and n.tensor not in self._extremes()
                          for n in walk(x) if isinstance(n, Access)) and (isinstance(x, Access) or _plain(x))
            for x, p in t.c)

    def _extremes(self) -> set[str]:
        return {self.ends[o.name].tensor for o in self.stage.orders if o.name in self.ends}

    def _chosen(self, t: Term, points: tuple[Expr, ...]) -> bool:
        """Is the term chosen only where some extreme over (at most) these points is not the identity?"""
        for o in self.stage.orders:
            if o.monoid in ("max", "min") and set(points) <= set(o.guard) and o.name in self.ends:
                end, identity = self.ends[o.name], Const(MONOIDS[o.monoid].identity)
                above, below = ("gt", "lt") if o.monoid == "max" else ("lt", "gt")
                known = (Call(above, (end, identity)), Call(below, (identity, end)), Call("ne", (end, identity)),
                         Call("ne", (identity, end)), Call("not", (Call("eq", (end, identity)),)))
                if any(c in known for c in t.if_):
                    return True
        return False

    def _grounded(self, t: Term) -> Term:
        """Where an extreme made for safety multiplies a state, it is 0 while nothing was seen (the state is, too)."""
        table: dict[Expr, Expr] = {}
        for name, g in self.stage.gauges.items():
            if name in self.stage.made and g.kind in ("max", "min"):
                table[self.ends[name]] = finite(self.ends[name], g.kind)
        return replace(t, c=tuple((substitute(x, table), p) for x, p in t.c)) if table else t


def _plain(e: Expr) -> bool:
    """Built from sums and products of elements and finite numbers alone."""
    if isinstance(e, Const):
        return math.isfinite(e.value)
    return not isinstance(e, Call) or (e.op in ("add", "sub", "mul", "neg", "square", "real", "where")
                                       and all(_plain(a) for a in e.args))
