"""Tuning: candidates are compiled and compared with float64 side by side, in processes of their own, and timed one at a
time on each device; those that did well are raced in turn; the fastest is kept with how it was measured.

The cost model says where to begin: what it thinks far slower than its best is not tried.  What comes next is up to
Optuna's tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011).
"""

from __future__ import annotations

import atexit
import datetime
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from memcomp.cache import Choice, Entry, Measured, Rejected, environment
from memcomp.cache.entry import ITEMS, TEXT
from memcomp.choice import seconds as modelled_seconds
from memcomp.ir.detect import cpu
from memcomp.ir.errors import OptionError, Refusal
from memcomp.tune.tasks import FEW, Given, Tasks, rows
from memcomp.workers import OK, REFUSED, Answer, Asked, Does, Job, Worker, spread, together

if TYPE_CHECKING:
    from memcomp.config import Config
    from memcomp.ir.program import Program
    from memcomp.pipeline import Tunable

LIMIT = 30.0  # seconds of one candidate
INTERRUPTED = "interrupted before the race was over"
LEAST = 2     # candidates that are tried, however long they take
MEMBERS = 4096  # mappings that the cost model is asked about: of more, those near its own choice
MAPPINGS = 32  # the likeliest, whose kernels are tried by every backend and with every setting


@dataclass(frozen=True, slots=True)
class Mode:
    """seconds: for one kernel; slower: times the cost model's best that is still tried; finalists: that are raced;
    share: of the seconds, for the race."""

    seconds: float
    slower: float
    finalists: int
    share: float = 0.35


Timed: TypeAlias = tuple[float, float, int]  # median seconds of a call, spread, rounds

MODES = {"quick": Mode(20.0, 2.0, 4), "full": Mode(600.0, 16.0, 8, 0.2)}


class Missing(Refusal):
    """What the search needs is not installed."""


@cache
def tuner() -> Tuner:
    """The one of this process, for programs that are tuned when they are compiled; it ends with the process."""
    made = Tuner()
    atexit.register(made.close)
    return made


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and what became of it.  seconds: the least of a few calls, infinite where it did not run."""

    choice: Choice
    state: str
    seconds: float = math.inf
    why: str = ""
    error: float = 0.0
    bound: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """How far a search is, for those who watch.  best: seconds a call."""

    done: int
    of: int
    best: float
    model: float
    left: float


@dataclass
class Search:
    """One program's search, and what it has found so far."""

    tunable: Tunable
    mode: Mode
    given: Given
    watch: Callable[[State], None]
    hints: tuple[Choice, ...] = ()
    begin: float = 0.0
    likely: int = 0
    trials: dict[Choice, Trial] = field(default_factory=dict)

    @property
    def ran(self) -> list[Trial]:
        """Candidates that ran and were right, the fastest first."""
        return sorted((t for t in self.trials.values() if t.state == OK), key=lambda t: t.seconds)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Those that may not win.  What memcomp itself refuses, it will refuse again."""
        bad = [Rejected(t.choice, t.why[:TEXT]) for t in self.trials.values() if t.state not in (OK, REFUSED)]
        return tuple(bad[:ITEMS // 4])  # an entry has room for so many

    def attempt(self, asked: Sequence[Asked]) -> None:
        """Try candidates until the time for it is over."""
        candidates = ranked(self.tunable, self.mode.slower, self.hints)
        self.likely = len(candidates)
        until, todo = self.begin + self.mode.seconds * (1 - self.mode.share), _Order(candidates)

        def jobs() -> Iterator[Job]:
            begun = 0
            while (begun < LEAST or time.monotonic() < until) and (choice := todo.next()) is not None:
                begun += 1
                yield Job("attempt", (self.given, choice))

        def done(job: Job, answer: Answer) -> None:
            choice = job.given[1]
            self.trials[choice] = trial = _trial(choice, answer)
            todo.tell(choice, trial.seconds)
            model = self.trials.get(candidates[0])
            self.watch(State(len(self.trials), len(candidates), self.ran[0].seconds if self.ran else math.inf,
                             model.seconds if model else math.inf, self.begin + self.mode.seconds - time.monotonic()))

        turns: Mapping[str, threading.Lock] = defaultdict(threading.Lock)
        spread([_InTurn(w, turns) for w in asked], jobs(), lambda: LIMIT, math.inf, done)

    def race(self, worker: Asked) -> dict[Choice, Timed]:
        """The candidates that did best, and the cost model's own, in turn.

        Of a race that does not end each candidate is asked alone, and those that end badly again are out.  Where none
        does, the race is run once more; nothing where that does not end either, or nothing is left."""
        once_more = True
        entered = [t.choice for t in self.ran[:self.mode.finalists]]
        model = self.trials.get(self.tunable.modelled)
        if model is not None and model.state == OK and model.choice not in entered:
            entered.append(model.choice)
        while entered:
            left = self.begin + self.mode.seconds - time.monotonic()
            left = max(1.0, min(left, self.mode.seconds * self.mode.share * len(entered) / self.mode.finalists))
            least = (FEW + 2) * sum(self.trials[c].seconds for c in entered)  # of slow kernels more than is left
            answer = worker.ask(Job("race", (self.given, tuple(entered), left)), max(left, least) + LIMIT)
            if answer.state == OK:
                return {c: (m, s, answer.told["rounds"])
                        for c, m, s in zip(entered, answer.told["medians"], answer.told["spreads"], strict=True)}
            left_over = [c for c in entered if self._alone(worker, c)]
            if len(left_over) == len(entered):
                if not once_more:
                    break
                once_more = False
            entered = left_over
        return {}

    def _alone(self, worker: Asked, choice: Choice) -> bool:
        """Does a candidate come through a race without rivals?"""
        answer = worker.ask(Job("race", (self.given, (choice,), 0.0)), LIMIT)
        if answer.state != OK:
            self.trials[choice] = Trial(choice, answer.state, why=f"in the race: {answer.why}")
        return answer.state == OK


@dataclass(frozen=True, slots=True)
class _InTurn:
    """A worker whose candidates are timed while none is on the same device.  turns: by device."""

    worker: Asked
    turns: Mapping[str, threading.Lock]

    @property
    def place(self) -> str:
        return self.worker.place

    def ask(self, job: Job, limit: float) -> Answer:
        checked = self.worker.ask(job, limit)
        if checked.state != OK:
            return checked
        with self.turns[self.place]:
            timed = self.worker.ask(replace(job, do="time"), limit)
        return replace(timed, told={**checked.told, **timed.told})

    def stop(self) -> None:
        self.worker.stop()

    def close(self) -> None:
        self.worker.close()


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.  timed: the candidates that were raced, or all that ran where there was no race."""

    search: Search
    timed: Mapping[Choice, Timed]
    how: str

    @property
    def order(self) -> list[Choice]:
        """The best first; the model's own before what is no faster for sure."""
        return winners(self.timed, self.search.tunable.modelled)

    def entry(self, environment: Mapping[str, Any]) -> Entry:
        """For the cache."""
        best, *others = self.order
        (median, spread, rounds), trial = self.timed[best], self.search.trials[best]
        measured = Measured(median, spread, rounds, trial.error, trial.bound, self.timed[others[0]][0] if others else 0,
                            self.how, datetime.date.today().isoformat())
        return Entry(self.search.tunable.problem, environment, best, measured, self.search.rejected)


