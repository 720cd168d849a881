"""Where the steps of a loop begin: at the first point that a guard leaves a task, not at a multiple of the step.

A reduction over `m` that runs in steps `m1*M0 + m0` may run in steps `o + m1*M0 + m0` as well where nothing is live
before `o`: a window of W keys then takes the steps of W keys, wherever it lies.
"""

from __future__ import annotations

from dataclasses import replace

from memcomp.codegen import bounds
from memcomp.codegen.lower_limits import Limits, joined, of_parts
from memcomp.ir.expr import (
    Access,
    Call,
    Const,
    Expr,
    Var,
    call,
    children,
    reads,
    rebuild,
    substitute,
    transform,
    variables,
    walk,
)
from memcomp.ir.simplify import linear, simplify

ALIGNED = 16  # points; the first step begins at a multiple, so that the ends of windows fit the tiles of queries
_ANY = Var("any step")


class Starts(Limits):
    """Moves the steps of a kernel's loop."""

    def start_at_first(self) -> None:
        """Rewrite the operations of a kernel whose loop may leave out steps, and whose guards bound it from below by
        sizes and grid variables; before counts are taken from guards."""
        for name in self.streamed() if self.idle_joins() else ():
            common = [bounds.plainer(g, self.integer_params()) for g in self.common_guards()]
            first = [p for g in common if (p := self._first(name, g)) is not None]
            if not first or not any(self._ends(name, g) for g in common):
                continue
            by = joined("max", [Const(0), *first])
            if by != Const(0) and not any(self.g.loop in variables(i) for a in self.g.stores.values() for i in a.index):
                self._move(name, by)

    def _first(self, name: str, guard: Expr) -> Expr | None:
        """The first `step * loop variable + dim` at which a guard holds somewhere in the tile."""
        if isinstance(guard, Call) and guard.op in ("and", "or"):
            return of_parts(guard, lambda part: self._first(name, part), "max", "min")
        h = None if _data(guard) else self.half(guard)
        terms = linear(h.rest) if h is not None else None
        if h is None or terms is None:
            return None
        c = terms.pop(Var(name), 0)
        if c >= 0 or h.step != c * self.g.dims[name].capacity:
            return None
        least = self.end(bounds.total([bounds.scaled(t, k) for t, k in terms.items()]), False, True)
        if least is None or reads(least):
            return None  # counts of dims read no tiles
        first = call("add", call("floordiv", least, -c), 1)
        whole = min(ALIGNED, self.g.dims[name].capacity)
        return simplify(call("mul", call("floordiv", first, whole), whole), index=True)

    def _ends(self, name: str, guard: Expr) -> bool:
        """Does a guard end the rank, so that steps need not divide it?  Not where tasks take shares of it: the end of a
        share is its last step, and later ones are another task's."""
        h = None if _data(guard) else self.half(guard)
        if h is None or variables(h.rest) != {name}:
            return False
        return bounds.count_of(h, name, self.g.loop, self.g.dims[name].capacity, self.end) is not None

    def _move(self, name: str, by: Expr) -> None:
        """All operations with `name + by` for the dim; as they were where one of them asks for the step itself."""
        ops = []
        for o in self.g.ops:
            body, empty, *guards = (self._moved(e, name, by) for e in (o.body, o.empty, *o.guards))
            known = tuple(g for g in guards if g is not None)
            if body is None or empty is None or len(known) < len(guards) or o.when is not None:
                return
            ops.append(replace(o, body=body, empty=empty, guards=known))
        self.g.ops[:], self.moved = ops, True

    def _moved(self, e: Expr, name: str, by: Expr) -> Expr | None:
        if not variables(e) & {name, self.g.loop} or (isinstance(e, Access) and e.tensor in self.home):
            return e
        if isinstance(e, Call) and any(isinstance(n, Access) and n.tensor in self.home for n in walk(e)):
            parts = [self._moved(k, name, by) for k in children(e)]
            known = tuple(p for p in parts if p is not None)
            return rebuild(e, known) if len(known) == len(parts) else None
        step, dim, size = Var(self.g.loop), Var(name), self.g.dims[name].capacity
        other = substitute(e, {step: call("add", step, _ANY), dim: call("sub", dim, call("mul", _ANY, size))})
        if _ANY.name in variables(_simpler(other)):
            return None  # it is a function of more than `step * size + dim`
        return _simpler(substitute(e, {dim: call("add", dim, by)}))


def _data(e: Expr) -> bool:
    return any(isinstance(n, Access) for n in walk(e))


def _simpler(e: Expr) -> Expr:
    def index(n: Expr) -> Expr:
        if isinstance(n, Access):
            return Access(n.tensor, tuple(simplify(i, index=True) for i in n.index))
        return n

    return simplify(transform(e, index))
