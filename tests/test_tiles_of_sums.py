"""Products whose results have two long ranks: tiles over both, summed in parts, in place where it lies so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.codegen.tvm.build import build
from memcomp.codegen.tvm.emit import emit
from memcomp.codegen.tvm.isa import AVX2, AVX512, AVX512_BF16, Isa
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program, close, knobs
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from memcomp.passes.reduce_passes import reduce_passes

NORMALISED = """
program normalised on cpu
rank P
rank M
rank X{x}
in V[P, M]: {dtype}
in G[M]: {dtype}
in W[X, M]: {dtype}
out O[P, X]: {dtype}
R[p] = sum{{m}} V[p, m] * V[p, m]
O[p, x] = sum{{m}} V[p, m] * rsqrt(R[p] + 1.0) * G[m] * W[x, m]
"""
LOGITS = """
program logits on cpu
rank P
rank E = {e}
rank M
in Q[P, E]: {dtype}
in K[M, E]: {dtype}
out O[P]: f32
S[p, m] = sum{{e}} Q[p, e] * K[m, e]
GM[p] = max{{m}} S[p, m]
SN[p, m] = exp(S[p, m] - GM[p])
SD[p] = sum{{m}} SN[p, m]
O[p] = GM[p] + log(SD[p])
"""
FORMS = [f for f in (AVX512_BF16, AVX512, AVX2)
         if f is AVX2 or target("cpu").has("avx512_bf16" if f is AVX512_BF16 else "avx512vl")]


def mapped(text: str, **asked: int) -> Program:
    """The mapped program; knobs as asked, the others at their first choice."""
    p = partition(fuse(reduce_passes(parse(text))))
    return close(p, {k.name: asked.get(k.name, k.choices[0]) for k in knobs(p)})


@pytest.mark.parametrize("x", ["", " = 600"])
def test_both_ranks_are_cut(x: str) -> None:
    """One lies across the lanes, that of the operand which the loop computes; nothing is summed once per point."""
    p = partition(fuse(reduce_passes(parse(NORMALISED.format(x=x, dtype="f32")))))
    (g,) = p.mapping.groups
    assert {r for r, _ in g.partition} == {"P", "X"} and g.lane == "P0" and set(g.space) == {"P1", "X1"}
    (kernel,) = lower(close(p, {k.name: k.choices[0] for k in knobs(p)})).kernels
    tiles = {t.name: t.dims for t in kernel.tiles}
    (loop,) = (s for s in kernel.body if hasattr(s, "hi"))
    assert any(isinstance(s, Dot) and set(tiles[s.tile]) == {"p0", "x0"} for s in loop.body)


@settings(max_examples=12, deadline=None)
@given(p=st.integers(0, 40), m=st.integers(0, 150), x=st.sampled_from(["", " = 300"]), data=st.data())
def test_tiles_mean_what_the_program_means(p: int, m: int, x: str, data: Any) -> None:
    text = NORMALISED.format(x=x, dtype="f32")
    n = int(x.strip(" =") or data.draw(st.integers(1, 150)))
    program = partition(fuse(reduce_passes(parse(text))))
    choice = {k.name: data.draw(st.sampled_from(k.choices), label=k.name) for k in knobs(program)}
    rng = np.random.default_rng(0)
    a = {"V": rng.standard_normal((p, m)), "G": rng.standard_normal(m), "W": rng.standard_normal((n, m))}
    got, want = interpret_tile(lower(close(program, choice)), a)["O"], interpret(parse(text), a)["O"]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def near(got: torch.Tensor, want: np.ndarray[Any, Any], terms: np.ndarray[Any, Any], eps: float) -> None:
    assert np.all(np.abs(got.double().numpy() - want) <= eps * (terms + np.abs(want))), np.abs(got.numpy() - want).max()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_kernels_of_two_cut_ranks(dtype: str, form: Isa) -> None:
    f = build(emit(lower(mapped(NORMALISED.format(x=" = 300", dtype=dtype))), form))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    for p, m in ((33, 130), (1, 1), (70, 301), (16, 64)):
        v, g, w = (torch.randn(*s).to(kind) for s in ((p, m), (m,), (300, m)))
        o = torch.full((p, 300), 7.0, dtype=kind)
        f(v, g, w, o, p, m)
        a = {n: t.double().numpy() for n, t in (("V", v), ("G", g), ("W", w))}
        text = NORMALISED.format(x=" = 300", dtype="f32")
        terms = interpret(parse(text), {n: np.abs(t) for n, t in a.items()})["O"]
        near(o.float(), interpret(parse(text), a)["O"], terms, 2**-8 if dtype == "bf16" else 2e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype,e", [("f32", 257), ("f32", 576), ("bf16", 576), ("bf16", 601), ("bf16", 1028)])
def test_long_contractions_are_summed_in_parts(dtype: str, e: int, form: Isa) -> None:
    """Parts that divide the whole and parts that do not; an odd number of terms in place."""
    f = build(emit(lower(mapped(LOGITS.format(e=e, dtype=dtype), p0=32)), form))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    torch.manual_seed(e)
    for p, m in ((33, 70), (5, 200)):
        q, k, o = torch.randn(p, e).to(kind), torch.randn(m, e).to(kind), torch.full((p,), 7.0)
        f(q * float("nan"), k, o, p, m)  # what is left in the buffers is not read
        f(q, k, o, p, m)
        s = q.double() @ k.double().T
        terms = (q.double().abs() @ k.double().abs().T).max(-1).values.numpy()
        near(o, torch.logsumexp(s, -1).numpy(), terms, 1e-6)
