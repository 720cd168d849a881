"""AMX by machine code on an emulated processor, where Bochs is there: no machine that has AMX is needed.

Two things are left out because Bochs 3.0 computes them wrong: tile products of signed integers (its amx.cc extends no
sign; with that mended they are equal too) and the conversions of AVX512-BF16 (vcvtne2ps2bf16 reads its second half from
the wrong place), without which f32 is rounded in plain operations.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.ir.program import Mapping
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from tests import emulated
from tests.mapped import CASES, mapped

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from memcomp.codegen.tvm import build, emit  # noqa: E402
from memcomp.codegen.tvm.build import machine_code  # noqa: E402
from memcomp.codegen.tvm.isa import AMX, AVX512, EMULATED, having  # noqa: E402
from memcomp.codegen.tvm.launcher import CHUNKS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not emulated.here(), reason="no Bochs, or nothing to link with")]
TILES = having(AVX512, [f for m in AMX.products if m.tiles for f in m.features])
PRODUCT = ("program product\nrank B\nrank M\nrank N\nrank E = {e}\nin X[B, M, E]: {kind}\nin Y[B, N, E]: {kind}\n"
           "out Z[B, M, N]: {out}\nZ[b, m, n] = sum{{e}} X[b, m, e] * Y[b, n, e]\n")


def on_amx(tp: TileProgram, tensors: list[tuple[Any, str]], sizes: list[int], folder: Path) -> Any:
    module = machine_code(emit(tp, TILES))
    assert "tileloadd" in module.inspect_source("asm")
    return emulated.call(module, tensors, sizes, folder, chunks=CHUNKS)


def bits(x: Any) -> Any:
    return x.to(torch.bfloat16).view(torch.int16).numpy()


@pytest.mark.parametrize("e", [32, 65])
def test_products_of_bf16(e: int, tmp_path: Path) -> None:
    tp = lower(mapped(parse(PRODUCT.format(e=e, kind="bf16", out="f32")), 2))
    torch.manual_seed(e)
    x, y = (torch.randint(-4, 5, (2, n, e)).float() for n in (33, 70))
    tensors = [(bits(x), "bfloat16"), (bits(y), "bfloat16"), (np.full((2, 33, 70), 7, np.float32), "float32")]
    assert np.array_equal(on_amx(tp, tensors, [2, 33, 70], tmp_path), (x @ y.mT).numpy())


@pytest.mark.parametrize("e", [64, 130])
def test_products_of_8_bits(e: int, tmp_path: Path) -> None:
    tp = lower(mapped(parse(PRODUCT.format(e=e, kind="u8", out="i32")), 2))
    x, y = (np.random.default_rng(e).integers(0, 256, (2, n, e), dtype=np.uint8) for n in (33, 70))
    tensors = [(x, "uint8"), (y, "uint8"), (np.full((2, 33, 70), 7, np.int32), "int32")]
    want = x.astype(np.int64) @ y.astype(np.int64).transpose(0, 2, 1)
    assert np.array_equal(on_amx(tp, tensors, [2, 33, 70], tmp_path), want)


def test_attention(tmp_path: Path) -> None:
    """Causal, 3 query heads per KV head, in bf16: the instructions give what the text in plain operations gives, up to
    the order of sums."""
    text = (CASES / "onepass_causal_gqa.mc").read_text()
    text = re.sub(r"rank F = 8", "rank F = 33", re.sub(r"rank E = 8", "rank E = 40", text))
    tp = lower(mapped(replace(parse(text), mapping=Mapping()), 1))
    tp = replace(tp, params=tuple(replace(p, dtype="bf16") for p in tp.params))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 65, e).to(torch.bfloat16) for h, e in ((3, 40), (1, 40), (1, 33)))
    plain = torch.zeros(1, 3, 65, 33, dtype=torch.bfloat16)
    build(emit(tp, EMULATED))(q, k, v, plain, 1, 1, 65, 65)
    tensors = [(bits(x), "bfloat16") for x in (q, k, v, torch.zeros_like(plain))]
    got = torch.from_numpy(on_amx(tp, tensors, [1, 1, 65, 65], tmp_path).copy()).view(torch.bfloat16)
    assert torch.allclose(got.float(), plain.float(), rtol=2 ** -7, atol=2 ** -8)
