"""Products of bf16 on pairs and on tiles: equal to numpy where that is exact, no worse than torch's where it is not.

Numbers are small integers where equality is asked: every product and sum is then exact in f32.  AMX runs here only
where the machine has it; its text runs everywhere with the instructions spelled out in plain operations.
"""

from __future__ import annotations

import platform
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.detect import cpu
from memcomp.ir.errors import Refusal
from memcomp.ir.program import Mapping
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot, TileProgram, statements
from tests.mapped import CASES, load, mapped

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.rounding import rounds  # noqa: E402
from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm import isa as machines  # noqa: E402
from memcomp.codegen.tvm.build import machine_code  # noqa: E402
from memcomp.codegen.tvm.isa import (  # noqa: E402
    AMX,
    AVX2,
    AVX512,
    AVX512_BF16,
    AVX512_VNNI,
    EMULATED,
    Isa,
    isa,
    named_isa,
)

HAS_PAIRS, HAS_TILES = (set(f) <= set(cpu().features) for f in (("avx512_bf16",), ("amx_tile", "amx_bf16")))
FORMS = [
    pytest.param(EMULATED, id="emulated"),
    pytest.param(AVX512_BF16, id="pairs", marks=pytest.mark.skipif(not HAS_PAIRS, reason="no AVX512-BF16 here")),
    pytest.param(AMX, id="tiles", marks=pytest.mark.skipif(not HAS_TILES, reason="no AMX here")),
]
PRODUCT = """
program product
rank B
rank M
rank N
rank E = {e}
in X[B, M, E]: bf16
in Y[B, N, E]: bf16
out Z[B, M, N]: {out}
Z[b, m, n] = sum{{e}} X[b, m, e] * Y[b, n, e]
"""


def whole(*shape: int) -> Any:
    return torch.randint(-4, 5, shape).to(torch.bfloat16)


def laid(x: Any, how: str) -> Any:
    """The same values elsewhere: as they are, dims of memory swapped, every other element, one element off."""
    if how == "turned":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "every other":
        return torch.stack([x, x], -1)[..., 0]
    if how == "one off":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("e", [1, 2, 31, 32, 40, 65])
def test_products_equal_numpy(e: int, form: Isa) -> None:
    """Odd and even contractions, tails of every dim, nothing at all, and what an earlier call left in the buffers."""
    tp = lower(mapped(parse(PRODUCT.format(e=e, out="f32")), 2))
    f = build(emit(tp, form))
    torch.manual_seed(e)
    for b, m, n in ((1, 64, 64), (2, 33, 70), (1, 1, 1), (3, 17, 129), (2, 0, 5), (1, 130, 31)):
        x, y, z = whole(b, m, e), whole(b, n, e), torch.full((b, m, n), 7.0)
        spoilt = torch.full_like(x, float("nan")), torch.full_like(y, float("inf"))
        f(*spoilt, z, b, m, n)
        f(x, y, z, b, m, n)
        want = x.double().numpy() @ y.double().numpy().transpose(0, 2, 1)
        assert np.array_equal(z.double().numpy(), want), (b, m, n)


@pytest.mark.parametrize("form", FORMS)
def test_products_of_any_layout_are_equal(form: Isa) -> None:
    """In place and packed, by vectors, by turned squares, one by one; misaligned."""
    f = build(emit(lower(mapped(parse(PRODUCT.format(e=35, out="bf16")), 2)), form))
    torch.manual_seed(1)
    x, y = whole(2, 37, 35), whole(2, 50, 35)
    want = (x.double() @ y.double().mT).to(torch.bfloat16)
    for one, two in (("plain", "turned"), ("turned", "every other"), ("turned", "turned"), ("one off", "one off")):
        z = laid(torch.full_like(want, 7.0), one)
        f(laid(x, one), laid(y, two), z, 2, 37, 50)
        assert torch.equal(z, want), (one, two)


