"""Composites, built from max, exp, sum and div: normalised exponentials and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from memcomp.capture.extent import expression, quotient, same
from memcomp.capture.masks import Parts
from memcomp.capture.pieces import cat
from memcomp.capture.reader import Reader, meta, real
from memcomp.capture.rules_contract import matmul
from memcomp.capture.rules_map import apply
from memcomp.capture.rules_reduce import INF, Rows, dimensions, kept_shape, layout
from memcomp.capture.table import Rule
from memcomp.capture.value import ZERO, Factor, Index, Value, coarse, constant, permute, shift, wrap
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Expr, Var, call, substitute

Dead = Literal["nan", "zero"]


@dataclass(frozen=True, slots=True)
class Scores:
    """One piece of the scores, laid out over rows.  live: every row is proved to keep a point in it.

    rows: None for a piece of a single element per row, whose `body` is over the kept variables of the others.
    """

    piece: Value
    rows: Rows | None
    guard: Expr | None
    live: bool
    body: Expr


@dataclass(frozen=True, slots=True)
class Normal:
    """max, exp and sum over rows of scores, by pieces.  kept: the ranks of a row."""

    parts: tuple[Scores, ...]
    weights: tuple[Expr, ...]
    kept: tuple[Factor, ...]
    top: Expr
    total: Expr
    live: bool


def _scores(r: Reader, v: Value, dims: Sequence[int], index: Index | None) -> Scores:
    """Lay out a piece (`index`: a single element per row, at this index), take its mask off, name its scores."""
    rows = layout(r, v, dims) if index is None else None
    e = r.simplify(v.at(rows.index if rows is not None else index or ()))
    if rows is None:
        return Scores(v, None, None, r.tame(e), e)
    p: Parts = r.parts(e)
    live = r.live(p.guard, rows.over)
    masked = p.guard is not None and p.outside is not None and (
        p.outside.value == -INF or r.unseen(p, rows.over))
    body = p.inside if masked else r.absorbed(e)
    if not isinstance(body, Access):
        body = Access(r.write("W", rows.axes, body, finite=r.tame(body)), rows.index)
    return Scores(v, rows, p.guard if masked else None, live or not masked, body)


def _normalise(r: Reader, x: Value, dims: Sequence[int]) -> Normal:
    parts = _pieces(r, x, dims)
    lead = next(p.rows for p in parts if p.rows is not None)
    kept = tuple(Var(str(f.rank).lower()) for f in lead.kept)
    live = any(p.live for p in parts)
    top = _joined(r, "GM", "max", lead, live, [
        p.body if p.rows is None else Access(r.write(
            "GM", lead.kept, p.body, reduce=Reduce("max", p.rows.over), guard=p.guard, finite=p.live), kept)
        for p in parts])
    weights = tuple(
        call("exp", p.body - top) if p.rows is None else Access(r.write(
            "SN", p.rows.axes, call("exp", p.body - top), guard=p.guard, positive=True), p.rows.index)
        for p in parts)
    total = _joined(r, "SD", "add", lead, live, [
        w if p.rows is None else Access(r.write(
            "SD", lead.kept, w, reduce=Reduce("sum", p.rows.over), guard=p.guard, positive=p.live), kept)
        for p, w in zip(parts, weights, strict=True)])
    return Normal(parts, weights, lead.kept, top, total, live)


def _pieces(r: Reader, x: Value, dims: Sequence[int]) -> tuple[Scores, ...]:
    """The pieces of a row, all over the same kept ranks."""
    values = x.pieces.values if x.pieces is not None and dims == [x.pieces.dim] else (x,)
    lead = next((v for v in values if not same(v.shape[dims[0]], 1)), values[0])
    out = {lead: _scores(r, lead, dims, None)}
    rows = out[lead].rows
    assert rows is not None
    axes = lead.split(rows.axes)
    for v in values:
        if v in out:
            continue
        if any(len(a) != len(b) for k, (a, b) in enumerate(zip(v.dims, lead.dims, strict=True)) if k not in dims):
            raise Refusal("pieces of scores with differently merged dimensions")
        if all(same(v.shape[d], 1) for d in dims):
            index = tuple(ZERO if k in dims else Var(str(f.rank).lower())
                          for k, d in enumerate(axes) for f in (d[:1] if k in dims else d))
            out[v] = _scores(r, v, dims, index)
        else:
            ranked = tuple(d if k in dims else axes[k] for k, d in enumerate(v.dims))
            out[v] = _scores(r, replace(v, dims=ranked), dims, None)
    return tuple(out[v] for v in values)


def _joined(r: Reader, name: str, op: str, rows: Rows, live: bool, parts: Sequence[Expr]) -> Expr:
    """Results of the pieces of a row as one temporary."""
    if len(parts) == 1:
        return parts[0]
    body = parts[0]
    for p in parts[1:]:
        body = call(op, body, p)
    kept = tuple(Var(str(f.rank).lower()) for f in rows.kept)
    return Access(r.write(name, rows.kept, body, finite=live, positive=live and op == "add"), kept)


def softmax(r: Reader, x: Value, dim: int, dtype: torch.dtype, dead: Dead = "nan") -> Value:
    """exp(x - max x) / sum of it.

    dead: what a row without live points gives, or with none but -inf.
    """
    d = wrap(dim, len(x.dims))
    n = _normalise(r, real(x), [d])
    out = []
    for p, weight in zip(n.parts, n.weights, strict=True):
        share: Expr = call("div", weight, n.total)
        if dead == "zero":
            share = call("where", call("ne", n.top, -INF), share, 0.0)
        if p.rows is None:
            out.append(_single(p.piece, n.kept, share, d, dtype))
            continue
        # a dead row has 0 / 0 in every element, as torch gives it
        guard = p.guard if n.live or dead == "zero" else None
        a = r.write("A", p.rows.axes, share, guard=guard, finite=n.live)
        out.append(r.view(replace(p.piece, dtype=dtype, pieces=None), p.rows.axes, a))
    return out[0] if len(out) == 1 else cat(r, out, d)


def _single(like: Value, kept: Sequence[Factor], e: Expr, dim: int, dtype: torch.dtype) -> Value:
    """An expression over the kept variables in the shape of `like`, whose dimension `dim` is one element."""
    def at(ix: Index) -> Expr:
        own = [i for k, d in enumerate(like.split(ix)) for i in d if k != dim]
        table: dict[Expr, Expr] = {Var(str(f.rank).lower()): i for f, i in zip(kept, own, strict=True)}
        return substitute(e, table)

    return Value(like.dims, dtype, at)


def _softmax(r: Reader, node: fx.Node, x: Value, dim: Any = None, *_: Any, **kw: Any) -> Value:
    if dim is None:
        raise Refusal("softmax without a dimension")
    return softmax(r, x, dim, meta(node).dtype)


def _safe_softmax(r: Reader, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return softmax(r, x, dim, meta(node).dtype, "zero")


def _log_sum(r: Reader, x: Value, dims: Sequence[int], keepdim: bool, ends: bool = False) -> Value:
    """max x + log of the sum of exp(x - max x).  ends: an infinite maximum is the answer (else it gives NaN)."""
    n = _normalise(r, real(x), dims)
    body = call("add", n.top, call("log", n.total))
    if ends:
        body = call("where", call("eq", call("abs", n.top), INF), n.top, body)
    name = r.write("L", n.kept, body, finite=n.live)
    lead = next(p for p in n.parts if p.rows is not None)
    assert lead.rows is not None
    return kept_shape(lead.piece, lead.rows, dims, keepdim, name)


def _logsumexp(r: Reader, node: fx.Node, x: Value, dim: Any, keepdim: bool = False) -> Value:
    return _log_sum(r, x, dimensions(x, dim), keepdim, ends=True)


def log_softmax(r: Reader, x: Value, dim: int, dtype: torch.dtype) -> Value:
    """x less the logarithm of the sum of its exponentials."""
    return apply("sub", dtype, real(x), _log_sum(r, x, [wrap(dim, len(x.dims))], True))


def _log_softmax(r: Reader, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return log_softmax(r, x, dim, meta(node).dtype)


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
    if is_causal:
        x = coarse(coarse(x, n - 2), n - 1)
        x = Value(x.dims, x.dtype, _causal(x))
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        x = apply("where", dtype, attn_mask, x, constant(-INF, dtype))
    elif attn_mask is not None:
        x = apply("add", dtype, x, attn_mask)
    return matmul(r, softmax(r, x, -1, dtype, "zero"), value, dtype)


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
