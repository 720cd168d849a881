"""Choices along a dimension: the place of the greatest or least element, and the k greatest with their places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from memcomp.capture.reader import Reader, real, whole
from memcomp.capture.rules_reduce import best, guarded, layout
from memcomp.capture.table import Rule
from memcomp.capture.value import Factor, Value, wrap
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal

MOST = 64
"""Results of a top-k that a kernel keeps in registers while it walks a row."""


def _place(monoid: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is None:
            return _place_of_all(r, x, monoid)
        return best(r, x, monoid, wrap(dim, len(x.dims)), keepdim)[1]

    return read


def _place_of_all(r: Reader, x: Value, monoid: str) -> Value:
    if len(x.dims) != 1:
        raise Refusal(f"{monoid} over all dimensions", hint="flatten first")
    return best(r, x, monoid, 0, False)[1]


def _topk(r: Reader, node: fx.Node, x: Value, k: int, dim: int = -1, largest: bool = True,
          sorted: bool = True) -> tuple[Value, Value]:
    """The k greatest with their places, in falling order; ties take the lowest place.  Of a dimension that was merged
    from several the place is the row-major index over these."""
    if not isinstance(k, int) or not 0 < k <= MOST:
        raise Refusal(f"the {k} greatest", hint=f"k is a number from 1 to {MOST}")
    if not largest:
        raise Refusal("the k least elements", hint="the k greatest of their negatives")
    d = wrap(dim, len(x.dims))
    v = real(x) if x.is_real else whole(x)
    rows = layout(r, v, [d])
    body, guard = guarded(r, v.at(rows.index), "topk", rows.over)
    order = Factor(k, r.rank("K", k))
    axes = (*rows.kept, order)
    names = r.select("T", axes, body, Reduce("topk", rows.over), guard, not v.is_real)
    return _ordered(r, v, d, axes, names[0], v.dtype), _ordered(r, v, d, axes, names[1], torch.int64)


def _ordered(r: Reader, like: Value, dim: int, axes: tuple[Factor, ...], name: str, dtype: torch.dtype) -> Value:
    """The result, whose order rank is its last axis, in torch's order of dimensions."""
    kept = [f for n, d in enumerate(like.dims) for f in d if n != dim]
    assert len(kept) == len(axes) - 1
    sizes = [1 if n == dim else len(d) for n, d in enumerate(like.dims)]
    before = sum(sizes[:dim])
    dims, k = [], 0
    for n, w in enumerate(sizes):
        dims.append((axes[-1],) if n == dim else axes[k:k + w])
        k += 0 if n == dim else w
    flat = r.view(Value(tuple((f,) for f in axes), dtype, lambda ix: ix[0]), axes, name)
    return Value(tuple(dims), dtype, lambda ix: flat.at((*ix[:before], *ix[before + 1:], ix[before])))


RULES: dict[str, Rule] = {
    "argmax": Rule("reduce", _place("argmax")), "argmin": Rule("reduce", _place("argmin")),
    "topk": Rule("reduce", _topk),
}
