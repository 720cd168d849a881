"""Small floating-point numbers: plain casts, fp8 with a scale, MXFP4/6/8 with powers of two, NVFP4 with fp8 scales."""

from __future__ import annotations

from memcomp.ir.errors import OptionError, Refusal, nearest
from memcomp.passes.kv.codecs import minifloat, pack
from memcomp.passes.kv.codecs.affine import SCALES, greatest, held, of, quotient, shared
from memcomp.passes.kv.codecs.codec import Codec, Plane, Table, make
from memcomp.passes.kv.codecs.minifloat import E2M1, E4M3, FORMATS, Minifloat


def cast(dtype: str, group: int) -> Codec:
    """Numbers as they are, rounded to `dtype`."""
    return make(dtype, {"group": group}, group, (Plane("Q", dtype, group),), "Q[r, g]", "Q[r, qw] = X[r, qw]\n")


def _format(name: str, known: tuple[str, ...]) -> Minifloat:
    if name not in known:
        raise OptionError(f"unknown format {name!r}", hint=nearest(name, known))
    return FORMATS[name]


def _stored(f: Minifloat, group: int, stride: int, ties: str = "even"
            ) -> tuple[pack.Packed | None, Plane, str, str, str]:
    """Packing, plane, text of an element's code, statements from Z, temporaries."""
    text = minifloat.codes(f, "Z", "r, g", "C", ties)
    if f.bits != 4:
        return None, Plane("Q", "u8", group), "Q[r, g]", f"{text}Q[r, qw] = C[r, qw]\n", minifloat.temps("C")
    p = pack.Packed("Q", 4, group, stride)
    return p, p.plane, p.read(), text + p.write("C"), minifloat.temps("C")


