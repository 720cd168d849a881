"""Closes knobs: every open knob of a program gets one of its choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

from memcomp.ir.cascade import Knob, Rank
from memcomp.ir.errors import OptionError, Refusal
from memcomp.ir.expr import Const, Expr
from memcomp.ir.program import Group, Program, knobs

CANDIDATES = 256


def assign(program: Program, values: Mapping[str, int]) -> Program:
    """The program with the knobs named in `values` closed; the others stay open.

    Raises OptionError for a value that is not among a knob's choices.
    """
    known = {k.name: k for k in knobs(program)}
    for name, value in values.items():
        if name in known and value not in known[name].choices:
            raise OptionError(f"knob {name} has no choice {value}",
                              hint=f"choices: {', '.join(map(str, known[name].choices))}")

    def close(size: Expr | Knob | None) -> Expr | Knob | None:
        return Const(values[size.name]) if isinstance(size, Knob) and size.name in values else size

    def rank(r: Rank) -> Rank:
        return replace(r, extent=close(r.extent))

    def group(g: Group) -> Group:
        return replace(g, partition=tuple((n, close(s)) for n, s in g.partition))  # type: ignore[misc]

    cascade = replace(program.cascade, ranks=tuple(map(rank, program.cascade.ranks)))
    return replace(program, cascade=cascade,
                   mapping=replace(program.mapping, groups=tuple(map(group, program.mapping.groups))))


def close_knobs(program: Program, sizes: Mapping[str, int], *, tune: str = "off",
                strain: Callable[[Program], float] | None = None) -> Program:
    """Close every knob; "off" takes the candidate that the cost model says is fastest.

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
        return program
    count = math.prod(len(k.choices) for k in open_knobs)
    if count == 0 or count > CANDIDATES:
        raise Refusal(f"{count} candidates for the knobs of {program.name}",
                      hint=f"between 1 and {CANDIDATES} are searched")
    if tune != "off":
        raise OptionError(f"tune={tune!r} is not known", hint="known: off")
    machine = target(program.target)

    def rating(choice: tuple[int, ...]) -> tuple[float, float, float, float, int]:
        closed = assign(program, dict(zip((k.name for k in open_knobs), choice, strict=True)))
        off_middle = sum(abs(k.choices.index(c) - len(k.choices) // 2) for k, c in zip(open_knobs, choice, strict=True))
        spent = cost(closed, dict(sizes), machine)
        return spent.seconds, spent.traffic, spent.again, _idle(closed, sizes), off_middle

    candidates = product(*(k.choices for k in open_knobs))
    ranked = [min(candidates, key=rating)] if strain is None else sorted(candidates, key=rating)
    best, least = program, math.inf
    for choice in ranked:
        closed = assign(program, dict(zip((k.name for k in open_knobs), choice, strict=True)))
        found = strain(closed) if strain is not None else 0.0
        if best is program or found < least:
            best, least = closed, found
        if not least:
            break
    return best


def _idle(program: Program, sizes: Mapping[str, int]) -> float:
    """How many times more points the tiles have than the ranks that are shorter than theirs."""
    from memcomp.ir.counts import Sizes

    extent = Sizes(program.cascade, sizes)
    cut = ((extent(rank), size.value) for g in program.mapping.groups for rank, size in g.partition
           if isinstance(size, Const))
    return math.prod(max(size / n, 1.0) for n, size in cut if n)
