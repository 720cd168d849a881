"""States of one streaming stage: what is accumulated along the rank, and in which frame.

A sum state is `sum a-factors * prod d**j * exp(lambda d + bounded)` over the points of its guard; moving its frame from
rho to rho' with delta = rho - rho' is T'_j = e^(lambda delta) sum_l binom(j, l) delta^(j-l) T_l, so states are closed
downward in every j of a gauge that moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from typing import TypeAlias

from memcomp.ir.expr import Access, Call, Const, Expr
from memcomp.passes.derive.terms import Powers, raised


@dataclass(frozen=True, slots=True)
class OrderState:
    """A reduction by any monoid but sum of a carried body; or, where it is `whole`, of integers to an integer by any
    monoid, whose values are integers and never a reference."""

    name: str
    monoid: str
    body: Expr
    guard: tuple[Expr, ...]
    over: tuple[str, ...]
    vars: tuple[str, ...]
    whole: bool = False


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


@dataclass(frozen=True, slots=True)
class PlaceState:
    """The greatest values (or value) of a body and their places; order: the variable of the order rank of a top-k."""

    name: str
    place: str
    monoid: str
    body: Expr
    guard: tuple[Expr, ...]
    over: tuple[str, ...]
    vars: tuple[str, ...]
    order: str | None


State: TypeAlias = OrderState | SumState | PlaceState


def moved(state: SumState, states: Sequence[SumState], read: Callable[[SumState], Access],
          delta: Callable[[str], Expr | None]) -> Expr:
    """sum_l binom(j, l) delta**(j - l) T_l over the gauges that move: the polynomial part of a change of frame."""
    moves = [(g, j, d) for g, j in state.ds if (d := delta(g)) is not None]
    out: Expr | None = None
    for ls in combinations(*(range(j, -1, -1) for _, j, _ in moves)):
        lower = dict(state.ds)
        weight: Expr | None = None
        for (g, j, d), k in zip(moves, ls, strict=True):
            lower[g] = k
            for n in (Const(float(math.comb(j, k))),) if math.comb(j, k) != 1 else ():
                weight = n if weight is None else Call("mul", (weight, n))
            if j > k:
                step = raised(d, j - k)
                weight = step if weight is None else Call("mul", (weight, step))
        source: Expr = read(_like(state, states, {(g, k) for g, k in lower.items() if k}))
        term = source if weight is None else Call("mul", (source, weight))
        out = term if out is None else Call("add", (out, term))
    assert out is not None, "there is at least the state itself"
    return out


def _like(state: SumState, states: Sequence[SumState], ds: set[tuple[str, int]]) -> SumState:
    """The state that differs in the powers of its differences only."""
    return next(s for s in states if (s.a, s.es, s.bounded, s.guard, s.over) ==
                (state.a, state.es, state.bounded, state.guard, state.over) and set(s.ds) == ds
                and set(s.vars) <= set(state.vars))


def finite(rho: Expr, kind: str) -> Expr:
    """The reference used in tiles and frame changes: 0 while nothing was seen (any reference is legal)."""
    return Call("where", (Call("eq", (rho, Const(math.inf if kind == "min" else -math.inf))), Const(0.0), rho))
