"""Graph surgery: take a region out of an fx graph, put a call of its kernel in, keep the original for gradients."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from memcomp.capture.lookups import Lookup, ancestors, lookups
from memcomp.capture.reader import meta
from memcomp.capture.writes import memory, mutates, written
from memcomp.dtypes import DTYPES
from memcomp.ir.errors import Refusal

if TYPE_CHECKING:
    from memcomp.capture.region import Region


@dataclass(frozen=True)
class Original:
    """A region's torch computation as a module of its own.

    module(*inputs, *extras, *sizes, *symbols) -> tuple of the outputs.
    extras: tensors it reads that the kernel does not; symbols: integers it reads, other than the kernel's.
    flows: the tensors that gradients flow back to; they stop at what was made under `no_grad`.
    text: the same for equal computations, whatever their names.
    """

    module: fx.GraphModule
    extras: tuple[fx.Node, ...]
    symbols: tuple[fx.Node, ...]
    flows: frozenset[fx.Node]
    text: str


def original(region: Region) -> Original:
    """Copy what computes the region's outputs from its inputs (and from other graph inputs, where it reads them)."""
    tensors, sizes = list(region.inputs), [n for _, n in region.sizes]
    needed = ancestors(region)
    extras = tuple(n for n in needed if n.op in ("placeholder", "get_attr") and _is_tensor(n))
    symbols = tuple(n for n in needed if n.op in ("placeholder", "get_attr") and not _is_tensor(n))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate([*tensors, *extras, *sizes, *symbols]):
        placeholder = graph.placeholder(f"a{i}")
        if isinstance(node, fx.Node):
            copies.setdefault(node, placeholder)
    for i, node in enumerate(n for n in needed if n.op not in ("placeholder", "get_attr")):
        if node.op == "call_module":
            raise Refusal(f"gradient through the module call {node.target}", hint="inline it")
        copies[node] = graph.create_node(node.op, node.target, fx.map_arg(node.args, copies.__getitem__),
                                         fx.map_arg(node.kwargs, copies.__getitem__), name=f"n{i}")
        if _is_constant(node) and any(map(_differentiable, node.all_input_nodes)):
            copies[node] = graph.call_method("detach", (copies[node],))
    graph.output(tuple(copies[n] for n in region.outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Original(module, extras, symbols, _flows(region, set(needed)), f"{len(tensors)} {len(sizes)}\n{graph}")


def _differentiable(node: fx.Node) -> bool:
    value = meta(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_constant(node: fx.Node) -> bool:
    """Did torch make these real numbers without a gradient?"""
    value = meta(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad


def _flows(region: Region, needed: set[fx.Node]) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    todo = [n for n in region.outputs if not _is_constant(n)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [i for i in node.all_input_nodes if node in needed and not _is_constant(i)]
    return frozenset(found)


def checks(region: Region, extra: Original | None) -> tuple[tuple[fx.Node, ...], tuple[tuple[int, str, Lookup], ...]]:
    """Index tensors that a call takes only to be looked at, after its other tensors; and for each lookup the position
    of its index among them all and, as text over (t, s), the elements that it may name.

    Raises Refusal where no tensor or size of the call shows how many they are.
    """
    found = lookups(ancestors(region))
    tensors = [*region.inputs, *(extra.extras if extra else ())]
    more = tuple(dict.fromkeys(x.index for x in found if x.index not in tensors))
    tensors += more
    sizes = [*(n for _, n in region.sizes), *(extra.symbols if extra else ())]
    shown = {str(n): f"t[{i}].shape[{d}]" for i, t in enumerate(tensors) for d, n in enumerate(example(t).shape)}
    shown |= {str(example(n)): f"s[{k}]" for k, n in enumerate(sizes) if isinstance(n, fx.Node)}
    out = []
    for x in found:
        size = example(x.read).shape[x.dim]
        if not isinstance(size, int) and str(size) not in shown:
            raise Refusal(f"{x.index} names one of {size} elements, which no input shows", region.source)
        out.append((tensors.index(x.index), str(size) if isinstance(size, int) else shown[str(size)], x))
    return more, tuple(out)


def replace_region(gm: fx.GraphModule, region: Region, key: str, extra: Original | None,
                   checked: tuple[fx.Node, ...] = ()) -> dict[fx.Node, fx.Node]:
    """Call the kernel registered under `key` before the region's anchor, and drop the nodes that are dead then.
    Returns what stands for each of the region's outputs now.  checked: of `checks`.

    Raises Refusal, with the graph unchanged, where the anchor is no such place: an input comes later, or something that
    the region reads is overwritten in between.
    """
    graph = gm.graph
    extras = [*(extra.extras if extra else ())]
    sizes = [*(n for _, n in region.sizes), *(extra.symbols if extra else ())]
    _check_place(region, [n for n in [*region.inputs, *extras, *checked, *sizes] if isinstance(n, fx.Node)])
    before = set(ancestors(region))  # masks and places too, which regions share: whoever is last takes them away
    made: dict[fx.Node, fx.Node] = {}
    dtypes = [DTYPES[t.dtype] for t in region.program.cascade.inputs()]
    results = [DTYPES[t.dtype] for t in region.program.cascade.outputs()]
    with graph.inserting_before(region.anchor):
        tensors = [_cast(graph, n, d) for n, d in zip(region.inputs, dtypes, strict=True)] + extras
        if extra is not None:
            tensors = [t if n in extra.flows or not _differentiable(n) else graph.call_method("detach", (t,))
                       for n, t in zip([*region.inputs, *extras], tensors, strict=True)]
        tensors += checked
        call = graph.call_function(torch.ops.memcomp.call.default, (tensors, sizes, key))
        call.meta["example_value"] = [n.meta.get("example_value") for n in region.outputs]
        for i, (node, dtype) in enumerate(zip(region.outputs, results, strict=True)):
            out = graph.call_function(operator.getitem, (call, i))
            if example(node).dtype != dtype:
                out = graph.call_method("to", (out, example(node).dtype))
            out.meta = dict(node.meta)
            node.replace_all_uses_with(out)
            made[node] = out
    inside = set(region.nodes)
    nodes = list(graph.nodes)
    shared = {memory(n) for n in nodes if n not in inside} if any(map(mutates, inside)) else set()
    for node in reversed([n for n in nodes if n in inside | before and n.op not in ("placeholder", "output")]):
        writes = mutates(node) and (node not in inside or any(memory(w) in shared for w in written(node)))
        if not node.users and not writes:
            graph.erase_node(node)
    return made


def computes(graph: fx.Graph) -> bool:
    """Is anything left but calls of kernels, views and sizes?"""
    return any(n.op not in ("placeholder", "get_attr", "output") and not _computes_nothing(n) for n in graph.nodes)


def _computes_nothing(node: fx.Node) -> bool:
    op, value = torch.ops.memcomp, meta(node)
    call = op.call.default
    if node.target in (call, op.overwrite.default) or \
            node.target is operator.getitem and node.all_input_nodes[0].target is call:
        return True
    if isinstance(value, torch.Tensor):
        return not mutates(node) and memory(node) in map(memory, node.all_input_nodes)
    return isinstance(value, (int, torch.SymInt, torch.Size))


def example(node: fx.Node) -> Any:
    """The fake tensor (Dynamo: example_value, export: val) or SymInt that a node had when it was traced."""
    return node.meta["example_value"] if "example_value" in node.meta else node.meta["val"]


def hint(x: Any) -> int:
    """The number that a size (int, SymInt, or node of one) had when it was traced."""
    value = example(x) if isinstance(x, fx.Node) else x
    return value if isinstance(value, int) else int(value.node.hint)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Autocast converts the operands of torch's own ops only."""
    if example(node).dtype == dtype:
        return node
    made = graph.call_method("to", (node, dtype))
    made.meta = {**node.meta, "example_value": example(node).to(dtype)}
    return made


def _check_place(region: Region, needed: list[fx.Node]) -> None:
    """The call goes before the anchor: is all it needs there, and is it still what the region read?"""
    nodes = list(region.anchor.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    place, inside = order[region.anchor], set(region.nodes)
    if any(order[n] >= place for n in needed):
        raise Refusal(f"{region.name} needs a value that comes too late", region.source)
    for i, writer in enumerate(nodes[:place]):
        if writer in inside or not mutates(writer):
            continue
        changed = set(map(memory, written(writer)))
        if any(order[n] < i and not changed.isdisjoint(map(memory, n.all_input_nodes)) for n in inside):
            raise Refusal(f"{writer} overwrites what {region.name} has read", region.source)


def _is_tensor(node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(example(node), torch.Tensor)


def autocast_at(gm: fx.GraphModule, node: fx.Node) -> tuple[tuple[Any, ...], ...]:
    """The autocast that holds at a node: one (device, dtype, enabled, cache) or none."""
    device = example(node).device.type
    stack: list[tuple[Any, ...]] = []
    if torch.is_autocast_enabled(device):
        stack.append((device, torch.get_autocast_dtype(device), True, torch.is_autocast_cache_enabled()))
    for n in gm.graph.nodes:
        name = getattr(n.target, "__name__", "")
        if n is node:
            break
        if name == "_enter_autocast":
            stack.append(tuple(n.args))
        elif name == "_exit_autocast":
            stack.pop()
    return tuple(s for s in stack[-1:] if s[0] == device)



