"""Linear forms of real expressions: `sum coef * addend`, the currency of exponents, gauges and c-side sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from memcomp.ir.expr import Call, Const, Expr, children, rebuild
from memcomp.ir.text import show_expr

Linear: TypeAlias = dict[Expr, float]
ONE = Const(1)  # the addend of the constant part
_SWAPS = ("add", "mul", "max", "min", "and", "or", "eq", "ne")


def number(e: Expr) -> float | None:
    """The value of a numeric constant (not a truth value)."""
    return e.value if isinstance(e, Const) and not isinstance(e.value, bool) else None


def accumulate(into: Linear, e: Expr, coef: float) -> None:
    """into += coef * e, cancelling what vanishes."""
    value = number(e)
    if value is not None and abs(value) != float("inf"):
        e, coef = ONE, coef * value
    total = into.get(e, 0) + coef
    if total == 0:
        into.pop(e, None)
        if value is not None and e != ONE:  # inf - inf
            into[ONE] = float("nan")
    else:
        into[e] = total


def flatten(e: Expr, coef: float = 1, *,
            spread: Callable[[Expr, Expr], bool] | None = None) -> list[tuple[float, Expr]]:
    """Addends of `e` with numeric coefficients; `spread(factor, rest)` says whether factor * sum is multiplied out."""
    if isinstance(e, Call):
        if e.op in ("add", "sub"):
            sign = 1 if e.op == "add" else -1
            return flatten(e.args[0], coef, spread=spread) + flatten(e.args[1], sign * coef, spread=spread)
        if e.op == "neg":
            return flatten(e.args[0], -coef, spread=spread)
        if e.op in ("mul", "div"):
            a, b = e.args
            if (n := number(b)) is not None and abs(n) != float("inf") and not (e.op == "div" and n == 0):
                return flatten(a, coef * n if e.op == "mul" else coef / n, spread=spread)
            if e.op == "mul" and (n := number(a)) is not None and abs(n) != float("inf"):
                return flatten(b, coef * n, spread=spread)
            for x, f in ((a, b), (b, a))[: 2 if e.op == "mul" else 1]:
                if spread is not None and spread(f, x):
                    parts = flatten(x, coef, spread=spread)
                    if len(parts) > 1 or parts[0][1] != x:
                        return [p for k, y in parts for p in flatten(_times(e.op, y, f), k, spread=spread)]
    return [(coef, e)]


def _times(op: str, x: Expr, f: Expr) -> Expr:
    if number(x) == 1 and op == "mul":
        return f
    return Call(op, (x, f))


def linear(e: Expr) -> Linear:
    """`e` as a linear form over opaque addends."""
    out: Linear = {}
    for coef, x in flatten(e):
        accumulate(out, x, coef)
    return out


def scaled(lin: Mapping[Expr, float], k: float) -> Linear:
    return {e: c * k for e, c in lin.items()} if k else {}


def added(*forms: Mapping[Expr, float]) -> Linear:
    out: Linear = {}
    for f in forms:
        for e, c in f.items():
            accumulate(out, e, c)
    return out


def _product(e: Expr, k: float) -> Expr:
    return Call("mul", (e, Const(k)))


def times(e: Expr, k: float) -> Expr:
    """k * e, as a division where k is one over a whole number that binary fractions miss: rounded once, not twice."""
    n = round(1 / k) if 0 < abs(k) < 1 else 0
    if n and 1 / n == k and math.frexp(k)[0] not in (0.5, -0.5):
        return Call("div", (e, Const(float(n))))
    return _product(e, k)


def to_expr(lin: Iterable[tuple[Expr, float]], scale: Callable[[Expr, float], Expr] = _product) -> Expr:
    """The linear form as an expression, in its own order: `a - b + eps` is not `a + eps - b`, which loses a small eps.
    Only the first positive addend leads, so that `b - a` and not `-a + b` is written."""
    items = list(lin)
    lead = next((k for k, (_, c) in enumerate(items) if not c < 0), 0)
    items = [*items[lead:lead + 1], *items[:lead], *items[lead + 1:]]
    out: Expr | None = None
    for e, c in items:
        if e == ONE:
            piece: Expr = Const(abs(c)) if out is not None else Const(c)
        else:
            size = abs(c) if out is not None else c
            piece = e if size == 1 else Call("neg", (e,)) if size == -1 else scale(e, size)
        out = piece if out is None else Call("sub" if c < 0 else "add", (out, piece))
    return Const(0.0) if out is None else out


def ratio(a: Mapping[Expr, float], b: Mapping[Expr, float]) -> float | None:
    """k with a == k * b (to rounding), None where there is none."""
    if not b or a.keys() != b.keys():
        return None
    ks = [a[e] / b[e] for e in b]
    k = ks[0]
    return k if k != 0 and all(abs(x - k) <= 1e-14 * abs(k) for x in ks) else None


def key(e: Expr) -> Expr:
    """A representative under commutativity, for comparing atoms written in another order."""
    kids = tuple(key(k) for k in children(e))
    if isinstance(e, Call) and e.op in _SWAPS:
        kids = tuple(sorted(kids, key=show_expr))
    return rebuild(e, kids) if kids else e


def keyed(lin: Mapping[Expr, float]) -> Linear:
    return {key(e): c for e, c in lin.items()}
