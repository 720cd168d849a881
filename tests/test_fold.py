"""Scales, zero points and offsets leave the sums over what they decode: a test a row of the table of folds, and random
programs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.ir.counts import Sizes
from memcomp.ir.expr import Access, Call, Const, Var, call, reads, variables, walk
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.span import span
from memcomp.ir.text import parse
from memcomp.ir.verify import verify
from memcomp.passes._roles import factors
from memcomp.passes.fold import fold
from memcomp.passes.reduce_passes import reduce_passes

E, T, GROUP = 32, 32, 16
HEAD = f"""
program p
rank J = 2
rank G = 3
rank B = 4
rank T = {T}
rank E = {E}
rank X = {E // GROUP}
in Q[J, G, E]: f32
in K[J, B, T, E]: u8
"""
SCORES = "S[j, g, b, t] = sum{e} Q[j, g, e] * D[j, b, t, e]"
VALUES = "S[j, g, e] = sum{b, t} P[j, g, b, t] * D[j, b, t, e]"


def program(scale: str, zero: str = "", values: bool = False, groups: str = "", form: str = "zero") -> Program:
    """scale, zero: the index of each; form: how a zero point or offset is written."""
    ranks = {"j": "J", "b": "B", "t": "T", "e": "E", f"e // {GROUP}": "X"}

    def declared(name: str, index: str, dtype: str) -> str:
        return f"in {name}[{', '.join(ranks[i] for i in index.split(', '))}]: {dtype}\n" if index else ""

    code = "(K[j, b, t, e] & 15)"
    decoded = {"zero": f"({code} - Z[{zero}]) * C[{scale}]", "least": f"{code} * C[{scale}] + Z[{zero}]"}[form] \
        if zero else f"{code} * C[{scale}]"
    text = HEAD + declared("C", scale, "f16") + declared("Z", zero, "u8" if form == "zero" else "f16")
    text += ("in P[J, G, B, T]: f32\nout S[J, G, E]: f32\n" if values else "out S[J, G, B, T]: f32\n")
    return parse(text + f"D[j, b, t, e] = {decoded}\n" + (VALUES if values else SCORES))


def data(p: Program, seed: int = 0) -> dict[str, Any]:
    rng, n = np.random.default_rng(seed), Sizes(p.cascade, {})
    return {t.name: rng.integers(0, 16, tuple(map(n, t.ranks))) if t.dtype == "u8" else
            rng.standard_normal(tuple(map(n, t.ranks))) for t in p.cascade.inputs()}


def same(p: Program, new: Program, seed: int = 0) -> None:
    values = data(p, seed)
    want, got = interpret(p, values, {})["S"], interpret(new, values, {})["S"]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def inner(p: Program) -> list[list[str]]:
    """The tensors that meet codes in sums, each with those of its factors."""
    return [sorted({x for f in factors(e.body) for x in reads(f)}) for e in p.cascade.einsums
            if e.reduce is not None and "K" in e.reads()]


@cache
def rows() -> dict[str, tuple[Program, list[list[str]]]]:
    return {
        "keys, a tensor": (program("j"), [["K", "Q"]]),
        "keys, a token": (program("j, b, t"), [["K", "Q"]]),
        "keys, a token, groups of channels": (program(f"j, b, t, e // {GROUP}"), [["K", "Q"]]),
        "keys, a token, zero points": (program("j, b, t", "j, b, t"), [["K", "Q"]]),
        "keys, a token, groups, zero points": (
            program(f"j, b, t, e // {GROUP}", f"j, b, t, e // {GROUP}"), [["K", "Q"]]),
        "keys, a channel, groups of tokens": (program("j, b, e"), [["K", "SA"]]),
        "keys, a channel, zero points": (program("j, b, e", "j, b, e"), [["K", "SA"]]),
        "keys, a channel, least values": (program("j, b, e", "j, b, e", form="least"), [["K", "SA"]]),
        "values, a tensor": (program("j", values=True), [["K", "P"]]),
        "values, a channel": (program("j, e", values=True), [["K", "P"]]),
        "values, a token": (program("j, b, t", values=True), [["K", "SA"]]),
        "values, a token, zero points": (program("j, b, t", "j, b, t", values=True), [["K", "SA"]]),
        "values, a token, least values": (program("j, b, t", "j, b, t", values=True, form="least"), [["K", "SA"]]),
        "values, a token, groups of channels": (
            program(f"j, b, t, e // {GROUP}", f"j, b, t, e // {GROUP}", values=True), [["K", "SA"]]),
        "values, a channel, groups of tokens": (program("j, b, e", values=True), [["K", "P"]]),
    }


@pytest.mark.parametrize("row", list(rows()))
def test_what_decodes_leaves_the_inner_sum(row: str) -> None:
    p, want = rows()[row]
    new = fold(p)
    assert inner(new) == want
    assert "D" not in {n for e in new.cascade.einsums for n in e.names}  # nothing is decoded one by one
    verify(new, since=p)
    same(p, new)
    assert fold(new) is new


def test_a_scale_of_channels_meets_the_query_once_for_a_group_of_tokens() -> None:
    new = fold(rows()["keys, a channel, groups of tokens"][0])
    (met,) = (e for e in new.cascade.einsums if e.names == ("SA",))
    assert set(met.space()) == {"j", "g", "b", "e"} and met.reduce is None


def test_codes_are_summed_from_the_middle_of_their_range() -> None:
    new = fold(rows()["keys, a channel, zero points"][0])
    (inside,) = (e for e in new.cascade.einsums if "K" in e.reads())
    assert any(isinstance(n, Call) and n.op == "sub" and n.args[1] == Const(8) for n in walk(inside.body))


@pytest.mark.parametrize("text", [
    # one reader a code: to multiply the decoded number once costs less than once more for each group
    "rank H = 1\nin Q[H, E]: f32\nin K[M, E]: u8\nin C[M, EG]: f32\nrank EG = 8\nout S[H, M]: f32\n"
    "S[h, m] = sum{e} Q[h, e] * (K[m, e] * C[m, e // 2])",
    # reals may cancel: x - y stays
    "in Q[H, E]: f32\nin K[M, E]: f32\nin Z[M]: f32\nin C[M]: u8\nout S[H, M]: f32\n"
    "D[m, e] = (K[m, e] - Z[m]) * C[m]\nS[h, m] = sum{e} Q[h, e] * (K[m, e] - Z[m])\nrank H = 4",
    # integers are exact as they are
    "in Q[H, E]: i8\nin K[M, E]: u8\nin Z[M]: u8\nout S[H, M]: i64\nD[m, e] = K[m, e] - Z[m]\n"
    "S[h, m] = sum{e} Q[h, e] * D[m, e]\nrank H = 4",
    # of a byte nobody knows how much of it is in use
    "in Q[H, E]: f32\nin K[M, E]: u8\nin Z[M]: u8\nout S[H, M]: f32\nD[m, e] = K[m, e] - Z[m]\n"
    "S[h, m] = sum{e} Q[h, e] * D[m, e]\nrank H = 4",
    # words of 32 bits may cancel too
    "in Q[H, E]: f32\nin K[M, E]: i32\nin Z[M]: i32\nout S[H, M]: f32\nD[m, e] = K[m, e] - Z[m]\n"
    "S[h, m] = sum{e} Q[h, e] * D[m, e]\nrank H = 4",
])
def test_what_stays(text: str) -> None:
    ranks = [line for line in text.split("\n") if line.startswith("rank")]
    rest = [line for line in text.split("\n") if not line.startswith("rank")]
    p = parse("\n".join(["program p", "rank M = 8", "rank E = 16", *ranks, *rest]))
    new = fold(p)
    assert all(len([e for e in x.cascade.einsums if e.reduce]) == 1 for x in (p, new))


def test_a_sum_that_waits_for_a_reduced_value_of_its_ranks_stays_in_its_pass() -> None:
    p = parse("""program p
rank M
rank H = 32
rank E = 16
in Q[E]: f32
in K[M, H, E]: u8
in C[M, E]: f32
in Z[M, E]: f32
out O[E]: f32
S[m, h] = sum{e} Q[e] * ((K[m, h, e] & 15) * C[m, e] + Z[m, e])
G[] = max{m, h} S[m, h]
N[m, h] = exp(S[m, h] - G[])
D[] = sum{m, h} N[m, h]
A[m, h] = N[m, h] / D[]
O[e] = sum{m, h} A[m, h] * ((K[m, h, e] & 15) * C[m, e] + Z[m, e])
""")
    new = fold(p)
    assert new is not p
    assert all("M: 3 -> 1 passes" in reduce_passes(x).proofs for x in (p, new))


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("mask", (255, 60, 15))
def test_the_span_of_a_shifted_code_is_what_it_can_be(mask: int, shift: int) -> None:
    code = call("shr", call("bitand", Access("K", (Var("m"),)), mask), shift)
    assert span(code, lambda _: "u8") == (0, max((x & mask) >> shift for x in range(256)))


def test_on_a_gpu_the_writer_does_it() -> None:
    p = replace(rows()["keys, a token"][0], target="h100")
    assert fold(p) is p


FACTOR = st.sampled_from(
    ("C[j, b, t]", "Y[j, e]", "W[j, b, e]", "H[j]", "0.5", f"X[j, b, t, e // {GROUP}]", "B[j, b]"))
ADDED = st.sampled_from(("", " + Z[j, b, t]", " - Z[j, b, t]", " + L[j, b, e]", " - L[j, e]", " + 3"))
DECLARED = """in C[J, B, T]: f32
in Y[J, E]: f32
in W[J, B, E]: f32
in H[J]: f32
in X[J, B, T, X]: f32
in B[J, B]: f32
in Z[J, B, T]: u8
in L[J, B, E]: f32
"""


@settings(max_examples=40, deadline=None)
@given(st.lists(FACTOR, max_size=3), ADDED, st.booleans(), st.booleans(), st.integers(0, 99))
def test_random_sums_keep_their_meaning(parts: list[str], added: str, values: bool, inside: bool, seed: int) -> None:
    added = added.replace("L[j, e]", "Y[j, e]")
    code = f"(K[j, b, t, e]{added})" if added else "K[j, b, t, e]"
    decoded = " * ".join([code, *parts])
    sums = VALUES if values else SCORES
    body = sums.replace("D[j, b, t, e]", decoded) if inside else f"D[j, b, t, e] = {decoded}\n{sums}"
    outs = "in P[J, G, B, T]: f32\nout S[J, G, E]: f32\n" if values else "out S[J, G, B, T]: f32\n"
    p = parse(HEAD + DECLARED + outs + body)
    new = fold(p)
    if new is not p:
        verify(new, since=p)
    same(p, new, seed)
    assert fold(new) is new
    assert all(variables(e.body) >= set(e.reduce.over) for e in new.cascade.einsums if e.reduce is not None)
