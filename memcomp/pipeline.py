"""One way, no way back: a program that was read becomes a closed program, tiles, text, a callable.

Imports no torch; `memcomp.backend` and the command line both go through here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from memcomp.backends import build, emit
from memcomp.cache import Choice
from memcomp.config import Config
from memcomp.forms import Opened, by_model, closed_form, opened, stores
from memcomp.ir.program import Program
from memcomp.ir.register import definitions
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.ir.verify import verify
from memcomp.passes import PIPELINE
from memcomp.recheck import recheck
from memcomp.sizes import input_shapes, shape_sizes, sources
from memcomp.stations import CANONICAL, GENERAL, Observer, observers, rewrite
from memcomp.tune.space import Space, buckets, problem

ABI = 1  # of a built kernel's call: tensors in the order of its params, then sizes
_LOCK = threading.RLock()
_Near: TypeAlias = tuple[tuple[str, int], ...]  # sizes, as far as mappings differ with them
_READ: dict[tuple[Program, tuple[str, ...], Config, _Near], Compiled] = {}  # equal layers take the first exit
_BUILT: dict[tuple[str, tuple[str, ...], Config, _Near, str], Compiled] = {}


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


def compile_program(read: Program, *, config: Config, sizes: Mapping[str, int] | None = None,
                    observe: Observer | None = None) -> Compiled:
    """From the program as read to a callable; equal general programs share one kernel where they are mapped alike.

    sizes: extents that candidates are ranked with, by rank name of `read`; others come from `read`, from a bound, or
    are `EXAMPLE_EXTENT`.  Raises Refusal where a station cannot go on.
    """
    read = replace(read, target=config.target)
    deciding = Config(target=config.target, backend=config.backend, tune=config.tune, interpret=config.interpret)
    kept = stores(config)
    if kept:  # what is measured, and where it is looked up, decides too
        deciding = replace(deciding, cache=config.cache, cache_dir=str(kept.stores[0].root) if kept.stores else "")
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
        key = (general.digest, named, deciding, buckets(general, extents), "")
        if key not in _BUILT or observe is not None:
            made = closed_form(general, PIPELINE[GENERAL:], read, sizes or {}, config, see, named)
            chosen = replace(config, backend=made.choice.backend or config.backend)
            mapped = (made.program.digest, named, replace(deciding, backend=chosen.backend), (), made.choice.setting)
            if key not in _BUILT:
                recheck(general, made.program)
            if mapped not in _BUILT or observe is not None:
                tiles, kernel = emit(made.program, config=chosen, observe=see, setting=made.choice.setting)
                if mapped not in _BUILT:  # other sizes may be mapped alike
                    _BUILT[mapped] = Compiled(general.digest, before, made.program, tiles, kernel,
                                              build(kernel, chosen), {}, made.choice)
            asked = problem(general, named, extents, config.backend)
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
        return problem(self.general, self.named, self.extents, self.config.backend)

    @property
    def modelled(self) -> Choice:
        """The cost model's choice."""
        return by_model(self.forms, self.plain, self.space, self.config).choice

    def compiled(self, choice: Choice) -> Compiled:
        """The kernel of a member of the space, built.  Raises Refusal where it has none, OptionError for no member."""
        config, closed = replace(self.config, backend=choice.backend or self.config.backend), self.space.closed(choice)
        tiles, kernel = emit(closed, config=config, observe=observers(Config()), setting=choice.setting)
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


def _named(general: Program) -> tuple[str, ...]:
    """Ranks whose size no shape shows: a digest does not know names, and these are passed by name."""
    shown = sources(input_shapes(general.cascade))
    return tuple(r.name for r in general.cascade.ranks if r.extent is None and r.name not in shown)


def forget() -> None:
    """Drop the kernels built so far (running ones stay alive with who uses them)."""
    with _LOCK:
        _READ.clear()
        _BUILT.clear()
