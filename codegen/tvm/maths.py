"""Elementary functions on float32 vectors, as polynomials.

Worst error over all finite float32 arguments, in units in the last place against float64 (a test measures them):
exp 2, exp2 2, log 1, log2 2, log1p 2, expm1 2, tanh 3, sigmoid 3, erf 2, xlogx 2.  exp(-inf) = 0, log(0) = -inf,
log(x < 0) = NaN; NaN stays NaN; results below 2**-126 are rounded as IEEE asks.  float64 vectors, sin, cos and pow
call the C library lane by lane.
The rough forms err by at most 2**-13 (exp, exp2), 2**-12 (sigmoid), relative, and 2**-18, absolute (tanh), where the
result is at least 2**-126: `memcomp.codegen.rough` says where that is enough, the same test measures them.
Coefficients: exp, exp2 and expm1, of which tanh is made, are minimax fits of degree 6 (relative error 5e-9, 2e-8 and
1e-8 before rounding), log is that of Cephes (S. Moshier, 1989), erf are those of N. Juffa's erff.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T
from tvm.target import Target

from memcomp.codegen.tvm.isa import AVX512
from memcomp.codegen.tvm.vocabulary import (
    Value,
    bits,
    cast,
    dtype,
    eq,
    isnan,
    like,
    maximum,
    minimum,
    piece,
    reg,
    select,
    splat,
    width,
)

_EXP = (1.0, 1.0, 0.4999999403953552, 0.16666515171527863, 0.04166845604777336, 0.008369418792426586,
        0.0013813144760206342)
_EXP2 = (1.0, 0.6931471824645996, 0.24022647738456726, 0.055503323674201965, 0.00961843691766262,
         0.0013398875016719103, 0.00015353361959569156)
_LOG = (3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1, -1.2420140846e-1,
        1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2)
# 2**r for |r| <= 1/2 within 2**-13.7 and 2**-18.5, relative
_ROUGH = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)
_FINER = (0.9999992847442627, 0.6931217908859253, 0.240247443318367, 0.05591785907745361, 0.009570102207362652)
_LESS_ONE = (0.4999999701976776, 0.1666654348373413, 0.04166720062494278, 0.008366547524929047, 0.0013882516650483012)
_ERF_NEAR = (1.28379166e-1, -3.76125336e-1, 1.12819925e-1, -2.67681349e-2, 4.99119423e-3, -5.96761703e-4)
# ln 2 in two parts; the first has nine bits, so that its product with an exponent is exact without fused multiply-add
_LN2_HIGH, _LN2_LOW, _LOG2_E = 0.693359375, -2.12194440e-4, 1.4426950408889634


def _poly(x: Value, low_to_high: tuple[float, ...]) -> Value:
    p = like(x, low_to_high[-1])
    for c in reversed(low_to_high[:-1]):
        p = p * x + like(x, c)
    return p


def _scaled(p: Value, n: Value) -> Value:
    """p * 2**n for n in -252 .. 254 by two powers; the first product is exact, so subnormals are rounded once."""
    n = reg(cast("int32", n))
    half = reg(n >> tirx.const(1, "int32"))

    def power(k: Value) -> Value:
        return bits((k + tirx.const(127, "int32")) << tirx.const(23, "int32"), "float32")

    return p * power(half) * power(n - half)


def _scaled_at_once(p: Value, n: Value) -> Value:
    """The same by the AVX-512 instruction made for it."""
    parts = []
    for k in range(0, width(p), 16):
        a, b = (x if width(p) == 16 else reg(piece(x, k, 16)) for x in (reg(p), n))
        none = splat(like(a, 0.0), 16)
        parts.append(reg(T.call_llvm_intrin("float32x16", "llvm.x86.avx512.mask.scalef.ps.512", a, b, none,
                                            tirx.const(-1, "int16"), tirx.const(4, "int32"))))
    return parts[0] if len(parts) == 1 else T.Shuffle(parts, list(range(width(p))))


def _wide() -> bool:
    """Is the text being compiled for AVX-512?"""
    target = Target.current(allow_none=True)
    return target is not None and target.attrs.get("mcpu", "") == AVX512.cpu


def _power(p: Value, n: Value) -> Value:
    return _scaled_at_once(p, n) if _wide() and width(p) % 16 == 0 else _scaled(p, n)


def exp(x: Value) -> Value:
    if dtype(x) != "float32":
        return T.exp(x)
    x = reg(minimum(maximum(x, like(x, -104.0)), like(x, 89.0)))  # beyond: 0 and inf all the same
    n = reg(T.nearbyint(x * like(x, _LOG2_E)))
    r = reg(x - n * like(x, _LN2_HIGH) - n * like(x, _LN2_LOW))
    return reg(_power(_poly(r, _EXP), n))


def exp2(x: Value) -> Value:
    if dtype(x) != "float32":
        return T.exp2(x)
    x = reg(minimum(maximum(x, like(x, -151.0)), like(x, 129.0)))
    n = reg(T.nearbyint(x))
    return reg(_power(_poly(reg(x - n), _EXP2), n))


def _rough_power(x: Value, coefficients: tuple[float, ...], least: float, most: float) -> Value:
    x = reg(minimum(maximum(x, like(x, least)), like(x, most)))
    n = reg(T.nearbyint(x))
    return reg(_power(_poly(reg(x - n), coefficients), n))


def rough_exp2(x: Value) -> Value:
    return _rough_power(x, _ROUGH, -151.0, 129.0)


def rough_exp(x: Value) -> Value:
    return rough_exp2(x * like(x, _LOG2_E))


def _inverse(x: Value, steps: int) -> Value:
    """1 / x for x >= 1: within 2**-14 and, after a step, 2**-23 where the machine has an instruction for that."""
    if not _wide() or width(x) % 16:
        return like(x, 1.0) / x
    parts = []
    for k in range(0, width(x), 16):
        a = x if width(x) == 16 else reg(piece(x, k, 16))
        parts.append(reg(T.call_llvm_intrin("float32x16", "llvm.x86.avx512.rcp14.ps.512", a,
                                            splat(like(a, 0.0), 16), tirx.const(-1, "int16"))))
    r = parts[0] if len(parts) == 1 else reg(T.Shuffle(parts, list(range(width(x)))))
    for _ in range(steps):
        r = reg(r * (like(x, 2.0) - x * r))
    return r


def rough_sigmoid(x: Value) -> Value:
    e = _rough_power(x * like(x, -_LOG2_E), _ROUGH, -126.0, 127.0)
    return _inverse(reg(e + like(x, 1.0)), 0)


def rough_tanh(x: Value) -> Value:
    e = _rough_power(x * like(x, 2 * _LOG2_E), _FINER, -30.0, 30.0)  # beyond: -1 and 1 all the same
    return reg(like(x, 1.0) - like(x, 2.0) * _inverse(reg(e + like(x, 1.0)), 1))


def _split(x: Value) -> tuple[Value, Value, Value, Value]:
    """(f, s, e, c) with x = (1 + f) * 2**e, 1 + f in [sqrt(1/2), sqrt(2)), s = f*f and log(1 + f) = f - s/2 + c."""
    tiny = reg(select(x < like(x, 2.0**-126), like(x, 1.0), like(x, 0.0)))
    x = reg(select(x < like(x, 2.0**-126), x * like(x, 2.0**23), x))
    b = reg(bits(x))
    e = reg((b - tirx.const(0x3F3504F3, "int32")) >> tirx.const(23, "int32"))
    f = reg(bits(b - (e << tirx.const(23, "int32")), "float32") - like(x, 1.0))
    s = reg(f * f)
    return f, s, reg(cast("float32", e) - tiny * like(x, 23.0)), reg(f * s * _poly(f, _LOG))


def _log_edges(x: Value, y: Value) -> Value:
    y = select(eq(x, like(x, 0.0)), like(x, -float("inf")), y)
    y = select(eq(x, like(x, float("inf"))), x, y)
    return reg(select(x < like(x, 0.0), like(x, float("nan")), select(isnan(x), x, y)))


def log(x: Value) -> Value:
    if dtype(x) != "float32":
        return T.log(x)
    x = reg(x)
    f, s, e, c = _split(x)
    small = c + e * like(x, _LN2_LOW) - s * like(x, 0.5)
    return _log_edges(x, reg(f + small + e * like(x, _LN2_HIGH)))


def log2(x: Value) -> Value:
    if dtype(x) != "float32":
        return T.log2(x)
    x = reg(x)
    f, s, e, c = _split(x)
    rest = reg(c - s * like(x, 0.5))
    fraction = like(x, _LOG2_E - 1.0)  # log2(e) = 1 + fraction: the leading terms stay exact
    return _log_edges(x, reg((rest * fraction + f * fraction + rest) + f + e))


def log1p(x: Value) -> Value:
    x = reg(x)
    u = reg(x + like(x, 1.0))
    lost = reg(select(x < like(x, 2.0**24), (x - (u - like(x, 1.0))) / u, like(x, 0.0)))  # what rounding took from u
    return reg(select(eq(u, like(x, 1.0)), x, log(u) + select(u > like(x, 0.0), lost, like(x, 0.0))))


def _less_one(x: Value) -> Value:
    """e**x - 1 for |x| <= 20, without cancellation: 2**n * (e**r - 1) + (2**n - 1)."""
    n = reg(T.nearbyint(x * like(x, _LOG2_E)))
    r = reg(x - n * like(x, _LN2_HIGH) - n * like(x, _LN2_LOW))
    power = reg(bits((cast("int32", n) + tirx.const(127, "int32")) << tirx.const(23, "int32"), "float32"))
    q = reg(r * r * _poly(r, _LESS_ONE) + r)
    return reg(power * q + (power - like(x, 1.0)))


def expm1(x: Value) -> Value:
    x = reg(x)
    near = _less_one(reg(minimum(maximum(x, like(x, -20.0)), like(x, 20.0))))
    return reg(select(x < like(x, 20.0), near, exp(x) - like(x, 1.0)))


def tanh(x: Value) -> Value:
    if dtype(x) != "float32":
        return T.tanh(x)
    e = _less_one(reg(minimum(maximum(x + x, like(x, -20.0)), like(x, 20.0))))
    return reg(e / (e + like(x, 2.0)))


def sigmoid(x: Value) -> Value:
    x = reg(x)
    e = reg(exp(like(x, 0.0) - T.abs(x)))  # at most 1: neither tail overflows
    return reg(select(x < like(x, 0.0), e, like(x, 1.0)) / (like(x, 1.0) + e))


def erf(x: Value) -> Value:
    if dtype(x) != "float32":
        return T.erf(x)
    x = reg(x)
    t, s = reg(T.abs(x)), reg(x * x)
    clipped = reg(minimum(t, like(x, 4.0)))
    square = reg(clipped * clipped)
    high = clipped * like(x, -1.72853470e-5) + like(x, 3.83197126e-4)
    low = clipped * like(x, -3.88396438e-3) + like(x, 2.42546219e-2)
    r = reg(high * square + low)
    for c in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = reg(r * clipped + like(x, c))
    far = like(x, 1.0) - exp(r * clipped - clipped)
    near = x * _poly(s, _ERF_NEAR) + x
    sign = bits(x) & tirx.const(-(2**31), "int32")
    return reg(select(t > like(x, 0.921875), bits(bits(far) | sign, "float32"), near))


def xlogx(x: Value) -> Value:
    x = reg(x)
    return reg(select(eq(x, like(x, 0.0)), like(x, 0.0), x * log(x)))


# one name per row of `ir.ops` that is not spelled with an operator
FUNCTIONS: dict[str, Callable[..., Value]] = {
    "exp": exp, "exp2": exp2, "log": log, "log2": log2, "tanh": tanh, "sigmoid": sigmoid, "erf": erf, "xlogx": xlogx,
    "log1p": log1p, "expm1": expm1, "rough_exp": rough_exp, "rough_exp2": rough_exp2, "rough_sigmoid": rough_sigmoid,
    "rough_tanh": rough_tanh,
    "sqrt": lambda x: T.sqrt(x), "rsqrt": lambda x: like(x, 1.0) / T.sqrt(x), "recip": lambda x: like(x, 1.0) / x,
    "sin": lambda x: T.sin(x), "cos": lambda x: T.cos(x), "pow": lambda x, y: T.pow(x, y),
    "floor": lambda x: T.floor(x), "round": lambda x: T.nearbyint(x), "absolute": lambda x: T.abs(x),
}
