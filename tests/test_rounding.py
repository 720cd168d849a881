"""Which computed operands GPU kernels round to f16: exponentials of scores less their maximum, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.codegen.rounding import narrow, peaked
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Mapping, Program
from memcomp.ir.text import parse
from tests.mapped import CASES, arguments, inputs, mapped, symbols

NAMES = ("onepass_causal_gqa", "onepass_window", "onepass_decode_gqa", "onepass_bias")


def program(name: str, *changes: tuple[str, str]) -> Program:
    """A case with tensors of f16, and its text changed."""
    text = (CASES / f"{name}.mc").read_text().replace("f32", "f16")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return replace(parse(text), mapping=Mapping())


def rounded(p: Program) -> bool:
    tp = lower(mapped(p))
    return any(word == "f16" and t in peaked(k) and any(d == "f" for d in k.tile(t).dims)
               for k in tp.kernels for n, t, word in narrow(tp) if n == k.name)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_at_most_one_are(name: str) -> None:
    assert rounded(program(name))


@pytest.mark.parametrize("old, new", [
    ("out O[B, H, P, F]: f16", "out O[B, H, P, F]: f32"),
    ("SLN[b, j, g, m1, m0, p] = exp(W[b, j, g, m1, m0, p] - RF[b, j, g, m1, p])",
     "SLN[b, j, g, m1, m0, p] = exp(W[b, j, g, m1, m0, p])"),
    ("SLN[b, j, g, m1, m0, p] = exp(W[b, j, g, m1, m0, p] - RF[b, j, g, m1, p])",
     "SLN[b, j, g, m1, m0, p] = exp(RF[b, j, g, m1, p] - W[b, j, g, m1, m0, p])"),
    ("SLN[b, j, g, m1, m0, p] = exp(W[b, j, g, m1, m0, p] - RF[b, j, g, m1, p])",
     "SLN[b, j, g, m1, m0, p] = exp(S[b, j, g, m1, m0, p] - RF[b, j, g, m1, p])"),
    ("SLN[b, j, g, m1, m0, p] = exp(W[b, j, g, m1, m0, p] - RF[b, j, g, m1, p])",
     "SLN[b, j, g, m1, m0, p] = sigmoid(W[b, j, g, m1, m0, p] - RF[b, j, g, m1, p])"),
])
def test_nothing_else_is(old: str, new: str) -> None:
    """An output of more digits, no maximum, the wrong way round, that of something else, no exponential."""
    assert rounded(program("onepass_causal_gqa")) and not rounded(program("onepass_causal_gqa", (old, new)))


def test_numbers_of_f16_kernels() -> None:
    """By Triton's interpreter: each error is a few units of f16 of the largest value that is summed."""
    pytest.importorskip("torch")
    pytest.importorskip("triton", reason="triton is not installed")
    from memcomp.codegen.triton import emit, interpreted

    p, rng = program("onepass_causal_gqa"), np.random.default_rng(3)
    closed, sizes = mapped(p, 1), {s: 40 if s == "M" else 24 if s == "P" else 2 for s in symbols(p)}
    given = {n: x.astype(np.float16).astype(np.float64) for n, x in inputs(p, sizes, rng).items()}
    tp = lower(closed)
    kernel = emit(tp, "h100")
    assert "tl.float16)" in kernel.source and "tf32x3" not in kernel.source
    args, known = arguments(tp, given, sizes)
    interpreted(kernel)(*args, *known)
    want = interpret(closed, given, sizes)["O"]
    got = next(x for q, x in zip(tp.params, args, strict=True) if q.name == "O").double().numpy()
    assert np.abs(got - want).max() <= 2.0**-9 * np.abs(given["V"]).max()
