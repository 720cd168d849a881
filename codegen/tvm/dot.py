"""Contractions on registers: two micro-kernels, and the general reduction where neither fits.

Both run on f32 values or, where `pairs` says so, on pairs of short numbers; `tiles` has the third form of those.

outer: the tile's vector dim belongs to one operand, whose neighbours along it lie together; the other gives one number
    per row.  Rows x vectors of accumulators stay in registers over the whole contraction, or over a part of a long one,
    start from zero and are added to the tile once: the error of a long sum is that of its blocks.
inner: both operands run along the contracted dim.  Products accumulate in vectors, one per (row, output), and a whole
    block of them is summed across lanes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memcomp.codegen.tvm import pairs, tiles
from memcomp.codegen.tvm.access import contiguous, over_points, scalar_element, strips, vector
from memcomp.codegen.tvm.ahead import LINE, PLACES, ahead
from memcomp.codegen.tvm.codes import WORD, Codes
from memcomp.codegen.tvm.pairs import Pairs, Product
from memcomp.codegen.tvm.writer import Point, Writer, plus, power_of_two, times
from memcomp.ir.expr import Access, call, variables
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Dot, Fold, Load

PART = 256  # terms that one accumulator takes
NEAR = 24 << 10  # bytes of the nearest cache that a part of an operand may fill
SIGNS = "T.int32(-0x7F7F7F80)"  # four times 128, as numbers without sign


@dataclass(frozen=True, slots=True)
class Operand:
    """A tile, or a param read in place of one (`tile` is "" then)."""

    access: Access
    dims: tuple[str, ...]
    tile: str

    @staticmethod
    def of(w: Writer, a: Access) -> Operand:
        """What an operand of a Dot refers to."""
        if a.tensor in w.in_place:
            source = w.in_place[a.tensor]
            return Operand(source.source, w.tiles[a.tensor].dims, "")
        if a.tensor in w.tiles:
            return Operand(a, w.tiles[a.tensor].dims, a.tensor)
        dims = tuple(d for d in w.dims if d in variables(a))
        return Operand(a, dims, "")

    def runs_along(self, w: Writer, dim: str) -> bool:
        """Are neighbours along `dim` neighbours in memory?"""
        if self.tile:
            return bool(self.dims) and self.dims[-1] == dim
        return contiguous(w, self.access, dim)

    def one(self, w: Writer, q: Point) -> str:
        """Text of one element."""
        return w.tile_at(self.tile, q.scalars) if self.tile else scalar_element(w, self.access, q)

    def vec(self, w: Writer, q: Point, lane: str, lanes: int, base: str, mask: str = "") -> str:
        """Text of neighbours along `lane`; lanes that the mask excludes are 0."""
        if not self.tile:
            return vector(w, self.access, q, lane, lanes, base, mask)
        got = w.tile_at(self.tile, q.scalars, f"at({lanes}, {base})")
        return f"select({mask}, {got}, f32(0.0))" if mask else got


def dot(w: Writer, s: Dot, point: Point) -> Fold | None:
    """Write a contraction; returns the reduction to write instead where no micro-kernel fits."""
    product = w.products.get(id(s))
    if product is not None:
        rows, columns = (pairs.operand(w, side, point, product.form == "tiles") for side in product.sides)
        if product.form == "outer":
            _outer(w, s, rows, columns, point, product)
            return None
        assert isinstance(rows, Pairs) and isinstance(columns, Pairs)
        if product.form == "tiles":
            tiles.product(w, s, product, rows, columns, point)
        else:
            _inner(w, s, rows, columns, product.k, point, product)
        return None
    for mine, other in ((s.a, s.b), (s.b, s.a)):
        if mine.tensor in w.coded:
            _outer(w, s, Operand.of(w, other), w.coded[mine.tensor], point)
            return None
    t = w.tiles[s.tile]
    a, b = Operand.of(w, s.a), Operand.of(w, s.b)
    if t.dtype == "f32" and t.dims and all(_real(w, x) for x in (a, b)):
        lane = t.dims[-1]
        for x, y in ((a, b), (b, a)):
            if lane in y.dims and lane not in x.dims:
                if y.runs_along(w, lane):
                    _outer(w, s, x, y, point)
                    return None
                along = [d for d in s.over if w.vector(d) > 1 and x.runs_along(w, d) and y.runs_along(w, d)]
                if along:
                    _inner(w, s, x, y, along[0], point)
                    return None
    return Fold(s.tile, "sum", s.over, call("mul", s.a, s.b), s.accumulate)


def in_place(w: Writer, load: Load, dots: list[Dot]) -> bool:
    """Should the dots that read a loaded tile read the param itself?

    Yes where it lies as they walk it and conversion is not repeated much: f32 costs none, short formats are converted
    again for every block of rows.
    """
    t, p = w.tiles[load.tile], w.params[load.source.tensor]
    ways = [w.products[id(s)] for s in dots if id(s) in w.products]
    if ways:
        return len(ways) == len(dots) and pairs.in_place(w, load, ways)
    if t.dtype != "f32" or p.dtype not in ("f32", "bf16", "f16"):
        return False
    for s in dots:
        out = w.tiles[s.tile]
        me, other = (s.a, s.b) if s.a.tensor == load.tile else (s.b, s.a)
        if out.dtype != "f32" or not out.dims or me.tensor == other.tensor:
            return False
        lane, mine = out.dims[-1], t.dims
        theirs = Operand.of(w, other)
        rows = 1
        for d in out.dims:
            rows *= w.dims[d].capacity if d not in mine else 1
        if lane not in mine:            # one number per row
            if p.dtype != "f32" or not theirs.runs_along(w, lane):
                return False
        elif lane in theirs.dims:
            return False
        elif contiguous(w, load.source, lane):
            if p.dtype != "f32" and rows > 8:
                return False
        elif not any(contiguous(w, load.source, d) and theirs.runs_along(w, d) for d in s.over) or rows > 8:
            return False
    return True


def _real(w: Writer, x: Operand) -> bool:
    """Does the operand come as f32 values?"""
    return w.tiles[x.tile].dtype == "f32" if x.tile else w.params[x.access.tensor].dtype in ("f32", "bf16", "f16")


def _loops(w: Writer, dims: list[str], point: Point, body: Callable[[Point], None]) -> None:
    if not dims:
        body(point)
        return
    v = w.names.fresh(w.names[dims[0]])
    with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
        _loops(w, dims[1:], point.at(**{dims[0]: v}), body)


def _part(w: Writer, dim: str, lanes: int, sides: tuple[Operand | Pairs, ...]) -> tuple[int, int] | None:
    """(steps of a contraction, steps of a part) where it is worth to be summed in parts; a step is a number or a pair.

    A part of the operand across `lanes` lanes stays in the nearest cache while all rows use it, and its roundings do
    not add up along the whole.
    """
    n = w.fixed(dim)
    if n is None or n <= PART:
        return None
    packed = [x for x in sides if isinstance(x, Pairs)]
    if packed:
        each = packed[0].side.each
        if n % each and any(x.buffer == "" for x in packed):
            return None
        n = -(-n // each)
    most = min(PART, NEAR // (4 * lanes))
    fits = [k for k in range(most, most // 2, -1) if n % k == 0]
    return n, fits[0] if fits else most


def _rows(w: Writer, dim: str, size: int, point: Point, body: Callable[[list[Point]], None]) -> None:
    """Call body(points of `size` rows), then of single rows for what remains."""
    if not dim:
        body([point])
        return
    n = w.fixed(dim)
    whole = f"i64({n // size})" if n is not None else f"T.truncdiv({w.count(dim)}, {size})"
    if n is None or n >= size:
        with w.repeat("i", whole) as i:
            body([point.at(**{dim: plus(times(i, size), r)}) for r in range(size)])
    if size == 1 or (n is not None and n % size == 0):
        return
    r = w.names.fresh("i")
    with w.block(f"for {r} in T.serial({whole} * {size}, {w.count(dim)}):"):
        body([point.at(**{dim: r})])


def _added(total: str, lanes: int, by: Product | None, x: str, y: str) -> str:
    """Text of a multiply-add."""
    old = f"{total}[at({lanes})]"
    if by is None:
        return f"{old} = {old} + {x} * {y}"
    return f"{old} = dot_pairs({old}, {f'{y}, {x}' if by.swapped else f'{x}, {y}'})"


def _zero(by: Product | None, lanes: int) -> str:
    """Text of a sum of nothing."""
    return f"splat({'f32(0.0)' if by is None or by.by.sums == 'f32' else 'T.int32(0)'}, {lanes})"


def _held(w: Writer, tile: str, value: str) -> str:
    """Text of a sum as its tile holds it."""
    return f"cast({w.element(w.tiles[tile])!r}, {value})" if w.tiles[tile].dtype == "i64" else value


def _pairs_then_last(w: Writer, sides: tuple[Pairs, ...], over: tuple[str, ...], point: Point,
                     body: Callable[[Point, int], None]) -> None:
    """All pairs of the contracted dims, and how many numbers they have; in place, the last ones that do not fill a
    pair have a step of their own."""
    k, each = sides[0].side.k, sides[0].side.each

    def along(q: Point) -> None:
        n, count = w.fixed(k), w.count(k)
        whole = any(x.buffer == "" for x in sides) and (n is None or n % each > 0)
        round_up = 0 if whole else each - 1
        stop = f"i64({(n + round_up) // each})" if n is not None else f"T.truncdiv({plus(count, round_up)}, {each})"
        with w.repeat("i", stop) as i:
            body(q.at(**{k: i}), each)
        if whole:
            for given in pairs.remainders(w, k, each):
                body(q.at(**{k: stop}), given)

    _loops(w, [d for d in over if d != k], point, along)


def _outer(w: Writer, s: Dot, a: Operand | Pairs | Codes, b: Operand | Pairs | Codes, point: Point,
           by: Product | None = None) -> None:
    assert not isinstance(a, Codes)
    t = w.tiles[s.tile]
    lane = t.dims[-1]
    free = [d for d in t.dims[:-1] if d not in b.dims]
    row = max(free, key=lambda d: w.dims[d].capacity) if free else ""
    outside = [d for d in t.dims[:-1] if d != row]
    rows = w.fixed(row) or w.dims[row].capacity if row else 1
    size, vectors = w.isa.block(rows, w.padded(lane) // w.vector(lane))
    k, each = (b.side.k, b.side.each) if isinstance(b, Pairs) else (s.over[-1], 1)  # along what, and numbers of a step
    if isinstance(b, Codes):
        k, each = b.k, 1 if by is None else 2
    parts = None if isinstance(b, Codes) else _part(w, k, vectors * w.vector(lane), (a, b))

    def all_parts(q: Point) -> None:
        if parts is None:
            columns(q, None)
            return
        if not s.accumulate:
            over_points(w, tuple(d for d in t.dims[:-1] if d not in outside), q, lambda p: strips(
                w, lane, lambda base, m, _: w.line(f"{w.tile_at(t.name, p.scalars, f'at({m}, {base})')} = "
                                                   f"{_held(w, t.name, _zero(by, m))}")))
        n, most = parts
        with w.repeat("part", f"i64({n // most})") as i:
            columns(q, (times(i, most), most))
        if n % most:
            columns(q, (f"i64({n // most * most})", n % most))

    def columns(q: Point, part: tuple[str, int] | None) -> None:
        start, step = 0, vectors
        v, padded, n = w.vector(lane), w.padded(lane), w.fixed(lane)
        while start < padded:
            while start + step * v > padded:
                step //= 2
            lanes = step * v
            many = (padded - start) // lanes
            if n is not None:
                stop = f"i64({many})"
            else:
                stop = f"T.min(T.max(T.truncdiv({w.count(lane)} + {lanes - 1 - start}, {lanes}), 0), {many})"
            with w.repeat("j", stop) as j:
                block(q, plus(times(j, lanes), start), lanes, part)
            start += many * lanes

    def block(q: Point, base: str, lanes: int, part: tuple[str, int] | None) -> None:
        begin = _zero(by, lanes)
        if isinstance(a, Pairs) and a.side.more:  # what its numbers are more than they should be
            owed = w.names.fresh("owed")
            w.line(f"{owed} = acc({begin})")
            every(q, part, lambda p, given: w.line(_added(owed, lanes, by, SIGNS, across(p, base, lanes, given))))
            begin = f"{begin} - {owed}[at({lanes})]"
        _rows(w, row, size, q, lambda rows: _tile(rows, base, lanes, part, begin))

    def across(q: Point, base: str, lanes: int, given: int) -> str:
        """What lies across the lanes at a step, in a register."""
        if isinstance(b, Codes):
            b.ask(w, q, lane, lanes, base)
            return w.keep((b.vec if by is None else b.pairs)(w, q, lane, lanes, base), "b")
        x, mask = w.names.fresh("b"), _edge(w, b, lane, base, lanes)
        if not b.tile and given == each:
            for n in range(each):
                here = q if each == 1 else q.at(**{k: plus(f"{q.scalars[k]} * {each}", n)})
                ahead(w, b.access, here, lane, lanes, base, k)
        if isinstance(b, Pairs):
            w.let(x, f"reg({b.vec(w, q, lane, lanes, base, mask, given, woven(lanes))})")
        else:
            w.let(x, b.vec(w, q, lane, lanes, base, mask))
        return x

    def woven(lanes: int) -> bool:
        """Do the lanes of sums wait until the end to be put in order?  It costs as much for all pairs as for one."""
        return isinstance(b, Pairs) and not b.buffer and each == 2 and lanes % (2 * pairs.LANES) == 0

    def every(q: Point, part: tuple[str, int] | None, step: Callable[[Point, int], None]) -> None:
        """All steps of the contraction, or of a part of it."""
        if part is not None:
            def along(p: Point) -> None:
                with w.repeat("i", f"i64({part[1]})") as i:
                    step(p.at(**{k: f"({i} + {part[0]})"}), each)

            _loops(w, [d for d in s.over if d != k], q, along)
        elif isinstance(b, Codes):
            many, count = b.period // each, w.fixed(k)
            assert count is not None

            def words(p: Point) -> None:
                with w.repeat("i", f"i64({count // b.period})") as i:
                    for phase in range(many):
                        at = b.order[phase] if by is None else phase
                        step(replace(p.at(**{WORD: i, k: plus(times(i, many), at)}), phase=phase), each)

            _loops(w, [d for d in s.over if d != k], q, words)
        elif isinstance(a, Pairs) and isinstance(b, Pairs):
            _pairs_then_last(w, (a, b), s.over, q, step)
        else:
            _loops(w, list(s.over), q, lambda p: step(p, each))

    def _tile(rows: list[Point], base: str, lanes: int, part: tuple[str, int] | None, begin: str) -> None:
        totals = []
        for r in rows:
            first = begin if not isinstance(b, Codes) or by is None else f"splat({_owed(w, s, a, b, r)}, {lanes})"
            totals.append(w.names.fresh("total"))
            w.line(f"{totals[-1]} = acc({first})")

        def step(q: Point, given: int) -> None:
            inside = {d: q.scalars[d] for d in s.over}
            x = across(q, base, lanes, given)
            for r, total in zip(rows, totals, strict=True):
                at = r.at(**inside)
                one = a.one(w, at, given) if isinstance(a, Pairs) else a.one(w, at)
                w.line(_added(total, lanes, by, one, x))

        if part is not None and not a.tile:  # its rows are left before their ends: no machine guesses what comes next
            for r in rows:
                here = r.at(**{d: "i64(0)" for d in s.over})
                ahead(w, a.access, here, k, each * part[1], times(part[0], each))
        every(rows[0], part, step)
        for r, total in zip(rows, totals, strict=True):
            out = w.tile_at(t.name, r.scalars, f"at({lanes}, {base})")
            old = f"{out} + " if s.accumulate or part is not None else ""
            got = f"in_order({total}[at({lanes})])" if woven(lanes) else f"{total}[at({lanes})]"
            w.line(f"{out} = {old}{_held(w, t.name, got)}")

    _loops(w, outside, point, all_parts)


def _owed(w: Writer, s: Dot, a: Operand | Pairs, codes: Codes, row: Point) -> str:
    """Text of what a row's products with codes are too much, with the sign turned."""
    assert isinstance(a, Pairs)
    total, n, lanes = w.names.fresh("owed"), w.fixed(codes.k), pairs.LANES
    w.line(f"{total} = acc(splat(f32(0.0), {lanes}))")
    spare = codes.spares()
    assert n is not None

    def along(q: Point) -> None:
        def strip(base: str, m: int, mask: str) -> None:
            x = a.vec(w, q, codes.k, m, base, mask)
            w.line(f"{total}[at({lanes})] = dot_pairs({total}[at({lanes})], {x}, same_pairs({spare}, {m // 2}))")

        strips(w, codes.k, strip, 2 * lanes)

    _loops(w, [d for d in s.over if d != codes.k], row, along)
    return f"f32(0.0) - across('sum', {total}[at({lanes})])"


