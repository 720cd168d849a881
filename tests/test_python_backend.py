"""The numpy backend: float32 text that computes what the program says, in place, for every stored dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.codegen.python import build, emit
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Const
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from memcomp.ir.tile_interpret import interpret_tile, solve_sizes
from tests.mapped import CHAINS, ONEPASS, extent, inputs, load, mapped, same, symbols
from tests.references import CASES as REFERENCES

NUMPY = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "u8": np.uint8,
    "bool": np.bool_,
}


def run(tp: TileProgram, arrays: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    known = solve_sizes(tp, {n: np.shape(a) for n, a in arrays.items()}, sizes)
    args = []
    for p in tp.params:
        if p.name in arrays:
            args.append(np.asarray(arrays[p.name]).astype(NUMPY[p.dtype]))
        else:
            args.append(np.full(tuple(extent(n, known) for n in p.shape), 77).astype(NUMPY[p.dtype]))
    build(emit(tp))(*args, *known.values())
    return {p.name: x for p, x in zip(tp.params, args, strict=True) if p.role in ("out", "state")}


@pytest.mark.parametrize("name", ONEPASS + CHAINS)
def test_numpy_equals_the_program(name: str) -> None:
    p, rng = load(name), np.random.default_rng(4)
    for k, (m, n) in enumerate(((1, 1), (9, 7), (40, 33), (0, 3))):
        sizes = {s: m if s == "M" else n if s == "P" else 2 for s in symbols(p)}
        closed = mapped(p, k % 2)
        a = inputs(p, sizes, rng)
        want, got = interpret(closed, a, sizes), run(lower(closed), a, sizes)
        for out in want:
            assert same(got[out], want[out], 2e-4, 2e-4), (out, sizes)


@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"delta_rule"}))
def test_numpy_equals_the_reference(name: str) -> None:
    a, want = REFERENCES[name](np.random.default_rng(6))
    got = run(lower(mapped(load(name))), a, {"T": 64} if name == "paged_decode" else {})
    for out in want:
        assert same(got[out], want[out], 1e-3, 1e-3), out


def test_arithmetic_is_single_precision() -> None:
    p = load("onepass_causal_gqa")
    sizes = {"B": 1, "J": 1, "P": 8, "M": 16}
    a = inputs(p, sizes, np.random.default_rng(0), scale=4.0)
    tp = lower(mapped(p))
    exact = interpret_tile(tp, {n: x.astype(np.float32) for n, x in a.items()}, sizes)["O"]
    got = run(tp, a, sizes)["O"]
    error = np.abs(got - exact).max()
    assert got.dtype == np.float32 and 0 < error < 1e-5
    assert "float64" not in emit(tp).source


BF16 = """
program scaled
rank N
in X[N]: bf16
out Y[N]: bf16
out Z[N]: f32
Y[n] = X[n] * 3.0
Z[n] = X[n] * 3.0
"""


def test_bf16_is_read_exactly_and_rounded_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(1000).to(torch.bfloat16)
    x[:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
    y, z = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000)
    build(emit(lower(mapped(parse(BF16)))))(x, y, z, 1000)
    assert torch.equal(z.nan_to_num(), (x.float() * 3).nan_to_num())
    assert torch.equal(y.view(torch.uint16)[3:], (x.float() * 3).to(torch.bfloat16).view(torch.uint16)[3:])
    assert torch.isnan(y[2]) and y[0] == float("inf") and y[1] == float("-inf")


def test_the_text_is_whole_and_numpy_only() -> None:
    kernel = emit(lower(mapped(load("onepass_causal_gqa"))))
    assert kernel.backend == "python" and f"def {kernel.entry}(" in kernel.source
    imports = [line for line in kernel.source.splitlines() if "import" in line]
    assert imports == ["import numpy as np"]
    assert emit(lower(mapped(load("onepass_causal_gqa")))) == kernel


def test_wrong_arguments_are_named() -> None:
    f = build(emit(lower(mapped(parse(BF16)))))
    with pytest.raises(InputError, match="3 tensors and 1 sizes"):
        f(np.zeros(3, np.uint16))
    with pytest.raises(InputError, match="'X'"):
        f(np.zeros((3, 1), np.uint16), np.zeros(3, np.uint16), np.zeros(3, np.float32), 3)


def test_operators_without_a_numpy_name_are_taken_from_the_table() -> None:
    text = "program p\nrank N\nin X[N]: f32\nout Y[N]: f32\nY[n] = erf(X[n]) + sigmoid(X[n]) + rsqrt(X[n]*X[n] + 1.0)\n"
    p = mapped(parse(text))
    a = {"X": np.linspace(-3, 3, 70)}
    assert same(run(lower(p), a, {})["Y"], interpret(p, a)["Y"], 1e-6, 1e-6)
    assert isinstance(p.mapping.groups[0].partition[0][1], Const)
