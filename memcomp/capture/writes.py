"""Which operators write into which tensors, and which tensors share memory."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad

IN_PLACE = frozenset(f for n, f in vars(operator).items() if n.startswith("i") and n[1:] in vars(operator))


def mutates(node: fx.Node) -> bool:
    """Does the node write into one of its arguments?"""
    t: Any = node.target
    if node.op == "call_method":
        return str(t).endswith("_") and not str(t).endswith("__") or str(t) in ("__setitem__", "__iadd__")
    if node.op != "call_function":
        return False
    if (schema := _schema(t)) is not None:
        return bool(schema.is_mutable)
    if t is operator.setitem or t in IN_PLACE or "out" in node.kwargs or _asked(node):
        return True
    name = getattr(t, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not t


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors that a mutating node writes into."""
    if (schema := _schema(node.target)) is not None:
        writes = [(k, a.name) for k, a in enumerate(schema.arguments)
                  if a.alias_info is not None and a.alias_info.is_write]
        found = [node.args[k] if k < len(node.args) else node.kwargs.get(n) for k, n in writes]
    elif "out" in node.kwargs:
        found = [node.kwargs["out"]]
    else:
        found = [node.args[0]] if node.args else list(node.all_input_nodes[:1])
    flat = [x for f in found for x in (f if isinstance(f, (list, tuple)) else (f,))]
    return [x for x in flat if isinstance(x, fx.Node)]


def memory(node: fx.Node) -> Hashable:
    """Equal for nodes whose tensors share memory, as torch found when it ran the graph on tensors without data."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, (tuple, list)) and value:
        value = value[0]  # the pieces of a split share theirs
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not transformed(node):
        return value.untyped_storage()._cdata  # type: ignore[no-any-return]
    return node


def transformed(node: fx.Node) -> bool:
    """Are the node's tensors those of a transform of functions (`vmap`, `grad`, `jvp`) that it stands inside of?"""
    value = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def dual(graph: fx.Graph) -> bool:
    """May tensors of a graph carry tangents (`torch.autograd.forward_ad`), which kernels do not compute?"""
    return forward_ad._current_level >= 0 or any(
        getattr(n.target, "__name__", "") == "_make_dual" for n in graph.nodes)


def _schema(target: Any) -> Any:
    """What an operator of torch's registry declares; None where that does not tell its overloads apart."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        return getattr(target, names[0])._schema if len(names) == 1 else None
    return None


def _asked(node: fx.Node) -> bool:
    """`relu(x, inplace=True)`, or the same by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    at = _inplace_at(node.target)
    return at is not None and at < len(node.args) and node.args[at] is True


@cache
def _inplace_at(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # torch's own C functions show no signature, and none takes `inplace`
        return None
    return names.index("inplace") if "inplace" in names else None
