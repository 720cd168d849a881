"""Relax operators as torch operators, one row each: `row(graph, attributes, *arguments)` writes the nodes.

What torch operators mean is said once, by the rules of capture.  The reader compares dtype and shape of what a row
makes with what TVM says; what torch computes in another dtype (the quotient of integers) is so refused.  Arguments are
nodes, sizes as numbers or nodes, tuples of these; attributes are those of TVM's operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.nn import functional

from memcomp.capture.extent import extent, same
from memcomp.capture.relax.graph import Graph, value
from memcomp.ir.errors import Refusal

Row: TypeAlias = Callable[..., fx.Node]

_SAME = {  # the arguments are torch's, in torch's order
    "abs": torch.abs, "ceil": torch.ceil, "cos": torch.cos, "erf": torch.erf, "exp": torch.exp, "floor": torch.floor,
    "log": torch.log, "negative": torch.neg, "round": torch.round, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid,
    "sign": torch.sign, "sin": torch.sin, "sqrt": torch.sqrt, "square": torch.square, "tan": torch.tan,
    "tanh": torch.tanh, "trunc": torch.trunc, "isnan": torch.isnan, "isinf": torch.isinf, "isfinite": torch.isfinite,
    "logical_not": torch.logical_not, "bitwise_not": torch.bitwise_not, "nn.relu": torch.relu, "nn.relu6":
    functional.relu6, "nn.silu": functional.silu, "nn.gelu": functional.gelu, "tril": torch.tril, "triu": torch.triu,
    "broadcast_to": torch.broadcast_to, "reshape": torch.reshape, "flatten": torch.flatten, "where": torch.where,
    "outer": torch.outer,
}
_BINARY = {
    "add": torch.add, "subtract": torch.sub, "multiply": torch.mul, "divide": torch.div, "power": torch.pow,
    "floor_divide": torch.floor_divide, "floor_mod": torch.remainder, "maximum": torch.maximum,
    "minimum": torch.minimum, "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge,
    "less": torch.lt, "less_equal": torch.le, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor, "bitwise_and": torch.bitwise_and, "bitwise_or": torch.bitwise_or,
    "bitwise_xor": torch.bitwise_xor,
}
_TENSORS_ONLY = ("maximum", "minimum", "logical_and", "logical_or", "logical_xor")
_REDUCED = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}


def _binary(target: Any, numbers: bool) -> Row:
    def row(g: Graph, _: Any, x: Any, y: Any) -> fx.Node:
        return g(target, x, g.plain(y) if numbers and isinstance(g.plain(x), fx.Node) else y)

    return row


def _reduced(target: Any) -> Row:
    def row(g: Graph, a: Any, x: fx.Node) -> fx.Node:
        return g(target, x, _dims(a.axis, x), keepdim=bool(a.keepdims))

    return row


def _dims(axes: Sequence[int] | None, x: fx.Node) -> tuple[int, ...]:
    """All, where none is named."""
    return tuple(range(value(x).ndim)) if axes is None else tuple(int(k) for k in axes)


def _variance(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    return g(torch.var, x, _dims(a.axis, x), correction=0, keepdim=bool(a.keepdims))


def _prod(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    dims = _dims(a.axis, x)
    if len(dims) != 1:
        raise Refusal("a product over several dimensions")
    return g(torch.prod, x, dims[0], keepdim=bool(a.keepdims))


def _place(target: Any) -> Row:
    return lambda g, a, x: g(target, x, None if a.axis is None else int(a.axis), keepdim=bool(a.keepdims))


def _topk(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    if a.ret_type != "both" or dtype(a.dtype) != torch.int64:
        raise Refusal(f"top-k that gives {a.ret_type}, places as {a.dtype}", hint="both, and int64")
    return g(torch.topk, x, int(a.k), int(a.axis), bool(a.largest))


def _cumsum(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    if a.exclusive or a.axis is None:
        raise Refusal("a running sum that leaves its own element out, or runs over all dimensions")
    return g(torch.cumsum, x, int(a.axis), dtype=value(x).dtype if a.dtype is None else dtype(a.dtype))


def _take(g: Graph, a: Any, x: fx.Node, index: fx.Node) -> fx.Node:
    if a.mode != "fast":
        raise Refusal(f"elements taken in mode {a.mode!r}", hint="places outside are not looked for in mode 'fast'")
    dim = 0 if a.axis is None else int(a.axis) % value(x).ndim
    if a.axis is None:
        x = g(torch.flatten, x)
    place = g.plain(index)
    if not isinstance(place, fx.Node):
        return g(torch.select, x, dim, place)
    if value(index).ndim == 0:
        raise Refusal("a dimension indexed by a number that a tensor holds")
    if dim == 0 and value(x).ndim == 2:
        return g(functional.embedding, index, x)
    return g(torch.ops.aten.index.Tensor, x, [*[None] * dim, index])


def _slice(g: Graph, a: Any, x: fx.Node, axes: Sequence[int], begin: Sequence[Any], end: Sequence[Any],
           step: Sequence[Any] = ()) -> fx.Node:
    steps = step or [1] * len(axes)
    if wrong := [by for by in steps if not isinstance(by, int) or by < 1]:
        raise Refusal(f"a slice in steps of {wrong[0]}")
    cuts = list(zip(axes, begin, end, steps, strict=True))
    late = [c for c in cuts if isinstance(c[1], fx.Node) or isinstance(c[2], fx.Node)]
    for cut in (c for c in cuts if c not in late):
        x = g(torch.ops.aten.slice.Tensor, x, *cut)
    if len(late) > 1:
        raise Refusal("a slice with run-time ends of several dimensions", hint="one after another")
    for cut in late:  # how long it is depends on what is the less at run time, which TVM's type says
        x = g.other(torch.ops.aten.slice.Tensor, g.wanted(), x, *cut)
    return x


def _split(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    parts, dim = a.indices_or_sections, int(a.axis)
    if hasattr(parts, "value"):
        n = value(x).shape[dim]
        if not isinstance(n, int) or n % int(parts.value):
            raise Refusal("pieces of different lengths")
        return g(torch.split, x, n // int(parts.value), dim)
    return g(torch.tensor_split, x, tuple(int(k.value) for k in parts), dim)


def _expand_dims(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    n = value(x).ndim + len(a.axis)
    for dim in sorted(int(k) % n for k in a.axis):
        x = g(torch.unsqueeze, x, dim)
    return x


def _squeeze(g: Graph, a: Any, x: fx.Node) -> fx.Node:
    if a.axis is None:
        raise Refusal("all dimensions of one element taken away", hint="name them")
    return g(torch.squeeze, x, tuple(int(k) for k in a.axis))


def _full(g: Graph, a: Any, shape: Any, fill: Any) -> fx.Node:
    number = g.plain(fill)
    if isinstance(number, fx.Node):
        raise Refusal("a tensor filled with what another holds")
    return g(torch.full, shape, number, dtype=dtype(a.dtype))


def _full_like(g: Graph, a: Any, x: fx.Node, fill: Any) -> fx.Node:
    number = g.plain(fill)
    if isinstance(number, fx.Node):
        raise Refusal("a tensor filled with what another holds")
    return g(torch.full_like, x, number, dtype=value(x).dtype if a.dtype is None else dtype(a.dtype))


def _clip(g: Graph, a: Any, x: fx.Node, low: float, high: float) -> fx.Node:
    return g(torch.clamp, x, low, high)


def _product(g: Graph, a: Any, x: fx.Node, y: fx.Node) -> fx.Node:
    """TVM's sum may be wider than the operands are: then they are widened, which loses nothing."""
    wide = value(x).dtype if a.out_dtype is None else dtype(a.out_dtype)
    if wide != value(x).dtype:
        x, y = (g(torch.Tensor.to, t, wide) for t in (x, y))
    return g(torch.matmul, x, y)


