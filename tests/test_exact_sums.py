"""Running sums over a thousand tiles are as exact as one tile; attention's matrix of sums does not pay for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.codegen.python import build, emit
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile import Loop, Tile, TileProgram, When
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.models.families.reductions import FAMILIES
from memcomp.passes.reduce_passes import reduce_passes
from tests.families import right
from tests.mapped import load, mapped

PRODUCT = """
program product
rank P
rank X = 24
rank M
in A[P, M]: f32
in B[X, M]: f32
out O[P, X]: f32
O[p, x] = sum{m} A[p, m] * B[x, m]
"""
VARIANCE = """
program variance
rank P
rank M
in A[P, M]: f32
out V[P]: f32
S[p] = sum{m} A[p, m]
V[p] = sum{m} (A[p, m] - S[p] / 20000.0) * (A[p, m] - S[p] / 20000.0)
"""


def tiles(tp: TileProgram, dtype: str) -> list[Tile]:
    return [t for k in tp.kernels for t in k.tiles if t.dtype == dtype]


def run(tp: TileProgram, a: dict[str, Any], shape: tuple[int, ...], m: int) -> Any:
    got = np.zeros(shape, np.float32)
    sizes = {"P": shape[0], "M": m}
    build(emit(tp))(*a.values(), got, *(sizes[s] for s in tp.sizes))
    return got


def test_numbers_a_row_are_doubles_and_references_are_not() -> None:
    tp = lower(mapped(reduce_passes(parse(VARIANCE))))
    wide = [t for t in tiles(tp, "f64") if len(t.dims) > 1]
    assert tiles(tp, "f64") and not wide, tp
    rng = np.random.default_rng(0)
    a = {"A": (rng.standard_normal((3, 20000)) + 3).astype(np.float32)}
    exact = interpret(parse(VARIANCE), a)["V"]
    for got in (run(tp, a, (3,), 20000), interpret_tile(tp, a, dtype=np.float32)["V"]):
        assert np.abs(got / exact - 1).max() < 2.0**-22


def test_attention_keeps_its_matrix_in_single_precision() -> None:
    tp = lower(mapped(load("onepass_causal_gqa")))
    assert all(len(t.dims) < 2 for t in tiles(tp, "f64")), tp


def test_a_matrix_that_is_only_added_to_goes_into_doubles_now_and_then() -> None:
    tp = lower(mapped(parse(PRODUCT)))
    (loop,) = (s for s in tp.kernels[0].body if isinstance(s, Loop))
    assert {t.dims for t in tiles(tp, "f64")} == {("p0", "x")} and isinstance(loop.body[-1], When), tp
    for m in (1, 64 * 16, 64 * 16 + 1, 20000):  # within the first steps, at the end of them, and past it
        rng = np.random.default_rng(m)
        a = {n: (rng.standard_normal(shape) + 1).astype(np.float32) for n, shape in (("A", (5, m)), ("B", (24, m)))}
        exact = a["A"].astype(np.float64) @ a["B"].astype(np.float64).T
        size = np.abs(a["A"]).astype(np.float64) @ np.abs(a["B"]).astype(np.float64).T
        for got in (run(tp, a, (5, 24), m), interpret_tile(tp, a, dtype=np.float32)["O"]):
            assert (np.abs(got - exact) / size).max() < 2.0**-22


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "group_norm", "l2_norm"])
def test_many_rows_of_a_long_product(name: str) -> None:
    """The sums are a matrix here, and go into doubles every few steps."""
    import torch

    (family,) = (f for f in FAMILIES if f.name == name)
    with torch.no_grad():
        right(family, family.inputs(40, 65536, torch.float32))
