"""Operands that are codes: integers of at most 8 bits in words of 32, which are taken out where they are multiplied.

A tile that maps make of words which a Load brings, `(K[e//8, t] >> e%8*4 & 15) - 8`, is never filled where nothing but
contractions read it: the words are read where they lie, along the lanes, and shifted and masked in registers.  Which
number stands where is told by evaluating the shifts at each of the neighbours that share words; any order will do.

On pairs, two numbers 16 bits apart become two bf16 at once.  The bits of a code of up to 7 bits, among those of a power
of two, are that power plus the code; one of 8 bits is converted.  Either is exact, and so is what it is too much
(`spare`): as many times the sum of the other operand's numbers, as they are rounded, is taken off the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memcomp.codegen.tvm.access import contiguous, place
from memcomp.codegen.tvm.ahead import ahead
from memcomp.codegen.tvm.writer import Point, Writer, read_tiles
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, substitute, variables, walk
from memcomp.ir.simplify import simplify
from memcomp.ir.tile import Dot, Load, Map, Statement, Store, statements

WORD = "word"   # stands for the number of a word along the contracted dim
BITS = 32
LONGEST = 256   # numbers along the contracted dim
MANTISSA = 7    # bits of a bf16's


@dataclass(frozen=True, slots=True)
class Field:
    """A number in a word: (word >> shift & mask) + more."""

    word: Access
    shift: int
    mask: int
    more: int

    @property
    def place(self) -> int:
        """The bit of a bf16's mantissa at which the number stands."""
        return min(self.shift, MANTISSA - self.mask.bit_length())

    @property
    def spare(self) -> int:
        """What a bf16 with these bits is more than the number."""
        return (0 if self.mask.bit_length() > MANTISSA else 1 << (MANTISSA - self.place)) - self.more


@dataclass(frozen=True, slots=True)
class Codes:
    """The numbers of a tile along its contracted dim k: `fields` are those of one word after the other, each time.

    order: in which of them are multiplied: as pairs, partners come one after the other.
    """

    access: Access
    tile: str  # "": nothing is filled, as in `dot.Operand`
    dims: tuple[str, ...]
    k: str
    fields: tuple[Field, ...]
    order: tuple[int, ...]

    @property
    def period(self) -> int:
        return len(self.fields)

    def runs_along(self, w: Writer, dim: str) -> bool:
        return contiguous(w, self.access, dim)

    def ask(self, w: Writer, q: Point, lane: str, lanes: int, base: str) -> None:
        """Ask for the words of the next step, where this one first reads a word."""
        if q.phase == 0:
            for word in dict.fromkeys(f.word for f in self.fields):
                ahead(w, word, q, lane, lanes, base)

    def vec(self, w: Writer, q: Point, lane: str, lanes: int, base: str, mask: str = "") -> str:
        """Text of numbers `q.phase` of a word, for neighbours along `lane`, as f32."""
        f = self.fields[self.order[q.phase]]
        return f"cast('float32', field({place(w, f.word, q, lane, lanes, base)}, {f.shift}, {f.mask}, {f.more}))"

    def pairs(self, w: Writer, q: Point, lane: str, lanes: int, base: str) -> str:
        """Text of pair `q.phase` of a word, for neighbours along `lane`, each number `spare` more than it should be."""
        f = self.fields[self.order[2 * q.phase]]
        return f"field_pairs({place(w, f.word, q, lane, lanes, base)}, {f.shift}, {f.mask}, {f.place})"

    def spares(self) -> tuple[int, ...]:
        return tuple(self.fields[n].spare for n in self.order[::2])


def codes(w: Writer) -> tuple[dict[str, Codes], set[int]]:
    """Tiles of codes by name, and the statements (by `id`) that fill them, or what they are made of."""
    everything = list(statements(w.kernel.body))
    found: dict[str, Codes] = {}
    for t in w.tiles.values():
        dots = [s for s in everything if t.name in read_tiles(s, w.tiles)]
        lanes = {w.tiles[s.tile].dims[-1:] for s in dots if isinstance(s, Dot)}
        overs = {s.over for s in dots if isinstance(s, Dot)}
        if not dots or not all(isinstance(s, Dot) and {s.a.tensor, s.b.tensor} != {t.name} for s in dots) \
                or len(lanes) != 1 or len(overs) != 1 or t.dtype != "f32":
            continue
        made = _codes(w, everything, t.name, lanes.pop(), overs.pop())
        if made is not None:
            found[t.name] = made
    spare: set[str] = set(found)
    hidden = {id(s) for s in everything if isinstance(s, Map) and s.tile in found}
    while True:  # what only hidden statements read
        more = [s for s in everything if isinstance(s, (Load, Map)) and id(s) not in hidden and all(
            id(x) in hidden for x in everything if s.tile in read_tiles(x, w.tiles))
            and any(s.tile in read_tiles(x, w.tiles) for x in everything) and s.tile not in spare]
        if not more:
            return found, hidden
        hidden |= {id(s) for s in more}
        spare |= {s.tile for s in more}


