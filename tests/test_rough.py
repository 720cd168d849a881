"""Rough exponentials: their stated error over all binades, and that they stand only where it does not matter."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.codegen.rough import ERROR, STEEP, rough
from memcomp.ir.expr import Call, walk
from memcomp.ir.program import close, knobs
from memcomp.ir.text import parse
from memcomp.ir.tile import Map, TileProgram, statements
from memcomp.stations import rewrite
from tests.mapped import mapped

ATTENTION = """
program p
rank P
rank M
rank E = 16
rank F = 16
in Q[P, E]: bf16
in K[M, E]: bf16
in V[M, F]: bf16
out O[P, F]: bf16
S[p, m] = sum{e} Q[p, e] * K[m, e]
"""
PLAIN = """W[p, m] = exp(S[p, m])
D[p] = sum{m} W[p, m]
N[p, f] = sum{m} W[p, m] * V[m, f]
O[p, f] = N[p, f] / D[p]
"""
STABLE = """G[p] = max{m} S[p, m]
W[p, m] = exp(S[p, m] - G[p])
D[p] = sum{m} W[p, m]
N[p, f] = sum{m} W[p, m] * V[m, f]
O[p, f] = N[p, f] / D[p]
"""


def tiles(text: str) -> TileProgram:
    p = rewrite(parse(text), observe=lambda *_: None)
    return lower(close(p, {k.name: k.choices[1] for k in knobs(p)}))


def operators(text: str, dtype: str = "bf16") -> list[str]:
    tp = tiles((ATTENTION + text).replace("O[P, F]: bf16", f"O[P, F]: {dtype}"))
    return sorted(e.op for calls in rough(tp).values() for e in calls if isinstance(e, Call))


@pytest.mark.parametrize("text", [PLAIN, STABLE], ids=["plain", "stable"])
def test_weights_are_rough_only_under_bf16_results(text: str) -> None:
    assert operators(text) == ["exp"]
    assert operators(text, "f32") == operators(text, "f16") == []


def test_what_steps_multiply_up_stays_exact() -> None:
    """Two exponentials stand in each step; the one that scales the running sums errs once a step."""
    tp = tiles(ATTENTION + STABLE)
    every = [e for k in tp.kernels for s in statements(k.body) if isinstance(s, Map) for e in walk(s.body)
             if isinstance(e, Call) and e.op == "exp"]
    (calls,) = rough(tp).values()
    assert len(every) == 2 and len(calls) == 1


@pytest.mark.parametrize("cap, ops", [(20.0, ["exp", "tanh"]), (STEEP, ["exp", "tanh"]), (2 * STEEP, ["exp"])])
def test_an_error_in_an_exponent_counts_as_often_as_it_is_taken(cap: float, ops: list[str]) -> None:
    assert operators(PLAIN.replace("exp(S[p, m])", f"exp(tanh(S[p, m] / {cap}) * {cap})")) == ops


@pytest.mark.parametrize("last", [
    "O[p, f] = N[p, f] / (D[p] - 1.0)",             # what is left may be far smaller than what was summed
    "O[p, f] = N[p, f] / D[p] + exp(D[p])",         # an exponential makes more of an error
    "O[p, f] = N[p, f] / D[p] + log(D[p])",         # near 1 the result is far smaller
    "O[p, f] = where(D[p] < 3.0, N[p, f], 0.0)",    # it decides
], ids=["difference", "exponent", "logarithm", "choice"])
def test_what_makes_more_of_an_error_keeps_weights_exact(last: str) -> None:
    assert operators(PLAIN.replace("O[p, f] = N[p, f] / D[p]", last)) == []


def test_a_sum_that_may_cancel_is_no_divisor() -> None:
    text = PLAIN.replace("D[p] = sum{m} W[p, m]", "D[p] = sum{m} W[p, m] * V[m, 0]")
    assert operators(text) == []
    assert operators(text.replace("V[m, 0]", "square(V[m, 0])")) == operators(PLAIN)


def test_a_finer_result_beside_keeps_weights_exact() -> None:
    text = (ATTENTION + PLAIN).replace("out O", "out L[P]: f32\nout O") + "L[p] = D[p] * 2.0\n"
    assert rough(tiles(text)) == {}


torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm.isa import AVX2, AVX512, SSE, isa  # noqa: E402

HERE = isa("cpu")
FORMS = [f for f in (SSE, AVX2, AVX512) if f.lanes <= HERE.lanes]
EXACT = {"exp": torch.exp, "exp2": torch.exp2, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def as_rough(tp: TileProgram, form: Any) -> Any:
    kernel = emit(tp, form)
    return build(replace(kernel, source=re.sub(rf"\b({'|'.join(ERROR)})\(", r"rough_\1(", kernel.source)))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_rough_functions_over_the_whole_range(form: Any) -> None:
    """Every 5,003rd float32, all small and huge ones, both signs, against float64."""
    outs = "".join(f"out Y_{n}[N]: f32\n" for n in ERROR) + "".join(f"Y_{n}[n] = {n}(X[n])\n" for n in ERROR)
    f = as_rough(lower(mapped(parse(f"program p\nrank N\nin X[N]: f32\n{outs}"))), form)
    bits = np.concatenate([np.arange(0, 0x7F800000, 5003), np.arange(500), 0x7F7FFFFF - np.arange(500)])
    both = np.concatenate([bits, bits | 1 << 31]).astype(np.uint32)
    x = torch.cat([torch.from_numpy(both.view(np.float32)), torch.tensor([float("inf"), -float("inf"), 0.0])])
    x = torch.cat([x, torch.linspace(-100, 100, 40001)])
    got = {n: torch.empty_like(x) for n in ERROR}
    f(x, *got.values(), len(x))
    for name, y in got.items():
        want = EXACT[name](x.double())
        held = (want.abs() >= 2.0**-126) & (want < 3.4e38)
        error = (y.double() - want).abs()[held]
        worst = (error if name == "tanh" else error / want[held]).max().item()
        assert worst <= ERROR[name], (name, worst)
        assert worst > ERROR[name] / 8, "the statement says what it is"
        assert y[want > 3.5e38].isinf().all() and y[want < 0.0].lt(0.0).all(), name
        assert name == "tanh" or (y[want.abs() < 2.0**-126].double().abs() <= 2.0**-125).all(), name
    missing = torch.full((1,), float("nan"))
    outs = [torch.zeros(1) for _ in ERROR]
    f(missing, *outs, 1)
    assert all(o.isnan() for o in outs)


@pytest.mark.skipif(HERE.lanes < AVX2.lanes, reason="the forms are wide")
@pytest.mark.parametrize("text", [PLAIN, STABLE], ids=["plain", "stable"])
def test_results_are_as_exact_as_with_exact_weights(text: str) -> None:
    """Relative to float64 the error is that of rounding, to a few percent; with weights a bit off it is not."""
    tp = tiles(ATTENTION + text)
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 16).to(torch.bfloat16) for n in (70, 130, 130))
    w = torch.softmax(q.double() @ k.double().mT, -1) @ v.double()
    errors = []
    for kernel in (emit(tp, HERE), replace(emit(tp, HERE), source=emit(tp, HERE).source.replace("rough_", ""))):
        o = torch.empty(70, 16, dtype=torch.bfloat16)
        build(kernel)(q, k, v, o, 70, 130)
        errors.append(((o.double() - w).norm() / w.norm()).item())
    assert "rough_exp(" in emit(tp, HERE).source
    assert errors[0] <= 1.03 * errors[1]
