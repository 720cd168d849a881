"""Reductions with one monoid over whole dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memcomp.capture.extent import expression, same
from memcomp.capture.masks import make
from memcomp.capture.reader import Reader, meta, real, whole
from memcomp.capture.rules_map import NARROW, apply, convert, operands, truth
from memcomp.capture.table import Rule, base_name
from memcomp.capture.value import UNIT, Dim, Factor, Index, Value, reshape, wrap
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var
from memcomp.ir.ops import MONOIDS

INF = math.inf


@dataclass(frozen=True, slots=True)
class Rows:
    """A value laid out for a reduction.  axes: all factors, with ranks; over: the reduced variables; kept: the rest."""

    axes: tuple[Factor, ...]
    index: Index
    over: tuple[str, ...]
    kept: tuple[Factor, ...]


def layout(r: Reader, v: Value, dims: Sequence[int]) -> Rows:
    n = len(v.factors)
    names = [("B", "H", "P", "M")[max(0, 4 - n) + k] if k + max(0, 4 - n) < 4 else "X" for k in range(n)]
    axes = r.axes(v.factors, names, set())
    cut = v.split(tuple(Var(str(f.rank).lower()) for f in axes))
    over = tuple(i.name for d in dims for i in cut[d] if isinstance(i, Var))
    return Rows(tuple(axes), tuple(i for part in cut for i in part), over,
                tuple(f for f in axes if str(f.rank).lower() not in over))


def dimensions(v: Value, dim: Any) -> list[int]:
    if dim is None or dim == ():
        return list(range(len(v.dims)))
    return [wrap(d, len(v.dims)) for d in (dim if isinstance(dim, tuple) else (dim,))]


def reduced(r: Reader, v: Value, monoid: str, dims: Sequence[int], keepdim: bool, name: str) -> Value:
    """A primitive reduction; a mask that gives the identity becomes a guard, and pieces are reduced one by one."""
    if v.pieces is not None and v.pieces.dim in dims:
        parts = [_unit(p, dims, keepdim) or reduced(r, p, monoid, dims, keepdim, name) for p in v.pieces.values]
        out = parts[0]
        for more in parts[1:]:
            out = apply(MONOIDS[monoid].join, v.dtype, out, more)
        return out
    rows = layout(r, v, dims)
    e = r.simplify(v.at(rows.index))
    p = r.parts(e)
    identity = {"sum": 0.0, "max": -INF, "min": INF, "or": False, "and": True, "prod": 1.0}[monoid]
    live = r.live(p.guard, rows.over)
    fits = p.guard is not None and p.outside is not None and (
        p.outside.value == identity or monoid == "max" and r.unseen(p, rows.over))
    body = p.inside if fits else r.absorbed(e)
    finite = r.tame(body) and (live or monoid not in ("max", "min"))
    made = r.write(name, rows.kept, body, reduce=Reduce(monoid, rows.over), guard=p.guard if fits else None,
                   dtype="bool" if v.dtype == torch.bool else "" if v.is_real else "i64",
                   finite=finite, positive=r.positive(body) and (live or not fits))
    return kept_shape(v, rows, dims, keepdim, made)


def _unit(v: Value, dims: Sequence[int], keepdim: bool) -> Value | None:
    """A reduction over single elements needs none."""
    if not all(same(v.shape[d], 1) for d in dims):
        return None
    shape = [1 if k in dims else e for k, e in enumerate(v.shape) if keepdim or k not in dims]
    return reshape(v, shape)


def kept_shape(v: Value, rows: Rows, dims: Sequence[int], keepdim: bool, name: str) -> Value:
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


def best(r: Reader, x: Value, monoid: str, dim: int, keepdim: bool) -> tuple[Value, Value]:
    """Value and place of the greatest (argmax) or least (argmin) element along `dim`; ties take the lowest place."""
    v = real(x) if x.is_real else whole(x)
    inhabited(v, [dim], monoid)
    rows = layout(r, v, [dim])
    if len(rows.over) != 1:
        raise Refusal(f"{monoid} over a dimension that was merged from several")
    body, guard = guarded(r, v.at(rows.index), monoid, rows.over)
    names = r.select("G", rows.kept, body, Reduce(monoid, rows.over), guard, not v.is_real)
    value, place = (kept_shape(v, rows, [dim], keepdim, n) for n in names)
    return value, Value(place.dims, torch.int64, place.at)


def inhabited(v: Value, dims: Sequence[int], monoid: str) -> None:
    """Raises Refusal where there is nothing to choose from, so that torch says so."""
    if any(v.shape[d] == 0 for d in dims):
        raise Refusal(f"{monoid} of no elements")


def guarded(r: Reader, e: Expr, monoid: str, over: tuple[str, ...]) -> tuple[Expr, Expr | None]:
    """A mask that gives the identity, where each row keeps a point, is a guard."""
    e = r.simplify(e)
    p = r.parts(e)
    identity = INF if monoid == "argmin" else -INF
    if p.guard is None or p.outside is None or not r.live(p.guard, over):
        return r.absorbed(e), None
    fits = p.outside.value == identity or monoid == "argmax" and r.unseen(p, over)  # a top-k may show what is outside
    return (p.inside, p.guard) if fits else (r.absorbed(e), None)


def _sum(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    return reduced(r, x if x.is_real else whole(x), "sum", dimensions(x, dim), keepdim, "R")


def _mean(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    dims = dimensions(x, dim)
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
        if not (x.is_real or x.dtype == torch.bool or x.dtype in NARROW):
            raise Refusal(f"{monoid} of {x.dtype}", hint="a running maximum is held as f32: exact to 24 bits")
        if pair and dim is not None and any(base_name(u) != "getitem" or u.args[1] == 1 for u in node.users):
            return best(r, x, f"arg{monoid}", dimensions(x, dim)[0], keepdim)
        dims = dimensions(x, dim)
        inhabited(x, dims, monoid)
        if (flags := _flags(r, x)) is not None:  # 0 or 1 in a short integer: how frameworks without `any` spell it
            out = _truths({"max": "or", "min": "and"}[monoid])(r, node, flags, tuple(dims), keepdim)
            out = convert(out, x.dtype)
        elif x.dtype == torch.bool:
            out = reduced(r, x, {"max": "or", "min": "and"}[monoid], dims, keepdim, "L")
        else:
            out = reduced(r, x, monoid, dims, keepdim, "G")
        if not pair or dim is None:
            return out
        return out, Value(out.dims, torch.int64, out.at)  # nobody reads where it was found

    return read


def _flags(r: Reader, x: Value) -> Value | None:
    """The truth values of which these integers are 1 and 0."""
    e = r.probe(x)
    return truth(x) if x.dtype in NARROW and isinstance(e, Call) and e.op == "where" and \
        e.args[1:] == (Const(1), Const(0)) else None


def _infinite(e: Expr, op: str) -> tuple[Expr, Const] | None:
    """(x, c) of the comparison of x, by `op`, with an infinite c."""
    if isinstance(e, Call) and e.op == "not" and isinstance(e.args[0], Call):
        e = Call({"eq": "ne", "ne": "eq"}.get(e.args[0].op, ""), e.args[0].args)
    if isinstance(e, Call) and e.op == op:
        for x, c in (e.args, e.args[::-1]):
            if isinstance(c, Const) and c.value in (INF, -INF):
                return x, c
    return None


def _truths(monoid: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
        v = truth(x)
        dims = dimensions(v, dim)
        rows = layout(r, v, dims)
        e = r.simplify(v.at(rows.index))
        if isinstance(e, Const) or monoid == "or" and r.live(e, rows.over):
            known = Const(True) if not isinstance(e, Const) else e
            return Value(kept_shape(v, rows, dims, keepdim, "").dims, torch.bool, lambda _: known)
        op = {"or": "ne", "and": "eq"}[monoid]
        if (found := _infinite(r.probe(v), op)) is not None:  # some x is not -inf just if the greatest is not
            def inner(ix: Index) -> Expr:
                known = _infinite(r.simplify(v.at(ix)), op)
                assert known is not None
                return known[0]

            end = found[1]
            extreme = "max" if end.value < 0 else "min"
            most = reduced(r, Value(v.dims, torch.float32, inner), extreme, dims, keepdim, "G")
            return Value(most.dims, torch.bool, lambda ix: make(op, most.at(ix), end))
        return reduced(r, v, monoid, dims, keepdim, "L")

    return read


RULES: dict[str, Rule] = {
    "sum": Rule("reduce", _sum), "mean": Rule("reduce", _mean), "amax": Rule("reduce", _extreme("max", False)),
    "amin": Rule("reduce", _extreme("min", False)), "max": Rule("reduce", _extreme("max", True)),
    "min": Rule("reduce", _extreme("min", True)), "any": Rule("reduce", _truths("or")),
    "all": Rule("reduce", _truths("and")),
}
