"""One way, no way back: a program that was read becomes a closed program, tiles, text, a callable.

Imports no torch; `memcomp.backend` and the command line both go through here.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, TypeAlias

from memcomp.cache import CacheWarning, Choice, Entry, Layers, environment, layers, present
from memcomp.choice import TIE, alternatives, seconds
from memcomp.config import Config
from memcomp.ir.cascade import extent_of
from memcomp.ir.errors import MemcompError, OptionError, Refusal, nearest
from memcomp.ir.program import Program, close
from memcomp.ir.register import definitions
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.ir.verify import verify
from memcomp.passes import PIPELINE
from memcomp.recheck import recheck
from memcomp.sizes import evaluate, input_shapes, solve, sources
from memcomp.tune.model import modelled
from memcomp.tune.space import Space, buckets, problem

STATIONS = ("capture", *PIPELINE, "tune", "lower", "emit")
CANONICAL = PIPELINE.index("canonicalize") + 1  # the form in which the user's passes are counted
GENERAL = PIPELINE.index("generalize") + 1  # what comes after works on the program that equal layers share
ABI = 1  # of a built kernel's call: tensors in the order of its params, then sizes
EXAMPLE_EXTENT = 1024  # stands for a symbolic extent without a bound where candidates are only ranked

Observer: TypeAlias = Callable[[str, object], None]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the stations made of one program.

    digest:  of the generalised program: everything after it depends on nothing else but target and options.
    before:  the canonical program; its passes are what the user's form costs.
    program: closed and mapped.
    problem, choice: what the tuning cache calls the program, and the way that was taken.
    """

    digest: str
    before: Program
    program: Program
    tiles: TileProgram
    kernel: Kernel
    entry: Callable[..., Any]
    problem: Mapping[str, Any]
    choice: Choice


_LOCK = threading.RLock()
_Near: TypeAlias = tuple[tuple[str, int], ...]  # sizes, as far as mappings differ with them
_READ: dict[tuple[Program, tuple[str, ...], Config, _Near], Compiled] = {}  # equal layers take the first exit
_BUILT: dict[tuple[str, tuple[str, ...], Config, _Near], Compiled] = {}


def observers(config: Config, observe: Observer | None = None) -> Observer:
    """`observe`, after the stations that MEMCOMP_DUMP asks for were printed to stderr.

    A backend's name (`tvm`) means the emitted text.
    """

    def seen(station: str, value: object) -> None:
        names = {station, value.backend} if isinstance(value, Kernel) else {station}
        if names & set(config.dump):
            print(f"# {station}\n{text_of(value)}", file=sys.stderr, flush=True)
        if observe is not None:
            observe(station, value)

    return seen


def text_of(value: object) -> str:
    """The text of what a station made: a program, tiles or a kernel."""
    return value.source if isinstance(value, Kernel) else str(value)


