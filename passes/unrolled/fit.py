"""Integer sequences as functions of their position: what the numbers of unrolled steps have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memcomp.ir.expr import Call, Const, Expr, Var, call
from memcomp.ir.fold import INTEGER


def fit(seq: Sequence[int], i: Var, slopes: Sequence[int] = ()) -> Expr | None:
    """An expression of `i` that is `seq[k]` at every i = k, or None.

    Tried in this order, each checked at all positions: a constant, affine, two nested counters
    (`a*(i//g) + b*(i%g) + c`: heads of a group), affine between constant ends (`max(i - 16, 0)`).
    slopes: preferred where the sequence itself leaves the slope open (one short last block).
    """
    return next((e for e in _candidates(seq, i, slopes) if all(value(e, i, k) == x for k, x in enumerate(seq))), None)


def affine(seq: Sequence[int], i: Var) -> Expr | None:
    """`a*i + b` that is `seq[k]` at every i = k, or None."""
    step = seq[1] - seq[0] if len(seq) > 1 else 0
    return _line(step, seq[0], i) if all(x == seq[0] + step * k for k, x in enumerate(seq)) else None


def value(e: Expr, i: Var, k: int) -> int:
    """The integer expression `e` of the one variable `i` at i = k."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Call):
        return INTEGER[e.op](*(value(a, i, k) for a in e.args))
    assert e == i
    return k


def _line(a: int, b: int, i: Expr) -> Expr:
    if a == 0:
        return Const(b)
    e = i if a == 1 else call("mul", i, a)
    return e if b == 0 else call("add", e, b)


def _candidates(seq: Sequence[int], i: Var, slopes: Sequence[int]) -> Iterator[Expr]:
    n = len(seq)
    if (e := affine(seq, i)) is not None:
        yield e
        return
    steps = [b - a for a, b in zip(seq, seq[1:], strict=False)]
    g = next(k for k, d in enumerate(steps) if d != steps[0]) + 1
    if g > 1 and n % g == 0:
        outer = _line(seq[g] - seq[0], seq[0], call("floordiv", i, g))
        yield outer if steps[0] == 0 else call("add", outer, _line(steps[0], 0, call("mod", i, g)))
    moving = [k for k, d in enumerate(steps) if d]
    first, last = moving[0], moving[-1]
    hints = [s for x in slopes for s in (x, -x)]
    inner = steps[first + 1:last]
    for a in inner[:1] or dict.fromkeys((*hints, steps[first], steps[last])):
        for at in dict.fromkeys((first + 1, first, last, last + 1)):
            yield _clamped(a, seq[at] - a * at, seq, i)


def _clamped(a: int, b: int, seq: Sequence[int], i: Var) -> Expr:
    """The line held at the sequence's ends where it would leave them."""
    e = _line(a, b, i)
    for k in (0, len(seq) - 1):
        if (here := a * k + b) != seq[k]:
            e = call("max" if here < seq[k] else "min", e, seq[k])
    return e
