"""States of one streaming stage: what is accumulated along the rank, and in which frame.

A sum state is `sum a-factors * prod d**j * exp(lambda d + bounded)` over the points of its guard; moving its frame from
rho to rho' with delta = rho - rho' is T'_j = e^(lambda delta) sum_l binom(j, l) delta^(j-l) T_l, so states are closed
downward in every j of a gauge that moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from memcomp.ir.expr import Call, Const, Expr
from memcomp.passes.derive.terms import Powers


@dataclass(frozen=True, slots=True)
class OrderState:
    """A reduction by any monoid but sum of a carried body."""

    name: str
    monoid: str
    body: Expr
    guard: tuple[Expr, ...]
    over: tuple[str, ...]
    vars: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SumState:
    """sum of a-factors, gauge differences to powers, exponentials of gauge differences, bounded exponentials."""

    name: str
    a: Powers
    ds: tuple[tuple[str, int], ...]
    es: tuple[tuple[str, float], ...]
    bounded: Powers
    guard: tuple[Expr, ...]
    over: tuple[str, ...]
    vars: tuple[str, ...]

    def tag(self) -> object:
        return (frozenset(self.a), frozenset(self.ds), frozenset(self.es), frozenset(self.bounded),
                frozenset(self.guard), frozenset(self.over))


State: TypeAlias = OrderState | SumState


def finite(rho: Expr, kind: str) -> Expr:
    """The reference used in tiles and frame changes: 0 while nothing was seen (any reference is legal)."""
    return Call("where", (Call("eq", (rho, Const(math.inf if kind == "min" else -math.inf))), Const(0.0), rho))
