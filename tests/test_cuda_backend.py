"""The CUDA C++ backend: on a model of a block, on the CPU, every program it takes computes what the program says; its
text compiles for four architectures, without a stack for spilled registers, and is stable."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memcomp.codegen.cuda import emit, interpreted, launches
from memcomp.codegen.cuda.compile import compile_text, compilers
from memcomp.codegen.cuda.emit import writers
from memcomp.codegen.cuda.host import COMPILERS, Form, compiled
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.target import target as named
from memcomp.ir.text import parse
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.pipeline import map_program
from tests.mapped import CHAINS, ONEPASS, arguments, equal, inputs, load, mapped, same, symbols
from tests.programs import arrays, programs
from tests.references import CASES as REFERENCES

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parent / "golden"
on_host = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler: kernels cannot run here")
to_cubin = pytest.mark.skipif(not compilers(), reason="neither NVRTC nor nvcc is here")


def run(tp: TileProgram, given_: dict[str, Any], sizes: dict[str, int], kernel: Any = None) -> dict[str, Any]:
    args, known = arguments(tp, given_, sizes)
    (kernel or interpreted(emit(tp, "h100")))(*args, *known)
    return {p.name: x.double().numpy() for p, x in zip(tp.params, args, strict=True) if p.role in ("out", "state")}


# -- meaning -----------------------------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize("name", ONEPASS + CHAINS)
def test_kernels_equal_the_program(name: str) -> None:
    p, rng = load(name), np.random.default_rng(4)
    closed = mapped(p, len(name) % 2 if name in ONEPASS and name != "onepass_mla" else 0)  # the others are too large
    tp = lower(closed)
    kernel = interpreted(emit(tp, "h100"))
    # strides that are multiples of 4 and strides that are not: two texts
    for m, n in ((9, 7), (0, 3), (41, 5)) if len(name) % 3 else ((8, 4), (0, 12), (40, 16)):
        sizes = {s: m if s == "M" else n if s == "P" else 2 for s in symbols(p)}
        a = inputs(p, sizes, rng)
        want, got = interpret(closed, a, sizes), run(tp, a, sizes, kernel)
        for out in want:
            assert same(got[out], want[out], 2e-4, 2e-4), (out, sizes)


@on_host
@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"delta_rule", *CHAINS}))
def test_kernels_equal_the_reference(name: str) -> None:
    a, want = REFERENCES[name](np.random.default_rng(6))
    got = run(lower(mapped(load(name))), a, {"T": 64} if name == "paged_decode" else {})
    for out in want:
        assert same(got[out], want[out], 1e-3, 1e-3), out


@on_host
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate))
@given(programs(), st.integers(0, 99))
def test_any_program(program: Any, seed: int) -> None:
    assert equal(program, arrays(program, seed), run, lambda tp: emit(tp, "h100"))


@on_host
def test_functions_are_as_exact_as_f32() -> None:
    names = ("tanh", "expm1", "log1p", "round", "xlogx", "sigmoid", "exp", "exp2", "erf", "sin")
    lines = [f"{n.upper()}[n] = {n}({'abs(X[n])' if n in ('log1p', 'xlogx') else 'X[n]'})" for n in names]
    text = "\n".join(["program p", "rank N", "in X[N]: f32", *(f"out {n.upper()}[N]: f32" for n in names), *lines])
    small = np.ldexp(1.0, -np.arange(30)) * np.array([[1.0], [-1.0], [1.37]])
    x = np.concatenate([np.linspace(-20, 20, 201), small.ravel(), np.arange(-6, 6) + 0.5]).astype(np.float32)
    closed = mapped(parse(text))
    got, want = run(lower(closed), {"X": x}, {}), interpret(closed, {"X": x.astype(np.float64)})
    for name in want:
        unit = np.spacing(np.abs(want[name]).astype(np.float32))
        assert np.all(np.abs(got[name] - want[name]) <= 8 * unit), name


@on_host
def test_what_is_rounded_is_computed_before_as_wide_as_it_is() -> None:
    text = """
