"""What the tuner asks of a process: to try a candidate, and to race those that did well.

Answers are plain values: they cross to another process.  A candidate is compared with the program's meaning in float64
before it is timed: on the data that it is timed on where these are few, else on fewer rows of them.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from memcomp.cache.entry import Choice

if TYPE_CHECKING:
    from memcomp.ir.ops import Op
    from memcomp.ir.program import Program
    from memcomp.oracle import Reference
    from memcomp.pipeline import Compiled, Tunable
    from memcomp.workers import Answer, Job

TERMS = 1 << 27       # of the program, as written, that are computed in float64 to check a candidate
GROWTH = 4 << 30      # bytes that a candidate may hold more than the process had before it
WARM, FEW = 2, 3      # calls before the first that counts, and how many try a candidate
FEWEST = 16           # points of a rank that is cut short for that
SHORT = 2e-3          # seconds that one measurement lasts at least


@dataclass(frozen=True, slots=True)
class Given:
    """What is tuned: a program's text, options, extents of its symbolic ranks, and the registered operators that it
    uses, which another process does not know."""

    text: str
    options: tuple[tuple[str, Any], ...]
    sizes: tuple[tuple[str, int], ...]
    rows: tuple[Op, ...] = ()


def rows(program: Program) -> tuple[Op, ...]:
    """The registered operators of a program, those that others are made of first."""
    from memcomp.ir.ops import OPS
    from memcomp.ir.register import definitions

    names = {text.split()[1] for text in definitions(program)}
    return tuple(replace(row, numpy=float) for n, row in OPS.items() if n in names)  # made anew of the definition


class Tasks:
    """Does jobs for one program after another."""

    def __init__(self) -> None:
        self._work: _Work | None = None

    def answer(self, job: Job) -> Answer:
        from memcomp.workers import answered

        given, *rest = job.given
        if self._work is None or self._work.given != given:
            self._work = None
            self._work = _Work(given)
        work = self._work
        return answered(lambda: getattr(work, job.do)(*rest))


class _Work:
    """For one program.  What is compiled stays compiled."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self._kernels: dict[Choice, Compiled] = {}

    @cached_property
    def tunable(self) -> Tunable:
        from memcomp.config import config
        from memcomp.ir.register import register
        from memcomp.ir.text import parse
        from memcomp.pipeline import tunable

        for row in self.given.rows:
            register(row)
        return tunable(parse(self.given.text), config=config(dict(self.given.options)), sizes=dict(self.given.sizes))

    def begin(self) -> Answer:
        """What all candidates need."""
        from memcomp.workers import OK, Answer

        _ = self._reference, self._inputs
        return Answer(OK)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def attempt(self, choice: Choice) -> Answer:
        """Compile a candidate, compare it with float64, time it shortly."""
        from memcomp.workers import OK, WRONG, Answer

        _limit()
        kernel = self._kernel(choice)
        report = self._reference.report(kernel, self.tunable.config)
        worst = report.worst
        if not report.ok:
            return Answer(WRONG, f"error {worst.error.max:.2e} exceeds {worst.tolerance.max:.2e} in {worst.name}")
        call = self._call(kernel)
        for _ in range(WARM):
            call()
        least = min(_once(call, 1) for _ in range(FEW))
        return Answer(OK, told={"seconds": least, "error": worst.error.max, "bound": worst.tolerance.max})

    def race(self, choices: Sequence[Choice], seconds: float) -> Answer:
        """Candidates in turn, for about as long; medians and spreads by place in `choices`."""
        from memcomp.workers import OK, Answer

        calls = [self._call(self._kernel(c)) for c in choices]
        for call in calls:
            call()
        counts = [max(1, math.ceil(SHORT / max(_once(call, 1), 1e-7))) for call in calls]
        taken: list[list[float]] = [[] for _ in calls]
        until = time.monotonic() + seconds
        while len(taken[0]) < FEW or time.monotonic() < until:
            for times, call, n in zip(taken, calls, counts, strict=True):
                times.append(_once(call, n) / n)
        quartiles = [statistics.quantiles(t, n=4) for t in taken]
        return Answer(OK, told={"rounds": len(taken[0]), "medians": [q[1] for q in quartiles],
                                "spreads": [(q[2] - q[0]) / q[1] for q in quartiles]})

    # -- how -----------------------------------------------------------------------------------------------------------

    def _kernel(self, choice: Choice) -> Compiled:
        if choice not in self._kernels:
            self._kernels[choice] = self.tunable.compiled(choice)
        return self._kernels[choice]

    @cached_property
    def _reference(self) -> Reference:
        """What the program means on data of as many terms as float64 can be asked for: of the longest ranks, parts."""
        from memcomp.ir.counts import Sizes
        from memcomp.oracle import Reference

        program, sizes = self.tunable.general, dict(self.tunable.extents)

        def terms() -> int:
            n = Sizes(program.cascade, sizes)
            return sum(n.points(e.space()) for e in program.cascade.einsums)

        while sizes and terms() > TERMS and max(sizes.values()) > FEWEST:
            longest = max(sizes, key=lambda r: sizes[r])
            sizes[longest] = sizes[longest] // 2 + 1
        return Reference(program, _all(program, sizes))

    def _call(self, kernel: Compiled) -> Callable[[], object]:
        from memcomp.oracle import caller

        t = self.tunable
        return caller(t.general, kernel, self._inputs, _all(t.general, t.extents), t.config)

    @cached_property
    def _inputs(self) -> list[Any]:
        from memcomp.oracle import random_inputs

        return random_inputs(self.tunable.general, _all(self.tunable.general, self.tunable.extents))


def _all(program: Program, symbols: Mapping[str, int]) -> dict[str, int]:
    """Extents of all ranks that have one of their own."""
    from memcomp.sizes import fixed

    return {**fixed(program), **symbols}


def _once(call: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - begin


def _limit() -> None:
    """A candidate that wants more memory than it may have fails by itself, not the machine."""
    import resource

    pages = int(open("/proc/self/statm").read().split()[5]) if os.path.exists("/proc/self/statm") else 0
    now = pages * os.sysconf("SC_PAGE_SIZE")
    if now:
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        least = now + GROWTH if most == resource.RLIM_INFINITY else min(now + GROWTH, most)
        resource.setrlimit(resource.RLIMIT_DATA, (least, most))
