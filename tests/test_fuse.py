"""generalize, fuse and partition: what they group, what they leave open, and that the meaning stays."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program, knobs
from memcomp.ir.text import parse
from memcomp.ir.verify import verify
from memcomp.passes.fuse import fuse
from memcomp.passes.generalize import generalize
from memcomp.passes.partition import partition
from memcomp.passes.specialize import specialize
from tests.mapped import CHAINS, ONEPASS, inputs, load, same, symbols
from tests.programs import programs

SDPA = """
program sdpa
rank B = {b}
rank J = {j}
rank G = {g}
rank H = {h}
rank P = {p}
rank M = {m}
rank E = {e}
rank F = {e}
in Q[B, H, P, E]: f32
in K[B, J, M, E]: f32
in V[B, J, M, F]: f32
out O[B, H, P, F]: f32
S[b, j, g, p, m] = sum{{e}} Q[b, j*{g} + g, p, e] * K[b, j, m, e]
GM[b, j, g, p] = max{{m}} S[b, j, g, p, m] where m <= p
SN[b, j, g, p, m] = exp(S[b, j, g, p, m] - GM[b, j, g, p]) where m <= p
SD[b, j, g, p] = sum{{m}} SN[b, j, g, p, m] where m <= p
O[b, j*{g} + g, p, f] = sum{{m}} SN[b, j, g, p, m] / SD[b, j, g, p] * V[b, j, m, f] where m <= p
"""


def sdpa(b: int = 2, j: int = 2, g: int = 3, p: int = 12, m: int = 12, e: int = 8) -> Program:
    return parse(SDPA.format(b=b, j=j, g=g, h=j * g, p=p, m=m, e=e))


def digest(program: Program) -> str:
    return program.digest


def test_other_lengths_share_one_program() -> None:
    one = digest(generalize(sdpa()))
    assert one == digest(generalize(sdpa(b=5, j=4, p=100, m=777)))
    assert one != digest(generalize(sdpa(g=4))) and one != digest(generalize(sdpa(e=16)))
    assert digest(sdpa()) != digest(sdpa(b=5))
    assert generalize(generalize(sdpa())) == generalize(sdpa())


def test_generalized_programs_run_at_other_lengths() -> None:
    rng = np.random.default_rng(0)
    general, other = generalize(sdpa()), sdpa(b=1, j=3, p=7, m=9)
    a = inputs(other, {}, rng)
    assert same(interpret(general, a)["O"], interpret(other, a)["O"], 1e-12, 0)


def test_numbers_that_indices_rely_on_stay() -> None:
    """A constant index, a read next to the point, a table shorter than the rank: their extents are no mere lengths."""
    text = """
    program p
    rank P = 8
    rank L = 11
    rank N = 4
    in X[L]: f32
    in Y[P]: f32
    in Z[N]: f32
    out O[P]: f32
    O[p] = {} + Y[p]
    """

    def free(body: str) -> list[str]:
        return symbols(generalize(parse(textwrap.dedent(text).format(body))))

    assert free("X[p + 3]") == ["P"]  # L follows: L = P + 3
    assert free("X[p + 2]") == []  # 11 is not the end of what is read
    assert free("X[p*2 % 11]") == []
    assert free("Z[p // 2]") == ["N"]  # P = N*2
    assert free("Z[1]") == ["P"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_mapping_changes_no_statement_and_verifies(program: Any) -> None:
    fused = fuse(program)
    assert fused.cascade == program.cascade and fuse(fused) is fused
    verify(fused)
    general = generalize(program)
    verify(general)
    assert [e.outs for e in general.cascade.einsums] == [e.outs for e in program.cascade.einsums]


@pytest.mark.parametrize("name", ONEPASS + CHAINS)
def test_groups_verify_and_are_final(name: str) -> None:
    p = partition(fuse(load(name)))
    verify(p)
    assert fuse(p) is p and partition(p) is p
    assert parse(str(p)) == p


@pytest.mark.parametrize("name", [n for n in ONEPASS if n not in ("onepass_decode_split", "onepass_two_groups")])
def test_one_pass_is_one_kernel(name: str) -> None:
    assert len(fuse(load(name)).mapping.groups) == 1


def test_what_waits_starts_a_group() -> None:
    split = fuse(load("onepass_decode_split")).mapping.groups
    assert {"RM", "RD", "RN"} <= set(split[0].tensors) and {"GM", "O"} <= set(split[1].tensors) and len(split) == 2
    first, second = fuse(load("onepass_two_groups")).mapping.groups
    assert {"QS", "A", "N"} <= set(first.tensors) and second.tensors == ("O",)
    three = fuse(load("attention_3pass")).mapping.groups
    assert len(three) > 3


def test_rows_decide_the_orientation() -> None:
    """Long rows lie across the lanes; a small group of rows stays in the tile; without rows nothing is cut."""
    prefill = partition(fuse(load("onepass_causal_gqa"))).mapping.groups[0]
    assert prefill.lane == "P0" and prefill.space == ("B", "J", "G", "P1") and prefill.loop_order == ("M1",)
    decode = partition(fuse(load("onepass_decode_gqa")))
    g = decode.mapping.groups[0]
    assert (g.lane, g.space, g.partition) == (None, ("B", "J"), ()) and {k.name for k in knobs(decode)} == {"m0"}
    heads = partition(fuse(load("onepass_mla"))).mapping.groups[0]
    assert heads.lane == "P0" and "H" in heads.space
    wide = partition(fuse(load("onepass_causal_gqa")), lanes=8)
    assert knobs(wide)[-1].choices == (8, 16, 32)


DIFFERENCE = """
program difference
rank H = 6
rank X = 3
rank P
rank M
in S[H, P, M]: f32
in V[M]: f32
out O[X, P]: f32
temp Z[H, P, M]: f64 empty 2.5
Z[h, p, m] = tanh(S[h, p, m]) where m <= p
G[h, p] = max{m} Z[h, p, m]
N[h, p, m] = exp(Z[h, p, m] - G[h, p])
D[h, p] = sum{m} N[h, p, m]
O[x, p] = sum{m} (N[x*2, p, m] / D[x*2, p] - N[x*2 + 1, p, m] / D[x*2 + 1, p]) * V[m]
"""


def test_pairs_of_heads_meet_in_one_task() -> None:
    """Temporaries follow the points of their reader, down to the inputs, dtype and empty value included."""
    p = parse(DIFFERENCE)
    q = specialize(p)
    verify(q)
    assert specialize(q) is q
    written = {e.out.tensor: e for e in q.cascade.einsums}
    assert len(written) == 9 and not {"Z", "G", "N", "D"} & set(written)
    assert all("h" not in e.space() for e in q.cascade.einsums)
    assert {(t.dtype, t.empty) for t in q.cascade.tensors if t.role == "temp"} == {("f64", 2.5)}
    a = inputs(p, {"P": 5, "M": 7}, np.random.default_rng(0))
    assert same(interpret(q, a)["O"], interpret(p, a)["O"], 1e-12, 1e-14)


def test_no_work_is_added() -> None:
    """A key head that three query heads read stays one tensor; a result that is also read as it is stays too."""
    cases = (("S[h // 2, m]", 2, True), ("S[0, m] + S[1, m]", 4, False), ("S[0, m] * S[h, m]", 4, True))
    for body, j, keep in cases:
        text = f"""
        program p
        rank H = 4
        rank J = {j}
        rank M
        in X[J, M]: f32
        out O[H, M]: f32
        S[j, m] = exp(X[j, m])
        O[h, m] = {body}
        """
        p = parse(textwrap.dedent(text))
        assert (specialize(p) is p) == keep, body
