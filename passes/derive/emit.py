"""Writing a stage as plain Einsums: tile statements, running states, frame changes, merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product as combinations

from memcomp.ir.cascade import Einsum, Reduce
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, children, conjunction, reads, rebuild, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.passes.derive.linear import to_expr
from memcomp.passes.derive.separate import LN2, product, raised
from memcomp.passes.derive.states import OrderState, Stage, SumState, finite

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
    conditions: set[str] = field(default_factory=set)  # tensors of truth values
    wanted: dict[str, str] = field(default_factory=dict)  # tile tensor -> the name it would like back
    init: list[Einsum] = field(default_factory=list)
    body: list[Einsum] = field(default_factory=list)
    merge: list[Einsum] = field(default_factory=list)
    _cut: dict[str, str] = field(default_factory=dict)
    _maps: dict[tuple[Expr, tuple[Expr, ...]], Access] = field(default_factory=dict)
    _locals: dict[str, Access] = field(default_factory=dict)
    _sums: dict[object, Access] = field(default_factory=dict)
    _exps: list[tuple[object, tuple[Expr, ...], Access]] = field(default_factory=list)
    _symbols: dict[str, Access] = field(default_factory=dict)
    _shifts: dict[str, Access] = field(default_factory=dict)
    _spaces: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _frames: dict[str, Access] = field(default_factory=dict)
    _olds: dict[str, Access] = field(default_factory=dict)
    _grands: dict[str, Access] = field(default_factory=dict)
    _deltas: dict[tuple[str, str], Access] = field(default_factory=dict)
    _factors: dict[tuple[str, object], Access] = field(default_factory=dict)

    # -- tiles ----------------------------------------------------------------------------------------------------

    def tile(self, e: Expr) -> Expr:
        """The expression at a point of the tile; cut tensors it reads are written first."""
        if e == Var(self.cut.carried):
            return self.cut.index
        if isinstance(e, Access) and e.tensor.startswith("$d:"):
            return self._difference(e.tensor[3:])
        if isinstance(e, Access) and e.tensor in self._symbols:
            return self._symbols[e.tensor]
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
            body = self.tile(e)
            where = self._guard(guard)
            used = variables(body) | (variables(where) if where is not None else set())
            index: list[Expr] = []
            for v in space:
                if v == self.cut.carried:
                    index += self.cut.point
                elif v in used:
                    index.append(Var(v))
            out = Access(self.fresh(hint), tuple(index))
            self.body.append(Einsum((out,), body, None, where))
            self._maps[key] = out
        return self._maps[key]

    def operand(self, e: Expr, hint: str, space: tuple[str, ...], guard: tuple[Expr, ...]) -> Expr:
        """An element to reduce where `guard` holds: an access or constant as it is, else through a named map."""
        if isinstance(e, (Access, Const)):
            return self.tile(e)
        if e in self.named and self.named[e] in self.tiled:
            s = self.tiled[self.named[e]]
            return self._cut_access(Access(self.named[e], s.out.index))
        return self._map(e, hint, guard if self._shielded(e) else (), space)

    def _shielded(self, e: Expr) -> bool:
        """Does it read where only a guard may allow it (`X[m - 1]`, `X[pages[m]]`)?"""
        v = Var(self.cut.carried)
        indices = [i for n in walk(e) if isinstance(n, Access) and not n.tensor.startswith("$") for i in n.index]
        return any(i != v and (self.cut.carried in variables(i) and not _part(i, v) or reads(i)) for i in indices)

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

    def order(self, o: OrderState, space: tuple[str, ...]) -> None:
        monoid = MONOIDS[o.monoid]
        identity = Const(bool(monoid.identity)) if o.monoid in ("and", "or") else Const(monoid.identity)
        self._start(o.name, o.vars, identity)
        local = Access(self.fresh("L" + o.name[1:]), (*self.cut.lead, self.now, *(Var(v) for v in o.vars)))
        bools = o.monoid in ("and", "or")  # a condition has no tensor of its own
        y = self.tile(o.body) if bools else self.operand(o.body, "Y" + o.name[1:], space, o.guard)
        if bools:
            self.conditions |= {o.name, local.tensor, self.stage.final(o).tensor}
        self.body.append(Einsum((local,), y, Reduce(o.monoid, self._over(o.over)), self._guard(o.guard)))
        self.body.append(Einsum((self.at(o.name, self.then, o.vars),),
                                Call(monoid.join, (self.at(o.name, self.now, o.vars), local))))
        if self.cut.outer is not None:
            self.merge.append(Einsum((self.stage.final(o),), self.at(o.name, Size(self.cut.step.upper()), o.vars),
                                     Reduce(o.monoid, (self.cut.outer,))))

    def sum(self, state: SumState, space: tuple[str, ...]) -> None:
        """Local sum over the tile, old state moved into the new frame, their sum."""
        self._start(state.name, state.vars, Const(0.0))
        stem = state.name[1:]
        factors: list[tuple[Expr, float]] = list(state.a)
        if state.es or state.bounded:
            factors.insert(0, (self._exponential(state, space), 1))
        factors += [(self.stage.gauges[g].shift, j) for g, j in state.ds]
        body = self._pair(factors, stem, space, state.guard)
        local = self._locals[state.name] = self._summed(body, "L" + stem, state.vars, state.over, state.guard)
        moved = self._moved(state, lambda s: self.at(s.name, self.now, s.vars), self._delta, self._factor)
        if isinstance(moved, Call):
            moved = self._write(self.body, "P" + stem, self._step(state.vars), moved)
        self.body.append(Einsum((self.at(state.name, self.then, state.vars),), Call("add", (local, moved))))
        if self.cut.outer is not None:
            end = Size(self.cut.step.upper())
            moved = self._moved(state, lambda s: self.at(s.name, end, s.vars), self._delta_merge, self._factor_merge)
            if isinstance(moved, Call) and not all(isinstance(a, Access) for a in moved.args):
                moved = self._write(self.merge, "W" + stem, (*self.cut.lead, *(Var(v) for v in state.vars)), moved)
            self.merge.append(Einsum((self.stage.final(state),), moved, Reduce("sum", (self.cut.outer,))))

    def _summed(self, body: Expr, hint: str, vs: tuple[str, ...], over: tuple[str, ...],
                guard: tuple[Expr, ...]) -> Access:
        """The sum over the tile, written once."""
        key = (body, vs, frozenset(over), frozenset(guard))
        if key not in self._sums:
            self._sums[key] = local = Access(self.fresh(hint), self._step(vs))
            self.body.append(Einsum((local,), body, Reduce("sum", self._over(over)), self._guard(guard)))
        return self._sums[key]

    def _write(self, where: list[Einsum], hint: str, index: tuple[Expr, ...], body: Expr) -> Access:
        out = Access(self.fresh(hint), index)
        where.append(Einsum((out,), body))
        return out

    def _step(self, vs: tuple[str, ...]) -> tuple[Expr, ...]:
        return (*self.cut.lead, self.now, *(Var(v) for v in vs))

    def _pair(self, factors: list[tuple[Expr, float]], stem: str, space: tuple[str, ...],
              guard: tuple[Expr, ...]) -> Expr:
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
            groups[1] += groups.pop()
        if len(groups) == 1 and len(groups[0]) == 1 and groups[0][0][1] == 2:
            groups = [[(groups[0][0][0], 1)]] * 2
        sides = [self.operand(g[0][0] if len(g) == 1 and g[0][1] == 1 else product(g), "X" + stem, space, guard)
                 for g in groups]
        return sides[0] if len(sides) == 1 else Call("mul", (sides[0], sides[1]))

    def _ranks(self, e: Expr) -> set[str]:
        if isinstance(e, Access) and e.tensor.startswith("$d:"):
            return {*self.stage.gauge_vars[e.tensor[3:]], *self.stage.gauge_over[e.tensor[3:]]}
        return variables(e)

    def _exponential(self, state: SumState, space: tuple[str, ...]) -> Access:
        """exp of the gauge differences, shared by the states with the same exponent and as many points."""
        tag = (frozenset(state.es), frozenset(state.bounded))
        for known, guard, symbol in self._exps:
            if known == tag and set(guard) <= set(state.guard):
                return symbol
        used = variables(self.cut.extent).union(*(self._ranks(self.stage.gauges[g].shift) for g, _ in state.es),
                           *(variables(x) for x, _ in state.bounded), *(variables(c) for c in state.guard))
        symbol = Access(f"$e:{len(self._exps)}", tuple(Var(v) for v in space if v in used))
        parts: list[tuple[Expr, float]] = [(Call("sub", (self._level(g, space), self._frame(g))), k)
                                           for g, k in state.es]
        parts += [(self.tile(x), k) for x, k in state.bounded]
        index = tuple(i for v in symbol.index for i in (self.cut.point if v == Var(self.cut.carried) else (v,)))
        hint = "E" + (state.es[0][0] if state.es else state.name)[1:]
        out = Access(self.fresh(hint), index)
        self.body.append(Einsum((out,), exponential(parts), None, self._guard(state.guard)))
        self._exps.append((tag, state.guard, symbol))
        self._symbols[symbol.tensor] = out
        return symbol

    def _level(self, gauge: str, space: tuple[str, ...]) -> Expr:
        g = self.stage.gauges[gauge]
        return self.operand(g.body, "Y" + gauge[1:], space, g.guard)

    def _difference(self, gauge: str) -> Access:
        """d = y - rho as a tile; 0 where y is -inf, since d**j e**d is 0 there."""
        if gauge not in self._shifts:
            g, space = self.stage.gauges[gauge], self._spaces[gauge]
            y = self._level(gauge, space)
            d: Expr = Call("sub", (y, self._frame(gauge)))
            if g.kind in ("max", "min"):
                d = Call("where", (Call("eq", (y, Const(INF if g.kind == "min" else -INF))), Const(0.0), d))
            used = self._ranks(g.shift)
            index = tuple(i for v in space if v in used
                          for i in (self.cut.point if v == self.cut.carried else (Var(v),)))
            out = Access(self.fresh("D" + gauge[1:]), index)
            self.body.append(Einsum((out,), d, None, self._guard(g.guard)))
            self._shifts[gauge] = out
        return self._shifts[gauge]

    # -- frames ---------------------------------------------------------------------------------------------------

    def gauge(self, name: str, space: tuple[str, ...]) -> None:
        """The reference of a gauge; an extreme is an order state already, a mean is written here."""
        g, vs = self.stage.gauges[name], self.stage.gauge_vars[name]
        self._spaces[name] = space
        if g.kind in ("max", "min"):
            old = self.at(name, self.now, vs)
            self._olds[name] = old
            self._frames[name] = self._write(self.body, "F" + name[1:], self._step(vs),
                                             finite(self.at(name, self.then, vs), g.kind))
            if self.cut.outer is not None:
                rho = self.stage.rho(name)
                self._grands[name] = self._write(self.merge, "F" + name[1:], rho.index, finite(rho, g.kind))
            return
        self._start(name, vs, Const(0.0))
        count = next(c for c in self.stage.sums if not (c.a or c.ds or c.es or c.bounded) and c.guard == g.guard)
        local = self._summed(self._level(name, space), "L" + name[1:], vs, self.stage.gauge_over[name], g.guard)
        old, new = self.at(name, self.now, vs), self.at(name, self.then, vs)
        points, seen = self._locals[count.name], self.at(count.name, self.now, count.vars)
        if g.kind == "first":
            mean = Call("div", (local, Call("max", (points, Const(1.0)))))
            self.body.append(Einsum((new,), Call("where", (Call("gt", (seen, Const(0.0))), old, mean))))
        else:
            total = self.at(count.name, self.then, count.vars)
            gain = Call("sub", (local, Call("mul", (points, old))))
            self.body.append(Einsum((new,), Call("add", (old, Call("div", (gain, Call("max", (total, Const(1.0)))))))))
        self._olds[name], self._frames[name] = old, new
        if self.cut.outer is not None:
            end = Size(self.cut.step.upper())
            rho, ends = self.stage.rho(name), self.at(count.name, end, count.vars)
            weighted = self._write(self.merge, "W" + name[1:], (*self.cut.lead, *rho.index),
                                   Call("mul", (self.at(name, end, vs), ends)))
            whole = Access(self.fresh("S" + name[1:]), rho.index)
            self.merge.append(Einsum((whole,), weighted, Reduce("sum", (self.cut.outer,))))
            self.merge.append(Einsum((rho,), Call("div", (whole, Call("max", (self.stage.final(count), Const(1.0)))))))
            self._grands[name] = rho

    def _frame(self, gauge: str) -> Access:
        return self._frames[gauge]

    def _moved(self, state: SumState, read: Callable[[SumState], Access], delta: Callable[[str], Expr | None],
               factor: Callable[[SumState], Access | None]) -> Expr:
        """The old state in the new frame."""
        moves = [(g, j, d) for g, j in state.ds if (d := delta(g)) is not None]
        terms: list[Expr] = []
        for ls in combinations(*(range(j, -1, -1) for _, j, _ in moves)):
            lower = dict(state.ds)
            weight: Expr | None = None
            for (g, j, d), k in zip(moves, ls, strict=True):
                lower[g] = k
                for n in (Const(float(math.comb(j, k))),) if math.comb(j, k) != 1 else ():
                    weight = n if weight is None else Call("mul", (weight, n))
                if j > k:
                    step = raised(d, j - k)
                    weight = step if weight is None else Call("mul", (weight, step))
            source = read(self._like(state, tuple((g, k) for g, k in lower.items() if k)))
            terms.append(source if weight is None else Call("mul", (source, weight)))
        out = terms[0]
        for t in terms[1:]:
            out = Call("add", (out, t))
        p = factor(state)
        return out if p is None else Call("mul", (out, p))

    def _like(self, state: SumState, ds: tuple[tuple[str, int], ...]) -> SumState:
        return next(s for s in self.stage.sums if (s.a, s.es, s.bounded, s.guard, s.over) ==
                    (state.a, state.es, state.bounded, state.guard, state.over) and set(s.ds) == set(ds))

    def _delta(self, gauge: str) -> Expr | None:
        g = self.stage.gauges[gauge]
        if g.kind == "first":
            return None  # it moves once, while every state is still empty
        old = finite(self._olds[gauge], g.kind) if g.kind in ("max", "min") else self._olds[gauge]
        return self._named_delta(("loop", gauge), self.body, self._step(self.stage.gauge_vars[gauge]),
                                 Call("sub", (old, self._frames[gauge])))

    def _delta_merge(self, gauge: str) -> Expr | None:
        g, vs = self.stage.gauges[gauge], self.stage.gauge_vars[gauge]
        end = self.at(gauge, Size(self.cut.step.upper()), vs)
        old = finite(end, g.kind) if g.kind in ("max", "min") else end
        return self._named_delta(("merge", gauge), self.merge, (*self.cut.lead, *(Var(v) for v in vs)),
                                 Call("sub", (old, self._grands[gauge])))

    def _named_delta(self, key: tuple[str, str], where: list[Einsum], index: tuple[Expr, ...], body: Expr) -> Access:
        if key not in self._deltas:
            self._deltas[key] = self._write(where, "M" + key[1][1:], index, body)
        return self._deltas[key]

    def _factor(self, state: SumState) -> Access | None:
        return self._grown(state, "loop", self.body, lambda g: self._olds[g], self._frames, self._step)

    def _factor_merge(self, state: SumState) -> Access | None:
        end = Size(self.cut.step.upper())
        return self._grown(state, "merge", self.merge, lambda g: self.at(g, end, self.stage.gauge_vars[g]),
                           self._grands, lambda vs: (*self.cut.lead, *(Var(v) for v in vs)))

    def _grown(self, state: SumState, key: str, where: list[Einsum], old: Callable[[str], Access],
               new: Mapping[str, Access], index: Callable[[tuple[str, ...]], tuple[Expr, ...]]) -> Access | None:
        """exp(lambda * (rho - rho')), shared by all states in the same frame."""
        if not state.es:
            return None
        tag = (key, frozenset(state.es))
        if tag not in self._factors:
            used = {v for g, _ in state.es for v in self.stage.gauge_vars[g]}
            vs = tuple(v for v in self._spaces[state.es[0][0]] if v in used)
            parts: list[tuple[Expr, float]] = [(Call("sub", (old(g), new[g])), k) for g, k in state.es]
            self._factors[tag] = self._write(where, "P" + state.es[0][0][1:], index(vs), exponential(parts))
        return self._factors[tag]


def _part(i: Expr, v: Var) -> bool:
    """v cut by a constant: never outside the tensor when v is not."""
    return isinstance(i, Call) and i.op in ("floordiv", "mod") and i.args[0] == v and isinstance(i.args[1], Const)


def exponential(parts: list[tuple[Expr, float]]) -> Expr:
    """exp of sum k * e, in base 2 where the only factor says so."""
    if len(parts) == 1 and parts[0][1] == LN2:
        return Call("exp2", (parts[0][0],))
    return Call("exp", (to_expr(parts),))
