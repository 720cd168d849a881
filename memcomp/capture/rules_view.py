"""Views: rearrangements of the same elements.  Shapes come from the node's own example value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memcomp.capture.extent import Extent, expression, extent, product, same
from memcomp.capture.masks import make
from memcomp.capture.pieces import cat
from memcomp.capture.reader import Reader, meta, shape_of
from memcomp.capture.table import Rule, base_name
from memcomp.capture.value import (
    UNIT,
    ZERO,
    Pieces,
    Value,
    constant,
    expand,
    permute,
    reshape,
    shift,
    wrap,
)
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Call, Const, Expr, lift


def out_shape(node: fx.Node) -> tuple[Extent, ...]:
    return shape_of(meta(node))


def _view(r: Reader, node: fx.Node, x: Value, *args: Any, **kw: Any) -> Value:
    if any(isinstance(a, torch.dtype) for a in (*args, *kw.values())):
        raise Refusal("view as another dtype")
    return reshape(x, out_shape(node))


def _expand(r: Reader, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return expand(x, out_shape(node))


def _permute(r: Reader, node: fx.Node, x: Value, *dims: Any, **kw: Any) -> Value:
    order = kw.get("dims", dims[0] if len(dims) == 1 and isinstance(dims[0], tuple) else dims)
    return permute(x, [wrap(d, len(x.dims)) for d in order])


def _transpose(r: Reader, node: fx.Node, x: Value, dim0: int, dim1: int) -> Value:
    n = len(x.dims)
    order = list(range(n))
    a, b = wrap(dim0, n), wrap(dim1, n)
    order[a], order[b] = b, a
    return permute(x, order)


def _t(r: Reader, node: fx.Node, x: Value) -> Value:
    return permute(x, list(range(len(x.dims)))[::-1])


def _m_t(r: Reader, node: fx.Node, x: Value) -> Value:
    n = len(x.dims)
    return permute(x, [*range(n - 2), n - 1, n - 2])


def _getattr(r: Reader, node: fx.Node, x: Value, name: str) -> Value:
    if name in ("mT", "mH", "T"):
        return _t(r, node, x) if name == "T" else _m_t(r, node, x)
    raise Refusal(f"attribute {name} of a tensor")


def _same(r: Reader, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return x


def clip(r: Reader, i: Any, n: Extent) -> Expr:
    """A slice's start as torch means it: negative counts from the end, clipped to 0..n."""
    if i is None:
        return ZERO
    size = expression(n)
    if isinstance(i, int):
        if isinstance(n, int):
            return Const(max(0, min(i + n if i < 0 else i, n)))
        return lift(i) if i >= 0 else Call("add", (size, Const(i)))
    start = lift(i)
    if r.proves(Call("le", (ZERO, start))):
        return start
    if r.proves(Call("lt", (start, ZERO))):
        return Call("add", (size, start))
    raise Refusal("a slice that may start at either end")


def slice_dim(r: Reader, x: Value, dim: int, start: Any, step: Any, length: Extent) -> Value:
    """x[start::step] of known length."""
    if step not in (None, 1) and not (isinstance(step, int) and step > 0):
        raise Refusal(f"slice with step {step}")
    first = clip(r, start, x.shape[dim])
    stride = Const(step or 1)

    def source(i: Expr) -> Expr:
        j = i if stride.value == 1 else make("mul", i, stride)
        return j if first == ZERO else make("add", j, first)

    if first == ZERO and stride.value == 1 and same(length, x.shape[dim]):
        return x
    if x.pieces is not None and x.pieces.dim == dim and stride.value == 1:
        start_at: Extent = 0
        for piece in x.pieces.values:
            if first == expression(start_at) and same(length, piece.shape[dim]):
                return piece
            start_at = product(1, start_at + piece.shape[dim])
    return shift(x, dim, length, source)


def _slice(r: Reader, node: fx.Node, x: Value, dim: int = 0, start: Any = None, end: Any = None,
           step: Any = 1) -> Value:
    d = wrap(dim, len(x.dims))
    return slice_dim(r, x, d, start, step, out_shape(node)[d])


