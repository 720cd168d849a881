"""Decode over keys and values of 8, 4 and 2 bits in the TVM backend: codes stay in words until they are multiplied."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.codegen.tvm.emit import emit
from memcomp.codegen.tvm.isa import AVX2, AVX512_BF16, EMULATED_LANES, Isa
from memcomp.config import Config
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.tile import Kernel
from memcomp.pipeline import map_program
from tests.mapped import arguments, same, stored_and_back

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")
from memcomp.models.bench._kv import BLOCK, cached, decode  # noqa: E402

Case = tuple[int, int, int, bool, bool]  # bits, query heads of a cache, width, keys by channel, numbers adjacent
INT8: Case = (8, 4, 64, False, False)
KIVI4: Case = (4, 4, 64, True, False)
NEAR4: Case = (4, 3, 64, True, True)
KIVI2: Case = (2, 3, 64, True, False)
ALONE: Case = (4, 1, 64, True, True)  # one head: nothing is rounded


@cache
def closed(case: Case) -> Program:
    bits, group, dim, by_channel, adjacent = case
    text = decode(bits, group, dim, by_channel=by_channel, adjacent=adjacent)
    return map_program(parse(text), config=Config(target="cpu", backend="tvm"), sizes={"J": 8, "B": 1024})


@cache
def kernel(case: Case, isa: Isa) -> Kernel:
    return emit(lower(closed(case)), isa)


def values(case: Case, blocks: int) -> dict[str, Any]:
    bits, group, dim, by_channel, adjacent = case
    given, _, _ = cached(bits, 2, BLOCK * blocks, dim, by_channel=by_channel, adjacent=adjacent)
    a = {n: (x.double() if x.is_floating_point() else x).numpy() for n, x in given.items()}
    return stored_and_back(closed(case), {**a, "Q": np.random.default_rng(0).normal(size=(2, group, dim))})


@pytest.mark.parametrize(("case", "isa"), [
    (INT8, EMULATED_LANES), (NEAR4, EMULATED_LANES), (KIVI4, AVX2),
    *(pytest.param(case, isa, marks=pytest.mark.slow) for case, isa in (
        (KIVI4, EMULATED_LANES), (KIVI2, EMULATED_LANES), (ALONE, EMULATED_LANES), (INT8, AVX2), (NEAR4, AVX2),
        (KIVI2, AVX2), (ALONE, AVX2)))])
def test_decode_equals_the_program(case: Case, isa: Isa) -> None:
    from memcomp.codegen.tvm.build import build

    tp, a = lower(closed(case)), values(case, 11)
    args, known = arguments(tp, a, {})
    build(kernel(case, isa))(*args, *known)
    got = args[[p.name for p in tp.params].index("O")].double().numpy()
    want = interpret(closed(case), a)["O"]
    assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)
    assert same(got, want, 2e-2, 2e-2 * np.abs(want).max())


@pytest.mark.parametrize("case", [INT8, KIVI4, NEAR4, KIVI2])
def test_nothing_decoded_is_stored(case: Case) -> None:
    """The words are read where they lie, both products run on pairs, and no tile has keys or values one by one."""
    bits, _, dim, *_ = case
    source = kernel(case, AVX512_BF16).source
    assert len(re.findall(r"field_pairs\([KV]\[", source)) == 2 * (16 // bits)  # a pair of each word, for K and for V
    shapes = re.findall(r"T.alloc_buffer\(\(([^)]*)\)", source)
    buffers = [tuple(map(int, re.findall(r"\d+", shape))) for shape in shapes]
    assert all(not {BLOCK, dim} <= set(shape) for shape in buffers if len(shape) > 2)
    assert bool(re.search("reordered", source)) == case[4]


def test_one_head_rounds_nothing() -> None:
    source = kernel(ALONE, AVX512_BF16).source
    assert "field_pairs" not in source and "field(K[" in source and "field(V[" in source


def test_what_a_pair_is_too_much_is_taken_off() -> None:
    """Without it every sum is off by a multiple of the sum of the other side's numbers."""
    from memcomp.codegen.tvm.build import build

    made = kernel(NEAR4, EMULATED_LANES)
    wrong = replace(made, source=re.sub(r"f32\(0\.0\) - across\('sum', owed\d+\[at\(16\)\]\)", "f32(0.0)", made.source))
    assert wrong.source != made.source
    tp, a = lower(closed(NEAR4)), values(NEAR4, 3)
    args, known = arguments(tp, a, {})
    build(wrong)(*args, *known)
    got = args[[p.name for p in tp.params].index("O")].double().numpy()
    want = interpret(closed(NEAR4), a)["O"]
    assert np.linalg.norm(got - want) > 0.1 * np.linalg.norm(want)
