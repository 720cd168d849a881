"""Candidates: groups of nodes that may become regions, and attention-like nodes that did not.

A group is one attention node, or the nodes between contractions whose operands are both data: the producers' scores
flow through maps, views and reductions into the consumers.  Linear layers (an operand is a parameter) stay outside.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.grow import grown, shares
from memcomp.capture.reader import meta

ATTENTION = "scaled_dot_product_attention"
PASSES = ("view", "map", "reduce")
COMPOSITES = ("softmax", "_safe_softmax")
OWN_FRAME = "<memcomp>"  # stands for a file in stack traces that go through memcomp's own caller of the user's code
OPAQUE = ("flex_attention", "_scaled_dot_product", "multi_head_attention", "_transformer_encoder_layer_fwd")


@dataclass(frozen=True)
class Group:
    """Contractions that feed each other, and all nodes between them.

    chain: reductions without any contraction.  otherwise: what is tried where this cannot be read as one region.
    """

    core: frozenset[fx.Node]
    ends: tuple[fx.Node, ...]
    chain: bool = False
    otherwise: tuple[Group, ...] = ()


def _tensors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if isinstance(meta(n), torch.Tensor)]


def weight(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Is the node a parameter, seen through views and conversions?"""
    while True:
        if node.op == "get_attr":
            return isinstance(table.attribute(gm, str(node.target)), torch.nn.Parameter)
        if node.op == "placeholder":
            return isinstance(meta(node), torch.nn.Parameter)
        r = table.rule(node)
        if r is None or r.kind != "view" and table.base_name(node) != "convert" or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a contraction multiplies."""
    inputs = _tensors(node.all_input_nodes)
    return inputs[1:] if table.base_name(node) == "baddbmm" else inputs


def _is_anchor(gm: fx.GraphModule, node: fx.Node) -> bool:
    r = table.rule(node)
    if r is None or r.kind != "contract" or table.base_name(node) == ATTENTION:
        return False
    inputs = _operands(node)
    if not inputs or any(weight(gm, n) for n in inputs) or not all(meta(n).is_floating_point() for n in inputs):
        return False
    if table.base_name(node) == "einsum":
        return True
    first = meta(inputs[0])
    return first.ndim >= 2 and not (isinstance(first.shape[-1], int) and first.shape[-1] == 1)


def _batched(node: fx.Node) -> bool:
    """Do both operands of the contraction carry a batch rank?"""
    if table.base_name(node) == "einsum":
        left, _, right = str(node.args[0]).partition("->")
        shared = set.intersection(*(set(x) for x in left.replace(" ", "").split(",")))
        return bool(shared & set(right))
    return all(meta(n).ndim > 2 for n in _operands(node))


def groups(gm: fx.GraphModule, taken: Collection[fx.Node] = ()) -> list[Group]:
    """The groups of a graph, without the nodes that are taken."""
    anchors = {n for n in gm.graph.nodes if n not in taken and _is_anchor(gm, n)}
    reach: dict[fx.Node, frozenset[fx.Node]] = {}
    for n in gm.graph.nodes:
        if n in anchors:
            reach[n] = frozenset((n,))
            continue
        r = table.rule(n)
        passing = r is not None and r.kind in PASSES
        reach[n] = frozenset(a for i in n.all_input_nodes for a in reach[i]) if passing else frozenset()
    feeds: dict[fx.Node, set[fx.Node]] = {}
    for n in gm.graph.nodes:
        if n in anchors:
            makers = {a for i in n.all_input_nodes for a in reach[i] if a not in feeds}
            if makers:
                feeds[n] = makers
    groups = [Group(frozenset((n,)), (n,)) for n in gm.graph.nodes
              if n not in taken and table.rule(n) is not None and table.base_name(n) == ATTENTION]
    for ends, makers in _joined(feeds):
        core = frozenset(_between(ends, makers, reach, anchors))
        reducing = any((r := table.rule(n)) is not None and r.kind == "reduce" for n in core)
        if reducing or all(_batched(n) for n in (*ends, *makers)):
            groups.append(Group(core, tuple(ends)))
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    groups = sorted((_grown(g, reach, order) for g in groups), key=lambda g: max(order[n] for n in g.ends))
    return _merged(groups, order)


def _grown(g: Group, reach: Mapping[fx.Node, frozenset[fx.Node]], order: Mapping[fx.Node, int]) -> Group:
    """The group with what else can be computed on the way, else as it is."""
    makers = frozenset(a for n in g.core for a in reach[n] if a in g.core) - set(g.ends)
    for scalars in (False, True):
        core = grown(g.core, makers, reach, scalars)
        g = g if core == g.core else Group(core, _ends(core, order), otherwise=(g,))
    return g


def _merged(groups: Sequence[Group], order: Mapping[fx.Node, int]) -> list[Group]:
    """Groups that read the same keys and values become one."""
    out: list[Group] = []
    for g in groups:
        k = next((k for k, h in enumerate(out) if shares(h.core, g.core)), None)
        if k is None:
            out.append(g)
            continue
        core = out[k].core | g.core
        out.append(Group(core, _ends(core, order), otherwise=(out.pop(k), g)))
    return out


def _ends(core: frozenset[fx.Node], order: Mapping[fx.Node, int]) -> tuple[fx.Node, ...]:
    """Nodes whose results leave the core, in the order of the graph."""
    return tuple(sorted((n for n in core if any(u not in core for u in n.users)), key=order.__getitem__))


def _joined(feeds: dict[fx.Node, set[fx.Node]]) -> list[tuple[list[fx.Node], set[fx.Node]]]:
    """Consumers that share a producer stand in one group."""
    out: list[tuple[list[fx.Node], set[fx.Node]]] = []
    for end, makers in feeds.items():
        touching = [g for g in out if g[1] & makers]
        merged: tuple[list[fx.Node], set[fx.Node]] = ([end], set(makers))
        for g in touching:
            merged = (g[0] + merged[0], g[1] | merged[1])
            out.remove(g)
        out.append(merged)
    return out


def _between(ends: Sequence[fx.Node], makers: set[fx.Node], reach: dict[fx.Node, frozenset[fx.Node]],
             anchors: set[fx.Node]) -> set[fx.Node]:
    core = set(ends) | makers
    todo = [i for e in ends for i in e.all_input_nodes]
    while todo:
        n = todo.pop()
        if n in core or not reach[n] & makers or n in anchors:
            continue
        core.add(n)
        todo += n.all_input_nodes
    return core


def module_path(node: fx.Node) -> str:
    """The path of the nn.Module that made a node, from the compiled function's own module on ("" outside of any)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = re.sub(r"(?:\._modules)?\['?(\w+)'?\]", r".\1", path)  # layers._modules['0'] and layers[0] -> layers.0
    return re.sub(r"^[LG]\.\w+\.?", "", path)  # the local or global variable that holds the model


