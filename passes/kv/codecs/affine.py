"""Integers with a scale: x = q * s + min, (q - z) * s, q * s; one scale for `share` elements.

Encoding uses the scale and minimum as they are stored, so that decoding is the nearest level of what is there.
"""

from __future__ import annotations

from memcomp.ir.errors import OptionError, Refusal, nearest
from memcomp.passes.kv.codecs import minifloat, pack
from memcomp.passes.kv.codecs.codec import Codec, Plane, make

MODES = ("min", "zero", "sym")
SCALES = ("f16", "bf16", "f32")


def shared(group: int, share: int) -> int:
    """Elements of a scale; 0 stands for the whole group."""
    n = share or group
    if n < 1 or group % n:
        raise Refusal(f"groups of {group} elements do not hold whole shares of {n}")
    return n


def extremes(n: int) -> str:
    """Statements: MN and MX, the least and the greatest element of each share of n."""
    return f"MN[r, sw] = min{{se}} X[r, sw * {n} + se]\nMX[r, sw] = max{{se}} X[r, sw * {n} + se]\n"


def greatest(n: int) -> str:
    """The statement of A, the greatest |element| of each share of n."""
    return f"A[r, sw] = max{{se}} abs(X[r, sw * {n} + se])\n"


def quotient(x: str, s: str) -> str:
    """x / s, and 0 where s is 0."""
    return f"where({s} == 0.0, 0.0, {x} / {s})"


def held(x: str, scale: str) -> str:
    """A scale or minimum as its format holds it: f16 saturates."""
    return f"max(min({x}, 65504.0), -65504.0)" if scale == "f16" else x


def clip(x: str, least: int, most: int) -> str:
    return f"min(max({x}, {least}.0), {most}.0)"