def rewrite(program: Program, *, observe: Observer, names: tuple[str, ...] = PIPELINE,
            options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Program:
    """Run the rewrites of `names` in order on a verified program, and verify what each makes.

    options: of a rewrite, by its name.
    """
    for name in names:
        step = getattr(import_module(f"memcomp.passes.{name}"), name)
        rewritten = step(program, **options.get(name, {}))
        if rewritten is not program:
            verify(rewritten, since=program)
        program = rewritten
        observe(name, program)
    return program


def backend_of(config: Config) -> str:
    """The codegen backend that writes the kernels."""
    from memcomp.ir.target import target

    return config.backend or target(config.target).backend


def emit(program: Program, *, config: Config, observe: Observer) -> tuple[TileProgram, Kernel]:
    """Tiles and kernel text of a closed program."""
    from memcomp.codegen.lower import lower
    from memcomp.ir.target import target

    tiles = lower(program)
    observe("lower", tiles)
    kernel: Kernel = _codegen(backend_of(config)).emit(tiles, target(config.target))
    observe("emit", kernel)
    return tiles, kernel


def overwriting(compiled: Compiled, at: int, config: Config) -> tuple[TileProgram, Kernel]:
    """The same kernel with its output over the memory of the input at position `at`."""
    from memcomp.codegen.overwrite import overwrite
    from memcomp.ir.target import target

    tiles = overwrite(compiled.tiles, compiled.tiles.params[at].name)
    kernel: Kernel = _codegen(compiled.kernel.backend).emit(tiles, target(config.target))
    return tiles, kernel


def overwritable(compiled: Compiled) -> list[int]:
    """Positions of the inputs whose memory the output may take, as far as the kernel goes."""
    from memcomp.codegen.overwrite import overwritable

    names = overwritable(compiled.tiles)
    return [k for k, p in enumerate(compiled.tiles.params) if p.name in names]


def device_of(config: Config) -> str:
    """Where the tensors are that kernels take: "cpu" or "cuda"."""
    return str(_codegen(backend_of(config)).DEVICE)


def build(kernel: Kernel, config: Config) -> Callable[..., Any]:
    """A callable(*tensors, *sizes) of the emitted text.  Raises Refusal where its compiler is not installed."""
    backend = _codegen(kernel.backend)
    try:
        if config.interpret and backend.DEVICE != "cpu":
            return backend.interpreted(kernel)  # type: ignore[no-any-return]
        if backend.DEVICE == "cuda":
            from memcomp.artifact.launch import Launched

            return Launched.of(kernel, backend)
        return backend.build(kernel)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise Refusal(f"the backend {kernel.backend} needs {error.name}, which is not installed") from error


def backends() -> list[str]:
    """Names of the codegen backends: the folder is the registry."""
    import memcomp.codegen

    return sorted(m.name for m in iter_modules(memcomp.codegen.__path__) if m.ispkg)


def backends_for(device: str) -> list[str]:
    """Those whose kernels take tensors on `device` ("cpu", "cuda"), as far as what they need is installed."""
    found = []
    for name in backends():
        with suppress(ModuleNotFoundError):
            if _codegen(name).DEVICE == device:
                found.append(name)
    return found


def _codegen(name: str) -> Any:
    if name not in backends():
        raise OptionError(f"unknown backend {name!r}", hint=nearest(name, backends()))
    return import_module(f"memcomp.codegen.{name}")


def compile_program(read: Program, *, config: Config, sizes: Mapping[str, int] | None = None,
                    observe: Observer | None = None) -> Compiled:
    """From the program as read to a callable; equal general programs share one kernel where they are mapped alike.

    sizes: extents that candidates are ranked with, by rank name of `read`; others come from `read`, from a bound, or
    are `EXAMPLE_EXTENT`.  Raises Refusal where a station cannot go on.
    """
    read = replace(read, target=config.target)
    deciding = Config(target=config.target, backend=config.backend, tune=config.tune, interpret=config.interpret)
    stores = _stores(config)
    if stores:  # what is measured, and where it is looked up, decides too
        deciding = replace(deciding, cache=config.cache, cache_dir=str(stores.stores[0].root) if stores.stores else "")
    same = (replace(read, name=""), definitions(read), deciding, buckets(read, sizes or {}))
    with _LOCK:
        if same in _READ and observe is None:
            return _READ[same]
        see = observers(config, observe)
        verify(read)
        see("capture", read)
        before = rewrite(read, observe=see, names=PIPELINE[:CANONICAL])
        general = rewrite(before, observe=see, names=PIPELINE[CANONICAL:GENERAL])
        named = _named(general)
        extents = shape_sizes(read, general, sizes or {})
        key = (general.digest, named, deciding, buckets(general, extents))
        if key not in _BUILT or observe is not None:
            made = closed_form(general, PIPELINE[GENERAL:], read, sizes or {}, config, see, named)
            chosen = replace(config, backend=made.choice.backend or config.backend)
            mapped = (made.program.digest, named, replace(deciding, backend=chosen.backend), ())
            if key not in _BUILT:
                recheck(general, made.program)
            if mapped not in _BUILT or observe is not None:
                tiles, kernel = emit(made.program, config=chosen, observe=see)
                if mapped not in _BUILT:  # other sizes may be mapped alike
                    _BUILT[mapped] = Compiled(general.digest, before, made.program, tiles, kernel,
                                              build(kernel, chosen), {}, made.choice)
            asked = problem(general, named, extents, config.backend, made.space)
            _BUILT.setdefault(key, replace(_BUILT[mapped], digest=general.digest, before=before, program=made.program,
                                           problem=asked, choice=made.choice))
        return _READ.setdefault(same, _BUILT[key])


@dataclass(frozen=True, slots=True)
class Tunable:
    """A program whose ways of being mapped are to be compiled one after another.  extents: of `general`; others that
    rank candidates: of `forms`."""

    read: Program
    before: Program
    general: Program
    named: tuple[str, ...]
    forms: Mapping[str, Opened]
    plain: str
    space: Space
    extents: Mapping[str, int]
    config: Config

    @property
    def problem(self) -> dict[str, Any]:
        return problem(self.general, self.named, self.extents, self.config.backend, self.space)

    @property
    def modelled(self) -> Choice:
        """The cost model's choice."""
        return _modelled(self.forms, self.plain, self.space, _strain(self.config) or _lowers).choice

    def compiled(self, choice: Choice) -> Compiled:
        """The kernel of a member of the space, built.  Raises Refusal where it has none, OptionError for no member."""
        config, closed = replace(self.config, backend=choice.backend or self.config.backend), self.space.closed(choice)
        tiles, kernel = emit(closed, config=config, observe=observers(Config()))
        recheck(self.general, closed)
        return Compiled(self.general.digest, self.before, closed, tiles, kernel, build(kernel, config), self.problem,
                        choice)


def tunable(read: Program, *, config: Config, sizes: Mapping[str, int] | None = None) -> Tunable:
    """Open a program.  Arguments and errors as of `compile_program`."""
    read, see = replace(read, target=config.target), observers(Config())
    verify(read)
    before = rewrite(read, observe=see, names=PIPELINE[:CANONICAL])
    general = rewrite(before, observe=see, names=PIPELINE[CANONICAL:GENERAL])
    forms, plain, space = opened(general, PIPELINE[GENERAL:], read, sizes or {}, config, see)
    return Tunable(read, before, general, _named(general), forms, plain, space,
                   shape_sizes(read, general, sizes or {}), config)


def _named(general: Program) -> tuple[str, ...]:
    """Ranks whose size no shape shows: a digest does not know names, and these are passed by name."""
    shown = sources(input_shapes(general.cascade))
    return tuple(r.name for r in general.cascade.ranks if r.extent is None and r.name not in shown)


def gains(read: Program) -> tuple[bool, tuple[str, ...]]:
    """Does the derived form walk an input less often along a rank that no result has?  (Where a result has it, one pass
    reads and one writes, which other compilers' kernels do too.)  And why it does not: laws that are missing, passes
    that remain."""
    from memcomp.analysis import chain_text
    from memcomp.ir.traversal import passes, traversals
    from memcomp.passes.reduce_passes import refusals

    see, names = observers(Config()), PIPELINE[:PIPELINE.index("reduce_passes") + 1]
    verify(read)
    before = rewrite(read, observe=see, names=names[:CANONICAL])
    after = rewrite(before, observe=see, names=names[CANONICAL:])
    was, now = passes(before), passes(after)
    written = {r for t in before.cascade.outputs() for r in t.ranks}
    ins = [(t.name, r) for t in before.cascade.inputs() for r in t.ranks if r not in written]
    why = [f"{r.where}: {r.why}" for r in refusals(after)]
    given = {t.name for t in before.cascade.inputs()}
    most = max((t for t in traversals(after) if t.tensor in given), key=lambda t: t.passes, default=None)
    if not why and most is not None and most.passes > 1:
        why.append(f"{most.passes} passes over {most.rank} in any form ({chain_text(most)}), which torch's own kernels "
                   'take too; the option chains="all" takes it')
    return any(now.get(x, 0) < was.get(x, 0) for x in ins), tuple(why)


def map_program(read: Program, *, config: Config, sizes: Mapping[str, int] | None = None) -> Program:
    """The closed program of `read`, without its kernels; one that comes with a mapping keeps it.

    sizes: as for `compile_program`.  Raises Refusal where a station cannot go on.
    """
    read = replace(read, target=config.target)
    see = observers(config)
    verify(read)
    see("capture", read)
    if read.mapping.groups:
        return closed_form(read, (), read, sizes or {}, config, see).program
    general = rewrite(read, observe=see, names=PIPELINE[:GENERAL])
    return closed_form(general, PIPELINE[GENERAL:], read, sizes or {}, config, see, _named(general)).program


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
    made = _measured(program, named, read, sizes, space, config) if names else None
    if made is None:
        made = _modelled(forms, words, space, _strain(config) or _lowers)
    for station, value in (*forms[made.choice.form].seen, ("tune", made.program)):
        observe(station, value)
    return made


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
    strain = _strain(config)

    def form(options: Mapping[str, Any], seen: list[tuple[str, object]]) -> Opened:
        mapped = rewrite(program, observe=lambda *x: seen.append(x), names=names, options={"reduce_passes": options})
        extents = shape_sizes(read, mapped, sizes)
        values = modelled(mapped, extents, strain)
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
    return forms, words, Space({what: f.mapped for what, f in forms.items()})


def _stores(config: Config) -> Layers | None:
    """Where results of tuning lie that hold for this machine; None where none may be asked for, or there are none and
    none are made."""
    if config.tune == "off" or config.interpret:
        return None
    stores = layers(config.cache_dir, config.cache)
    if stores.empty and config.tune == "cached":
        return None
    return stores if present(device_of(config)) else None


def tuned(read: Program, config: Config, sizes: Mapping[str, int], stores: Layers,
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
        if stores.writable is None:
            raise PermissionError("it is off or read only")
        stores.writable.put(entry)  # nothing that may be taken was there
    except OSError as error:
        warnings.warn(f"memcomp: what was tuned for {read.name} is not kept in the cache: {error}", CacheWarning,
                      stacklevel=2)
    return entry


def _modelled(forms: Mapping[str, Opened], words: str, space: Space, strain: Callable[[Program], float]) -> Closed:
    """The cost model's choice; of forms between which it sees no difference the first that the machine can run."""
    spent = {words: 0.0}
    if len(forms) > 1:  # what has no rival needs no figure
        spent = {what: seconds(f.closed, f.extents) for what, f in forms.items()}

    @cache
    def able(what: str) -> bool:
        return what == words or strain(forms[what].closed) < math.inf

    least = next(spent[what] for what in sorted(forms, key=spent.__getitem__) if able(what))
    chosen = next(what for what in forms if spent[what] <= (1 + TIE) * least and able(what))  # the plainest comes first
    f = forms[chosen]
    closed = f.closed
    if len(forms) > 1:
        told = ", not ".join(f"{what}, {spent[what]:.3g} s" for what in (chosen, *(x for x in forms if x != chosen)))
        at = ", ".join(f"{r}={n}" for r, n in f.extents.items())
        closed = replace(closed, proofs=(*closed.proofs, f"by cost{' at ' * bool(at)}{at}: {told}"))
    return Closed(closed, space.choice(chosen, f.values), space)


def _measured(general: Program, named: tuple[str, ...], read: Program, sizes: Mapping[str, int], space: Space,
              config: Config) -> Closed | None:
    """What was measured to be best on this machine, now where the options ask for it; None where nothing was, or
    nothing may be asked."""
    stores = _stores(config)
    if stores is None:
        return None
    asked = problem(general, named, shape_sizes(read, general, sizes), config.backend, space)
    entry = stores.get(asked, environment(device_of(config)))
    if entry is None and config.tune != "cached" and len(space) > 1:
        entry = tuned(read, config, sizes, stores, stores.hints(asked, environment(device_of(config))))
    if entry is None:
        return None
    try:
        closed = space.closed(entry.choice)
        if config.backend and entry.choice.backend not in ("", config.backend):
            raise OptionError(f"it is of the backend {entry.choice.backend}, and {config.backend} was asked for")
        if device_of(replace(config, backend=entry.choice.backend or config.backend)) != device_of(config):
            raise OptionError(f"the backend {entry.choice.backend} is for another device")
    except OptionError as error:
        warnings.warn(f"memcomp: the cache's entry {entry.key} is not used: {error}", CacheWarning, stacklevel=2)
        return None
    said = f"by measurement: {entry.measured.median:.3g} s, the next best {entry.measured.runner_up:.3g} s"
    return Closed(replace(closed, proofs=(*closed.proofs, said)), entry.choice, space)


def _strain(config: Config) -> Callable[[Program], float] | None:
    """How badly a closed program's kernels fit the machine, where the backend can tell before it compiles them."""
    from memcomp.ir.target import target

    admits = getattr(_codegen(backend_of(config)), "admits", None)
    if admits is None:
        return None

    def strain(closed: Program) -> float:
        from memcomp.codegen.lower import lower

        try:
            return float(admits(lower(closed), target(config.target)))
        except Refusal:
            return math.inf

    return strain


def _lowers(closed: Program) -> float:
    """0 for a program that has a tile form, else infinity."""
    from memcomp.codegen.lower import lower

    try:
        lower(closed)
    except Refusal:
        return math.inf
    return 0.0


def fixed(program: Program) -> dict[str, int]:
    """Ranks whose extent is a number."""
    extents = ((r.name, extent_of(program.cascade, r.name)) for r in program.cascade.ranks)
    return {name: x for name, x in extents if x is not None}


def shape_sizes(read: Program, program: Program, known: Mapping[str, int]) -> dict[str, int]:
    """An extent for every symbolic rank of `program`, a rewritten form of `read`, which stands for the same tensors.

    known: extents of symbolic ranks of `read`; one that is not known is its bound or `EXAMPLE_EXTENT`.
    """
    given = fixed(read) | {r.name: known.get(r.name, r.bound or EXAMPLE_EXTENT)
                           for r in read.cascade.ranks if r.extent is None}
    shapes = [[evaluate(x, given) for x in shape] for shape in input_shapes(read.cascade)]
    found = given | solve(program.cascade, shapes)
    return {r.name: found.get(r.name, r.bound or EXAMPLE_EXTENT) for r in program.cascade.ranks if r.extent is None}


def forget() -> None:
    """Drop the kernels built so far (running ones stay alive with who uses them)."""
    with _LOCK:
        _READ.clear()
        _BUILT.clear()
