"""Words that kernel text uses besides TVMScript's own: values held in registers, vectors, conversions, masks.

Text is parsed by TVMScript, which evaluates calls of these functions while it builds the kernel.  A function that needs
a value more than once writes it to a small buffer first (`reg`): LLVM turns that into a register, whereas TVM would
print the whole expression once per use (exponential in a chain).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

Value = Any  # a TVM expression; TVM is not typed


def dtype(x: Value) -> str:
    """Element type, such as float32."""
    return str(x.ty).split("x", 1)[0]


def width(x: Value) -> int:
    """Number of lanes; 1 for a scalar."""
    parts = str(x.ty).split("x", 1)
    return int(parts[1]) if len(parts) > 1 else 1


def vector(element: str, lanes: int) -> str:
    return element if lanes == 1 else f"{element}x{lanes}"


def at(lanes: int, base: Value = 0) -> Value:
    """The index of `lanes` neighbours from `base` on."""
    if lanes == 1:
        return base
    return tirx.Ramp(base, tirx.const(1, "int32" if isinstance(base, int) else dtype(base)), lanes)


def acc(x: Value) -> Value:
    """A fresh small buffer that holds `x`; read and written as `b[V(n)]` (SSA registers after LLVM's mem2reg)."""
    b = T.alloc_buffer((width(x),), dtype(x))
    T.buffer_store(b, x, [at(width(x))])
    return b


def reg(x: Value) -> Value:
    """`x`, computed once, here."""
    if dtype(x) == "bool":  # one-bit vectors have no memory form; they are cheap to repeat and LLVM merges the copies
        return x
    return acc(x)[at(width(x))]


def splat(x: Value, lanes: int) -> Value:
    """`x` in every lane; a vector of that width stays."""
    return x if width(x) == lanes or lanes == 1 else tirx.Broadcast(x, lanes)


def cast(element: str, x: Value) -> Value:
    return x if dtype(x) == element else T.Cast(vector(element, width(x)), x)


def like(x: Value, number: float) -> Value:
    """A number as a scalar of x's element type; operators spread it over the lanes."""
    return tirx.const(number, dtype(x))


def bits(x: Value, element: str = "int32") -> Value:
    return T.reinterpret(vector(element, width(x)), x)


def i64(x: int) -> Value:
    return tirx.const(x, "int64")


def f32(x: float) -> Value:
    return tirx.const(x, "float32")


def f64(x: float) -> Value:
    return tirx.const(x, "float64")


def _pair(a: Value, b: Value) -> tuple[Value, Value]:
    a = like(b, a) if isinstance(a, (int, float)) else a
    b = like(a, b) if isinstance(b, (int, float)) else b
    w = max(width(a), width(b))
    return splat(a, w), splat(b, w)


def select(test: Value, yes: Value, no: Value) -> Value:
    w = max(width(test), width(yes), width(no))
    if width(test) == 1 and w > 1:
        test = splat(test, w)
    return tirx.Select(test, splat(yes, w), splat(no, w))


def eq(a: Value, b: Value) -> Value:
    return tirx.EQ(*_pair(a, b))


def ne(a: Value, b: Value) -> Value:
    return tirx.Not(eq(a, b))  # TVM's own inequality is false where an operand is NaN


def isnan(x: Value) -> Value:
    return T.isnan(x)


def land(a: Value, b: Value) -> Value:
    return tirx.And(*_pair(a, b))


def lor(a: Value, b: Value) -> Value:
    return tirx.Or(*_pair(a, b))


def lnot(a: Value) -> Value:
    return tirx.Not(a)


def _extreme(choose: Callable[[Value, Value], Value], a: Value, b: Value) -> Value:
    a, b = _pair(a, b)
    if not dtype(a).startswith("float"):
        return choose(a, b)
    for x, y in ((a, b), (b, a)):
        if isinstance(y.value if isinstance(y, tirx.Broadcast) else y, tirx.FloatImm):
            return choose(y, x)  # the machine's own operation hands on a NaN in its second operand
    a = reg(a)
    return select(isnan(a), a, choose(a, b))


def maximum(a: Value, b: Value) -> Value:
    """The larger; NaN if either is NaN."""
    return _extreme(T.max, a, b)


def minimum(a: Value, b: Value) -> Value:
    """The smaller; NaN if either is NaN."""
    return _extreme(T.min, a, b)


def lane(lanes: int) -> Value:
    """0, 1, 2 ... as int32."""
    return tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)


