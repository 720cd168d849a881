"""The oracle says what is right: it admits rounding and nothing more."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.oracle import EPSILON, Error, absolute_terms, measure, tolerance

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(x).to(TORCH[dtype]).double().numpy()


@settings(deadline=None, max_examples=25)
@given(dtype=st.sampled_from(sorted(TORCH)), length=st.sampled_from([1, 7, 64, 1000]), seed=st.integers(0, 99))
def test_rounding_passes_and_a_lost_term_does_not(dtype: str, length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (_rounded(random.standard_normal((8, length)), dtype) for _ in range(2))
    exact, scale = (a * b).sum(1), np.abs(a * b).sum(1)
    accumulated = np.cumsum((a * b).astype(np.float32), axis=1, dtype=np.float32)[:, -1].astype(np.float64)
    own = measure(_rounded(exact, dtype), exact, scale)
    bound = tolerance([dtype], dtype, elements=8, length=length, torch_error=own)
    assert bound.admits(measure(_rounded(accumulated, dtype), exact, scale))
    dropped = (a * b)[:, : length - max(1, length // 8)].sum(1)
    assert not bound.admits(measure(_rounded(dropped, dtype), exact, scale))


def test_torchs_error_caps_but_the_rounding_of_the_output_is_always_admitted() -> None:
    wide = tolerance(["bf16"], "bf16", elements=100, length=4096, torch_error=None)
    tight = tolerance(["bf16"], "bf16", elements=100, length=4096, torch_error=Error(1e-9, 1e-9))
    assert tight.rms < wide.rms and tight.max < wide.max
    assert tight.rms >= EPSILON["bf16"] / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 5.0])
def test_values_that_are_not_numbers_must_stand_where_the_reference_has_them(bad: float) -> None:
    reference = np.array([1.0, np.nan, -np.inf])
    assert measure(reference.copy(), reference) == Error(0.0, 0.0)
    for i in range(3):
        wrong = reference.copy()
        wrong[i] = bad if not (np.isnan(bad) and i == 1) and bad != reference[i] else 2.0
        assert measure(wrong, reference).max > 1.0


def test_shapes_must_agree_and_a_zero_scale_admits_only_zero() -> None:
    assert measure(np.zeros((2, 1)), np.zeros(2)).max == math.inf
    assert measure(np.array([0.0, 1e-30]), np.zeros(2), np.zeros(2)).max == math.inf
    assert measure(np.zeros(2), np.zeros(2), np.zeros(2)) == Error(0.0, 0.0)


def test_a_bound_needs_something_to_stand_on() -> None:
    with pytest.raises(ValueError):
        tolerance(["f32"], "f32", elements=1, length=None, torch_error=None)


def test_absolute_terms_do_not_cancel() -> None:
    from memcomp.ir.text import parse

    program = parse("program dot on cpu\nrank M = 4\nrank P = 2\nin A[P, M]: f32\nin B[M]: f32\nout O[P]: f32\n"
                    "O[p] = sum{m} A[p, m] * B[m]\n")
    a, b = np.array([[1.0, -1.0, 2.0, -2.0], [0.0, 0.0, 0.0, 3.0]]), np.ones(4)
    assert absolute_terms(program, {"A": a, "B": b})["O"] == pytest.approx([6.0, 3.0])