class Tuner:
    """Processes that try candidates, for one program after another.  A context: they end with it."""

    def __init__(self, workers: int | Sequence[Asked] = 0, make: Callable[[], Does] = Tasks,
                 there: Mapping[str, Any] | None = None) -> None:
        """workers: how many, 0: one for each core; or those that there are.  make: what they do, picklable.  there:
        their environment, if it is not this machine's."""
        self._there = there
        self._asked: Sequence[Asked] = [Worker(make) for _ in range(workers or cpu().cores)] if isinstance(
            workers, int) else workers

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, job: Job) -> Answer:
        """One job for one process (`tasks`)."""
        return self._asked[0].ask(job, 2 * LIMIT)

    def close(self) -> None:
        for w in self._asked:
            w.close()

    def tune(self, read: Program, config: Config, sizes: Mapping[str, int], *, mode: str = "quick",
             seconds: float | None = None, hints: Iterable[Entry] = (),
             watch: Callable[[State], None] = lambda state: None) -> Entry:
        """The entry of the fastest way to map a program; arguments and errors as of `search`."""
        return self.search(read, config, sizes, mode=mode, seconds=seconds, hints=hints, watch=watch).entry(
            self.environment(config))

    def environment(self, config: Config) -> Mapping[str, Any]:
        """What is measured here holds for."""
        from memcomp.backends import device_of

        return self._there or environment(device_of(config))

    def search(self, read: Program, config: Config, sizes: Mapping[str, int], *, mode: str = "quick",
               seconds: float | None = None, hints: Iterable[Entry] = (),
               watch: Callable[[State], None] = lambda state: None) -> Found:
        """How fast the ways to map a program are on the processes' machine; where it is interrupted (Ctrl-C), what was
        found.

        sizes: as for `compile_program`.  seconds: instead of the mode's, from when the processes are ready.  hints:
        what was best elsewhere, to be tried early.  watch hears of every candidate.  Raises OptionError for a mode that
        is not known, Refusal where no candidate runs, KeyboardInterrupt where none had run.
        """
        if mode not in MODES:
            raise OptionError(f"tune={mode!r} is not known", hint=f"known: {', '.join(MODES)}")
        from memcomp.pipeline import tunable

        how = MODES[mode] if seconds is None else replace(MODES[mode], seconds=seconds)
        plain = {"target": config.target, "backend": config.backend, "tune": "off", "cache": "off",
                 "interpret": False}
        given = Given(str(read), tuple(plain.items()), tuple(sizes.items()), rows(read))
        search = Search(tunable(read, config=config, sizes=sizes), how, given, watch,
                        tuple(e.choice for e in hints))
        timed: dict[Choice, Timed] = {}
        ended = "no race came to its end"
        try:
            together(lambda w: _begin(w, given), [(w,) for w in self._asked])
            search.begin = time.monotonic()
            search.attempt(self._asked)
            if not search.ran:
                raise Refusal(f"no way of mapping {read.name} runs",
                              next((t.why for t in search.trials.values() if t.why), ""))
            timed = search.race(self._asked[0])
        except KeyboardInterrupt:
            for w in self._asked:  # nobody waits for what they do
                w.stop()
            if not search.ran:
                raise
            ended = INTERRUPTED
        if not search.ran:
            raise Refusal(f"no way of mapping {read.name} comes through a race",
                          next((t.why for t in search.trials.values() if t.why), ""))
        ended = f"{len(timed)} raced" if timed else ended
        return Found(search, timed or {t.choice: (t.seconds, 0.0, 1) for t in search.ran},
                     f"{mode}: {len(search.trials)} of {search.likely} likely ways tried, {ended}; warm")


