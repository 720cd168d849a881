"""The best values of a row and their places, as Triton text: a value and its place are one integer of 64 bits, which
is greater the earlier they come, so that the best of a tile and of a list is a maximum, taken as often as the list is
long.

A tile that holds nothing better than the last of all lists is left after one comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcomp.ir.errors import Refusal
from memcomp.ir.tile import NOWHERE, Best

if TYPE_CHECKING:
    from memcomp.codegen.triton.values import Values

NOTHING = -(2**63)
EMPTY = (0x807FFFFF - (1 << 32)) << 32   # -inf at NOWHERE, as `packed` gives it


def best(w: Values, s: Best) -> None:
    """Write the lines of one statement."""
    axes, dtype = w.scope.tiles[s.tile], w.scope.dtypes[s.tile]
    if dtype != "f32":
        raise Refusal(f"{s.tile} keeps the best of {dtype}, which 32 bits do not hold beside a place", w.k.name,
                      "the backends cuda and tvm compare them")
    order, gone = w.layout.axis(s.order), w.layout.of(s.over)
    every = tuple(a for a in w.layout.axes if (a in axes and a != order) or a in gone)
    front = tuple(a for a in axes if a != order)
    value = w.filled(s.body, every, "f32")
    points, left, top = (w.names.fresh(n) for n in ("points", "left", "top"))
    place = w.filled(s.at, every, "i64")
    packed = f"{w.scope.word('packed')}({value}, {place})"
    live = w.live(every, gone)
    w.line(f"{points} = tl.where({' & '.join(live)}, {packed}, {NOTHING})" if live else f"{points} = {packed}")
    kept = w.constant(axes, str(EMPTY), "tl.int64")
    w.line(f"{left} = {w.scope.word('packed')}({w.names[s.tile]}, {w.names[s.place]})" if s.accumulate
           else f"{left} = {kept}")
    new, step = w.names.fresh("best"), w.names.fresh("step")
    w.line(f"{new} = {left}")
    if s.accumulate:
        w.line(f"if {_all('max', points, every)} > {_all('min', left, axes)}:")
        w.depth += 1
    w.line(f"for {step} in range({order.size}):")
    w.depth += 1
    most = points
    for a in reversed(gone):
        most = f"tl.max({most}, {every.index(a)})"
    held = f"tl.maximum(tl.max({left}, {axes.index(order)}), {EMPTY})"
    w.line(f"{top} = tl.maximum({most}, {held})")
    w.line(f"{new} = tl.where({w.scope.local(s.order, axes)} == {step}, {w.scope.spread(top, front, axes)}, {new})")
    w.line(f"{points} = tl.where({points} == {w.scope.spread(top, front, every)}, {NOTHING}, {points})")
    w.line(f"{left} = tl.where({left} == {w.scope.spread(top, front, axes)}, {NOTHING}, {left})")
    w.depth -= 2 if s.accumulate else 1
    w.assign(s.tile, f"{w.scope.word('value_of')}({new})")
    w.assign(s.place, f"{w.scope.word('place_of')}({new})")
    for t in (s.tile, s.place):
        w.dead.set(t, lambda a: None)


def _all(monoid: str, text: str, axes: tuple[object, ...]) -> str:
    for n in reversed(range(len(axes))):
        text = f"tl.{monoid}({text}, {n})"
    return text


WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "packed": (f'''\
@triton.jit
def packed(x, i):
    """A real and a place below 2**31 as one integer: greater where the real is, of equal ones where the place is lower;
    a NaN is the greatest, -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (tl.cast(bits, tl.int64) << 32) | ({NOWHERE} - tl.cast(i, tl.int64))
''', ()),
    "value_of": ('''\
@triton.jit
def value_of(key):
    bits = tl.cast(key >> 32, tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
''', ()),
    "place_of": (f'''\
@triton.jit
def place_of(key):
    return {NOWHERE} - (key & {NOWHERE})
''', ()),
}