def _attention(g: Graph, a: Any, q: fx.Node, k: fx.Node, v: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    """Relax has positions before heads.  A causal mask is aligned to the top left, or to the bottom right."""
    if a.window_size is not None:
        raise Refusal("attention with window_size", hint="as a bias, or written out")
    causal = a.causal_mask is not None
    square = same(extent(value(q).shape[1]), extent(value(k).shape[1]))
    if causal and (bias is not None or a.causal_mask != "TopLeft" and not square):
        raise Refusal(f"attention with the causal mask {a.causal_mask!r}, and a bias or more keys than queries",
                      hint="as a bias, or written out")
    q, k, v = (g(torch.permute, t, (0, 2, 1, 3)) for t in (q, k, v))
    scale = None if a.scale is None else float(a.scale)
    made = g(functional.scaled_dot_product_attention, q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return g(torch.permute, made, (0, 2, 1, 3))


def _last(a: Any, x: fx.Node) -> tuple[Any, ...]:
    """The shape of the dimensions that a norm takes, which torch has last."""
    n, shape = value(x).ndim, value(x).shape
    dims = sorted(int(k) % n for k in a.axes)
    if dims != list(range(n - len(dims), n)):
        raise Refusal(f"a norm over the dimensions {dims} of {n}", hint="the last ones")
    if not all(isinstance(shape[k], int) for k in dims):
        raise Refusal("a norm over a dimension of run-time length")
    return tuple(shape[k] for k in dims)


def _layer_norm(g: Graph, a: Any, x: fx.Node, gamma: fx.Node, beta: fx.Node) -> fx.Node:
    return g(functional.layer_norm, x, _last(a, x), gamma if a.scale else None, beta if a.center else None,
             float(a.epsilon))


def dtype(name: Any) -> torch.dtype:
    """torch's dtype of TVM's name.  Raises Refusal for one that torch has not."""
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise Refusal(f"elements of {name}")
    return found


ROWS: dict[str, Row] = {
    **{n: lambda g, a, *args, f=f: g(f, *args) for n, f in _SAME.items()},
    **{n: _binary(f, n not in _TENSORS_ONLY) for n, f in _BINARY.items()},
    **{n: _reduced(f) for n, f in _REDUCED.items()},
    "variance": _variance, "prod": _prod, "argmax": _place(torch.argmax), "argmin": _place(torch.argmin),
    "topk": _topk, "cumsum": _cumsum, "take": _take, "strided_slice": _slice, "split": _split,
    "gather_elements": lambda g, a, x, index: g(torch.gather, x, int(a.axis), index),
    "permute_dims": lambda g, a, x: g(torch.permute, x, _dims(a.axes, x) if a.axes else _dims(None, x)[::-1]),
    "expand_dims": _expand_dims, "squeeze": _squeeze, "clip": _clip, "full": _full, "full_like": _full_like,
    "concat": lambda g, a, x: g(torch.cat, x, int(a.axis)), "stack": lambda g, a, x: g(torch.stack, x, int(a.axis)),
    "astype": lambda g, a, x: g(torch.Tensor.to, x, dtype(a.dtype)),
    "arange": lambda g, a, start, end, step: g(torch.arange, start, end, step, dtype=dtype(a.dtype)),
    "zeros": lambda g, a, shape: g(torch.zeros, shape, dtype=dtype(a.dtype)),
    "ones": lambda g, a, shape: g(torch.ones, shape, dtype=dtype(a.dtype)),
    "zeros_like": lambda g, a, x: g(torch.zeros_like, x, dtype=None if a.dtype is None else dtype(a.dtype)),
    "ones_like": lambda g, a, x: g(torch.ones_like, x, dtype=None if a.dtype is None else dtype(a.dtype)),
    "matmul": _product, "einsum": lambda g, a, x: g(torch.einsum, str(a.subscripts), *x),
    "nn.attention": _attention, "nn.attention_bias": _attention,
    "nn.softmax": lambda g, a, x: g(torch.softmax, x, int(a.axis)),
    "nn.log_softmax": lambda g, a, x: g(torch.log_softmax, x, int(a.axis)),
    "nn.gelu_tanh": lambda g, a, x: g(functional.gelu, x, approximate="tanh"),
    "nn.leakyrelu": lambda g, a, x: g(functional.leaky_relu, x, float(a.alpha)),
    "nn.softplus": lambda g, a, x: g(functional.softplus, x, float(a.beta), float(a.threshold)),
    "nn.layer_norm": _layer_norm,
    "nn.rms_norm": lambda g, a, x, w: g(functional.rms_norm, x, _last(a, x), w, float(a.epsilon)),
    "item": lambda g, a, x, k: g(operator.getitem, x, k),
}
