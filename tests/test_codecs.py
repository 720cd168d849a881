"""Codecs against independent ones, bit for bit: gguf.quants for ggml's blocks, ml_dtypes and torch for small floats,
numpy in f32 for the rest; encoding and decoding, over random, extreme and tied numbers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from memcomp.ir.errors import InputError, OptionError, Refusal
from memcomp.ir.program import Program
from memcomp.ir.text import parse, show
from memcomp.ir.verify import verify
from memcomp.passes.kv.codecs import FAMILIES, Codec, codec, decode, encode, from_bytes, to_bytes
from memcomp.passes.kv.codecs.minifloat import E4M3
from memcomp.passes.kv.codecs.tables import NF4, lloyd_max

quants = pytest.importorskip("gguf.quants")
ml_dtypes = pytest.importorskip("ml_dtypes")
F32 = np.float32
Array = np.ndarray[Any, np.dtype[Any]]


def numbers(group: int, seed: int = 0, rows: int = 200) -> Array:
    """Rows of random sizes; zeros, one element, constants, signs in equal strength, tiny and great ones, and numbers in
    the middle of two levels of most formats."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, group)) * np.exp(rng.normal(size=(rows, 1)) * 4)
    x[::7, rng.integers(0, group)] *= 30
    special = np.zeros((14, group))
    special[1, 3] = 5.0
    special[2], special[3] = 0.1, -7.25
    special[4] = np.where(np.arange(group) % 2, -3.0, 3.0)       # the first of two extremes decides a sign
    special[5] = np.where(np.arange(group) % 2, 3.0, -3.0)
    special[6], special[7] = 1e-6 * x[0], 3e4 * np.tanh(x[1])
    special[8] = np.arange(group) % 13 - 6.0 + 0.5               # ties of steps of 1
    special[8, 0], special[9] = 127.0, special[8] / 4
    special[10] = (np.arange(group) % 16 - 7.5) / 8
    special[10, -1] = 7.0
    special[11] = np.ldexp(1.0, np.arange(group) % 24 - 18)
    special[12], special[13] = np.nextafter(F32(4.0), F32(0)), 1e-30 * x[2]
    special[11, 1], special[12, 2] = 1e-42, -1e-42               # what f32 holds with fewer bits
    return np.concatenate([x, special]).astype(F32)


def same(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    bad = np.argwhere(~((a == b) | (a != a) & (b != b)))
    assert not len(bad), (len(bad), bad[:3], a[tuple(bad[0])], b[tuple(bad[0])])


def all_codecs() -> list[Codec]:
    more = [codec("int", bits=b, mode=m, group=32) for b in range(1, 9) for m in ("min", "zero", "sym")]
    more += [codec("int", bits=4, group=64, word="i32"), codec("int", bits=2, group=128, share=32, stride=32),
             codec("fp8", format="e5m2"), codec("fp8", scale="none"), codec("fp8", scale="static"),
             codec("mx", format="e4m3"), codec("lut", bits=3, group=32, table="normal", norm="rms"),
             codec("vq", bits=4, width=2), codec("planes", bits=6, upper=2), codec("nvfp4", tensor=False)]
    return [*(codec(f) for f in FAMILIES), *more]


def tables(c: Codec, rng: np.random.Generator) -> dict[str, Array]:
    return {t.name: np.abs(rng.normal(size=t.shape)).astype(F32) + F32(0.1) for t in c.tables if t.values is None}


# -- all of them ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("c", all_codecs(), ids=lambda c: c.text)
def test_a_codec_is_a_legal_cascade_whose_text_reads_back(c: Codec) -> None:
    for cascade in (c.encode, c.decode, *c.drafts):
        p = Program("codec", cascade)
        verify(p)
        assert parse(show(p)) == p
    assert len(c.decode.einsums) == 1 and c.decode.einsums[0].reduce is None


@pytest.mark.parametrize("c", all_codecs(), ids=lambda c: c.text)
def test_stored_bits_are_those_of_the_buffers(c: Codec) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, c.group)).astype(F32)
    got = encode(c, x, tables(c, rng))
    data = to_bytes(c, got)
    assert data.nbytes * 8 == c.bits * x.size
    for name, plane in from_bytes(c, data).items():
        same(plane, got[name])


NEAREST = [c for c in all_codecs()
           if c.family in ("int", "planes", "bfp", "lut", "nvfp4") and c.planes[0].dtype != "i8"]


