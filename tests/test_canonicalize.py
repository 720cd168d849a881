"""Canonical form: the same meaning, reached in one step, equal for programs that differ in spelling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp.ir.cascade import Cascade
from memcomp.ir.expr import Call, Const, Var, walk
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.verify import verify
from memcomp.passes.canonicalize import canonicalize
from tests import chains
from tests.programs import arrays, programs

HEAD = """program p
rank B = 1
rank H = 6
rank J = 2
rank P
rank M
in Q[B, H, P]: f32
in K[B, J, M]: f32
out O[B, H, P]: f32
"""


def inputs(p: int = 3, m: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"Q": rng.standard_normal((1, 6, p)), "K": rng.standard_normal((1, 2, m))}


def check(program: Program, x: dict[str, Any]) -> Program:
    verify(program)
    new = canonicalize(program)
    verify(new)
    assert canonicalize(new) is new
    want, got = interpret(program, x), interpret(new, x)
    for t in want:
        np.testing.assert_array_equal(want[t], got[t])
    return new


def names(c: Cascade) -> set[str]:
    return {n for s in c.einsums for n in s.names}


@pytest.mark.parametrize("name", chains.NAMES)
def test_chains_keep_their_meaning(name: str) -> None:
    program = chains.load(name)
    check(program, chains.arrays(program, 4, 9, "masked"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.integers(0, 99))
def test_random_programs_keep_their_meaning(program: Program, seed: int) -> None:
    x = arrays(program, seed)
    new = canonicalize(program)
    verify(new)
    assert canonicalize(new) is new
    want, got = interpret(program, x), interpret(new, x)
    for t in want:
        np.testing.assert_allclose(got[t], want[t], rtol=1e-12, atol=1e-12)


def test_groups_get_a_rank() -> None:
    """Heads that share a key row share the rank J; the key's own rank is taken."""
    text = "S[b, h, p, m] = Q[b, h, p] * K[b, h//3, m]\nO[b, h, p] = sum{m} S[b, h, p, m]\n"
    new = check(parse(HEAD + text), inputs())
    assert not [n for s in new.cascade.einsums for n in walk(s.body) if isinstance(n, Call) and n.op == "floordiv"]
    assert new.cascade.einsums[0].space() == ("j", "g", "p", "m")
    assert new.cascade.rank("G").extent == Const(3)


def test_unpacking_is_not_a_group() -> None:
    """h//3 beside h%3 takes elements apart; the rank stays."""
    program = parse(HEAD + "O[b, h, p] = sum{m} Q[b, h, p] * K[b, h//3, m] * real(h % 3)\n")
    assert "h" in check(program, inputs()).cascade.einsums[0].space()


def test_extent_that_the_group_does_not_divide_stays() -> None:
    program = parse(HEAD + "O[b, h, p] = sum{m} Q[b, h, p] * K[b, h//4, m]\n")
    assert "h" in check(program, inputs()).cascade.einsums[0].space()


def test_unit_ranks_go() -> None:
    text = "S[b, p, m] = Q[b, 0, p] * K[b, 1, m]\nO[b, h, p] = sum{m} S[b, p, m] * Q[b, h, p]\n"
    new = check(parse(HEAD + text), inputs())
    assert all("b" not in s.space() for s in new.cascade.einsums)
    assert new.cascade.einsums[0].out.index == (Var("p"), Var("m"))


def test_a_reduction_over_a_unit_rank_keeps_its_identity() -> None:
    """A guarded-out point gives the identity, not an element that was never written."""
    text = HEAD.replace("out O[B, H, P]", "out O[H, P]") + "O[h, p] = max{b} Q[b, h, p] where p < 2\n"
    new = check(parse(text), inputs())
    assert interpret(new, inputs())["O"][0, 2] == -np.inf


def test_copies_and_repetitions_and_the_dead_go() -> None:
    new = check(parse(HEAD + """T[p, b, h] = Q[b, h, p]
X[b, h, p, m] = T[p, b, h] * K[b, 0, m] where m < M
Y[b, h, p, m] = Q[b, h, p] * K[b, 0, m]
Z[b, h, p] = sum{m} Y[b, h, p, m]
O[b, h, p] = sum{m} X[b, h, p, m] + Y[b, h, p, m]
"""), inputs())
    assert names(new.cascade) == {"X", "O"}


def test_what_a_copy_rounds_is_not_a_copy() -> None:
    program = parse(HEAD.replace("out O", "temp T[B, H, P]: bf16\nout O") + "T[b, h, p] = Q[b, h, p]\n"
                    "O[b, h, p] = sum{m} T[b, h, p] * K[b, 0, m]\n")
    assert "T" in names(check(program, inputs()).cascade)


def test_equal_spellings_meet() -> None:
    a = parse(HEAD + "O[b, h, p] = max{m} K[b, 0, m] where m <= p and p >= 0\n")
    b = parse(HEAD + "C[b, m] = K[b, 0, m]\nO[b, h, p] = max{m} C[b, m + 0] where 2*m <= 2*p\n")
    assert canonicalize(a).digest == canonicalize(b).digest


def test_a_temporary_read_at_a_constant_keeps_its_rank_when_heads_are_split() -> None:
    program = parse("""program p
rank M <= 64
rank H = 4
rank J = 2
in C[M, J]: f32
out O[M]: f32
T[m, h] = C[m, h//2]
O[m] = T[m, 0]
""")
    made = canonicalize(program)
    verify(made)
    c = np.random.default_rng(0).standard_normal((5, 2))
    assert np.array_equal(interpret(made, {"C": c})["O"], interpret(program, {"C": c})["O"])


FLAT = """program p
rank P
rank C = 8
rank M = 5
rank H = 2
rank K = 4
rank L = 40
rank F
in X[P, C, M]: f32
in W[F, L]: f32
in Z[H]: f32
out O[P, F]: f32
out N[P]: f32
T[p, h] = {group}
O[p, f] = sum{{l}} (X[p, l//5, l%5] - T[p, l//20]) * W[f, l]
"""


def test_a_product_over_groups_that_were_reduced_shares_their_ranks() -> None:
    """The features of a row, one after the other, and the mean of a group of them: one sum over groups, channels and
    points, so that both walk the same ranks."""
    summed = "sum{k, m} X[p, h*4 + k, m]\nN[p] = max{h} T[p, h]"
    program = parse(FLAT.format(group=summed))
    new = canonicalize(program)
    product = next(s for s in new.cascade.einsums if s.names == ("O",))
    mean = next(s for s in new.cascade.einsums if s.names == ("T",))
    assert product.reduce is not None and mean.reduce is not None
    assert len(product.reduce.over) == 3 and set(mean.reduce.over) < set(product.reduce.over)
    assert not any(isinstance(n, Call) and n.op in ("floordiv", "mod") for n in walk(product.body))
    rng = np.random.default_rng(0)
    x = {"X": rng.standard_normal((3, 8, 5)), "W": rng.standard_normal((6, 40)), "Z": rng.standard_normal(2)}
    for name, want in interpret(program, x).items():
        np.testing.assert_allclose(interpret(new, x)[name], want, rtol=1e-12)
    given = canonicalize(parse(FLAT.format(group="Z[h] * X[p, h, 0]\nN[p] = max{h} T[p, h]")))
    product = next(s for s in given.cascade.einsums if s.names == ("O",))
    assert product.reduce is not None and len(product.reduce.over) == 1, "a scale is no reduction: nothing to share"