def integers(*, bits: int = 4, group: int = 32, mode: str = "min", scale: str = "f16", share: int = 0, word: str = "u8",
             stride: int = 1) -> Codec:
    """Affine codes of 1 to 8 bits, rounded to nearest even.

    mode: "min": x = q s + m, s = (max - min) / (2**bits - 1), m = min (KIVI); "zero": x = (q - z) s with an integer z,
    0 being a level (QServe); "sym": x = q s, s = max |x| / (2**(bits-1) - 1), q stored with 2**(bits-1) added to it,
    in 8 bits as i8; of 1 bit: x = s or -s, s = the mean of |x|.  share: elements of a scale (0: all of the group).
    word, stride: packing (`pack`).  Raises Refusal where codes do not fill words.
    """
    if mode not in MODES:
        raise OptionError(f"int knows no mode {mode!r}", hint=nearest(mode, MODES))
    if scale not in SCALES:
        raise OptionError(f"int knows no scale of {scale!r}", hint=nearest(scale, SCALES))
    n, most, half = shared(group, share), 2**bits - 1, 2**(bits - 1)
    parts = pack.packed(bits, group, stride, word)
    q, s, m = pack.code(parts), f"S[r, {of(n, group)}]", f"M[r, {of(n, group)}]"
    codes, planes = pack.writes(parts, "C"), pack.planes(parts)
    more: tuple[Plane, ...] = (Plane("S", scale, group // n),)
    spread = f"E[r, sw] = D[r, sw] / {most}.0\nS[r, sw] = {held('E[r, sw]', scale)}\n"
    if mode == "min":
        more += (Plane("M", scale, group // n),)
        value = f"{q} * {s} + {m}"
        text = (f"{extremes(n)}D[r, sw] = MX[r, sw] - MN[r, sw]\n{spread}M[r, mw] = {held('MN[r, mw]', scale)}\n"
                f"Y[r, g] = X[r, g] - {m}\nZ[r, g] = {quotient('Y[r, g]', s)}\n")
        level = clip("round(Z[r, g])", 0, most)
    elif mode == "zero":
        more += (Plane("M", "u8", group // n),)
        value = f"({q} - {m}) * {s}"
        text = (f"{extremes(n)}D[r, sw] = max(MX[r, sw], 0.0) - min(MN[r, sw], 0.0)\n{spread}"
                f"B[r, sw] = {quotient('-min(MN[r, sw], 0.0)', 'S[r, sw]')}\n"
                f"M[r, mw] = int({clip('round(B[r, mw])', 0, most)})\nZ[r, g] = {quotient('X[r, g]', s)}\n")
        level = clip(f"round(Z[r, g]) + {m}", 0, most)
    elif bits == 1:
        value = f"({q} * 2 - 1) * {s}"
        text = (f"D[r, sw] = sum{{se}} abs(X[r, sw * {n} + se])\nE[r, sw] = D[r, sw] / {n}.0\n"
                f"S[r, sw] = {held('E[r, sw]', scale)}\n")
        level = "where(X[r, g] >= 0.0, 1.0, 0.0)"
    else:
        text = (f"{greatest(n)}E[r, sw] = A[r, sw] / {half - 1}.0\nS[r, sw] = {held('E[r, sw]', scale)}\n"
                f"Z[r, g] = {quotient('X[r, g]', s)}\n")
        level = clip("round(Z[r, g])", -half, half - 1)
        value = f"({q} - {half}) * {s}"
        if bits == 8:
            planes, value, codes = (Plane("Q", "i8", group),), f"Q[r, g] * {s}", "Q[r, qw] = C[r, qw]\n"
        else:
            level += f" + {half}.0"
    said = {"bits": bits, "group": group, "mode": mode, "scale": scale, "share": share, "word": word, "stride": stride}
    per_scale = "; ".join(f"{t}[R, SW]: f32" for t in ("A", "B", "D", "E", "MN", "MX") if f"{t}[r" in text)
    per_element = "; ".join(f"{t}: f32" for t in "YZ" if f"{t}[r" in text)
    return make("int", said, group, (*planes, *more), value, f"{text}C[r, g] = int({level})\n{codes}",
                ranks={"SE": n} | pack.ranks(parts), temps=f"{per_scale}; {per_element}; C: i32")


def of(share: int, group: int) -> str:
    """The index of an element's share."""
    return "0" if share == group else f"g // {share}"


def planes_of(*, bits: int = 8, upper: int = 4, group: int = 128, scale: str = "f16", stride: int = 1,
              word: str = "u8") -> Codec:
    """Affine codes in two planes (QuantSpec): q = U * 2**(bits - upper) + L; the draft reads U, as the middle of its
    level."""
    if not 0 < upper < bits:
        raise Refusal(f"a plane of {upper} of {bits} bits", hint=f"1 to {bits - 1}")
    low = bits - upper
    parts = (pack.Packed("L", low, group, stride, word), pack.Packed("U", upper, group, stride, word, low))
    most = 2**bits - 1
    text = (f"{extremes(group)}D[r, sw] = MX[r, sw] - MN[r, sw]\nE[r, sw] = D[r, sw] / {most}.0\n"
            f"S[r, sw] = {held('E[r, sw]', scale)}\nM[r, mw] = {held('MN[r, mw]', scale)}\n"
            "Y[r, g] = X[r, g] - M[r, 0]\n"
            f"Z[r, g] = {quotient('Y[r, g]', 'S[r, 0]')}\nC[r, g] = int({clip('round(Z[r, g])', 0, most)})\n"
            + pack.writes(parts, "C"))
    said = {"bits": bits, "upper": upper, "group": group, "scale": scale, "stride": stride, "word": word}
    draft = f"({parts[1].read()} * {2**low} + {(2**low - 1) / 2!r}) * S[r, 0] + M[r, 0]"
    return make("planes", said, group, (parts[1].plane, parts[0].plane, Plane("S", scale, 1), Plane("M", scale, 1)),
                f"{pack.code(parts)} * S[r, 0] + M[r, 0]", text, ranks={"SE": group} | pack.ranks(parts),
                temps="MN[R, SW]: f32; MX[R, SW]: f32; D[R, SW]: f32; E[R, SW]: f32; Y: f32; Z: f32; C: i32",
                drafts=(draft,))


def block_float(*, bits: int = 8, group: int = 32, stride: int = 1, word: str = "u8") -> Codec:
    """Block floating point: integer mantissas and one exponent, x = q * 2**(E - 127 - (bits - 2)), rounded to even."""
    if bits < 2:
        raise Refusal(f"block floating point of {bits} bits", hint="2 to 8")
    parts, half = pack.packed(bits, group, stride, word), 2**(bits - 1)
    text = (greatest(group) + minifloat.exponent("A", "r, sw", "K", -126)
            + f"S[r, sw] = int(K[r, sw]) + 127\nZ[r, g] = X[r, g] * exp2({bits - 2}.0 - K[r, 0])\n"
            f"C[r, g] = int({clip('round(Z[r, g])', 1 - half, half - 1)}) + {half}\n" + pack.writes(parts, "C"))
    return make("bfp", {"bits": bits, "group": group, "stride": stride, "word": word}, group,
                (*pack.planes(parts), Plane("S", "u8", 1)),
                f"real({pack.code(parts)} - {half}) * exp2(real(S[r, 0] - {127 + bits - 2}))", text,
                ranks={"SE": group} | pack.ranks(parts),
                temps="A[R, SW]: f32; K[R, SW]: f32; KL[R, SW]: f32; KP[R, SW]: f32; Z: f32; C: i32")
