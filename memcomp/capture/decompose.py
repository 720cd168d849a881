"""Element-wise operators without a rule of their own, taken apart by torch's own decompositions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.reader import meta
from memcomp.capture.writes import mutates

PASSES = ("view", "map", "reduce")


def decompose(gm: fx.GraphModule, everywhere: bool = False) -> None:
    """Rewrite in place each element-wise operator on the way from a contraction that has no rule, where torch knows it
    as a composition of operators that have one (softplus, gelu, elu, ...).  Everything else stays.

    everywhere: all operators that make one tensor, wherever they stand.
    """
    reached: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        r = table.rule(node)
        if everywhere:
            if r is None and _pure(node):
                _inlined(gm, node)
        elif r is not None and r.kind == "contract":
            reached.add(node)
        elif any(i in reached for i in node.all_input_nodes):
            if r is not None and r.kind in PASSES:
                reached.add(node)
            elif r is None and _elementwise(node):
                new = _inlined(gm, node)
                if new is not None:
                    reached.add(new)


def _elementwise(node: fx.Node) -> bool:
    """Does it make, without side effects, one real tensor of the shape that its tensors broadcast to?"""
    t = meta(node)
    if not _pure(node) or not t.is_floating_point():
        return False
    shapes = [meta(i).shape for i in node.all_input_nodes if isinstance(meta(i), torch.Tensor)]
    try:
        return tuple(torch.broadcast_shapes(*shapes)) == tuple(t.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False  # they do not broadcast: a convolution, a normalisation by channel


def _pure(node: fx.Node) -> bool:
    """Is it an operator of torch's that makes one tensor and writes into none?"""
    return node.op in ("call_function", "call_method") and not mutates(node) and _of_torch(node) and \
        isinstance(meta(node), torch.Tensor) and all(meta(u) is not None for u in node.all_input_nodes)


def _of_torch(node: fx.Node) -> bool:
    name = table.base_name(node)
    return node.op == "call_method" or "." not in name and bool(name)


def _inlined(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node replaced by its decomposition; None, and no change, where that has operators without a rule."""
    import torch._refs.nn.functional  # fills the table below
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = [i for i in node.all_input_nodes if isinstance(meta(i), torch.Tensor)]
    if len(tensors) != len(node.all_input_nodes) or not all(hasattr(meta(i), "fake_mode") for i in (node, *tensors)):
        return None

    def run(*values: torch.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        return getattr(args[0], str(node.target))(*args[1:], **kwargs) if node.op == "call_method" \
            else node.target(*args, **kwargs)  # type: ignore[operator]

    known = {op: f for op, f in decomposition_table.items()
             if isinstance(op, torch._ops.OpOverload) and op._opname not in table.rules()}
    with meta(node).fake_mode:
        try:
            inner = make_fx(run, known)(*(meta(i) for i in tensors)).graph
        except (RuntimeError, NotImplementedError, TypeError):
            return None  # torch itself cannot say what it does
    if any(n.op not in ("placeholder", "call_function", "output") or n.op == "call_function" and table.rule(n) is None
           for n in inner.nodes):
        return None
    values: dict[fx.Node, Any] = dict(zip((n for n in inner.nodes if n.op == "placeholder"), tensors, strict=True))
    with gm.graph.inserting_before(node):
        for n in inner.nodes:
            if n.op == "call_function":
                values[n] = gm.graph.node_copy(n, values.__getitem__)
                values[n].meta = {**node.meta, "example_value": _example(n, node)}
    out = values[next(n for n in inner.nodes if n.op == "output").args[0]]
    assert isinstance(out, fx.Node)
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
    return out


def _example(part: fx.Node, node: fx.Node) -> Any:
    """What a part of the node's decomposition gives: traced without gradients, it needs one where the node does."""
    value = part.meta["val"]
    if not (isinstance(value, torch.Tensor) and value.is_floating_point() and meta(node).requires_grad):
        return value
    return value.detach().requires_grad_()