def _narrow(r: Reader, node: fx.Node, x: Value, dim: int, start: Any, length: Any) -> Value:
    d = wrap(dim, len(x.dims))
    return slice_dim(r, x, d, start, 1, out_shape(node)[d])


def select(r: Reader, x: Value, dim: int, at: Any) -> Value:
    """x at one index of a dimension; a negative one counts from the end."""
    n, i = expression(x.shape[dim]), lift(at)
    if not r.proves(Call("le", (ZERO, i))):
        if not r.proves(Call("lt", (i, ZERO))):
            raise Refusal("an index that may count from either end")
        i = Call("add", (n, i))
    w = shift(x, dim, 1, lambda _: i)
    dims = [*w.dims[:dim], *w.dims[dim + 1:]]
    first = sum(len(d) for d in w.dims[:dim])
    return Value(tuple(dims), x.dtype, lambda ix: w.at((*ix[:first], ZERO, *ix[first:])))


def _select(r: Reader, node: fx.Node, x: Value, dim: int, index: Any) -> Value:
    if isinstance(index, Value):
        raise Refusal("select by a tensor")
    return select(r, x, wrap(dim, len(x.dims)), index)


def _pieces(r: Reader, node: fx.Node, x: Value, dim: int) -> tuple[Value, ...]:
    out = []
    at: Expr = Const(0)
    d = wrap(dim, len(x.dims))
    for piece in meta(node):
        length = extent(piece.shape[d])
        out.append(slice_dim(r, x, d, at, 1, length))
        at = r.simplify(Call("add", (at, expression(length))))
    return tuple(out)


def _split(r: Reader, node: fx.Node, x: Value, split_size_or_sections: Any = None, dim: int = 0,
           **_: Any) -> tuple[Value, ...]:
    return _pieces(r, node, x, dim)


def _unbind(r: Reader, node: fx.Node, x: Value, dim: int = 0) -> tuple[Value, ...]:
    d = wrap(dim, len(x.dims))
    return tuple(select(r, x, d, k) for k in range(len(meta(node))))


def _cat(r: Reader, node: fx.Node, tensors: tuple[Value, ...], dim: int = 0, **kw: Any) -> Value:
    dim = kw.get("axis", dim)
    return cat(r, list(tensors), wrap(dim, len(out_shape(node))))


def _stack(r: Reader, node: fx.Node, tensors: tuple[Value, ...], dim: int = 0) -> Value:
    d = wrap(dim, len(out_shape(node)))
    return cat(r, [_widened(t, d) for t in tensors], d)


def _widened(x: Value, d: int) -> Value:
    """`x.unsqueeze(d)`; what was put together stays so."""
    out = reshape(x, (*x.shape[:d], 1, *x.shape[d:]))
    if x.pieces is None:
        return out
    pieces = tuple(_widened(p, d) for p in x.pieces.values)
    return replace(out, pieces=Pieces(x.pieces.dim + (d <= x.pieces.dim), pieces))


