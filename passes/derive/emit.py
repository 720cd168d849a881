"""Writing a stage as plain Einsums: tile statements, running states, frame changes, merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product as combinations

from memcomp.ir.cascade import Einsum, Reduce
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, conjunction, conjuncts, rebuild, children, variables
from memcomp.ir.ops import MONOIDS
from memcomp.passes.derive.linear import linear, scaled, to_expr
from memcomp.passes.derive.separate import LN2, raised
from memcomp.passes.derive.states import OrderState, Stage, State, SumState

INF = math.inf


@dataclass(frozen=True, slots=True)
class Cut:
    """A stream variable v cut as v = ((m2*)M1 + m1)*M0 + m0; outer is the parallel split or None."""

    carried: str
    outer: str | None
    step: str
    inner: str
    extent: Expr

    @property
    def index(self) -> Expr:
        at: Expr = Var(self.step)
        if self.outer is not None:
            at = Call("add", (Call("mul", (Var(self.outer), Size(self.step.upper()))), at))
        return Call("add", (Call("mul", (at, Size(self.inner.upper()))), Var(self.inner)))

    @property
    def tail(self) -> Expr:
        return Call("lt", (self.index, self.extent))

    @property
    def point(self) -> tuple[Expr, ...]:
        """Index of a tile tensor where the uncut one had v."""
        return (*self.lead, Var(self.step), Var(self.inner))

    @property
    def lead(self) -> tuple[Expr, ...]:
        return () if self.outer is None else (Var(self.outer),)


@dataclass(slots=True)
class Writer:
    """Writes one stage.  tiled: carried tensors to cut -> their statement; named: inlined map body -> its tensor."""

    cut: Cut
    stage: Stage
    tiled: Mapping[str, Einsum]
    named: Mapping[Expr, str]
    fresh: Callable[[str], str]
    wanted: dict[str, str] = field(default_factory=dict)  # tile tensor -> the name it would like back
    init: list[Einsum] = field(default_factory=list)
    body: list[Einsum] = field(default_factory=list)
    merge: list[Einsum] = field(default_factory=list)
    _cut: dict[str, str] = field(default_factory=dict)
    _maps: dict[tuple[Expr, tuple[Expr, ...]], Access] = field(default_factory=dict)
    _frames: dict[str, Access] = field(default_factory=dict)
    _moves: dict[tuple[tuple[str, float], ...], Access] = field(default_factory=dict)
    _merges: dict[tuple[tuple[str, float], ...], Access] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)

    # -- tiles ----------------------------------------------------------------------------------------------------

    def tile(self, e: Expr) -> Expr:
        """The expression at a point of the tile; cut tensors it reads are written first."""
        if e == Var(self.cut.carried):
            return self.cut.index
        if isinstance(e, Access) and e.tensor.startswith("$d:"):
            return self._difference(e.tensor[3:])
        if isinstance(e, Access) and e.tensor in self.tiled:
            return self._cut_access(e)
        kids = children(e)
        return rebuild(e, tuple(self.tile(k) for k in kids)) if kids else e

    def _cut_access(self, e: Access) -> Access:
        index: list[Expr] = []
        for i in e.index:
            index += self.cut.point if i == Var(self.cut.carried) else [self.tile(i)]
        return Access(self._cut_tensor(e.tensor), tuple(index))

    def _cut_tensor(self, name: str) -> str:
        """The tile version of a carried statement."""
        if name not in self._cut:
            s = self.tiled[name]
            self._cut[name] = mine = self.fresh(name)
            self.wanted[mine] = name
            target = self._cut_access(Access(name, s.out.index))
            body = self.tile(s.body)
            self.body.append(Einsum((target,), body, s.reduce, self._guard(s.guards())))
        return self._cut[name]

    def _guard(self, conds: tuple[Expr, ...]) -> Expr | None:
        return conjunction([self.cut.tail, *(self.tile(c) for c in conds)])

    def _map(self, e: Expr, hint: str, guard: tuple[Expr, ...], space: tuple[str, ...]) -> Access:
        """A named tile map over the variables of `e` (in the order of `space`)."""
        key = (e, guard)
        if key not in self._maps:
            used = set().union(variables(e), *(variables(c) for c in guard))
            index: list[Expr] = []
            for v in space:
                if v == self.cut.carried:
                    index += self.cut.point
                elif v in used:
                    index.append(Var(v))
            body = self.tile(e)
            where = self._guard(guard)
            out = Access(self.fresh(hint), tuple(index))
            self.body.append(Einsum((out,), body, None, where))
            self._maps[key] = out
        return self._maps[key]

    def operand(self, e: Expr, hint: str, space: tuple[str, ...]) -> Expr:
        """An element to reduce: an access or constant as it is, anything else through a named map."""
        if isinstance(e, (Access, Const)):
            return self.tile(e)
        if e in self.named and self.named[e] in self.tiled:
            s = self.tiled[self.named[e]]
            return self._cut_access(Access(self.named[e], s.out.index))
        return self._map(e, hint, (), space)

    # -- states ---------------------------------------------------------------------------------------------------

    def at(self, name: str, step: Expr, vs: tuple[str, ...]) -> Access:
        return Access(name, (*self.cut.lead, step, *(Var(v) for v in vs)))

    @property
    def now(self) -> Expr:
        return Var(self.cut.step)

    @property
    def then(self) -> Expr:
        return Call("add", (Var(self.cut.step), Const(1)))

    def _start(self, name: str, vs: tuple[str, ...], value: Expr) -> None:
        self.init.append(Einsum((self.at(name, Const(0), vs),), value))

    def _over(self, over: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.cut.inner if v == self.cut.carried else v for v in over)

    def _space(self, state: State) -> tuple[str, ...]:
        return (*state.vars, *state.over) if self.cut.carried not in state.vars else state.vars

    def order(self, o: OrderState, space: tuple[str, ...]) -> None:
        monoid = MONOIDS[o.monoid]
        identity = Const(bool(monoid.identity)) if o.monoid in ("and", "or") else Const(monoid.identity)
        self._start(o.name, o.vars, identity)
        local = Access(self.fresh("L" + o.name[1:]), (*self.cut.lead, self.now, *(Var(v) for v in o.vars)))
        y = self.operand(o.body, "Y" + o.name[1:], space)
        self.body.append(Einsum((local,), y, Reduce(o.monoid, self._over(o.over)), self._guard(o.guard)))
        self.body.append(Einsum((self.at(o.name, self.then, o.vars),),
                                Call(monoid.join, (self.at(o.name, self.now, o.vars), local))))
        if self.cut.outer is not None:
            self.merge.append(Einsum((self.merged(o),), self.at(o.name, Size(self.cut.step.upper()), o.vars),
                                     Reduce(o.monoid, (self.cut.outer,))))

    def merged(self, state: State) -> Access:
        return self.stage.final(state)

    def sum(self, state: SumState, space: tuple[str, ...]) -> None:
        self._start(state.name, state.vars, Const(0.0))
        factors: list[tuple[Expr, float, set[str]]] = []
        stem = state.name[1:]
        if state.es or state.bounded:
            factors.append((self._exponential(state, space), 1, set()))
        for g, j in state.ds:
            factors.append((self.stage.gauges[g].shift, j, set()))
        factors += [(x, p, set()) for x, p in state.a]
        body = self._pair([(x, p) for x, p, _ in factors], stem, space)
        vs = tuple(Var(v) for v in state.vars)
        local = Access(self.fresh("L" + stem), (*self.cut.lead, self.now, *vs))
        self.body.append(Einsum((local,), body, Reduce("sum", self._over(state.over)), self._guard(state.guard)))
        self._order.append(state.name)
        moved = self._moved(state, lambda s: self.at(s.name, self.now, s.vars), self._delta, self._factor)
        if isinstance(moved, Call):
            held = Access(self.fresh("P" + stem), local.index)
            self.body.append(Einsum((held,), moved))
            moved = held
        self.body.append(Einsum((self.at(state.name, self.then, state.vars),), Call("add", (local, moved))))
        if self.cut.outer is not None:
            self._merge_sum(state)

    def _pair(self, factors: list[tuple[Expr, float]], stem: str, space: tuple[str, ...]) -> Expr:
        """The summand as an element, or a product of two elements (a dot); the rest is hoisted into maps."""
        if not factors:
            return Const(1.0)
        groups: list[list[tuple[Expr, float]]] = []
        ranks: list[set[str]] = []
        for e, p in sorted(factors, key=lambda f: -len(self._ranks(f[0]))):
            mine = self._ranks(e)
            fits = [i for i, r in enumerate(ranks) if mine <= r]
            if fits:
                groups[min(fits, key=lambda i: len(ranks[i]))].append((e, p))
            else:
                groups.append([(e, p)])
                ranks.append(mine)
        while len(groups) > 2:
            tail, extra = groups.pop(), ranks.pop()
            groups[-1] += tail
            ranks[-1] |= extra
        sides = []
        for g in groups:
            if len(g) == 1 and g[0][1] == 2 and len(groups) == 1:
                one = self.operand(g[0][0], "X" + stem, space)
                sides += [one, one]
            elif len(g) == 1 and g[0][1] == 1:
                sides.append(self.operand(g[0][0], "X" + stem, space))
            else:
                from memcomp.passes.derive.separate import product

                sides.append(self.operand(product(g), "X" + stem, space))
        return sides[0] if len(sides) == 1 else Call("mul", (sides[0], sides[1]))

    def _ranks(self, e: Expr) -> set[str]:
        if isinstance(e, Access) and e.tensor.startswith("$d:"):
            return set(self.stage.gauge_vars[e.tensor[3:]]) | {self.cut.carried}
        if isinstance(e, Access) and e.tensor.startswith("$e:"):
            return {v for v in variables(self._maps_of[e.tensor])}
        return variables(e) - {self.cut.inner, self.cut.step}