@pytest.mark.parametrize("c", NEAREST, ids=lambda c: c.text)
def test_a_code_is_the_nearest_that_its_planes_can_say(c: Codec) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, c.group)).astype(F32)
    given = tables(c, rng) if c.family == "nvfp4" else {t.name: np.sort(v) for t, v in
                                                       zip(c.tables, tables(c, rng).values(), strict=False)}
    planes = encode(c, x, given)
    error = np.abs(decode(c, planes, given) - x)
    for _ in range(4):   # other codes beside the same scales
        other = {n: rng.integers(0, 256, v.shape).astype(np.uint8) if n in ("Q", "H", "I", "U", "L") and
                 v.dtype == np.uint8 else v for n, v in planes.items()}
        assert (error <= np.abs(decode(c, other, given) - x) + 1e-5 * np.abs(x).max()).all()


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(OptionError, match="unknown codec 'q4_9'") as e:
        codec("q4_9")
    assert "q4_0" in str(e.value)
    with pytest.raises(OptionError, match="int has no parameter 'bit'"):
        codec("int", bit=4)
    for bad in ({"bits": 4, "group": 33}, {"bits": 9}, {"group": 32, "share": 12}, {"bits": 4, "stride": 32}):
        with pytest.raises(Refusal):
            codec("int", **bad)
    with pytest.raises(InputError, match="the table 'T' must be given"):
        encode(codec("lut", table="given"), np.zeros((1, 64), F32))
    assert all(p.kind is p.KEYWORD_ONLY for f in FAMILIES.values() for p in inspect.signature(f).parameters.values())


# -- ggml -------------------------------------------------------------------------------------------------------------

GGML = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "ggml_mxfp4")


def oracle(name: str) -> Any:
    return getattr(quants, name.removeprefix("ggml_").upper())


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))])
def test_bytes_are_those_of_ggml(name: str, seed: int) -> None:
    x = numbers(32, seed)
    if name == "ggml_mxfp4":   # below 2**-125 gguf's exponent leaves its byte
        x[np.abs(x).max(1) < 2.0**-125] = 0
    else:                      # where 1 / d leaves f32, gguf makes integers of NaN
        x[np.abs(x).max(1) < 1e-35] = 0
    with np.errstate(all="ignore"):
        want = oracle(name).quantize_blocks(x)
    same(to_bytes(codec(name), encode(codec(name), x)), want)


@pytest.mark.parametrize("name", [*GGML, "iq4_nl", "ggml_nvfp4"])
def test_bytes_of_ggml_read_as_its_numbers(name: str) -> None:
    c, rng = codec(name), np.random.default_rng(3)
    data = rng.integers(0, 256, (600, c.group_bytes)).astype(np.uint8)
    scales = {"ggml_mxfp4": (0, 255), "ggml_nvfp4": (0, 127)}.get(name)
    if scales:
        data[:, :c.plane("S").per] = rng.integers(*scales, (600, c.plane("S").per))
        data[:200, 0] = np.arange(200) % scales[1]
    else:
        data[:, 1] &= 0xBF   # a finite d
        if "M" in [p.name for p in c.planes]:
            data[:, 3] &= 0xBF
    with np.errstate(all="ignore"):
        want = oracle(name).dequantize_blocks(data)
    same(decode(c, from_bytes(c, data)), want.astype(F32))


def test_scales_of_ggml_nvfp4_are_rounded_as_ggml_does() -> None:
    c, rng = codec("ggml_nvfp4"), np.random.default_rng(4)
    most = np.concatenate([np.exp(rng.normal(size=2000) * 4), np.arange(1, 200) * F32(6 / 1024), [2688, 3e4, 0, 1e-9]])
    x = np.zeros((len(most), 64), F32)
    x[:, 16] = most
    got = encode(c, x)["S"][:, 1]
    same(got, quants.NVFP4.fp32_to_ue4m3(x[:, 16] / F32(6.0)))


def best_index(values: Array, x: Array) -> Array:
    """best_index_int8 of ggml: of two levels as near the higher."""
    at = np.clip(np.searchsorted(values, x, side="right"), 1, len(values) - 1)
    return np.where(x - values[at - 1] < values[at] - x, at - 1, at)


