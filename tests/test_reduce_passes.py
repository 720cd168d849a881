"""Streaming a long rank: the same numbers, fewer passes, and a reason where it is not done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp.ir import ops
from memcomp.ir.errors import OptionError
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse, show
from memcomp.ir.verify import verify
from memcomp.passes.derive import separate
from memcomp.passes.reduce_passes import reduce_passes, refusals
from tests.chains import NAMES, SHAPES, arrays, load
from tests.programs import arrays as random_arrays
from tests.programs import programs

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"splits": 3}, {"frame": "running"}, {"splits": 3, "frame": "running"})


def streamed(program: Program, **options: Any) -> Program:
    carried = any("M" in t.ranks for t in program.cascade.outputs())
    return reduce_passes(program, tile=(4,), ranks=("M",) if carried else None, **options)


def same(want: Any, got: Any) -> bool:
    """Equal to rounding, with NaN and infinities in the same places."""
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    with np.errstate(all="ignore"):
        scale = max(1.0, float(np.max(np.abs(want), initial=0.0, where=np.isfinite(want))))
        close = (want == got) | (np.abs(want - got) <= 1e-12 * scale) | (np.isnan(want) & np.isnan(got))
    return bool(close.all())


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_meaning(name: str) -> None:
    program = load(name)
    forms = {show(q): q for q in (streamed(program, **options) for options in OPTIONS)}
    for text, new in forms.items():
        verify(new)
        assert parse(text) == new
    kinds = ("plain", "masked") if name == "no_max" else ("plain", "big", "masked")  # as written it overflows
    for kind in kinds:
        for p, m in SHAPES:
            x = arrays(program, p, m, kind)
            want = interpret(program, x)
            for text, new in forms.items():
                got = interpret(new, x)
                for t in want:
                    assert same(want[t], got[t]), (t, kind, (p, m), want[t], got[t], text)


@pytest.mark.parametrize("name", NAMES)
def test_is_idempotent(name: str) -> None:
    new = streamed(load(name))
    assert streamed(new) is new


def test_refusals_name_operator_and_law() -> None:
    (why,) = refusals(streamed(load("quantised")))
    assert why.where == "Y over M" and "round" in why.why
    waits = refusals(streamed(load("standardised")))
    assert {w.where for w in waits} == {"SD over M", "O over M"} and all("exp" in w.why for w in waits)
    assert refusals(streamed(load("plain"))) == ()


def test_states_stay_finite_where_the_plain_form_overflows() -> None:
    """Written without a maximum, scores of 1e4 overflow; a reference is made for them."""
    program = load("no_max")
    x = arrays(program, 5, 10, "big")
    assert np.isnan(interpret(program, x)["O"]).any()
    stable = interpret(load("causal"), {**x, "Q": x["Q"] * 8})["O"]  # its scores carry 0.125
    assert same(stable, interpret(streamed(program), x)["O"])


def test_nothing_divides_by_a_running_sum() -> None:
    """ReLU weights that are all zero in the first tile: the divisor waits for the end."""
    program = load("relu_squared")
    x = {"Q": np.ones((1, 3)), "K": np.repeat([[-1.0] * 3, [1.0] * 3], 4, axis=0), "V": np.arange(16.0).reshape(8, 2)}
    assert same(interpret(program, x)["O"], interpret(streamed(program), x)["O"])


def test_variance_is_centred() -> None:
    """Mean 1e8 times the deviation: a sum of squares less the square of the sum would keep no digit."""
    program = load("variance")
    x = {"X": np.random.default_rng(0).standard_normal((2, 50)) + 1e8}
    for frame in ("first", "running"):
        for splits in (None, 3):
            got = interpret(streamed(program, frame=frame, splits=splits), x)["VAR"]
            np.testing.assert_allclose(got, np.var(x["X"], axis=1), rtol=1e-6)


def test_a_weighted_frame_or_another_pass() -> None:
    program = load("weighted_variance")
    one, two = streamed(program), streamed(program, weighted=False)
    assert "weighted gauge" in " ".join(one.proofs) and "M: 4 -> 1 passes" in one.proofs
    assert "M: 4 -> 2 passes" in two.proofs and "weighted mean" in refusals(two)[0].why
    x = arrays(program, 4, 25, "plain")
    x["Q"] *= 20  # nearly all weight on one point: its value less the plain mean would cancel
    x["V"] += 1e6
    for form in (one, two):
        np.testing.assert_allclose(interpret(form, x)["O"], interpret(program, x)["O"], rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.integers(0, 99))
def test_random_programs(program: Program, seed: int) -> None:
    """Maps, loops, gathers, places and guards around what is streamed stay what they are."""
    new = reduce_passes(program, tile=(2,))
    verify(new)
    x = random_arrays(program, seed)
    with np.errstate(all="ignore"):
        found = interpret(new, x)
        for t, want in interpret(program, x).items():
            np.testing.assert_allclose(found[t], want, rtol=1e-6, atol=1e-9)


def test_bounded_exponents_need_no_reference() -> None:
    """tanh bounds the scores, so the maximum is dead and goes."""
    assert "max{" not in show(streamed(load("softcap")))
    assert "max{" in show(streamed(load("softcap_big")))


LIFTED = """program lifted
rank P
rank M
in X[P, M]: f32
out H[P]: f32
GM[p] = min{m} X[p, m]
H[p] = max{m} tanh(X[p, m] - GM[p])
"""


@pytest.mark.parametrize(("text", "op", "laws"), [
    (show(load("quantised")), "round", {"hom": ("mul", "mul"), "degree": 1.0}),
    (LIFTED, "tanh", {"monotone": ("dec",)}),
])
def test_a_broken_law_is_caught(text: str, op: str, laws: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A false row in the operator table gives a wrong program, and the comparison sees it."""
    program = parse(text)
    monkeypatch.setitem(ops.OPS, op, replace(ops.OPS[op], **laws))
    new = streamed(program)
    assert new.cascade != program.cascade
    x = arrays(program, 6, 25, "plain")
    assert any(not same(want, interpret(new, x)[t]) for t, want in interpret(program, x).items())


