"""An expression at one point, in float64: for questions that one evaluation answers up to chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memcomp.ir.expr import Access, Call, Const, Expr
from memcomp.ir.ops import OPS


def at_point(e: Expr, known: dict[str, float], choose: Callable[[], float]) -> float:
    """The value with `known` tensors; what else it reads, and every variable and size, is chosen once and kept in
    `known` under its name."""
    with np.errstate(all="ignore"):
        return _value(e, known, choose)


def _value(e: Expr, known: dict[str, float], choose: Callable[[], float]) -> float:
    if isinstance(e, Const):
        return float(e.value)
    if isinstance(e, Call):
        return float(OPS[e.op].numpy(*(np.float64(_value(a, known, choose)) for a in e.args)))
    name = e.tensor if isinstance(e, Access) else str(e)
    return known.setdefault(name, choose())
