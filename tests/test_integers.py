"""Integers stay integers: what is reduced to one is exact, however the rank is walked, to the ends of its format."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from memcomp.backends import build, emit
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.errors import VerifyError
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse, show
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.ir.verify import verify
from memcomp.passes.reduce_passes import reduce_passes
from memcomp.pipeline import map_program
from memcomp.stations import observers
from tests.mapped import arguments, mapped

DTYPES = {"i8": np.int8, "u8": np.uint8, "i16": np.int16, "i32": np.int32, "i64": np.int64}
TEXT = """program p
rank P
rank M
rank K = 3
in X[P, M]: {d}
temp T[P, M]: i64
temp G[P]: {d}
out O[P, M]: f32
out Most[P]: {d}
out Least[P]: {d}
out Some[P]: i64
out Bits[P]: i64
out Count[P]: i64
out V[P]: {d}
out I[P]: i64
out B[P, K]: i64
out J[P, K]: i64
T[p, m] = X[p, m] + X[p, m]
G[p] = max{{m}} X[p, m]
S[p, m] = exp(X[p, m] - G[p])
D[p] = sum{{m}} S[p, m]
O[p, m] = S[p, m] / D[p]
Most[p] = max{{m}} X[p, m] where m >= 1
Least[p] = min{{m}} X[p, m]
Some[p] = sum{{m}} X[p, m] where m % 2 == 0
Bits[p] = sum{{m}} (T[p, m] >> 2) * (T[p, m] % 3)
Count[p] = sum{{m}} X[p, m] == Least[p]
V[p], I[p] = argmax{{m}} X[p, m]
B[p, k], J[p, k] = topk{{m}} X[p, m]
"""


def rows(dtype: str, m: int) -> Any:
    """Ordinary rows, rows of the least and greatest of the format, and one of nothing but the least."""
    kind, rng = DTYPES[dtype], np.random.default_rng(m)
    x = rng.integers(0, 9, (5, m)) - (4 if np.iinfo(kind).min else 0)
    least, most = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    if dtype == "i64":  # twice of it is in the text
        least, most = -2**62, 2**62
    x[1, m // 2:] = least
    x[2] = least
    x[3, rng.integers(m, size=m // 3 + 1)] = most
    return x.astype(kind)


def meant(x: Any) -> dict[str, Any]:
    """What numpy computes, in integers of 64 bits."""
    wide = x.astype(np.int64)
    double = wide * 2
    weights = np.exp((wide - wide.max(1, keepdims=True)).astype(np.float64))
    order = np.argsort(-wide, axis=1, kind="stable")[:, :3]
    return {"O": weights / weights.sum(1, keepdims=True), "Most": wide[:, 1:].max(1), "Least": wide.min(1),
            "Some": wide[:, ::2].sum(1), "Bits": ((double >> 2) * (double % 3)).sum(1),
            "Count": (wide == wide.min(1, keepdims=True)).sum(1), "V": wide.max(1), "I": wide.argmax(1),
            "B": np.take_along_axis(wide, order, 1), "J": order}


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name, x in want.items():
        if name == "O":
            np.testing.assert_allclose(got[name], x, 1e-5, 1e-7)
        else:
            np.testing.assert_array_equal(np.asarray(got[name]).astype(np.int64), x, name)


@pytest.mark.parametrize("options", [{}, {"splits": 2}])
@pytest.mark.parametrize("dtype", ["i8", "u8", "i64"])
def test_walked_in_tiles_and_shares(dtype: str, options: dict[str, Any]) -> None:
    p = parse(TEXT.format(d=dtype))
    new = reduce_passes(p, tile=(4,), ranks=("M",), **options)
    verify(new)
    assert "M: 3 -> 2 passes" in " ".join(new.proofs), new.proofs
    for m in (3, 4, 13):
        x = rows(dtype, m)
        same(interpret(p, {"X": x}), meant(x))
        same(interpret(new, {"X": x}), meant(x))


def ran(p: Program, backend: str, x: Any, **options: Any) -> dict[str, Any]:
    config = Config(backend=backend, tune="off", **options)
    tiles, kernel = emit(map_program(p, config=config), config=config, observe=observers(config))
    args, sizes = arguments(tiles, {"X": x}, {})
    build(kernel, config)(*args, *sizes)
    return {t.name: a.numpy() for t, a in zip(tiles.params, args, strict=True) if t.role == "out"}


@pytest.mark.parametrize("backend", ["python", "tvm"])
@pytest.mark.parametrize("dtype", [
    "i8", "i64", *(pytest.param(d, marks=pytest.mark.slow) for d in ("u8", "i16", "i32"))])
def test_kernels_are_exact(dtype: str, backend: str) -> None:
    pytest.importorskip("tvm" if backend == "tvm" else "numpy")
    x = rows(dtype, 37)
    same(ran(parse(TEXT.format(d=dtype)), backend, x), meant(x))


@pytest.mark.parametrize("backend", ["python", "tvm"])
def test_the_least_integer_of_all_has_a_place(backend: str) -> None:
    """It comes after all others, and before nothing at all."""
    pytest.importorskip("tvm" if backend == "tvm" else "numpy")
    p = parse("program p\nrank P\nrank M\nrank K = 3\nin X[P, M]: i64\nout V[P, K]: i64\nout I[P, K]: i64\n"
              "out G[P]: i64\nout A[P]: i64\nout B[P]: i64\nV[p, k], I[p, k] = topk{m} X[p, m]\n"
              "G[p], A[p] = argmax{m} X[p, m]\n"
              "B[p] = max{m} X[p, m]\n")
    x = np.full((3, 70), -2**63)
    x[1, 40], x[2, 5:7] = 2**63 - 1, (-2**63 + 1, 7)
    got = ran(p, backend, x)
    order = np.argsort(-(x.astype(object)), axis=1, kind="stable")[:, :3].astype(np.int64)
    np.testing.assert_array_equal(got["I"], order)
    np.testing.assert_array_equal(got["V"], np.take_along_axis(x, order, 1))
    for name, wanted in (("G", x.max(1)), ("B", x.max(1)), ("A", x.argmax(1))):
        np.testing.assert_array_equal(got[name], wanted, name)


def test_what_runs_from_tile_to_tile_is_an_integer() -> None:
    """Also where it starts from an infinity: f32 has 24 bits."""
    p = parse("program p\nrank P\nrank M\nin X[P, M]: i64\nout A[P]: i64\nout B[P]: i64\n"
              "A[p] = max{m} X[p, m]\nB[p] = min{m} X[p, m] where m >= 1\n")
    x = np.random.default_rng(0).integers(-2**60, 2**60, (3, 1300))
    got = interpret_tile(lower(mapped(p)), {"X": x}, dtype=np.float32)
    same(got, {"A": x.max(1), "B": x[:, 1:].min(1)})


@pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_gpu_s_kernels_do_not_wrap_short_integers(backend: str) -> None:
    """A number of 8 bits that is multiplied, doubled, or kept out of a maximum is one of 64 bits first."""
    pytest.importorskip("triton" if backend == "triton" else "numpy")
    if backend == "cuda" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no C++ compiler: kernels cannot run here")
    p = parse("program p\nrank P\nrank M\nin X[P, M]: i8\nout Bits[P]: i64\nout Twice[P]: i64\nout Most[P]: i8\n"
              "Twice[p] = sum{m} (X[p, m] + X[p, m]) * 100\nMost[p] = max{m} X[p, m] where m >= 1\n"
              "Bits[p] = sum{m} ((X[p, m] + X[p, m]) >> 2) * ((X[p, m] + X[p, m]) % 3)\n")
    x = rows("i8", 37)
    want = meant(x)
    same(ran(p, backend, x, target="h100", interpret=True), {
        "Bits": want["Bits"], "Most": want["Most"], "Twice": 200 * x.astype(np.int64).sum(1)})


def test_what_is_not_declared_is_real_and_the_hint_says_what_to_declare() -> None:
    p = parse("program p\nrank P\nin X[P]: i8\nout O[P]: i64\nT[p] = X[p] + X[p]\nO[p] = T[p] % 7\n")
    with pytest.raises(VerifyError) as caught:
        verify(p)
    assert "'%' needs integers" in str(caught.value) and "declare it: temp T[P]: i64" in str(caught.value)
    verify(parse(show(p).replace("T[p] = ", "temp T[P]: i64\nT[p] = ", 1)))