def test_iq4_nl_is_ggmls_reference_without_search() -> None:
    """quantize_row_iq4_nl_ref, its sums in f64: how sums of f32 round is not said."""
    x = numbers(32)
    x[np.abs(x).max(1) < 1e-12] = 0
    levels = np.array(quants.IQ4_NL.kvalues, F32)
    top = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    with np.errstate(all="ignore"):
        d = top / levels[0]
        codes = best_index(levels, np.where(top == 0, F32(0), x * np.where(top == 0, F32(0), F32(1) / d)))
        q, w = levels[codes].astype(float), x.astype(float)**2
        s = np.where(top[:, 0] == 0, 0, ((w * q * x).sum(1).astype(F32) / (w * q * q).sum(1).astype(F32)))
    got = encode(codec("iq4_nl"), x)
    same(got["Q"], (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8))
    near = np.abs(got["S"][:, 0].astype(float) - s)
    assert (near <= 2.0**-10 * np.abs(s) + 2.0**-24).all()


# -- small floats -----------------------------------------------------------------------------------------------------

SMALL = {"e4m3": ("float8_e4m3fn", 448.0), "e5m2": ("float8_e5m2", 57344.0), "e2m1": ("float4_e2m1fn", 6.0),
         "e2m3": ("float6_e2m3fn", 7.5), "e3m2": ("float6_e3m2fn", 28.0)}


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("by", ["torch", "ml_dtypes"])
def test_fp8_is_that_of_torch_and_of_ml_dtypes(name: str, by: str) -> None:
    c, (kind, most) = codec("fp8", format=name, scale="none", group=32), SMALL[name]
    x = np.clip(numbers(32, 5), -most, most)
    x[0, :2] = 0.0, -0.0
    if by == "torch":
        torch = pytest.importorskip("torch")
        want = torch.from_numpy(x).to(getattr(torch, kind)).view(torch.uint8).numpy()
        number = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).float().numpy()
    else:
        want = x.astype(getattr(ml_dtypes, kind)).view(np.uint8)
        number = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, kind)).astype(F32)
    same(encode(c, x)["Q"], want)
    read = decode(c, {"Q": np.arange(256, dtype=np.uint8).reshape(8, 32)}).reshape(-1)
    finite = np.isfinite(number)
    assert finite.sum() >= 248
    same(read[finite], number[finite])


def test_fp8_saturates() -> None:
    c = codec("fp8", scale="static", group=4)
    got = decode(c, encode(c, np.array([[900.0, -1e6, 3.0, 896.0]], F32), {"S": np.array([2.0], F32)}),
                 {"S": np.array([2.0], F32)})
    same(got, np.array([[896.0, -896.0, 3.0, 896.0]], F32))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_with_a_scale_for_each_group(name: str) -> None:
    c, (kind, most) = codec("fp8", format=name, group=64, share=32), SMALL[name]
    x = numbers(64, 6)
    s = (np.abs(x).reshape(-1, 2, 32).max(2) / F32(most)).astype(F32)
    each = np.repeat(s, 32, 1)
    y = np.divide(x, each, out=np.zeros_like(x), where=each != 0)
    want = np.clip(y, -most, most).astype(F32).astype(getattr(ml_dtypes, kind))
    got = encode(c, x)
    same(got["S"], s)
    # of subnormal scales f32 has no exact quotient
    same(got["Q"], want.view(np.uint8))
    same(decode(c, got), want.astype(F32) * each)


@pytest.mark.parametrize("name", list(SMALL))
def test_mx_is_that_of_ocp(name: str) -> None:
    """Scale and rounding of the OCP specification by ml_dtypes: E8M0 of the floor of the logarithm, nearest even."""
    c, (kind, most) = codec("mx", format=name), SMALL[name]
    x = numbers(32, 7)
    top = np.abs(x).max(1, keepdims=True).astype(np.float64)
    e = np.where(top > 0, np.frexp(np.where(top > 0, top, 1))[1] - 1, -200) - int(np.log2(most))
    e = np.clip(e, -127, 127)
    got = encode(c, x)
    scale = got["S"].view(ml_dtypes.float8_e8m0fnu)
    same(scale.astype(np.float64), np.ldexp(1.0, e))
    y = np.clip((x / np.ldexp(1.0, e)).astype(F32), -most, most).astype(getattr(ml_dtypes, kind))
    codes = y.view(np.uint8) if name != "e2m1" else y.view(np.uint8)[:, ::2] | y.view(np.uint8)[:, 1::2] << 4
    same(got["Q"], codes)
    same(decode(c, got), (y.astype(np.float64) * np.ldexp(1.0, e)).astype(F32))


