"""The TVM backend: every program it lowers computes what the program says, on any layout, dtype and thread count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from memcomp.ir.tile_interpret import solve_sizes
from tests.mapped import CHAINS, ONEPASS, extent, inputs, load, mapped, same, symbols
from tests.programs import arrays, programs
from tests.references import CASES as REFERENCES

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm.isa import AVX2, AVX512, SSE, isa  # noqa: E402

TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
         "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}
FORMS = [f for f in (SSE, AVX2, AVX512) if f.lanes <= isa("cpu").lanes]


def arguments(tp: TileProgram, arrays: dict[str, Any], sizes: dict[str, int]) -> tuple[list[Any], list[int]]:
    """Torch tensors for every param; what the kernel must write holds rubbish."""
    known = solve_sizes(tp, {n: np.shape(a) for n, a in arrays.items()}, sizes)
    args = []
    for p in tp.params:
        if p.name in arrays:
            args.append(torch.from_numpy(np.array(arrays[p.name])).to(TORCH[p.dtype]))
        else:
            args.append(torch.full(tuple(extent(n, known) for n in p.shape), 77).to(TORCH[p.dtype]))
    return args, list(known.values())


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


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.integers(0, 99), st.sampled_from(FORMS))
def test_any_program(program: Any, seed: int, form: Any) -> None:
    given_ = arrays(program, seed)
    sizes = {r: n for t in program.cascade.inputs() for r, n in zip(t.ranks, given_[t.name].shape, strict=True)}
    sizes = {r: n for r, n in sizes.items() if program.cascade.rank(r).extent is None}
    try:
        p = mapped(program)
        tp = lower(p)
    except Refusal:
        return
    want, got = interpret(p, given_, sizes), run(tp, given_, sizes, form)
    for name in want:
        assert same(got[name], want[name], 2e-3, 2e-3), name
