"""Tile programs mean what their programs mean, and move no more than they must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.errors import OptionError, Refusal, VerifyError
from memcomp.ir.expr import Access, Const, Var
from memcomp.ir.interpret import interpret
from memcomp.ir.program import close
from memcomp.ir.text import parse
from memcomp.ir.tile import Fold, Loop, Map, Statement, Store, TileProgram, When
from memcomp.ir.tile_interpret import interpret_tile, measure_tile
from memcomp.ir.tile_verify import verify_tile
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from tests.mapped import CHAINS, ONEPASS, inputs, load, mapped, same, symbols
from tests.programs import arrays, programs
from tests.references import CASES as REFERENCES

RTOL, ATOL = 1e-9, 1e-11  # of float64 against float64 in another order
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def agree(program: Any, sizes: dict[str, int], rng: np.random.Generator, choice: int = 0) -> None:
    p = mapped(program, choice)
    tp = lower(p)
    verify_tile(tp)
    given_ = inputs(program, sizes, rng)
    want, got = interpret(p, given_, sizes), interpret_tile(tp, given_, sizes)
    assert got.keys() == want.keys()
    for name in want:
        assert same(got[name], want[name], RTOL, ATOL), (name, sizes)


@pytest.mark.parametrize("name", ONEPASS + CHAINS)
def test_tiles_equal_the_program(name: str) -> None:
    """At one point, below, at and above a tile, at sizes that divide no tile; several tile sizes."""
    p, rng = load(name), np.random.default_rng(5)
    for k, (m, n) in enumerate(((1, 1), (7, 9), (16, 16), (33, 21), (70, 17), (64, 40))):
        sizes = {s: m if s == "M" else n if s == "P" else 2 for s in symbols(p)}
        agree(p, sizes, rng, k % 3)


@pytest.mark.parametrize("name", ONEPASS)
@pytest.mark.parametrize("empty", ["B", "H", "J", "P", "M"])
def test_extents_of_nothing(name: str, empty: str) -> None:
    p = load(name)
    if empty in symbols(p):
        agree(p, {s: 0 if s == empty else 3 for s in symbols(p)}, np.random.default_rng(1))


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_tiles_equal_the_reference(name: str) -> None:
    """Pages, raggedness, packed words, pieces of one tensor: against numpy written by hand."""
    p = load(name)
    given_, want = REFERENCES[name](np.random.default_rng(11))
    try:
        tp = lower(mapped(p))
    except Refusal as refusal:
        assert name == "delta_rule", refusal
        return
    verify_tile(tp)
    sizes = {"T": 64} if name == "paged_decode" else {}
    got = interpret_tile(tp, given_, sizes)
    for n in want:
        assert same(got[n], want[n], 1e-8, 1e-9), n


@FUZZ
@given(programs(), st.integers(0, 99))
def test_any_program_lowers_or_says_why(program: Any, seed: int) -> None:
    given_ = arrays(program, seed)
    sizes = {r: n for t in program.cascade.inputs() for r, n in zip(t.ranks, given_[t.name].shape, strict=True)}
    sizes = {r: n for r, n in sizes.items() if program.cascade.rank(r).extent is None}
    try:
        p = mapped(program)
        tp = lower(p)
    except Refusal as refusal:
        assert "argmax" in str(refusal) or "topk" in str(refusal) or "reduces over" in str(refusal)
        return
    verify_tile(tp)
    want, got = interpret(p, given_, sizes), interpret_tile(tp, given_, sizes)
    for name in want:
        assert same(got[name], want[name], 1e-8, 1e-10), name


@pytest.mark.parametrize("name, at", [("onepass_positions", "p"), ("onepass_decode_static", "b")])
def test_a_window_at_data_dependent_positions(name: str, at: str) -> None:
    """Both ends of the loop are data; keys before the window are not read either."""
    old = f"m1*M0 + m0 <= pos[{at}]"
    p = parse(str(load(name)).replace(old, f"{old} and m1*M0 + m0 > pos[{at}] - 9"))
    rng = np.random.default_rng(6)
    for m in (1, 9, 40, 70):
        agree(p, {s: {"M": m, "P": 20}.get(s, 2) for s in symbols(p)}, rng)
    sizes = {s: {"M": 70, "P": 4}.get(s, 1) for s in symbols(p)}
    a = inputs(p, sizes, rng)
    a["pos"] = np.full_like(a["pos"], 60)
    rows = 3 if at == "p" else 1
    assert measure_tile(lower(mapped(p)), a, sizes)[1].reads["K"] == rows * 2 * 8 * 8  # keys 52 to 60


# -- rows without a live point -----------------------------------------------------------------------------------------


def test_rows_without_keys_are_what_the_program_says() -> None:
    """No key below the position, or all of them padding: 0 where that is written, NaN where it is 0/0."""
    p, rng = load("onepass_positions"), np.random.default_rng(2)
    sizes = {"B": 1, "J": 1, "P": 20, "M": 30}
    a = inputs(p, sizes, rng) | {"pos": np.where(np.arange(20) % 3, np.arange(20), -1)}
    out = interpret_tile(lower(mapped(p)), a, sizes)["O"]
    assert np.all(out[:, :, ::3] == 0) and np.all(np.isfinite(out))
    p = load("onepass_padding")
    a = inputs(p, sizes, rng) | {"pad": np.zeros((1, 30), bool)}
    assert np.all(interpret_tile(lower(mapped(p)), a, sizes)["O"] == 0)
    plain = parse(str(load("onepass_window")).replace("m1*M0 + m0 <= p ", "m1*M0 + m0 < p "))
    a = inputs(plain, sizes, rng)
    out = interpret_tile(lower(mapped(plain)), a, sizes)["O"]
    assert np.all(np.isnan(out[:, :, 0])) and np.all(np.isfinite(out[:, :, 1:]))


def test_a_tail_is_not_read() -> None:
    """Nothing behind the last key may be touched, and NaN in keys that no tile holds may not matter."""
    p = load("onepass_decode_static")
    a = inputs(p, {"B": 2, "J": 1, "M": 40}, np.random.default_rng(3)) | {"pos": np.array([3, 7])}
    a["V"][:, :, 8:] = np.nan  # tiles of 8: beyond the last live one
    a["K"][:, :, 8:] = np.inf
    assert np.all(np.isfinite(interpret_tile(lower(mapped(p)), a)["O"]))


STATE = """
program state
rank B
rank D = 5
rank P
state S[B, D]: f32
in X[B, D]: f32
in slot[B, P]: i64
in W[B, P]: f32
state C[B, D]: f32
out O[B, D]: f32
out Z[B, D]: f32
S'[b, d] = S[b, d] * 0.5 + X[b, d] where X[b, d] > 0.0
O[b, d] = S[b, d] - tanh(S'[b, d])
Z[b, d] = C[b, d] * 2.0
C'[b, slot[b, p]] = W[b, p] where slot[b, p] >= 0
"""


def test_a_state_is_read_before_it_is_written_over() -> None:
    """The old value in the same kernel and in another; excluded points keep it, guarded scatters too."""
    p = parse(STATE)
    rng = np.random.default_rng(4)
    a: dict[str, Any] = {n: rng.normal(size=(3, 5)) for n in ("S", "X", "C")}
    a |= {"slot": np.array([[0, 3], [-1, 2], [-1, -1]]), "W": rng.normal(size=(3, 2))}
    want, got = interpret(p, a), interpret_tile(lower(mapped(p)), a)
    for n in want:
        assert same(got[n], want[n], RTOL, ATOL), n
    assert np.array_equal(got["C"][2], a["C"][2]) and not np.array_equal(got["C"], a["C"])


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_one_pass_reads_every_key_once_for_all_rows() -> None:
    p, sizes = load("onepass_decode_gqa"), {"B": 2, "J": 2, "M": 50}
    a = inputs(p, sizes, np.random.default_rng(0))
    _, moved = measure_tile(lower(mapped(p)), a)
    assert moved.reads["K"] == a["K"].size and moved.reads["V"] == a["V"].size and moved.reads["Q"] == a["Q"].size
    assert moved.writes == {"O": a["Q"].size}


def test_a_mask_shrinks_the_loop() -> None:
    """Causal: about half of the keys of every row tile; a window: no more than it spans; never past the filled part."""
    sizes = {"B": 1, "J": 1, "P": 128, "M": 128}
    full, read = 3 * 8 * 128 * 8, {}
    for name in ("onepass_causal_gqa", "onepass_window", "onepass_positions"):
        p = load(name)
        a = inputs(p, sizes, np.random.default_rng(0))
        if "pos" in a:
            a["pos"] = np.full(128, 9)
        read[name] = measure_tile(lower(mapped(p)), a)[1].reads["K"]
        assert full == 3 * 8 * a["K"].size
    # tiles of 16 rows and 8 keys: 2 + 4 + .. + 16 of 8 * 16
    assert read["onepass_causal_gqa"] == full * 9 // 16
    assert read["onepass_window"] <= full * (40 + 16 + 8) / 128
    assert read["onepass_positions"] == full * 16 / 128


def test_three_passes_are_measured_as_three() -> None:
    p = load("attention_3pass")
    sizes = {"P": 5, "M": 9}
    tp = lower(mapped(p))
    _, moved = measure_tile(tp, inputs(p, sizes, np.random.default_rng(0)))
    assert moved.reads["QK"] == 2 * 45 and len(tp.kernels) > 3  # once for the maximum, once for the numerator


# -- mutations ---------------------------------------------------------------------------------------------------------


def without(body: tuple[Statement, ...], n: list[int]) -> tuple[Statement, ...]:
    """The body without its n-th statement (counted in order through loops and branches)."""
    out: list[Statement] = []
    for s in body:
        if n[0] == 0:
            n[0] -= 1
            continue
        n[0] -= 1
        if isinstance(s, Loop):
            s = replace(s, body=without(s.body, n))
        elif isinstance(s, When):
            s = replace(s, body=without(s.body, n), orelse=without(s.orelse, n))
        out.append(s)
    return tuple(out)


def size_of(body: tuple[Statement, ...]) -> int:
    return sum(
        1 + size_of(getattr(s, "orelse", ())) + (size_of(s.body) if isinstance(s, (Loop, When)) else 0) for s in body
    )


@pytest.mark.parametrize("name", ["onepass_causal_gqa", "onepass_decode_gqa", "onepass_window", "onepass_bias"])
def test_no_statement_is_idle(name: str) -> None:
    """Every statement matters: without it the tile program is ill formed or gives another result."""
    p, rng = load(name), np.random.default_rng(8)
    sizes = {s: {"M": 70, "P": 70}.get(s, 1) for s in symbols(p)}
    a = inputs(p, sizes, rng, scale=3.0)
    tp = lower(mapped(p))
    want = interpret_tile(tp, a, sizes)["O"]
    k = tp.kernels[0]
    for n in range(size_of(k.body)):
        cut = replace(tp, kernels=(replace(k, body=without(k.body, [n])),))
        try:
            verify_tile(cut)
        except VerifyError:
            continue
        with pytest.raises((VerifyError, AssertionError)):
            assert same(interpret_tile(cut, a, sizes)["O"], want, 1e-6, 1e-6)


def bad(tp: TileProgram, *first: Statement) -> TileProgram:
    k = tp.kernels[0]
    return replace(tp, kernels=(replace(k, body=(*first, *k.body)),))


def test_ill_formed_tile_programs_are_refused() -> None:
    tp = lower(mapped(load("onepass_causal_gqa")))
    one = Const(1.0)
    for wrong, word in (
        (bad(tp, Map("nothing", one)), "nothing"),
        (bad(tp, Map("RM", Access("RD", (Var("p0"),)))), "before it is written"),
        (bad(tp, Map("RM", Var("f"))), "f"),
        (bad(tp, Map("S", one)), "m1"),
        (bad(tp, Fold("RM", "median", ("f",), one)), "median"),
        (bad(tp, Fold("RM", "sum", ("p0",), one)), "own dim"),
        (bad(tp, Map("RM", one), Store(Access("Q", (Const(0),) * 4), "RM")), "Q"),
        (bad(tp, Map("RM", one), Store(Access("O", (Const(0),)), "RM")), "4 dimensions"),
        (replace(tp, sizes=()), "size"),
    ):
        with pytest.raises(VerifyError, match=word):
            verify_tile(wrong)


def test_what_is_open_or_unknown() -> None:
    p = partition(fuse(load("onepass_causal_gqa")))
    with pytest.raises(VerifyError, match="open"):
        lower(p)
    with pytest.raises(OptionError, match="no knob"):
        close(p, {"m7": 8})
    with pytest.raises(OptionError, match="cannot be"):
        close(p, {"m0": 7})
    assert lower(close(close(p, {"m0": 8}), {"p0": 16})) == lower(close(p, {"m0": 8, "p0": 16}))
