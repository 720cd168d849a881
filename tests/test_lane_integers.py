"""Integers over the lanes of a vector: places, distances and what is made of them, and tables that they index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memcomp.ir.tile_interpret import interpret_tile
from memcomp.ir.tile_text import parse_tile
from tests.mapped import same

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm.isa import AVX2, AVX512, SSE, isa  # noqa: E402

FORMS = [f for f in (SSE, AVX2, AVX512) if f.lanes <= isa("cpu").lanes]
ROWS, COLUMNS, ENTRIES = 16, 32, 7
TEXT = """tiles lanes on cpu
param X[P, M]: f32 in
param W[{entries}]: f32 in
param Y[P, M]: f32 out
param Z[P, M]: f32 out
sizes P, M
kernel lanes_g0
  grid p1: ceil(P/{rows}), m1: ceil(M/{columns})
  dim p0[{rows}] count min(P - p1*{rows}, {rows}) start p1*{rows}
  dim m0[{columns}] count min(M - m1*{columns}, {columns}) start m1*{columns}
  tile X_t[p0, m0]: f32
  tile W_t[p0, m0]: f32
  tile Y_t[p0, m0]: f32
  load X_t = X[p1*{rows} + p0, m1*{columns} + m0]
  load W_t = W[max(min({index}, {entries} - 1), 0)]
  map Y_t = {value}
  store Y[p1*{rows} + p0, m1*{columns} + m0] = Y_t
  store Z[p1*{rows} + p0, m1*{columns} + m0] = W_t
"""
P, M = f"p1*{ROWS} + p0", f"(m1*{COLUMNS} + m0)"
FAR = [0, 1, -5, (1 << 24) - 40, (1 << 24) + 3, (1 << 31) - 60, -(1 << 31) - 7, (1 << 40) + 1]


def tiles(value: str, index: str = "0") -> Any:
    return parse_tile(TEXT.format(rows=ROWS, columns=COLUMNS, entries=ENTRIES, value=value, index=index))


def integers(depth: int) -> st.SearchStrategy[str]:
    """Text of integers over p and m, most of them of their distance."""
    leaf = st.builds("({} - {} + {})".format, st.sampled_from([P, P, P, M]), st.sampled_from([M, M, "3"]),
                     st.sampled_from(FAR))
    if not depth:
        return leaf
    part = integers(depth - 1)
    small = st.sampled_from(["2", "3", "8", "-5"])
    return st.one_of(leaf, *(st.builds(f.format, part, small) for f in ("({} // {})", "({} % {})", "({} * {})")),
                     *(st.builds(f.format, part, part) for f in ("max({}, {})", "min({}, {})", "({} - {})")),
                     st.builds("where({} < {}, {}, {})".format, part, small, part, part))


def reals(depth: int) -> st.SearchStrategy[str]:
    whole = integers(depth)
    return st.one_of(
        st.builds("X_t[p0, m0] + real({} % 8191)".format, whole),
        st.builds("where({} % 3 == 0, X_t[p0, m0], real({} % 5))".format, whole, whole),
        st.builds("where({} < {} and {} <= 12, 2.0, X_t[p0, m0])".format, whole, whole, whole),
        st.builds("X_t[p0, m0] * exp(0.0 - real({} % 9))".format, whole))


def run(tp: Any, x: Any, w: Any, form: Any = "cpu") -> tuple[Any, Any]:
    y, z = torch.full(x.shape, 77.0), torch.full(x.shape, 77.0)
    build(emit(tp, form))(torch.from_numpy(x), torch.from_numpy(w), y, z, *x.shape)
    return y.numpy(), z.numpy()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate))
@given(reals(2), integers(2), st.sampled_from(FORMS), st.integers(1, 2 * ROWS + 3), st.integers(1, 2 * COLUMNS + 5))
def test_any_expression(value: str, index: str, form: Any, rows: int, columns: int) -> None:
    """Of places, distances, remainders and comparisons, below, at and far above 32 bits."""
    tp, rng = tiles(value, index), np.random.default_rng(rows)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    w = rng.normal(size=ENTRIES).astype(np.float32)
    want = interpret_tile(tp, {"X": x, "W": w}, {})
    got = run(tp, x, w, form)
    assert same(got[0], want["Y"], 1e-5, 1e-5), value
    assert np.array_equal(got[1], want["Z"].astype(np.float32)), index


@pytest.mark.parametrize("far", FAR)
def test_integers_become_the_nearest_float(far: int) -> None:
    """A place, and a distance, rounded once from 64 bits: in f32 from 2**24 on there are gaps."""
    at = np.arange(37)[:, None], np.arange(70)[None, :]
    x, w = np.zeros((37, 70), np.float32), np.zeros(ENTRIES, np.float32)
    apart = at[0] - at[1] + far
    for text, want in ((f"real({P} - {M} + {far})", apart), (f"real(({P} - {M} + {far}) * 3)", apart * 3),
                       (f"real({M} + {far})", at[1] + 0 * at[0] + far)):
        got, _ = run(tiles(text), x, w)
        assert np.array_equal(got, want.astype(np.int64).astype(np.float32)), text


@pytest.mark.parametrize(("text", "computed"), [
    (f"real({P} - {M})", True), (f"real({M} - ({P}))", True), (f"real({P} + {M})", False), (f"real({M})", False),
    (f"where(({P} - {M}) % 4 == 0, X_t[p0, m0], 0.0)", True), (f"where({M} <= {P}, X_t[p0, m0], 0.0)", False)])
def test_distances_are_computed_once(text: str, computed: bool) -> None:
    """What depends on p - m is computed once a diagonal where it takes more than a comparison of lane numbers."""
    assert ("diagonal" in emit(tiles(text), "cpu").source) == computed
    by_place = tiles("X_t[p0, m0]", f"{P} - {M} + 3")
    assert "diagonal" in emit(by_place, "cpu").source
