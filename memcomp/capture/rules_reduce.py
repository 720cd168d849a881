"""Contractions and reductions: what becomes a statement.  Composites are built from max, exp, sum and div here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from memcomp.capture.extent import expression, quotient, same
from memcomp.capture.masks import Parts, lowest, make
from memcomp.capture.reader import Reader, meta, real, whole
from memcomp.capture.rules_map import apply, operands, truth
from memcomp.capture.table import Rule
from memcomp.capture.value import UNIT, Dim, Factor, Index, Value, align, constant, permute, shift, wrap
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, variables

INF = math.inf


# -- contractions -------------------------------------------------------------------------------------------------


def contract(r: Reader, terms: Sequence[tuple[Value, Sequence[str]]], out: Sequence[str], dtype: torch.dtype,
             hints: Mapping[str, str], name: str) -> Value:
    """Sum over the labels that are not in `out` of the product of the terms; factors without variables stay outside."""
    labels = list(dict.fromkeys([*out, *(x for _, ls in terms for x in ls)]))
    used: set[str] = set()
    dims: dict[str, Dim] = {}
    maps: dict[tuple[str, int], Callable[[Index], Index]] = {}
    for x in labels:
        holders = [(k, ls.index(x)) for k, (_, ls) in enumerate(terms) if x in ls]
        d, ms = align([terms[k][0].dims[p] for k, p in holders])
        names = [hints[x]] * len(d) if len(d) == 1 else [hints[x], *("HGXYZ"[:len(d) - 1])]
        dims[x] = tuple(r.axes(d, names, used))
        maps.update({(x, k): m for (k, _), m in zip(holders, ms, strict=True)})
    var = {x: tuple(Var(str(f.rank).lower()) for f in dims[x]) for x in labels}
    scale: list[Expr] = []
    body: Expr | None = None
    for k, (v, ls) in enumerate(terms):
        e = r.simplify(real(v).at(tuple(i for x in ls for i in maps[x, k](var[x]))))
        outer, e = pull(e)
        scale += outer
        body = e if body is None else call("mul", body, e)
    assert body is not None
    over = tuple(str(f.rank).lower() for x in labels if x not in out for f in dims[x])
    p = r.parts(body)
    guarded = p.guard is not None and p.outside is not None and p.outside.value == 0
    axes = [f for x in out for f in dims[x]]
    made = r.write(name, axes, p.inside if guarded else body, reduce=Reduce("sum", over) if over else None,
                   guard=p.guard if guarded else None, finite=r.tame(body))
    like = Value(tuple(dims[x] for x in out), dtype, lambda ix: ix[0])
    result = r.view(like, axes, made)
    for s in scale:
        result = apply("mul", dtype, result, Value((), dtype, lambda _, s=s: s))  # type: ignore[misc]
    return result


def pull(e: Expr) -> tuple[list[Expr], Expr]:
    """Factors of `e` that are the same at every point, and the rest."""
    if isinstance(e, Call) and e.op in ("mul", "div") and len(e.args) == 2:
        a, b = e.args
        if not variables(b):
            inner, rest = pull(a)
            return [*inner, b if e.op == "mul" else make("recip", b)], rest
        if e.op == "mul" and not variables(a):
            inner, rest = pull(b)
            return [a, *inner], rest
    if isinstance(e, Call) and e.op == "neg":
        inner, rest = pull(e.args[0])
        return [Const(-1.0), *inner], rest
    return [], e


def _batch(n: int) -> list[str]:
    return [f"b{k}" for k in range(n)]


def _batch_hints(n: int) -> dict[str, str]:
    return {f"b{k}": h for k, h in enumerate(["B", "H", "G", "X", "Y", "Z"][:n] if n != 1 else ["B"])}


def matmul(r: Reader, a: Value, b: Value, dtype: torch.dtype, name: str = "S") -> Value:
    """torch.matmul with broadcast batch dimensions (at least one-dimensional operands)."""
    la = _batch(len(a.dims) - 2) if len(a.dims) > 2 else []
    lb = _batch(len(b.dims) - 2) if len(b.dims) > 2 else []
    n = max(len(la), len(lb))
    la, lb = ([f"b{k + n - len(ls)}" for k in range(len(ls))] for ls in (la, lb))
    rows = ["p"] if len(a.dims) > 1 else []
    cols = ["m"] if len(b.dims) > 1 else []
    later = any(f.rank is not None for f in (*a.dims[-1], *b.dims[-2 if cols else -1]))
    hints = {**_batch_hints(n), "p": "P", "m": "F" if later else "M", "e": "E"}
    return contract(r, [(a, [*la, *rows, "e"]), (b, [*lb, "e", *cols])], [*_batch(n), *rows, *cols], dtype, hints,
                    "O" if later else name)


def _matmul(r: Reader, node: fx.Node, a: Value, b: Value, **_: Any) -> Value:
    return matmul(r, a, b, meta(node).dtype)


def _baddbmm(r: Reader, node: fx.Node, x: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    dtype = meta(node).dtype
    out = matmul(r, a, b, dtype)
    if alpha != 1:
        out = apply("mul", dtype, out, constant(alpha, dtype))
    if beta == 0:
        return out
    bias = x if beta == 1 else apply("mul", dtype, x, constant(beta, dtype))
    return apply("add", dtype, out, bias)


def _einsum(r: Reader, node: fx.Node, equation: str, *terms: Any) -> Value:
    values: tuple[Value, ...] = terms[0] if len(terms) == 1 and isinstance(terms[0], tuple) else terms
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    inputs = left.split(",")
    most = max(len(v.dims) - len(s.replace("...", "")) for v, s in zip(values, inputs, strict=True))
    lead = [f"b{k}" for k in range(most)]

    def labels(s: str, n: int) -> list[str]:
        before, dots, after = s.partition("...")
        mid = lead[most - (n - len(before) - len(after)):] if dots else []
        return [*before, *mid, *after]

    given = [labels(s, len(v.dims)) for s, v in zip(inputs, values, strict=True)]
    if any(len(set(g)) != len(g) for g in given):
        raise Refusal(f"einsum {equation!r} takes a diagonal")
    flat = [x for g in given for x in g]
    out = labels(right, len(meta(node).shape)) if arrow else [*(lead if "..." in left else []), *sorted(
        x for x in set(flat) - set(lead) if flat.count(x) == 1)]
    used = [x for x in out if all(x in g for g in given)]
    hints = {x: "E" for x in flat}
    hints.update(dict(zip(used, ("B", "H", "G", "X", "Y"), strict=False)))
    later = any(f.rank is not None for v in values for f in v.factors)
    rows = [x for x in out if x not in used]
    hints.update(dict(zip(rows, ("P", "F") if later else ("P", "M"), strict=False)))
    return contract(r, list(zip(values, given, strict=True)), out, meta(node).dtype, hints, "O" if later else "S")


# -- reductions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rows:
    """A value laid out for a reduction.  axes: all factors with ranks; over: the reduced variables; kept: the others."""

    axes: tuple[Factor, ...]
    index: Index
    over: tuple[str, ...]
    kept: tuple[Factor, ...]


def _rows(r: Reader, v: Value, dims: Sequence[int]) -> Rows:
    n = len(v.factors)
    names = [("B", "H", "P", "M")[max(0, 4 - n) + k] if k + max(0, 4 - n) < 4 else "X" for k in range(n)]
    axes = r.axes(v.factors, names, set())
    cut = v.split(tuple(Var(str(f.rank).lower()) for f in axes))
    over = tuple(i.name for d in dims for i in cut[d] if isinstance(i, Var))
    return Rows(tuple(axes), tuple(i for part in cut for i in part), over,
                tuple(f for f in axes if str(f.rank).lower() not in over))


def _dims(v: Value, dim: Any) -> list[int]:
    if dim is None:
        return list(range(len(v.dims)))
    return [wrap(d, len(v.dims)) for d in (dim if isinstance(dim, tuple) else (dim,))]


def reduced(r: Reader, v: Value, monoid: str, dims: Sequence[int], keepdim: bool, name: str) -> Value:
    """A primitive reduction; a mask that gives the identity becomes a guard."""
    rows = _rows(r, v, dims)
    e = r.simplify(v.at(rows.index))
    p = r.parts(e)
    identity = {"sum": 0.0, "max": -INF, "min": INF, "or": False, "and": True, "prod": 1.0}[monoid]
    live = r.live(p.guard, rows.over)
    fits = p.guard is not None and p.outside is not None and (
        p.outside.value == identity or monoid == "max" and lowest(p.outside) and live)
    body = p.inside if fits else e
    finite = r.tame(body) and (live or monoid not in ("max", "min"))
    made = r.write(name, rows.kept, body, reduce=Reduce(monoid, rows.over), guard=p.guard if fits else None,
                   dtype="bool" if v.dtype == torch.bool else "" if v.is_real else "i64",
                   finite=finite, positive=r.positive(body) and (live or not fits))
    return _kept(v, rows, dims, keepdim, made)


def _kept(v: Value, rows: Rows, dims: Sequence[int], keepdim: bool, name: str) -> Value:
    """The reduced temporary with torch's shape."""
    out: list[Dim] = []
    parts: list[int] = []
    k = 0
    for n, d in enumerate(v.dims):
        if n not in dims:
            out.append(rows.axes[k:k + len(d)])
            parts.append(len(d))
        elif keepdim:
            out.append((UNIT,))
            parts.append(0)
        k += len(d)

    def at(ix: Index) -> Expr:
        kept: list[Expr] = []
        i = 0
        for w in parts:
            kept += ix[i:i + w]
            i += max(w, 1)
        return Access(name, tuple(kept))

    return Value(tuple(out), v.dtype, at)