program p
rank N
in X[N]: f64
in I[N]: i64
out A[N]: f64
out B[N]: f64
A[n] = as_f32(X[n] * X[n])
B[n] = as_f32(I[n] + I[n])
"""
    closed, rng = mapped(parse(text)), np.random.default_rng(0)
    given = {"X": rng.normal(size=200), "I": rng.integers(-2**31, 2**31, 200)}
    got, want = run(lower(closed), given, {}), interpret(closed, given)
    assert all((got[n] == want[n]).all() for n in want)


@on_host
def test_integers_round_down_and_wrap_as_the_program_says() -> None:
    text = """
program p
rank N
in I[N]: i64
in W[N]: i32
out Z[N]: i64
out Y[N]: i64
Z[n] = I[n]//3 + I[n]%5 + ceildiv(I[n], 7) + (I[n] >> 2) + (I[n] << 1) + (I[n] & 12) + (I[n] | 3)
Y[n] = ((W[n] >> (n % 8 * 4)) & 15) + W[n]*W[n]
"""
    closed = mapped(parse(text))
    rng = np.random.default_rng(0)
    a = {"I": np.arange(-70, 70), "W": rng.integers(-2**31, 2**31, 140)}
    got, want = run(lower(closed), {n: x.astype(np.int32 if n == "W" else np.int64) for n, x in a.items()}, {}), None
    want = interpret(closed, a)
    assert all(np.array_equal(got[n], np.asarray(want[n], np.float64)) for n in want)


BAG = """
program bag
rank T
rank L
rank N
rank D
in I[T, L]: i64
in W[N, D]: {}
out O[T, D]: {}
O[t, d] = sum{{l}} W[I[t, l], d]
"""


def bag(dtype: str) -> Program:
    return map_program(parse(BAG.format(dtype, dtype)), config=Config(target="h100"),
                       sizes={"T": 1024, "L": 64, "N": 100000, "D": 100})


@on_host
def test_sums_of_gathered_rows_of_any_width() -> None:
    """Rows that begin at multiples of 16 bytes and rows that do not, whole vectors and the ends of rows."""
    p = bag("f32")
    tp, rng = lower(p), np.random.default_rng(0)
    kernel = interpreted(emit(tp, "h100"))
    for width, bags in ((100, 37), (7, 5), (300, 130), (1, 1), (64, 0)):
        a = {"I": rng.integers(0, 50, (3, bags)), "W": rng.normal(size=(50, width))}
        assert same(run(tp, a, {}, kernel)["O"], interpret(p, a)["O"], 1e-5, 1e-5), width


@on_host
def test_no_16_bytes_beyond_the_end_of_a_row_are_read() -> None:
    """bf16 beside f32: a thread holds 8 neighbours, which are two vectors of f32, and the second may not be there."""
    text = """
