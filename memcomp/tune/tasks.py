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
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from memcomp.cache.entry import Choice

if TYPE_CHECKING:
    from memcomp.pipeline import Compiled, Tunable
    from memcomp.workers import Answer, Job

TERMS = 1 << 27       # of the program, as written, that are computed in float64 to check a candidate
GROWTH = 4 << 30      # bytes that a candidate may hold more than the process had before it
WARM, FEW = 2, 3      # calls before the first that counts, and how many try a candidate
SHORT = 2e-3          # seconds that one measurement lasts at least


@dataclass(frozen=True, slots=True)
class Given:
    """What is tuned: a program's text, options, and extents of its symbolic ranks."""

    text: str
    options: Mapping[str, Any]
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate that ran.  seconds: the least of a few calls; error over bound as `oracle.Report` has them."""

    seconds: float
    error: float
    bound: float


class Tasks:
    """Does jobs for one program.  What is compiled stays compiled as long as the process lives."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self._kernels: dict[str, Compiled] = {}

    def answer(self, job: Job) -> Answer:
        from memcomp.workers import answered

        return answered(lambda: getattr(self, job.do)(*job.given))

    @cached_property
    def tunable(self) -> Tunable:
        from memcomp.config import config
        from memcomp.ir.text import parse
        from memcomp.pipeline import tunable

        return tunable(parse(self.given.text), config=config(self.given.options), sizes=self.given.sizes)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        from memcomp.pipeline import fixed, shape_sizes

        read = self.tunable.read
        return {**fixed(read), **shape_sizes(read, read, self.given.sizes)}

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def attempt(self, choice: Choice) -> Answer:
        """Compile a candidate, compare it with float64, time it shortly."""
        from memcomp.workers import OK, WRONG, Answer

        _limit()
        kernel = self._kernel(choice)
        report = self._report(kernel)
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
        at = str(choice)
        if at not in self._kernels:
            self._kernels[at] = self.tunable.compiled(choice)
        return self._kernels[at]

    @cached_property
    def _data(self) -> tuple[list[Any], dict[str, int]]:
        from memcomp.oracle import random_inputs

        return random_inputs(self.tunable.read, self._sizes), self._sizes

    @cached_property
    def _reference(self) -> Any:
        """What the program means on data of as many terms as float64 can be asked for."""
        from memcomp.ir.counts import Sizes
        from memcomp.oracle import Reference

        program, sizes = self.tunable.read, dict(self._sizes)
        symbols = [r.name for r in program.cascade.ranks if r.extent is None]

        def terms() -> int:
            n = Sizes(program.cascade, {s: sizes[s] for s in symbols})
            return sum(n.points(e.space()) for e in program.cascade.einsums)

        while terms() > TERMS and (longest := max(symbols, key=lambda s: sizes[s], default="")) and sizes[longest] > 1:
            sizes[longest] = sizes[longest] // 2 + 1 if sizes[longest] > 3 else 1
        return Reference(program, {**sizes, **_evaluated(program, sizes)})

    def _report(self, kernel: Compiled) -> Any:
        return self._reference.report(kernel, self.tunable.config)

    def _call(self, kernel: Compiled) -> Callable[[], object]:
        from memcomp.oracle import caller

        tensors, sizes = self._data
        return caller(self.tunable.read, kernel, tensors, sizes, self.tunable.config)


def _evaluated(program: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Extents that follow from others."""
    from memcomp.ir.cascade import extent_of

    found = ((r.name, extent_of(program.cascade, r.name)) for r in program.cascade.ranks if r.extent is not None)
    return {name: x for name, x in found if x is not None}


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
        resource.setrlimit(resource.RLIMIT_DATA, (now + GROWTH, resource.getrlimit(resource.RLIMIT_DATA)[1]))
