"""A program's forms, each with knobs: which is taken, with what values: by measurement, or by the cost model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from memcomp.backends import SPILLS, device_of, least_tile, lowers, preferred, strain, ways
from memcomp.cache import CacheWarning, Choice, Entry, Layers, environment, layers, present
from memcomp.choice import TIE, alternatives, seconds
from memcomp.config import Config
from memcomp.ir.errors import MemcompError, OptionError, Refusal
from memcomp.ir.program import Program, close, finer, knobs
from memcomp.recheck import steady
from memcomp.sizes import shape_sizes
from memcomp.stations import Observer, rewrite
from memcomp.tune.model import modelled
from memcomp.tune.space import Space, problem


@dataclass(frozen=True, slots=True)
class Opened:
    """One form of a program: with open knobs, the cost model's values for them, closed with these, what the stations
    made on the way, and the extents that it was ranked with."""

    mapped: Program
    values: dict[str, int]
    closed: Program
    seen: list[tuple[str, object]]
    extents: dict[str, int]


def opened(program: Program, names: tuple[str, ...], read: Program, sizes: Mapping[str, int], config: Config,
           observe: Observer) -> tuple[dict[str, Opened], str, Space]:
    """The forms of a program by their words, the words of the plainest, and the space that they are.  Arguments as for
    `closed_form`; `observe` hears of the stations only where one cannot go on."""
    fit = strain(config)

    def form(options: Mapping[str, Any], seen: list[tuple[str, object]]) -> Opened:
        mapped = rewrite(program, observe=lambda *x: seen.append(x), names=names, options={"reduce_passes": options})
        extents = shape_sizes(read, mapped, sizes)
        values, badly = _fitting(mapped, extents, fit)
        if badly >= SPILLS and (least := least_tile(config)):
            smaller = finer(mapped, least)
            found, less = _fitting(smaller, extents, fit)
            if less < badly:
                mapped, values = smaller, found
        return Opened(mapped, values, close(mapped, values), seen, extents)

    begun: list[tuple[str, object]] = []
    try:
        first = form({}, begun)
    except MemcompError:
        for station, value in begun:  # how far it came
            observe(station, value)
        raise
    words, others = alternatives(first.closed, first.extents) if "reduce_passes" in names else ("", {})
    forms = {words: first}
    for what, options in others.items():
        try:
            forms[what] = form(options, [])
        except Refusal:  # the first one serves
            continue
    return forms, words, Space({what: f.mapped for what, f in forms.items()}, partial(ways, config=config))


def _fitting(mapped: Program, extents: Mapping[str, int],
             fit: Callable[[Program], float] | None) -> tuple[dict[str, int], float]:
    """The cost model's values for the knobs, and how badly they fit: 0 where nobody can tell."""
    least = 0.0 if fit is None else math.inf

    def noted(closed: Program) -> float:
        nonlocal least
        assert fit is not None
        found = fit(closed)
        least = min(least, found)
        return found

    values = modelled(mapped, extents, noted if fit is not None else None)
    if fit is not None and not knobs(mapped):
        noted(mapped)
    return values, least


@dataclass(frozen=True, slots=True)
class Closed:
    """A program with its knobs closed, and which member of which space that is."""

    program: Program
    choice: Choice
    space: Space


def closed_form(program: Program, names: tuple[str, ...], read: Program, sizes: Mapping[str, int], config: Config,
                observe: Observer, named: tuple[str, ...] = ()) -> Closed:
    """`program` after the rewrites of `names`, with its knobs closed: as was measured to be best, where the cache knows
    it, else by the cost model.

    Where the algebra has other forms that may be faster (`memcomp.choice`) they are made too; the last proof says which
    was taken, and why.  sizes: as for `compile_program`, of `read`; named: ranks whose size no shape shows.
    """
    forms, words, space = opened(program, names, read, sizes, config, observe)
    made = by_measurement(program, named, read, sizes, space, config) if names else None
    if made is None:
        made = by_model(forms, words, space, config)
    for station, value in (*forms[made.choice.form].seen, ("tune", made.program)):
        observe(station, value)
    steady(made.program)
    return made