def _edge(w: Writer, b: Operand | Pairs, lane: str, base: str, lanes: int) -> str:
    """The mask that a param needs where its last columns are fewer than the block; tiles are padded."""
    if b.tile or w.full(lane, lanes):
        return ""
    return f"lane({lanes}) < clip({w.count(lane)} - {base})"


def _inner(w: Writer, s: Dot, a: Operand | Pairs, b: Operand | Pairs, along: str, point: Point,
           by: Product | None = None) -> None:
    t = w.tiles[s.tile]
    key = t.dims[-1]
    free = [d for d in t.dims[:-1] if d not in b.dims]
    row = max(free, key=lambda d: w.dims[d].capacity) if free else ""
    outside = [d for d in t.dims[:-1] if d != row]
    deeper = [d for d in s.over if d != along]
    lanes, each = (pairs.LANES, b.side.each) if isinstance(b, Pairs) else (w.vector(along), 1)
    most = min(w.isa.registers // 2, lanes)       # accumulators; at most one result per lane
    rows = w.fixed(row) or w.dims[row].capacity if row else 1
    size = min(rows, 4 if most >= 16 else 2) if rows not in (3, 5, 6) or rows > most else rows
    lined = not b.tile and lanes * each * BYTES[w.params[b.access.tensor].dtype] >= LINE  # a vector is whole lines
    keys, places = 1, min(power_of_two(w.dims[key].capacity), PLACES)  # each key is a place that is read
    while 2 * keys * size <= most and 2 * keys <= places:
        keys *= 2

    def block(points: list[Point], outs: int, base: str) -> None:
        if not b.tile and outs > 1 and not lined:
            with w.repeat("k", f"i64({outs})") as later:
                here = points[0].at(**{key: f"({base} + {later})"} | {d: "i64(0)" for d in s.over})
                ahead(w, b.access, here, along, w.dims[along].capacity, "i64(0)", key)
        begins = [_zero(by, lanes)] * len(points)
        if isinstance(b, Pairs) and b.side.more:  # what its numbers are more than they should be
            owed = [w.names.fresh("owed") for _ in points]
            for name in owed:
                w.line(f"{name} = acc({_zero(by, lanes)})")

            def rows_alone(q: Point) -> None:
                def strip(at: str, n: int, mask: str) -> None:
                    for p, name in zip(points, owed, strict=True):
                        x = a.vec(w, p.at(**{d: q.scalars[d] for d in deeper}), along, n, at, mask)
                        w.line(_added(name, lanes, by, x, SIGNS))

                strips(w, along, strip, lanes * each)

            _loops(w, deeper, points[0], rows_alone)
            begins = [f"{_zero(by, lanes)} - {name}[at({lanes})]" for name in owed]
        totals = [[w.names.fresh("total") for _ in range(outs)] for _ in points]
        for row_of, begin in zip(totals, begins, strict=True):
            for name in row_of:
                w.line(f"{name} = acc({begin})")

        def step(q: Point) -> None:
            def strip(at: str, n: int, mask: str) -> None:
                xs, ys = [], []
                inside = {d: q.scalars[d] for d in deeper}
                for p in points:
                    xs.append(w.names.fresh("a"))
                    w.let(xs[-1], a.vec(w, p.at(**inside), along, n, at, mask))
                for k in range(outs):
                    ys.append(w.names.fresh("b"))
                    here = q.at(**{key: plus(base, k)})
                    w.let(ys[-1], f"reg({b.vec(w, here, along, n, at, mask)})")
                    if outs > 1 and lined:
                        ahead(w, b.access, here, along, n, at, key)
                for r, x in zip(totals, xs, strict=True):
                    for total, y in zip(r, ys, strict=True):
                        w.line(_added(total, lanes, by, x, y))

            strips(w, along, strip, lanes * each)

        _loops(w, deeper, points[0], step)
        flat = [f"{n}[at({lanes})]" for r in totals for n in r]
        flat += [_zero(by, lanes)] * (power_of_two(len(flat)) - len(flat))
        sums = w.names.fresh("sums")
        w.let(sums, f"row_sums([{', '.join(flat)}])")
        for r, p in enumerate(points):
            out = w.tile_at(t.name, p.scalars, f"at({outs}, {base})")
            got = f"piece({sums}, {r * outs}, {outs})" if len(flat) > outs else sums
            w.line(f"{out} = {out + ' + ' if s.accumulate else ''}{_held(w, t.name, got)}")

    def columns(q: Point) -> None:
        n = w.fixed(key)
        whole = f"i64({n // keys})" if n is not None else f"T.truncdiv({w.count(key)}, {keys})"
        with w.repeat("m", whole) as m:
            _rows(w, row, size, q, lambda rows: block(rows, keys, times(m, keys)))
        if keys == 1 or (n is not None and n % keys == 0):
            return
        r = w.names.fresh("m")
        with w.block(f"for {r} in T.serial({whole} * {keys}, {w.count(key)}):"):
            _rows(w, row, size, q, lambda rows: block(rows, 1, r))

    _loops(w, outside, point, columns)

