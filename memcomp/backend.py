"""The torch.compile backend: regions of a Dynamo graph become calls of compiled kernels, the rest goes to Inductor.

`torch.compile(model, backend="memcomp", options={...})` arrives at `memcomp`; `compile` is the same by another door.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from torch import fx

from memcomp import runtime
from memcomp.backends import build, device_of, overwritable, overwriting
from memcomp.binding import function, make_entry
from memcomp.config import Config, config
from memcomp.ir.errors import MemcompError, OptionError, Refusal, nearest
from memcomp.passes.generalize import numbers
from memcomp.pipeline import ABI, Compiled, compile_program
from memcomp.reuse import dies, overwrite, tensors_of
from memcomp.sizes import input_shapes, solve, sources
from memcomp.surgery import autocast_at, checks, computes, example, hint, original, replace_region

if TYPE_CHECKING:
    from memcomp.capture.region import Refused, Region

_LOCK = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


def memcomp(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
            mode: str | None = None) -> Callable[..., Any]:
    """A torch.compile backend.

    options: `Config`'s fields by name; mode: handed to Inductor.  Raises OptionError for a wrong option; with
    `strict`, also the Refusal of a region that cannot be compiled.
    """
    settings = config(options)
    _count()
    with _LOCK:
        install(gm, settings)
    return _rest(gm, list(example_inputs), settings, mode)


memcomp.reset = runtime.reset  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def compile(fn: Callable[P, R], *example_inputs: Any, dynamic: bool | None = None, **options: Any) -> Callable[P, R]:
    """`fn` (a function or nn.Module), compiled.

    example_inputs: when given, `fn` runs on them once, here, so that the first call is already fast; lengths (the
    last dimension of integer tensors, the last but one of others) are compiled as symbols.  Without them compilation
    happens at the first call, and a dimension becomes a symbol when it is first seen to change.
    dynamic: as for torch.compile; False fixes all shapes.
    options: the fields of `Config`.  Raises OptionError for a wrong option.
    """
    config(options)
    compiled = torch.compile(fn, backend=functools.partial(memcomp, options=options), dynamic=dynamic)
    if example_inputs:
        compiled(*(example_inputs if dynamic is False else map(_with_symbolic_length, example_inputs)))  # type: ignore[call-arg]
    return compiled


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given, where `fn` is what it returned."""
    from torch._dynamo.eval_frame import OptimizedModule, innermost_fn

    if isinstance(fn, OptimizedModule):
        return cast("Callable[..., Any]", fn._orig_mod)
    return fn if getattr(fn, "_torchdynamo_disable", False) else innermost_fn(fn)


@dataclass(frozen=True)
class Installed:
    """A region of a graph and what its kernel is."""

    region: Region
    compiled: Compiled


def install(gm: fx.GraphModule, settings: Config) -> tuple[list[Installed], list[Refused]]:
    """Replace in `gm` every region that compiles by one call of its kernel; others stay, counted and warned of.

    Returns what was installed and what was not, and why.
    """
    from memcomp.capture.find import find_regions
    from memcomp.capture.region import Refused

    regions: Sequence[Region] = ()
    installed: list[Installed] = []
    failed: list[Refused] = []

    def failure(where: str) -> Callable[[str], None]:
        return lambda why: failed.append(Refused(where, why))

    with boundary("the graph", settings, failure("the graph")):
        regions, refused = find_regions(gm, settings.chains)
        if any([_settle(region) for region in regions]):
            regions, refused = find_regions(gm, settings.chains)
        regions, refused = smaller(gm, regions, refused, settings)
        for r in (r for r in refused if not r.chain):
            with boundary(r.where, settings):
                raise Refusal(r.why, r.where)
        failed += refused
    made: dict[fx.Node, fx.Node] = {}  # what earlier regions give, under their kernels' names
    for found in regions:
        if all(0 in example(n).shape for n in found.outputs):
            continue  # nothing to compute: torch makes the empty tensors
        region = replace(found, inputs=tuple(made.get(n, n) for n in found.inputs),
                         sizes=tuple((s, n if isinstance(n, int) else made.get(n, n)) for s, n in found.sizes))
        where = f"{region.name} ({region.source})"
        with boundary(where, settings, failure(where)):
            compiled, outs = _install_region(gm, region, settings)
            made |= outs
            installed.append(Installed(region, compiled))
    for one in installed:
        with boundary(f"the memory of {one.region.name}", settings):
            _reuse(one, made, settings)
    gm.recompile()
    return installed, failed


