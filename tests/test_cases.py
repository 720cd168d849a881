"""The hand-written programs: each parses, verifies, prints back, and means what its reference computes."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse, show
from memcomp.ir.verify import verify
from tests.references import CASES

FOLDER = Path(__file__).parent / "cases"
NAMES = sorted(p.stem for p in FOLDER.glob("*.mc"))


def load(name: str) -> Program:
    return parse((FOLDER / f"{name}.mc").read_text())


def test_every_reference_has_its_program() -> None:
    assert set(CASES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_verifies_and_prints_back(name: str) -> None:
    program = load(name)
    verify(program)
    assert parse(show(program)) == program


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_its_reference(name: str) -> None:
    inputs, expected = CASES[name](np.random.default_rng(zlib.crc32(name.encode())))
    got = interpret(load(name), inputs)
    assert set(got) == set(expected)
    # the backward pass is judged by central differences, whose own error is about step**2 times a third derivative
    tolerance = 1e-7 if name == "attention_backward" else 1e-12
    for tensor, want in expected.items():
        assert got[tensor].shape == want.shape
        np.testing.assert_allclose(got[tensor], want, rtol=tolerance, atol=tolerance, err_msg=f"{name}: {tensor}")


def test_a_wrong_program_differs() -> None:
    """The comparison can fail: shifting the causal guard by one is seen."""
    inputs, expected = CASES["causal_gqa"](np.random.default_rng(0))
    text = show(load("causal_gqa")).replace("m <= p", "m < p")
    assert np.abs(interpret(parse(text), inputs)["O"] - expected["O"]).max() > 1e-3
