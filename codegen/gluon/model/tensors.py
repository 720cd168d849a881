"""Functions of blocks of registers, named as Gluon names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memcomp.codegen.gluon.model import values as v
from memcomp.codegen.gluon.model.layouts import AUTO
from memcomp.codegen.gluon.model.values import I32, DType, Fault, Tensor


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    if (end - start) & (end - start - 1) or end <= start:
        raise Fault(f"a range of {end - start}")
    return Tensor(np.arange(start, end), I32, layout or AUTO)


def full(shape: Sequence[int], value: Any, dtype: DType, layout: Any = None) -> Tensor:
    data = value.data if isinstance(value, Tensor) else value
    return v.rounded(np.full(tuple(int(n) for n in shape), data).astype(dtype.numpy), dtype, layout or AUTO)


def zeros(shape: Sequence[int], dtype: DType, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


def full_like(x: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full(x.shape if shape is None else shape, value, dtype or x.dtype, layout or x.layout)


def zeros_like(x: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full_like(x, 0, shape, dtype, layout)


def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    if not x.shape:
        raise Fault("a single value has no layout")
    return Tensor(x.data, x.dtype, layout)


def cast(x: Any, dtype: DType, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
    return v.tensor(x).to(dtype, fp_downcast_rounding, bitcast)


def broadcast(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a, b = v.tensor(a), v.tensor(b)
    layout, shape = v.layout_of(a, b), np.broadcast_shapes(a.data.shape, b.data.shape)
    return (Tensor(np.broadcast_to(a.data, shape), a.dtype, layout),
            Tensor(np.broadcast_to(b.data, shape), b.dtype, layout))


def where(condition: Any, a: Any, b: Any) -> Tensor:
    c = v.tensor(condition)
    a, b, dtype = v.together(a, b)
    layout = v.layout_of(c, a, b)
    ranks = {len(t.shape) for t in (c, a, b) if t.shape}
    if len(ranks) > 1:
        raise Fault(f"where of {c.shape}, {a.shape}, {b.shape}")
    return Tensor(np.where(c.data != 0, v.cast(a, dtype).data, v.cast(b, dtype).data), dtype, layout)


def maximum(a: Any, b: Any, propagate_nan: str = "none") -> Tensor:
    return v.binary("highest" if propagate_nan == "all" else "most", a, b)


def minimum(a: Any, b: Any, propagate_nan: str = "none") -> Tensor:
    return v.binary("lowest" if propagate_nan == "all" else "least", a, b)


def clamp(x: Any, low: Any, high: Any, propagate_nan: str = "none") -> Tensor:
    return minimum(maximum(x, low, propagate_nan), high, propagate_nan)


def fma(a: Any, b: Any, c: Any) -> Tensor:
    layout = v.layout_of(*(v.tensor(x) for x in (a, b, c)))
    (a, b, dtype), c = v.together(a, b), v.tensor(c)
    return v.rounded((a.data.astype(np.float64) * b.data + c.data).astype(dtype.numpy), dtype, layout)


def _function(name: str, of: Callable[[Any], Any], whole: bool = False) -> Callable[[Any], Tensor]:
    def apply(x: Any) -> Tensor:
        x = v.tensor(x)
        if x.dtype.kind != "f" and not whole:
            raise Fault(f"{name} of {x.dtype}")
        return v.rounded(of(x.data).astype(x.dtype.numpy), x.dtype, x.layout)
    return apply


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt,
    "sqrt_rn": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "floor": np.floor, "ceil": np.ceil, "abs": np.abs,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
}


def _reduction(of: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axis: int | None = None, keep_dims: bool = False) -> Tensor:
        if axis is None:
            x, axis = Tensor(x.data.reshape(-1), x.dtype, AUTO), 0
        axis += len(x.shape) * (axis < 0)
        dtype = I32 if x.dtype.kind in "iub" and x.dtype.bits < 32 else x.dtype
        out = v.rounded(of(x.data.astype(dtype.numpy), axis=axis).astype(dtype.numpy), dtype,
                        v.without(x.layout, axis, len(x.shape)))
        return v.expand_dims(out, axis) if keep_dims else out
    return apply


def reduce(x: Any, axis: int, combine: Callable[..., Any], keep_dims: bool = False) -> Any:
    """A fold by halves, neighbours first: any order is as good, or the text may not ask for it."""
    several = isinstance(x, tuple)
    parts = tuple(x) if several else (x,)
    rank, layout = len(parts[0].shape), v.layout_of(*parts)
    axis += rank * (axis < 0)
    held = [np.moveaxis(p.data, axis, 0) for p in parts]
    while held[0].shape[0] > 1:
        left = [Tensor(h[0::2], p.dtype, AUTO) for h, p in zip(held, parts, strict=True)]
        right = [Tensor(h[1::2], p.dtype, AUTO) for h, p in zip(held, parts, strict=True)]
        made = combine(*left, *right)
        held = [t.data for t in (made if several else (made,))]
    out = [Tensor(h[0], p.dtype, v.without(layout, axis, rank)) for h, p in zip(held, parts, strict=True)]
    if keep_dims:
        out = [v.expand_dims(t, axis) for t in out]
    return tuple(out) if several else out[0]


def cdiv(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


NAMED: dict[str, Callable[..., Any]] = {
    **{name: _function(name, of, name == "abs") for name, of in _FUNCTIONS.items()},
    "sum": _reduction(np.sum), "max": _reduction(np.fmax.reduce), "min": _reduction(np.fmin.reduce),
    "fdiv": lambda a, b: v.binary("truediv", a, b), "div_rn": lambda a, b: v.binary("truediv", a, b),
}

__all__ = ["arange", "broadcast", "cast", "cdiv", "clamp", "convert_layout", "fma", "full", "full_like", "maximum",
           "minimum", "reduce", "where", "zeros", "zeros_like"]