@contextmanager
def boundary(where: str, settings: Config, failed: Callable[[str], None] = lambda why: None,
             keeper: str = "torch") -> Iterator[None]:
    """The one place where memcomp's own failure is caught: the part named `where` stays with its keeper, counted and
    warned of; with `strict` the error goes on.  Errors that Dynamo steers itself with always go on."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    try:
        yield
    except (RestartAnalysis, SkipFrame):
        raise
    except Exception as error:
        if settings.strict:
            raise
        what = error.what if isinstance(error, MemcompError) else f"{type(error).__name__}: {error}"
        why = next(iter(what.splitlines()), "")
        failed(why)
        runtime.fall_back(where, why, keeper)


def smaller(gm: fx.GraphModule, regions: Sequence[Region], refused: list[Refused],
            settings: Config) -> tuple[Sequence[Region], list[Refused]]:
    """What `find_regions` found, with those taken apart that may be and of which nothing can be made."""
    from memcomp.capture.find import find_regions

    apart: set[frozenset[fx.Node]] = set()
    while more := {r.optional for r in regions if r.optional and not _compiles(r, settings)} - apart:
        apart |= more
        regions, refused = find_regions(gm, settings.chains, apart)
    return regions, refused


def _compiles(region: Region, settings: Config) -> bool:
    try:
        compile_program(region.program, config=settings, sizes=region_sizes(region))
    except MemcompError:
        return False  # the smaller regions say why, if they cannot be compiled either
    return True


def _install_region(gm: fx.GraphModule, region: Region,
                    settings: Config) -> tuple[Compiled, dict[fx.Node, fx.Node]]:
    symbols = [name for name, _ in region.sizes]
    here, there = {example(n).device.type for n in region.inputs}, device_of(settings)
    if here - {there} and not settings.interpret:
        raise Refusal(f"kernels for {settings.target} take tensors on {there}, these are on {min(here - {there})}",
                      region.source, "name a target of that device (`memcomp targets`)")
    compiled = compile_program(region.program, config=settings, sizes=region_sizes(region))
    kept = original(region) if _differentiated(region) else None
    recompute = runtime.Recompute(kept.module, autocast_at(gm, region.outputs[0])) if kept else None
    checked, named = checks(region, kept)
    # all that a call's result depends on: Inductor keeps graphs on disk, and they hold only this key
    key = hashlib.sha256("\n".join((
        str(ABI), torch.__version__, compiled.kernel.source, str(settings.interpret), region.program.digest,
        str(region.out_order), *symbols,
        f"{kept.text}\n{recompute.autocast}" if kept and recompute else "",
        *(f"{at} {size} {x.wraps} {x.ignored}" for at, size, x in named),
    )).encode()).hexdigest()
    if not runtime.registered(key):
        entry = make_entry(key, region.program, compiled.tiles, compiled.entry, region.out_order, symbols, recompute,
                           min(here, default=there))
        tests = tuple(runtime.Check(at, function([size]), x.wraps, x.ignored) for at, size, x in named)
        runtime.register(replace(entry, checks=tests, checked=len(checked), launches=compiled.kernel.launches))
    outs = replace_region(gm, region, key, kept, checked)
    runtime.count_region(compiled.digest)
    return compiled, outs


def _reuse(one: Installed, made: Mapping[fx.Node, fx.Node], settings: Config) -> None:
    """Let a region write over an input that dies with it."""
    region, compiled = one.region, one.compiled
    out = made[region.outputs[0]]
    call = out.args[0]
    if len(region.outputs) != 1 or _differentiated(region) or not isinstance(call, fx.Node) or \
            call.target is not torch.ops.memcomp.call.default:
        return
    tensors, key = tensors_of(call), str(call.args[2])
    at = next((k for k in overwritable(compiled) if dies(tensors[k], call, out)), None)
    if at is None:
        return
    tiles, kernel = overwriting(compiled, at, settings)
    new = hashlib.sha256(f"{key}\n{kernel.source}".encode()).hexdigest()
    if not runtime.registered(new):
        entry, symbols = runtime.entry(key), [name for name, _ in region.sizes]
        same = make_entry(new, region.program, tiles, build(kernel, settings), region.out_order, symbols, None,
                           example(region.inputs[0]).device.type)
        runtime.register(replace(same, checks=entry.checks, checked=entry.checked, launches=kernel.launches))
    overwrite(call, out, at, new)


def _settle(region: Region) -> bool:
    """Take the number of each symbolic extent that a kernel cannot be without (a head size); another number is then
    another graph.  Says whether there was one."""
    shapes = sources(input_shapes(region.program.cascade))
    found = False
    for name in sorted(numbers(region.program, region_sizes(region)) & set(shapes)):
        tensor, dim, _ = shapes[name]
        size = example(region.inputs[tensor]).shape[dim]
        if not isinstance(size, int):
            int(size)  # torch guards on it
            found = True
    return found


def region_sizes(region: Region) -> dict[str, int]:
    """The extents the region had when it was traced, by symbolic rank of its program."""
    shapes = [[hint(d) for d in example(n).shape] for n in region.inputs]
    return solve(region.program.cascade, shapes) | {name: hint(x) for name, x in region.sizes}


def _differentiated(region: Region) -> bool:
    return any(example(n).requires_grad for n in region.outputs)


def _count() -> None:
    from torch._guards import CompileContext

    here = CompileContext.current_compile_id()
    runtime.count_graph(bool(here and here.frame_compile_id))


def _rest(gm: fx.GraphModule, example_inputs: list[Any], settings: Config, mode: str | None) -> Callable[..., Any]:
    """What memcomp does not compile: Inductor, or eager where it is asked for, or nothing is left to compile, or
    Inductor cannot build."""
    if settings.rest == "eager":
        return _by_python(gm)
    patches = _patches(settings, mode)
    if not computes(gm.graph):
        return _by_python(gm)
    kept = fx.Graph()  # Inductor may rewrite the graph it is given
    kept.output(kept.graph_copy(gm.graph, {}))
    eager = fx.GraphModule(gm, kept)
    with boundary("everything but the compiled regions", settings):
        from torch._inductor.compile_fx import compile_fx

        return cast("Callable[..., Any]", compile_fx(gm, example_inputs, config_patches=patches or None))
    return _by_python(eager)


def _by_python(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph as Python runs it: its calls of kernels need not go through torch's dispatcher."""
    for n in gm.graph.nodes:
        if n.target is torch.ops.memcomp.call.default:
            n.target = runtime.call
    gm.recompile()
    return gm.forward


def _patches(settings: Config, mode: str | None) -> dict[str, Any]:
    """Inductor's config for a mode of torch.compile and the user's `rest_options`."""
    from torch._inductor import config as inductor
    from torch._inductor import list_mode_options

    known = inductor.get_config_copy()
    for name, _ in settings.rest_options:
        if name.replace("-", "_") not in known:
            raise OptionError(f"Inductor has no option {name!r}", f"rest_options = {dict(settings.rest_options)!r}",
                              nearest(name, difflib.get_close_matches(name, known, 5, 0.0)))
    given = {name.replace("-", "_"): value for name, value in settings.rest_options}
    return {**(list_mode_options(mode) if mode else {}), **given}


def _with_symbolic_length(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.dim() < (2 if x.is_floating_point() else 1):
        return x
    dim = x.dim() - (2 if x.is_floating_point() else 1)
    alias = x.detach().requires_grad_(x.requires_grad) if x.is_leaf else x.view_as(x)
    torch._dynamo.maybe_mark_dynamic(alias, dim)
    return alias
