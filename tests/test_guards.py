"""What guards leave of a loop: any guard keeps the meaning, steps without a live point are not taken, tiles that a
guard leaves whole are not masked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.expr import Call, Const
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.tile import Fold, Loop, Map, Statement, TileProgram, When
from memcomp.ir.tile_interpret import interpret_tile, measure_tile
from memcomp.ir.tile_verify import verify_tile
from memcomp.passes.canonicalize import canonicalize
from memcomp.passes.reduce_passes import reduce_passes
from tests.mapped import mapped, same

WIDTH = 4  # of queries, keys and values
KEY = "(m1*M0 + m0)"
TEXT = """
program guarded
rank P
rank M
rank E = 4
rank F = 4
rank M0 = ?m0 in 8|32
rank M1 = ceil(M/M0) iter
in Q[P, E]: f32
in K[M, E]: f32
in V[M, F]: f32
in ids[M]: i64
in own[P]: i64
in seen[M]: bool
in heat[M]: f32
out O[P, F]: f32
out N[P]: f32
RM[0, p] = -inf
RC[0, p] = 0.0
RD[0, p] = 0.0
RN[0, p, f] = 0.0
S[m1, m0, p] = sum{e} Q[p, e] * K[m1*M0 + m0, e] where m1*M0 + m0 < M
LM[m1, p] = max{m0} S[m1, m0, p] where GUARD
RM[m1 + 1, p] = max(RM[m1, p], LM[m1, p])
RF[m1, p] = where(RM[m1 + 1, p] == -inf, 0.0, RM[m1 + 1, p])
LC[m1, p] = sum{m0} 1.0 where GUARD
RC[m1 + 1, p] = LC[m1, p] + RC[m1, p]
X[m1, m0, p] = exp(S[m1, m0, p] - RF[m1, p]) where GUARD
LD[m1, p] = sum{m0} X[m1, m0, p] where GUARD
LN[m1, p, f] = sum{m0} X[m1, m0, p] * V[m1*M0 + m0, f] where GUARD
Y[m1, p] = exp(RM[m1, p] - RF[m1, p])
RD[m1 + 1, p] = LD[m1, p] + RD[m1, p] * Y[m1, p]
RN[m1 + 1, p, f] = LN[m1, p, f] + RN[m1, p, f] * Y[m1, p]
N[p] = RC[M1, p]
O[p, f] = where(RC[M1, p] > 0.0, RN[M1, p, f] / RD[M1, p], 0.0)
"""
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def guarded(guard: str) -> Program:
    return parse(TEXT.replace("GUARD", f"m1*M0 + m0 < M and ({guard})"))


def arguments(p: int, m: int, seed: int, documents: str = "sorted") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, m)
    ids = np.sort(ids) if documents == "sorted" else ids
    real = {n: rng.normal(size=s) for n, s in (("Q", (p, 4)), ("K", (m, 4)), ("V", (m, 4)), ("heat", (m,)))}
    own = np.resize(ids, p) if documents == "sorted" and m else rng.integers(-1, max(m, 4), p)
    return real | {"ids": ids, "own": own, "seen": rng.random(m) < 0.7}


# -- any guard ---------------------------------------------------------------------------------------------------------

def leaves() -> st.SearchStrategy[str]:
    side = st.sampled_from([KEY, f"{KEY}//8", f"{KEY}*2", "p", "p + 5", "p - 11", "p//8", "p//3*2", "7", "30",
                            f"ids[{KEY}]", "own[p]", "own[p] - 3", f"ids[{KEY}] + p", f"min({KEY}, p)", f"{KEY} % 8"])
    compared = st.tuples(side, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), side).map(" ".join)
    return st.one_of(compared, compared, st.sampled_from([f"seen[{KEY}]", f"heat[{KEY}] > 0.3", f"heat[{KEY}] != 0.5"]))


def guards() -> st.SearchStrategy[str]:
    def joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        two = st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})")
        return st.one_of(two, two, inner.map(lambda x: f"not ({x})"))

    return st.recursive(leaves(), joined, max_leaves=4)


@FUZZ
@given(guards(), st.integers(1, 70), st.integers(0, 70), st.integers(0, 9), st.sampled_from(["sorted", "any"]),
       st.integers(0, 1))
def test_any_guard_means_what_it_says(guard: str, p: int, m: int, seed: int, documents: str, choice: int) -> None:
    program, a = mapped(guarded(guard), choice), arguments(p, m, seed, documents)
    tp = lower(program)
    verify_tile(tp)
    want, got = interpret(program, a), interpret_tile(tp, a)
    for name in want:
        assert same(got[name], want[name], 1e-9, 1e-11), name


def test_ids_of_any_size() -> None:
    """The ranges of two tiles are compared, never subtracted: the least and the greatest integers are good names."""
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    program, a = mapped(guarded(f"ids[{KEY}] == own[p]")), arguments(40, 40, 0)
    tp = lower(program)
    for ids in (np.where(np.arange(40) < 20, low, high), np.full(40, low), np.full(40, high)):
        a |= {"ids": ids, "own": ids[::-1].copy()}
        assert np.array_equal(interpret_tile(tp, a)["N"], (a["ids"][:, None] == a["own"]).sum(0))


@pytest.mark.parametrize("rest", ["", f" or {KEY} < 4"])
@pytest.mark.parametrize("first", ["p", "own[p]"])
def test_a_window_without_an_end(first: str, rest: str) -> None:
    """`sys.maxsize` stands for infinity: nothing is added to it."""
    tp = lower(mapped(guarded(f"{KEY} <= {first} and ({first} - {KEY} < {sys.maxsize}{rest})")))
    a = arguments(40, 40, 0) | {"own": np.arange(40)}
    with np.errstate(over="raise"):
        assert np.array_equal(interpret_tile(tp, a)["N"], np.arange(1.0, 41))


# -- steps -------------------------------------------------------------------------------------------------------------

def live(guard: Callable[[Any, Any], Any], p: int, m: int) -> Any:
    return np.broadcast_to(guard(np.arange(p)[:, None], np.arange(m)[None, :]), (p, m))


def steps(tp: TileProgram, alive: Any) -> tuple[int, int]:
    """Keys of all steps that hold a live point of their task, and keys up to the last live one in each such step."""
    (kernel,) = (k for k in tp.kernels if any(isinstance(s, Loop) for s in kernel_body(k)))
    rows, keys = (next(d.capacity for d in kernel.dims if d.name == n) for n in ("p0", "m0"))
    whole = least = 0
    for top in range(0, alive.shape[0], rows):
        some = alive[top:top + rows].any(0)
        for first in range(0, alive.shape[1], keys):
            at = np.flatnonzero(some[first:first + keys])
            whole += len(some[first:first + keys]) if len(at) else 0
            least += at[-1] + 1 if len(at) else 0
    return whole, least


def kernel_body(k: Any) -> tuple[Statement, ...]:
    return tuple(k.body)


IDS = np.repeat([1, 3, 5, 7], [40, 8, 30, 50])
PADDED = (np.arange(128) >= 20) & (np.arange(128) < 100)
AFFINE = {
    "causal": (f"{KEY} <= p", lambda p, m: m <= p),
    "window": (f"{KEY} <= p and {KEY} > p - 24", lambda p, m: (m <= p) & (m > p - 24)),
    "around": (f"{KEY} <= p + 9 and p <= {KEY} + 9", lambda p, m: abs(m - p) <= 9),
    "prefix": (f"{KEY} < 24 or {KEY} <= p", lambda p, m: (m < 24) | (m <= p)),
    "not causal": (f"not ({KEY} < p)", lambda p, m: m >= p),
    "diagonal": (f"{KEY} == p", lambda p, m: m == p),
}
GAPS = {
    "first and last": (f"{KEY} <= p and ({KEY} < 4 or {KEY} > p - 16)",
                       lambda p, m: (m <= p) & ((m < 4) | (m > p - 16))),
    "blocks": (f"{KEY}//16 == p//16", lambda p, m: m // 16 == p // 16),
    "blocks before": (f"{KEY}//16 < p//16", lambda p, m: m // 16 < p // 16),
    "apart": (f"{KEY} < p - 20 or {KEY} > p + 20", lambda p, m: abs(m - p) > 20),
    "documents": (f"ids[{KEY}] == own[p]", lambda p, m: IDS[m] == IDS[p]),
    "documents, causal": (f"ids[{KEY}] == own[p] and {KEY} <= p", lambda p, m: (IDS[m] == IDS[p]) & (m <= p)),
    "padding": (f"seen[{KEY}]", lambda p, m: PADDED[m] & (p >= 0)),
    "padding, causal": (f"seen[{KEY}] and {KEY} <= p", lambda p, m: PADDED[m] & (m <= p)),
}


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("name", AFFINE | GAPS)
def test_no_step_without_a_live_point(name: str, choice: int) -> None:
    """No more keys are read than steps with a live point hold; where one range is live, none behind its last point."""
    text, guard = (AFFINE | GAPS)[name]
    n = len(IDS)
    tp = lower(mapped(guarded(text), choice))
    a = arguments(n, n, 0) | {"ids": IDS, "own": IDS, "seen": PADDED}
    alive = live(guard, n, n)
    whole, least = steps(tp, alive)
    out, moved = measure_tile(tp, a)
    assert np.array_equal(out["N"], alive.sum(1))
    assert moved.reads["K"] <= WIDTH * (whole if name in GAPS else least)
    assert moved.reads["K"] == moved.reads["V"]


def test_a_window_takes_the_steps_of_its_keys() -> None:
    """Steps begin where the window does, at a multiple of 16, and end where it ends."""
    n = 320
    tp = lower(mapped(guarded(f"{KEY} <= p and {KEY} > p - 34"), 1))
    (rows,) = {d.capacity for k in tp.kernels for d in k.dims if d.name == "p0"}
    _, moved = measure_tile(tp, arguments(n, n, 0))
    first = np.maximum((np.arange(0, n, rows) - 33) // 16 * 16, 0)
    assert moved.reads["K"] == WIDTH * int((np.minimum(np.arange(0, n, rows) + rows, n) - first).sum())


# -- masks -------------------------------------------------------------------------------------------------------------

def poisoned(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """NaN wherever a statement would look at a mask."""
    out: list[Statement] = []
    for s in body:
        if isinstance(s, Loop):
            s = replace(s, body=poisoned(s.body))
        elif isinstance(s, When):
            s = replace(s, body=poisoned(s.body), orelse=poisoned(s.orelse))
        elif isinstance(s, (Map, Fold)) and isinstance(s.body, Call) and s.body.op == "where" and s.tile in ("S", "LC"):
            s = replace(s, body=Const(float("nan")))
        out.append(s)
    return tuple(out)


@pytest.mark.parametrize("text, data, clean", [
    (f"{KEY} < 64 or {KEY} <= p", {}, True),
    (f"{KEY} < 60 or {KEY} <= p", {}, False),
    (f"ids[{KEY}] == own[p]", {"ids": np.full(64, 9), "own": np.full(64, 9)}, True),
    (f"ids[{KEY}] == own[p]", {"ids": np.arange(64), "own": np.arange(64)}, False),
    (f"ids[{KEY}] <= own[p]", {"ids": np.arange(64), "own": np.full(64, 63)}, True),
    (f"ids[{KEY}] == own[p] or seen[{KEY}]",
     {"seen": np.arange(64) < 32, "ids": np.arange(64) // 32, "own": np.full(64, 1)}, True),
    (f"seen[{KEY}]", {"seen": np.arange(64) // 32 == 1}, True),
    (f"seen[{KEY}]", {"seen": np.arange(64) // 5 == 1}, False),
])
def test_whole_tiles_are_not_masked(text: str, data: dict[str, Any], clean: bool) -> None:
    """Where each step is whole or empty nothing asks a guard of a point, the count of live points included."""
    tp = lower(mapped(guarded(text), 1))
    a = arguments(64, 64, 3) | data
    bad = replace(tp, kernels=tuple(replace(k, body=poisoned(k.body)) for k in tp.kernels))
    want, got = interpret_tile(tp, a), interpret_tile(bad, a)
    assert all(np.array_equal(want[n], got[n], equal_nan=True) for n in want) == clean


WINDOWED = """
program windowed
rank P
rank M
rank E = 4
in Q[P, E]: f32
in K[M, E]: f32
in V[M, E]: f32
out O[P, E]: f32
S[p, m] = sum{e} Q[p, e] * K[m, e]
G[p] = max{m} S[p, m] where m <= p and p < m + 24
W[p, m] = exp(S[p, m] - G[p]) where m <= p and p < m + 24
D[p] = sum{m} W[p, m] where m <= p and p < m + 24
O[p, e] = sum{m} W[p, m] / D[p] * V[m, e] where m <= p and p < m + 24
"""


@pytest.mark.parametrize("shares", [None, 2, 3, 6])
def test_a_share_of_a_window_stays_in_its_share(shares: int | None) -> None:
    """Steps that begin at the first live key must not end in the keys of the next task."""
    closed = mapped(reduce_passes(canonicalize(parse(WINDOWED)), splits=shares, tile=(32,)))
    for n in (40, 200, 333):
        sizes, rng = {"P": n, "M": n}, np.random.default_rng(n)
        given = {x: rng.normal(size=(n, 4)) for x in "QKV"}
        got = interpret_tile(lower(closed), given, sizes)["O"]
        assert np.allclose(got, interpret(parse(WINDOWED), given, sizes)["O"], rtol=1e-9, atol=1e-9), n
