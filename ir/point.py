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


def _value(e: Expr, known: dict[str, float], choose: Callable[[], float], whole: bool = False) -> float:
    """whole: an operator on integers asks; what it reads is one, too large to vanish in a shift."""
    if isinstance(e, Const):
        return float(e.value)
    if isinstance(e, Call):
        row = OPS[e.op]
        whole = (row.result == "int" and row.name != "int") or (whole and row.result == "same")
        kind = np.int64 if whole else np.float64
        return float(row.numpy(*(kind(_value(a, known, choose, whole)) for a in e.args)))
    name = e.tensor if isinstance(e, Access) else str(e)
    x = known.setdefault(name, float(int(choose() * 2.0**24)) if whole else choose())
    return float(int(x)) if whole else x
