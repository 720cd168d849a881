"""Products of 8-bit integers, four in each lane of 32 bits: equal to numpy, whatever signs, shapes and layouts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.detect import cpu
from memcomp.ir.program import Mapping
from memcomp.ir.target import INTEGERS, sums_fit
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from tests.mapped import CASES, mapped

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm.build import machine_code  # noqa: E402
from memcomp.codegen.tvm.isa import AMX, AVX2, AVX512, AVX512_VNNI, EMULATED, EMULATED_LANES, Isa  # noqa: E402

HAS = set(cpu().features)
FORMS = [f for f, needed in ((EMULATED, ()), (EMULATED_LANES, ()), (AVX512_VNNI, ("avx512_vnni", "avx512_bf16")),
                             (AMX, ("amx_tile", "amx_int8", "avx512_vnni"))) if set(needed) <= HAS]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
TORCH = {"i8": torch.int8, "u8": torch.uint8, "i16": torch.int16}


def product(e: int | str, x: str = "i8", y: str = "i8", out: str = "i32") -> TileProgram:
    """Z = X Y^T over a contraction of e, or of up to that many where it is told with a bound."""
    return lower(mapped(parse(f"program product\nrank B\nrank M\nrank N\nrank E{e if isinstance(e, str) else f' = {e}'}"
                              f"\nin X[B, M, E]: {x}\nin Y[B, N, E]: {y}\nout Z[B, M, N]: {out}\n"
                              "Z[b, m, n] = sum{e} X[b, m, e] * Y[b, n, e]\n"), 2))


def drawn(dtype: str, *shape: int) -> Any:
    """Every value, the ends often."""
    low, high = INTEGERS[dtype]
    x = torch.randint(low, high + 1, shape)
    ends = torch.rand(shape)
    return x.masked_fill(ends < 0.2, low).masked_fill(ends > 0.8, high).to(TORCH[dtype])


@each_form
@pytest.mark.parametrize("kinds,e", [(("i8", "i8"), 3), (("i8", "i8"), 64), (("i8", "i8"), 130), (("u8", "i8"), 130),
                                     (("i8", "u8"), 130), (("u8", "u8"), 130)])
def test_products_equal_numpy(form: Isa, kinds: tuple[str, str], e: int) -> None:
    """Tails of every dim, decode's single rows, and what an earlier call left in the buffers."""
    f = build(emit(product(e, *kinds), form))
    torch.manual_seed(e)
    for b, m, n in ((1, 64, 64), (2, 33, 70), (1, 1, 1), (3, 17, 129), (2, 0, 5), (1, 5, 31)):
        x, y, z = drawn(kinds[0], b, m, e), drawn(kinds[1], b, n, e), torch.full((b, m, n), 7, dtype=torch.int32)
        f(torch.full_like(x, 101), torch.full_like(y, 93), z, b, m, n)
        f(x, y, z, b, m, n)
        want = x.numpy().astype(np.int64) @ y.numpy().astype(np.int64).transpose(0, 2, 1)
        assert np.array_equal(z.numpy(), want), (b, m, n)


LARGE = st.sampled_from([5, 16, 17, 33, 65])
SMALL = st.sampled_from([1, 2, 3])


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate))
@given(st.permutations("bmde"), st.permutations("bnde"), st.sampled_from(["bmn", "mbn", "bnm", "nbm"]),
       st.tuples(LARGE, LARGE, LARGE, SMALL, SMALL), st.sampled_from(FORMS),
       st.tuples(*[st.sampled_from(["i8", "u8"])] * 2))
def test_any_order_of_dims(first: list[str], second: list[str], result: str, sizes: tuple[int, ...], form: Isa,
                           kinds: tuple[str, str]) -> None:
    """Batches, two contracted dims, every order of the dims of operands and result."""
    size = dict(zip("mnebd", sizes, strict=True))
    ranks = "".join(f"rank {d.upper()} = {n}\n" for d, n in size.items())
    x, y, z = (", ".join(dims) for dims in (first, second, result))
    tp = lower(mapped(parse(f"program p\n{ranks}in X[{x.upper()}]: {kinds[0]}\nin Y[{y.upper()}]: {kinds[1]}\n"
                            f"out Z[{z.upper()}]: i64\nZ[{z}] = sum{{d, e}} X[{x}] * Y[{y}]\n"), 2))
    one, two = (drawn(kind, *(size[d] for d in dims)) for kind, dims in zip(kinds, (first, second), strict=True))
    out = torch.full([size[d] for d in result], 7)
    build(emit(tp, form))(one, two, out)
    assert torch.equal(out, torch.einsum(f"{''.join(first)},{''.join(second)}->{''.join(result)}", one.long(),
                                         two.long()))