FEW = """
program few
rank B
rank M = {m}
rank N{n}
rank E = {e}
in X[B, M, E]: bf16
in Y[B, E, N]: bf16
out Z[B, M, N]: f32
Z[b, m, n] = sum{{e}} X[b, m, e] * Y[b, e, n]
"""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "e"), [(4, 128, 33), (3, 160, 64), (8, 48, 7), (2, 0, 40)])
def test_rows_woven_in_place_are_put_in_order(m: int, n: int, e: int, form: Isa) -> None:
    """Whole vectors and tails, an even and an odd contraction; the order costs nothing inside the contraction."""
    kernel = emit(lower(mapped(parse(FEW.format(m=m, n=f" = {n}" if n else "", e=e)), 2)), form)
    lines = kernel.source.splitlines()
    woven = [k for k, line in enumerate(lines) if "weave(" in line]
    ordered = [k for k, line in enumerate(lines) if "in_order(" in line]
    assert woven and ordered
    inner = {len(lines[k]) - len(lines[k].lstrip()) for k in woven}
    assert max(len(lines[k]) - len(lines[k].lstrip()) for k in ordered) < max(inner)
    f = build(kernel)
    torch.manual_seed(e)
    for columns in (n,) if n else (1, 31, 64, 100):
        x, y, z = whole(2, m, e), whole(2, e, columns), torch.full((2, m, columns), 7.0)
        f(x, y, z, 2, *(() if n else (columns,)))
        assert np.array_equal(z.double().numpy(), x.double().numpy() @ y.double().numpy()), columns


LARGE = st.sampled_from([5, 16, 17, 33, 40, 64])
SMALL = st.sampled_from([1, 2, 3])


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate))
@given(st.permutations("bmde"), st.permutations("bnde"), st.sampled_from(["bmn", "mbn", "bnm", "nbm"]),
       st.tuples(LARGE, LARGE, LARGE, SMALL, SMALL),
       st.sampled_from([p.values[0] for p in FORMS if all(not m.args[0] for m in p.marks)]))
def test_any_order_of_dims(first: list[str], second: list[str], result: str, sizes: tuple[int, ...], form: Isa,
                           ) -> None:
    """Batches, two contracted dims, every order of the dims of operands and result."""
    size = dict(zip("mnebd", sizes, strict=True))
    ranks = "".join(f"rank {d.upper()} = {n}\n" for d, n in size.items())
    x, y, z = (", ".join(dims) for dims in (first, second, result))
    tp = lower(mapped(parse(f"program p\n{ranks}in X[{x.upper()}]: bf16\nin Y[{y.upper()}]: bf16\n"
                            f"out Z[{z.upper()}]: f32\nZ[{z}] = sum{{d, e}} X[{x}] * Y[{y}]\n"), 2))
    one, two = (whole(*(size[d] for d in dims)) for dims in (first, second))
    out = torch.full([size[d] for d in result], 7.0)
    build(emit(tp, form))(one, two, out)
    want = torch.einsum(f"{''.join(first)},{''.join(second)}->{''.join(result)}", one.double(), two.double())
    assert torch.equal(out.double(), want)


def source(name: str) -> str:
    return (CASES / f"{name}.mc").read_text()


