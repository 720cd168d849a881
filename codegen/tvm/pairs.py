"""Contractions of short operands: which there are, and how their operands become pairs of neighbours.

A pair is what one lane of 32 bits holds: two bf16, or four integers of 8 bits.  A contraction runs on pairs where both
operands are stored as a product of the machine takes them (`isa.PRODUCTS`).  bf16: a computed operand is rounded to it
where that is allowed (`rounding`, or the module itself does so: `Dot.held`) and buys time: where more than 2 products
share each number of the stored one, so that arithmetic and not memory is what they wait for; sums stay in f32.
Integers: where no sum of as many products can leave 32 bits, so that it is exact; where a product takes numbers with
sign and numbers without and both have one, 128 is added to those of one side, and as many times the sum of the other
side's numbers taken off again.

Operands that a Load brings are packed there, once, and never widened, or read in place where a pair that serves all
lanes lies as one; computed ones are packed where they are used.  A missing last partner, and in tiles all that is
missing up to 16 pairs, is 0 on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from memcomp.codegen.rounding import rounds
from memcomp.codegen.tvm.access import contiguous, over_points, place, strips
from memcomp.codegen.tvm.codes import Codes, paired
from memcomp.codegen.tvm.isa import Multiply
from memcomp.codegen.tvm.writer import BITS, ELEMENT, Point, Writer, plus
from memcomp.ir.expr import Access
from memcomp.ir.target import sums_fit
from memcomp.ir.tile import Dot, Load, Store, Tile, statements

LANES = 16  # of a vector of pairs or of f32: every form that multiplies pairs has 512 bits
FEW = 8     # rows up to which reading an operand again for every block of rows beats packing it
SHARED = 2  # products on one stored number from which on arithmetic costs as much as bringing it from memory


@dataclass(frozen=True, slots=True)
class Side:
    """An operand as int32 pairs along `k`: a buffer over [other dims.., pair], or [other dims.., pair, last].

    beside: which of the other dims lies beside the pairs, where that matters.  each: numbers of a pair.  more: numbers
    with sign go as numbers without, 128 more.  order: of so many neighbours along k, where they are not paired as they
    come.
    """

    tile: str
    k: str
    last: str = ""
    beside: str = ""
    each: int = 2
    more: bool = False
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Product:
    """form: outer and inner as in `dot`, or tiles; k: the dim that pairs run along; row: the dim of the rows, if any;
    rows: how many there are at most; x gives the rows, y holds the last dim of the result; by: the instruction;
    swapped: it takes y before x."""

    form: str
    k: str
    row: str
    rows: int
    x: Side
    y: Side
    by: Multiply
    swapped: bool = False

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.x, self.y


def products(w: Writer) -> dict[int, Product]:
    """The contractions of a kernel that run on pairs, by `id` of the statement."""
    if not w.isa.products:
        return {}
    everything = list(statements(w.kernel.body))
    writers: dict[str, list[object]] = {}
    for s in everything:
        if not isinstance(s, Store) and hasattr(s, "tile"):
            writers.setdefault(s.tile, []).append(s)
    short = {d for m in w.isa.products for d in (m.left, m.right)}
    stored = {t: s for t, (s, *more) in writers.items()
              if isinstance(s, Load) and not more and w.params[s.source.tensor].dtype in short}
    allowed = rounds(w.program)
    found = {id(s): _product(w, s, stored, (w.kernel.name, s.tile) in allowed)
             for s in everything if isinstance(s, Dot)}
    return {n: p for n, p in found.items() if p is not None}


def _dtypes(w: Writer, s: Dot, stored: dict[str, Load], may_round: bool) -> tuple[str, str] | None:
    """How the operands of a contraction may be stored; None where no product of short numbers gives its result."""
    names = s.a.tensor, s.b.tensor
    kinds = {w.tiles[n].dtype for n in (s.tile, *names)}
    if len(kinds) > 1:
        return None
    a, b = (w.params[stored[n].source.tensor].dtype if n in stored else "bf16" if n in w.coded else "" for n in names)
    if kinds == {"i64"} and a and b:
        terms = math.prod(w.dims[d].capacity for d in s.over)
        return (a, b) if sums_fit(terms, a, b) else None
    may_round = may_round or s.held == (a or b) != ""
    for mine, given in (names, names[::-1]):
        if mine not in stored and mine not in w.coded and not (
                may_round and (given in stored or given in w.coded)
                and _shared(w, w.tiles[s.tile], w.tiles[given]) > SHARED):
            return None
    return a or b, b or a


def _product(w: Writer, s: Dot, stored: dict[str, Load], may_round: bool) -> Product | None:
    t, names = w.tiles[s.tile], (s.a.tensor, s.b.tensor)
    if not t.dims or names[0] == names[1] or any(n not in w.tiles for n in names):
        return None
    dtypes = _dtypes(w, s, stored, may_round)
    lane = t.dims[-1]
    for x, y, kinds in ((*names, dtypes), (*names[::-1], dtypes and dtypes[::-1])):
        dims, other = w.tiles[y].dims, w.tiles[x].dims
        both = [d for d in s.over if d in dims and d in other]
        ways = [m for m in w.isa.products if kinds and m.takes(*kinds)]
        if not kinds or not ways or lane not in dims or lane in other or not both:
            continue
        free = [d for d in t.dims[:-1] if d not in dims]
        row = max(free, key=lambda d: w.dims[d].capacity) if free else ""
        rows = w.dims[row].capacity if row else 1

        def runs(tile: str, dim: str) -> bool:
            if tile in stored:
                return contiguous(w, stored[tile].source, dim)
            return w.tiles[tile].dims[-1] == dim

        if y in w.coded or x in w.coded:
            return _of_codes(w, s, x, y, row, rows, ways) if y in w.coded and x not in w.coded else None
        k = max(both, key=lambda d: w.dims[d].capacity)
        wide, deep = w.dims[lane].capacity, w.dims[k].capacity
        tiles = next((m for m in ways if m.tiles and (m.left, m.right) == kinds), None)
        if tiles and min(wide, deep, rows) >= LANES:
            return Product("tiles", k, row, rows, Side(x, k, beside=row, each=tiles.each),
                           Side(y, k, lane, each=tiles.each), tiles)
        lanes = next((m for m in ways if not m.tiles), None)
        if lanes is None:
            continue
        # who has no sign already goes first; else numbers of one side lose it
        differ = lanes.left != lanes.right
        lose, swapped = differ and kinds[0] == kinds[1], differ and kinds == (lanes.right, lanes.left)
        along = [d for d in both if runs(x, d) and runs(y, d) and w.dims[d].capacity > LANES]
        if not runs(y, lane) and along and (rows <= FEW or wide < LANES):
            return Product("inner", along[0], row, rows, Side(x, along[0], each=lanes.each),
                           Side(y, along[0], each=lanes.each, more=lose), lanes, swapped or lose)
        direct = y in stored and runs(y, lane)
        if w.vector(lane) == LANES and deep > 1 and (direct or rows >= FEW // 2):
            across = row and runs(x, row) and not runs(x, k)
            return Product("outer", k, row, rows, Side(x, k, row if across else "", each=lanes.each, more=lose),
                           Side(y, k, lane, each=lanes.each), lanes, swapped)
    return None


def _of_codes(w: Writer, s: Dot, x: str, y: str, row: str, rows: int, ways: list[Multiply]) -> Product | None:
    """A product with codes, whose partners in a word say who is a pair."""
    codes, lanes = paired(w.coded[y]), next((m for m in ways if not m.tiles), None)
    if codes is None or lanes is None or codes.k not in w.tiles[x].dims:
        return None
    order = () if codes.order == tuple(range(codes.period)) else codes.order
    if order and w.tiles[x].dims[-1] != codes.k:
        return None
    w.coded[y] = codes
    across = not order and row and w.tiles[x].dims[-1] == row != codes.k
    return Product("outer", codes.k, row, rows, Side(x, codes.k, row if across else "", each=lanes.each, order=order),
                   Side(y, codes.k, w.tiles[s.tile].dims[-1], each=lanes.each), lanes)


def _shared(w: Writer, result: Tile, operand: Tile) -> int:
    """How many products each element of an operand takes part in, per point of the contracted dims."""
    return math.prod(w.dims[d].capacity for d in result.dims if d not in operand.dims)


def in_place(w: Writer, load: Load, ways: list[Product]) -> bool:
    """Should the products that read a loaded tile read the param itself?

    Yes where a pair that serves all lanes lies there as a pair, and where few rows read what lies across the lanes.
    """
    def direct(p: Product) -> bool:
        if p.x.tile == load.tile:
            return p.form == "outer" and not (p.x.last or p.x.more or p.x.order) and contiguous(w, load.source, p.k)
        return p.form != "tiles" and p.rows <= FEW and contiguous(w, load.source, p.y.last or p.k)

    return all(map(direct, ways))


def packed(load: Load, readers: list[Product]) -> Side | None:
    """The form in which a Load may leave its tile, if all that read it want the same."""
    wanted = {side for p in readers for side in p.sides if side.tile == load.tile}
    return wanted.pop() if len(wanted) == 1 else None


# -- operands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Raw:
    """Where pairs come from: a tile (f32, rounded on the way, or i64) or, with `tile` "", a param (bits)."""

    access: Access
    tile: str

    def runs_along(self, w: Writer, dim: str) -> bool:
        return w.tiles[self.tile].dims[-1] == dim if self.tile else contiguous(w, self.access, dim)

    def one(self, w: Writer, q: Point) -> str:
        return w.tile_at(self.tile, q.scalars) if self.tile else place(w, self.access, q)

    def vec(self, w: Writer, q: Point, lane: str, lanes: int, base: str, mask: str = "") -> str:
        """Text of neighbours; lanes that the mask excludes are 0 and not read."""
        if self.tile:
            got = w.tile_at(self.tile, q.scalars, f"at({lanes}, {base})")
            zero = "i64(0)" if w.tiles[self.tile].dtype == "i64" else "f32(0.0)"
            return f"select({mask}, {got}, {zero})" if mask else got
        if mask:
            p = w.params[self.access.tensor]
            address = f"T.address_of({place(w, self.access, q.at(**{lane: base}))})"
            return f"masked_load({address}, {mask}, {BITS.get(p.dtype, ELEMENT[p.dtype])!r})"
        return place(w, self.access, q, lane, lanes, base)

    def pairs(self, w: Writer, q: Point, side: Side, lane: str, lanes: int, base: str, mask: str, given: int,
              woven: bool = False) -> str:
        """Text of pairs number q[k], of `lanes` neighbours along another dim; of each its first `given` numbers."""
        first = f"{q.scalars[side.k]} * {side.each}"
        rows = [self.vec(w, q.at(**{side.k: plus(first, n)}), lane, lanes, base, mask) for n in range(given)]
        return sign(side, f"{'weave' if woven else 'pair_up'}({', '.join(rows)})")


def sign(side: Side, pairs: str) -> str:
    """Text of pairs as the product takes them."""
    return f"unsigned({pairs})" if side.more else pairs


@dataclass(frozen=True, slots=True)
class Pairs:
    """An operand of a product: a buffer of pairs, or (`buffer` "") a param read in place.

    In points, the value of `k` is the number of a pair.  dims: of the tile, as in `dot.Operand`.
    """

    side: Side
    raw: Raw
    buffer: str
    dims: tuple[str, ...]

    @property
    def tile(self) -> str:
        """As in `dot.Operand`: "" for what is read in place."""
        return self.buffer

    @property
    def access(self) -> Access:
        return self.raw.access

    def at(self, w: Writer, q: Point, pair: str, last: str) -> str:
        dims = order(w, self.side)
        values = q.scalars | {self.side.k: pair} | ({self.side.last: last} if self.side.last else {})
        return f"{self.buffer}[{', '.join(values[d] for d in dims)}]"

    def one(self, w: Writer, q: Point, given: int = 0) -> str:
        """Text of one pair, or of its first `given` numbers."""
        k, each = self.side.k, self.side.each
        if self.buffer:
            return self.at(w, q, q.scalars[k], q.scalars.get(self.side.last, ""))
        first = f"{q.scalars[k]} * {each}"
        if given in (0, each):
            return sign(self.side, f"in_pairs({place(w, self.raw.access, q, k, each, first)})")
        numbers = (place(w, self.raw.access, q.at(**{k: plus(first, n)})) for n in range(given))
        return sign(self.side, f"pair_up({', '.join(numbers)})")

    def vec(self, w: Writer, q: Point, lane: str, lanes: int, base: str, mask: str = "", given: int = 0,
            woven: bool = False) -> str:
        """Pairs of neighbours: those of `lanes` numbers along k from element `base` on, or `lanes` along another dim;
        of each its first `given` numbers.  woven: what is read in place comes in the order of the word `weave`."""
        each = self.side.each
        if lane == self.side.k:
            if self.buffer:
                return self.at(w, q, f"at({lanes // each}, T.truncdiv({base}, {each}))", "")
            return sign(self.side, f"in_pairs({self.raw.vec(w, q, lane, lanes, base, mask)})")
        if self.buffer:
            return self.at(w, q, q.scalars[self.side.k], f"at({lanes}, {base})")
        return self.raw.pairs(w, q, self.side, lane, lanes, base, mask, given or each, woven)


def operand(w: Writer, side: Side, point: Point, deep: bool) -> Pairs | Codes:
    """The operand ready to be multiplied; packs it here unless its Load has done so or it is read in place.

    deep: fill up to whole tiles along `k`.
    """
    dims = w.tiles[side.tile].dims
    if side.tile in w.coded:
        return w.coded[side.tile]
    if side.tile in w.in_place:
        return Pairs(side, Raw(w.in_place[side.tile].source, ""), "", dims)
    raw = Raw(Access(side.tile, ()), side.tile)
    if side.tile in w.packed:
        return Pairs(side, raw, w.packed[side.tile], dims)
    made = Pairs(side, raw, new_buffer(w, side), dims)
    pack(w, made, point, deep)
    return made


def load(w: Writer, s: Load, side: Side, point: Point) -> None:
    """Fill a tile that is wanted as pairs only."""
    w.packed[s.tile] = w.packed.get(s.tile) or new_buffer(w, side)
    made = Pairs(side, Raw(s.source, ""), w.packed[s.tile], w.tiles[s.tile].dims)
    pack(w, made, point, any(p.form == "tiles" and side in p.sides for p in w.products.values()))


def order(w: Writer, side: Side) -> tuple[str, ...]:
    """The dims of a buffer."""
    others = [d for d in w.tiles[side.tile].dims if d not in (side.k, side.last, side.beside)]
    return (*others, *([side.beside] if side.beside else ()), side.k, *([side.last] if side.last else ()))


def new_buffer(w: Writer, side: Side) -> str:
    """A buffer with room for whole tiles: 16 rows, 16 pairs, 16 columns."""
    name = w.names.fresh(f"{w.names[side.tile]}_pairs")
    dims = order(w, side)
    room = {d: -(-w.dims[d].capacity // LANES) * LANES for d in (side.last, *dims[-2:]) if d}
    shape = [-(-w.dims[d].capacity // (side.each * LANES)) * LANES if d == side.k else room.get(d, w.dims[d].capacity)
             for d in dims]
    w.buffers[name] = (tuple(shape), "int32")
    return name


# -- packing -----------------------------------------------------------------------------------------------------------


def pack(w: Writer, to: Pairs, point: Point, deep: bool) -> None:
    """Fill a buffer: by vectors where the source runs along k or the last dim, by squares turned in registers where it
    runs along the dim that is to be the other way round, else one by one."""
    side, raw = to.side, to.raw
    k, n = side.k, w.fixed(side.k)
    dims = order(w, side)
    inner = side.last or (dims[-2] if len(dims) > 1 else "")  # the dim beside the pairs
    others = tuple(d for d in dims if d not in (k, inner))
    count = w.count(k)
    each, whole = side.each, side.each * LANES
    pairs = f"i64({-(-n // each)})" if n is not None else f"T.truncdiv({plus(count, each - 1)}, {each})"
    stop = pairs
    if deep:
        stop = f"i64({-(-n // whole) * LANES})" if n is not None else \
            f"T.truncdiv({plus(count, whole - 1)}, {whole}) * {LANES}"

    def plane(q: Point) -> None:
        if raw.runs_along(w, k) and not side.last:
            over_points(w, (inner,) if inner else (), q, lambda p: _along(w, to, p))
        elif side.last and raw.runs_along(w, side.last):
            _across(w, to, q, pairs, stop if deep else "")
        elif inner and w.dims[inner].capacity >= LANES and raw.runs_along(w, inner if not side.last else k):
            _squares(w, to, q, inner, stop)
        else:
            over_points(w, (inner,) if inner else (), q, lambda p: _each(w, to, p, "i64(0)", stop))

    over_points(w, others, point, plane)


def _along(w: Writer, to: Pairs, q: Point) -> None:
    """Both run along k: 16 pairs a time, 0 beyond the last."""
    each = to.side.each

    def strip(base: str, lanes: int, mask: str) -> None:
        x = to.raw.vec(w, q, to.side.k, lanes, base, mask)
        got = sign(to.side, f"in_pairs({f'reordered({x}, {to.side.order})' if to.side.order else x})")
        w.line(f"{to.at(w, q, f'at({lanes // each}, T.truncdiv({base}, {each}))', '')} = {got}")

    strips(w, to.side.k, strip, each * LANES)


def remainders(w: Writer, k: str, each: int) -> Iterator[int]:
    """The numbers that the last pair along a dim may have where it is not whole; what is written in a turn of the loop
    runs where it has as many."""
    n = w.fixed(k)
    if n is not None:
        yield from [n % each] if n % each else []
        return
    for given in range(1, each):
        with w.block(f"if T.truncmod({w.count(k)}, {each}) == {given}:"):
            yield given


def _across(w: Writer, to: Pairs, q: Point, pairs: str, stop: str) -> None:
    """Both run along the last dim: rows become one of pairs."""
    k, last, each, n = to.side.k, to.side.last, to.side.each, w.fixed(to.side.k)
    across = w.fixed(last)
    wide = 0 if to.raw.tile or across is None or across % (2 * LANES) else 2 * LANES  # bits: a register of bf16 a row

    def row(i: str, given: int) -> None:
        def strip(base: str, lanes: int, mask: str) -> None:
            got = to.raw.pairs(w, q.at(**{k: i}), to.side, last, lanes, base, mask, given)
            w.line(f"{to.at(w, q, i, f'at({lanes}, {base})')} = {got}")

        strips(w, last, strip, wide)

    with w.repeat("i", f"i64({n // each})" if n is not None else f"T.truncdiv({w.count(k)}, {each})") as i:
        row(i, each)
    for given in remainders(w, k, each):
        row(f"({pairs} - 1)" if n is None else f"i64({n // each})", given)
    if stop and stop != pairs:
        i = w.names.fresh("i")
        with w.block(f"for {i} in T.serial({pairs}, {stop}):"):
            strips(w, last, lambda b, m, mask: w.line(
                f"{to.at(w, q, i, f'at({m}, {b})')} = splat(cast('int32', i64(0)), {m})"))


def _squares(w: Writer, to: Pairs, q: Point, inner: str, stop: str) -> None:
    """16 neighbours of `inner` by 16 pairs, turned in registers; the edges one by one."""
    k, last, wide = to.side.k, to.side.last, to.side.each * LANES
    whole = {}
    for d, size in ((k, wide), (inner, LANES)):
        n = w.fixed(d)
        whole[d] = f"T.truncdiv({w.count(d)}, {size})" if n is None else f"i64({n // size})"
    i, j = w.names.fresh("i"), w.names.fresh("j")
    with w.block(f"for {i} in T.serial({whole[inner]}):"), w.block(f"for {j} in T.serial({whole[k]}):"):
        if last:   # the source runs along k
            points = [q.at(**{inner: f"({i} * {LANES} + {r})"}) for r in range(LANES)]
            rows = [sign(to.side, f"in_pairs({to.raw.vec(w, p, k, wide, f'{j} * {wide}')})") for p in points]
        else:
            rows = [to.raw.pairs(w, q.at(**{k: f"({j} * {LANES} + {r})"}), to.side, inner, LANES, f"{i} * {LANES}", "",
                                 to.side.each) for r in range(LANES)]
        base = q.scalars | {k: f"{j} * {LANES}", inner: f"{i} * {LANES}"}
        index = ", ".join(base[d] for d in order(w, to.side))
        turned = order(w, to.side).index(k if last else inner)
        w.line(f"put_turned({to.buffer}, [{index}], {turned}, [{', '.join(rows)}])")
    right = f"{whole[k]} * {LANES}"
    if not w.full(k, wide):
        over_points(w, (inner,), q, lambda p: _each(w, to, p, right, stop))
    if w.full(inner, LANES):
        return
    v = w.names.fresh(w.names[inner])
    with w.block(f"for {v} in T.serial({whole[inner]} * {LANES}, {w.count(inner)}):"):
        _each(w, to, q.at(**{inner: v}), "i64(0)", right)


def _each(w: Writer, to: Pairs, q: Point, start: str, stop: str) -> None:
    """Pairs start .. stop-1, one by one."""
    k, each, count = to.side.k, to.side.each, w.count(to.side.k)
    i = w.names.fresh("i")
    with w.block(f"for {i} in T.serial({start}, {stop}):"), ExitStack() as nested:
        here = to.at(w, q, i, q.scalars.get(to.side.last, ""))
        numbers = [to.raw.one(w, q.at(**{k: plus(f"{i} * {each}", n)})) for n in range(each)]
        for given in range(each, 0, -1):
            with w.block(f"if {plus(f'{i} * {each}', given - 1)} < {count}:"):
                made = f"pair_up({', '.join(numbers[:given])})"
                w.line(f"{here} = {sign(to.side, made)}")
            nested.enter_context(w.block("else:"))
        w.line(f"{here} = cast('int32', i64(0))")
