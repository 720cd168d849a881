"""What integers an expression can be, told by dtypes, masks and shifts."""

from __future__ import annotations

from collections.abc import Callable

from memcomp.ir.expr import Access, Call, Const, Expr

_STORED = {"u8": (0, 255), "i8": (-128, 127), "bool": (0, 1)}


def span(e: Expr, dtype: Callable[[str], str]) -> tuple[int, int] | None:
    """Least and greatest value of an expression of integers of few bits; None where that is not known.

    dtype: of a tensor, by its name.
    """
    if isinstance(e, Const):
        return (int(e.value), int(e.value)) if isinstance(e.value, int) else None
    if isinstance(e, Access):
        return _STORED.get(dtype(e.tensor))
    if not isinstance(e, Call):
        return None
    last = e.args[-1]
    if e.op in ("bitand", "mod") and isinstance(last, Const) and last.value > 0:
        return 0, int(last.value) - (e.op == "mod")
    first = span(e.args[0], dtype)
    if first is None:
        return None
    if e.op in ("real", "int"):
        return first
    if e.op == "neg":
        return -first[1], -first[0]
    second = span(last, dtype)
    if e.op == "shr" and first[0] >= 0:
        return 0, first[1] >> max(second[0], 0) if second is not None else first[1]
    if e.op not in ("add", "sub") or second is None:
        return None
    (a, b), (x, y) = first, second
    return (a + x, b + y) if e.op == "add" else (a - y, b - x)