def fp8(*, format: str = "e4m3", group: int = 64, scale: str = "f32", share: int = 0) -> Codec:
    """x = q s, s = max |x| / 448 (57,344 for e5m2), one for `share` elements.

    scale "static": s is a table of one number, and what exceeds it saturates; "none": s is 1.
    """
    f = _format(format, ("e4m3", "e5m2"))
    if scale not in (*SCALES, "static", "none"):
        raise OptionError(f"fp8 knows no scale of {scale!r}", hint=nearest(scale, (*SCALES, "static", "none")))
    n = shared(group, share)
    said = {"format": format, "group": group, "scale": scale, "share": share}
    _, plane, code, writes, temps = _stored(f, group, 1)
    number, temps = f.number(code), f"{temps}; C: i32; Z: f32"
    if scale in ("none", "static"):
        fixed = (Table("S", "f32", (1,)),) if scale == "static" else ()
        x, value = ("X[r, g] / S[0]", f"{number} * S[0]") if fixed else ("X[r, g]", number)
        return make("fp8", said, group, (plane,), value, f"Z[r, g] = {x}\n{writes}", temps=temps, tables=fixed)
    s = f"S[r, {of(n, group)}]"
    text = (f"{greatest(n)}D[r, sw] = A[r, sw] / {f.greatest!r}\nS[r, sw] = {held('D[r, sw]', scale)}\n"
            f"Z[r, g] = {quotient('X[r, g]', s)}\n{writes}")
    return make("fp8", said, group, (plane, Plane("S", scale, group // n)), f"{number} * {s}", text, ranks={"SE": n},
                temps=f"{temps}; A[R, SW]: f32; D[R, SW]: f32")


def mx(*, format: str = "e2m1", group: int = 32, share: int = 0, stride: int = 1) -> Codec:
    """OCP microscaling: x = q 2**(E - 127), E = floor(log2(max |x|)) less the greatest exponent of the format; rounded
    to nearest even, saturated.  format: e2m1 (MXFP4), e4m3 and e5m2 (MXFP8), e2m3 and e3m2 (MXFP6, a byte each)."""
    f, n = _format(format, tuple(FORMATS)), shared(group, share)
    most = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15}[f.name]
    part, plane, code, writes, temps = _stored(f, group, stride)
    text = (greatest(n) + minifloat.exponent("A", "r, sw", "K", -127)
            + f"S[r, sw] = int(max(K[r, sw] - {most}.0, -127.0)) + 127\n"
            f"Z[r, g] = X[r, g] * exp2(real(127 - S[r, {of(n, group)}]))\n{writes}")
    return make("mx", {"format": format, "group": group, "share": share, "stride": stride}, group,
                (plane, Plane("S", "u8", group // n)), f"{f.number(code)} * exp2(real(S[r, {of(n, group)}] - 127))",
                text, ranks={"SE": n} | (part.ranks if part else {}),
                temps=f"{temps}; C: i32; Z: f32; A[R, SW]: f32; K[R, SW]: f32; KL[R, SW]: f32; KP[R, SW]: f32")


def ggml_mxfp4() -> Codec:
    """ggml's block of MXFP4: the exponent first, element j in the low and j + 16 in the high bits of a byte; ties go to
    the level nearer to 0, and the logarithm of the greatest magnitude is rounded to f32 before it is cut."""
    p = pack.Packed("Q", 4, 32, 16)
    text = (greatest(32) + "L[r, sw] = log2(max(A[r, sw], 2.350988701644575e-38))\n"
            "S[r, sw] = where(A[r, sw] > 0.0, int(max(floor(L[r, sw]) + 125.0, 0.0)), 0)\n"
            "Z[r, g] = X[r, g] * exp2(real(127 - S[r, 0]))\n"
            + minifloat.codes(E2M1, "Z", "r, g", "C", "zero") + p.write("C"))
    return make("ggml_mxfp4", {}, 32, (Plane("S", "u8", 1), p.plane),
                f"{E2M1.number(p.read())} * exp2(real(S[r, 0] - 127))", text, ranks={"SE": 32} | p.ranks,
                temps=f"{minifloat.temps('C')}; C: i32; Z: f32; A[R, SW]: f32; L[R, SW]: f32")


def nvfp4(*, group: int = 16, share: int = 16, stride: int = 1, tensor: bool = True) -> Codec:
    """x = q s t: e2m1 with an e4m3 scale for `share` elements, s = max |x| / (6 t), and a number t of the whole tensor
    (a table T, where `tensor`; else 1).  Scales and numbers are rounded to nearest even, by the scale as it is stored.
    """
    if share < 1 or group % share:
        raise Refusal(f"groups of {group} elements do not hold whole shares of {share}")
    p = pack.Packed("Q", 4, group, stride)
    s = E4M3.number(f"S[r, {of(share, group)}]", sign=False)
    fixed = (Table("T", "f32", (1,)),) if tensor else ()
    whole = "D[r, sw] = A[r, sw] / 6.0\n" + ("B[r, sw] = D[r, sw] / T[0]\n" if fixed else "B[r, sw] = D[r, sw]\n")
    text = (greatest(share) + whole + minifloat.codes(E4M3, "B", "r, sw", "S", signed=False)
            + f"Y[r, g] = {s}{' * T[0]' if fixed else ''}\nZ[r, g] = {quotient('X[r, g]', 'Y[r, g]')}\n"
            + minifloat.codes(E2M1, "Z", "r, g", "C") + p.write("C"))
    return make("nvfp4", {"group": group, "share": share, "stride": stride, "tensor": tensor}, group,
                (p.plane, Plane("S", "u8", group // share)),
                f"{E2M1.number(p.read())} * ({s})" + (" * T[0]" if fixed else ""), text, tables=fixed,
                ranks={"SE": share} | p.ranks,
                temps=f"{minifloat.temps('C')}; {minifloat.temps('S', 'R, SW')}; C: i32; Y: f32; Z: f32; "
                      "A[R, SW]: f32; B[R, SW]: f32; D[R, SW]: f32")


def ggml_nvfp4() -> Codec:
    """ggml's block of NVFP4: 64 elements, four scales first, each of 16 elements, j in the low and j + 8 in the high
    bits of a byte; scales are rounded to nearest, halves away from zero; those below the normal numbers stay below, and
    those of 256 and more become 448."""
    p = pack.Packed("Q", 4, 64, 8)
    s = E4M3.number("S[r, g // 16]", sign=False)
    text = (greatest(16) + "B[r, sw] = A[r, sw] / 6.0\n"
            + minifloat.codes(E4M3, "B", "r, sw", "V", "away", signed=False)
            + "S[r, sw] = where(B[r, sw] < 0.015625, min(V[r, sw], 7), where(V[r, sw] >= 120, 126, V[r, sw]))\n"
            f"Y[r, g] = {s}\nZ[r, g] = {quotient('X[r, g]', 'Y[r, g]')}\n"
            + minifloat.codes(E2M1, "Z", "r, g", "C", "zero") + p.write("C"))
    return make("ggml_nvfp4", {}, 64, (Plane("S", "u8", 4), p.plane), f"{E2M1.number(p.read())} * ({s})", text,
                ranks={"SE": 16} | p.ranks,
                temps=f"{minifloat.temps('C')}; {minifloat.temps('V', 'R, SW')}; C: i32; V[R, SW]: i32; Y: f32; "
                      "Z: f32; A[R, SW]: f32; B[R, SW]: f32")
