"""The TVM backend: every program it lowers computes what the program says, on any layout, dtype and thread count."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import timeit
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from memcomp.ir.tile_text import parse_tile
from tests.mapped import CHAINS, ONEPASS, arguments, equal, far_data, inputs, load, mapped, same, symbols
from tests.programs import arrays, programs
from tests.references import CASES as REFERENCES

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm.isa import AVX2, AVX512, SSE, isa  # noqa: E402

TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
         "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}
FORMS = [f for f in (SSE, AVX2, AVX512) if f.lanes <= isa("cpu").lanes]


def run(tp: TileProgram, arrays: dict[str, Any], sizes: dict[str, int], form: Any = "cpu") -> dict[str, Any]:
    args, known = arguments(tp, arrays, sizes)
    build(emit(tp, form))(*args, *known)
    return {p.name: x.double().numpy() for p, x in zip(tp.params, args, strict=True) if p.role in ("out", "state")}


@pytest.mark.parametrize("name", ONEPASS + CHAINS)
def test_kernels_equal_the_program(name: str) -> None:
    """At sizes of nothing, of one, below, at and above a tile."""
    p, rng = load(name), np.random.default_rng(4)
    closed = mapped(p, 1)
    tp = lower(closed)
    f = build(emit(tp, "cpu"))
    for m, n in ((1, 1), (9, 7), (64, 64), (130, 33), (0, 3)):
        sizes = {s: m if s == "M" else n if s == "P" else 2 for s in symbols(p)}
        a = inputs(p, sizes, rng)
        want = interpret(closed, a, sizes)
        args, known = arguments(tp, a, sizes)
        f(*args, *known)
        got = {q.name: x.double().numpy() for q, x in zip(tp.params, args, strict=True)}
        for out in want:
            assert same(got[out], want[out], 2e-4, 2e-4), (out, sizes)


@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"delta_rule", "product_key_bag"}))
def test_kernels_equal_the_reference(name: str) -> None:
    """Pages, raggedness, packed words: against numpy written by hand."""
    a, want = REFERENCES[name](np.random.default_rng(6))
    got = run(lower(mapped(load(name))), a, {"T": 64} if name == "paged_decode" else {})
    for out in want:
        assert same(got[out], want[out], 1e-3, 1e-3), out


# a failure is reported as found: shrinking it would compile hundreds of kernels
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate))
@given(programs(), st.integers(0, 99), st.sampled_from(FORMS))
def test_any_program(program: Any, seed: int, form: Any) -> None:
    assert equal(program, arrays(program, seed), lambda *x: run(*x, form))


# -- stored formats, layouts, arguments --------------------------------------------------------------------------------

COPY = """
program copy
rank N
rank E = 5
in X[N, E]: {0}
out Y[N, E]: {0}
out Z[N, E]: {1}
Y[n, e] = X[n, e]
Z[n, e] = X[n, e]
"""


def special(dtype: Any, n: int) -> Any:
    """Values of a format that rounding, sign and padding bytes could spoil."""
    if dtype == torch.bool:
        return torch.arange(n * 5).reshape(n, 5) % 3 == 0
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        x = torch.arange(n * 5).reshape(n, 5) * 7 - 50
        x[0, :2] = torch.tensor([info.min, info.max])
        return x.clamp(info.min, info.max).to(dtype)
    x = torch.randn(n, 5, dtype=torch.float64) * 10
    x[0] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1e-7])
    return x.to(dtype)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("name", sorted(TORCH))
def test_every_stored_format_survives(name: str, form: Any) -> None:
    wide = "f64" if name == "f64" else "f32" if TORCH[name].is_floating_point else "i64"
    tp = lower(mapped(parse(COPY.format(name, wide))))
    f = build(emit(tp, form))
    for n in (1, 16, 37):
        x = special(TORCH[name], n)
        y, z = torch.empty_like(x), torch.empty(n, 5, dtype=TORCH[wide])
        f(x, y, z, n)
        assert torch.equal(y.double().nan_to_num(7.5), x.double().nan_to_num(7.5))
        assert torch.equal(z.double().nan_to_num(7.5), x.to(TORCH[wide]).double().nan_to_num(7.5))


ACROSS = """
tiles across on cpu
param X[N, 16]: {0} in
param Y[N, 16]: {0} out
param Z[16, N]: {0} out
sizes N
kernel across_g0
  grid n1: ceil(N/32)
  dim n[32] count min(N - n1*32, 32) start n1*32
  dim e[16] count 16 start 0
  tile x[e, n]: {1}
  load x = X[n1*32 + n, e]
  store Y[n1*32 + n, e] = x
  store Z[e, n1*32 + n] = x
