"""What the tuner asks of a process: to check a candidate, to time it, and to race those that did well.

Answers are plain values: they cross to another process.  A candidate is compared with the program's meaning in float64
before it is timed: on the data that it is timed on where these are few, else on fewer rows of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from memcomp.cache.entry import Choice

if TYPE_CHECKING:
    from memcomp.bench.cuda import Loop, Machine
    from memcomp.config import Config
    from memcomp.ir.ops import Op
    from memcomp.ir.program import Program
    from memcomp.oracle import Reference
    from memcomp.pipeline import Compiled, Tunable
    from memcomp.workers import Answer, Job

TERMS = 1 << 27       # of the program, as written, that are computed in float64 to check a candidate
GROWTH = 4 << 30      # bytes that a candidate may hold more than the process had before it
WARM, FEW = 2, 3      # calls before the first that counts, and how many time a candidate shortly
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
        from memcomp.workers import FAILED, answered

        given, *rest = job.given
        if self._work is None or self._work.given != given:
            self._work = None
            self._work = _Work(given)
        work = self._work
        found = answered(lambda: getattr(work, job.do)(*rest))
        return replace(found, lost=found.state == FAILED and work.place != "cpu")  # a fault spoils a GPU's process


class _Work:
    """For one program.  What is compiled stays compiled."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self._kernels: dict[Choice, Compiled] = {}

    @cached_property
    def tunable(self) -> Tunable:
        from memcomp.ir.register import register
        from memcomp.ir.text import parse
        from memcomp.pipeline import tunable

        for row in self.given.rows:
            register(row)
        return tunable(parse(self.given.text), config=self._config, sizes=dict(self.given.sizes))

    @cached_property
    def _config(self) -> Config:
        from memcomp.config import config

        return config(dict(self.given.options))

    def begin(self) -> Answer:
        """What all candidates need."""
        from memcomp.workers import OK, Answer

        _ = self._reference, self._sets
        return Answer(OK)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def attempt(self, choice: Choice) -> Answer:
        """Compile a candidate, compare it with float64."""
        from memcomp.workers import OK, WRONG, Answer

        if self.place == "cpu":
            _limit()
        kernel = self._kernel(choice)
        report = self._reference.report(kernel, self.tunable.config)
        worst = report.worst
        if not report.ok:
            return Answer(WRONG, f"error {worst.error.max:.2e} exceeds {worst.tolerance.max:.2e} in {worst.name}")
        return Answer(OK, told={"error": worst.error.max, "bound": worst.tolerance.max})

    def time(self, choice: Choice) -> Answer:
        """The least of a few calls of a candidate."""
        from memcomp.workers import OK, Answer

        calls = self._calls(self._kernel(choice))
        for n in range(WARM):
            calls[n % len(calls)]()
        self._machine.wait()
        return Answer(OK, told={"seconds": min(self._machine.clock(calls[n % len(calls)]) for n in range(FEW))})

    def race(self, choices: Sequence[Choice], seconds: float) -> Answer:
        """Candidates in turn, for about as long; medians and spreads by place in `choices`."""
        from memcomp.bench.measure import Times
        from memcomp.workers import OK, Answer

        loops = [self._loop(self._kernel(c)) for c in choices]
        taken: list[list[float]] = [[] for _ in loops]
        until = time.monotonic() + seconds
        while len(taken[0]) < FEW or time.monotonic() < until:
            for times, loop in zip(taken, loops, strict=True):
                times.append(self._machine.clock(loop.run) / loop.calls)
        found = [Times.of(t) for t in taken]
        return Answer(OK, told={"rounds": len(taken[0]), "medians": [t.median for t in found],
                                "spreads": [t.spread for t in found]})

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

    @cached_property
    def place(self) -> str:
        """torch's name of where the tensors are."""
        from memcomp.backends import device_of

        return "cpu" if self._config.interpret else device_of(self._config)

    @cached_property
    def _machine(self) -> Machine:
        from memcomp.bench.cuda import Gpu, Rehearsal

        return Rehearsal() if self.place == "cpu" else Gpu()

    def _calls(self, kernel: Compiled) -> list[Callable[[], object]]:
        """A call of a kernel on each set of inputs."""
        from memcomp.oracle import caller

        t = self.tunable
        return [caller(t.general, kernel, x, _all(t.general, t.extents), t.config) for x in self._sets]

    def _loop(self, kernel: Compiled) -> Loop:
        """Calls of a kernel that take long enough to be timed at once."""
        from memcomp.bench.cuda import Loop

        calls = self._calls(kernel)
        for call in calls:
            call()
        if self.place != "cpu":
            return self._machine.loop(calls)
        (call,), count = calls, max(1, math.ceil(SHORT / max(self._machine.clock(calls[0]), 1e-7)))
        return Loop(lambda: [call() for _ in range(count)], count)

    @cached_property
    def _sets(self) -> list[list[Any]]:
        """Inputs where the kernel takes them: on a GPU so many that its second-level cache does not hold them all."""
        from memcomp.bench.cuda import copies
        from memcomp.oracle import random_inputs

        t = self.tunable
        first = [x.to(self.place) for x in random_inputs(t.general, _all(t.general, t.extents))]
        size = sum(x.numel() * x.element_size() for x in first)
        more = copies(size, self._machine.facts()["l2"]) - 1 if self.place != "cpu" else 0
        return [first, *([x.clone() for x in first] for _ in range(more))]


def _all(program: Program, symbols: Mapping[str, int]) -> dict[str, int]:
    """Extents of all ranks that have one of their own."""
    from memcomp.sizes import fixed

    return {**fixed(program), **symbols}


def _limit() -> None:
    """A candidate that wants more memory than it may have fails by itself, not the machine."""
    import resource

    pages = int(open("/proc/self/statm").read().split()[5]) if os.path.exists("/proc/self/statm") else 0
    now = pages * os.sysconf("SC_PAGE_SIZE")
    if now:
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        least = now + GROWTH if most == resource.RLIM_INFINITY else min(now + GROWTH, most)
        resource.setrlimit(resource.RLIMIT_DATA, (least, most))