program p
rank N
rank D
in X[N, D]: bf16
in W[N, D]: f32
out Y[N]: f32
Y[n] = sum{d} X[n, d] * W[n, d]
"""
    p = map_program(parse(text), config=Config(target="h100"), sizes={"N": 1024, "D": 1000})
    tp, rng = lower(p), np.random.default_rng(0)
    kernel = emit(tp, "h100")
    assert re.search(r"(ask<32|fetch<8).*W_ptr.*, \(?d0_n - ", own(kernel))
    x, w = torch.from_numpy(rng.normal(size=(3, 24))).bfloat16()[:, :20], torch.from_numpy(rng.normal(size=(3, 20)))
    args, known = arguments(tp, {"X": x.double().numpy(), "W": w.numpy()}, {})
    args[0] = x   # rows of 20, and their beginnings 24 apart
    interpreted(kernel)(*args, *known)
    want = interpret(p, {"X": x.double().numpy(), "W": w.numpy()})
    assert same(args[-1].double().numpy(), want["Y"], 1e-4, 1e-4)


@on_host
@pytest.mark.parametrize("group", [3])
def test_decode_from_torch(group: int) -> None:
    def decode(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 2 * group, 1, 64).bfloat16(), torch.randn(2, 1, 2, 300, 64).bfloat16()
    exact = decode(q.double(), k.double(), v.double())
    torch._dynamo.reset()
    options = {"target": "h100", "backend": "cuda", "interpret": True, "strict": True}
    got = torch.compile(decode, backend="memcomp", options=options)(q, k, v)
    error, own = ((x.double() - exact).norm() / exact.norm() for x in (got, decode(q, k, v)))
    assert error <= 1.5 * own + 1e-7, (error, own)


@on_host
def test_any_strides() -> None:
    p = load("onepass_decode_gqa")
    closed, rng = mapped(p), np.random.default_rng(1)
    tp, sizes = lower(closed), {"B": 2, "J": 2, "M": 19}
    a = inputs(p, sizes, rng)
    args, known = arguments(tp, a, sizes)
    shifted = []
    for x in args:
        room = torch.zeros(x.numel() * 2 + 1)[1:].view(*x.shape, 2)   # every second element, from an odd place
        room[..., 0] = x
        shifted.append(room[..., 0])
    interpreted(emit(tp, "h100"))(*shifted, *known)
    assert same(shifted[-1].double().numpy(), interpret(closed, a, sizes)["O"], 2e-4, 2e-4)


@on_host
def test_threads_that_wait_at_different_places_are_an_error() -> None:
    tp = lower(mapped(load("layer_norm")))
    source, given_ = emit(tp, "h100").source, launches(tp, "h100")
    assert "combine<" in source
    part = source.replace("  combine<Sum", "  if (threadIdx.x & 1) combine<Sum", 1)
    library, x = compiled(part, given_), torch.zeros(4, 6)
    places = [x.data_ptr() if a.kind == "pointer" else 6 if a.kind == "stride" else 4 for a in given_[0].args]
    args = [ctypes.c_void_p(n) if a.kind == "pointer" else ctypes.c_int(n)
            for n, a in zip(places, given_[0].args, strict=True)]
    assert library.run_layer_norm_g0(ctypes.c_longlong(1), *args) == 1


# -- the text ----------------------------------------------------------------------------------------------------------

SCALED = """
program p
rank N
rank D
in X[N, D]: f32
out Y[N, D]: f32
Y[n, d] = X[n, d] * 2.0
group g0: Y
  space N, D
