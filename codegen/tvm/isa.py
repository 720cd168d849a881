"""Instruction sets as the emitter sees them: vector width, number of registers, and how LLVM is told."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from memcomp.ir.target import Target
from memcomp.ir.target import target as named


@dataclass(frozen=True, slots=True)
class Isa:
    """lanes: f32 values of a vector register; registers: how many there are; cpu and attributes: for LLVM."""

    name: str
    lanes: int
    registers: int
    cpu: str
    attributes: tuple[str, ...] = ()

    def block(self, rows: int) -> tuple[int, int]:
        """(rows, vectors) of the largest register block of an outer product with `rows` output rows.

        The accumulators, one row of vectors and a broadcast value are live together.
        """
        choices = ((6, 4), (5, 4), (4, 4), (3, 4), (8, 2), (6, 2), (5, 2), (4, 2), (3, 2), (2, 4), (2, 2), (1, 4),
                   (1, 2))
        fit = [(r, v) for r, v in choices if r * v + v + 1 <= self.registers and r <= max(rows, 1)]
        # loads per multiply-add are (r + v) / (r v); a remainder of rows runs one by one, so blocks that divide win
        return min(fit, key=lambda b: (rows % b[0] > 0, (b[0] + b[1]) / (b[0] * b[1])))


# x86-64 levels as the psABI names them: v4 has avx512f/bw/cd/dq/vl, v3 avx2/fma/f16c.  LLVM splits 512-bit vectors of a
# generic v4 machine unless told not to.
AVX512 = Isa("avx512", 16, 32, "x86-64-v4", ("-prefer-256-bit",))
AVX2 = Isa("avx2", 8, 16, "x86-64-v3")
SSE = Isa("sse", 4, 16, "x86-64")
NEON = Isa("neon", 4, 32, "generic", ("+neon",))
PLAIN = Isa("plain", 4, 16, "")
_V4 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_V3 = {"avx2", "fma", "f16c"}


def isa(target: Target | str) -> Isa:
    """The widest form that the target's features allow."""
    features = set((named(target) if isinstance(target, str) else target).features)
    if features >= _V4:
        return AVX512
    if features >= _V3:
        return AVX2
    if "neon" in features:
        return NEON
    return SSE if platform.machine().lower() in ("x86_64", "amd64") else PLAIN
