"""Norms and spreads, built from means: what torch names, written as the statements that it stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memcomp.capture.extent import expression, product, quotient
from memcomp.capture.masks import make
from memcomp.capture.reader import Reader, meta, real
from memcomp.capture.rules_map import apply
from memcomp.capture.rules_reduce import dimensions, reduced
from memcomp.capture.table import Rule
from memcomp.capture.value import Value, constant, reshape
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const, Expr

REAL = torch.float32


def count(x: Value, dims: Sequence[int]) -> Expr:
    """How many elements the dimensions hold, as a real number."""
    return make("real", expression(product(*(x.shape[d] for d in dims))))


def _scalar(e: Expr) -> Value:
    return Value((), REAL, lambda _: e)


def mean(r: Reader, x: Value, dims: Sequence[int], keepdim: bool = True) -> Value:
    return apply("div", x.dtype, reduced(r, real(x), "sum", dims, keepdim, "R"), _scalar(count(x, dims)))


def spread(r: Reader, x: Value, dims: Sequence[int], keepdim: bool,
           correction: float = 0) -> tuple[Value, Value, Value]:
    """Mean (dimensions kept), x - mean, and sum (x - mean)**2 / (n - correction)."""
    x = real(x)
    middle = mean(r, x, dims)
    centred = apply("sub", x.dtype, x, middle)
    squares = reduced(r, apply("square", x.dtype, centred), "sum", dims, keepdim, "R")
    n = count(x, dims)
    left = make("max", make("sub", n, Const(float(correction))), Const(0.0)) if correction else n
    return middle, centred, apply("div", x.dtype, squares, _scalar(left))


def _correction(args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Any, float, bool]:
    """dim, correction and keepdim of torch.var's two forms: (unbiased) or (dim, unbiased or correction=, keepdim)."""
    rest = list(args)
    dim = kw.pop("dim", kw.pop("axis", None))
    if rest and not isinstance(rest[0], bool):
        dim = rest.pop(0)
    unbiased = kw.pop("unbiased", rest.pop(0) if rest else True)
    keepdim = bool(kw.pop("keepdim", rest.pop(0) if rest else False))
    correction = kw.pop("correction", None)
    if correction is None:
        correction = 1 if unbiased is True or unbiased is None else 0 if unbiased is False else unbiased
    if kw or not isinstance(correction, (int, float)):
        raise Refusal("a variance with arguments that its rule does not know")
    return dim, float(correction), keepdim


def _variance(root: bool, also_mean: bool) -> Callable[..., Any]:
    def read(r: Reader, node: fx.Node, x: Value, *args: Any, **kw: Any) -> Any:
        dim, correction, keepdim = _correction(args, kw)
        dims = dimensions(x, dim)
        middle, _, var = spread(r, x, dims, keepdim, correction)
        out = apply("sqrt", x.dtype, var) if root else var
        if not also_mean:
            return out
        return out, middle if keepdim else reshape(middle, var.shape)

    return read


def _affine(x: Value, gain: Value | None, bias: Value | None) -> Value:
    out = x if gain is None else apply("mul", x.dtype, x, real(gain))
    return out if bias is None else apply("add", x.dtype, out, real(bias))


def _scaled(x: Value, var: Value, eps: float) -> Value:
    return apply("mul", x.dtype, x, apply("rsqrt", x.dtype, apply("add", x.dtype, var, constant(eps, REAL))))


def _last(x: Value, shape: Any) -> list[int]:
    n = len(shape) if isinstance(shape, tuple) else 1
    return list(range(len(x.dims) - n, len(x.dims)))


def _layer_norm(r: Reader, node: fx.Node, x: Value, normalized_shape: Any, weight: Value | None = None,
                bias: Value | None = None, eps: float = 1e-5, *_: Any) -> Any:
    centred, var = spread(r, x, _last(x, normalized_shape), True)[1:]
    return _affine(_scaled(centred, var, eps), weight, bias)


def _rms_norm(r: Reader, node: fx.Node, x: Value, normalized_shape: Any, weight: Value | None = None,
              eps: float | None = None) -> Value:
    if eps is None:
        eps = torch.finfo(meta(node).dtype).eps
    squares = mean(r, apply("square", x.dtype, real(x)), _last(x, normalized_shape))
    return _affine(_scaled(real(x), squares, eps), weight, None)


def _group_norm(r: Reader, node: fx.Node, x: Value, num_groups: int, weight: Value | None = None,
                bias: Value | None = None, eps: float = 1e-5, *_: Any) -> Value:
    each = quotient(x.shape[1], num_groups)
    if each is None:
        raise Refusal(f"{num_groups} groups of {x.shape[1]} channels")
    parts = reshape(real(x), (x.shape[0], num_groups, each, *x.shape[2:]))
    centred, var = spread(r, parts, list(range(2, len(parts.dims))), True)[1:]
    out = reshape(_scaled(centred, var, eps), x.shape)
    column = (x.shape[1], *(1 for _ in x.shape[2:]))
    return _affine(out, *(None if v is None else reshape(v, column) for v in (weight, bias)))


def length(r: Reader, x: Value, p: Any, dims: Sequence[int], keepdim: bool) -> Value:
    """The p-norm over the dimensions."""
    x = real(x)
    size = apply("abs", x.dtype, x)
    if p in (2, None, "fro"):
        return apply("sqrt", x.dtype, reduced(r, apply("square", x.dtype, x), "sum", dims, keepdim, "R"))
    if p == 1:
        return reduced(r, size, "sum", dims, keepdim, "R")
    if p in (math.inf, -math.inf):
        return reduced(r, size, "max" if p > 0 else "min", dims, keepdim, "G")
    raise Refusal(f"the norm of order {p}", hint="known: 1, 2, inf, -inf")


def _norm(r: Reader, node: fx.Node, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False, *,
          ord: Any = 2, dtype: Any = None, out: Any = None) -> Value:
    return length(r, x, p if ord == 2 else ord, dimensions(x, dim), keepdim)


def _linalg_norm(r: Reader, node: fx.Node, x: Value, ord: Any = None, dim: Any = None, keepdim: bool = False, *,
                 dtype: Any = None, out: Any = None) -> Value:
    dims = dimensions(x, dim)
    if len(dims) == 2 and ord not in (None, "fro"):
        raise Refusal("a norm of matrices that is none of their elements")
    return length(r, x, ord, dims, keepdim)


def _normalize(r: Reader, node: fx.Node, x: Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12,
               out: Any = None) -> Value:
    size = length(r, x, p, dimensions(x, dim), True)
    return apply("div", x.dtype, real(x), apply("max", x.dtype, size, constant(eps, REAL)))


RULES: dict[str, Rule] = {
    "var": Rule("reduce", _variance(False, False)), "std": Rule("reduce", _variance(True, False)),
    "var_mean": Rule("reduce", _variance(False, True)), "std_mean": Rule("reduce", _variance(True, True)),
    "layer_norm": Rule("reduce", _layer_norm), "rms_norm": Rule("reduce", _rms_norm),
    "group_norm": Rule("reduce", _group_norm), "normalize": Rule("reduce", _normalize),
    "norm": Rule("reduce", _norm), "linalg_vector_norm": Rule("reduce", _norm), "vector_norm": Rule("reduce", _norm),
    "linalg_norm": Rule("reduce", _linalg_norm),
}