def _codes(w: Writer, everything: Sequence[Statement], tile: str, lanes: tuple[str, ...],
           over: tuple[str, ...]) -> Codes | None:
    made = _written_out(w, everything, tile)
    if made is None or not lanes:
        return None
    (lane,), (body, load) = lanes, made
    t, p = w.tiles[tile], w.params[load.source.tensor]
    n = w.fixed(lane)
    if p.dtype != "i32" or lane not in t.dims or n is None or n % 16 or any(
            isinstance(s, Store) and s.target.tensor in (p.name, p.over) for s in everything):
        return None
    for k in (d for d in over if d in t.dims and d != lane):
        period = math.lcm(*(c.args[1].value for e in (body, *load.source.index) for c in walk(e)
                            if isinstance(c, Call) and c.op in ("floordiv", "mod") and k in variables(c.args[0])
                            and isinstance(c.args[1], Const) and type(c.args[1].value) is int))
        count = w.fixed(k)
        if period < 2 or period > BITS or count is None or count % period or count > LONGEST:
            continue
        fields = [_field(body, load, k, r, period, count) for r in range(period)]
        known = [f for f in fields if f is not None]
        if len(known) == period and all(contiguous(w, f.word, lane) for f in known):
            return Codes(known[0].word, "", t.dims, k, tuple(known), tuple(range(period)))
    return None


def _written_out(w: Writer, everything: Sequence[Statement], tile: str) -> tuple[Expr, Load] | None:
    """What a tile of codes is made of: an expression of one loaded tile, and its Load."""
    writers = [s for s in everything if not isinstance(s, Store) and getattr(s, "tile", "") == tile]
    if len(writers) != 1 or not isinstance(writers[0], Map):
        return None
    body = writers[0].body
    read = {n for n in walk(body) if isinstance(n, Access)}
    if len(read) != 1 or len(variables(body) - set(w.tiles[tile].dims)):
        return None
    (a,) = read
    makers = [s for s in everything if not isinstance(s, Store) and getattr(s, "tile", "") == a.tensor]
    if len(makers) == 1 and isinstance(makers[0], Load):
        return body, makers[0]
    inner = _written_out(w, everything, a.tensor) if a.tensor in w.tiles else None
    return None if inner is None else (substitute(body, {a: inner[0]}), inner[1])


def _field(body: Expr, load: Load, k: str, r: int, period: int, count: int) -> Field | None:
    """Number r of each word."""
    here = call("add", call("mul", Var(WORD), period), r)
    known = {WORD: (0, count // period)}

    def at(e: Expr) -> Expr:
        return simplify(substitute(e, {Var(k): here}), known, index=True)

    word = Access(load.source.tensor, tuple(at(i) for i in load.source.index))
    shift, mask, more = 0, -1, 0
    e = body
    while not isinstance(e, Access):
        if not isinstance(e, Call):
            return None
        first, last = e.args[0], at(e.args[-1]) if len(e.args) == 2 and not _words(e.args[-1]) else None
        number = last.value if isinstance(last, Const) and type(last.value) is int else None
        if e.op in ("real", "int"):
            pass
        elif number is None:
            return None
        elif e.op in ("add", "sub") and mask == -1:
            more += number if e.op == "add" else -number
        elif e.op == "bitand" and mask == -1 and number > 0 and number & (number + 1) == 0:
            mask = number
        elif e.op == "shr" and mask > 0 and number >= 0:
            shift += number
        else:
            return None
        e = first
    bits = mask.bit_length()
    fits = 0 < mask and bits <= 8 and shift + bits <= BITS
    return Field(word, shift, mask, more) if fits else None


def _words(e: Expr) -> bool:
    return any(isinstance(n, Access) for n in walk(e))


def paired(c: Codes) -> Codes | None:
    """The codes in an order in which partners stand 16 bits apart in one word; None where there is none."""
    order: list[int] = []
    for n, f in enumerate(c.fields):
        if n in order:
            continue
        other = next((m for m, g in enumerate(c.fields) if m not in order and g.word == f.word and g.mask == f.mask
                      and g.more == f.more and abs(g.shift - f.shift) == BITS // 2), None)
        if other is None or f.mask.bit_length() > BITS // 2 - f.shift % (BITS // 2):
            return None
        order += [n, other] if f.shift < c.fields[other].shift else [other, n]
    return Codes(c.access, c.tile, c.dims, c.k, c.fields, tuple(order))


__all__ = ["WORD", "Codes", "Field", "codes", "paired"]