def clip(x: Value) -> Value:
    """A 64-bit bound as an int32 that compares the same with lane numbers."""
    far = 1 << 30
    return T.Cast("int32", T.max(T.min(x, i64(far)), i64(-far)))


# -- integers: TVM's own floor division is rewritten with shared names that its code generator then refuses ------------


def floordiv(a: Value, b: Value) -> Value:
    """Rounded down; 0 where the divisor is 0."""
    a, b = _pair(a, b)
    if isinstance(b, tirx.IntImm):
        return _floordiv(a, b)
    nothing = eq(b, like(b, 0))
    return select(nothing, like(a, 0), _floordiv(a, select(nothing, like(b, 1), b)))


def _floordiv(a: Value, b: Value) -> Value:
    """Rounded down, for divisors that are not 0."""
    if isinstance(b, tirx.IntImm) and b.value > 0 and b.value & (b.value - 1) == 0:
        return a >> like(a, b.value.bit_length() - 1)
    q = T.truncdiv(a, b)
    r = a - q * b
    inexact = land(ne(r, like(r, 0)), (r ^ b) < like(r, 0))
    return q - select(inexact, like(q, 1), like(q, 0))


def floormod(a: Value, b: Value) -> Value:
    """a - floordiv(a, b) * b: the sign of b; 0 where b is 0."""
    a, b = _pair(a, b)
    if isinstance(b, tirx.IntImm):
        return a - _floordiv(a, b) * b
    some = select(eq(b, like(b, 0)), like(b, 1), b)
    return a - _floordiv(a, some) * some


def ceildiv(a: Value, b: Value) -> Value:
    """Rounded up."""
    zero = like(a, 0)
    return zero - floordiv(zero - a, b)


# -- the best of a row: the greatest value first, of equal ones the lower place, a NaN before all others ---------------


def reaches(x: Value, last: Value) -> Value:
    """Is some lane not less than the last of a list?"""
    x, last = _pair(x, last)
    test = tirx.Not(x < last)
    return T.call_llvm_intrin("bool", "llvm.vector.reduce.or", test) if width(x) > 1 else test


def before(x: Value, i: Value, y: Value, j: Value) -> Value:
    """Does value x with place i come before y with j?"""
    if not dtype(x).startswith("float"):
        return tirx.Or(x > y, tirx.And(eq(x, y), i < j))
    greater = tirx.Or(x > y, tirx.And(isnan(x), tirx.Not(isnan(y))))
    return tirx.Or(greater, tirx.And(i < j, tirx.And(tirx.Not(x < y), tirx.Or(isnan(x), tirx.Not(isnan(y))))))


# -- reductions across lanes -------------------------------------------------------------------------------------------

JOIN = {"sum": lambda a, b: a + b, "prod": lambda a, b: a * b, "max": maximum, "min": minimum,
        "and": T.min, "or": T.max}


def join(monoid: str, a: Value, b: Value) -> Value:
    return JOIN[monoid](*_pair(a, b))


def across(monoid: str, x: Value) -> Value:
    """All lanes joined to a scalar, by halves."""
    x = reg(x)
    w = width(x)
    while w > 1:
        half = w // 2
        low = reg(T.Shuffle([x], list(range(half)))) if half > 1 else T.Shuffle([x], [0])
        high = reg(T.Shuffle([x], list(range(half, w)))) if half > 1 else T.Shuffle([x], [1])
        x = reg(JOIN[monoid](low, high))
        w = half
    return x


def row_sums(rows: Sequence[Value]) -> Value:
    """Lane r of the result is the sum of rows[r]; as many rows (a power of two, at most the width) as lanes come out.

    Pairs of rows are halved together, so that n rows cost n - 1 steps and not n log(width).
    """
    vectors, w = [reg(r) for r in rows], width(rows[0])
    parts = w  # partial sums per row
    while len(vectors) > 1:
        half, n = parts // 2, len(vectors) // 2
        stay = [k if k % parts < half else w + k for k in range(w)]  # low halves of the first, high of the second
        cross = [k + half if k % parts < half else w + k - half for k in range(w)]
        pairs = zip(vectors[:n], vectors[n:], strict=True)
        vectors = [reg(T.Shuffle([a, b], stay) + T.Shuffle([a, b], cross)) for a, b in pairs]
        parts = half
    x = vectors[0]
    while parts > 1:
        w, half = width(x), parts // 2
        low = [k for g in range(0, w, parts) for k in range(g, g + half)]
        x = reg(T.Shuffle([x], low) + T.Shuffle([x], [k + half for k in low]))
        parts = half
    return x


