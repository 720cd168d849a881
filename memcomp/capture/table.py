"""One table: operator name -> rule, for Dynamo functions, methods and operators and for aten overloads alike."""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import fx

from memcomp.capture.writes import IN_PLACE, mutates
from memcomp.ir.errors import Refusal

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
    "rshift": "bitwise_right_shift", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder",
    "not_": "logical_not",
}
_HOMES = (torch, torch.nn.functional, torch.Tensor, torch.special, torch.linalg, torch._C._nn, builtins)
"""Where torch's own functions live: a user's function that is only called like one has no rule."""
_SPELLINGS = {
    "view": "_unsafe_view reshape _reshape_copy view_copy flatten unflatten unsqueeze squeeze view_as unsqueeze_copy "
            "squeeze_copy reshape_as",
    "expand": "expand_as broadcast_to expand_copy",
    "permute": "permute_copy movedim_copy", "transpose": "transpose_copy swapaxes swapdims", "t": "t_copy",
    "same": "clone contiguous detach alias lift_fresh_copy lift_fresh",
    "convert": "to _to_copy type type_as float double half bfloat16 int long bool convert_element_type",
    "cat": "concat concatenate", "slice": "slice_copy", "narrow": "narrow_copy", "getitem": "__getitem__",
    "index": "_unsafe_index", "softmax": "_softmax special_softmax", "log_softmax": "_log_softmax",
    "bitwise_and": "__and__ logical_and", "bitwise_or": "__or__ logical_or", "bitwise_not": "__invert__ logical_not",
    "bitwise_right_shift": "__rshift__",
    "mul": "multiply", "div": "divide true_divide", "sub": "subtract", "neg": "negative", "abs": "absolute",
    "gt": "greater", "ge": "greater_equal", "lt": "less", "le": "less_equal", "ne": "not_equal", "clamp": "clip",
    "sigmoid": "special_expit", "dropout": "feature_dropout",
}
ALIASES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()}


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
        elif isinstance(t, torch._ops.OpOverloadPacket):
            space, _, name = t._qualified_op_name.partition("::")
            if space != "aten":
                return f"{space}.{name}"
        elif isinstance(t, torch._ops.HigherOrderOperator):
            return f"higher_order.{t.__name__}"
        else:
            name = getattr(t, "__name__", "")
            if t in IN_PLACE:
                return f"operator.{name}"
            if getattr(operator, name, None) is t:
                name = _OPERATORS.get(name, name)
            elif not any(getattr(home, name, None) is t for home in _HOMES):
                return f"{getattr(t, '__module__', '')}.{name}"
    else:
        return ""
    return ALIASES.get(name, name)


@cache
def rules() -> dict[str, Rule]:
    """All rules, by base name."""
    from memcomp.capture import (
        rules_attention,
        rules_contract,
        rules_index,
        rules_loss,
        rules_map,
        rules_norm,
        rules_order,
        rules_reduce,
        rules_view,
    )

    out: dict[str, Rule] = {}
    for module in (rules_view, rules_map, rules_index, rules_contract, rules_reduce, rules_attention, rules_norm,
                   rules_loss, rules_order):
        for name, rule in module.RULES.items():
            assert name not in out, name
            out[name] = rule
    return out


_OWN: dict[Any, Rule] = {}


def own(fn: Callable[..., Any], r: Rule) -> None:
    """Read calls of a user's function by a rule (`memcomp.register`)."""
    _OWN[fn] = r


def rule(node: fx.Node) -> Rule | None:
    """The node's rule.  Writing into a tensor that nobody else sees is read as making a new one."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _OWN:
        return _OWN[node.target]
    if not mutates(node):
        return rules().get(base_name(node))
    return _functional(node) if _owned(node) else None


def _functional(node: fx.Node) -> Rule | None:
    """The rule of the operator that computes what an in-place operator writes."""
    name = base_name(node).removeprefix("operator.i").removeprefix("aten.")
    name = _OPERATORS.get(name, name).removesuffix("_")
    return rules().get(ALIASES.get(name, name))


def returns_target(node: fx.Node) -> bool:
    """Does the node write into its first argument as a whole and return it?"""
    return mutates(node) and "out" not in node.kwargs and _functional(node) is not None


def _owned(node: fx.Node) -> bool:
    """Is the tensor that the node writes into fresh, and used by nobody after the node or through a view?"""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or "out" in node.kwargs:
        return False
    made = rule(target)
    if made is None or made.kind == "view" or base_name(target) == "convert":
        return False
    others = [u for u in target.users if u is not node]
    if any(mutates(u) or not u < node for u in others):
        return False
    return all((r := rule(u)) is not None and r.kind != "view" and base_name(u) != "convert" for u in others)


_FIRST = ("input", "self", "tensor", "tensors")
_SECOND = ("other", "exponent", "mat2")


def normal(r: Rule, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the first one positional, whatever it is called.  Refused where the rule does not know them."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if not args:
        args += [kwargs.pop(k) for k in _FIRST if k in kwargs]
    if base_name(node) == "where":
        if "condition" in kwargs:
            args.insert(0, kwargs.pop("condition"))
        elif len(args) > 1 and (node.op == "call_method" or node.target is torch.Tensor.where):
            args[:2] = args[1::-1]  # `x.where(condition, other)`, but `where(condition, x, other)`
    if base_name(node) == "embedding":  # the table first, as the operator takes it that torch.nn.functional's becomes
        if "weight" in kwargs:
            args.insert(0, kwargs.pop("weight"))
        elif node.target is torch.nn.functional.embedding:
            args[:2] = args[1::-1]
    if len(args) == 1 or base_name(node) == "where":
        args += [kwargs.pop(k) for k in (*_FIRST, *_SECOND) if k in kwargs]
    try:
        _signature(r).bind(None, node, *args, **kwargs)
    except TypeError as why:
        raise Refusal(f"{base_name(node)} is called in a way that its rule does not know: {why}", str(node)) from why
    return tuple(args), kwargs


def named(r: Rule, node: fx.Node) -> Mapping[str, Any]:
    """Arguments by the names that the rule has for them.  Raises Refusal as `normal` does."""
    args, kwargs = normal(r, node)
    return _signature(r).bind(None, node, *args, **kwargs).arguments


@cache
def _signature(r: Rule) -> inspect.Signature:
    return inspect.signature(r.read)


def attribute(gm: torch.nn.Module, path: str) -> Any:
    out: Any = gm
    for part in path.split("."):
        out = getattr(out, part, None)
    return out
