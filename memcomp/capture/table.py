"""One table: operator name -> rule, for Dynamo functions, methods and operators and for aten overloads alike."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

Kind = Literal["view", "source", "map", "index", "scan", "reduce", "contract"]


@dataclass(frozen=True, slots=True)
class Rule:
    """kind: what reading it may cost.  read(reader, node, *args, **kwargs): the value, arguments named as in torch.

    view: rearranges; source: needs no tensor; map: point by point; index: reads where another tensor says;
    scan: only where it folds to index arithmetic; reduce and contract: write statements.
    """

    kind: Kind
    read: Callable[..., Any]


_OPERATORS = {
    "and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not", "inv": "bitwise_not",
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "not_": "logical_not",
}
_IN_PLACE = {f for n, f in vars(operator).items() if n.startswith("i") and n[1:] in vars(operator)}
ALIASES = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__invert__": "bitwise_not", "__getitem__": "getitem",
    "logical_and": "bitwise_and", "logical_or": "bitwise_or", "multiply": "mul", "divide": "div", "true_divide": "div",
    "subtract": "sub", "negative": "neg", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "not_equal": "ne", "_unsafe_view": "view", "reshape": "view", "_reshape_copy": "view", "view_copy": "view",
    "flatten": "view", "unflatten": "view", "unsqueeze": "view", "squeeze": "view", "view_as": "view",
    "unsqueeze_copy": "view", "squeeze_copy": "view", "reshape_as": "view", "expand_as": "expand", "broadcast_to": "expand",
    "expand_copy": "expand", "clone": "same", "contiguous": "same", "detach": "same", "alias": "same", "lift_fresh_copy": "same",
    "lift_fresh": "same", "to": "convert", "_to_copy": "convert", "type": "convert", "type_as": "convert",
    "float": "convert", "double": "convert", "half": "convert", "bfloat16": "convert", "int": "convert",
    "long": "convert", "bool": "convert", "convert_element_type": "convert", "_softmax": "softmax",
    "_log_softmax": "log_softmax", "special_softmax": "softmax", "absolute": "abs", "max_pool": "", "swapaxes": "transpose", "swapdims": "transpose",
    "concat": "cat", "concatenate": "cat", "feature_dropout": "dropout", "native_dropout": "native_dropout",
    "clamp_min": "clamp_min", "clip": "clamp", "special_expit": "sigmoid", "slice_copy": "slice", "permute_copy": "permute",
    "t_copy": "t", "transpose_copy": "transpose", "index": "index", "_unsafe_index": "index", "narrow_copy": "narrow",
}


def base_name(node: fx.Node) -> str:
    """The operator's name without library, overload and spelling; "" where the node is no operator."""
    t: Any = node.target
    if node.op == "call_method":
        name = str(t)
    elif node.op == "call_function":
        if isinstance(t, torch._ops.OpOverload):
            if t._schema.is_mutable or t.namespace not in ("aten", "prims", "_C"):
                return f"{t.namespace}.{t._opname}"
            name = t._opname
        elif isinstance(t, torch._ops.HigherOrderOperator):
            return f"higher_order.{t.name()}"
        else:
            name = getattr(t, "__name__", "")
            if t in _IN_PLACE:
                return f"operator.{name}"
            if getattr(operator, name, None) is t:
                name = _OPERATORS.get(name, name)
    else:
        return ""
    return ALIASES.get(name, name)


@cache
def rules() -> dict[str, Rule]:
    """All rules, by base name."""
    from memcomp.capture import rules_index, rules_map, rules_reduce, rules_view

    out: dict[str, Rule] = {}
    for module in (rules_view, rules_map, rules_index, rules_reduce):
        for name, rule in module.RULES.items():
            assert name not in out, name
            out[name] = rule
    return out


def rule(node: fx.Node) -> Rule | None:
    return rules().get(base_name(node)) if node.op in ("call_function", "call_method") else None


def mutates(node: fx.Node) -> bool:
    """Does the node write into one of its arguments?"""
    t: Any = node.target
    if node.op == "call_method":
        return str(t).endswith("_") and not str(t).endswith("__") or str(t) in ("__setitem__", "__iadd__")
    if node.op != "call_function":
        return False
    if isinstance(t, torch._ops.OpOverload):
        return bool(t._schema.is_mutable)
    if t is operator.setitem or t in _IN_PLACE or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    name = getattr(t, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not t


_KEYWORDS = {"input": 0, "self": 0, "tensor": 0, "tensors": 0}


def normal(r: Rule, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the first one positional, whatever it is called."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if not args:
        for k in list(kwargs):
            if k in _KEYWORDS:
                args.insert(0, kwargs.pop(k))
    return tuple(args), kwargs


def attribute(gm: torch.nn.Module, path: str) -> Any:
    out: Any = gm
    for part in path.split("."):
        out = getattr(out, part, None)
    return out
