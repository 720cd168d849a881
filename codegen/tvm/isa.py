"""Instruction sets as the emitter sees them: vector width, number of registers, products, and how LLVM is told."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass

from memcomp.ir.target import Target
from memcomp.ir.target import target as named


@dataclass(frozen=True, slots=True)
class Multiply:
    """An instruction that multiplies stored numbers, several in each lane of 32 bits, and adds the products to a sum.

    left, right: dtypes of its operands.  each: numbers of a lane.  sums: dtype of the sum (i32 wraps around).
    tiles:       of 16 x 16 sums, else one sum a lane of a vector.  features: what a target must have; attributes: what
    LLVM is told then.
    """

    instruction: str
    left: str
    right: str
    each: int
    sums: str
    tiles: bool
    features: tuple[str, ...]
    attributes: tuple[str, ...]

    def takes(self, a: str, b: str) -> bool:
        """Operands of these dtypes, in either order; of vectors also two with sign, where one must be without."""
        return (a, b) in ((self.left, self.right), (self.right, self.left)) or (
            not self.tiles and self.left == "u8" and a == b == "i8")


# A machine's products are the rows whose features it has; where two serve, tiles come first.  What no row takes is
# widened and multiplied as f32 or, integers, as i64.
_INT8 = ("amx_tile", "amx_int8"), ("+amx-tile", "+amx-int8")
PRODUCTS = (
    Multiply("vdpbf16ps", "bf16", "bf16", 2, "f32", False, ("avx512_bf16",), ("+avx512bf16",)),
    Multiply("vpdpbusd", "u8", "i8", 4, "i32", False, ("avx512_vnni",), ("+avx512vnni",)),
    Multiply("tdpbf16ps", "bf16", "bf16", 2, "f32", True, ("amx_tile", "amx_bf16"), ("+amx-tile", "+amx-bf16")),
    Multiply("tdpbssd", "i8", "i8", 4, "i32", True, *_INT8),
    Multiply("tdpbsud", "i8", "u8", 4, "i32", True, *_INT8),
    Multiply("tdpbusd", "u8", "i8", 4, "i32", True, *_INT8),
    Multiply("tdpbuud", "u8", "u8", 4, "i32", True, *_INT8),
)
TILE = 16  # rows of a tile register, each of 16 sums or 16 lanes of operands


@dataclass(frozen=True, slots=True)
class Isa:
    """lanes: f32 values of a vector register; registers: how many there are; cpu and attributes: for LLVM; products:
    of short numbers."""

    name: str
    lanes: int
    registers: int
    cpu: str
    attributes: tuple[str, ...] = ()
    products: tuple[Multiply, ...] = ()

    @property
    def instructions(self) -> tuple[Multiply, ...]:
        """The products that LLVM is told of; others are spelled out."""
        return tuple(m for m in self.products if set(m.attributes) <= set(self.attributes))

    def block(self, rows: int, most: int = 4) -> tuple[int, int]:
        """(rows, vectors) of the largest register block of an outer product with `rows` output rows, `most` vectors.

        The accumulators, one row of vectors and a broadcast value are live together.
        """
        choices = ((6, 4), (5, 4), (4, 4), (3, 4), (8, 2), (6, 2), (5, 2), (4, 2), (3, 2), (2, 4), (2, 2), (1, 4),
                   (1, 2), (16, 1), (12, 1), (8, 1), (6, 1), (4, 1), (2, 1), (1, 1))
        fit = [(r, v) for r, v in choices
               if r * v + v + 1 <= self.registers and r <= max(rows, 1) and v <= max(most, 1)]
        # loads per multiply-add are (r + v) / (r v); a remainder of rows runs one by one, so blocks that divide win
        return min(fit, key=lambda b: (rows % b[0] > 0, (b[0] + b[1]) / (b[0] * b[1])))


# x86-64 levels as the psABI names them: v4 has avx512f/bw/cd/dq/vl, v3 avx2/fma/f16c.  LLVM splits 512-bit vectors of a
# generic v4 machine unless told not to.
AVX512 = Isa("avx512", 16, 32, "x86-64-v4", ("-prefer-256-bit",))
AVX2 = Isa("avx2", 8, 16, "x86-64-v3")
SSE = Isa("sse", 4, 16, "x86-64")
NEON = Isa("neon", 4, 32, "generic", ("+neon",))
PLAIN = Isa("plain", 4, 16, "")


def having(base: Isa, features: Collection[str]) -> Isa:
    """A base with the products of these features, named by them."""
    rows = tuple(m for m in PRODUCTS if set(m.features) <= set(features))
    added = dict.fromkeys(f for m in rows for f in m.features)
    told = dict.fromkeys((*base.attributes, *(a for m in rows for a in m.attributes)))
    return Isa("+".join([base.name, *added]), base.lanes, base.registers, base.cpu, tuple(told), rows)


AVX512_BF16 = having(AVX512, ("avx512_bf16",))
AVX512_VNNI = having(AVX512, ("avx512_bf16", "avx512_vnni"))
AMX = having(AVX512, ("avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"))
# the texts of these two with every instruction spelled out in plain operations: any machine runs it, none is given it
EMULATED = Isa("amx_emulated", 16, 32, "", products=AMX.products)
EMULATED_LANES = Isa("lanes_emulated", 16, 32, "", products=AVX512_VNNI.products)
_BASES = {i.name: i for i in (AVX512, AVX2, SSE, NEON, PLAIN, EMULATED, EMULATED_LANES)}
_V4 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_V3 = {"avx2", "fma", "f16c"}


def named_isa(name: str) -> Isa:
    """The instruction set that a kernel's text was written for."""
    base, *features = name.split("+")
    return having(_BASES[base], features) if features else _BASES[base]


def required(form: Isa) -> tuple[str, ...]:
    """The features that a processor must have to run it, as `ir.detect` names them."""
    base = {AVX512.cpu: _V4 | _V3, AVX2.cpu: _V3, NEON.cpu: {"neon"}}.get(form.cpu, set())
    return tuple(sorted(base.union(*(m.features for m in form.instructions))))


def isa(target: Target | str) -> Isa:
    """The widest form that the target's features allow."""
    features = set((named(target) if isinstance(target, str) else target).features)
    if features >= _V4:
        return having(AVX512, features)
    if features >= _V3:
        return AVX2
    if "neon" in features:
        return NEON
    return SSE if platform.machine().lower() in ("x86_64", "amd64") else PLAIN
