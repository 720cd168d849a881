"""Writing a stage as plain Einsums: tile statements, running states, frame changes, merge."""

from __future__ import annotations

from dataclasses import dataclass, field

from memcomp.ir.cascade import Einsum, Rank, Reduce
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import whole
from memcomp.passes.derive.frames import Frames
from memcomp.passes.derive.states import OrderState, SumState


@dataclass(slots=True)
class Writer(Frames):
    """Writes one stage.  dtypes: of what it made that holds no reals; more: ranks it made."""

    dtypes: dict[str, str] = field(default_factory=dict)
    more: list[Rank] = field(default_factory=list)

    def order(self, o: OrderState, space: tuple[str, ...]) -> None:
        monoid = MONOIDS[o.monoid]
        identity = Const(bool(monoid.identity)) if o.monoid in ("and", "or") else whole(monoid) if o.whole else Const(
            monoid.identity)
        self.start(o.name, o.vars, identity)
        local = Access(self.fresh("L" + o.name[1:]), (*self.cut.lead, self.now, *(Var(v) for v in o.vars)))
        bools = o.monoid in ("and", "or")  # a condition has no tensor of its own
        y = self.tile(o.body) if bools else self.operand(o.body, "Y" + o.name[1:], space, o.guard)
        if bools:
            self.dtypes |= dict.fromkeys((o.name, local.tensor, self.stage.final(o).tensor), "bool")
        if o.whole:
            made = (o.name, local.tensor, self.stage.final(o).tensor, *((y.tensor,) if isinstance(y, Access) else ()))
            self.dtypes |= dict.fromkeys(made, "i64")
        self.body.append(Einsum((local,), y, Reduce(o.monoid, self.inside(o.over)), self.guarded(o.guard)))
        self.body.append(Einsum((self.at(o.name, self.then, o.vars),),
                                Call(monoid.join, (self.at(o.name, self.now, o.vars), local))))
        if self.cut.outer is not None:
            self.merge.append(Einsum((self.stage.final(o),), self.at(o.name, Size(self.cut.step.upper()), o.vars),
                                     Reduce(o.monoid, (self.cut.outer,))))

    def sum(self, state: SumState, space: tuple[str, ...]) -> None:
        """Local sum over the tile, old state moved into the new frame, their sum."""
        for g, _ in state.ds:
            if g not in self.spaces:  # a mean under weights, which are a state written before
                self.gauge(g, space)
        self.start(state.name, state.vars, Const(0.0))
        stem = state.name[1:]
        factors: list[tuple[Expr, float]] = list(state.a)
        if state.es or state.bounded:
            factors.insert(0, (self.exponential(state, space), 1))
        factors += [(self.difference(g), j) for g, j in state.ds]
        body = self.pair(factors, "X" + stem, space, state.guard)
        local = self.locals[state.name] = self.summed(body, "L" + stem, state.vars, state.over, state.guard)
        moved = self.moved(state, lambda s: self.at(s.name, self.now, s.vars), self.delta, self.factor)
        if isinstance(moved, Call):
            moved = self.write(self.body, "P" + stem, self.step(state.vars), moved)
        self.body.append(Einsum((self.at(state.name, self.then, state.vars),), Call("add", (local, moved))))
        if self.cut.outer is not None:
            end = Size(self.cut.step.upper())
            moved = self.moved(state, lambda s: self.at(s.name, end, s.vars), self.delta_merge, self.factor_merge)
            if isinstance(moved, Call) and not all(isinstance(a, Access) for a in moved.args):
                moved = self.write(self.merge, "W" + stem, (*self.cut.lead, *(Var(v) for v in state.vars)), moved)
            self.merge.append(Einsum((self.stage.final(state),), moved, Reduce("sum", (self.cut.outer,))))