"""


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("name", sorted(TORCH))
def test_every_stored_format_is_turned_in_registers(name: str, form: Any) -> None:
    """Tiles that lie across memory, in squares and at their edges."""
    kind = name if name in ("f64", "bool") else "f32" if TORCH[name].is_floating_point else "i64"
    kernel = emit(parse_tile(ACROSS.format(name, kind)), form)
    assert kernel.source.count("put_turned(") == kernel.source.count("store_turned(") == 1
    f = build(kernel)
    for n in (1, 16, 37, 64):
        x = special(TORCH[name], 16 * n)[:, :1].reshape(n, 16)
        x[-1, -5:] = special(TORCH[name], 1)
        y, z = torch.zeros_like(x), torch.zeros(16, n, dtype=x.dtype)
        f(x, y, z, n)
        for got in (y, z.T):
            assert torch.equal(got.double().nan_to_num(7.5), x.double().nan_to_num(7.5)), n


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_results_are_rounded_to_nearest_even(name: str) -> None:
    tp = lower(mapped(parse(f"program p\nrank N\nin X[N]: f32\nout Y[N]: {name}\nY[n] = X[n] * 1.0\n")))
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 2**-25, 1.5 * 2**-24]
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-9, 9, (1000,)), torch.tensor(ties)])
    y = torch.empty(len(x), dtype=TORCH[name])
    build(emit(tp, "cpu"))(x, y, len(x))
    assert torch.equal(y, x.to(TORCH[name]))


def test_formats_without_a_form_are_refused() -> None:
    tp = lower(mapped(parse("program p\nrank N\nin X[N]: e4m3\nout Y[N]: f32\nY[n] = X[n] * 1.0\n")))
    with pytest.raises(Refusal, match="e4m3"):
        emit(tp, "cpu")


@cache
def causal() -> Any:
    return build(emit(lower(mapped(load("onepass_causal_gqa"), 1)), "cpu"))


def attention(dtype: Any = torch.float32) -> tuple[Any, list[Any], list[int]]:
    """The causal kernel, its tensors q, k, v, o, its sizes."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 33, 8, generator=rng).to(dtype)
    k, v = (torch.randn(2, 2, 50, 8, generator=rng).to(dtype) for _ in range(2))
    o = torch.empty(2, 6, 33, 8, dtype=dtype)
    return causal(), [q, k, v, o], [2, 2, 33, 50]


def moved(x: Any, order: list[int]) -> Any:
    """The same values with the dims of memory in another order."""
    back = [order.index(k) for k in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def test_any_layout_gives_the_same() -> None:
    f, (q, k, v, o), sizes = attention()
    f(q, k, v, o, *sizes)
    want = o.clone()
    room = torch.empty(2 * 6 * 33 * 8 + 1)
    layouts: dict[str, Any] = {
        "heads inside": lambda x: moved(x, [0, 2, 1, 3]),
        "last dim outermost": lambda x: moved(x, [3, 0, 1, 2]),
        "keys innermost": lambda x: moved(x, [0, 1, 3, 2]),
        "every other": lambda x: torch.stack([x, x], -1)[..., 0],
        "part of a larger tensor": lambda x: torch.cat([x, x, x], 3)[..., 8:16],
        "one element off": lambda x: room.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    }
    for name, change in layouts.items():
        args = [change(x) for x in (q, k, v)] + [change(torch.full_like(o, 7.0))]
        f(*args, *sizes)
        assert torch.equal(args[3], want), name
    one = k[:, :1, :, :].expand(2, 2, 50, 8)
    f(q, one, v, o, *sizes)
    again = torch.empty_like(o)
    f(q, one.contiguous(), v, again, *sizes)
    assert torch.equal(o, again)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_misaligned_short_floats(dtype: str) -> None:
    _, (q, k, v, o), sizes = attention(TORCH[dtype])
    tp = lower(mapped(load("onepass_causal_gqa"), 1))
    f = build(emit(replace(tp, params=tuple(replace(p, dtype=dtype) for p in tp.params)), "cpu"))
    f(q, k, v, o, *sizes)
    args = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v, o)]
    f(*args, *sizes)
    assert torch.equal(args[3], o)
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    want = sdpa(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True, scale=0.125)
    assert (o.double() - want).abs().max() < 2e-2


def test_wrong_arguments_are_errors() -> None:
    f, (q, k, v, o), sizes = attention()
    with pytest.raises(TypeError, match="K"):
        f(q, k.double(), v, o, *sizes)
    with pytest.raises(ValueError, match="K"):
        f(q, k[:, :, :-1], v, o, *sizes)
    with pytest.raises((TypeError, ValueError)):
        f(q, k, v, *sizes)