@pytest.mark.parametrize("tensor", [True, False])
def test_nvfp4_is_that_of_ml_dtypes(tensor: bool) -> None:
    c = codec("nvfp4", group=32, tensor=tensor)
    x = numbers(32, 8) / 100
    whole = np.abs(x).max() / F32(6 * 448) if tensor else F32(1)
    s = (np.abs(x).reshape(-1, 2, 16).max(2) / F32(6)) / whole
    s8 = np.minimum(s, F32(448)).astype(ml_dtypes.float8_e4m3fn)
    each = np.repeat(s8.astype(F32), 16, 1) * whole
    y = np.clip(np.divide(x, each, out=np.zeros_like(x), where=each != 0), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    given = {"T": np.array([whole], F32)} if tensor else {}
    got = encode(c, x, given)
    same(got["S"], s8.view(np.uint8))
    codes = y.view(np.uint8)
    # a share of zeros keeps no sign
    same(got["Q"], codes[:, ::2] | codes[:, 1::2] << 4)
    same(decode(c, got, given), (y.astype(np.float64) * np.repeat(s8.astype(float), 16, 1) * whole).astype(F32))


def test_codes_of_small_floats_are_integers_times_the_least() -> None:
    assert E4M3.least == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).smallest_subnormal)


# -- integers, tables, vectors ----------------------------------------------------------------------------------------

def clipped(x: Array, least: int, most: int) -> Array:
    return np.clip(np.round(x), least, most)


def divided(x: Array, s: Array) -> Array:
    return np.divide(x, s, out=np.zeros_like(x), where=s != 0)


def unpacked(c: Codec, planes: dict[str, Array], bits: int, stride: int) -> Array:
    """Codes by numpy's own bits: words to bits, codes of a word `stride` apart."""
    total: Array = np.zeros((len(planes["S"]), c.group), np.int64)
    shift = 0
    for name, b in zip("QHI", (b for b in (8, 4, 2, 1) if bits & b), strict=False):
        w = np.ascontiguousarray(planes[name])
        each = w.dtype.itemsize * 8 // b
        fields = np.unpackbits(w.view(np.uint8), axis=1, bitorder="little").reshape(len(w), w.shape[1], each, b)
        value = (fields * (1 << np.arange(b))).sum(-1)                    # [R, words, codes of a word]
        total += value.reshape(len(w), -1, stride, each).swapaxes(2, 3).reshape(len(w), -1).astype(np.int64) << shift
        shift += b
    return total


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("word", "stride", "share"), [("u8", 1, 0), ("i32", 1, 0), ("u8", 16, 64)])
def test_affine_codes_are_those_of_f32(bits: int, word: str, stride: int, share: int) -> None:
    x, most, n = np.clip(numbers(128, bits), -3e4, 3e4), 2**bits - 1, share or 128
    parts = x.reshape(len(x), -1, n)
    low, high = parts.min(2), parts.max(2)

    def spread(a: Array) -> Array:
        return np.repeat(a.astype(F32), n, 1)

    c = codec("int", bits=bits, group=128, word=word, stride=stride, share=share)
    got = encode(c, x)
    same(got["S"], ((high - low) / F32(most)).astype(np.float16))
    same(got["M"], low.astype(np.float16))
    q = clipped(divided(x - spread(got["M"]), spread(got["S"])), 0, most)
    same(unpacked(c, got, bits, stride), q.astype(np.int64))
    want = (q.astype(float) * spread(got["S"]) + spread(got["M"])).astype(F32)
    same(decode(c, got), want)

    c = codec("int", bits=bits, group=128, mode="zero", word=word, stride=stride, share=share, scale="f32")
    got = encode(c, x)
    s = (np.maximum(high, 0) - np.minimum(low, 0)) / F32(most)
    z = clipped(divided(-np.minimum(low, 0), s), 0, most)
    same(got["S"], s)
    same(got["M"], z.astype(np.uint8))
    q = np.clip(np.round(divided(x, spread(s))) + spread(z), 0, most)
    same(unpacked(c, got, bits, stride), q.astype(np.int64))
    same(decode(c, got), (q - spread(z)).astype(F32) * spread(s))


