"""Codes of few bits in words: which word and which bits of it hold the code of an element, and how words are made.

A word holds k codes that are `stride` elements apart, the first in the low bits: stride 1 packs neighbours, half the
group packs halves, 16 is ggml's `j` with `j + 16`.  Widths that do not divide a word are split over planes: 5 bits are
4 and 1, 3 are 2 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from memcomp.ir.errors import Refusal
from memcomp.passes.kv.codecs.codec import Plane, rank_of

WORDS = {"u8": 8, "i32": 32}


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes of `bits` bits, `shift` bits up in the whole code, in the plane `name`, of `count` elements a group."""

    name: str
    bits: int
    count: int
    stride: int = 1
    word: str = "u8"
    shift: int = 0

    def __post_init__(self) -> None:
        if self.word not in WORDS or self.bits not in (1, 2, 4, 8):
            raise Refusal(f"codes of {self.bits} bits in words of {self.word}", hint="1, 2, 4, 8 bits in u8 or i32")
        span = self.each * self.stride
        if self.stride < 1 or self.count % span:
            raise Refusal(f"{self.count} codes of {self.bits} bits do not fill words of {self.word} whose codes are "
                          f"{self.stride} apart", hint=f"a multiple of {span} elements")

    @property
    def each(self) -> int:
        """Codes of a word."""
        return WORDS[self.word] // self.bits

    @property
    def plane(self) -> Plane:
        return Plane(self.name, self.word, self.count // self.each)

    @property
    def ranks(self) -> dict[str, int]:
        return {f"{self.name}K": self.each} if self.each > 1 else {}

    def read(self, g: str = "g") -> str:
        """The text of an element's code."""
        k, d = self.each, self.stride
        if k == 1:
            return f"{self.name}[r, {g}]"
        at = f"{g} // {k}" if d == 1 else f"{g} // {k * d} * {d} + {g} % {d}"
        slot = f"{g} % {k}" if d == 1 else f"{g} % {k * d} // {d}"
        shift = f"({slot} * {self.bits})" if self.bits > 1 else f"({slot})"
        return f"({self.name}[r, {at}] >> {shift} & {2**self.bits - 1})"

    def write(self, codes: str) -> str:
        """The statement that makes the words of a tensor of whole codes [R, elements]."""
        k, d, w = self.each, self.stride, rank_of(self.name).lower()
        slot = f"{self.name.lower()}k"
        g = w if k == 1 else f"{w} * {k} + {slot}" if d == 1 else f"{w} // {d} * {k * d} + {slot} * {d} + {w} % {d}"
        code = f"{codes}[r, {g}]"
        if self.shift:
            code = f"({code} >> {self.shift})"
        if k == 1:
            return f"{self.name}[r, {w}] = {code} & {2**self.bits - 1}\n"
        code = f"({code} & {2**self.bits - 1})"
        if self.word == "i32":   # the highest code holds the sign
            code = f"({code} - where({slot} == {k - 1} and {code} >= {2**(self.bits - 1)}, {2**self.bits}, 0))"
        return f"{self.name}[r, {w}] = sum{{{slot}}} {code} * (1 << ({slot} * {self.bits}))\n"


def packed(bits: int, count: int, stride: int = 1, word: str = "u8", names: str = "QHI") -> tuple[Packed, ...]:
    """The planes of codes of any width up to 8 bits, low bits first."""
    widths = [b for b in (8, 4, 2, 1) if bits & b]
    if not widths or bits > 8:
        raise Refusal(f"codes of {bits} bits", hint="1 to 8")
    out, shift = [], 0
    for name, b in zip(names, widths, strict=False):
        out.append(Packed(name, b, count, stride, word, shift))
        shift += b
    return tuple(out)


def code(parts: tuple[Packed, ...], g: str = "g") -> str:
    """The text of the whole code of an element."""
    said = [p.read(g) + (f" * {2**p.shift}" if p.shift else "") for p in parts]
    return said[0] if len(said) == 1 else f"({' + '.join(said)})"


def planes(parts: tuple[Packed, ...]) -> tuple[Plane, ...]:
    return tuple(p.plane for p in parts)


def writes(parts: tuple[Packed, ...], codes: str) -> str:
    return "".join(p.write(codes) for p in parts)


def ranks(parts: tuple[Packed, ...]) -> dict[str, int]:
    return {r: n for p in parts for r, n in p.ranks.items()}
