"""The blocks of ggml: 32 elements, an f16 scale d first; element j in the low and j + 16 in the high bits of a byte.

Encoding follows `gguf.quants` (numpy), which is bit for bit what ggml's C reference does, but for q4_0 and q5_0: there
x / d + 8.5 is one rounding where the C compiler fuses the two operations and two where it does not; here it is two, as
in gguf.  The order of the sums of iq4_nl is that of no definition; here they are exact.
"""

from __future__ import annotations

from memcomp.passes.kv.codecs import pack
from memcomp.passes.kv.codecs.affine import extremes, greatest
from memcomp.passes.kv.codecs.codec import Codec, Plane, Table, make

BLOCK = 32
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_D = Plane("S", "f16", 1)
_INVERSE = "I[r, sw] = where(D[r, sw] == 0.0, 0.0, 1.0 / D[r, sw])\nS[r, sw] = D[r, sw]\nZ[r, g] = X[r, g] * I[r, 0]\n"
# the element of greatest magnitude, the first of equal ones, with its sign
_SIGNED = "A[r, sw], AT[r, sw] = argmax{se} abs(X[r, se])\nB[r, sw] = X[r, AT[r, sw]]\n"


def _parts(bits: int) -> tuple[pack.Packed, ...]:
    low = pack.Packed("Q", 4, BLOCK, 16)
    return (low,) if bits == 4 else (low, pack.Packed("H", 1, BLOCK, 1, "u8", 4))


def _stored(parts: tuple[pack.Packed, ...], *scales: Plane) -> tuple[Plane, ...]:
    return (*scales, *reversed(pack.planes(parts)))


def _temps(*scales: str) -> str:
    return "; ".join([*(f"{t}[R, SW]: f32" for t in scales), "Z: f32", "T: f32", "C: i32"])


def q8_0() -> Codec:
    """x = q d, d = max |x| / 127, q rounded to nearest, halves away from zero."""
    text = (f"{greatest(BLOCK)}D[r, sw] = A[r, sw] / 127.0\n{_INVERSE}T[r, g] = abs(Z[r, g])\n"
            "V[r, g] = T[r, g] - floor(T[r, g])\nC[r, g] = int(floor(T[r, g]) + floor(2.0 * V[r, g]))\n"
            "Q[r, qw] = where(Z[r, qw] < 0.0, -C[r, qw], C[r, qw])\n")
    return make("q8_0", {}, BLOCK, (_D, Plane("Q", "i8", BLOCK)), "Q[r, g] * S[r, 0]", text, ranks={"SE": BLOCK},
                temps=f"{_temps('A', 'D', 'I')}; V: f32")


def _signed(bits: int) -> Codec:
    half, parts = 2**(bits - 1), _parts(bits)
    text = (f"{_SIGNED}D[r, sw] = B[r, sw] / -{half}.0\n{_INVERSE}T[r, g] = Z[r, g] + {half}.5\n"
            f"C[r, g] = int(min(max(T[r, g], 0.0), {2 * half - 1}.0))\n{pack.writes(parts, 'C')}")
    return make(f"q{bits}_0", {}, BLOCK, _stored(parts, _D), f"({pack.code(parts)} - {half}) * S[r, 0]", text,
                ranks={"SE": BLOCK} | pack.ranks(parts), temps=f"{_temps('A', 'B', 'D', 'I')}; AT[R, SW]: i64")


def q4_0() -> Codec:
    """x = (q - 8) d, d = the element of greatest magnitude / -8."""
    return _signed(4)


def q5_0() -> Codec:
    """x = (q - 16) d, d = the element of greatest magnitude / -16; the fifth bits in four bytes."""
    return _signed(5)


def _affine(bits: int) -> Codec:
    most, parts = 2**bits - 1, _parts(bits)
    inverse = _INVERSE.replace("X[r, g]", "Y[r, g]")
    text = (f"{extremes(BLOCK)}E[r, sw] = MX[r, sw] - MN[r, sw]\nD[r, sw] = E[r, sw] / {most}.0\n"
            f"Y[r, g] = X[r, g] - MN[r, 0]\n{inverse}M[r, mw] = MN[r, mw]\nT[r, g] = Z[r, g] + 0.5\n"
            f"C[r, g] = int(min(max(T[r, g], 0.0), {most}.0))\n{pack.writes(parts, 'C')}")
    return make(f"q{bits}_1", {}, BLOCK, _stored(parts, _D, Plane("M", "f16", 1)),
                f"{pack.code(parts)} * S[r, 0] + M[r, 0]", text, ranks={"SE": BLOCK} | pack.ranks(parts),
                temps=f"{_temps('MN', 'MX', 'E', 'D', 'I')}; Y: f32")


def q4_1() -> Codec:
    """x = q d + m, d = (max - min) / 15, m = min."""
    return _affine(4)


def q5_1() -> Codec:
    """x = q d + m, d = (max - min) / 31, m = min; the fifth bits in four bytes."""
    return _affine(5)


def iq4_nl() -> Codec:
    """x = T[q] d with 16 fixed levels; d first by the element of greatest magnitude, then by least squares weighted by
    x**2, the codes staying (ggml's reference without search)."""
    parts = _parts(4)
    text = (f"{_SIGNED}D[r, sw] = B[r, sw] / {IQ4[0]}.0\n"
            "I[r, sw] = where(A[r, sw] < 1e-15, 0.0, 1.0 / D[r, sw])\nZ[r, g] = X[r, g] * I[r, 0]\n"
            "C[r, g] = sum{te} where(as_f32(Z[r, g] - T[te]) < as_f32(T[te + 1] - Z[r, g]), 0, 1)\n"
            "N[r, sw] = sum{se} square(X[r, se]) * X[r, se] * T[C[r, se]]\n"
            "U[r, sw] = sum{se} square(X[r, se]) * square(T[C[r, se]])\n"
            "S[r, sw] = where(A[r, sw] < 1e-15, 0.0, N[r, sw] / U[r, sw])\n" + pack.writes(parts, "C"))
    return make("iq4_nl", {}, BLOCK, _stored(parts, _D), f"T[{pack.code(parts)}] * S[r, 0]", text,
                ranks={"SE": BLOCK, "TE": 15} | pack.ranks(parts),
                tables=(Table("T", "f32", (16,), tuple(map(float, IQ4))),),
                temps="; ".join([*(f"{t}[R, SW]: f32" for t in "ABDINU"), "AT[R, SW]: i64", "Z: f32", "C: i32"]))
