"""`memcomp bench --device cuda`: checks what memcomp makes for this machine's GPU, then times it beside its rivals.

What matters most comes first, and what was found is written after every step, so that a stop loses nothing.  Checks run
side by side, each in a process that it may spoil; of what is timed, only one thing runs at a time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcomp.bench.measure import Times, ratio
from memcomp.bench.tasks import OWN, Tasks, apart
from memcomp.files import put
from memcomp.ir.errors import OptionError
from memcomp.models.bench import Case
from memcomp.models.bench.operators import FLEX
from memcomp.workers import FAILED, OK, REFUSED, WRONG, Answer, Asked, Here, Job, Worker, spread, together

if TYPE_CHECKING:
    from memcomp.cache import Entry

FORMAT = 1
FIRST = 23              # cases that are checked and timed before anything else is
CHECKING, LATER, ENDING = 0.45, 0.85, 0.97  # of the time: until then checks, other checks after times, times
LIMIT, GRACE = 60.0, 15.0  # seconds of one job; of those that are under way when time is up
EACH = 24 << 30         # bytes of the device's memory for one process
MANY = 6                # processes
CORRECT = 1.05          # times the error of FlexAttention that is not more


@dataclass(frozen=True, slots=True)
class Plan:
    """cases:   those to time.
    seconds:   for everything.
    rehearse:  by Triton's interpreter on this machine, with small cases; nothing is kept as a device's.
    tests:     a checkout's folder of tests: its programs are checked, and its test_gpu.py is run.
    output:    file for the results; None: benchmarks/results of a checkout.
    tuned:     folder for what was found to be fastest; None: the package's own.
    forms:     words of which a form's name holds one; empty: all forms.
    apart:     jobs run in processes of their own.
    target:    that is compiled for; "": the one most like the device.
    words:     of which a program's and a family's name holds one; empty: all, and test_gpu.py.
    """

    cases: tuple[Case, ...]
    seconds: float = 430.0
    rehearse: bool = False
    tests: Path | None = None
    output: Path | None = None
    tuned: Path | None = None
    forms: tuple[str, ...] = ()
    apart: bool = True
    target: str = ""
    words: tuple[str, ...] = ()

    def asked(self, name: str) -> bool:
        return not self.words or any(w in name for w in self.words)


@dataclass
class Found:
    """The record: what is written (`data`), and what was wrong (`faults`)."""

    plan: Plan
    say: Callable[[str], None]
    begin: float
    data: dict[str, Any]
    path: Path | None = None
    backends: tuple[str, ...] = ()
    faults: list[str] = field(default_factory=list)
    again: list[Job] = field(default_factory=list)  # alone: there was no memory left beside others

    def limit(self) -> float:
        """Seconds that a job may take that begins now; an interpreter takes longer."""
        whole = LIMIT * (4.0 if self.plan.rehearse else 1.0)
        return max(5.0, min(whole, self.begin + self.plan.seconds + GRACE - time.monotonic()))

    def until(self, share: float) -> float:
        """When that share of the time is over."""
        return self.begin + share * self.plan.seconds

    def tell(self, text: str) -> None:
        """Say it; what is no device's is marked as such, line by line."""
        self.say(f"rehearsal {text}" if self.plan.rehearse else text)

    def line(self, text: str) -> None:
        self.tell(f"{time.monotonic() - self.begin:6.1f} s  {text}")

    def write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.begin, 1)
        if self.path is not None:
            put(self.path, json.dumps(self.data, indent=1) + "\n")

    def checked(self, job: Job, answer: Answer) -> None:
        """Keep an answer; one of our own that is wrong, or none, counts."""
        if "out of memory" in answer.why and job not in self.again:
            self.again.append(job)
            return
        kept = {"state": answer.state, **({"why": answer.why} if answer.why else {}), "seconds": answer.seconds,
                **answer.told}
        name, form = job.given
        own = job.do != "check" or form.startswith(OWN)
        if job.do == "check":
            self.data["cases"][name]["forms"][form] = kept
        else:
            self.data["checks"].setdefault(f"{job.do} {Path(name).stem}", {})[form] = kept
        if own and answer.state in (WRONG, FAILED):
            self.faults.append(f"{job}: {answer.state}: {answer.why}")
        errors = f"rms {answer.told['rms']:.1e}" if "rms" in answer.told else ""
        self.line(" ".join(filter(None, (f"{answer.state:<7}", str(job), errors, answer.why))))
        self.write()


