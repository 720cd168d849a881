"""Forms of one program between which the algebra is indifferent and the machine is not."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import ceil
from typing import Any

from memcomp.ir.program import Program

TIE = 0.05   # by so much the model must see a gain before a form of more kernels is taken
IDLE = 0.05  # of the cores, on average, while tasks run: below it shares of a rank gain nothing


def alternatives(closed: Program, sizes: Mapping[str, int]) -> tuple[str, dict[str, dict[str, Any]]]:
    """What a closed program is, in words, and other forms of it: words -> options of `reduce_passes`.

    Powers under an exponential weight are measured from their weighted mean, or wait for another pass.  A loop of fewer
    tasks than the machine has cores (one query over a long cache) runs as a whole, or in shares whose states are merged
    by a kernel of their own.
    """
    from memcomp.ir.cost import steps as steps_of
    from memcomp.ir.cost import tasks
    from memcomp.ir.target import target
    from memcomp.passes.reduce_passes import weighted_frames

    threads = target(closed.target).threads
    ways: list[dict[str, dict[str, Any]]] = []
    if weighted_frames(closed):
        ways.append({"a weighted frame": {}, "another pass": {"weighted": False}})
    counts = {g: tasks(closed, g, sizes) for g in closed.mapping.groups if g.loop_order}
    if few := {g: n for g, n in counts.items() if n and (-n % threads) / (n + -n % threads) > IDLE}:
        # each task's share of the machine, twice that (they end at different times), or one for every core; a share
        # has a step at least
        steps = max(steps_of(closed, g, sizes) for g in few)
        shares = {ceil(rounds * threads / n) for n in few.values() for rounds in (1, 2)} | {min(threads, steps)}
        most = min(threads, steps)
        ways.append({"one share": {}, **{f"{n} shares": {"splits": n} for n in sorted(shares) if 1 < n <= most}})
    forms: dict[str, dict[str, Any]] = {
        " in ".join(words): {k: v for way, word in zip(ways, words, strict=True) for k, v in way[word].items()}
        for words in product(*ways)
    }
    first, *others = forms
    return first, {what: forms[what] for what in others}


def seconds(closed: Program, sizes: Mapping[str, int]) -> float:
    """Of a call, by the cost model."""
    from memcomp.ir.cost import cost
    from memcomp.ir.target import target

    return cost(closed, sizes, target(closed.target)).seconds
