"""Contractions: sums of products of values over the labels that do not appear in the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcomp.capture.masks import make
from memcomp.capture.reader import Reader, meta, real
from memcomp.capture.rules_map import apply
from memcomp.capture.table import Rule
from memcomp.capture.value import Dim, Index, Value, align, constant, permute
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, variables


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
    made_of = 0  # operands that are no stored tensor
    for k, (v, ls) in enumerate(terms):
        e = r.simplify(real(v).at(tuple(i for x in ls for i in maps[x, k](var[x]))))
        outer, e = pull(e)
        scale += outer
        made_of += not isinstance(e, Access)
        body = e if body is None else call("mul", body, e)
    assert body is not None
    over = tuple(str(f.rank).lower() for x in labels if x not in out for f in dims[x])
    held = "bf16" if made_of > 0 and all(v.dtype == torch.bfloat16 for v, _ in terms) else ""
    p = r.parts(body)
    guarded = p.guard is not None and p.outside is not None and p.outside.value == 0
    axes = [f for x in out for f in dims[x]]
    made = r.write(name, axes, p.inside if guarded else body, reduce=Reduce("sum", over, held) if over else None,
                   guard=p.guard if guarded else None, finite=r.tame(body))
    like = Value(tuple(dims[x] for x in out), dtype, lambda ix: ix[0])
    result = r.view(like, axes, made)
    numbers = [s.value for s in scale if isinstance(s, Const)]
    scale = [s for s in scale if not isinstance(s, Const)] + ([Const(math.prod(numbers))] if numbers else [])
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


def matmul(r: Reader, a: Value, b: Value, dtype: torch.dtype) -> Value:
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
                    "O" if later else "S")


def _matmul(r: Reader, node: fx.Node, a: Value, b: Value, **_: Any) -> Value:
    return matmul(r, a, b, meta(node).dtype)


def _linear(r: Reader, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    out = matmul(r, x, permute(weight, [1, 0]), meta(node).dtype)
    return out if bias is None else apply("add", out.dtype, out, real(bias))


def _addmm(r: Reader, node: fx.Node, x: Value, mat1: Value, mat2: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    return _baddbmm(r, node, x, mat1, mat2, beta=beta, alpha=alpha)


def _baddbmm(r: Reader, node: fx.Node, x: Value, batch1: Value, batch2: Value, *, beta: float = 1,
             alpha: float = 1) -> Value:
    dtype = meta(node).dtype
    out = matmul(r, batch1, batch2, dtype)
    if alpha != 1:
        out = apply("mul", dtype, out, constant(alpha, dtype))
    if beta == 0:
        return out
    bias = x if beta == 1 else apply("mul", dtype, x, constant(beta, dtype))
    return apply("add", dtype, out, bias)


def _einsum(r: Reader, node: fx.Node, equation: str, *terms: Any) -> Value:
    if not isinstance(equation, str):
        raise Refusal("einsum over lists of labels")
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


RULES: dict[str, Rule] = {
    "matmul": Rule("contract", _matmul), "bmm": Rule("contract", _matmul), "mm": Rule("contract", _matmul),
    "linear": Rule("contract", _linear), "addmm": Rule("contract", _addmm), "baddbmm": Rule("contract", _baddbmm),
    "einsum": Rule("contract", _einsum),
}