def by_model(forms: Mapping[str, Opened], words: str, space: Space, config: Config) -> Closed:
    """The cost model's choice; of forms between which it sees no difference the first that the machine can run.  The
    backend says which of its settings it takes then."""
    spent, fit = {words: 0.0}, strain(config) or lowers
    if len(forms) > 1:  # what has no rival needs no figure
        spent = {what: seconds(f.closed, f.extents) for what, f in forms.items()}

    @cache
    def able(what: str) -> bool:
        return what == words or fit(forms[what].closed) < math.inf

    least = next(spent[what] for what in sorted(forms, key=spent.__getitem__) if able(what))
    chosen = next(what for what in forms if spent[what] <= (1 + TIE) * least and able(what))  # the plainest comes first
    f = forms[chosen]
    closed = f.closed
    if len(forms) > 1:
        told = ", not ".join(f"{what}, {spent[what]:.3g} s" for what in (chosen, *(x for x in forms if x != chosen)))
        at = ", ".join(f"{r}={n}" for r, n in f.extents.items())
        closed = replace(closed, proofs=(*closed.proofs, f"by cost{' at ' * bool(at)}{at}: {told}"))
    if setting := preferred(f.closed, f.extents, config):
        closed = replace(closed, proofs=(*closed.proofs, f"by cost: {setting}"))
    return Closed(closed, replace(space.choice(chosen, f.values), setting=setting), space)


def by_measurement(general: Program, named: tuple[str, ...], read: Program, sizes: Mapping[str, int], space: Space,
                   config: Config) -> Closed | None:
    """What was measured to be best on this machine, now where the options ask for it; None where nothing was, or
    nothing may be asked."""
    kept = stores(config)
    if kept is None:
        return None
    asked = problem(general, named, shape_sizes(read, general, sizes), config.backend)
    entry = kept.get(asked, environment(device_of(config)))
    if entry is not None and entry.choice.form not in space.forms:
        entry = None  # sizes near these have forms that these have not (shares of a loop)
    if entry is None and config.tune != "cached" and space.open:
        entry = tuned(read, config, sizes, kept, kept.hints(asked, environment(device_of(config))))
    if entry is None:
        return None
    try:
        closed = space.closed(entry.choice)
    except OptionError as error:
        warnings.warn(f"memcomp: the cache's entry {entry.key} is not used: {error}", CacheWarning, stacklevel=2)
        return None
    said = f"by measurement: {entry.measured.median:.3g} s, the next best {entry.measured.runner_up:.3g} s"
    return Closed(replace(closed, proofs=(*closed.proofs, said)), entry.choice, space)


def stores(config: Config) -> Layers | None:
    """Where results of tuning lie that hold for this machine; None where none may be asked for, or there are none and
    none are made."""
    if config.tune == "off" or config.interpret:
        return None
    found = layers(config.cache_dir, config.cache)
    if found.empty and config.tune == "cached":
        return None
    return found if present(device_of(config)) else None


def tuned(read: Program, config: Config, sizes: Mapping[str, int], kept: Layers,
          hints: list[Entry]) -> Entry | None:
    """Search for the fastest way to map a program, and keep what is found; a warning where it cannot be kept, or
    (None) where no search can begin."""
    from memcomp.tune.progress import bar
    from memcomp.tune.search import Missing, tuner

    try:
        with bar(read.name) as watch:
            entry = tuner().tune(read, config, sizes, mode=config.tune, hints=hints, watch=watch)
    except (Missing, OSError) as error:
        warnings.warn(f"memcomp: {read.name} is not tuned, and mapped as the cost model says: {error}", CacheWarning,
                      stacklevel=2)
        return None
    try:
        if kept.writable is None:
            raise PermissionError("it is off or read only")
        kept.writable.put(entry)  # nothing that may be taken was there
    except OSError as error:
        warnings.warn(f"memcomp: what was tuned for {read.name} is not kept in the cache: {error}", CacheWarning,
                      stacklevel=2)
    return entry
