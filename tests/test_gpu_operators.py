"""The operators that a GPU is timed with, at their own head sizes and groups, by Triton's interpreter: what comes out
is what float64 says, within twice the error of torch's own form.

What machine code becomes of them is in `test_gpu_spills`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from memcomp.bench.tasks import OWN, Tasks
from memcomp.models.bench.operators import listed
from memcomp.workers import OK, Job

OPERATORS = {c.name: c for c in listed(small=True, narrow=False)}
QUICK = ("prefill_softcap", "window 256 D 64", "decode group 5", "latent decode 576/512")


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    made = Tasks(rehearse=True)
    made.__dict__["cases"] = OPERATORS   # with all their columns
    return made


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPERATORS])
def test_numbers_are_those_of_float64(tasks: Tasks, name: str) -> None:
    answer = tasks.answer(Job("check", (name, OWN + "triton")))
    assert answer.state == OK, answer.why
    assert 0 < answer.told["rms"] <= answer.told["bound_rms"]
