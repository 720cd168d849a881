"""Emitted Gluon as machine code for sm_90: nothing spilled, and exponentials run while the tensor cores do.

Nothing here has run on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from memcomp.codegen import overlap
from memcomp.codegen.gluon import admits, compiled, emit, interpreted, taken
from memcomp.codegen.gluon.box import ALIGNED
from memcomp.codegen.launches import Layout
from memcomp.codegen.lower import lower
from memcomp.ir.errors import Refusal
from memcomp.ir.program import Program, close, knobs
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.ir.tile_text import parse_tile
from memcomp.stations import rewrite
from tests.test_gluon_backend import CAUSAL, VARIANTS, text

H100 = target("h100")
DIMS = (64, 128, 256)
SPILLED = {("capped", 128): 3}   # with a running maximum beside tanh; the softcap that torch code gives needs none
NAMES = [n for n in VARIANTS if n not in ("wide", "wider", "narrow values")]   # those are shapes of others


def mapped(program: str, rows: int = 128, keys: int = 0) -> TileProgram:
    """Tiles with so many rows, and with so many keys, or the most that fit."""
    p: Program = rewrite(replace(parse(program), target="h100"), observe=lambda *_: None)
    cut = {k.name: k.choices for k in knobs(p)}
    by_key = next((n for n in cut if n.startswith("m")), "")
    for n in (keys,) if keys else sorted(cut[by_key], reverse=True):
        made = lower(close(p, {k: n if k == by_key else rows if rows in c else c[-1] for k, c in cut.items()}))
        if keys or fits(made):
            return made
    raise AssertionError("no tile fits")


def fits(tp: TileProgram) -> bool:
    try:
        return admits(tp, H100) == 0
    except Refusal:
        return False


@lru_cache(maxsize=32)
def kernel(name: str, dim: int) -> Kernel:
    program = VARIANTS[name].replace("rank E = 64", f"rank E = {dim}").replace("rank F = 64", f"rank F = {dim}")
    return emit(mapped(program), "h100")


def usual(k: Kernel) -> Layout:
    return Layout(tuple(len(p.shape) - 1 for p in k.program.params))


def check(k: Kernel, spilled: int = 0) -> None:
    """spilled: instructions that store a register to memory."""
    pytest.importorskip("triton", reason="triton is not installed")
    from memcomp.codegen.gluon.build import binaries
    from memcomp.codegen.gluon.emit import shared

    for launch, b in zip(k.program.kernels, binaries(k), strict=True):
        assert overlap.faults(b.sass) == ((f"STL x{spilled}",) if spilled else ()), "spills, the order of machine code"
        assert bool(b.resources.stack) == bool(spilled) and b.warps == 12
        assert 0 <= shared(k.program, launch) - b.shared <= 1024
        rows, loads = b.instructions("HGMMA", "HMMA"), b.instructions("UTMALDG", "LDGSTS")
        assert rows["HGMMA"] and not rows["HMMA"] and loads["UTMALDG"] == 4 and not loads["LDGSTS"]


def test_products_run_while_exponentials_do() -> None:
    check(kernel("grouped", 64))


@pytest.mark.slow
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_compiles_without_spills(name: str, dim: int) -> None:
    check(kernel(name, dim), SPILLED.get((name, dim), 0))


def test_a_launch_takes_what_the_machine_code_does() -> None:
    """`Form` compares the arguments with those of the machine code."""
    pytest.importorskip("triton", reason="triton is not installed")
    k = kernel("sloped", 64)
    form = compiled(k, usual(k))
    assert [x.block for x in form.launches] == [384]
    maps = [a for a in taken(k, usual(k).units) if a.kind == "map"]
    assert [(a.of, a.multiple) for a in maps] == [("Q", ALIGNED), ("K", ALIGNED), ("V", ALIGNED)]
    assert all(a.box[-1] * 2 == a.swizzle for a in maps), "a fetch is as wide as a swizzle"


def test_tensors_that_cannot_be_fetched_are_refused() -> None:
    k = kernel("sloped", 64)
    for odd in ("K_t_box", "V_t_box_s1"):
        with pytest.raises(Refusal, match="multiples of 16 bytes"):
            compiled(k, replace(usual(k), loose=frozenset({odd})))


def test_any_position_may_have_stride_1() -> None:
    """K kept with its keys next to one another is fetched so, and read by columns."""
    k = kernel("causal", 64)
    turned = emit(k.program, "h100", tuple(1 if p.name == "K" else len(p.shape) - 1 for p in k.program.params)).source
    assert "K_t.index(m1 % 2).reshape([64, 128])," in turned and "permute((1, 0))" not in turned


REFUSED = {
    # what is refused: (program, rows, target, what the refusal says)
    "f32": (VARIANTS["causal"].replace("bf16", "f32"), 128, "h100", "stored as f32"),
    "few rows": (VARIANTS["causal"], 64, "h100", "64 rows, and two groups of four warps take 128"),
    "another machine": (VARIANTS["causal"], 128, "a100", "sm_90, and that has sm_80"),
    "pages": (VARIANTS["causal"].replace("K[h//1, m, e]", "K[h//1, X[m], e]").replace("in V", "in X[M]: i64\nin V"),
              128, "h100", "is data"),
    "one product": ("program scores\nrank H\nrank P\nrank M\nrank E = 64\nin Q[H, P, E]: bf16\nin K[H, M, E]: bf16\n"
                    "out S[H, P, M]: f32\nS[h, p, m] = sum{e} Q[h, p, e] * K[h, m, e]\n", 128, "h100", "product"),
    "wide rows": (text(CAUSAL, dim=512), 128, "h100", "bytes of shared memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_not_the_form_is_refused(name: str) -> None:
    program, rows, machine, says = REFUSED[name]
    with pytest.raises(Refusal, match=says):
        emit(mapped(program, rows, 64), machine)


MERGED = """tiles merged on h100
param Q[J*8, P, 64]: bf16 in
param K[J, M, 64]: bf16 in
param V[J, M, 64]: bf16 in
param O[J*8, P, 64]: bf16 out
sizes J, P, M
kernel merged
  grid j: J, p1: ceil(P/16)
  dim g[8] count 8 start 0
  dim p0[16] count min(P - p1*16, 16) start p1*16
  dim f[64] count 64 start 0
  dim e[64] count 64 start 0
  dim m0[128] count min(min(M - m1*128, 128), p1*16 + min(P - p1*16, 16) - m1*128) start m1*128
  tile RGM[g, p0]: f32
  tile RSD[g, p0]: f32
  tile RO[f, g, p0]: f32
  tile Q_t[e, g, p0]: f32
  tile K_t[m0, e]: f32
  tile S[m0, g, p0]: f32
  tile RGM_old[g, p0]: f32
  tile FGM[g, p0]: f32
  tile V_t[m0, f]: f32
  map RGM = -inf
  map RSD = 0.0
  map RO = 0.0
  load Q_t = Q[j*8 + g, p1*16 + p0, e]
  for m1 = 0 to min(ceil(M/128), ceil((p1*16 + min(P - p1*16, 16))/128)) {
    load K_t = K[j, m1*128 + m0, e]
    dot S = {e} Q_t[e, g, p0] * K_t[m0, e]
    map RGM_old = RGM[g, p0]
    map S = where(m1*128 + m0 <= p1*16 + p0, S[m0, g, p0] * 0.125, -inf)
    fold RGM += max{m0} S[m0, g, p0]
    map FGM = where(RGM[g, p0] == -inf, 0.0, RGM[g, p0])
    map S = exp(S[m0, g, p0] - FGM[g, p0])
    map RGM_old = exp(RGM_old[g, p0] - FGM[g, p0])
    map RSD = RSD[g, p0] * RGM_old[g, p0]
    fold RSD += sum{m0} S[m0, g, p0]
    map RO = RO[f, g, p0] * RGM_old[g, p0]
    load V_t = V[j, m1*128 + m0, f]
    dot RO += {m0} S[m0, g, p0] * V_t[m0, f]
  }
  map RO = where(RGM[g, p0] != -inf, RO[f, g, p0] / RSD[g, p0], 0.0)
  store O[j*8 + g, p1*16 + p0, f] = RO