@each_form
def test_a_contraction_of_any_length(form: Isa) -> None:
    """Its last pair may have one number, two, three or four."""
    f = build(emit(product(" <= 70"), form))
    for e in (1, 4, 7, 62, 65, 70):
        x, y, z = drawn("i8", 1, 9, e), drawn("i8", 1, 40, e), torch.zeros(1, 9, 40, dtype=torch.int32)
        f(x, y, z, 1, 9, 40, e)
        assert torch.equal(z.long(), x.long() @ y.long().mT), e


@each_form
def test_layouts_are_equal(form: Isa) -> None:
    """In place and packed, by vectors, by turned squares, one by one; misaligned."""
    f = build(emit(product(37), form))
    x, y = drawn("i8", 2, 37, 37), drawn("i8", 2, 50, 37)
    want = x.long() @ y.long().mT

    def turned(t: Any) -> Any:
        return t.mT.contiguous().mT

    def every_other(t: Any) -> Any:
        return torch.stack([t, t], -1)[..., 0]

    def one_off(t: Any) -> Any:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    for one, two in ((one_off, turned), (turned, every_other), (turned, turned), (one_off, one_off)):
        z = torch.full(want.shape, 7, dtype=torch.int32)
        f(one(x), two(y), z, 2, 37, 50)
        assert torch.equal(z.long(), want), (one, two)


def test_sums_that_fit() -> None:
    """The bound is exact: one product more would leave 32 bits, and then no product of short numbers is taken."""
    for a in INTEGERS:
        for b in INTEGERS:
            ends = [x * y for x in INTEGERS[a] for y in INTEGERS[b]]
            for terms in (1, 2, 131071, 131072):
                inside = all(-2**31 <= terms * x < 2**31 for x in ends)
                assert sums_fit(terms, a, b) == inside, (a, b, terms)


def test_sums_beyond_32_bits_are_exact() -> None:
    """A loop adds the sums of its steps; they are integers all the way, not numbers of f32."""
    n = 140_000
    x = torch.full((1, 1, n), -128, dtype=torch.int8)
    for form in (FORMS[-1], AVX2):
        z, short = torch.zeros(1, 20, 20, dtype=torch.int64), torch.zeros(1, 20, 20, dtype=torch.int32)
        build(emit(product(n, out="i64"), form))(x.expand(1, 20, -1), x.expand(1, 20, -1), z, 1, 20, 20)
        assert (z == n * 16384).all() and n * 16384 > 2**31
        y = x.expand(1, 20, -1)[..., : n - 1]
        build(emit(product(n - 1), form))(y, y, short, 1, 20, 20)  # what is stored keeps the low bits
        assert (short == ((n - 1) * 16384 + 2**31) % 2**32 - 2**31).all()


@each_form
def test_scores_of_8_bits(form: Isa) -> None:
    """Attention whose queries and keys are integers: their products stay integers until they are scaled."""
    text = (CASES / "onepass_causal_gqa.mc").read_text().replace("Q[B, H, P, E]: f32", "Q[B, H, P, E]: i8")
    text = text.replace("K[B, J, M, E]: f32", "K[B, J, M, E]: i8").replace("rank E = 8", "rank E = 48")
    scaled = re.sub(r"= (S\[[^]]*\])\*0.125", r"= real(\1)*0.0002", text)
    assert scaled != text
    tp = lower(mapped(replace(parse(scaled), mapping=Mapping()), 1))
    kernel = emit(tp, form)
    assert "tile_product" in kernel.source or "dot_pairs" in kernel.source
    q, k, v = drawn("i8", 2, 6, 70, 48), drawn("i8", 2, 2, 70, 48), torch.randn(2, 2, 70, 8)
    out = torch.zeros(2, 6, 70, 8)
    build(kernel)(q, k, v, out, 2, 2, 70, 70)
    scores = (q.double() @ k.double().repeat_interleave(3, 1).mT) * 0.0002
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    want = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v.double().repeat_interleave(3, 1)
    assert (out - want).norm() < 1e-6 * want.norm()


def test_forms_are_chosen_by_feature() -> None:
    words = {f.name: emit(product(64), f).source for f in (AVX2, AVX512, AVX512_VNNI, AMX)}
    assert [("dot_pairs" in t, "tile_product" in t) for t in words.values()] == [
        (False, False), (False, False), (True, False), (False, True)]
    assert words[AMX.name].split("\n", 1)[1] == emit(product(64), EMULATED).source.split("\n", 1)[1]
    if cpu().features and "avx2" in HAS:
        code = {f.name: machine_code(emit(product(64), f)).inspect_source("asm") for f in (AVX512_VNNI, AMX)}
        assert "vpdpbusd" in code[AVX512_VNNI.name] and "tdpbssd" in code[AMX.name]
    # without the instructions integers are multiplied as before
    plain = replace(AVX512, products=())
    assert emit(product(64), plain).source == emit(product(64), AVX512).source
