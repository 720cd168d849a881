"""Random chains of reductions, drawn from the operator table: streaming never changes what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, event, find, given, settings
from hypothesis import strategies as st

from memcomp.ir import ops
from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, Tensor
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import show
from memcomp.ir.verify import verify
from memcomp.passes.derive import frames, order, plan, separate
from memcomp.passes.reduce_passes import reduce_passes

P, M = Var("p"), Var("m")
GIVEN = (Tensor("X", ("P", "M"), role="in"), Tensor("Y", ("M",), role="in"), Tensor("C", ("P",), role="in"))
LEAVES: tuple[Expr, ...] = (Access("X", (P, M)), Access("X", (P, M)), Access("Y", (M,)), Access("C", (P,)),
                            Const(0.5), Const(2.0))
# operators of one real argument with the argument kept inside their domain
UNARY = tuple(n for n, o in ops.OPS.items() if o.arity == 1 and o.result in ("real", "same")
              and n not in ("sin", "cos", "erf", "floor", "real", "xlogx", "exp2"))
BINARY = ("add", "sub", "mul", "div", "max", "min")
GUARDS: tuple[Expr | None, ...] = (None, None, None, call("le", M, P), call("lt", Access("Y", (M,)), Const(0.7)))


@st.composite
def expressions(draw: st.DrawFn, depth: int, reduced: tuple[str, ...], carried: tuple[str, ...]) -> Expr:
    """A body over what is given, what was reduced (over P) and the maps along M made so far."""
    leaves = [*LEAVES, *(Access(g, (P,)) for g in reduced for _ in "ab"), *(Access(t, (P, M)) for t in carried)]
    if depth == 0:
        return draw(st.sampled_from(leaves))
    kind = draw(st.sampled_from(("leaf", "unary", "unary", "binary", "binary", "binary", "where")))
    again = expressions(depth - 1, reduced, carried)
    if kind == "leaf":
        return draw(st.sampled_from(leaves))
    if kind == "unary":
        op = draw(st.sampled_from(UNARY))
        x = draw(again)
        domain = ops.OPS[op].domain
        if domain == "pos" or op == "recip":
            x = draw(st.sampled_from((call("exp", x), call("add", call("square", x), Const(0.25)))))
        elif domain == "nonneg":
            x = draw(st.sampled_from((call("abs", x), call("square", x))))
        return Call(op, (x,))
    if kind == "binary":
        op = draw(st.sampled_from(BINARY))
        x, y = draw(again), draw(again)
        return call(op, x, call("add", call("abs", y), Const(0.5)) if op == "div" else y)
    cond = draw(st.sampled_from((call("lt", M, Const(4)), call("gt", Access("C", (P,)), Const(0.0)),
                                 *(call("gt", Access(g, (P,)), Const(0.0)) for g in reduced))))
    return call("where", cond, draw(again), draw(st.one_of(st.just(Const(0.0)), again)))


@st.composite
def cascades(draw: st.DrawFn) -> Program:
    statements: list[Einsum] = []
    reduced: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    for k in range(draw(st.integers(2, 4))):
        guard = draw(st.sampled_from(GUARDS))
        if draw(st.booleans()):
            name = f"T{k}"
            body = draw(expressions(draw(st.integers(1, 2)), reduced, carried))
            statements.append(Einsum((Access(name, (P, M)),), body, None, guard))
            carried += (name,)
        monoid = draw(st.sampled_from(("sum", "sum", "sum", "max", "min")))
        body = draw(expressions(draw(st.integers(1, 3)), reduced, carried))
        if draw(st.booleans()):  # what chains are made of: exp(x - g) y, (x - g)**2, x / g; g - x under an order
            x = draw(st.sampled_from([LEAVES[0], *(Access(t, (P, M)) for t in carried)]))
            g = draw(st.sampled_from([Access(r, (P,)) for r in reduced] or [Access("C", (P,))]))
            body = draw(st.sampled_from((
                call("exp", x - g), call("exp", x - g) * body, call("square", x - g), call("relu", x * g),
                x * body / (call("abs", g) + 0.5)) if monoid == "sum" else (g - x, call("tanh", g - x), x * g)))
        name = f"G{k}"
        statements.append(Einsum((Access(name, (P,)),), body, Reduce(monoid, ("m",)), guard))
        reduced += (name,)
    outs = tuple(Tensor(g, ("P",), role="out") for g in reduced)
    return Program("random", Cascade((Rank("P"), Rank("M")), (*GIVEN, *outs), tuple(statements)))


def arrays(seed: int, p: int, m: int, scale: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"X": rng.standard_normal((p, m)) * scale, "Y": rng.standard_normal(m), "C": rng.standard_normal(p)}


class Overflow(Exception):
    """An exponential of the reference left the range where the algebra speaks of numbers."""


@contextmanager
def watched() -> Iterator[None]:
    def watch(f: Any) -> Any:
        def g(x: Any) -> Any:
            with np.errstate(all="ignore"):
                y = f(x)
            if np.any(np.abs(y) > 1e100):
                raise Overflow
            return y

        return g

    with pytest.MonkeyPatch.context() as patch:
        for name in ("exp", "exp2"):
            patch.setitem(ops.OPS, name, replace(ops.OPS[name], numpy=watch(ops.OPS[name].numpy)))
        yield


def differs(program: Program, other: Program, x: dict[str, Any]) -> str:
    """What differs by more than the chain itself moves when its inputs move by a rounding; "" where nothing does.

    A row counts up to its first reduction that is not finite: beyond it NaN and inf are traded.
    """
    try:
        with watched():
            want = interpret(program, x)
    except Overflow:
        return ""
    got = interpret(other, x)
    moved: list[dict[str, Any]] = []
    live = np.ones(x["C"].shape, bool)
    for name, w in want.items():
        live &= np.isfinite(w) & (np.abs(w) < 1e100)
        with np.errstate(all="ignore"):
            slack = 1e-7 * np.maximum(1e-3, np.abs(w))
            wrong = live & ~(np.abs(got[name] - w) <= slack)
            if wrong.any():
                moved = moved or [interpret(program, moved_by_a_rounding(x, k)) for k in (1, 2)]
                slack += 1e3 * np.maximum(*(np.abs(w - y[name]) for y in moved))
                wrong &= np.isfinite(slack) & ~(np.abs(got[name] - w) <= slack)
        if wrong.any():
            return f"{name}: {w[wrong]} became {got[name][wrong]}"
    return ""


def moved_by_a_rounding(x: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: v * (1 + 1e-12 * rng.standard_normal(v.shape)) for k, v in x.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(cascades(), st.integers(0, 1000), st.sampled_from((1.0, 1.0, 30.0)), st.sampled_from((None, 3)),
       st.sampled_from(("first", "running")))
def test_streaming_keeps_the_meaning(program: Program, seed: int, scale: float, splits: int | None,
                                     frame: str) -> None:
    """`pytest --hypothesis-show-statistics` lists the laws that the examples reached."""
    verify(program)
    streamed = reduce_passes(program, tile=(3,), splits=splits, frame=frame)
    verify(streamed)
    assume(streamed.cascade != program.cascade)
    for line in streamed.proofs:
        for law in line.partition("over M: ")[2].split("; "):
            event(law.partition(" on ")[0].rstrip("0123456789"))
    for p, m in ((3, 10), (2, 4)):
        why = differs(program, streamed, arrays(seed, p, m, scale))
        assert not why, f"{why}\n{show(program)}\n{show(streamed)}"
    assert reduce_passes(streamed, tile=(3,), splits=splits, frame=frame) == streamed


@pytest.mark.parametrize("law", ["flip", "sign", "mask", "gauge"])
def test_the_generator_reaches(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each law is broken in turn, and a random chain shows it."""
    if law == "flip":  # max of -x is -max of x
        step = order._step
        monkeypatch.setattr(order, "_step", lambda inner, outer, flip, op: step(inner, outer, False, op))
    elif law == "sign":  # a factor leaves any homogeneous function
        monkeypatch.setattr(separate.Separator, "_nonneg", lambda self, e, p: True)
    elif law == "mask":  # a map's guard is forgotten where its reader has none
        monkeypatch.setattr(plan.Inliner, "missing", lambda self, conds, guard: [])
    else:  # the states stay in their first frame
        monkeypatch.setattr(frames.Frames, "factor", lambda self, state: None)

    def wrong(program: Program) -> bool:
        streamed = reduce_passes(program, tile=(3,))
        return streamed.cascade != program.cascade and bool(differs(program, streamed, arrays(1, 3, 10, 1.0)))

    find(cascades(), wrong, random=Random(8), settings=settings(
        max_examples=1500, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck)))
