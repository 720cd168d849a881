"""Time on arrays of processing elements: operators of each statement, bound to a unit, phase by phase.

A statement takes, on a unit of n elements,

    points that its guards let take part * cycles of its operators at one point / n

and a reduction ends in the sum of products where it can: `sum{e} Q*K` is one "mac" a point.  Units of one phase run
side by side, statements of one unit follow one another, phases follow one another:

    cycles of a group = sum over phases of (maximum over units of (sum over their statements))

A reduction that drains passes through the rows of its array, a row a cycle, and nothing else runs: its cycles times the
rows.  Tiles are taken as full: the last one, cut short by an extent, is not charged for the elements it leaves idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from memcomp.ir.cascade import Einsum
from memcomp.ir.counts import FREE
from memcomp.ir.errors import Refusal, nearest
from memcomp.ir.expr import Access, Call, Expr, children, reads
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import Group, Phase
from memcomp.ir.target import Array, Target

# what an element has hardware for; the rest of the arithmetic operators run on the same adder, comparator, multiplier
HARDWARE = {"sub": "add", "min": "max", "relu": "max", "mul": "mac", "square": "mac"}


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """cycles: of the phase; busy: (unit, its cycles of work in it)."""

    group: str
    cycles: float
    busy: tuple[tuple[str, float], ...]
    drain: bool = False


def operators(e: Einsum) -> Counter[str]:
    """What hardware a statement needs at one point: operator -> how often.  Guards, indices and choices are free."""
    found = _operators(e.body)
    if e.reduce is not None:
        join = HARDWARE.get(MONOIDS[e.reduce.monoid].join, MONOIDS[e.reduce.monoid].join)
        product = isinstance(e.body, Call) and e.body.op in ("mul", "square")
        if not (join == "add" and product):  # else the product's own multiply-add takes the sum along
            found[join or e.reduce.monoid] += 1
    return found


def _operators(e: Expr) -> Counter[str]:
    found: Counter[str] = Counter()
    if isinstance(e, Access) or not reads(e):
        return found
    for k in children(e):
        found += _operators(k)
    if isinstance(e, Call) and e.op not in FREE:
        found[HARDWARE.get(e.op, e.op)] += 1
    return found


def cycles(e: Einsum, points: float, array: Array) -> float | None:
    """Cycles of a statement with so many points on an array; None where the array lacks an operator."""
    cost, needs = dict(array.cycles), operators(e)
    if needs.keys() - cost.keys():
        return None
    each = [cost[o] * n for o, n in needs.items()]
    at_once = max(each, default=0.0) if array.pipelined else sum(each)
    return at_once * points / array.elements


def schedule(group: Group, einsums: Sequence[tuple[Einsum, float]], target: Target) -> tuple[PhaseCost, ...]:
    """The phases of one group, of its statements and their points, with their cycles.

    Raises Refusal for a unit that is not there or cannot do its statement.
    """
    arrays = target.arrays
    out = []
    for phase in group.phases or _one_by_one(einsums, target):
        busy: dict[str, float] = {}
        for tensor, unit in phase.bind:
            if unit not in arrays:
                raise Refusal(f"{target.name} has no unit {unit!r}", hint=nearest(unit, arrays))
            for e, n in einsums:
                if e.names[0] == tensor:
                    busy[unit] = busy.get(unit, 0.0) + _bound(e, n, unit, target)
        if phase.drain:
            out.append(PhaseCost(group.name, max((n * arrays[u].rows for u, n in busy.items()), default=0.0), (), True))
        else:
            out.append(PhaseCost(group.name, max(busy.values(), default=0.0), tuple(busy.items())))
    return tuple(out)


def _bound(e: Einsum, points: float, unit: str, target: Target) -> float:
    found = cycles(e, points, target.arrays[unit])
    if found is None:
        lacks = sorted(operators(e).keys() - dict(target.arrays[unit].cycles).keys())
        raise Refusal(f"{e.names[0]}: the unit {unit!r} of {target.name} has no {', '.join(lacks)}",
                      hint="bind the statement to another unit")
    return found


def _one_by_one(einsums: Sequence[tuple[Einsum, float]], target: Target) -> tuple[Phase, ...]:
    """A phase for each tensor, on the unit that is done first."""
    phases = []
    for tensor in dict.fromkeys(e.names[0] for e, _ in einsums):
        mine = [(e, n) for e, n in einsums if e.names[0] == tensor]
        took = {u: [cycles(e, n, a) for e, n in mine] for u, a in target.arrays.items()}
        able = {u: sum(n for n in each if n is not None) for u, each in took.items() if None not in each}
        if not able:
            needs = sorted({o for e, _ in mine for o in operators(e)})
            raise Refusal(f"{tensor}: no unit of {target.name} has all of {', '.join(needs)}")
        phases.append(Phase(((tensor, min(able, key=lambda u: able[u])),)))
    return tuple(phases)
