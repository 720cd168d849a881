"""Calls that write over a tensor that dies with them, where the kernel allows it: no fresh memory, no page faults.

Torch's functionalisation keeps the meaning whatever is found here: where something needs the old values after all, it
copies them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from memcomp.capture.reader import meta
from memcomp.capture.writes import memory, transformed


def tensors_of(call: fx.Node) -> list[fx.Node]:
    return list(call.args[0])  # type: ignore[arg-type]


def dies(x: fx.Node, call: fx.Node, out: fx.Node) -> bool:
    """May `out`, which `call` makes, take the memory of its argument `x`?

    The graph made that memory, by an operator of torch's or a kernel, no gradient flows through it, only views and the
    call see it, all of it before the call does; and the strides are those of the result.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    value, wanted = meta(x), meta(out)
    if not isinstance(value, torch.Tensor) or not isinstance(wanted, torch.Tensor) or transformed(x) or \
            transformed(out) or value.dtype != wanted.dtype or value.dim() != wanted.dim() or \
            not all(statically_known_true(a == b) for one, other in ((value.shape, wanted.shape),
                                                                     (value.stride(), wanted.stride()))
                    for a, b in zip(one, other, strict=True)):
        return False
    nodes = list(call.graph.nodes)
    family = {n for n in nodes if memory(n) == memory(x)}
    after = set(nodes[nodes.index(call) + 1:])
    return not family & after and all(map(_private, family)) and \
        sum(n in family for n in tensors_of(call)) == 1 and \
        all(u in family or u is call or _is_call(n) and u.target is operator.getitem
            for n in family for u in n.users)


def overwrite(call: fx.Node, out: fx.Node, at: int, key: str) -> fx.Node:
    """The tensor at position `at` of a call holds what was `out`, by the entry of `key`; `call` and `out` go."""
    tensors = tensors_of(call)
    x, rest = tensors[at], [*tensors[:at], *tensors[at + 1:]]
    with call.graph.inserting_before(call):
        call.graph.call_function(torch.ops.memcomp.overwrite.default, (x, rest, call.args[1], key))
    out.replace_all_uses_with(x)
    x.meta = dict(out.meta)  # views of the result have its memory there
    for node in (out, call):
        call.graph.erase_node(node)
    return x


def _private(n: fx.Node) -> bool:
    """Did an operator make the node, which does not keep what it made, and outside of what gradients need?"""
    value: Any = meta(n)
    values = value if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(v, torch.Tensor) and v.requires_grad for v in values):
        return False
    if n.op == "call_method":
        return True
    if n.op != "call_function":
        return False
    t = n.target
    if isinstance(t, torch._ops.OpOverload):
        return t.namespace in ("aten", "prims", "memcomp")
    return t in vars(operator).values() or torch.overrides.resolve_name(t) is not None


def _is_call(n: fx.Node) -> bool:
    return n.target is torch.ops.memcomp.call.default
