"""memcomp inside TVM: what it can compute of a Relax module becomes calls of its kernels.

    from memcomp.relax import FuseRegions

    module = FuseRegions("cpu")(module)
    executable = tvm.compile(module, "llvm")

The kernels are compiled here and travel with the module as `external_mods`, which TVM links into what it builds; calls
are `R.call_dps_packed`, so TVM plans the memory of results and of what a kernel works in.  (They are no PrimFuncs of
the module: TVM's own pipeline makes x of x + c - c, and compiles for the target of the whole module.)  Parallel loops
run on TVM's threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from memcomp.config import Config, config
from memcomp.ir.errors import OptionError, Refusal, VerifyError

if TYPE_CHECKING:
    from memcomp.capture.region import Region
    from memcomp.capture.relax import Block
    from memcomp.ir.tile import Kernel

__all__ = ["FuseRegions"]


def FuseRegions(target: str = "cpu", *, sizes: Mapping[str, int] | None = None, **options: Any) -> Any:
    """A pass (`tvm.ir.transform.Pass`) from IRModule to IRModule.

    target: a CPU of `memcomp targets`, which the module is run on.  sizes: what symbolic sizes are taken for where ways
    of computing are compared, by name.  options: the fields of `Config` that choose kernels.
    Regions are found in dataflow blocks, and in what `ConvertToDataflow` makes one of: pure bindings without a branch
    in between.  What cannot be compiled stays with TVM, with a warning, or with `strict` raises its Refusal.  Raises
    OptionError for a wrong option.
    """
    import tvm

    from memcomp.backends import backend_of

    settings = config({**options, "target": target})
    if backend_of(settings) != "tvm":
        raise OptionError(f"target {target} has kernels that TVM does not call", hint="a CPU, e.g. FuseRegions('cpu')")

    for error in (Refusal, VerifyError):
        tvm.error.register_error(error)  # so that TVM hands them on as they are

    def run(module: Any, _: Any) -> Any:
        return fused(module, settings, dict(sizes or {}))

    return tvm.transform.module_pass(run, opt_level=0, name="memcomp.FuseRegions")


def fused(module: Any, settings: Config, sizes: Mapping[str, int]) -> Any:
    """The module with calls of kernels; itself where there are none."""
    from tvm import relax

    from memcomp.capture.relax import functions
    from memcomp.codegen.tvm import linked

    kernels: dict[str, Kernel] = {}
    joined = relax.transform.ConvertToDataflow(1)(module)  # blocks with nothing but pure bindings between them are one
    changed = {name: made for name, f in functions(joined) if (made := _function(f, settings, sizes, kernels)) is not f}
    if not kernels:
        return module
    made = module.clone()
    for name, function in changed.items():
        made.update_func(name, function)
    known = list(module.get_attr("external_mods") or ())  # of this pass too, where it has run before
    new = {name: k for name, k in kernels.items() if not any(m.implements_function(name) for m in known)}
    return made.with_attr("external_mods", [*known, linked(new)] if new else known)


def _function(function: Any, settings: Config, sizes: Mapping[str, int], kernels: dict[str, Kernel]) -> Any:
    from tvm import relax

    body = function.body
    if not isinstance(body, relax.SeqExpr):
        return function
    blocks = [_block(function, b, settings, sizes, kernels) if isinstance(b, relax.DataflowBlock) else b
              for b in body.blocks]
    if all(a is b for a, b in zip(blocks, body.blocks, strict=True)):
        return function
    return relax.Function(function.params, relax.SeqExpr(blocks, body.body), function.ret_ty, function.is_pure,
                          function.attrs, function.span)


@dataclass(frozen=True)
class _Call:
    """Bindings that stand for a region, before the binding `at`."""

    at: int
    bindings: tuple[Any, ...]


def _block(function: Any, block: Any, settings: Config, sizes: Mapping[str, int], kernels: dict[str, Kernel]) -> Any:
    from tvm import relax

    from memcomp.backend import boundary, smaller
    from memcomp.capture.find import find_regions
    from memcomp.capture.relax import read
    from memcomp.capture.relax.table import ROWS
    from memcomp.runtime import fall_back

    bindings = list(block.bindings)
    seen = [b.var for b in bindings if not isinstance(b.var, relax.DataflowVar)]  # behind the block
    calls: list[_Call] = []
    with boundary("a dataflow block", settings, keeper="TVM"):
        graph = read(function, bindings, seen, sizes)
        for left in (x for x in graph.left if x.where in ROWS):  # what has no row is nobody's expectation
            fall_back(left.where, left.why, "TVM")
        regions, refused = smaller(graph.gm, *find_regions(graph.gm, settings.chains), settings)
        for r in (r for r in refused if not r.chain):
            with boundary(r.where, settings, keeper="TVM"):
                raise Refusal(r.why, r.where)
        for region in regions:
            with boundary(f"{region.name} ({region.source})", settings, keeper="TVM"):
                calls.append(_call(graph, region, len(bindings), settings, kernels))
    if not calls:
        return block
    return relax.DataflowBlock(list(_ordered(bindings, calls)), block.span)


def _call(graph: Block, region: Region, end: int, settings: Config, kernels: dict[str, Kernel]) -> _Call:
    """Compile a region.  Raises Refusal where it has no kernel, or TVM has no name for what the kernel takes."""
    from tvm import relax

    from memcomp.backend import region_sizes
    from memcomp.binding import taken
    from memcomp.passes.generalize import numbers
    from memcomp.pipeline import compile_program
    from memcomp.sizes import input_shapes, sources

    program, extents = region.program, region_sizes(region)
    if open_ := sorted(numbers(program, extents) & set(sources(input_shapes(program.cascade)))):
        raise Refusal(f"a kernel needs the extent of rank {open_[0]} as a number", region.source)
    tensors = [_named(graph.tensors, n, region) for n in region.inputs]
    outs = [_named(graph.tensors, n, region) for n in region.outputs]
    for x in (*tensors, *outs):
        if x.ty.vdevice is not None and x.ty.vdevice.target.kind.name != "llvm":
            raise Refusal(f"a kernel for the CPU cannot reach {x}, which is on {x.ty.vdevice}", region.source)
    symbols = [n if isinstance(n, int) else _named(graph.sizes, n, region) for _, n in region.sizes]
    at = graph.at.get(region.anchor, end)
    if not graph.writes.isdisjoint(range(min(graph.at.get(n, 0) for n in region.nodes), at)):
        raise Refusal("an operator in the middle of it writes in place, maybe of what it reads", region.source)
    compiled = compile_program(program, config=settings, sizes=extents)
    needs = taken(program, compiled.tiles, [name for name, _ in region.sizes])
    where = {"t": [SimpleNamespace(shape=list(x.ty.shape.values)) for x in tensors], "s": symbols}
    work = [relax.TensorType([_size(x, where) for x in shape], _name(dtype)) for shape, dtype in needs.work]
    for out, (_, dtype) in zip(outs, needs.outs, strict=True):
        if str(out.ty.dtype) != _name(dtype):
            raise Refusal(f"{out.name} is {out.ty.dtype}, and its kernel gives {_name(dtype)}", region.source)
    symbol = f"memcomp_{hashlib.sha256(compiled.kernel.source.encode()).hexdigest()[:16]}"
    call = relax.BlockBuilder().normalize(relax.call_dps_packed(
        symbol, [*tensors, *(_size(x, where) for x in needs.sizes)], [*(x.ty for x in outs), *work]))
    kernels.setdefault(symbol, compiled.kernel)
    if len(outs) + len(work) == 1:
        return _Call(at, (relax.VarBinding(outs[0], call),))
    whole = relax.DataflowVar(symbol, call.ty)
    parts = (relax.VarBinding(x, relax.BlockBuilder().normalize(relax.TupleGetItem(whole, k)))
             for k, x in enumerate(outs))
    return _Call(at, (relax.VarBinding(whole, call), *parts))


def _named(known: Mapping[Any, Any], node: Any, region: Region) -> Any:
    if node not in known:
        raise Refusal(f"{node} is a part of an operator of TVM's, which has no name there", region.source)
    return known[node]


def _name(dtype: Any) -> str:
    """TVM's name of torch's dtype."""
    return str(dtype).removeprefix("torch.")


def _size(text: str, where: Mapping[str, Any]) -> Any:
    """A size that `taken` spelt, over TVM's shapes."""
    from tvm import sym, tirx

    def chosen(python: Callable[..., int], tvm: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *xs: python(*xs) if all(isinstance(x, int) for x in xs) else tvm(*xs)

    known = {**where, "max": chosen(max, tirx.max), "min": chosen(min, tirx.min), "__builtins__": {}}
    made = eval(text, known)
    return tirx.IntImm("int64", made) if isinstance(made, int) else sym.Analyzer().simplify(made)


def _ordered(bindings: Sequence[Any], calls: Sequence[_Call]) -> Iterator[Any]:
    """The bindings that are still used, with the calls in their places: each behind what it uses."""
    from tvm import relax

    replaced = {b.var for c in calls for b in c.bindings}
    items: list[Any] = []
    for k, binding in enumerate((*bindings, None)):
        items += [b for c in calls if c.at == k for b in c.bindings]
        if binding is not None and binding.var not in replaced:
            items.append(binding)
    of = {b.var: b for b in items}
    live: dict[Any, None] = {}
    todo = [b for b in items if isinstance(b, relax.MatchCast) or not isinstance(b.var, relax.DataflowVar)]
    while todo:
        b = todo.pop()
        if b.var not in live:
            live[b.var] = None
            todo += [of[v] for v in _used(b.value) if v in of]
    done: set[Any] = set()
    for item in (b for b in items if b.var in live):
        stack = [item]
        while stack:
            first = [of[v] for v in _used(stack[-1].value) if v in of and v not in done]
            if first:
                stack += first
                continue
            b = stack.pop()
            if b.var not in done:
                done.add(b.var)
                yield b


def _used(x: Any) -> list[Any]:
    """The variables that an expression names."""
    from tvm import relax

    found: list[Any] = []
    relax.analysis.post_order_visit(x, lambda e: found.append(e) if isinstance(e, relax.Var) else None)
    return found
