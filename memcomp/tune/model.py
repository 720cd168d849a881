"""Closes knobs: every open knob of a program gets one of its choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const
from memcomp.ir.program import Program, close, knobs

CANDIDATES = 256  # that are all looked at
SWEEPS = 4


def close_knobs(program: Program, sizes: Mapping[str, int]) -> Program:
    """Close every knob as `modelled` says."""
    return close(program, modelled(program, sizes))


def modelled(program: Program, sizes: Mapping[str, int],
             strain: Callable[[Program], float] | None = None) -> dict[str, int]:
    """A value for every open knob: of the candidate that the cost model says is fastest.

    Beyond `CANDIDATES` not all are looked at: one knob after another, until no change of one is better.

    strain: 0 for what fits the machine, more for what fits it badly, infinity for what does not: the fastest candidate
    of the least strain wins.

    sizes: an extent for each symbolic rank; it only ranks the candidates, the result holds for all extents.
    Ties (the model sees no difference in time) go to less traffic with memory, then to fewer operations that several
    tasks make anew, then to tiles that are not longer than their rank, then to the middle choice of each knob: the ends
    of a list are its extremes.
    """
    from memcomp.ir.cost import cost
    from memcomp.ir.target import target

    open_knobs = knobs(program)
    if not open_knobs:
        return {}
    count = math.prod(len(k.choices) for k in open_knobs)
    if count == 0:
        raise Refusal(f"a knob of {program.name} has no choice")
    machine = target(program.target)

    def named(choice: tuple[int, ...]) -> dict[str, int]:
        return dict(zip((k.name for k in open_knobs), choice, strict=True))

    def rating(choice: tuple[int, ...]) -> tuple[float, float, float, float, int]:
        closed = close(program, named(choice))
        off_middle = sum(abs(k.choices.index(c) - len(k.choices) // 2) for k, c in zip(open_knobs, choice, strict=True))
        spent = cost(closed, dict(sizes), machine)
        return spent.seconds, spent.traffic, spent.again, _idle(closed, sizes), off_middle

    if count > CANDIDATES:
        return named(_descended([k.choices for k in open_knobs], rating,
                                lambda x: strain(close(program, named(x))) if strain else 0.0))
    candidates = product(*(k.choices for k in open_knobs))
    ranked = [min(candidates, key=rating)] if strain is None else sorted(candidates, key=rating)
    best, least = ranked[0], math.inf
    if strain is not None:
        for choice in ranked:
            found = strain(close(program, named(choice)))
            if found < least:
                best, least = choice, found
            if not least:
                break
    return named(best)


def _descended(choices: Sequence[tuple[int, ...]], rating: Callable[[tuple[int, ...]], tuple[float, ...]],
               strain: Callable[[tuple[int, ...]], float] = lambda choice: 0.0) -> tuple[int, ...]:
    """Where no change of one knob is better: most knobs belong to one kernel, and kernels add up.  Begins with the
    smallest tiles, which fit if any do.  The strain, which is costly, is asked only where it decides."""
    best = tuple(min(x) for x in choices)
    least, seen = (strain(best), rating(best)), {best}
    for _ in range(SWEEPS):
        before = best
        for n, values in enumerate(choices):
            for value in values:
                other = (*best[:n], value, *best[n + 1:])
                if other in seen:
                    continue
                seen.add(other)
                rated = rating(other)
                if (least[0] or rated < least[1]) and (found := (strain(other), rated)) < least:
                    best, least = other, found
        if best == before:
            break
    return best


def _idle(program: Program, sizes: Mapping[str, int]) -> float:
    """How many times more points the tiles have than the ranks that are shorter than theirs."""
    from memcomp.ir.counts import Sizes

    extent = Sizes(program.cascade, sizes)
    cut = ((extent(rank), size.value) for g in program.mapping.groups for rank, size in g.partition
           if isinstance(size, Const))
    return math.prod(max(size / n, 1.0) for n, size in cut if n)