@pytest.mark.parametrize("bits", range(1, 9))
def test_symmetric_codes_are_those_of_f32(bits: int) -> None:
    x, half = numbers(64, bits), 2**(bits - 1)
    c = codec("int", bits=bits, group=64, mode="sym", scale="f32")
    got = encode(c, x)
    if bits == 1:
        want = np.where(x >= 0, 1, -1) * got["S"]
        assert np.allclose(got["S"][:, 0], np.abs(x).mean(1), rtol=1e-6)
    else:
        same(got["S"], np.abs(x).max(1, keepdims=True) / F32(half - 1))
        q = clipped(divided(x, np.repeat(got["S"], 64, 1)), -half, half - 1)
        want = q * got["S"]
        same(got["Q"] if bits == 8 else unpacked(c, got, bits, 1) - half,
             q.astype(np.int8) if bits == 8 else q.astype(np.int64))
    same(decode(c, got), want.astype(F32))


def test_two_planes_are_one_code_and_the_upper_alone_a_draft_of_it() -> None:
    x = numbers(128, 11)
    one, two = codec("int", bits=8, group=128), codec("planes", group=128)
    a, b = encode(one, x), encode(two, x)
    upper, lower = (np.stack([b[n] & 15, b[n] >> 4], 2).reshape(len(x), -1) for n in "UL")
    same(upper * 16 + lower, a["Q"])
    same(decode(two, b), decode(one, a))
    draft = decode(two, {n: v for n, v in b.items() if n != "L"} | {"L": 0 * b["L"]}, draft=0)
    s, m = b["S"].astype(F32), b["M"].astype(F32)
    same(draft, ((upper * 16 + 7.5) * s.astype(float) + m).astype(F32))
    assert (np.abs(draft - decode(two, b)) <= 7.5 * s * (1 + 1e-6) + 1e-6 * np.abs(m)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_block_floats_share_an_exponent(bits: int) -> None:
    x, half = numbers(32, 12), 2**(bits - 1)
    x[np.abs(x).max(1) < 2.0**-126] = 0
    c = codec("bfp", bits=bits, group=32)
    got = encode(c, x)
    top = np.abs(x).max(1, keepdims=True)
    e = np.where(top > 0, np.frexp(top)[1] - 1, -126)
    same(got["S"], (e + 127).astype(np.uint8))
    q = clipped(np.ldexp(x.astype(float), bits - 2 - e), 1 - half, half - 1)
    same(unpacked(c, got, bits, 1), (q + half).astype(np.int64))
    same(decode(c, got), np.ldexp(q, e - bits + 2).astype(F32))


@pytest.mark.parametrize("table", ["nf4", "normal", "given"])
def test_tables_give_the_nearest_level(table: str) -> None:
    x, rng = numbers(64, 13), np.random.default_rng(0)
    levels = np.array({"nf4": NF4, "normal": lloyd_max(4), "given": np.sort(rng.normal(size=16))}[table], F32)
    c, given = codec("lut", table=table, norm="absmax", scale="f32"), {"T": levels} if table == "given" else {}
    got = encode(c, x, given)
    same(got["S"], np.abs(x).max(1, keepdims=True))
    y = divided(x, np.repeat(got["S"], 64, 1))
    middles = (levels[1:] + levels[:-1]) / F32(2)
    codes = np.searchsorted(middles, y, side="left")
    same(got["Q"], (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    same(decode(c, got, given), levels[codes] * got["S"])


def test_levels_of_a_normal_distribution_are_those_of_max() -> None:
    """J. Max, Quantizing for minimum distortion (1960), table I."""
    assert np.allclose(lloyd_max(1), [-0.7980, 0.7980], atol=2e-4)
    assert np.allclose(lloyd_max(2), [-1.510, -0.4528, 0.4528, 1.510], atol=6e-4)
    assert np.allclose(lloyd_max(3)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=6e-4)


@pytest.mark.parametrize(("bits", "width"), [(8, 4), (4, 2), (2, 8)])
def test_vectors_are_the_nearest_of_their_table(bits: int, width: int) -> None:
    c, rng = codec("vq", bits=bits, width=width, group=64), np.random.default_rng(0)
    x = rng.normal(size=(40, 64)).astype(F32)
    given = {"T": rng.normal(size=(64 // width, 2**bits, width)).astype(F32)}
    parts = x.reshape(40, -1, 1, width).astype(float)
    best = ((parts - given["T"]) ** 2).sum(-1).argmin(-1)
    want = given["T"][np.arange(64 // width), best].reshape(40, 64)
    same(decode(c, encode(c, x, given), given), want)
