"""Reductions that return places, and sums that become scans: the same numbers, the lowest place on a tie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse, show
from memcomp.ir.verify import verify
from memcomp.passes.reduce_passes import reduce_passes, refusals
from tests.test_reduce_passes import same

HEAD = "program p\nrank P\nrank M\nrank K = 3\nrank F = 2\nin S[P, M]: f32\nin V[M, F]: f32\nin ok[P, M]: bool\n"
CHAIN = """GM[p] = max{m} S[p, m]%s
SN[p, m] = exp(S[p, m] - GM[p])%s
SD[p] = sum{m} SN[p, m]%s
A[p, m] = SN[p, m] / SD[p]%s
"""
PLACES = {
    "top": "out W[P, K]: f32\nout TI[P, K]: i64\n" + CHAIN % ("", "", "", "") + "TV[p, k], TI[p, k] = topk{m} A[p, m]\n"
           "T[p] = sum{k} TV[p, k]\nW[p, k] = TV[p, k] / T[p]\n",
    "guarded": "out B[P]: f32\nout I[P]: i64\n" + CHAIN % ((" where m <= p",) * 4)
               + "B[p], I[p] = argmax{m} A[p, m] where m <= p\n",
    "flipped": "out B[P]: f32\nout I[P]: i64\nout C[P, K]: f32\nout J[P, K]: i64\nGM[p] = max{m} S[p, m]\n"
               "B[p], I[p] = argmin{m} GM[p] - S[p, m]\nC[p, k], J[p, k] = topk{m} GM[p] - S[p, m]\n",
    "two ranks": "out B[F]: f32\nout I[F]: i64\nG[f] = max{m} V[m, f]\n"
                 "B[f], I[f] = argmax{m, p} V[m, f] - G[f] + S[p, m]\n",
    "masked": "out B[P]: f32\nout C[P, K]: f32\nGM[p] = max{m} S[p, m]\n"
              "B[p], I[p] = argmax{m} exp(S[p, m] - GM[p]) where ok[p, m]\n"
              "C[p, k], J[p, k] = topk{m} exp(S[p, m] - GM[p]) where ok[p, m]\n",
}


@pytest.mark.parametrize("options", [{}, {"splits": 2}])
@pytest.mark.parametrize("name", PLACES)
def test_places_keep_the_meaning(name: str, options: dict[str, Any]) -> None:
    program = parse(HEAD + PLACES[name])
    new = reduce_passes(program, tile=(2, 4), ranks=("M",), **options)
    verify(new)
    assert parse(show(new)) == new and refusals(new) == ()
    assert reduce_passes(new, tile=(2, 4), ranks=("M",), **options) is new
    for p, m in ((4, 1), (3, 2), (2, 3), (5, 10), (3, 23)):
        rng = np.random.default_rng(m)
        for scores in (rng.standard_normal((p, m)), rng.integers(0, 4, (p, m)).astype(float)):
            x = {"S": scores, "V": np.round(rng.standard_normal((m, 2))), "ok": rng.random((p, m)) < 0.5}
            x["ok"][0] = False
            found = interpret(new, x)
            for t, want in interpret(program, x).items():
                assert same(want, found[t]), (t, p, m, want, found[t], show(new))


def test_what_nothing_reads_is_not_kept() -> None:
    """Renormalised greatest values need no denominator over all values."""
    assert "SD[" not in show(reduce_passes(parse(HEAD + PLACES["top"])))


@pytest.mark.parametrize(("body", "law"), [
    ("B[p], I[p] = argmax{m} tanh(S[p, m] - G[p])", "tanh is not strictly monotone"),
    ("B[p], I[p] = argmax{m} S[p, m] * G[p]", "sign"),
])
def test_places_are_refused(body: str, law: str) -> None:
    text = HEAD + "out B[P]: f32\nout I[P]: i64\nG[p] = sum{m} S[p, m]\n" + body + "\n"
    (why,) = refusals(reduce_passes(parse(text)))
    assert why.where == "B over M" and law in why.why and "edge G -> B" in why.why


SCAN = "program p\nrank P = M\nrank M\nrank F = 2\nin X[M, F]: f32\nin W[F]: f32\nin ok[M]: bool\nout O[P, F]: f32\n"
SCANS = {
    "before": "GM[p, f] = max{m} X[m, f] where m < p\nO[p, f] = sum{m} exp(X[m, f] - GM[p, f]) where m < p\n",
    "decay": "SD[p, f] = sum{m} exp(X[m, f] - real(p - m) * W[f]) where m <= p\n"
             "O[p, f] = sum{m} exp(X[m, f] - real(p - m) * W[f]) * X[m, f] / SD[p, f] where m <= p\n",
    "some": "SD[p, f] = sum{m} exp(X[m, f]) where m <= p and ok[m]\n"
            "O[p, f] = sum{m} exp(X[m, f]) * X[m, f] / SD[p, f] where m <= p and ok[m]\n",
    "entropy": "GM[p, f] = max{m} X[m, f] where m <= p\nSD[p, f] = sum{m} exp(X[m, f] - GM[p, f]) where m <= p\n"
               "O[p, f] = sum{m} exp(X[m, f] - GM[p, f]) / SD[p, f] "
               "* (X[m, f] - GM[p, f] - log(SD[p, f])) where m <= p\n",
}
STILL = {
    "window": "O[p, f] = sum{m} X[m, f] / (1.0 + T[p, f]) where m <= p and p - m < 3\n",
    "products": "O[p, f] = sum{m} exp(X[m, f] * X[p, f]) / (1.0 + T[p, f]) where m <= p\n",
}


def streamed(body: str) -> tuple[Any, Any]:
    program = parse(SCAN + body)
    new = reduce_passes(program, tile=(4,), ranks=("M",))
    verify(new)
    return program, new


@pytest.mark.parametrize("name", SCANS)
def test_a_sum_whose_guard_moves_is_a_scan(name: str) -> None:
    program, new = streamed(SCANS[name])
    assert "rank T = P iter" in show(new) and "m1" not in show(new)
    for m, scale in ((1, 1.0), (2, 1.0), (17, 1.0), (17, 1e3)):
        rng = np.random.default_rng(m)
        x = {"X": rng.standard_normal((m, 2)) * scale, "W": rng.random(2), "ok": rng.random(m) < 0.7}
        plain = name in ("decay", "some")  # written without a maximum
        found = interpret(new, x)
        for t, want in interpret(program, x).items():
            want = np.where(np.isnan(want) & (plain and scale > 1), found[t], want)
            assert same(want, found[t]), (t, want, found[t], show(new))


@pytest.mark.parametrize("name", STILL)
def test_what_does_not_move_is_no_scan(name: str) -> None:
    program, new = streamed("T[p, f] = sum{m} square(X[m, f]) where m <= p\n" + STILL[name])
    assert "rank T = P iter" not in show(new)
    x = {"X": np.random.default_rng(0).standard_normal((9, 2)), "W": np.ones(2), "ok": np.ones(9, bool)}
    assert same(interpret(program, x)["O"], interpret(new, x)["O"])


LOOP = "program p\nrank T iter\nrank E = 3\nrank F = 3\nin X[T, E]: f32\nin W[E, F]: f32\nout Y[E]: f32\n"
LOOP += "R[0, e] = 0.0\n"


@pytest.mark.parametrize(("step", "op"), [
    ("R[t + 1, e] = tanh(R[t, e] + X[t, e])", "tanh"),
    ("U[t, e] = R[t, e] * X[t, e]\nN[t, e] = U[t, e] * R[t, e]\nR[t + 1, e] = N[t, e] + 1.0", "mul"),
    ("R[t + 1, e] = max(0.0, R[t, e] * X[t, e])", "max"),
    ("R[t + 1, e] = where(R[t, e] > 0.0, X[t, e], R[t, e])", "chooses its own step"),
    ("R[t + 1, e] = X[t, e] * R[t, e] + 1.0", ""),
    ("N[t, e] = sum{f} W[e, f] * R[t, f]\nR[t + 1, e] = N[t, e] - X[t, e]", ""),
    ("R[t + 1, e] = max(R[t, e] + X[t, e], 0.0)", ""),
])
def test_serial_loops_are_refused(step: str, op: str) -> None:
    """A step composes with the next where it is affine, or tropical, in what it carries."""
    program = parse(LOOP + step + "\nY[e] = R[T, e]\n")
    verify(program)
    new = reduce_passes(program)
    assert new.cascade == program.cascade and reduce_passes(new) is new
    found = refusals(new)
    assert bool(found) == bool(op)
    assert all(w.where == "R over T" and f"{op}" in w.why and "edge R -> R" in w.why for w in found)


def test_a_loop_keeps_its_start() -> None:
    """Statements of one tensor are told apart: a late loop does not replace its initialisation."""
    text = """program loop
rank M
rank T iter
in X[M]: f32
in seq[T]: f32
out Y[]: f32
G[] = sum{m} X[m]
N[] = sum{m} square(X[m] - G[])
R[0] = 0.0
Z[t] = R[t] * 2.0
R[t + 1] = R[t] * 0.5 + seq[t] * N[] + Z[t]
Y[] = R[T]
"""
    program = parse(text)
    new = reduce_passes(program, tile=(2,))
    verify(new)
    assert new.cascade != program.cascade
    x = {"X": np.arange(1.0, 6.0), "seq": np.arange(3.0)}
    assert same(interpret(program, x)["Y"], interpret(new, x)["Y"])
