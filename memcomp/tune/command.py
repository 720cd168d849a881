"""`memcomp tune`: measure each program of an input, say what was found, keep it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from memcomp.backends import device_of
from memcomp.cache import Entry, layers, present
from memcomp.cache.commands import device
from memcomp.config import Config
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program
from memcomp.pipeline import tunable
from memcomp.tune.progress import bar
from memcomp.tune.search import INTERRUPTED, Tuner

LONGEST, MOST = 1e6, 1024  # seconds of a program, processes


@dataclass(frozen=True, slots=True)
class Row:
    """A program, what is known of it now, and whether that was measured now."""

    name: str
    entry: Entry
    fresh: bool


def tune(programs: Sequence[tuple[str, Program, Mapping[str, int]]], config: Config, *, seconds: float | None,
         workers: int, again: bool, ray: str = "") -> Iterable[Row]:
    """Tune programs (each with where it was found, and its sizes), one after another; each is kept before the next
    begins.

    ray: address of a cluster whose devices measure, instead of this machine.  Raises OptionError where the cache cannot
    be written: then nothing would be kept.
    """
    stores = layers(config.cache_dir, config.cache)
    if stores.writable is None:
        raise OptionError("the cache is read only or off, and nothing would be kept",
                          hint="unset MEMCOMP_CACHE, which says so")
    if seconds is not None and not 0 < seconds <= LONGEST:
        raise OptionError(f"--seconds {seconds:g} is no time", hint=f"more than 0, at most {LONGEST:g}")
    if not 0 <= workers <= MOST:
        raise OptionError(f"--workers {workers} is no number of processes", hint=f"at most {MOST}; 0: one a core")
    if not ray and not present(device_of(config)):
        raise OptionError(f"there is no {device_of(config)} device here to measure the target {config.target} on",
                          hint="tune on the machine that the kernels are for, and `memcomp cache export` there")
    try:
        stores.writable.check()
    except OSError as error:
        raise OptionError(f"the cache {stores.writable.root} cannot be written, and nothing would be kept", str(error),
                          "set MEMCOMP_CACHE_DIR to a folder that can") from None
    with _tuners(config, workers, ray) as tuners:
        todo = [(n, x, tuner) for n, x in enumerate(programs) for tuner in tuners]
        for count, (n, (name, program, sizes), tuner) in enumerate(todo):
            here, opened = tuner.environment(config), tunable(program, config=config, sizes=sizes)
            known = None if again else stores.get(opened.problem, here)
            if known is None:
                with bar(f"{name} ({n + 1} of {len(programs)})") as watch:
                    entry = tuner.tune(program, config, sizes, mode=config.tune, seconds=seconds,
                                       hints=stores.hints(opened.problem, here), watch=watch)
                stores.writable.put(entry)  # asked for now: in the place of what was known
            found = known or entry
            yield Row(f"{name} on {device(found)}" if len(tuners) > 1 else name, found, known is None)
            if known is None and INTERRUPTED in entry.measured.how and count + 1 < len(todo):
                raise KeyboardInterrupt


@contextmanager
def _tuners(config: Config, workers: int, ray: str) -> Iterator[list[Tuner]]:
    """One for each kind of device."""
    if ray:
        from memcomp.tune.cluster import tuners

        with tuners(ray, device_of(config), workers) as found:
            yield found
    else:
        with Tuner(workers) as tuner:
            yield [tuner]


def told(rows: Iterable[Row], as_json: bool) -> str:
    """The rows as JSON, or a line each, also to stderr as soon as they are there."""
    seen = []
    for r in rows:
        seen.append(r)
        if not as_json:
            print(line(r), file=sys.stderr, flush=True)
    if as_json:
        return json.dumps([{"name": r.name, "fresh": r.fresh, **json.loads(r.entry.text())} for r in seen], indent=2)
    return f"{sum(r.fresh for r in seen)} of {len(seen)} programs measured, the others were known"


def line(r: Row) -> str:
    """A result in a line: time, choice, how far the next best is."""
    m, c = r.entry.measured, r.entry.choice
    gap = f", the next best {m.runner_up / m.median:.2f}x of it" if m.runner_up else ""
    wrong = f", {len(r.entry.rejected)} rejected" if r.entry.rejected else ""
    wrong += f", {INTERRUPTED}" if INTERRUPTED in m.how else ""
    return (f"{r.name}: {m.median * 1e3:.3g} ms +- {m.spread:.0%} with {c}{gap}{wrong}"
            f"{'' if r.fresh else ' (known)'}")
