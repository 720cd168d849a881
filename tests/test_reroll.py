"""Unrolled loops: steps that differ in integers become a rank and mean the same; others stay."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.ir.expr import Var
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.traversal import passes
from memcomp.ir.verify import verify
from memcomp.passes.canonicalize import canonicalize
from memcomp.passes.reroll import reroll, unrolled
from memcomp.passes.unrolled.fit import fit, value

Lines = Callable[[int], str]


def unroll(starts: Sequence[int], lengths: Sequence[int], rows: int = 0, *, score: Lines = lambda k: "0.5",
           guard: Lines = lambda k: "", groups: int = 1) -> Program:
    """A loop of weighted means over windows of K, written out: step k sees `lengths[k]` elements from `starts[k]` on.

    rows: rows of Q and O in a step; 0 = one, by a constant index.  groups: steps that read one row of K's heads.
    """
    n = max(rows, 1) * len(starts)
    out = ["program loop", f"rank N = {n}", f"rank L = {max(a + b for a, b in zip(starts, lengths, strict=True))}",
           f"rank H = {len(starts)}", "rank F = 2", *([f"rank P = {rows}"] if rows else []),
           *(f"rank M{k} = {x}" for k, x in enumerate(lengths)),
           "in Q[N]: f32", "in K[H, L]: f32", "in V[L, F]: f32", "out O[N, F]: f32"]
    for k, start in enumerate(starts):
        m, p, row = f"m{k}", "p, " if rows else "", f"p + {k * rows}" if rows else str(k)
        at = f"{m} + {start}" if start else m
        where = f" where {guard(k)}".replace("M", m) if guard(k) else ""
        own = "p" if rows else ""
        out += [f"S{k}[{p}{m}] = Q[{row}] * K[{k // groups}, {at}] * {score(k)}{where}",
                f"G{k}[{own}] = max{{{m}}} S{k}[{p}{m}]{where}",
                f"X{k}[{p}{m}] = exp(S{k}[{p}{m}] - G{k}[{own}]){where}",
                f"D{k}[{own}] = sum{{{m}}} X{k}[{p}{m}]{where}",
                f"O[{row}, f] = sum{{{m}}} X{k}[{p}{m}] * V[{at}, f] / D{k}[{own}]{where}"]
    return parse("\n".join(out))


def same(program: Program, new: Program) -> None:
    """Both are well formed and mean the same; a second time nothing happens."""
    verify(program)
    verify(new)
    assert reroll(new) is new
    rng = np.random.default_rng(0)
    extents = {r.name: int(r.extent.value) for r in program.cascade.ranks}  # type: ignore[union-attr]
    inputs = {t.name: rng.standard_normal([extents[r] for r in t.ranks]) for t in program.cascade.inputs()}
    want, got = interpret(program, inputs), interpret(new, inputs)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, atol=1e-12)


@st.composite
def lines(draw: st.DrawFn, least: int) -> Callable[[int], int]:
    """A line between limits, never below `least`."""
    a, b, low = draw(st.integers(-2, 3)), draw(st.integers(-4, 6)), draw(st.integers(least, 2))
    high = draw(st.integers(2, 40))
    return lambda k: min(max(a * k + b, low), high)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), lines(0), lines(1), st.integers(0, 3), st.sampled_from([1, 2, 3]))
def test_a_loop_over_windows_is_one_step(n: int, start: Callable[[int], int], length: Callable[[int], int], rows: int,
                                         groups: int) -> None:
    program = unroll([start(k) for k in range(n)], [length(k) for k in range(n)], rows, groups=groups)
    new = reroll(program)
    same(program, new)
    if groups == 1 or n % groups == 0:
        assert len(new.cascade.einsums) == 5 and not unrolled(new)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=2, max_size=9), st.integers(0, 2))
def test_any_windows_mean_the_same(windows: list[tuple[int, int]], rows: int) -> None:
    program = unroll([a for a, _ in windows], [b for _, b in windows], rows)
    same(program, reroll(program))


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 8), st.data())
def test_a_step_of_another_form_stays(n: int, data: st.DataObject) -> None:
    odd = data.draw(st.integers(0, n - 1))
    kinds: dict[str, tuple[Lines, Lines]] = {
        "factor": (lambda k: "0.25" if k == odd else "0.5", lambda k: ""),
        "operator": (lambda k: "exp(Q[0])" if k == odd else "tanh(Q[0])", lambda k: ""),
        "tensor": (lambda k: "V[0, 0]" if k == odd else "Q[0]", lambda k: ""),
        "guard": (lambda k: "0.5", lambda k: "M != 1" if k == odd else "M <= 1"),
    }
    score, guard = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    program = unroll([0] * n, [3] * n, score=score, guard=guard)
    new = reroll(program)
    same(program, new)
    assert len(new.cascade.einsums) > 5
    assert "step" in unrolled(new)


@pytest.mark.parametrize("rows", [0, 4])
def test_a_short_last_step(rows: int) -> None:
    """The last block of a blocked loop ends where the data ends."""
    n, block = 10, 4
    starts = range(0, n, block)
    program = unroll([0] * 3, [min(s + block, n) for s in starts], rows)
    new = reroll(program)
    same(program, new)
    assert len(new.cascade.einsums) == 5


def test_nested_loops_are_two_ranks() -> None:
    heads, steps = 3, 4
    text = ["program p", f"rank H = {heads}", f"rank N = {steps}", *(f"rank M{i} = {i + 1}" for i in range(steps)),
            "in K[H, N]: f32", "out O[H, N]: f32"]
    for h in range(heads):
        for i in range(steps):
            text += [f"X{h}_{i}[m{i}] = exp(K[{h}, m{i}])", f"O[{h}, {i}] = sum{{m{i}}} X{h}_{i}[m{i}]"]
    program = parse("\n".join(text))
    new = reroll(program)
    same(program, new)
    assert len(new.cascade.einsums) == 2 and len(new.cascade.einsums[-1].out.index) == 2


def test_a_step_that_reads_what_another_wrote_stays() -> None:
    program = parse(textwrap.dedent("""
        program p
        rank N = 3
        in K[N]: f32
        out O[N]: f32
        A[] = exp(K[0])
        O[0] = A[] + K[0]
        B[] = exp(K[1])
        O[1] = B[] + O[0]
        C[] = exp(K[2])
        O[2] = C[] + O[1]
    """))
    assert reroll(program) is program


def test_windows_slide_over_the_tensor_and_blocks_do_not() -> None:
    slide = reroll(unroll([0, 1, 2, 3], [3] * 4)).cascade
    assert {t for s in slide.einsums for t in s.space()} >= {"l"}  # the rank of K itself
    assert all(s.guard is not None for s in slide.einsums)
    tiles = reroll(unroll([0, 3, 6, 9], [3] * 4)).cascade
    assert all(s.guard is None for s in tiles.einsums)


def test_two_hundred_and_fifty_six_steps() -> None:
    """A window over the past: one step with an affine guard, in three passes over M like the loop's own cascade."""
    n, w = 256, 16
    program = unroll([max(i - w, 0) for i in range(n)], [min(i, w) + 1 for i in range(n)], groups=n)
    began = time.process_time()
    new = reroll(program)
    assert time.process_time() - began < 2
    assert len(new.cascade.einsums) == 5
    assert max(passes(canonicalize(new)).values()) == 3
    assert new.cascade.einsums[-1].guards() == parse(textwrap.dedent("""
        program p
        rank I = 256
        rank L = 256
        rank F = 2
        in K[L]: f32
        out O[I]: f32
        O[i] = sum{l} K[l] where i <= l + 16 and l <= i
    """)).cascade.einsums[0].guards()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_what_is_fitted_is_the_sequence(seq: list[int]) -> None:
    i = Var("i")
    e = fit(seq, i)
    assert e is None or [value(e, i, k) for k in range(len(seq))] == seq


@pytest.mark.parametrize("f", [
    lambda k: 7, lambda k: 3 * k - 2, lambda k: max(k - 4, 0), lambda k: min(2 * k, 9), lambda k: min(max(k - 2, 0), 5),
    lambda k: k // 3, lambda k: k % 4, lambda k: 10 * (k // 4) + k % 4, lambda k: min(64, 250 - 64 * k),
    lambda k: max(5 - k, 1)])
def test_lines_between_limits_and_nested_counters_are_fitted(f: Callable[[int], int]) -> None:
    for n in (1, 2, 3, 12):
        assert fit([f(k) for k in range(n)], Var("i")) is not None
