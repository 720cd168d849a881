"""Instruction sets as the emitter sees them: vector width, number of registers, and how LLVM is told."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace

from memcomp.ir.target import Target
from memcomp.ir.target import target as named


@dataclass(frozen=True, slots=True)
class Isa:
    """lanes: f32 values of a vector register; registers: how many there are; cpu and attributes: for LLVM.

    bf16: how products of bf16 run: "" (widened to f32), "pairs" (two at a time in each lane) or "tiles" (blocks of
    16 x 16 sums, short ones as pairs).
    """

    name: str
    lanes: int
    registers: int
    cpu: str
    attributes: tuple[str, ...] = ()
    bf16: str = ""

    def block(self, rows: int, most: int = 4) -> tuple[int, int]:
        """(rows, vectors) of the largest register block of an outer product with `rows` output rows, `most` vectors.

        The accumulators, one row of vectors and a broadcast value are live together.
        """
        choices = ((6, 4), (5, 4), (4, 4), (3, 4), (8, 2), (6, 2), (5, 2), (4, 2), (3, 2), (2, 4), (2, 2), (1, 4),
                   (1, 2))
        fit = [(r, v) for r, v in choices
               if r * v + v + 1 <= self.registers and r <= max(rows, 1) and v <= max(most, 2)]
        # loads per multiply-add are (r + v) / (r v); a remainder of rows runs one by one, so blocks that divide win
        return min(fit, key=lambda b: (rows % b[0] > 0, (b[0] + b[1]) / (b[0] * b[1])))


# x86-64 levels as the psABI names them: v4 has avx512f/bw/cd/dq/vl, v3 avx2/fma/f16c.  LLVM splits 512-bit vectors of a
# generic v4 machine unless told not to.
AVX512 = Isa("avx512", 16, 32, "x86-64-v4", ("-prefer-256-bit",))
TILE = 16  # rows of a tile register, each of 16 sums or 16 pairs
BF16_PAIRS = ("+avx512bf16",)
BF16_TILES = ("+amx-tile", "+amx-bf16")
AVX512_BF16 = replace(AVX512, name="avx512_bf16", attributes=(*AVX512.attributes, *BF16_PAIRS), bf16="pairs")
AMX = replace(AVX512_BF16, name="amx_bf16", attributes=(*AVX512_BF16.attributes, *BF16_TILES), bf16="tiles")
AVX2 = Isa("avx2", 8, 16, "x86-64-v3")
SSE = Isa("sse", 4, 16, "x86-64")
NEON = Isa("neon", 4, 32, "generic", ("+neon",))
PLAIN = Isa("plain", 4, 16, "")
# the text of AMX with every instruction spelled out in plain operations: any machine runs it, none is given it
EMULATED = Isa("amx_emulated", 16, 32, "", bf16="tiles")
ALL = (AMX, AVX512_BF16, AVX512, AVX2, SSE, NEON, PLAIN, EMULATED)
_V4 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_V3 = {"avx2", "fma", "f16c"}


def isa(target: Target | str) -> Isa:
    """The widest form that the target's features allow."""
    features = set((named(target) if isinstance(target, str) else target).features)
    if features >= _V4:
        if "avx512_bf16" not in features:
            return AVX512
        return AMX if features >= {"amx_tile", "amx_bf16"} else AVX512_BF16
    if features >= _V3:
        return AVX2
    if "neon" in features:
        return NEON
    return SSE if platform.machine().lower() in ("x86_64", "amd64") else PLAIN
