"""The Triton backend: by Triton's interpreter every program it lowers computes what the program says; text is stable.

What machine code becomes of it is in `test_gpu_offline`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot, Loop, Statement, TileProgram, When, statements
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.pipeline import map_program
from tests.mapped import CHAINS, ONEPASS, arguments, equal, far_data, inputs, load, mapped, same, symbols
from tests.programs import arrays, programs
from tests.references import CASES as REFERENCES

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

import memcomp  # noqa: E402
from memcomp.artifact import Launched  # noqa: E402
from memcomp.codegen import triton  # noqa: E402
from memcomp.codegen.triton import emit, interpreted  # noqa: E402
from memcomp.codegen.triton.layout import layout  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


def run(tp: TileProgram, arrays: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    args, known = arguments(tp, arrays, sizes)
    interpreted(emit(tp, "h100"))(*args, *known)
    return {p.name: x.double().numpy() for p, x in zip(tp.params, args, strict=True) if p.role in ("out", "state")}


# -- meaning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONEPASS + CHAINS)
def test_kernels_equal_the_program(name: str) -> None:
    p, rng = load(name), np.random.default_rng(4)
    for k, (m, n) in enumerate(((9, 7), (0, 3), (40, 5))):
        sizes = {s: m if s == "M" else n if s == "P" else 2 for s in symbols(p)}
        closed = mapped(p, k % 2)
        a = inputs(p, sizes, rng)
        want, got = interpret(closed, a, sizes), run(lower(closed), a, sizes)
        for out in want:
            assert same(got[out], want[out], 2e-4, 2e-4), (out, sizes)


@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"delta_rule"}))
def test_kernels_equal_the_reference(name: str) -> None:
    a, want = REFERENCES[name](np.random.default_rng(6))
    got = run(lower(mapped(load(name))), a, {"T": 64} if name == "paged_decode" else {})
    for out in want:
        assert same(got[out], want[out], 1e-3, 1e-3), out


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate))
@given(programs(), st.integers(0, 99))
def test_any_program(program: Any, seed: int) -> None:
    assert equal(program, arrays(program, seed), run, lambda tp: emit(tp, "h100"))


def test_functions_are_as_exact_as_f32() -> None:
    text = """
program p
rank N
in X[N]: f32
out T[N]: f32
out E[N]: f32
out L[N]: f32
out R[N]: f32
out G[N]: f32
in I[N]: i64
out S[N]: f32
out Q[N]: f32
S[n] = sin(I[n])
Q[n] = exp2(-abs(I[n])) + log(abs(I[n]) + 1)
T[n] = tanh(X[n])
E[n] = expm1(X[n])
L[n] = log1p(abs(X[n]))
R[n] = round(X[n])
G[n] = xlogx(abs(X[n]))
"""
    small = np.ldexp(1.0, -np.arange(30)) * np.array([[1.0], [-1.0], [1.37]])
    x = np.concatenate([np.linspace(-20, 20, 201), small.ravel(), np.arange(-6, 6) + 0.5]).astype(np.float32)
    closed, i = mapped(parse(text)), np.arange(len(x)) - 100
    got, want = run(lower(closed), {"X": x, "I": i}, {}), interpret(closed, {"X": x.astype(np.float64), "I": i})
    for name in want:
        unit = np.spacing(np.abs(want[name]).astype(np.float32))
        assert np.all(np.abs(got[name] - want[name]) <= 8 * unit), name


def test_turns_are_taken_off_however_many_they_are() -> None:
    """sin and cos of numbers of all sizes, of whole quarters of turns, and of what is no number."""
    p = parse("""program p
rank N
in X[N]: f32
out S[N]: f32
out C[N]: f32
S[n] = sin(X[n])
C[n] = cos(X[n])""")
    rng = np.random.default_rng(2)
    sizes = 2.0 ** rng.uniform(-20, 127, 2000)
    x = np.concatenate([sizes, -sizes, np.arange(-600, 600) * np.pi / 2, [0.0, 8192.0, np.inf, -np.inf, np.nan]])
    x = x.astype(np.float32).astype(np.float64)
    got = run(lower(mapped(p)), {"X": x}, {"N": len(x)})
    with np.errstate(invalid="ignore"):
        for name, f in (("S", np.sin), ("C", np.cos)):
            assert np.array_equal(np.isnan(got[name]), np.isnan(f(x)))
            assert np.nanmax(abs(got[name] - f(x))) <= 2.0**-23


def test_integers_round_down_and_wrap_as_the_program_says() -> None:
    text = """
