"""Composites, built from max, exp, sum and div: normalised exponentials and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from memcomp.capture.extent import expression, quotient, same
from memcomp.capture.masks import Parts, lowest
from memcomp.capture.reader import Reader, meta, real
from memcomp.capture.rules_contract import matmul
from memcomp.capture.rules_map import apply
from memcomp.capture.rules_reduce import INF, Rows, dimensions, kept_shape, layout
from memcomp.capture.table import Rule
from memcomp.capture.value import Index, Value, coarse, constant, permute, shift, wrap
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Expr, Var, call

Dead = Literal["nan", "zero"]


@dataclass(frozen=True, slots=True)
class Normal:
    """max, exp and sum over rows of scores.  live: every row is proved to keep a point."""

    rows: Rows
    guard: Expr | None
    live: bool
    body: Expr
    top: Expr
    total: Expr
    weight: Expr


def _normalise(r: Reader, x: Value, dims: Sequence[int]) -> Normal:
    rows = layout(r, x, dims)
    e = r.simplify(x.at(rows.index))
    p: Parts = r.parts(e)
    live = r.live(p.guard, rows.over)
    masked = p.guard is not None and p.outside is not None and (
        p.outside.value == -INF or lowest(p.outside) and live)
    body, guard = (p.inside, p.guard) if masked else (e, None)
    live = live or not masked
    if not isinstance(body, Access):
        body = Access(r.write("W", rows.axes, body, finite=r.tame(body)), rows.index)
    kept = tuple(Var(str(f.rank).lower()) for f in rows.kept)
    top = Access(r.write("GM", rows.kept, body, reduce=Reduce("max", rows.over), guard=guard, finite=live), kept)
    weight = Access(r.write("SN", rows.axes, call("exp", body - top), guard=guard, positive=True), rows.index)
    total = Access(r.write("SD", rows.kept, weight, reduce=Reduce("sum", rows.over), guard=guard,
                           positive=live), kept)
    return Normal(rows, guard, live, body, top, total, weight)


def softmax(r: Reader, x: Value, dim: int, dtype: torch.dtype, dead: Dead = "nan", certain: bool = True) -> Value:
    """exp(x - max x) / sum of it.

    dead: what a row without live points gives.  certain: the scores hold no -inf of their own (no mask from outside).
    """
    d = wrap(dim, len(x.dims))
    x = real(x)
    n = _normalise(r, x, [d])
    share: Expr = call("div", n.weight, n.total)
    guard = n.guard
    if dead == "zero" and not (n.live and certain):
        share = call("where", call("gt", n.top, -INF), share, 0.0)
    elif not n.live:
        guard = None  # 0 / 0 in every element of a dead row, as torch gives it
    a = r.write("A", n.rows.axes, share, guard=guard, finite=n.live)
    return r.view(Value(x.dims, dtype, x.at), n.rows.axes, a)


def _softmax(r: Reader, node: fx.Node, x: Value, dim: Any = None, *_: Any, **kw: Any) -> Value:
    if dim is None:
        raise Refusal("softmax without a dimension")
    return softmax(r, x, dim, meta(node).dtype)


def _safe_softmax(r: Reader, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return softmax(r, x, dim, meta(node).dtype, "zero", certain=False)


def _log_sum(r: Reader, x: Value, dims: Sequence[int], keepdim: bool) -> Value:
    n = _normalise(r, real(x), dims)
    name = r.write("L", n.rows.kept, call("add", n.top, call("log", n.total)), finite=n.live)
    return kept_shape(x, n.rows, dims, keepdim, name)


def _logsumexp(r: Reader, node: fx.Node, x: Value, dim: Any, keepdim: bool = False) -> Value:
    return _log_sum(r, x, dimensions(x, dim), keepdim)


def _log_softmax(r: Reader, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return apply("sub", meta(node).dtype, real(x), _log_sum(r, x, [wrap(dim, len(x.dims))], True))


def _sdpa(r: Reader, node: fx.Node, query: Value, key: Value, value: Value, attn_mask: Value | None = None,
          dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None, enable_gqa: bool = False) -> Value:
    """softmax(q k^T * scale + mask) v; rows without live points give 0; is_causal is aligned to the top left."""
    if dropout_p != 0:
        raise Refusal("dropout is active", hint="dropout_p=0: random masks are not expressible")
    if is_causal and attn_mask is not None:
        raise Refusal("is_causal together with attn_mask")
    dtype = meta(node).dtype
    if enable_gqa:
        key, value = (_repeat_heads(t, query) for t in (key, value))
    n = len(query.dims)
    swapped = [*range(n - 2), n - 1, n - 2]
    x = matmul(r, query, permute(key, swapped), dtype)
    if scale is None:
        e = query.shape[-1]
        scale = 1 / math.sqrt(e) if isinstance(e, int) and e else Value(
            (), torch.float32, lambda _: call("rsqrt", call("real", expression(e))))
    x = apply("mul", dtype, x, real(r.value(scale, torch.float32)))
    certain = True
    if is_causal:
        x = coarse(coarse(x, n - 2), n - 1)
        x = Value(x.dims, x.dtype, _causal(x))
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        x = apply("where", dtype, attn_mask, x, constant(-INF, dtype))
    elif attn_mask is not None:
        x = apply("add", dtype, x, attn_mask)
        certain = False
    return matmul(r, softmax(r, x, -1, dtype, "zero", certain), value, dtype)


def _causal(x: Value) -> Callable[[Index], Expr]:
    return lambda ix: call("where", call("le", ix[-1], ix[-2]), x.at(ix), -INF)


def _repeat_heads(t: Value, query: Value) -> Value:
    d = len(t.dims) - 3
    have, want = t.shape[d], query.shape[d]
    group = quotient(want, have)
    if same(have, want):
        return t
    if group is None and isinstance(have, int) and isinstance(want, int):
        raise Refusal(f"{want} query heads on {have} key heads")
    g = expression(group) if group is not None else call("floordiv", expression(want), expression(have))
    return shift(t, d, want, lambda i: call("floordiv", i, g))


RULES: dict[str, Rule] = {
    "softmax": Rule("reduce", _softmax), "_safe_softmax": Rule("reduce", _safe_softmax),
    "log_softmax": Rule("reduce", _log_softmax), "logsumexp": Rule("reduce", _logsumexp),
    "scaled_dot_product_attention": Rule("contract", _sdpa),
}
