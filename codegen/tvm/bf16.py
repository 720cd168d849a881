"""Words for products of short numbers: neighbours along the contracted dim, multiplied some at a time into 32 bits.

A pair is an int32 that holds two bf16 numbers, or four integers of 8 bits; the first is lowest.  Each word has a form
in plain operations, which is what the machine's instruction computes (of bf16 up to the order of the two additions);
the machine's own is taken where the text is compiled for it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T
from tvm.target import Target

from memcomp.codegen.tvm.isa import PRODUCTS, TILE
from memcomp.codegen.tvm.vocabulary import (
    Value,
    bits,
    cast,
    dtype,
    i64,
    like,
    piece,
    reg,
    splat,
    to_bf16,
    vector,
    width,
)


def _machine_has(instruction: str) -> bool:
    """Is the text being compiled for a machine with this product?"""
    target = Target.current(allow_none=True)
    needed = {a for m in PRODUCTS if m.instruction == instruction for a in m.attributes}
    return target is not None and needed <= {str(a) for a in target.attrs.get("mattr", ())}


# -- pairs -------------------------------------------------------------------------------------------------------------


def _lower(x: Value) -> Value:
    """The first number of each pair as float32."""
    return bits(x << like(x, 16), "float32")


def _upper(x: Value) -> Value:
    """The second number of each pair as float32."""
    return bits(x & like(x, -0x10000), "float32")


def dot_pairs(total: Value, a: Value, b: Value, signed: str = "us") -> Value:
    """total plus the products of the numbers of a with those of b, lane by lane; a scalar pair serves all lanes.

    f32: of two bf16, summed in f32.  int32: of four integers, which wraps around; signed: whether those of a and of b
    are (s) or are not (u).
    """
    w = width(total)
    name = "vdpbf16ps" if dtype(total) == "float32" else "vpdpbusd"
    if _machine_has(name) and w in (16, 32, 64) and signed == "us":
        return T.call_extern(vector(dtype(total), w), f"memcomp_{name}{w}", total, splat(a, w), splat(b, w))
    a, b = reg(a), reg(b)
    if dtype(total) == "float32":
        return total + splat(_lower(a), w) * splat(_lower(b), w) + splat(_upper(a), w) * splat(_upper(b), w)
    for k in range(4):
        total = total + splat(_byte(a, k, signed[0]), w) * splat(_byte(b, k, signed[1]), w)
    return total


def _byte(x: Value, k: int, signed: str) -> Value:
    """Number k of four, with or without a sign, as int32."""
    return ((x << like(x, 24 - 8 * k)) >> like(x, 24)) if signed == "s" else (x >> like(x, 8 * k)) & like(x, 255)


def unsigned(x: Value) -> Value:
    """Four numbers with sign as four without: each 128 more."""
    return x ^ like(x, -0x7F7F7F80)


def pair_up(*numbers: Value) -> Value:
    """Lane by lane the numbers as one pair: bits as they are, f32 rounded to nearest even; 0 for what is missing.

    bf16 come as their bits (uint16) or as f32, integers of 8 bits as they are stored or as int64.
    """
    low, *more = (cast("uint8", x) if dtype(x) in ("int8", "int64") else x for x in numbers)
    n, each = width(low), 4 if dtype(low) == "uint8" else 2
    rows = [low, *more] + [splat(like(low, 0), n)] * (each - 1 - len(more))
    if dtype(low) == "float32":
        if _machine_has("vdpbf16ps") and n == 16:
            return T.call_extern("int32x16", "memcomp_pair_up", *rows)
        rows = [to_bf16(x) for x in rows]
    if n == 1:
        wide = [cast("uint32", x) << tirx.const(32 // each * k, "uint32") for k, x in enumerate(rows)]
        return bits(functools.reduce(lambda a, b: a | b, wide), "int32")
    while len(rows) > 1:  # neighbours of neighbours: first the halves of what goes far apart
        half = len(rows) // 2
        rows = [_interleaved(a, b) for a, b in zip(rows[:half], rows[half:], strict=True)]
    return T.reinterpret(vector("int32", n), rows[0])


def _interleaved(a: Value, b: Value) -> Value:
    n = width(a)
    return reg(T.Shuffle([a, b], [k + h for k in range(n) for h in (0, n)]))


def _woven(lanes: int) -> list[int]:
    """The column in each lane where two rows are woven by eighths of 128 bits, as machines do it in one step."""
    return [base + 8 * part + k for base in range(0, lanes, 32) for half in (0, 4) for part in range(4)
            for k in range(half, half + 4)]


def weave(low: Value, high: Value | None = None) -> Value:
    """As `pair_up` of bf16 bits, 32 columns a time in an order that costs half as much; `in_order` undoes it."""
    if high is None:
        high = splat(like(low, 0), width(low))
    n = width(low)
    return T.reinterpret(vector("int32", n), T.Shuffle([low, high], [k + h for k in _woven(n) for h in (0, n)]))


def in_order(x: Value) -> Value:
    """Columns as `weave` leaves them, put in their order."""
    places = _woven(width(x))
    return T.Shuffle([x], [places.index(k) for k in range(len(places))])


def in_pairs(x: Value) -> Value:
    """Neighbours as pairs: bits as they are, f32 rounded to nearest even bf16."""
    if dtype(x) == "float32":
        half = width(x) // 2
        if _machine_has("vdpbf16ps") and half == 16:
            x = reg(x)
            return T.call_extern("int32x16", "memcomp_in_pairs", piece(x, 0, 16), piece(x, 16, 16))
        x = to_bf16(x)
    if dtype(x) == "int64":
        x = cast("int8", x)
    return T.reinterpret(vector("int32", width(x) // (4 if dtype(x) in ("int8", "uint8") else 2)), x)


def field(x: Value, shift: int, mask: int, more: int) -> Value:
    """Numbers of words: (x >> shift & mask) + more."""
    got = (x >> like(x, shift) if shift else x) & like(x, mask)
    return got + like(x, more) if more else got


def field_pairs(x: Value, shift: int, mask: int, place: int) -> Value:
    """Of each word the numbers at bits `shift` and `shift` + 16 as a pair of bf16.

    Up to 7 bits stand at bit `place` of a mantissa under the exponent that makes the bit there 1: each is
    2**(7 - place) too much.  Numbers of 8 bits are converted: a float32 that holds one has no bits but those of a bf16.
    """
    if mask.bit_length() > 7:
        low, high = (bits(cast("float32", field(x, s, mask, 0)), "int32") for s in (shift, shift + 16))
        return (low >> like(low, 16)) | high
    both, one = (n | n << 16 for n in (mask << place, (127 + 7 - place) << 7))
    return ((x >> like(x, shift - place) if shift > place else x) & like(x, both)) | like(x, one)


def same_pairs(numbers: Sequence[int], lanes: int) -> Value:
    """Pairs of equal numbers, each of at most 8 bits without what follows its last 1; so many in turn."""
    made = [struct.unpack("<I", struct.pack("<f", float(x)))[0] >> 16 for x in numbers]
    words = [made[k % len(made)] * 0x10001 for k in range(lanes)]
    return T.Shuffle([tirx.const(x - (x >> 31 << 32), "int32") for x in words], list(range(lanes)))


def reordered(x: Value, order: Sequence[int]) -> Value:
    """Neighbours in another order, the same in each group of so many."""
    n = len(order)
    return T.Shuffle([x], [base + k for base in range(0, width(x), n) for k in order])


# -- tiles -------------------------------------------------------------------------------------------------------------


def tile_start() -> None:
    """Shape the tile registers of this thread; `tile_stop` gives them back."""
    if _machine_has("tdpbf16ps"):
        T.evaluate(T.call_extern("void", "memcomp_tile_start"))


def tile_stop() -> None:
    if _machine_has("tdpbf16ps"):
        T.evaluate(T.call_extern("void", "memcomp_tile_stop"))


def tile_product(total: Value, at_total: Sequence[Value], a: Value, at_a: Sequence[Value], b: Value,
                 at_b: Sequence[Value], steps: Value, rows: int, columns: int, add: bool, instruction: str) -> None:
    """total (+)= a * b over `steps` tiles along the contracted dim: rows x columns tiles of 16 x 16 sums.

    a: int32 [.., row, pair]; b: int32 [.., pair, column]; total: [.., row, column], f32 or int32; each from its
    index on.
    """
    if _machine_has(instruction):
        places = [x for t, index in ((total, at_total), (a, at_a), (b, at_b))
                  for x in (T.address_of(t[tuple(index)]), i64(4 * int(t.shape[-1])))]
        name = f"memcomp_{instruction}_{rows}{columns}{int(add)}"
        T.evaluate(T.call_extern("void", name, *places, cast("int64", steps)))
        return

    def one(t: Value, index: Sequence[Value], down: Value, right: Value) -> Value:
        return t[(*index[:-2], index[-2] + down, index[-1] + right)]

    with T.serial(i64(TILE * rows)) as r, T.serial(i64(TILE * columns)) as c:
        place = [*at_total[:-2], at_total[-2] + r, at_total[-1] + c]
        if not add:
            T.buffer_store(total, tirx.const(0, total.dtype), place)
        with T.serial(cast("int64", steps) * i64(TILE)) as k:
            x, y = one(a, at_a, r, k), one(b, at_b, k, c)
            T.buffer_store(total, dot_pairs(total[tuple(place)], x, y, instruction[4:6]), place)
