"""Which side of a reduction an expression stands on, and the refusal that names a missing law."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from memcomp.ir.expr import Access, Call, Expr, Var, walk
from memcomp.ir.text import show_expr

Side = Literal["neutral", "carried", "late", "mixed"]


class NoLaw(Exception):
    """No law in the table moves the reduction through `op`; `why` says which law is missing."""

    def __init__(self, op: str, expr: Expr, why: str) -> None:
        self.op, self.expr, self.why = op, expr, why
        what = short(expr) if isinstance(expr, Call) and expr.op == op else f"{op}({short(expr)})"
        super().__init__(f"no law for {what}: {why}")


def short(e: Expr, limit: int = 60) -> str:
    text = show_expr(e)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(slots=True)
class Sides:
    """carried: variables that the reduction runs over (the a-side carries one).  late: is this tensor a value that
    reductions over the stream rank have to give first (the c-side)?"""

    carried: Collection[str]
    late: Callable[[str], bool]
    _seen: dict[Expr, Side] = field(default_factory=dict)

    def __call__(self, e: Expr) -> Side:
        known = self._seen.get(e)
        if known is None:
            a = c = False
            for n in walk(e):
                a = a or (isinstance(n, Var) and n.name in self.carried)
                c = c or (isinstance(n, Access) and self.late(n.tensor))
            known = self._seen[e] = "mixed" if a and c else "carried" if a else "late" if c else "neutral"
        return known

    def free(self, e: Expr) -> bool:
        """Constant along the reduction."""
        return self(e) in ("neutral", "late")
