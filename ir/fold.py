"""Operators on constants, and identities that hold exactly for every real number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memcomp.ir.expr import Call, Const, Expr
from memcomp.ir.ops import OPS

INTEGER: Mapping[str, Callable[..., int | bool]] = {  # operators on Python's ints; int and bool stay what they are
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "max": max, "min": min, "abs": abs, "square": lambda a: a * a, "relu": lambda a: max(a, 0),
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "ceildiv": lambda a, b: -(-a // b),
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "int": lambda a: a,
}


def folded(e: Call) -> Expr:
    """The value of an operator on constants; int stays int, real stays real."""
    values: list[Any] = [a.value for a in e.args if isinstance(a, Const)]
    row = OPS[e.op]
    if e.op == "where":
        return e.args[1] if values[0] else e.args[2]
    if e.op in ("floordiv", "mod", "ceildiv") and values[1] == 0:
        return e
    if e.op in INTEGER and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        value = INTEGER[e.op](*values)
        return Const(value) if -(2**63) <= value < 2**63 else e
    if row.result == "real":
        values = [float(v) for v in values]
    with np.errstate(all="ignore"):
        try:
            out = row.numpy(*values)
        except (TypeError, OverflowError, ValueError):  # e.g. a shift of a real: left for verify to name
            return e
    return Const(np.asarray(out).item())


def _is(e: Expr, value: float) -> bool:
    return isinstance(e, Const) and not isinstance(e.value, bool) and e.value == value


def reduced(e: Call, kind: Callable[[Expr], str]) -> Expr:
    """Identities that hold exactly for every real, infinity and NaN (x + 0 is x for -0.0 too, up to its sign)."""
    op, args = e.op, e.args

    def keeps(kept: Expr, dropped: Expr) -> bool:
        """Dropping the neutral constant must not turn a real into an integer."""
        return kind(kept) == "real" or (kind(kept) == "any") or kind(dropped) == "int" == kind(kept)

    if len(args) == 2:
        a, b = args
        right = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1, "max": -math.inf, "min": math.inf}.get(op)
        if right is not None and _is(b, right) and keeps(a, b):
            return a
        if op in ("add", "mul", "max", "min") and right is not None and _is(a, right) and keeps(b, a):
            return b
        if op in ("max", "min") and a == b:
            return a
    if op == "neg" and isinstance(args[0], Call) and args[0].op == "neg":
        return args[0].args[0]
    if op == "real" and kind(args[0]) == "real":
        return args[0]
    return e