def run(plan: Plan, say: Callable[[str], None] = print) -> Found:
    """Do it all, and tell of every step; the record's `faults` are empty where all that is ours was right.  Raises
    OptionError where there is no GPU."""
    begin = time.monotonic()
    workers: list[Asked] = [_worker(plan)]
    try:
        facts = workers[0].ask(Job("facts"), LIMIT)
        if facts.state != OK:
            raise OptionError(facts.why, hint="--interpret rehearses on this machine")
        found = _begun(plan, facts, say, begin)
        found.line(f"{facts.told['device']['name']}, compiled for {facts.told['target']}, backends "
                   f"{', '.join(found.backends)}")
        peaks = workers[0].ask(Job("peaks"), LIMIT)
        if peaks.state != OK:
            raise OptionError(f"the device cannot multiply and copy: {peaks.why}")
        found.data["peaks"] = peaks.told
        found.line(f"torch.mm {1e-12 / peaks.told['operation']['median']:.0f} TFLOP/s, "
                   f"copy {1e-9 / peaks.told['byte']['median']:.0f} GB/s, "
                   f"a launch {1e6 * peaks.told['launch']['median']:.1f} us")
        workers += [_worker(plan) for _ in range(1, _processes(plan, facts.told["device"]))]
        tests = _tests(plan, found)
        left = _checks(plan, found, workers)
        if tests is not None:
            tests.join()
        _times(plan, found, workers)
        left = spread(workers, left, found.limit, found.until(LATER), found.checked)
        _times(plan, found, workers)
        found.data["left"] = [str(job) for job in left]
        _tuned(plan, found)
        found.write()
        for text in summary(found.data):
            found.tell(text)
        for text in found.faults:
            found.tell(f"FAULT {text}")
        if found.path is not None:
            found.tell(f"written to {found.path}")
        return found
    finally:
        for w in workers:
            w.close()


def _worker(plan: Plan) -> Asked:
    if plan.apart:
        return Worker(partial(apart, plan.rehearse, plan.target))
    return Here(partial(Tasks, plan.rehearse, plan.target))


def _begun(plan: Plan, facts: Answer, say: Callable[[str], None], begin: float) -> Found:
    name = re.sub(r"[^a-z0-9]+", "-", facts.told["device"]["name"].lower()).strip("-")
    path = plan.output
    if path is None and not plan.rehearse:
        path = Path(__file__).parents[2] / "benchmarks" / "results" / f"{name}.json"
        if not path.parent.is_dir():
            raise OptionError("there is no checkout around this memcomp to write the results into", hint="-o FILE")
    data = {"format": FORMAT, "rehearsal": plan.rehearse, "seconds": 0.0,
            **{k: facts.told[k] for k in ("device", "target", "versions", "environment")},
            "peaks": {}, "tests": {}, "checks": {}, "left": [],
            "cases": {c.name: {"flops": c.flops, "forms": {}} for c in plan.cases}}
    return Found(plan, say, begin, data, path, tuple(facts.told["backends"]))


