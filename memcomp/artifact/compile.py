"""From a model to the directory that runs it: `memcomp compile`.  Needs torch and the backends' compilers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import fx

from memcomp.artifact import weights
from memcomp.artifact.exported import Exported, export
from memcomp.artifact.manifest import Lookup
from memcomp.artifact.plan import Plan
from memcomp.artifact.planner import Planner
from memcomp.backend import region_sizes
from memcomp.backends import device_of
from memcomp.cache import environment
from memcomp.capture.candidates import source
from memcomp.capture.find import find_regions
from memcomp.capture.lookups import ancestors, lookups
from memcomp.capture.reader import meta
from memcomp.capture.region import Region
from memcomp.capture.rest import Foreign, parts
from memcomp.config import Config
from memcomp.forms import stores
from memcomp.inputs import Function
from memcomp.ir.errors import InputError, MemcompError, OptionError, Refusal
from memcomp.ir.program import Program
from memcomp.pipeline import Compiled, compile_program
from memcomp.sizes import input_shapes, sources


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name in the artifact: what was read, and what each target makes of it.

    source: of the first region that calls it; calls: how many do; lookups: of index tensors; ranges: of its symbolic
    ranks."""

    name: str
    read: Program
    compiled: Mapping[str, Compiled]
    source: str
    calls: int = 1
    lookups: tuple[Lookup, ...] = ()
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What a directory is written of.  torch: operators that run in torch: name, where, why."""

    name: str
    kernels: tuple[Kernel, ...]
    configs: tuple[Config, ...]
    plan: Plan | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    torch: tuple[tuple[str, str, str], ...] = ()


def whole(given: Function | Program, configs: Sequence[Config], *, name: str = "model") -> Made:
    """The whole model: a plan whose steps are kernels of memcomp's and, where none can be made, operators of torch.

    configs: one a target, all for CPUs.  Raises Refusal with the list of operators that would need torch where
    the options are `strict`, and where a model cannot be kept; InputError where torch cannot export it.
    """
    if isinstance(given, Program):
        return _program(given, configs, name)
    if gpus := [c.target for c in configs if device_of(c) != "cpu"]:
        raise OptionError(f"a whole model for {gpus[0]}", "its tensors would lie in the memory of a GPU",
                          "--regions makes kernels for GPUs, to be called from a torch model")
    exported = export(given)
    book = _Book(configs)
    found = parts(exported.gm, _regions(exported.gm, configs[0], book, "all"), book.works)
    foreign = tuple((str(p.node.target), source(p.node), p.why) for p in found if isinstance(p, Foreign))
    if configs[0].strict and foreign:
        rows = "\n".join(f"  {op} ({where}): {why.splitlines()[0]}" for op, where, why in dict.fromkeys(foreign))
        count = f"{len(foreign)} operator{'s' * (len(foreign) > 1)}"
        raise Refusal(f"{count} would need torch at run time\n{rows}",
                      hint="without --strict the artifact runs them with torch")
    planner = Planner(exported)
    for part in found:
        planner.add(part, book.kernel(part) if isinstance(part, Region) else "")
    plan = planner.plan()
    return Made(name, book.kernels(), tuple(configs), plan, planner.weights, foreign)


def regions(given: Function | Program, configs: Sequence[Config], *, name: str = "regions") -> Made:
    """The kernels of a model's attention and memory layers alone, by name, to be called from torch.

    Raises InputError where there is none; a region that cannot be compiled is left out, with `strict` of a config it is
    an error.
    """
    if isinstance(given, Program):
        return _program(given, configs, name)
    exported = export(given)
    book = _Book(configs)
    for r in _regions(exported.gm, configs[0], book, configs[0].chains):
        book.kernel(r, exported)
    if not book.found:
        raise InputError("nothing in it is an attention or memory layer that memcomp can express",
                         hint="`memcomp explain` says what was left to torch and why")
    return Made(name, book.kernels(), tuple(configs))


def _program(given: Program, configs: Sequence[Config], name: str) -> Made:
    """A program as a kernel, without a model around it."""
    compiled = {c.target: compile_program(given, config=c) for c in configs}
    return Made(name, (Kernel(given.name or "kernel", given, compiled, given.name),), tuple(configs))


def write(made: Made, place: Path) -> str:
    """The directory, whole or not at all; returns the digest of its manifest."""
    from safetensors.torch import save_file

    from memcomp.artifact.pack import Pack

    pack = Pack(made.name)
    for k in made.kernels:
        pack.kernel(k.read, dict(k.compiled), k.name, k.lookups, k.ranges)
    for c in made.configs if not made.kernels else ():
        pack.target(c.target)
    tuning = [_tuned(k.name, k.compiled[c.target], c) for k in made.kernels for c in made.configs]
    pack.file("tuning.json", (json.dumps(tuning, indent=1, sort_keys=True) + "\n").encode())
    with TemporaryDirectory() as folder:
        if made.weights:
            save_file({n: _alone(t) for n, t in made.weights.items()}, Path(folder) / weights.FILE)
            pack.file(weights.FILE, Path(folder) / weights.FILE)
        return pack.write(place, made.plan)


def _tuned(name: str, compiled: Compiled, config: Config) -> dict[str, Any]:
    """Which way of mapping a kernel was taken, and the entry of the cache that says so; null: the cost model."""
    kept, choice = stores(config), compiled.choice
    entry = kept.get(compiled.problem, environment(device_of(config))) if kept and compiled.problem else None
    return {"kernel": name, "target": config.target, "backend": compiled.kernel.backend, "form": choice.form,
            "knobs": dict(choice.knobs), "setting": choice.setting,
            "entry": json.loads(entry.text()) if entry is not None and entry.choice == choice else None}


def _alone(t: torch.Tensor) -> torch.Tensor:
    """In memory of its own, as the library wants it."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