def _sum(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    return reduced(r, x if x.is_real else whole(x), "sum", _dims(x, dim), keepdim, "R")


def _mean(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    dims = _dims(x, dim)
    total = reduced(r, real(x), "sum", dims, keepdim, "R")
    n: Expr = Const(1)
    for d in dims:
        n = make("mul", n, expression(x.shape[d]))
    count = make("real", n)
    return apply("div", meta(node).dtype, total, Value((), torch.float32, lambda _: count))


def _extreme(monoid: str, pair: bool) -> Callable[..., Any]:
    def read(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        if isinstance(dim, Value):
            return apply(monoid, meta(node).dtype, *operands(r, node, x, dim))
        out = reduced(r, real(x), monoid, _dims(x, dim), keepdim, "G")
        if not pair or dim is None:
            return out

        def never(_: Index) -> Expr:
            raise Refusal(f"the index of a {monoid}")

        return out, Value(out.dims, torch.int64, never)

    return read


def _truths(monoid: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
        v = truth(x)
        dims = _dims(v, dim)
        rows = _rows(r, v, dims)
        e = r.simplify(v.at(rows.index))
        if isinstance(e, Const) or monoid == "or" and r.live(e, rows.over):
            known = Const(True) if not isinstance(e, Const) else e
            return Value(_kept(v, rows, dims, keepdim, "").dims, torch.bool, lambda _: known)
        return reduced(r, v, monoid, dims, keepdim, "L")

    return read


# -- composites ---------------------------------------------------------------------------------------------------

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
    rows = _rows(r, x, dims)
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
    """exp(x - max x) / sum of it.  dead: what a row without live points gives.  certain: the scores themselves are known
    to hold no -inf (no additive mask from outside)."""
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
    return _kept(x, n.rows, dims, keepdim, name)


def _logsumexp(r: Reader, node: fx.Node, x: Value, dim: Any, keepdim: bool = False) -> Value:
    return _log_sum(r, x, _dims(x, dim), keepdim)


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
        x = Value(x.dims, x.dtype, _causal(x))
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        x = apply("where", dtype, attn_mask, x, constant(-INF, dtype))
    elif attn_mask is not None:
        x = apply("add", dtype, x, attn_mask)
        certain = False
    return matmul(r, softmax(r, x, -1, dtype, "zero", certain), value, dtype)


def _causal(x: Value) -> Callable[[Index], Expr]:
    rows, columns = len(x.dims[-2]), len(x.dims[-1])
    assert rows == columns == 1

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
    "matmul": Rule("contract", _matmul), "bmm": Rule("contract", _matmul), "mm": Rule("contract", _matmul),
    "baddbmm": Rule("contract", _baddbmm), "einsum": Rule("contract", _einsum),
    "sum": Rule("reduce", _sum), "mean": Rule("reduce", _mean), "amax": Rule("reduce", _extreme("max", False)),
    "amin": Rule("reduce", _extreme("min", False)), "max": Rule("reduce", _extreme("max", True)),
    "min": Rule("reduce", _extreme("min", True)), "any": Rule("reduce", _truths("or")), "all": Rule("reduce", _truths("and")),
    "softmax": Rule("reduce", _softmax), "_safe_softmax": Rule("reduce", _safe_softmax),
    "log_softmax": Rule("reduce", _log_softmax), "logsumexp": Rule("reduce", _logsumexp),
    "scaled_dot_product_attention": Rule("contract", _sdpa),
}

__all__ = ["RULES", "contract", "matmul", "softmax"]