"""


def test_query_heads_of_one_tile_are_rows_one_behind_another() -> None:
    """Eight heads of sixteen rows each; a group of warps has four of the heads."""
    k = emit(parse_tile(MERGED), "h100")
    place = Path(__file__).parent / "golden" / "gluon_merged.txt"
    if os.environ.get("GOLDEN") == "write":
        place.write_text(k.source)
    assert k.source == place.read_text()
    heads, rows, keys = 2, 40, 70
    draw = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(*s, generator=draw).bfloat16()
                 for s in ((heads * 8, rows, 64), (heads, keys, 64), (heads, keys, 64)))
    out = torch.zeros_like(q)
    interpreted(k)(q, key, v, out, heads, rows, keys)
    s = (q.double().view(heads, 8, rows, 64) @ key.double()[:, None].mT) * 0.125
    p = s.masked_fill(torch.arange(keys) > torch.arange(rows)[:, None], -torch.inf).softmax(-1)
    exact, terms = (p @ x.double()[:, None] for x in (v, v.abs()))
    assert ((out.double().view_as(exact) - exact).abs() <= 2.0 ** -7 * 1.01 * terms).all()


@pytest.mark.slow
def test_query_heads_of_one_tile_compile() -> None:
    check(emit(parse_tile(MERGED), "h100"))
