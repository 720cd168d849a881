"""What points hold that a guard excludes, by the laws of `ir.ops`, and when a whole loop step does nothing."""

from __future__ import annotations

import math
import random

from memcomp.codegen.lower_ops import LOOP, PRE, GroupOps, Op
from memcomp.ir.expr import Access, Call, Const, Expr
from memcomp.ir.laws import value
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.point import at_point


class Fills:
    """Known values of tiles at excluded points, and tiles that never hold -inf.

    finite: whether 0 times what is not known counts as 0.
    """

    def __init__(self, finite: bool = True) -> None:
        self.finite = finite
        self.held: dict[str, tuple[frozenset[Expr], float]] = {}
        self.bounded: set[str] = set()

    def at(self, e: Expr, guards: frozenset[Expr]) -> float | None:
        """The value of `e` at points that `guards` exclude, where it is one known number (by the laws of `ir.ops`)."""
        if isinstance(e, Const):
            return float(e.value)
        if isinstance(e, Access):
            held = self.held.get(e.tensor)
            return held[1] if held is not None and held[0] == guards else None
        if not isinstance(e, Call):
            return None
        if e.op == "at":
            return self.at(e.args[0], guards)
        v = [self.at(a, guards) for a in e.args]
        numbers = [x for x in v if x is not None]
        if len(numbers) == len(v):
            known = value(OPS[e.op], *numbers)
            return None if math.isnan(known) else known
        if e.op == "mul" and 0.0 in v and self.finite:
            return 0.0  # policy: excluded points of loaded tiles are finite
        if e.op == "max" and math.inf in v or e.op == "min" and -math.inf in v:
            return next(x for x in v if x is not None and math.isinf(x))
        if e.op == "sub" and v[0] == -math.inf and self.never_low(e.args[1]):
            return -math.inf
        if e.op == "where" and v[1] is not None and v[1] == v[2]:
            return v[1]
        return None

    def never_low(self, e: Expr) -> bool:
        """Is the value never -inf (for inputs that are not +inf or NaN)?"""
        if isinstance(e, Const):
            return e.value > -math.inf
        if isinstance(e, Access):
            return e.tensor in self.bounded
        if not isinstance(e, Call):
            return True
        if OPS[e.op].range[0] > -math.inf:
            return True
        if e.op == "max":
            return any(self.never_low(a) for a in e.args)
        if e.op == "where":
            test, yes, no = e.args
            if isinstance(test, Call) and test.op == "eq" and Const(-math.inf) in test.args and no in test.args:
                return self.never_low(yes)
            if isinstance(test, Call) and test.op in ("gt", "ne") and test.args == (yes, Const(-math.inf)):
                return self.never_low(no)
            return self.never_low(yes) and self.never_low(no)
        return False


def idle(g: GroupOps, joins: list[Op]) -> bool:
    """Does a step in which the reductions of `joins` find no point leave every carried tile as it is?

    Decided by evaluating the loop's operations at one point, with the carried tiles at their initial values and at
    random ones: the updates are closed forms in them, so equality there is equality (Schwartz-Zippel, up to chance).
    Nothing may leave the loop from inside it.
    """
    if g.each_step or any(o.target in g.stores and o.target not in g.carried for o in g.ops if o.phase == LOOP):
        return False
    start = {o.target: o.body for o in g.ops if o.phase == PRE and o.target in g.carried}
    joined = {id(o) for o in joins}
    rng = random.Random(0)

    def choose() -> float:
        return rng.uniform(0.5, 2.0)

    for trial in range(4):
        env = {n: choose() if trial or not isinstance(x := start.get(n), Const) else float(x.value) for n in g.carried}
        before = dict(env)
        for o in (o for o in g.ops if o.phase == LOOP and o.when is None):  # the others move what was summed elsewhere
            if o.twin:
                if o.target not in g.carried:
                    env[o.target] = choose()
            elif id(o) in joined:
                if o.place and not o.accumulate:
                    return False  # its places are those of points
                if not o.accumulate:
                    env[o.target] = MONOIDS[o.monoid].identity
            elif o.monoid:
                if o.accumulate or o.target in g.carried:
                    return False
                env[o.target] = choose()
            else:
                env[o.target] = at_point(o.body, env, choose)
        if any(not (env[n] == before[n] or abs(env[n] - before[n]) <= 1e-12 * abs(before[n])) for n in g.carried):
            return False
    return True