def with_dtype(tp: TileProgram, **dtypes: str) -> TileProgram:
    return replace(tp, params=tuple(replace(p, dtype=dtypes.get(p.name, "bf16")) for p in tp.params))


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_no_worse_than_eager(form: Isa) -> None:
    """Causal, 3 query heads per KV head; odd widths and lengths leave tails in every product."""
    text = re.sub(r"rank E = 8", "rank E = 40", re.sub(r"rank F = 8", "rank F = 33", source("onepass_causal_gqa")))
    f = build(emit(with_dtype(lower(mapped(replace(parse(text), mapping=Mapping()), 1))), form))
    for keys in (1, 31, 65, 150):
        torch.manual_seed(keys)
        q, k, v = (torch.randn(2, h, keys, e).to(torch.bfloat16) for h, e in ((6, 40), (2, 40), (2, 33)))
        own = torch.full((2, 6, keys, 33), 7.0, dtype=torch.bfloat16)
        f(q, k, v, own, 2, 2, keys, keys)

        def eager(q: Any, k: Any, v: Any) -> Any:
            k, v = (x.repeat_interleave(3, 1) for x in (k, v))
            hidden = torch.ones(len(q[0, 0]), len(q[0, 0]), dtype=torch.bool).triu(1)
            return torch.softmax((q @ k.mT * 0.125).masked_fill(hidden, -torch.inf), -1) @ v

        exact = eager(q.double(), k.double(), v.double())
        error, theirs = ((x.double() - exact).norm().item() for x in (own, eager(q, k, v)))
        assert error <= 1.02 * theirs, (keys, error, theirs)


def dots(tp: TileProgram) -> list[tuple[str, Dot]]:
    return [(k.name, s) for k in tp.kernels for s in statements(k.body) if isinstance(s, Dot)]


def test_what_may_be_rounded() -> None:
    """The weights of a sum of values, not what an exponential reads, and nothing that ends finer than bf16."""
    tp = with_dtype(lower(mapped(load("onepass_causal_gqa"), 1)))
    (scores, values) = dots(tp)
    allowed = rounds(tp)
    assert (values[0], values[1].tile) in allowed and (scores[0], scores[1].tile) not in allowed
    finer = rounds(with_dtype(tp, O="f32"))
    assert (values[0], values[1].tile) not in finer
    # a second, finer output that comes from the scores alone changes nothing for the values
    lse = with_dtype(lower(mapped(load("attention_lse"), 1)), L="f32")
    out = next(s for s in reversed(dots(lse)))
    assert (out[0], out[1].tile) in rounds(lse)


def test_what_is_packed_and_rounded() -> None:
    """Weights that many rows share; not where memory is what a product waits for, nor where f32 comes out, nor keys,
    whose pairs serve all lanes from where they lie."""
    def tiles(name: str, heads: int = 3) -> TileProgram:
        text = re.sub(r"rank ([EF]) = \d+", r"rank \1 = 64", source(name))
        text = re.sub(r"(rank G = |[Jj]\*)3\b", rf"\g<1>{heads}", text)
        return lower(mapped(replace(parse(text), mapping=Mapping()), 1))

    def packed(tp: TileProgram) -> set[str]:
        return set(re.findall(r"(\w+)_pairs\d* = T.alloc_buffer", emit(tp, AVX512_BF16).source))

    many, few, two = tiles("onepass_causal_gqa"), tiles("onepass_decode_gqa"), tiles("onepass_decode_gqa", heads=2)
    assert packed(with_dtype(many)) == {"Q_t", "V_t", "S"}
    for finer in ("O", "V"):
        assert packed(with_dtype(many, **{finer: "f32"})) == {"Q_t"}
    assert packed(with_dtype(few)) == {"Q_t", "S"}
    assert packed(with_dtype(two)) == {"Q_t"} and "dot_pairs" in emit(with_dtype(two), AVX512_BF16).source