"""

DECODE = """
program decode
rank J
rank G = 4
rank M
rank E = 128
rank F = 128
in Q[J, G, E]: bf16
in K[J, M, E]: bf16
in V[J, M, F]: bf16
out O[J, G, F]: bf16
S[j, g, m] = sum{e} Q[j, g, e] * K[j, m, e]
GM[j, g] = max{m} S[j, g, m] * 0.125
W[j, g, m] = exp(S[j, g, m] * 0.125 - GM[j, g])
D[j, g] = sum{m} W[j, g, m]
N[j, g, f] = sum{m} W[j, g, m] * V[j, m, f]
O[j, g, f] = N[j, g, f] / D[j, g]
"""


def decode() -> TileProgram:
    p = map_program(parse(DECODE), config=Config(target="h100", backend="cuda"), sizes={"J": 512, "M": 8192})
    return lower(p)


def gathered() -> TileProgram:
    return lower(bag("f32"))


def own(kernel: Kernel) -> str:
    """Without what every text begins with."""
    return kernel.source[kernel.source.index('extern "C"'):]


@pytest.mark.parametrize(("name", "make"), [("decode", decode), ("bag", gathered)])
def test_text_is_stable(name: str, make: Any) -> None:
    """GOLDEN=write rewrites the files; read the difference before it is kept."""
    text, file = own(emit(make(), "h100")), GOLDEN / f"cuda_{name}.cu"
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
    assert text == own(emit(make(), "h100"))


def test_a_loop_that_adds_up_joins_its_sums_after_its_last_step() -> None:
    text = own(emit(gathered(), "h100"))
    assert text.count("combine<Sum") == 1 and text.rindex("for (int l1") < text.index("combine<Sum")
    inside = own(emit(decode(), "h100")).split("for (int m1 = ")[1].split("for (int m1 = ")[0]
    assert inside.count("combine<Max") == 1 and inside.count("combine<Sum") == 1   # scores; not the two running sums


def test_tasks_with_nothing_to_share_out_have_a_thread_each() -> None:
    tp = lower(parse(SCALED))
    text, launch = own(emit(tp, "h100")), launches(tp, "h100")[0]
    assert launch.block == 128 and launch.blocks({"N": 10, "D": 100}) == (8, 1, 1)
    assert "combine<" not in text and "1LL * N * D" in text


@on_host
def test_each_of_many_tasks_runs_once() -> None:
    p = parse(SCALED)
    tp = lower(p)
    for n, d in ((10, 100), (1, 1), (128, 2), (0, 5)):
        a = {"X": np.random.default_rng(n).normal(size=(n, d))}
        assert same(run(tp, a, {})["Y"], interpret(p, a)["Y"], 1e-6, 1e-6)


def test_rows_are_read_16_bytes_at_a_time_and_steps_ahead() -> None:
    for text, tiles in ((own(emit(decode(), "h100")), 2), (own(emit(gathered(), "h100")), 1)):
        before, steps, rest = text.split("#pragma unroll 1", 2)
        assert before.count("ask<16") == 0 and steps.count("ask<16") == tiles   # the first steps
        step = rest.split("#pragma unroll 1")[0]
        assert step.count("ask<16") == step.count("take<4") == tiles and step.count("come<") == 1
        assert step.index("ask<16") < step.index("come<") < step.index("take<4")


@on_host
def test_what_nobody_waited_for_is_not_there() -> None:
    """The model of a block brings what is asked for when it is waited for: a text that forgets to wait is wrong."""
    p = load("onepass_decode_static")
    closed, rng = mapped(p), np.random.default_rng(4)
    tp, sizes = lower(closed), {s: 40 if s == "M" else 2 for s in symbols(p)}
    kernel, a = emit(tp, "h100"), inputs(p, sizes, rng)
    assert "come<" in own(kernel)
    want = interpret(closed, a, sizes)
    for source, right in ((kernel.source, True), (re.sub(r"\bcome<\d>\(\);", "", kernel.source), False)):
        args, known = arguments(tp, a, sizes)
        form = Form(source, launches(tp, "h100"))
        form.run({x.name: t for x, t in zip(tp.params, args, strict=True)}, dict(zip(tp.sizes, known, strict=True)))
        got = {x.name: t.double().numpy() for x, t in zip(tp.params, args, strict=True)}
        assert all(same(got[n], want[n], 2e-4, 2e-4) for n in want) == right


@to_cubin
@pytest.mark.parametrize(("make", "target"), [(decode, "a100"), (decode, "rtx4090"), (decode, "h100"), (decode, "b200"),
                                              (gathered, "a100")])
def test_machine_code_needs_no_stack(make: Any, target: str) -> None:
    tp, machine = make(), named(target)
    found = compile_text(emit(tp, machine).source, launches(tp, machine), machine.capability)
    for binary, w in zip(found, writers(tp, machine), strict=True):
        assert binary.resources.stack == 0 and not w.spills, binary
        assert binary.resources.static + binary.shared <= machine.level("smem").bytes + 1024 * (
            machine.capability >= 90)   # the system's, which no limit counts


def test_products_for_tensor_cores_are_refused() -> None:
    with pytest.raises(Refusal, match="64 rows and more, which tensor cores multiply"):
        emit(lower(mapped(load("attention_lse"), 1)), "h100")


def test_formats_that_are_not_read_are_refused() -> None:
    tp = lower(mapped(load("layer_norm")))
    odd = replace(tp, params=(replace(tp.params[0], dtype="e4m3"), *tp.params[1:]))
    with pytest.raises(Refusal, match="stored as e4m3"):
        emit(odd, "h100")
