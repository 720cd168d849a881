"""Readers and writers of stored keys and values: attention over what a codec holds, in every backend that is here."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.cuda.host import COMPILERS
from memcomp.config import Config
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse, show
from memcomp.ir.verify import verify
from memcomp.passes.kv.codecs import Codec, codec, encode
from memcomp.passes.kv.reader import Attention, Piece, Stored, reader
from memcomp.passes.kv.writer import writer
from memcomp.pipeline import compile_program
from tests.mapped import arguments

F32 = np.float32
Array = np.ndarray[Any, np.dtype[Any]]
BF16 = codec("bf16")


def given(c: Codec, rng: np.random.Generator) -> dict[str, Array]:
    """The tables of a codec: its own, or some that it can be given."""
    return {t.name: t.array() if t.values is not None else
            np.sort(np.abs(rng.normal(size=t.shape)).astype(F32) + F32(0.1), -1) * F32(0.02 if t.shape == (1,) else 1)
            for t in c.tables}


def fill(s: Stored, prefix: str, lead: tuple[int, ...], tokens: int, rng: np.random.Generator
         ) -> tuple[dict[str, Array], Array]:
    """What a stream stores of random numbers, and the numbers that it says: [*lead, tokens, width]."""
    c, tables = s.codec, given(s.codec, rng)
    x = rng.normal(size=(*lead, tokens, s.width)) * np.exp(rng.normal(size=s.width))
    if s.along == "n":
        assert tokens % c.group == 0
        x = x.swapaxes(-1, -2)
    groups = x.reshape(-1, c.group)
    planes = encode(c, groups, tables)
    said = interpret(c.decode, planes | tables)["X"].reshape(x.shape)
    stored = {}
    for name, plane in planes.items():
        y = plane.reshape(*x.shape[:-1], -1)
        stored[prefix + name] = y.swapaxes(-1, -2) if s.along == "n" else y
    return stored | {prefix + n: t for n, t in tables.items()}, said.swapaxes(-1, -2) if s.along == "n" else said


def fills(p: Piece, batch: int, heads: int, tokens: int, rng: np.random.Generator, lengths: Array | None = None
          ) -> tuple[dict[str, Array], Array, Array, Array]:
    """Inputs of a region, its keys, its values, and how many tokens of it are there."""
    inputs: dict[str, Array] = {}
    least = max(s.span for s in (*p.keys, *([p.values] if p.values else [])))
    room = -(-tokens // least) * least
    keys = []
    for k, s in enumerate(p.keys):
        got, said = fill(s, f"{p.name}K{k or ''}", (batch, heads), room, rng)
        inputs |= got
        keys.append(said)
    if p.values is None:
        values = keys[0]
    else:
        got, values = fill(p.values, f"{p.name}V", (batch, heads), room, rng)
        inputs |= got
    n = np.full(batch, room) if not p.ragged else lengths if lengths is not None else rng.integers(1, tokens + 1, batch)
    if p.ragged:
        inputs[f"{p.name}LEN"] = n
    return inputs, np.concatenate(keys, -1), values, n


def attend(a: Attention, q: Array, pieces: list[tuple[Piece, Array, Array, Array]]) -> Array:
    """Attention in float64 over all regions at once; q: [B, J, G, P, E]."""
    out = np.zeros((*q.shape[:-1], pieces[0][2].shape[-1]))
    for b in range(q.shape[0]):
        scores, values = [], []
        for p, keys, v, n in pieces:
            m = int(n[b])
            s = np.einsum("jgpe,jme->jgpm", q[b], keys[b, :, :m]) * a.scale
            if a.cap:
                s = a.cap * np.tanh(s / a.cap)
            newest = (m - a.queries + np.arange(a.queries) if a.queries > 1 else np.array([m - 1]))[:, None]
            at = np.arange(m)
            hidden = (at > newest) if p.causal else np.zeros((a.queries, m), bool)
            hidden = hidden | (at <= newest - p.window) if p.window else hidden
            scores.append(np.where(hidden, -np.inf, s))
            values.append(np.broadcast_to(v[b, :, None, None, :m], (*s.shape, v.shape[-1])))
        s = np.concatenate(scores, -1)
        w = np.exp(s - s.max(-1, keepdims=True))
        out[b] = np.einsum("jgpm,jgpmf->jgpf", w, np.concatenate(values, -2)) / w.sum(-1, keepdims=True)
    return out


def case(a: Attention, pieces: tuple[Piece, ...], tokens: int = 77, batch: int = 2, heads: int = 2, seed: int = 0
         ) -> tuple[Program, dict[str, Array], Array]:
    """A reader, inputs for it, and the result."""
    rng = np.random.default_rng(seed)
    p = reader(a, pieces)
    width = sum(k.width for k in pieces[0].keys)
    q = rng.normal(size=(batch, heads, a.group, a.queries, width)).astype(F32)
    inputs: dict[str, Array] = {"Q": q if a.queries > 1 else q[:, :, :, 0]}
    held = []
    for piece in pieces:
        got, keys, values, n = fills(piece, batch, heads, tokens, rng)
        inputs |= got
        held.append((piece, keys, values, n))
    want = attend(a, q.astype(np.float64), held)
    return p, inputs, want if a.queries > 1 else want[:, :, :, 0]


def one(k: Codec, v: Codec, width: int = 64, along: str = "ee", **more: Any) -> Piece:
    return Piece("X", (Stored(k, width, along[0]),), Stored(v, width, along[1]), **more)


INT8, INT4, INT2 = codec("int", bits=8, mode="sym"), codec("int"), codec("int", bits=2)
PLAIN = Attention(group=3, scale=0.125)
PAIRS: dict[str, tuple[Piece, int]] = {
    "int8": (one(INT8, INT8), 77),
    "kivi4": (one(INT4, INT4, along="ne"), 96),
    "kivi2": (one(INT2, INT2, 128, "ne"), 77),
    "along tokens": (one(INT4, INT4, along="nn"), 96),
    "q8_0 iq4_nl": (one(codec("q8_0"), codec("iq4_nl")), 77),
    "q4_0 q5_1": (one(codec("q4_0"), codec("q5_1"), 128), 33),
    "q5_0 q4_1": (one(codec("q5_0"), codec("q4_1"), 128), 33),
    "fp8": (one(codec("fp8"), codec("fp8", format="e5m2", group=32)), 77),
    "mxfp4 mxfp8": (one(codec("mx"), codec("mx", format="e4m3")), 77),
    "nvfp4": (one(codec("nvfp4"), codec("nvfp4", group=64)), 77),
    "ggml_mxfp4": (one(codec("ggml_mxfp4"), codec("ggml_nvfp4")), 77),
    "lut": (one(codec("lut"), codec("lut", bits=3, table="normal", norm="rms")), 77),
    "vq": (one(codec("vq"), codec("vq", bits=4, width=2)), 77),
    "zero points by halves": (one(codec("int", group=64, share=32, mode="zero", stride=32),
                                  codec("int", bits=3, word="i32")), 77),
    "planes": (one(codec("planes", group=64), codec("planes", group=64, bits=6, upper=2)), 77),
    "bfp": (one(codec("bfp", bits=4), codec("bfp")), 77),
    "bf16": (one(BF16, BF16), 77),
    "int1": (one(codec("int", bits=1, mode="sym"), codec("int", bits=1)), 77),
}


def near(got: Array, want: Array, bound: float) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= bound, error


@pytest.mark.parametrize("name", PAIRS)
def test_a_reader_is_attention_over_decoded_numbers(name: str) -> None:
    piece, tokens = PAIRS[name]
    p, inputs, want = case(PLAIN, (piece,), tokens)
    verify(p)
    assert parse(show(p)) == p
    near(interpret(p, inputs)["O"], want, 1e-12)


REGIONS = (Piece("F", (Stored(BF16, 64),), Stored(BF16, 64), ragged=False),
           one(INT4, INT4, along="ne"),
           Piece("R", (Stored(BF16, 64),), Stored(BF16, 64), causal=True))


@pytest.mark.parametrize(("a", "pieces"), [
    (PLAIN, REGIONS),
    (replace(PLAIN, queries=4, cap=20.0), REGIONS),
    (replace(PLAIN, queries=3), (one(INT8, codec("q4_0"), causal=True, window=9),)),
    (PLAIN, (one(INT8, INT8, window=16),)),
    (Attention(group=8, scale=0.1),
     (Piece("X", (Stored(codec("fp8", group=64, share=32), 128), Stored(BF16, 32)), None),)),
], ids=["regions", "regions for four queries", "verify in a window", "window", "latents"])
def test_regions_windows_and_latents_join_exactly(a: Attention, pieces: tuple[Piece, ...]) -> None:
    p, inputs, want = case(a, pieces, tokens=64)
    verify(p)
    near(interpret(p, inputs)["O"], want, 1e-12)


# -- writers ----------------------------------------------------------------------------------------------------------

def written(streams: dict[str, Stored], page: int, tokens: int, seed: int = 0
            ) -> tuple[Program, dict[str, Array], dict[str, Array]]:
    """A writer, inputs for it, and the states that it leaves: those before, and the codes of `encode` where they go."""
    rng, span = np.random.default_rng(seed), max(s.span for s in streams.values())
    batch, heads, room = 2, 2, 128
    p = writer(streams, page=page)
    at = rng.integers(0, (room - tokens) // span + 1, batch) * span
    inputs: dict[str, Array] = {"AT": at}
    per = room // (page or room)
    pages = rng.permutation(batch * per)
    if page:
        inputs |= {"INDPTR": np.arange(batch + 1) * per, "PAGES": pages}
    want: dict[str, Array] = {}
    for stem, s in streams.items():
        c, tables = s.codec, given(s.codec, rng)
        x = rng.normal(size=(batch, heads, tokens, s.width)).astype(F32)
        inputs |= {f"X{stem}": x} | {stem + n: t for n, t in tables.items()}
        groups = x.swapaxes(2, 3) if s.along == "n" else x
        codes = encode(c, groups.reshape(-1, c.group), tables)
        for plane in c.planes:
            new = codes[plane.name].reshape(*groups.shape[:3], -1)
            new = new.swapaxes(2, 3) if s.along == "n" else new
            each = plane.per, s.span                             # rows of so many tokens
            rows = room // s.span * (each[0] if s.along == "n" else 1)
            old = rng.integers(0, 100, (batch, heads, rows, new.shape[-1])).astype(new.dtype)
            state = old.copy()
            for b in range(batch):
                first = at[b] // s.span * (each[0] if s.along == "n" else 1)
                state[b, :, first:first + new.shape[2]] = new[b]
            for kind, y in ((inputs, old), (want, state)):
                kind[stem + plane.name] = y
                if page:
                    parts = y.reshape(batch, heads, per, -1, y.shape[-1]).swapaxes(1, 2)
                    pool = np.empty((batch * per, *parts.shape[2:]), y.dtype)
                    pool[pages] = parts.reshape(pool.shape)
                    kind[stem + plane.name] = pool
    return p, inputs, want


WRITTEN: dict[str, tuple[dict[str, Stored], int]] = {
    "kivi4": ({"XK": Stored(INT4, 64, "n"), "XV": Stored(INT4, 64)}, 64),
    "int8": ({"XK": Stored(INT8, 64), "XV": Stored(INT8, 64)}, 7),
    "q8_0 q4_0": ({"XK": Stored(codec("q8_0"), 64), "XV": Stored(codec("q4_0"), 64)}, 7),
    "q4_1 q5_1": ({"XK": Stored(codec("q4_1"), 64), "XV": Stored(codec("q5_1"), 64)}, 7),
    "iq4_nl q5_0": ({"XK": Stored(codec("iq4_nl"), 64), "XV": Stored(codec("q5_0"), 64)}, 7),
    "fp8 mx": ({"XK": Stored(codec("fp8"), 64), "XV": Stored(codec("mx", format="e5m2"), 64)}, 7),
    "mxfp4 nvfp4": ({"XK": Stored(codec("mx"), 64), "XV": Stored(codec("nvfp4"), 64)}, 7),
    "ggml": ({"XK": Stored(codec("ggml_mxfp4"), 64), "XV": Stored(codec("ggml_nvfp4"), 64)}, 7),
    "lut vq": ({"XK": Stored(codec("lut"), 64), "XV": Stored(codec("vq", bits=4), 64)}, 7),
    "planes bfp": ({"XK": Stored(codec("planes", group=64), 64), "XV": Stored(codec("bfp", bits=3), 64)}, 7),
    "words": ({"XK": Stored(codec("int", bits=2, word="i32", group=64, share=16, mode="zero"), 64, "n"),
               "XV": Stored(codec("int", bits=3, group=32, mode="sym"), 64, "n")}, 64),
    "bf16": ({"XK": Stored(BF16, 64), "XV": Stored(codec("f16"), 64)}, 7),
}


@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_writer_encodes_in_place(name: str, page: int) -> None:
    streams, tokens = WRITTEN[name]
    p, inputs, want = written(streams, page, tokens)
    verify(p)
    assert parse(show(p)) == p
    got = interpret(p, inputs, rounded=True)
    assert got.keys() == want.keys()
    for n, x in want.items():
        assert (got[n] == x).all(), n


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(Refusal, match="48 channels are no whole groups of 32"):
        Stored(INT4, 48)
    with pytest.raises(Refusal, match="pages of 48 tokens are no whole groups of 32"):
        reader(PLAIN, (one(INT4, INT4, along="ne", page=48),))
    with pytest.raises(Refusal, match="do not end together"):
        reader(PLAIN, (one(INT4, codec("int", group=48), 96, "nn"),))
    with pytest.raises(Refusal, match="different channels"):
        reader(PLAIN, (one(INT4, INT4), replace(one(INT4, INT4, 128), name="Y")))


def test_a_pool_of_pages_is_read_through_its_table() -> None:
    piece = one(INT4, codec("q8_0"), along="ne", page=64)
    p, rng = reader(PLAIN, (piece,)), np.random.default_rng(0)
    verify(p)
    lengths, table = np.array([100, 64, 1]), np.array([3, 0, 2, 1])
    inputs = {"Q": rng.normal(size=(3, 2, 3, 64)), "XLEN": lengths, "XINDPTR": np.array([0, 2, 3, 4]), "XPAGES": table}
    keys, values = (fill(s, f"X{t}", (4, 2), 64, rng) for s, t in ((piece.keys[0], "K"), (piece.values, "V")) if s)
    got = interpret(p, inputs | keys[0] | values[0])["O"]
    for b, pages in enumerate((table[:2], table[2:3], table[3:])):
        k, v = (np.concatenate([x[i] for i in pages], 1)[None] for x in (keys[1], values[1]))
        want = attend(PLAIN, inputs["Q"][b:b + 1, :, :, None], [(piece, k, v, lengths[b:b + 1])])
        near(got[b], want[0, :, :, 0], 1e-12)


# -- in the backends --------------------------------------------------------------------------------------------------

def ran(p: Program, inputs: dict[str, Array], backend: str) -> dict[str, Array]:
    """Outputs and new states of a program's kernels."""
    pytest.importorskip({"cuda": "numpy", "python": "numpy"}.get(backend, backend))
    if backend == "cuda" and not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler: kernels cannot run here")
    on = Config(target="cpu") if backend in ("tvm", "python") else Config(target="h100", interpret=True)
    shapes = {r: n for t in p.cascade.inputs() for r, n in zip(t.ranks, np.shape(inputs[t.name]), strict=True)}
    made = compile_program(p, config=replace(on, backend=backend),
                           sizes={r: n for r, n in shapes.items() if p.cascade.rank(r).extent is None})
    args, known = arguments(made.tiles, inputs, {})
    made.entry(*args, *known)
    return {x.name: a.double().numpy() for x, a in zip(made.tiles.params, args, strict=True)
            if x.role in ("out", "state")}