def _repeat(r: Reader, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    shape = out_shape(node)
    out = reshape(x, (*(1,) * (len(shape) - len(x.dims)), *x.shape))
    for d, (old, new) in enumerate(zip(out.shape, shape, strict=True)):
        if not same(old, new):
            n = expression(old)
            out = shift(out, d, new, (lambda _: ZERO) if old == 1 else (lambda i, n=n: Call("mod", (i, n))))  # type: ignore[misc]
    return out


def _repeat_interleave(r: Reader, node: fx.Node, x: Value, repeats: Any, dim: int | None = None, **_: Any) -> Value:
    if isinstance(repeats, Value):
        raise Refusal("repeat_interleave with a tensor of counts")
    if dim is None:
        x, dim = reshape(x, (product(*x.shape),)), 0
    d = wrap(dim, len(x.dims))
    n = lift(repeats)
    return shift(x, d, out_shape(node)[d], lambda i: Call("floordiv", (i, n)))


def _flip(r: Reader, node: fx.Node, x: Value, *dims: Any) -> Value:
    for d in dims[0] if isinstance(dims[0], tuple) else dims:
        k = wrap(d, len(x.dims))
        last = Call("sub", (expression(x.shape[k]), Const(1)))
        x = shift(x, k, x.shape[k], lambda i, last=last: Call("sub", (last, i)))  # type: ignore[misc]
    return x


def insert_unit(x: Value, dim: int) -> Value:
    first = sum(len(d) for d in x.dims[:dim])
    return Value((*x.dims[:dim], (UNIT,), *x.dims[dim:]), x.dtype, lambda ix: x.at((*ix[:first], *ix[first + 1:])))


def _slice_scatter(r: Reader, node: fx.Node, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None,
                   step: Any = 1) -> Value:
    """x with other elements from `start` on, as many as `src` has."""
    d = wrap(dim, len(x.dims))
    n, count, first = x.shape[d], src.shape[d], 0 if start is None else start
    if step != 1 or not isinstance(first, int) or first < 0 and not isinstance(n, int):
        raise Refusal("elements that are replaced at run-time places")
    first = first if not isinstance(n, int) else min(max(first + n if first < 0 else first, 0), n)
    room = len(range(n)[first:end]) if isinstance(n, int) and isinstance(end, int | None) else count
    asked = (*x.shape[:d], room, *x.shape[d + 1:])
    if len(asked) != len(src.shape) or not all(map(same, asked, src.shape)):
        raise Refusal("elements that are replaced by others than there is room for")
    rest = product(1, n - first - count)
    after = slice_dim(r, x, d, expression(product(1, first + count)), 1, rest)
    return cat(r, [slice_dim(r, x, d, 0, 1, first), src, after], d)


def _select_scatter(r: Reader, node: fx.Node, x: Value, src: Value, dim: int, index: Any) -> Value:
    d = wrap(dim, len(x.dims))
    end = index + 1 or None if isinstance(index, int) else None
    return _slice_scatter(r, node, x, insert_unit(src, d), d, index, end)


def _dropout(r: Reader, node: fx.Node, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False,
             train: bool | None = None) -> Value:
    if (training if train is None else train) and p > 0:
        raise Refusal("dropout is active", hint="eval() or p=0: random masks are not expressible")
    return x


def _native_dropout(r: Reader, node: fx.Node, x: Value, p: float, train: bool) -> tuple[Value, ...]:
    return _dropout(r, node, x, p, train), constant(True, torch.bool, x.shape)


RULES: dict[str, Rule] = {
    "view": Rule("view", _view), "expand": Rule("view", _expand), "permute": Rule("view", _permute),
    "transpose": Rule("view", _transpose), "t": Rule("view", _t), "numpy_T": Rule("view", _t),
    "mT": Rule("view", lambda r, node, x: _transpose(r, node, x, -2, -1)),
    "getattr": Rule("view", _getattr), "same": Rule("view", _same), "slice": Rule("view", _slice),
    "narrow": Rule("view", _narrow), "select": Rule("view", _select), "split": Rule("view", _split),
    "chunk": Rule("view", lambda r, node, x, chunks, dim=0: _pieces(r, node, x, dim)),
    "split_with_sizes": Rule("view", _split), "tensor_split": Rule("view", _split), "unbind": Rule("view", _unbind),
    "cat": Rule("view", _cat), "stack": Rule("view", _stack), "repeat": Rule("view", _repeat),
    "tile": Rule("view", _repeat), "slice_scatter": Rule("view", _slice_scatter),
    "select_scatter": Rule("view", _select_scatter),
    "repeat_interleave": Rule("view", _repeat_interleave), "flip": Rule("view", _flip),
    "dropout": Rule("view", _dropout), "native_dropout": Rule("view", _native_dropout),
}

__all__ = ["RULES", "base_name", "cat", "insert_unit", "out_shape", "select", "slice_dim"]