def _begin(worker: Asked, given: Given) -> None:
    """What goes wrong here, goes wrong again where it is heard of."""
    with suppress(OSError):
        worker.ask(Job("begin", (given,)), LIMIT)


def winners(timed: Mapping[Choice, Timed], model: Choice) -> list[Choice]:
    """By median, but the cost model's choice before what is faster by no more than the measurement wanders."""
    order = sorted(timed, key=lambda c: timed[c][0])
    if model in timed:
        median, spread, _ = timed[order[0]]
        if timed[model][0] <= median * (1 + spread / 2):
            order.sort(key=lambda c: c != model)
    return order


def ranked(t: Tunable, slower: float, hints: Sequence[Choice] = ()) -> list[Choice]:
    """Members of the space that the cost model does not think far slower than its best: its own choice first, then
    those of `hints` that are members.  Backends and settings, of which it knows nothing, come in turn: all mappings'
    first way, beside the second one of those that it likes best, and so on."""
    first = t.modelled
    hinted = dict.fromkeys(replace(h, backend="", setting="") for h in hints)

    def spent(c: Choice) -> float:
        return modelled_seconds(t.space.closed(c), t.forms[c.form].extents)

    limit = slower * spent(first)
    members = t.space.mappings() if len(t.space) <= MEMBERS else dict.fromkeys(
        [*t.space.near(first), *(h for h in hinted if h in t.space)])
    timed = [(s, n, c) for n, c in enumerate(members) if (s := spent(c)) <= limit or c in hinted]
    likely = [first, *(c for *_, c in sorted(timed, key=lambda x: x[:2]) if c != first)]
    found = [(n + m, n, c) for n, mapping in enumerate(likely)
             for m, c in enumerate(t.space.written(mapping) if n < MAPPINGS else (mapping,))]
    order = [c for *_, c in sorted(found, key=lambda x: x[:2]) if c != first]
    return [first, *sorted(order, key=lambda c: c not in hints)]


def _trial(choice: Choice, answer: Answer) -> Trial:
    if answer.state != OK:
        return Trial(choice, answer.state, why=answer.why)
    return Trial(choice, OK, answer.told["seconds"], "", answer.told["error"], answer.told["bound"])


class _Order:
    """Which candidate is next: the cost model's first ones, then those most like what the sampler asks for."""

    FIRST = 8

    def __init__(self, candidates: Sequence[Choice]) -> None:
        self._left = list(candidates)
        self._told = 0
        self._names = tuple(dict.fromkeys(n for c in candidates for n in _point(c)))
        self._study: Any
        self._study, self._domain = _study({n: list(dict.fromkeys(_point(c).get(n) for c in candidates))
                                            for n in self._names}) if len(candidates) > self.FIRST else (None, {})

    def next(self) -> Choice | None:
        if not self._left:
            return None
        choice = self._left[0]
        if self._study is not None and self._told >= self.FIRST:
            from optuna.trial import TrialState

            trial = self._study.ask(self._domain)
            self._study.tell(trial, state=TrialState.FAIL)  # what is tried instead is told when it has run
            choice = max(self._left, key=lambda c: sum(_point(c).get(n) == x for n, x in trial.params.items()))
        self._left.remove(choice)
        return choice

    def tell(self, choice: Choice, seconds: float) -> None:
        self._told += 1
        if self._study is not None and math.isfinite(seconds):
            from optuna.trial import create_trial

            point = {n: _point(choice).get(n) for n in self._names}
            self._study.add_trial(create_trial(params=point, distributions=self._domain, value=math.log(seconds)))


def _study(domain: Mapping[str, list[Any]]) -> tuple[Any, dict[str, Any]]:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise Missing("tuning searches with Optuna, which is not installed",
                      hint="pip install memcomp[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, multivariate=True), direction="minimize")
    return study, {n: optuna.distributions.CategoricalDistribution(x) for n, x in domain.items()}


def _point(choice: Choice) -> dict[str, Any]:
    return {"form": choice.form, "backend": choice.backend, "setting": choice.setting, **choice.knobs}