FAST = {("kivi4", "tvm"), ("mxfp4 mxfp8", "tvm"), ("int8", "python")}
READ = [(n, "tvm") for n in PAIRS] + [("int8", "python"), ("kivi4", "triton"), ("int8", "triton"),
                                       ("q8_0 iq4_nl", "triton"), ("kivi4", "cuda"), ("q8_0 iq4_nl", "cuda")]


@pytest.mark.parametrize(("name", "backend"), [
    pytest.param(*x, marks=[] if x in FAST else [pytest.mark.slow]) for x in READ])
def test_kernels_read_what_is_stored(name: str, backend: str) -> None:
    piece, tokens = PAIRS[name]
    p, inputs, want = case(PLAIN, (piece,), tokens)
    (got,) = ran(p, inputs, backend).values()
    near(got, want, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 4])
def test_kernels_join_regions(queries: int) -> None:
    p, inputs, want = case(replace(PLAIN, queries=queries), REGIONS, 64)
    (got,) = ran(p, inputs, "tvm").values()
    near(got, want, 5e-6)


QUICK = {("int8", "tvm"), ("q8_0 q4_0", "tvm")}
WRITE = [(n, "tvm") for n in WRITTEN] + [("int8", "triton"), ("q8_0 q4_0", "triton"), ("q8_0 q4_0", "cuda"),
                                          ("kivi4", "cuda")]