def test_nan_spreads_and_nothing_else_does() -> None:
    f, (q, k, v, o), sizes = attention()
    f(q, k, v, o, *sizes)
    want = o.clone()
    q[1, 3, 20, 2] = float("nan")
    f(q, k, v, o, *sizes)
    assert o[1, 3, 20].isnan().all()
    want[1, 3, 20] = o[1, 3, 20] = 0
    assert torch.equal(o, want)


# -- elementary functions ----------------------------------------------------------------------------------------------

ULPS = {"exp": 2, "exp2": 2, "log": 1, "log2": 2, "log1p": 2, "expm1": 2, "tanh": 3, "sigmoid": 3, "erf": 2,
        "sqrt": 0.51, "xlogx": 2}
EXACT = {"exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2, "log1p": torch.log1p,
         "expm1": torch.expm1, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf, "sqrt": torch.sqrt,
         "xlogx": lambda x: torch.xlogy(x, x)}


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_functions_over_the_whole_range(form: Any) -> None:
    """Every 5,003rd float32, all small and huge ones, both signs, against float64."""
    outs = "".join(f"out Y_{n}[N]: f32\n" for n in ULPS) + "".join(f"Y_{n}[n] = {n}(X[n])\n" for n in ULPS)
    f = build(emit(lower(mapped(parse(f"program p\nrank N\nin X[N]: f32\n{outs}"))), form))
    bits = np.concatenate([np.arange(0, 0x7F800000, 5003), np.arange(500), 0x7F7FFFFF - np.arange(500)])
    both = np.concatenate([bits, bits | 1 << 31]).astype(np.uint32)
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    x = torch.cat([torch.from_numpy(both.view(np.float32)), edges])
    got = {n: torch.empty_like(x) for n in ULPS}
    f(x, *got.values(), len(x))
    for name, y in got.items():
        want = EXACT[name](x.double())
        rounded = want.float()
        assert torch.equal(y.isnan(), rounded.isnan()) and torch.equal(y.isinf(), rounded.isinf()), name
        assert torch.equal(y[y.isinf()], rounded[y.isinf()]), name
        finite = rounded.isfinite()
        ulp = torch.from_numpy(np.spacing(rounded[finite].abs().clamp(1e-45, 3e38).numpy())).double()
        error = ((y[finite].double() - want[finite]).abs() / ulp).max().item()
        assert error <= ULPS[name], (name, error)


@pytest.mark.parametrize("form", FORMS)
def test_far_data_are_beyond_every_point(form: Any) -> None:
    """They are compared with the lanes of a vector as 32 bits, in tiles beside the first too."""
    p, a, sizes = far_data()
    want, got = interpret(p, a, sizes), run(lower(mapped(p)), a, sizes, form)
    for out in want:
        assert same(got[out], want[out], 1e-5, 1e-5), out


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("text, by, joined", [
    ("X[n] * 0.125 / 20.0", 0.125 / 20.0, True), ("X[n] / 3.0", 1 / 3.0, True), ("X[n] / 64.0", 1 / 64.0, True),
    ("7.0 * (X[n] * 3.0) / 11.0", 21.0 / 11.0, True), ("X[n] / 1e-30 * 1e-30", 1.0, True),
    ("X[n] * 1e30 / 1e-6", 1e36, False)])
def test_numbers_that_multiply_and_divide_become_one(text: str, by: float, joined: bool, form: Any) -> None:
    """No division by a number is left, and the result errs by its own rounding and that of the number."""
    tp = lower(mapped(parse(f"program p\nrank N\nin X[N]: f32\nout Y[N]: f32\nY[n] = {text}\n")))
    kernel = emit(tp, form)
    assert (" / " in kernel.source) != joined
    x = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    y = torch.empty_like(x)
    build(kernel)(x, y, len(x))
    want = x.double() * by
    ulp = torch.from_numpy(np.spacing(want.float().abs().numpy())).double()
    assert ((y.double() - want).abs() / ulp).max() <= (1.5 if joined else 2.5)


