"""Numbers of few bits as integer codes: sign, exponent, mantissa; reading and rounding them by integer arithmetic.

A code stands for (mantissa + 2**bits below the exponent, unless that is 0) << (exponent - 1), times the least number.
NaN and infinity have no meaning here: writing saturates, so no codec stores them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Minifloat:
    """Bits of exponent and mantissa, the exponent's bias, the greatest number."""

    name: str
    exponent: int
    mantissa: int
    bias: int
    greatest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> float:
        """The least positive number."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa)

    def whole(self, code: str) -> str:
        """Text of |number| / least, an integer; exact in f32."""
        m, one = self.mantissa, 2**self.mantissa
        e = f"({code} >> {m} & {2**self.exponent - 1})"
        return f"((({code} & {one - 1}) + where({e} > 0, {one}, 0)) << max({e} - 1, 0))"

    def signed(self, code: str) -> str:
        """Text of number / least."""
        return f"{self.whole(code)} * (1 - ({code} >> {self.bits - 1} & 1) * 2)"

    def number(self, code: str, sign: bool = True) -> str:
        """Text of the number."""
        return f"real({self.signed(code) if sign else self.whole(code)}) * {self.least!r}"


E4M3 = Minifloat("e4m3", 4, 3, 7, 448.0)
E5M2 = Minifloat("e5m2", 5, 2, 15, 57344.0)
E2M1 = Minifloat("e2m1", 2, 1, 1, 6.0)
E2M3 = Minifloat("e2m3", 2, 3, 1, 7.5)
E3M2 = Minifloat("e3m2", 3, 2, 3, 28.0)
F16 = Minifloat("f16", 5, 10, 15, 65504.0)
FORMATS = {f.name: f for f in (E4M3, E5M2, E2M1, E2M3, E3M2)}

_ROUNDING = {"even": "round({0})", "zero": "-floor(0.5 - {0})", "away": "floor({0} + 0.5)"}


def exponent(of: str, index: str, out: str, least: int) -> str:
    """Statements: out[index] = floor(log2(of[index])), at least `least`, exact for every rounding of log2.

    They use out + "L" and out + "P", f32 like out.
    """
    x = f"max({of}[{index}], {math.ldexp(1.0, least)!r})"
    low, power = f"{out}L[{index}]", f"{out}P[{index}]"
    return (f"{low} = floor(log2({x}))\n{power} = exp2({low})\n"
            f"{out}[{index}] = {low} - where({power} > {x}, 1.0, 0.0) + where(exp2({low} + 1.0) <= {x}, 1.0, 0.0)\n")


def codes(f: Minifloat, of: str, index: str, out: str, ties: str = "even", signed: bool = True) -> str:
    """Statements: out[index] = the code of of[index], rounded to nearest and saturated.

    ties: "even", "away" or towards "zero"; the last also gives what rounds to 0 no sign.  They use out + "A", "E",
    "EL", "EP", f32, and out + "M", i32.
    """
    a, e, m = f"{out}A[{index}]", f"{out}E[{index}]", f"{out}M[{index}]"
    low, top = 1 - f.bias, math.frexp(f.greatest)[1] - 1
    text = f"{a} = min(abs({of}[{index}]), {f.greatest!r})\n"
    if top - low <= 2:
        text += f"{e} = {low}.0" + "".join(f" + where({a} >= {math.ldexp(1.0, k)!r}, 1.0, 0.0)"
                                           for k in range(low + 1, top + 1)) + "\n"
    else:
        text += exponent(f"{out}A", index, f"{out}E", low)
    steps = _ROUNDING[ties].format(f"{a} * exp2({f.mantissa}.0 - {e})")
    text += f"{m} = int({steps} + ({e} + {f.bias - 1}.0) * {2**f.mantissa}.0)\n"
    if not signed:
        return f"{text}{out}[{index}] = {m}\n"
    x = f"{of}[{index}]"
    minus = f"{x} < 0.0 and {m} > 0" if ties == "zero" else f"{x} < 0.0 or {x} == 0.0 and recip({x}) < 0.0"
    return f"{text}{out}[{index}] = {m} + where({minus}, {2**(f.bits - 1)}, 0)\n"


def temps(out: str, ranks: str = "R, G") -> str:
    """Declarations of what `codes` uses, out itself left aside."""
    return "; ".join(f"{out}{k}[{ranks}]: {'i32' if k == 'M' else 'f32'}" for k in ("A", "E", "EL", "EP", "M"))