@pytest.mark.parametrize(("name", "backend"), [
    pytest.param(*x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in WRITE])
def test_kernels_write_the_same_bits(name: str, backend: str) -> None:
    streams, tokens = WRITTEN[name]
    p, inputs, want = written(streams, 0, tokens)
    got = ran(p, inputs, backend)
    assert got.keys() == want.keys()
    for n, x in want.items():
        assert (got[n] == x).all(), n


def test_arithmetic_that_is_rounded_is_done_as_it_stands() -> None:
    """x / 127 by a product with 1 / 127, or a product and a sum in one operation, would differ in some of so many."""
    p = parse("""program t
rank N
in X[N]: f32
in Y[N]: f32
out A[N]: f32
out B[N]: f32
out C[N]: f32
out D[N]: f32
A[n] = as_f32(X[n] / 127.0)
B[n] = as_f32(as_f32(X[n] * Y[n]) + 0.5)
C[n] = as_f16(X[n] / Y[n])
D[n] = as_bf16(X[n])
""")
    rng = np.random.default_rng(0)
    inputs = {"X": (rng.normal(size=5000) * np.exp(rng.normal(size=5000))).astype(F32),
              "Y": rng.uniform(0.5, 2, 5000).astype(F32)}
    want = interpret(p, inputs)
    assert (want["A"] != inputs["X"] * F32(1 / 127)).any() and (want["B"] != interpret(
        parse(str(p).replace("as_f32(X[n] * Y[n])", "X[n] * Y[n]")), inputs)["B"]).any()
    for backend in ("tvm", "python"):
        got = ran(p, inputs, backend)
        for n, x in want.items():
            if n != "C":   # f32 has rounded the quotient before
                assert (got[n] == x).all(), (backend, n)