def _turn(rows: Sequence[Value]) -> list[Value]:
    """The columns of a square: neighbours are interleaved log2(n) times."""
    n, vectors = len(rows), [reg(r) for r in rows]
    low = [k + h for k in range(n // 2) for h in (0, n)]
    high = [k + n // 2 for k in low]
    for _ in range(n.bit_length() - 1):
        pairs = list(zip(vectors[: n // 2], vectors[n // 2:], strict=True))
        vectors = [reg(T.Shuffle([a, b], take)) for a, b in pairs for take in (low, high)]
    return vectors


def put_turned(tile: Value, index: Sequence[Value], k: int, rows: Sequence[Value], kind: str = "") -> None:
    """Write a square into a tile: rows[r][c] goes to position k plus c, last position plus r.

    Rows come as they are stored, bf16 as bits: the fewer bytes, the cheaper they are to turn.
    """
    for c, column in enumerate(_turn(rows)):
        place = [*index[:k], index[k] + c, *index[k + 1:-1], at(len(rows), index[-1])]
        T.buffer_store(tile, cast(str(tile.dtype), from_bf16(column) if kind == "bf16" else column), place)


def store_turned(target: Value, index: Sequence[Value], k: int, kind: str, columns: Sequence[Value]) -> None:
    """Write a square to a param of type `kind`: columns[c][r] goes to position k plus r, last position plus c."""
    for r, row in enumerate(_turn(columns)):
        place = [*index[:k], index[k] + r, *index[k + 1:-1], at(len(columns), index[-1])]
        T.buffer_store(target, to_bf16(cast("float32", row)) if kind == "bf16" else
                       cast("uint8", ne(row, 0)) if kind == "bool" else cast(str(target.dtype), row), place)


def piece(x: Value, start: int, lanes: int) -> Value:
    """Lanes start .. start+lanes-1."""
    return T.Shuffle([x], list(range(start, start + lanes)))


# -- stored formats ----------------------------------------------------------------------------------------------------

def from_bf16(x: Value) -> Value:
    """uint16 bits -> float32, exactly."""
    return bits(cast("uint32", x) << tirx.const(16, "uint32"), "float32")


def to_bf16(x: Value) -> Value:
    """float32 -> uint16 bits, to nearest even; a NaN stays one."""
    x = reg(x)
    u = reg(bits(x, "uint32"))
    one = tirx.const(1, "uint32")
    shift = tirx.const(16, "uint32")
    rounded = (u + tirx.const(0x7FFF, "uint32") + ((u >> shift) & one)) >> shift
    return cast("uint16", select(isnan(x), splat(tirx.const(0x7FC0, "uint32"), width(x)), rounded))


def as_f32(x: Value) -> Value:
    """f32 as it stands: LLVM fuses nothing with it."""
    return T.call_llvm_intrin(vector("float32", width(x)), "llvm.arithmetic.fence", x)


def as_f16(x: Value) -> Value:
    """The nearest number of f16, as f32."""
    return cast("float32", cast("float16", x))


def as_bf16(x: Value) -> Value:
    """The nearest number of bf16, as f32."""
    return from_bf16(to_bf16(x))


def tasks(n: Value) -> None:
    """Tell the launcher how many tasks the next parallel loop has."""
    T.evaluate(T.call_extern("int32", "memcomp_tasks", cast("int32", n)))


def prefetch(address: Value) -> None:
    """Ask for a cache line, into the second level: it holds more requests in flight.  Any address is allowed."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, *(tirx.const(k, "int32") for k in (0, 2, 1))))


def masked_load(address: Value, mask: Value, element: str) -> Value:
    """Lanes where the mask is false are not read and hold 0."""
    w = width(mask)
    return T.call_llvm_intrin(vector(element, w), "llvm.masked.load", address, mask, splat(tirx.const(0, element), w))


def masked_store(address: Value, mask: Value, x: Value) -> None:
    """Lanes where the mask is false are not written."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.masked.store", splat(x, width(mask)), address, mask))