def source(node: fx.Node) -> str:
    """Module path and file:line of the user's code that made a node."""
    path = module_path(node)
    lines = [x.strip() for x in str(node.meta.get("stack_trace") or "").splitlines()
             if x.strip().startswith("File ") and OWN_FRAME not in x]
    where = ""
    if lines:
        file, _, rest = lines[-1].removeprefix('File "').partition('", line ')
        where = f"{file}:{rest.split(',')[0]}"
    return " ".join(s for s in (path, where) if s) or str(node)


def missed(gm: fx.GraphModule, taken: set[fx.Node], reported: set[str]) -> list[tuple[fx.Node, str]]:
    """Attention-like nodes outside all regions that have not been reported."""
    out = []
    for n in gm.graph.nodes:
        name = table.base_name(n)
        if n in taken or source(n) in reported:
            continue
        if any(x in name for x in OPAQUE):
            out.append((n, f"{name} is one operator here and has no rule"))
        elif any(groups(body) for body in _bodies(gm, n)):
            out.append((n, f"it is inside {name.rpartition('.')[2]}, a graph of its own that is not read"))
        elif name in COMPOSITES and (between := _after_contraction(gm, n)) is not None:
            out.append((n, f"{between[0]} stands between the contraction and it" if between else
                        "its weights do not reach a second contraction through operators that have rules"))
    return out


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that an operator of graphs (checkpoint, cond) runs."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    given = [table.attribute(gm, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [g for g in given if isinstance(g, fx.GraphModule)]


def _after_contraction(gm: fx.GraphModule, node: fx.Node) -> list[str] | None:
    """None: no contraction of data feeds the node; else the operators on the way that cannot be read."""
    seen: set[fx.Node] = set()
    between: list[str] = []
    found = False
    todo = list(node.all_input_nodes)
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if _is_anchor(gm, n):
            found = True
            continue
        r, inputs = table.rule(n), _tensors(n.all_input_nodes)
        if r is None or r.kind not in PASSES:
            if len(inputs) != 1:
                continue
            between.append(table.base_name(n))
        todo += inputs
    return between if found else None