def test_library_functions_and_bits() -> None:
    text = """
program p
rank N
in X[N]: f32
in I[N]: i64
out Y[N]: f32
out Z[N]: i64
A[n] = sin(X[n]) + cos(X[n]) + pow(abs(X[n]) + 1.0, 1.5) + floor(X[n]) + round(X[n])
Y[n] = A[n] + relu(X[n]) + rsqrt(X[n]*X[n] + 1.0) + recip(X[n]*X[n] + 1.0) + max(X[n], 0.5) - min(X[n], -0.5)
Z[n] = I[n]//3 + I[n]%5 + ceildiv(I[n], 7) + (I[n] >> 2) + (I[n] << 1) + (I[n] & 12) + (I[n] | 3) + int(X[n])
"""
    closed = mapped(parse(text))
    rng = np.random.default_rng(3)
    a = {"X": rng.normal(size=150) * 4, "I": rng.integers(-100, 100, 150)}
    a["X"] = a["X"].astype(np.float32).astype(np.float64)
    got, want = run(lower(closed), a, {}), interpret(closed, a)
    assert same(got["Y"], want["Y"], 1e-5, 1e-5)
    assert np.array_equal(got["Z"], want["Z"])


# -- threads -----------------------------------------------------------------------------------------------------------


def test_thread_counts_are_obeyed_and_change_nothing() -> None:
    f, (q, k, v, o), sizes = attention()
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            f(q, k, v, o, *sizes)
            results.append(o.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_python_threads_share_a_kernel() -> None:
    f, (q, k, v, o), sizes = attention()
    f(q, k, v, o, *sizes)
    want = o.clone()
    wrong: list[int] = []

    def work(n: int) -> None:
        mine = torch.empty_like(o)
        for _ in range(30):
            f(q, k, v, mine, *sizes)
            if not torch.equal(mine, want):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


SCRIPT = """
import os, sys, torch
from memcomp.codegen.lower import lower
from memcomp.codegen.tvm import build, emit
from memcomp.codegen import threads
from tests.mapped import load, mapped
{patch}
torch.set_num_threads(2)
f = build(emit(lower(mapped(load("onepass_causal_gqa"), 1)), "cpu"))
q, k, v = torch.randn(2, 6, 33, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
o = torch.empty_like(q)
f(q, k, v, o, 2, 2, 33, 50)
want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.125)
assert (o - want).abs().max() < 1e-5
{then}
"""
FORK = """
child = os.fork()
if child == 0:
    p = torch.zeros_like(q)
    f(q, k, v, p, 2, 2, 33, 50)
    os._exit(0 if torch.equal(o, p) else 3)
assert os.waitpid(child, 0)[1] == 0
f(q, k, v, o, 2, 2, 33, 50)
"""


@pytest.mark.parametrize(("patch", "then"), [("os.environ['PATH'] = ''", FORK),
                                             ("threads._loaded = lambda stem: None", "")],
                         ids=["after fork and without a compiler", "without OpenMP"])
def test_in_a_process_of_its_own(patch: str, then: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(patch=patch, then=then)], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- the text and its cost ---------------------------------------------------------------------------------------------


def test_text_is_deterministic_and_compiles_soon() -> None:
    tp = lower(mapped(load("onepass_causal_gqa"), 2))
    assert emit(tp, AVX2) == emit(tp, AVX2) and emit(tp, AVX2).source != emit(tp, SSE).source
    build(emit(tp, "cpu"))  # imports and the launcher are paid once
    start = time.process_time()
    build(emit(tp, "cpu"))
    assert time.process_time() - start < 3.0


def test_scores_are_walked_twice_a_block() -> None:
    """Scale, mask and maximum in one walk, exponential and sum in another; the products walk them too."""
    source = emit(lower(mapped(load("onepass_causal_gqa"), 2)), AVX2).source
    assert source.count("exp(") == 2 and source.count("for m0") <= 4


def test_a_call_costs_microseconds() -> None:
    tp = lower(mapped(parse(COPY.format("f32", "f32"))))
    f = build(emit(tp, "cpu"))
    x, y, z = torch.randn(1, 5), torch.empty(1, 5), torch.empty(1, 5)
    best = min(timeit.repeat(lambda: f(x, y, z, 1), number=50, repeat=20)) / 50
    assert best < 50e-6


EQUAL = """
program equal
rank H
rank P
rank M
in A[H, M, P]: f32
out S[H, P]: f32
S[h, p] = sum{m} abs(A[h, m, p])
"""


@pytest.mark.parametrize("m", [15, 64, 100, 301])
def test_roundings_of_one_sign_do_not_add_up_within_a_tile(m: int) -> None:
    """Equal terms, one after the other, round to the same side: a tile of them would lose a dozen last places."""
    row = np.random.default_rng(0).random(200).astype(np.float32) + np.float32(0.5)
    a = np.broadcast_to(row, (2, m, 200)).copy()
    got = run(lower(mapped(parse(EQUAL))), {"A": a}, {})["S"]
    assert np.abs(got / (m * row.astype(np.float64)) - 1).max() < 8 * 2.0**-24