@pytest.mark.parametrize(("line", "wrong"), [
    ("PSD[m1, p] = RSD[m1, p] * PGM[m1, p]", "PSD[m1, p] = RSD[m1, p]"),  # the frame moves, the state does not
    ("PGM[m1, p] = exp(RGM", "PGM[m1, p] = exp2(RGM"),  # it moves by another rate
    ("m1*M0 + m0 <= p", "m1*M0 + m0 < p"),
])
def test_a_broken_program_is_caught(line: str, wrong: str) -> None:
    program = load("causal")
    good = show(streamed(program))
    assert line in good
    x = arrays(program, 6, 25, "plain")
    assert not same(interpret(program, x)["O"], interpret(parse(good.replace(line, wrong)), x)["O"])


@pytest.mark.parametrize("options", [{"frame": "furst"}, {"ranks": ("MM",)}, {"tile": ()}, {"splits": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        reduce_passes(load("plain"), **options)


def test_no_named_composite() -> None:
    from pathlib import Path

    folder = Path(separate.__file__).parent.parent
    assert not [f for f in folder.rglob("*.py") if "soft" + "max" in f.read_text().lower()]


NAN_ROW = """program masked_inside
rank P
rank M
rank F = 2
in S[P, M]: f32
in mask[P, M]: bool
in V[M, F]: f32
out O[P, F]: f32
GM[p] = max{m} S[p, m] where mask[p, m]
SN[p, m] = exp(S[p, m] - GM[p]) where mask[p, m]
SD[p] = sum{m} SN[p, m] where mask[p, m]
A[p, m] = SN[p, m] / SD[p]
O[p, f] = sum{m} A[p, m] * V[m, f]
"""
TWO_CHOICES = """program two_choices
rank P
rank M
in S[P, M]: f32
in C[P]: f32
out O[P]: f32
out N[P]: f32
O[p] = sum{m} where(m < 4, S[p, m] + C[p], exp(S[p, m]))
N[p] = sum{m} O[p]
"""


@pytest.mark.parametrize("text", [NAN_ROW, TWO_CHOICES])
def test_a_choice_shields_its_own_factors_and_frames_serve_their_own_points(text: str) -> None:
    program = parse(text)
    rng = np.random.default_rng(0)
    inputs = {"S": rng.standard_normal((4, 10)), "mask": np.tril(np.ones((4, 10), bool), -1),
              "V": rng.standard_normal((10, 2)), "C": rng.standard_normal(4)}
    inputs = {t.name: inputs[t.name] for t in program.cascade.inputs()}
    with np.errstate(all="ignore"):
        expected, found = interpret(program, inputs), interpret(reduce_passes(program, tile=(3,)), inputs)
    for name, value in expected.items():
        assert same(value, found[name]), name
