"""The pass counter against the golden set of FuseMax and its taxonomy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from memcomp.ir.cascade import Cascade
from memcomp.ir.counts import Sizes
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.traversal import Traversal, classify, passes, stages, traversals
from memcomp.ir.verify import verify
from tests.chains import NAMES as CHAINS
from tests.chains import load as chain
from tests.programs import programs

SCORES = """rank P
rank M
rank E
rank F
in Q[P, E]: f32
in K[M, E]: f32
in V[M, F]: f32
out O[P, F]: f32
QK[m, p] = sum{e} Q[p, e] * K[m, e]
"""
TILED = """rank P
rank M
rank M0 = 64
rank M1 = ceil(M/M0)
rank E
rank F
in Q[P, E]: f32
in K[M, E]: f32
in V[M, F]: f32
out O[P, F]: f32
QK[m1, m0, p] = sum{e} Q[p, e] * K[m1*M0 + m0, e] where m1*M0 + m0 < M
"""
LOOPED = TILED.replace("ceil(M/M0)", "ceil(M/M0) iter")
CASCADE_4 = SCORES + """GM[p] = max{m} QK[m, p]
SN[m, p] = exp(QK[m, p] - GM[p])
SD[p] = sum{m} SN[m, p]
A[m, p] = SN[m, p] / SD[p]
O[p, f] = sum{m} A[m, p] * V[m, f]
"""
DEFERRED = CASCADE_4.replace("A[m, p] = SN[m, p] / SD[p]\n", "").replace(
    "O[p, f] = sum{m} A[m, p] * V[m, f]", "NV[p, f] = sum{m} SN[m, p] * V[m, f]\nO[p, f] = NV[p, f] / SD[p]")
UNSTABLE = CASCADE_4.replace("GM[p] = max{m} QK[m, p]\n", "").replace(" - GM[p]", "")
LOCAL = TILED + """LM[m1, p] = max{m0} QK[m1, m0, p]
SLN[m1, m0, p] = exp(QK[m1, m0, p] - LM[m1, p])
SLD[m1, p] = sum{m0} SLN[m1, m0, p]
GM[p] = max{m1} LM[m1, p]
PRM[m1, p] = exp(LM[m1, p] - GM[p])
GD[p] = sum{m1} SLD[m1, p] * PRM[m1, p]
A[m1, m0, p] = SLN[m1, m0, p] * PRM[m1, p] / GD[p]
O[p, f] = sum{m1,m0} A[m1, m0, p] * V[m1*M0 + m0, f]
"""
CASCADE_5 = LOOPED + """RM[0, p] = -inf
RD[0, p] = 0.0
RN[0, p, f] = 0.0
LM[m1, p] = max{m0} QK[m1, m0, p]
RM[m1+1, p] = max(RM[m1, p], LM[m1, p])
SLN[m1, m0, p] = exp(QK[m1, m0, p] - RM[m1+1, p])
SLD[m1, p] = sum{m0} SLN[m1, m0, p]
SLNV[m1, p, f] = sum{m0} SLN[m1, m0, p] * V[m1*M0 + m0, f]
PRM[m1, p] = exp(RM[m1, p] - RM[m1+1, p])
RD[m1+1, p] = SLD[m1, p] + RD[m1, p] * PRM[m1, p]
RN[m1+1, p, f] = SLNV[m1, p, f] + RN[m1, p, f] * PRM[m1, p]
O[p, f] = RN[M1, p, f] / RD[M1, p]
"""
VECTORS = "rank K\nin A[K]: f32\nin B[K]: f32\nout Z[]: f32\nY[] = sum{k} A[k] * B[k]\n"
NORM = "rank N\nrank D\nin X[N, D]: f32\nout Y[N, D]: f32\nS[n] = sum{d} X[n, d]\n"
CASCADE_3 = """rank I iter
in A[I]: f32
in B[I]: f32
out Z[]: f32
RY[0] = 1.0
RZ[0] = 0.0
RY[i+1] = RY[i] + A[i] * B[i]
RZ[i+1] = RZ[i] * RY[i+1] / RY[i] + RY[i+1] * A[i]
Z[] = RZ[I]
"""
GOLDEN = {
    "cascade 1": (VECTORS + "Z[] = sum{k} Y[] * A[k]\n", {("A", "K"): 2, ("B", "K"): 1}),
    "cascade 2": (VECTORS + "X[] = sum{k} A[k]\nZ[] = Y[] * X[]\n", {("A", "K"): 1, ("B", "K"): 1}),
    "cascade 3": (CASCADE_3, {("A", "I"): 1, ("B", "I"): 1}),
    "unstable": (UNSTABLE, {("QK", "M"): 2, ("K", "M"): 2, ("V", "M"): 1}),
    "cascade 4": (CASCADE_4, {("QK", "M"): 3, ("K", "M"): 3, ("SN", "M"): 2, ("A", "M"): 1, ("V", "M"): 1}),
    "cascade 4, division deferred": (DEFERRED, {("QK", "M"): 2, ("SN", "M"): 1}),
    "local and global maxima": (LOCAL, {("QK", "M"): 2, ("K", "M"): 2, ("QK", "M1"): 2}),
    "cascade 5": (CASCADE_5, {("QK", "M1"): 1, ("QK", "M0"): 2, ("QK", "M"): 1, ("K", "M"): 1, ("K", "M1"): 1,
                              ("K", "M0"): 2, ("V", "M0"): 1}),
    "layer norm, two moments": (NORM + "W[n] = sum{d} square(X[n, d] - S[n]/D)\n"
                                "Y[n, d] = (X[n, d] - S[n]/D) * rsqrt(W[n])\n", {("X", "D"): 3, ("X", "N"): 1}),
    "layer norm, sums": (NORM + "W[n] = sum{d} square(X[n, d])\n"
                         "Y[n, d] = (X[n, d] - S[n]/D) * rsqrt(W[n]/D - square(S[n]/D))\n", {("X", "D"): 2}),
    "statistics alone": (NORM.replace("out Y[N, D]", "out Y[N]") + "W[n] = sum{d} square(X[n, d])\n"
                         "Y[n] = rsqrt(W[n]/D - square(S[n]/D))\n", {("X", "D"): 1}),
    # what each row needs of all rows, then each row again, under another variable of the same fiber
    "all pairs": ("rank M\nrank P\nin A[M]: f32\nout Z[P]: f32\nR[p] = sum{m} A[p] * A[m]\nZ[p] = A[p] * R[p]\n",
                  {("A", "M"): 2}),
    "backwards": ("rank M\nin A[M]: f32\nout Z[M]: f32\nB[m] = A[m] * 2.0\nZ[m] = A[m] + B[M - 1 - m]\n",
                  {("A", "M"): 2}),
    "shifted": ("rank M\nin A[M]: f32\nout Z[M]: f32\nB[m] = A[m] * 2.0\nZ[m] = A[m] + B[m+1] where m + 1 < M\n",
                {("A", "M"): 1}),
    "gathered": ("rank M\nin at[M]: i64\nin A[M]: f32\nout Z[M]: f32\nB[m] = A[m] * 2.0\nZ[m] = A[m] + B[at[m]]\n",
                 {("A", "M"): 2}),
    "one element as reference": ("rank M\nin A[M]: f32\nout Z[]: f32\nB[m] = A[m] * 2.0\n"
                                 "Z[] = sum{m} exp(B[m] - B[0])\n",
                                 {("A", "M"): 1, ("B", "M"): 1}),
}


def load(text: str) -> Program:
    return parse("program t on cpu\n" + text)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden(name: str) -> None:
    text, want = GOLDEN[name]
    got = passes(load(text))
    assert {k: got.get(k) for k in want} == want


def find(text: str, tensor: str, rank: str) -> Traversal:
    return next(t for t in traversals(load(text)) if (t.tensor, t.rank) == (tensor, rank))


def test_the_witness_says_which_dependence_forces_each_pass() -> None:
    t = find(CASCADE_4, "QK", "M")
    assert t.witness == (("GM", "SN"), ("SD", "A")) and t.reads == (1, 2) and t.live == "fiber"
    assert find(CASCADE_5, "QK", "M1").witness == ()
    assert find(GOLDEN["layer norm, two moments"][0], "X", "D").witness == (("S", "W"), ("W", "Y"))


def test_what_must_stay_alive() -> None:
    """K is read once where QK is kept, and needed three times where QK is recomputed."""
    assert find(CASCADE_4, "K", "M").live == "tile" and find(CASCADE_4, "K", "M").passes == 3
    assert find(CASCADE_4, "SN", "M").live == "fiber" and find(CASCADE_4, "A", "M").live == "tile"
    assert find(CASCADE_5, "QK", "M1").live == "tile" and find(CASCADE_5, "QK", "M0").live == "fiber"


def test_the_chain_names_what_each_pass_makes() -> None:
    assert find(CASCADE_4, "K", "M").chain == (("K", "QK", "GM"), ("SN", "SD"), ("A",))
    assert find(CASCADE_5, "K", "M").passes == 1 and find(CASCADE_5, "K", "M0").of == "M"
    assert stages(load(CASCADE_4), "M") == {"QK": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "O": 3}


def test_waiting_is_told_from_walking() -> None:
    """Queries may be walked outside all passes; a row of features is summed up before the scores can go on."""
    assert find(CASCADE_4, "QK", "M").waits and find(CASCADE_4, "K", "E").waits
    assert not find(CASCADE_4, "QK", "P").waits and not find(CASCADE_4, "Q", "P").waits


# FuseMax, Table I, and what each pass walks along: the data (M) or one summary for each tile (M1)
TAXONOMY = {
    "pytorch": ("M", "M", "M"), "tensorflow": ("M", "M", "M"), "flat": ("M", "M", "M"), "et": ("M", "M", "M"),
    "tileflow": ("M", "M"), "choi": ("M", "M1", "M"),
    "flash_attention": ("M",), "flash_attention_2": ("M",), "rabe_staats": ("M", "M1"),
}
FOLDER = Path(__file__).parent / "cases" / "taxonomy"


def test_the_taxonomy_is_complete() -> None:
    assert {p.stem for p in FOLDER.glob("*.mc")} == set(TAXONOMY)


@pytest.mark.parametrize("name", TAXONOMY)
def test_taxonomy(name: str) -> None:
    """The class by fiber length; a pass over summaries weighs M1/M.  All forms mean the same."""
    program, first = (parse((FOLDER / f"{n}.mc").read_text()) for n in (name, "pytorch"))
    verify(program)
    found = classify(program, "M")
    assert found is not None and found.walks == TAXONOMY[name] and found.passes == TAXONOMY[name].count("M")
    extent = Sizes(program.cascade, {"P": 5, "M": 400})
    summaries = len(found.walks) - found.passes
    assert found.weight(extent) == pytest.approx(found.passes + summaries / 4)  # tiles of 4
    rng = np.random.default_rng(0)
    inputs = {n: rng.normal(size=(5 if n == "Q" else 11, 8)) for n in "QKV"}
    np.testing.assert_allclose(interpret(program, inputs)["O"], interpret(first, inputs)["O"], rtol=1e-12)


def test_the_class_is_that_of_the_rank_walked_most() -> None:
    """Without naming one; and every whole fiber of it is passed at most so often."""
    for text, _ in GOLDEN.values():
        found = classify(load(text))
        assert found is not None
        assert found.passes == max(t.passes for t in traversals(load(text)) if t.rank == t.of)


@pytest.mark.parametrize("name", CHAINS)
def test_a_proof_states_what_the_counter_finds(name: str) -> None:
    """`M: 3 -> 1 passes`: counted on the cascade that was read and on the one that came out."""
    from memcomp.passes.reduce_passes import reduce_passes

    read = chain(name)
    made = reduce_passes(read)
    said = [m for line in made.proofs if (m := re.fullmatch(r"(\w+): (\d+) -> (\d+) passes", line))]
    for m in said if name != "ragged" else ():  # a ragged rank is bounded by a tensor's dimension, which has its own
        for program, number in ((read, m[2]), (made, m[3])):
            assert max(n for (_, r), n in passes(program).items() if r == m[1]) == int(number)


@settings(max_examples=60, deadline=None)
@given(p=programs())
def test_laws(p: Program) -> None:
    """Every count has its witness, direct reads are among the passes, and one more statement never lowers one."""
    found = traversals(p)
    for t in found:
        assert len(t.witness) == t.passes - 1 and t.chain[0][0] == t.tensor
        assert all(1 <= n <= t.passes for n in t.reads)
    c = p.cascade
    fewer = passes(Cascade(c.ranks, c.tensors, c.einsums[:-1]))
    more = passes(c)
    assert all(more.get(k, 0) >= n for k, n in fewer.items())
