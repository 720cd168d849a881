"""Codes that are places in a table: one number a code (NF4, Lloyd-Max), or a vector of neighbours (CQ)."""

from __future__ import annotations

import math

from memcomp.ir.errors import OptionError, Refusal, nearest
from memcomp.passes.kv.codecs import pack
from memcomp.passes.kv.codecs.affine import SCALES, greatest, held, of, quotient, shared
from memcomp.passes.kv.codecs.codec import Codec, Plane, Table, make

# 16 levels of equal shares of a normal distribution, its greatest at 1 (QLoRA, appendix E)
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
NAMED = ("nf4", "normal", "given")
NORMS = ("absmax", "rms")


def lloyd_max(bits: int, rounds: int = 2000) -> tuple[float, ...]:
    """The levels of least square error for a normal number of variance 1 (Lloyd, Max): each the mean of what is nearest
    to it."""
    n = 2**bits

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    levels = [2.0 * (2 * k + 1 - n) / n for k in range(n)]
    for _ in range(rounds):
        ends = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
        levels = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in zip(ends, ends[1:], strict=False)]
    return tuple(levels)


def lut(*, bits: int = 4, group: int = 64, table: str = "nf4", norm: str = "absmax", scale: str = "f16", share: int = 0,
        stride: int = 1, word: str = "u8") -> Codec:
    """x = T[q] s, T rising; the nearest level by the middles of neighbours, below it what lies on one.

    table: "nf4", "normal" (Lloyd-Max levels of a normal distribution) or "given"; norm: s = max |x| or the root of the
    mean square.
    """
    for what, got, known in (("table", table, NAMED), ("norm", norm, NORMS), ("scale", scale, SCALES)):
        if got not in known:
            raise OptionError(f"lut knows no {what} {got!r}", hint=nearest(got, known))
    if table == "nf4" and bits != 4:
        raise Refusal(f"NF4 has 16 levels, not {2**bits}", hint="bits=4")
    n, parts = shared(group, share), pack.packed(bits, group, stride, word)
    s = f"S[r, {of(n, group)}]"
    values = {"nf4": NF4, "normal": lloyd_max(bits) if table == "normal" else (), "given": None}[table]
    size = greatest(n) if norm == "absmax" else (
        f"D[r, sw] = sum{{se}} square(X[r, sw * {n} + se])\nA[r, sw] = sqrt(D[r, sw] / {n}.0)\n")
    text = (f"{size}S[r, sw] = {held('A[r, sw]', scale)}\nZ[r, g] = {quotient('X[r, g]', s)}\n"
            "C[r, g] = sum{te} where(Z[r, g] > as_f32(as_f32(T[te] + T[te + 1]) / 2.0), 1, 0)\n"
            + pack.writes(parts, "C"))
    said = {"bits": bits, "group": group, "table": table, "norm": norm, "scale": scale, "share": share,
            "stride": stride, "word": word}
    return make("lut", said, group, (*pack.planes(parts), Plane("S", scale, group // n)),
                f"T[{pack.code(parts)}] * {s}", text, ranks={"SE": n, "TE": 2**bits - 1} | pack.ranks(parts),
                tables=(Table("T", "f32", (2**bits,), values),),
                temps="A[R, SW]: f32; Z: f32; C: i32" + ("; D[R, SW]: f32" if norm == "rms" else ""))


def vq(*, bits: int = 8, width: int = 4, group: int = 64, stride: int = 1, word: str = "u8") -> Codec:
    """CQ: `width` neighbours share one code of `bits` bits; a table of 2**bits vectors for each of them, T[place, code,
    element].  The nearest vector by squared distance, of equal ones the first."""
    if width < 1 or group % width:
        raise Refusal(f"groups of {group} elements do not hold whole vectors of {width}")
    count = group // width
    parts = pack.packed(bits, count, stride, word)
    text = ("D[r, v, t1] = sum{t2} square(X[r, v * " + f"{width} + t2] - T[v, t1, t2])\n"
            "A[r, v], C[r, v] = argmin{t1} D[r, v, t1]\n" + pack.writes(parts, "C"))
    return make("vq", {"bits": bits, "width": width, "group": group, "stride": stride, "word": word}, group,
                pack.planes(parts), f"T[g // {width}, {pack.code(parts, f'(g // {width})')}, g % {width}]", text,
                ranks={"V": count} | pack.ranks(parts), tables=(Table("T", "f32", (count, 2**bits, width)),),
                temps="D[R, V, T1]: f32; A[R, V]: f32; C[R, V]: i64")