program p
rank N
in I[N]: i64
out Z[N]: i64
Z[n] = I[n]//3 + I[n]%5 + ceildiv(I[n], 7) + (I[n] >> 2) + (I[n] << 1) + (I[n] & 12) + (I[n] | 3)
"""
    closed = mapped(parse(text))
    a = {"I": np.arange(-70, 70)}
    assert np.array_equal(run(lower(closed), a, {})["Z"], interpret(closed, a)["Z"])


# -- from torch --------------------------------------------------------------------------------------------------------


def grouped(q: Any, k: Any, v: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def softcapped(q: Any, k: Any, v: Any) -> Any:
    s = 20.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.02)
    return torch.softmax(s, -1) @ v


def decode(q: Any, k: Any, v: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(("fn", "rows"), [(grouped, 70), (softcapped, 33), (decode, 1), (decode, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_for_a_gpu_that_is_not_there(fn: Any, rows: int, dtype: Any) -> None:
    torch.manual_seed(0)
    heads = 2 if fn is softcapped else 6
    q, (k, v) = torch.randn(1, heads, rows, 32), torch.randn(2, 1, 2, 70, 32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    exact = fn(q.double(), k.double(), v.double())
    torch._dynamo.reset()
    got = torch.compile(fn, backend="memcomp", options={"target": "h100", "interpret": True, "strict": True})(q, k, v)
    error, own = ((x.double() - exact).norm() / exact.norm() for x in (got, fn(q, k, v)))
    assert error <= 1.5 * own + 1e-7, (error, own)


def test_tensors_must_be_where_the_kernels_run() -> None:
    q = torch.randn(1, 2, 8, 16)
    torch._dynamo.reset()
    why = "kernels for h100 take tensors on cuda, these are on cpu"
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=why):
        torch.compile(grouped, backend="memcomp", options={"target": "h100", "strict": True})(q, q, q)
    tp = lower(mapped(load("onepass_causal_gqa")))
    with pytest.raises(TypeError, match="takes 4 tensors"):
        Launched.of(emit(tp, "h100"), triton)(q)


def test_explain_needs_no_gpu() -> None:
    q = torch.randn(1, 2, 80, 16)
    told = memcomp.explain(grouped, q, q, q, target="a100", strict=True)
    assert "@triton.jit" in told.regions[0].kernels[0].source


# -- the text ----------------------------------------------------------------------------------------------------------

PREFILL = """
program prefill
rank H
rank P
rank M
rank E = 64
rank F = 64
in Q[H, P, E]: bf16
in K[H, M, E]: bf16
in V[H, M, F]: bf16
out O[H, P, F]: bf16
S[h, p, m] = sum{e} Q[h, p, e] * K[h, m, e]
GM[h, p] = max{m} S[h, p, m] * 0.125 where m <= p
W[h, p, m] = exp(S[h, p, m] * 0.125 - GM[h, p]) where m <= p
D[h, p] = sum{m} W[h, p, m] where m <= p
N[h, p, f] = sum{m} W[h, p, m] * V[h, m, f] where m <= p
O[h, p, f] = N[h, p, f] / D[h, p]
"""
SIZES = {"H": 16, "P": 4096, "M": 4096}


def prefill() -> TileProgram:
    return lower(map_program(parse(PREFILL), config=Config(target="h100"), sizes=SIZES))


def test_far_data_are_beyond_every_point() -> None:
    """Data of 64 bits are compared with the points of a tile as 32 bits: what lies far off must not come back."""
    p, a, sizes = far_data()
    tp = lower(mapped(p))
    assert "short(" in emit(tp, "h100").source
    want, got = interpret(p, a, sizes), run(tp, a, sizes)
    for out in want:
        assert same(got[out], want[out], 1e-5, 1e-5), out


@pytest.mark.parametrize("body", ["Q[j, e] * K[j, m, e // 2] * S[j, m, e // 2]",
                                  "Q[j, e] * K[j, m, e // 2] * S[j, m, e // 2] * T[j, m]"])
def test_a_sum_over_two_dims_is_no_product_of_matrices(body: str) -> None:
    """What stands before the loop has one of the dims, and no mask of the other, which steps count; or an operand lacks
    one."""
    given = "".join(f"in {n}: f32\n" for n in ("Q[J, E]", "T[J, M]") if n[0] in body)
    p = map_program(parse(f"program both\nrank J\nrank M\nrank E = 10\nrank G = 5\n{given}in K[J, M, E]: f32\n"
                          "in S[J, M, G]: f32\nin L[J]: i64\nout O[J]: f32\n"
                          f"O[j] = sum{{m, e}} {body} where m <= L[j]\n"),
                    config=Config(target="h100", backend="triton"), sizes={"J": 512, "M": 4096})
    assert any(isinstance(s, Dot) and len(s.over) == 2 for s in statements(lower(p).kernels[0].body))
    rng = np.random.default_rng(0)
    shapes = {"Q": (3, 10), "K": (3, 700, 10), "S": (3, 700, 5), "T": (3, 700)}
    a = {n: rng.normal(size=x) for n, x in shapes.items() if f"{n}[" in body} | {"L": np.array([0, 650, 2**63 - 1])}
    want, got = interpret(p, a), run(lower(p), a, {})
    assert same(got["O"], want["O"], 1e-3, 1e-3)


@pytest.mark.parametrize(("name", "make"), [("prefill", prefill), ("chain", lambda: lower(mapped(load("layer_norm"))))])
def test_text_is_stable(name: str, make: Any) -> None:
    """GOLDEN=write rewrites the files; read the difference before it is kept."""
    text, file = emit(make(), "h100").source, GOLDEN / f"triton_{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
    assert text == emit(make(), "h100").source


def test_the_long_loop_has_no_masks_and_products_no_transpositions() -> None:
    tp = prefill()
    for boxes in (True, False):
        text = emit(tp, "h100", aligned=boxes).source
        first, second = re.split(r"for m1 in (?:tl\.)?range\(", text)[1:]
        assert "mask=" not in first and "tl.where(live" not in first and ("mask=" in second) != boxes
        assert "if " not in first + second.split(".store(")[0]
        # tensor cores read a box turned from where it lies; addresses need no turn at all
        assert text.count("tl.trans(") == text.count("tl.trans(K_box") == (2 if boxes else 0)
        assert text.count("tl.dot(") == 4 and text.count("to_bf16(") == 4
    assert [a.name for a in layout(tp.kernels[0]).axes] == ["p0", "e", "m0", "f"]


def without_spares(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """The last side of every branch that only spares work."""
    out: list[Statement] = []
    for s in body:
        if isinstance(s, When) and s.spare:
            out += without_spares(s.last)
        elif isinstance(s, When):
            out.append(replace(s, body=without_spares(s.body), orelse=without_spares(s.orelse)))
        else:
            out.append(replace(s, body=without_spares(s.body)) if isinstance(s, Loop) else s)
    return tuple(out)


LONG = ("onepass_positions", "onepass_padding")  # to interpret


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in ONEPASS])
def test_branches_that_spare_work_change_nothing(name: str) -> None:
    p, rng = load(name), np.random.default_rng(4)
    tp = lower(mapped(p))
    plain = replace(tp, kernels=tuple(replace(k, body=without_spares(k.body)) for k in tp.kernels))
    if plain == tp:
        assert not any(isinstance(s, When) and s.spare for k in tp.kernels for s in statements(k.body))
        return
    sizes = {s: 140 if s == "M" else 70 if s == "P" else 2 for s in symbols(p)}
    a = inputs(p, sizes, rng)
    want, got = interpret_tile(tp, a, sizes), interpret_tile(plain, a, sizes)
    for out in want:
        assert same(got[out], want[out], 1e-12, 1e-12), out