def _processes(plan: Plan, device: dict[str, Any]) -> int:
    if plan.rehearse or not plan.apart:
        return 1
    return max(1, min(MANY, (os.cpu_count() or 1) // 2, int(device["memory"]) // EACH))


# -- checks -----------------------------------------------------------------------------------------------------------


def _checks(plan: Plan, found: Found, workers: Sequence[Asked]) -> list[Job]:
    """Everything that is ours and what is timed beside it, first things first; returns what time was too short for.
    Not the families in a rehearsal: there, the tests do that."""
    from memcomp.models.families import families

    def forms(cases: Sequence[Case], own: bool) -> Iterator[Job]:
        for case in cases:
            names = [OWN + b for b in found.backends] if own else list(case.rivals)
            yield from (Job("check", (case.name, n)) for n in names
                        if not plan.forms or any(w in n for w in plan.forms))

    first, rest = plan.cases[:FIRST], plan.cases[FIRST:]
    programs = [p for p in _programs(plan.tests) if plan.asked(p.stem)]
    jobs = [*forms(first, True), *(Job("program", (str(p), b)) for p in programs for b in found.backends)]
    jobs += [*forms(first, False), *forms(rest, True), *forms(rest, False)]
    if not plan.rehearse:
        jobs += [Job("family", (f.name, b)) for f in families() if plan.asked(f.name) for b in found.backends]
    left = spread(workers, jobs, found.limit, found.until(CHECKING), found.checked)
    return spread(workers[:1], found.again, found.limit, found.until(CHECKING), found.checked) + left


def _programs(tests: Path | None) -> list[Path]:
    return sorted((tests / "cases").glob("*.mc")) if tests is not None else []


def _tests(plan: Plan, found: Found) -> threading.Thread | None:
    """The checkout's own tests on a GPU: whole models, with CUDA graphs."""
    file = plan.tests / "test_gpu.py" if plan.tests is not None else None
    if file is None or not file.exists() or plan.words:
        return None

    def go() -> None:
        limit = max(60.0, CHECKING * plan.seconds)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            state, told = (OK if done.returncode == 0 else FAILED), done.stdout.strip().splitlines()[-12:]
            if done.returncode == 5:  # pytest's word for: no test was chosen
                state, told = REFUSED, ["no test is marked gpu"]
        except subprocess.TimeoutExpired:
            state, told = FAILED, [f"not done after {limit:.0f} s"]
        found.data["tests"] = {"state": state, "told": told}
        if state == FAILED:
            found.faults.append(f"{file.name}: {told[-1] if told else 'it says nothing'}")
        found.line(f"{state:<7} {file.name}: {told[-1] if told else ''}")

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    return thread


# -- times ------------------------------------------------------------------------------------------------------------


def _times(plan: Plan, found: Found, workers: Sequence[Asked]) -> None:
    """Cases in their order, those that were not timed yet: as many as there are processes are made ready side by side,
    then timed one by one."""
    ready = []
    for case in plan.cases:
        if "ready" in found.data["cases"][case.name]:
            continue
        right = [f for f, kept in found.data["cases"][case.name]["forms"].items() if kept["state"] == OK]
        if any(f.startswith(OWN) for f in right):
            ready.append((case.name, tuple(right)))
    while ready and time.monotonic() < found.until(ENDING):
        batch, ready = list(zip(workers, ready, strict=False)), ready[len(workers):]
        together(_prepare, [(found, *x) for x in batch])
        for worker, (name, _) in batch:
            _time(found, worker, name)


def _prepare(found: Found, worker: Asked, what: tuple[str, tuple[str, ...]]) -> None:
    name, forms = what
    answer = worker.ask(Job("prepare", (name, forms)), found.limit())
    kept = found.data["cases"][name]
    kept["ready"] = answer.state if answer.state == OK else f"{answer.state}: {answer.why}"
    kept["sets"] = answer.told.get("sets", 0)
    for form, why in answer.told.get("missing", {}).items():
        kept["forms"][form]["untimed"] = why
    for form, held in answer.told.get("held", {}).items():
        kept["forms"][form]["held"] = held


def _time(found: Found, worker: Asked, name: str) -> None:
    kept = found.data["cases"][name]
    if kept["ready"] == OK:
        answer = worker.ask(Job("time"), found.limit())
        for form, time_ in answer.told.items():
            kept["forms"][form]["time"] = time_
        if answer.state != OK:
            kept["ready"] = f"{answer.state}: {answer.why}"
    for text in _table(name, kept, found.data["peaks"]):
        found.line(text)
    found.write()


def times(kept: dict[str, Any]) -> dict[str, Times]:
    """Of the forms of a case that were timed."""
    return {f: Times(*(x["time"][n] for n in ("median", "least", "spread"))) for f, x in kept["forms"].items()
            if "time" in x}


def _table(name: str, kept: dict[str, Any], peaks: dict[str, Any]) -> Iterator[str]:
    seen = times(kept)
    yield name if kept["ready"] == OK else f"{name}: {kept['ready']}"
    for form, t in seen.items():
        told, rate = kept["forms"][form], kept["flops"] / t.median
        read = told["bytes"] / t.median
        graph = f"  no graph: {told['time']['without_graph']}" if told["time"]["without_graph"] else ""
        yield (f"  {form:<16}{t.median * 1e3:10.4f} ms +- {t.spread:3.0%}  {rate / 1e12:7.1f} TFLOP/s "
               f"({rate * peaks['operation']['median']:4.0%})  {read / 1e9:7.0f} GB/s "
               f"({read * peaks['byte']['median']:4.0%})  rms {told['rms']:.1e}{graph}")
    yield from (f"  {m}" for m in behind(kept))


def behind(kept: dict[str, Any]) -> list[str]:
    """Where our fastest form of a case is surely slower than a rival, or errs more than FlexAttention."""
    seen, out = times(kept), list[str]()
    own = {f: t for f, t in seen.items() if f.startswith(OWN)}
    if not own:
        return out
    best = min(own, key=lambda f: own[f].median)
    for rival, t in seen.items():
        r = ratio(t, own[best])
        if rival not in own and r.sure and r.value < 1:
            out.append(f"{best} is {r.value:.2f}x {rival}")
    if FLEX in seen and kept["forms"][best]["rms"] > CORRECT * kept["forms"][FLEX]["rms"]:
        out.append(f"{best} errs {kept['forms'][best]['rms'] / kept['forms'][FLEX]['rms']:.2f} times as much as {FLEX}")
    return out


# -- what is kept -----------------------------------------------------------------------------------------------------


def _tuned(plan: Plan, found: Found) -> None:
    """The fastest of our forms of each case into the cache that comes with memcomp."""
    from memcomp.cache import Store

    if plan.rehearse and plan.tuned is None:
        return
    store = Store(plan.tuned if plan.tuned is not None else Path(__file__).parents[1] / "tuned")
    with suppress(OSError):  # a package that cannot be written: the results hold the same
        for kept in found.data["cases"].values():
            for one in entries(kept, found.data["environment"]):
                store.join(one)


def entries(kept: dict[str, Any], environment: dict[str, Any]) -> Iterator[Entry]:
    """A case's entry of the cache, where it has one region: the fastest form of all backends."""
    from memcomp.cache import Choice, Entry, Measured
    from memcomp.ir.target import target

    seen = times(kept)
    own = sorted((f for f in seen if f.startswith(OWN)), key=lambda f: seen[f].median)
    if not own or len(kept["forms"][own[0]]["own"]) != 1:
        return
    told, best = kept["forms"][own[0]], seen[own[0]]
    (region,), unit = told["own"], told["eager"] or 1.0
    backend = own[0].removeprefix(OWN)
    if backend == target(region["problem"]["target"]).backend:
        backend = ""  # the target's own
    how = "launch by launch" if told["time"]["without_graph"] else "CUDA graph"
    measured = Measured(best.median, best.spread, told["time"]["rounds"], told["max"] / unit, told["bound"] / unit,
                        seen[own[1]].median if own[1:] else 0.0, how)
    yield Entry({**region["problem"], "backend": ""}, environment,
                Choice(**region["choice"], backend=backend), measured)


def summary(data: dict[str, Any]) -> Iterator[str]:
    """What is printed last: counts, then each case's fastest form of ours beside the fastest rival."""
    answers = [x for forms in (*data["checks"].values(), *(c["forms"] for c in data["cases"].values()))
               for x in forms.values()]
    count = {s: sum(x["state"] == s for x in answers) for s in (OK, WRONG, REFUSED, FAILED)}
    yield f"checks: {', '.join(f'{n} {s}' for s, n in count.items())}; {len(data['left'])} left for lack of time"
    for name, kept in data["cases"].items():
        seen = times(kept)
        own = {f: t for f, t in seen.items() if f.startswith(OWN)}
        others = {f: t for f, t in seen.items() if f not in own}
        if own:
            best = min(own, key=lambda f: own[f].median)
            text = f"{name:<32}{best:<15}{own[best].median * 1e3:9.4f} ms"
            rate = kept["flops"] / own[best].median
            read = kept["forms"][best]["bytes"] / own[best].median
            text += (f"  {rate / 1e12:6.1f} TFLOP/s ({rate * data['peaks']['operation']['median']:4.0%})"
                     f" {read / 1e9:6.0f} GB/s ({read * data['peaks']['byte']['median']:4.0%})")
            if others:
                rival = min(others, key=lambda f: others[f].median)
                text += f"  {ratio(others[rival], own[best])} {rival}"
            yield text


def chosen(words: Sequence[str], small: bool, tests: Path | None = None) -> tuple[Case, ...]:
    """The cases for a GPU whose name holds one of the words, all without words; none where only programs of `tests` or
    families are named so."""
    from memcomp.models.bench import cases
    from memcomp.models.bench.operators import listed
    from memcomp.models.families import families

    found = tuple(c for c in (listed(True) if small else cases("cuda"))
                  if not words or any(w in c.name for w in words))
    others = [p.stem for p in _programs(tests)] + ([] if small else [f.name for f in families()])
    if not found and not any(w in name for w in words for name in others):
        raise OptionError(f"no case is named like {', '.join(map(repr, words))}", hint="`memcomp bench --list`")
    return found