class _Book:
    """Kernels by the program that they compute: equal layers share one."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs = configs
        self.found: dict[Program, Kernel] = {}
        self._why: dict[Program, str] = {}
        self._compiled: dict[Program, dict[str, Compiled]] = {}

    def works(self, region: Region) -> str:
        """Why one of the targets has no kernel for it, "" where all have."""
        program = _nameless(region.program)
        if program not in self._why:
            try:
                sizes = region_sizes(region)
                self._compiled[program] = {c.target: compile_program(region.program, config=c, sizes=sizes)
                                           for c in self.configs}
                self._why[program] = ""
            except MemcompError as error:
                self._why[program] = error.what
        return self._why[program]

    def kernel(self, region: Region, alone: Exported | None = None) -> str:
        """The name of a region's kernel.  alone: the model, where the kernel is called without a plan, and so looks
        itself at sizes and index tensors."""
        program = _nameless(region.program)
        if program in self.found:
            known = self.found[program]
            self.found[program] = replace(known, calls=known.calls + 1)
            return known.name
        if why := self.works(region):
            raise Refusal(why, region.source)
        names = {k.name for k in self.found.values()}
        base = region.program.name
        name = next(n for n in (base, *(f"{base}_{k}" for k in range(2, len(names) + 3))) if n not in names)
        self.found[program] = Kernel(name, replace(region.program, name=name), self._compiled[program], region.source,
                                     lookups=_lookups(region) if alone else (),
                                     ranges=_ranges(region, alone) if alone else {})
        return name

    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(self.found.values())


def _nameless(program: Program) -> Program:
    return replace(program, name="")


def _regions(gm: fx.GraphModule, config: Config, book: _Book, which: str) -> list[Region]:
    """The regions of a graph that work."""
    found, _ = find_regions(gm, which)
    apart: set[frozenset[fx.Node]] = set()
    while more := {r.optional for r in found if r.optional and book.works(r)} - apart:
        apart |= more
        found, _ = find_regions(gm, which, apart)
    bad = [(r, why) for r in found if (why := book.works(r))]
    if bad and config.strict:
        raise Refusal(bad[0][1], bad[0][0].source)
    return [r for r in found if not book.works(r)]


def _lookups(region: Region) -> tuple[Lookup, ...]:
    """What a call of a region's kernel checks.  Refusal where the kernel does not take what torch would look at."""
    out = []
    shown = {str(n): t.ranks[d] for t, node in zip(region.program.cascade.inputs(), region.inputs, strict=True)
             for d, n in enumerate(meta(node).shape)}
    for x in lookups(ancestors(region)):
        size = meta(x.read).shape[x.dim]
        if x.index not in region.inputs or not isinstance(size, int) and str(size) not in shown:
            raise Refusal(f"{x.index} names elements, and its kernel does not take it", region.source)
        out.append(Lookup(region.inputs.index(x.index), str(size) if isinstance(size, int) else shown[str(size)],
                          x.wraps, x.ignored))
    return tuple(out)


def _ranges(region: Region, exported: Exported) -> dict[str, tuple[int, int | None]]:
    """What the model's sizes may be, of those that the kernel has."""
    known = {s.name: (s.least, s.most) for s in exported.sizes}
    found = {}
    for rank, (i, d, divisor) in sources(input_shapes(region.program.cascade)).items():
        text = exported.text(meta(region.inputs[i]).shape[d])
        if divisor == 1 and text in known:
            found[rank] = known[text]
    return found