def test_forms_are_chosen_by_feature() -> None:
    here = target("cpu")
    v4 = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")
    every = ("avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
    for more, want in (((), AVX512), (("avx512_bf16",), AVX512_BF16), (every[:2], AVX512_VNNI), (every, AMX)):
        assert isa(replace(here, features=v4 + more)) == want == named_isa(want.name)
    assert isa(replace(here, features=v4[:3])) is AVX2
    tp = lower(mapped(parse(PRODUCT.format(e=64, out="f32")), 2))
    words = {f: set(re.findall(r"\b(dot_pairs|tile_product|tile_start|tile_stop)\b", emit(tp, f).source))
             for f in (AVX2, AVX512, AVX512_BF16, AMX)}
    assert words[AVX2] == words[AVX512] == set() and words[AVX512_BF16] == {"dot_pairs"}
    assert words[AMX] == {"tile_product", "tile_start", "tile_stop"}
    assert emit(tp, AMX).source.split("\n", 1)[1] == emit(tp, EMULATED).source.split("\n", 1)[1]


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="assembles for x86-64")
@pytest.mark.parametrize("model", ["x86-64-v4", "sapphirerapids"])
def test_tiles_assemble(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile registers are shaped before their first use and given back after the last; other forms have none of it."""
    monkeypatch.setitem(machines._BASES, AVX512.name, replace(AVX512, cpu=model))
    tp = lower(mapped(parse(PRODUCT.format(e=64, out="f32")), 2))
    code = machine_code(emit(tp, AMX)).inspect_source("asm")
    order = re.findall(r"^\s+(ldtilecfg|tilezero|tdpbf16ps|tilestored|tilerelease)\b", code, re.M)
    assert order[0] == "ldtilecfg" and order[-1] == "tilerelease" and "tdpbf16ps" in order
    assert order.count("ldtilecfg") == 1
    if model == AVX512.cpu:
        pairs, plain = (machine_code(emit(tp, f)).inspect_source("asm") for f in (AVX512_BF16, AVX512))
        assert "tdpbf16ps" not in pairs and "vdpbf16ps" in pairs and "dpbf16ps" not in plain


@pytest.mark.skipif(HAS_TILES, reason="this machine has tile registers")
def test_tiles_are_refused_where_the_system_has_none() -> None:
    tp = lower(mapped(parse(PRODUCT.format(e=64, out="f32")), 2))
    with pytest.raises(Refusal, match="AMX"):
        build(emit(tp, AMX))


def qk_norm(q: Any, k: Any, v: Any, w: Any) -> Any:
    q, k = (torch.nn.functional.rms_norm(x, (x.shape[-1],), w, eps=1e-6) for x in (q, k))
    return torch.softmax(q @ k.mT * 0.125, -1) @ v


def qk_norm_finer(q: Any, k: Any, v: Any, w: Any) -> Any:
    """The same with a product of f32, as a module may spell it."""
    q, k = (torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), w.float(), eps=1e-6) for x in (q, k))
    return (torch.softmax(q @ k.mT * 0.125, -1) @ v.float()).bfloat16()


@pytest.mark.parametrize("fn, held", [(qk_norm, True), (qk_norm_finer, False)], ids=["bf16", "f32"])
def test_what_the_module_rounds_a_kernel_may_round(fn: Any, held: bool) -> None:
    """Normalised rows are rounded to bf16 where the module does so, once and not twice as there, and only there."""
    import memcomp

    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 200, 64).to(torch.bfloat16) for _ in range(3))
    w = (torch.rand(64) + 0.5).to(torch.bfloat16)
    with torch.inference_mode():
        (region,) = memcomp.explain(fn, q, k, v, w).regions
        program = region.program
        (scores,) = (e for e in program.cascade.einsums if "S" in e.names)
        assert scores.reduce is not None and (scores.reduce.held == "bf16") == held
        assert parse(str(program)) == program
        tp = lower(program)
        assert [d.held for _, d in dots(tp) if d.tile == "S"] == ["bf16" if held else ""]
        source = emit(tp, AVX512_BF16).source
        assert bool(re.search(r"S_factor\w*_pairs\d* = T.alloc_buffer", source)) == held
        if held:
            own = torch.compile(fn, backend="memcomp", options={"rest": "eager", "strict": True})(q, k, v, w)
            exact = fn(q.double(), k.double(), v.double(), w.double())
            error, theirs = ((x.double() - exact).norm().item() for x in (own, fn(q, k, v, w)))
            assert error <= 1.02 * theirs
