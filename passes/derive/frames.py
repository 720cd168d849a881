"""Frames: references of gauges step by step, differences from them, and what moves a state to another reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memcomp.ir.cascade import Einsum, Reduce
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, variables
from memcomp.passes.derive.linear import to_expr
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import SumState, finite, moved
from memcomp.passes.derive.terms import LN2, Gauge
from memcomp.passes.derive.tiles import Tiles

INF = math.inf


@dataclass(slots=True)
class Frames(Tiles):
    """locals: sum state -> its sum over the tile.  spaces: gauge -> order of variables in its tiles.

    `_olds` and `_frames` are a gauge's reference before and after a step, `_grands` after the merge.
    """

    stage: Stage = field(kw_only=True)
    locals: dict[str, Access] = field(default_factory=dict)
    spaces: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _sums: dict[object, Access] = field(default_factory=dict)
    _exps: list[tuple[object, tuple[Expr, ...], Access]] = field(default_factory=list)
    _frames: dict[str, Access] = field(default_factory=dict)
    _olds: dict[str, Access] = field(default_factory=dict)
    _grands: dict[str, Access] = field(default_factory=dict)
    _deltas: dict[tuple[str, str], Access] = field(default_factory=dict)
    _factors: dict[tuple[str, object], Access] = field(default_factory=dict)

    def at(self, name: str, step: Expr, vs: tuple[str, ...]) -> Access:
        return Access(name, (*self.cut.lead, step, *(Var(v) for v in vs)))

    @property
    def now(self) -> Expr:
        return Var(self.cut.step)

    @property
    def then(self) -> Expr:
        return Call("add", (Var(self.cut.step), Const(1)))

    def start(self, name: str, vs: tuple[str, ...], value: Expr) -> None:
        self.init.append(Einsum((self.at(name, Const(0), vs),), value))

    def inside(self, over: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.cut.inner if v == self.cut.carried else v for v in over)

    def step(self, vs: tuple[str, ...]) -> tuple[Expr, ...]:
        return (*self.cut.lead, self.now, *(Var(v) for v in vs))

    def summed(self, body: Expr, hint: str, vs: tuple[str, ...], over: tuple[str, ...],
                guard: tuple[Expr, ...]) -> Access:
        """The sum over the tile, written once."""
        key = (body, vs, frozenset(over), frozenset(guard))
        if key not in self._sums:
            self._sums[key] = local = Access(self.fresh(hint), self.step(vs))
            self.body.append(Einsum((local,), body, Reduce("sum", self.inside(over)), self.guarded(guard)))
        return self._sums[key]

    def write(self, where: list[Einsum], hint: str, index: tuple[Expr, ...], body: Expr) -> Access:
        out = Access(self.fresh(hint), index)
        where.append(Einsum((out,), body))
        return out

    def gauge(self, name: str, space: tuple[str, ...]) -> None:
        """The reference of a gauge; an extreme is an order state already, a mean is written here."""
        g, vs = self.stage.gauges[name], self.stage.gauge_vars[name]
        self.spaces[name] = space
        if g.kind in ("max", "min"):
            old = self.at(name, self.now, vs)
            self._olds[name] = old
            self._frames[name] = self.write(self.body, "F" + name[1:], self.step(vs),
                                             finite(self.at(name, self.then, vs), g.kind))
            if self.cut.outer is not None:
                rho = self.stage.rho(name)
                self._grands[name] = self.write(self.merge, "F" + name[1:], rho.index, finite(rho, g.kind))
            return
        self.start(name, vs, Const(0.0))
        if g.kind == "weighted":
            self._weighted(g, space)
            return
        count = next(c for c in self.stage.sums if not (c.a or c.ds or c.es or c.bounded) and c.guard == g.guard
                     and c.over == self.stage.gauge_over[name] and c.vars == vs)
        local = self.summed(self._level(name, space), "L" + name[1:], vs, self.stage.gauge_over[name], g.guard)
        old, new = self.at(name, self.now, vs), self.at(name, self.then, vs)
        points, seen = self.locals[count.name], self.at(count.name, self.now, count.vars)
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
            weighted = self.write(self.merge, "W" + name[1:], (*self.cut.lead, *rho.index),
                                   Call("mul", (self.at(name, end, vs), ends)))
            whole = Access(self.fresh("S" + name[1:]), rho.index)
            self.merge.append(Einsum((whole,), weighted, Reduce("sum", (self.cut.outer,))))
            self.merge.append(Einsum((rho,), Call("div", (whole, Call("max", (self.stage.final(count), Const(1.0)))))))
            self._grands[name] = rho

    def _weighted(self, g: Gauge, space: tuple[str, ...]) -> None:
        """The mean so far under weights: rho' = rho + sum w (y - rho) / sum w', both sums in the weights' new frame."""
        name = g.name
        vs, weight = self.stage.gauge_vars[name], self.stage.gauge_weight[name]
        factors = [*weight.a, (g.body, 1.0)]
        if weight.es or weight.bounded:
            factors.insert(0, (self.exponential(weight, space), 1))
        local = self.summed(self.pair(factors, "X" + name[1:], space, weight.guard), "L" + name[1:], vs, weight.over,
                            weight.guard)
        old, new = self.at(name, self.now, vs), self.at(name, self.then, vs)
        total = self.at(weight.name, self.then, weight.vars)
        gain = Call("div", (Call("sub", (local, Call("mul", (self.locals[weight.name], old)))), total))
        some = Call("gt", (total, Const(0.0)))
        self.body.append(Einsum((new,), Call("where", (some, Call("add", (old, gain)), old))))
        self._olds[name], self._frames[name] = old, new
        if self.cut.outer is not None:
            end = Size(self.cut.step.upper())
            rho, whole = self.stage.rho(name), self.stage.final(weight)
            mine: Expr = Call("mul", (self.at(name, end, vs), self.at(weight.name, end, weight.vars)))
            if (p := self.factor_merge(weight)) is not None:
                mine = Call("mul", (mine, p))
            share = self.write(self.merge, "W" + name[1:], (*self.cut.lead, *rho.index), mine)
            top = Access(self.fresh("S" + name[1:]), rho.index)
            self.merge.append(Einsum((top,), share, Reduce("sum", (self.cut.outer,))))
            some = Call("gt", (whole, Const(0.0)))
            self.merge.append(Einsum((rho,), Call("where", (some, Call("div", (top, whole)), Const(0.0)))))
            self._grands[name] = rho

    def moved(self, state: SumState, read: Callable[[SumState], Access], delta: Callable[[str], Expr | None],
               factor: Callable[[SumState], Access | None]) -> Expr:
        """The old state in the new frame."""
        out = moved(state, self.stage.sums, read, delta)
        p = factor(state)
        return out if p is None else Call("mul", (out, p))

    def delta(self, gauge: str) -> Expr | None:
        g = self.stage.gauges[gauge]
        if g.kind == "first":
            return None  # it moves once, while every state is still empty
        old = finite(self._olds[gauge], g.kind) if g.kind in ("max", "min") else self._olds[gauge]
        return self._named_delta(("loop", gauge), self.body, self.step(self.stage.gauge_vars[gauge]),
                                 Call("sub", (old, self._frames[gauge])))

    def delta_merge(self, gauge: str) -> Expr | None:
        g, vs = self.stage.gauges[gauge], self.stage.gauge_vars[gauge]
        end = self.at(gauge, Size(self.cut.step.upper()), vs)
        old = finite(end, g.kind) if g.kind in ("max", "min") else end
        return self._named_delta(("merge", gauge), self.merge, (*self.cut.lead, *(Var(v) for v in vs)),
                                 Call("sub", (old, self._grands[gauge])))

    def _named_delta(self, key: tuple[str, str], where: list[Einsum], index: tuple[Expr, ...], body: Expr) -> Access:
        if key not in self._deltas:
            self._deltas[key] = self.write(where, "M" + key[1][1:], index, body)
        return self._deltas[key]

    def factor(self, state: SumState) -> Access | None:
        return self._grown(state, "loop", self.body, lambda g: self._olds[g], self._frames, self.step)

    def factor_merge(self, state: SumState) -> Access | None:
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
            vs = tuple(v for v in self.spaces[state.es[0][0]] if v in used)
            parts: list[tuple[Expr, float]] = [(Call("sub", (old(g), new[g])), k) for g, k in state.es]
            self._factors[tag] = self.write(where, "P" + state.es[0][0][1:], index(vs), exponential(parts))
        return self._factors[tag]


    def exponential(self, state: SumState, space: tuple[str, ...]) -> Access:
        """exp of the gauge differences, shared by the states with the same exponent and as many points."""
        tag = (frozenset(state.es), frozenset(state.bounded))
        for known, guard, symbol in self._exps:
            if known == tag and set(guard) <= set(state.guard):
                return symbol
        used = variables(self.cut.extent).union(*(self._gauge_ranks(g) for g, _ in state.es),
                           *(variables(x) for x, _ in state.bounded), *(variables(c) for c in state.guard))
        symbol = Access(f"$e:{len(self._exps)}", tuple(Var(v) for v in space if v in used))
        parts: list[tuple[Expr, float]] = [(Call("sub", (self._level(g, space), self._frames[g])), k)
                                           for g, k in state.es]
        parts += [(self.tile(x), k) for x, k in state.bounded]
        index = tuple(i for v in symbol.index for i in (self.cut.point if v == Var(self.cut.carried) else (v,)))
        hint = "E" + (state.es[0][0] if state.es else state.name)[1:]
        out = Access(self.fresh(hint), index)
        self.body.append(Einsum((out,), exponential(parts), None, self.guarded(state.guard)))
        self._exps.append((tag, state.guard, symbol))
        self.symbols[symbol.tensor] = out, set(variables(symbol))
        return symbol

    def _level(self, gauge: str, space: tuple[str, ...]) -> Expr:
        g = self.stage.gauges[gauge]
        return self.operand(g.body, "Y" + gauge[1:], space, g.guard)

    def difference(self, gauge: str) -> Access:
        """d = y - rho as a tile; 0 where y is -inf, since d**j e**d is 0 there."""
        g, space = self.stage.gauges[gauge], self.spaces[gauge]
        if g.shift.tensor not in self.symbols:
            y = self._level(gauge, space)
            d: Expr = Call("sub", (y, self._frames[gauge]))
            if g.kind in ("max", "min"):
                d = Call("where", (Call("eq", (y, Const(INF if g.kind == "min" else -INF))), Const(0.0), d))
            used = self._gauge_ranks(gauge)
            index = tuple(i for v in space if v in used
                          for i in (self.cut.point if v == self.cut.carried else (Var(v),)))
            out = Access(self.fresh("D" + gauge[1:]), index)
            self.body.append(Einsum((out,), d, None, self.guarded(g.guard)))
            self.symbols[g.shift.tensor] = out, used
        return g.shift

    def _gauge_ranks(self, gauge: str) -> set[str]:
        return {*self.stage.gauge_vars[gauge], *self.stage.gauge_over[gauge]}


def exponential(parts: list[tuple[Expr, float]]) -> Expr:
    """exp of sum k * e, in base 2 where the only factor says so."""
    if len(parts) == 1 and parts[0][1] == LN2:
        return Call("exp2", (parts[0][0],))
    return Call("exp", (to_expr(parts),))
