"""explain: what was read, what became of it, what it costs; as values and as a table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from memcomp.analysis import Analysis, analyse
from memcomp.config import config
from memcomp.ir.program import Program
from memcomp.pipeline import Compiled, compile_program
from memcomp.rounds import Rounds, rounds
from memcomp.sizes import shape_sizes
from memcomp.waits import waits
from memcomp.wide import Wide, wide

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memcomp.ir.cost import LevelCost


@dataclass(frozen=True, slots=True)
class Refused:
    """Something that stays with torch, or a reduction that stays a pass of its own: where, why, and the lower bound
    on its passes where one is proved (none is yet: a law that the table lacks proves nothing)."""

    where: str
    why: str
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.why}" + (f" (bound: {self.bound})" if self.bound else "")


@dataclass(frozen=True, slots=True)
class KernelText:
    """One emitted kernel; backend: who wrote it; scratch: bytes that a thread holds in buffers while it runs."""

    name: str
    source: str = field(repr=False)
    scratch: int = 0
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes over each (tensor, rank): of the form that was read, and of the form that runs."""

    before: Mapping[tuple[str, str], int]
    after: Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes between the kernels and memory per call; compulsory: each input read once, each output written once;
    levels: the same for every level of the machine but the nearest, memory last."""

    bytes: float
    compulsory: float
    levels: tuple[LevelCost, ...] = ()


@dataclass(frozen=True, slots=True)
class RegionReport:
    """One region: as read, as run, and what that costs at `sizes` (of `program`; `known` of them are `read`'s own).

    analysis: of the form that was read, and of the form that runs; wide: ranks of running states that are whole, or run
    in tiles, by cost."""

    source: str
    read: Program
    program: Program
    kernels: tuple[KernelText, ...]
    passes: Passes
    traffic: Traffic
    sizes: Mapping[str, int]
    known: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[Rounds, ...] = ()
    analysis: tuple[Analysis, ...] = ()
    wide: tuple[Wide, ...] = ()

    @property
    def refusals(self) -> tuple[Refused, ...]:
        """The reductions that do not join an earlier pass: edge, operator and missing law, from the proof lines."""
        lines = (line.removeprefix("refused ").partition(": ") for line in self.program.proofs
                 if line.startswith("refused "))
        return tuple(Refused(f"{self.source}: {where}", why) for where, _, why in lines)

    def __str__(self) -> str:
        return _plain(_render((self,), ()))


@dataclass(frozen=True, slots=True)
class Explanation:
    """All regions of a function, in graph order, and what was refused."""

    regions: tuple[RegionReport, ...]
    refusals: tuple[Refused, ...] = ()

    def __str__(self) -> str:
        return _plain(_render(self.regions, self.refusals))

    def __rich__(self) -> RenderableType:
        return _render(self.regions, self.refusals)

    def json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "regions": [{
                "source": r.source, "program": str(r.program), "digest": r.program.digest,
                "kernels": [asdict(k) for k in r.kernels],
                "passes": {"before": _pairs(r.passes.before), "after": _pairs(r.passes.after)},
                "analysis": dict(zip(("before", "after"), (a.json() for a in r.analysis), strict=False)),
                "traffic": {"bytes": r.traffic.bytes, "compulsory": r.traffic.compulsory, "levels": [
                    {"name": x.name, "bytes": x.traffic, "held": x.footprint} for x in r.traffic.levels]},
                "derivation": list(r.program.proofs),
                "rounds": [{"kernel": x.kernel, "loop": x.loop, "total": x.total, "run": x.run, "masked": x.masked,
                            "exact": x.exact} for x in r.rounds],
                "wide": [asdict(x) for x in r.wide], "waits": list(waits(r.program)),
                "sizes": dict(r.sizes), "refusals": [_refusal(x) for x in r.refusals],
            } for r in self.regions],
            "refusals": [_refusal(x) for x in self.refusals],
        }

    def html(self) -> str:
        """The same as one page of HTML that needs nothing else."""
        from memcomp.page import page

        return page(self)


def explain(fn: Callable[..., Any] | Program, *example_inputs: Any, sizes: Mapping[str, int] | None = None,
            **options: Any) -> Explanation:
    """What memcomp makes of `fn` on these inputs: it runs once, eagerly around the kernels (without them, where they
    are for another device).

    fn: a function, an nn.Module, or a `Program` (then without inputs).  options: as for `compile`.
    Traffic is in bytes a call, at the sizes of these inputs (of a `Program`: `sizes`, else its bounds, or 1024).
    Raises OptionError for a wrong option, Refusal where a `Program` or, with `strict`, a region cannot be compiled.
    """
    settings = config({**options, "rest": "eager"})
    if isinstance(fn, Program):
        compiled = compile_program(fn, config=settings, sizes=sizes)
        return Explanation((describe(fn.name, fn, compiled, sizes or {}),))
    import torch
    from torch import fx

    from memcomp.backend import install, region_sizes, uncompiled
    from memcomp.backends import device_of
    from memcomp.runtime import Fallback

    regions: list[RegionReport] = []
    refusals: list[Refused] = []
    elsewhere = device_of(settings) != "cpu"  # the kernels may have no device here: what torch wrote runs
    settings = replace(settings, interpret=elsewhere)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        plain = fx.GraphModule(gm, copy.deepcopy(gm.graph)) if elsewhere else gm
        installed, failed = install(gm, settings)
        regions.extend(describe(i.region.source, i.region.program, i.compiled, region_sizes(i.region))
                       for i in installed)
        refusals.extend(Refused(f.where, f.why) for f in failed)
        return plain.forward

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Fallback)  # they are in the result
        torch.compile(_alone(uncompiled(fn)), backend=backend)(*example_inputs)
    return Explanation(tuple(regions), tuple(refusals))


def _alone(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as torch has not seen it: what torch keeps for `fn`, and how often that may be compiled, is left alone."""
    from memcomp.capture.candidates import OWN_FRAME

    if isinstance(fn, MethodType):
        return MethodType(_alone(fn.__func__), fn.__self__)
    if isinstance(fn, FunctionType):
        twin = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
        twin.__kwdefaults__ = fn.__kwdefaults__
        return twin

    def call(*args: Any) -> Any:
        return fn(*args)

    return FunctionType(call.__code__.replace(co_filename=OWN_FRAME), globals(), closure=call.__closure__)


def describe(source: str, read: Program, compiled: Compiled, known: Mapping[str, int]) -> RegionReport:
    """The report of one program; `known`: extents of its symbolic ranks, others are taken from their bounds."""
    from memcomp.ir.cost import cost
    from memcomp.ir.counts import Sizes
    from memcomp.ir.target import target

    sizes = shape_sizes(read, compiled.program, known)
    extents = Sizes(compiled.program.cascade, sizes)
    whole = {r.var: extents(r.name) for r in compiled.program.cascade.ranks if r.iterative}
    machine = target(compiled.program.target)
    spent = cost(compiled.program, sizes, machine)
    before = analyse(compiled.before, shape_sizes(read, compiled.before, known), machine)
    after = analyse(compiled.program, sizes, machine)
    return RegionReport(
        source, read, compiled.program,
        (KernelText(compiled.kernel.name, compiled.kernel.source, compiled.kernel.scratch,
                    compiled.kernel.backend),),
        Passes(before.passes, after.passes),
        Traffic(spent.traffic, spent.compulsory, spent.levels), sizes, dict(known),
        tuple(x for k in compiled.tiles.kernels for x in rounds(k, sizes, whole)), (before, after),
        wide(compiled.program, sizes, machine))


def _render(regions: Sequence[RegionReport], refusals: Sequence[Refused]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for same in by_kernel(regions):
        first = same[0]
        more = f" and {len(same) - 1} more like it" if len(same) > 1 else ""
        parts.append(Text(f"{first.source}{more}", style="bold"))
        table = Table("tensor", "rank", "passes as read", "passes now", box=None, pad_edge=False)
        after, before = first.passes.after, first.passes.before
        inputs = {t.name for t in first.program.cascade.inputs()}
        repeated = {rank for (_, rank), n in before.items() if n > 1}
        for key, n in before.items():  # fibers walked more than once, and what becomes of all that has the rank
            if key[1] in repeated and (n > 1 or key[0] in inputs):
                table.add_row(*key, str(n), str(after.get(key, "-")))
        parts.append(table)
        for form, analysis in zip(("as read", "now"), first.analysis, strict=False):
            parts += [Text(f"{form}: {line}") for line in analysis.lines(size_of)]
        parts.append(Text("kernel: " + ", ".join(k.name for k in first.kernels)))
        parts += [Text(f"launch {line}") for line in waits(first.program)]
        ratio = first.traffic.bytes / first.traffic.compulsory if first.traffic.compulsory else 1.0
        at = ", ".join(f"{n}={x}" for n, x in sorted(first.sizes.items()))
        parts.append(Text(f"traffic: {size_of(first.traffic.bytes)}, compulsory {size_of(first.traffic.compulsory)} "
                          f"({ratio:.2f}x)" + (f" at {at}" if at else "")))
        if first.traffic.levels and first.traffic.compulsory:
            parts.append(Text("over compulsory, by level: " + ", ".join(
                f"{x.name} {x.traffic / first.traffic.compulsory:.2f}x" for x in first.traffic.levels)))
        parts += [Text(f"tiles: {x.line(size_of)}") for x in first.wide]
        parts += [Text(f"rounds: {x.loop}: {x}") for x in first.rounds]
        parts += [Text(f"derived: {line}") for line in first.program.proofs]
        parts.append(Text(""))
    for why in dict.fromkeys((r.why, r.bound) for r in refusals):
        alike = [r for r in refusals if (r.why, r.bound) == why]
        parts.append(Text(f"left to torch: {alike[0]}" + (f" ({len(alike) - 1} more like it)" if alike[1:] else "")))
    if not regions:
        parts.append(Text("no regions: nothing here is an attention or memory layer that memcomp can express"))
    return Group(*parts)


def by_kernel(regions: Sequence[RegionReport]) -> list[list[RegionReport]]:
    """Regions that run the same kernel at the same sizes, together."""
    groups: dict[tuple[str, tuple[tuple[str, int], ...]], list[RegionReport]] = {}
    for r in regions:
        groups.setdefault((r.program.digest, tuple(sorted(r.sizes.items()))), []).append(r)
    return list(groups.values())


def _plain(value: RenderableType) -> str:
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=120, color_system=None).print(value)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def size_of(n: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def _pairs(passes: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    return [{"tensor": t, "rank": r, "passes": n} for (t, r), n in sorted(passes.items())]


def _refusal(r: Refused) -> dict[str, str]:
    return {"where": r.where, "why": r.why, "bound": r.bound}
