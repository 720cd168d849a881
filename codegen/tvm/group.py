"""Element-wise work as few loop nests: which neighbouring Map and Fold statements share loops, and their text.

Statements that share dims (C) run point by point over C, so that a score tile is walked a few times and not once a
statement, and per-row values stay in registers.  Either the vector dim is in C (all statements use it), or C is walked
one point at a time and each statement has its vector dim among its own remaining dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from memcomp.codegen.tvm import diagonal
from memcomp.codegen.tvm.express import Expressions, number
from memcomp.codegen.tvm.writer import TILE_ELEMENT, Point, Writer, plus, read_tiles, times
from memcomp.ir.expr import Access, Call, Const, Var, call, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.tile import Fold, Map, Statement, Tile, When, statements

Work = Map | Fold
PART = 16  # terms that are summed one after the other in f32: in longer sums roundings of one sign add up


@dataclass(frozen=True, slots=True)
class Group:
    """Statements over common dims; lane: the vector dim if it is common, else ""."""

    work: tuple[Work, ...]
    common: tuple[str, ...]
    lane: str


def kept(s: Work, tiles: dict[str, Tile]) -> tuple[str, ...]:
    return tiles[s.tile].dims


def over(s: Work) -> tuple[str, ...]:
    return s.over if isinstance(s, Fold) else ()


def lane_of(s: Work, tiles: dict[str, Tile]) -> str:
    """The dim that a statement lays across lanes: the last dim of the largest tile it touches."""
    space = (*kept(s, tiles), *over(s))
    votes = [tiles[n.tensor].dims for n in walk(s.body) if isinstance(n, Access) and n.tensor in tiles]
    votes = [d for d in votes if d and d[-1] in space]
    if isinstance(s, Map) or not votes:
        return space[-1] if isinstance(s, Fold) and space else kept(s, tiles)[-1] if kept(s, tiles) else ""
    most = max(len(d) for d in votes)
    own = kept(s, tiles)
    last = [d[-1] for d in votes if len(d) == most]
    if own and own[-1] in last:
        return own[-1]
    return next((d for d in last if d not in own), own[-1] if own else last[0])  # results are stored along their last


def grouped(body: Sequence[Statement], tiles: dict[str, Tile]) -> list[Statement | Group]:
    """The statements in order, neighbours joined where they can share loops."""
    out: list[Statement | Group] = []
    for s in body:
        if not isinstance(s, (Map, Fold)):
            out.append(s)
            continue
        last = out[-1] if out else None
        joined = _joined(last, s, tiles) if isinstance(last, Group) else None
        if joined is not None:
            out[-1] = joined
        else:
            dims = kept(s, tiles)
            lane = lane_of(s, tiles)
            out.append(Group((s,), dims, lane if lane in dims else ""))
    return out


def _joined(g: Group, s: Work, tiles: dict[str, Tile]) -> Group | None:
    common = tuple(d for d in g.common if d in kept(s, tiles))
    if not common and (g.common or kept(s, tiles)):
        return None
    work = (*g.work, s)
    lanes = [lane_of(x, tiles) for x in work]
    if lanes[0] in common and all(x == lanes[0] for x in lanes):
        return Group(work, common, lanes[0])
    if all(d not in common or _plain(x, common, tiles) for d, x in zip(lanes, work, strict=True)):
        return Group(work, common, "")
    return None


def _plain(s: Work, common: tuple[str, ...], tiles: dict[str, Tile]) -> bool:
    """Has the statement no dims but the common ones?"""
    return {*kept(s, tiles), *over(s)} <= set(common)


def without_branch(s: Statement) -> Statement:
    """`When(full, map, masked map)` as one map whose test is false on full tiles: it can then share loops."""
    if not isinstance(s, When) or len(s.body) != 1 or len(s.orelse) > 1:
        return s
    branches = (*s.body, *s.orelse)
    if not all(isinstance(x, Map) for x in branches) or len({x.tile for x in branches if isinstance(x, Map)}) != 1:
        return s
    maps = [x for x in branches if isinstance(x, Map)]
    if len(maps) == 2:
        plain, masked, always = maps[0].body, maps[1].body, s.cond
    else:
        plain, masked, always = None, maps[0].body, call("not", s.cond)
    if not (isinstance(masked, Call) and masked.op == "where"):
        return s
    test, yes, no = masked.args
    own = isinstance(yes, Access) and yes.tensor == maps[0].tile
    if isinstance(no, Const) and (yes == plain or (plain is None and own)):
        return Map(maps[0].tile, call("where", call("or", test, always), yes, no))
    return s


def in_order(work: Sequence[Work], common: tuple[str, ...], tiles: dict[str, Tile]) -> list[Work]:
    """The same statements, those without loops of their own moved before loops that they do not depend on.

    Loops on either side of them become neighbours, which may then be one.
    """
    out: list[Work] = []
    for s in work:
        k = len(out)
        if _plain(s, common, tiles):
            mine = read_tiles(s, tiles)
            while k and not _plain(x := out[k - 1], common, tiles) and x.tile not in mine \
                    and s.tile not in read_tiles(x, tiles) | {x.tile}:
                k -= 1
        out.insert(k, s)
    return out


class Nest:
    """Writes a group."""

    def __init__(self, w: Writer, g: Group, point: Point) -> None:
        self.w, self.g = w, replace(g, work=tuple(in_order(g.work, g.common, w.tiles)))
        self.everywhere = list(statements(w.kernel.body))
        self.local = self._local()
        made = diagonal.prepare(w, ((s, g.lane or lane_of(s, w.tiles)) for s in self.g.work), point)
        self._open(point, tuple(d for d in g.common if d != g.lane))
        for e in made:
            del w.diagonals[e]

    def _local(self) -> set[str]:
        """Tiles that live in registers: written and read in this group only, first written."""
        inside = {id(s) for s in self.g.work}
        found: set[str] = set()
        for t in {s.tile for s in self.g.work}:
            touching = [s for s in self.everywhere if t in read_tiles(s, self.w.tiles) or getattr(s, "tile", None) == t]
            if all(id(s) in inside for s in touching) and t not in read_tiles(touching[0], self.w.tiles):
                found.add(t)
        return found

    def _open(self, point: Point, dims: tuple[str, ...]) -> None:
        w = self.w
        if dims:
            v = w.names.fresh(w.names[dims[0]])
            with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
                self._open(point.at(**{dims[0]: v}), dims[1:])
            return
        if self.g.lane:
            with self._lanes(self.g.lane) as base:
                self._body(replace(point, lane=self.g.lane, width=w.wide(self.g.lane), base=base))
        else:
            self._body(point)

    @contextmanager
    def _lanes(self, dim: str) -> Iterator[str]:
        """A loop over the vectors of a dim; yields the text of the first lane's element."""
        w, width, n = self.w, self.w.wide(dim), self.w.fixed(dim)
        steps = f"i64({-(-n // width)})" if n is not None else f"T.truncdiv({plus(w.count(dim), width - 1)}, {width})"
        with w.repeat("j", steps) as j:
            if j == "i64(0)" or width == 1:
                yield j
            else:
                base = w.names.fresh("base")
                w.let(base, times(j, width))
                yield base

    # -- one point of the common dims ----------------------------------------------------------------------------------

    def _rest(self, s: Work) -> frozenset[str]:
        return frozenset((*kept(s, self.w.tiles), *over(s))) - frozenset(self.g.common)

    def _body(self, point: Point) -> None:
        held = dict(point.held)
        k = 0
        while k < len(self.g.work):
            s = self.g.work[k]
            if not self._rest(s):
                held = self._leaf(s, replace(point, held=held), held)
                k += 1
                continue
            n = k + 1
            while n < len(self.g.work) and self._together(self.g.work[k:n], self.g.work[n]):
                n += 1
            self._hoist(self.g.work[k:n], point, held)
            held = self._segment(self.g.work[k:n], replace(point, held=held), held)
            k = n

    def _together(self, work: Sequence[Work], s: Work) -> bool:
        """May `s` run in the loops of `work`?"""
        tiles = self.w.tiles
        if self._rest(s) != self._rest(work[0]) or lane_of(s, tiles) != lane_of(work[0], tiles):
            return False
        folded = {x.tile for x in work if isinstance(x, Fold)}
        if folded & (read_tiles(s, tiles) | {s.tile}):
            return False
        outer = {frozenset(kept(x, tiles)) for x in (*work, s) if isinstance(x, Fold)}
        return len(outer) <= 1

    def _hoist(self, work: Sequence[Work], point: Point, held: dict[str, str]) -> None:
        """Read tiles that do not change inside the loops once, before them."""
        w = self.w
        written = {s.tile for s in work}
        for s in work:
            for t in sorted(read_tiles(s, w.tiles) - written - set(held)):
                if set(w.tiles[t].dims) <= set(self.g.common) and t not in held:
                    own = Access(t, tuple(Var(d) for d in w.tiles[t].dims))
                    v = Expressions(w, replace(point, held=held)).value(own)
                    held[t] = self._named(v.text, v.kind, w.names[t])

    def _named(self, text: str, kind: str, stem: str) -> str:
        if kind == "bool":  # TVM cannot bind a vector of truth values
            return f"ne({self.w.keep(_number_form(kind, text), stem)}, 0)"
        return self.w.keep(text, stem)

    def _leaf(self, s: Work, point: Point, held: dict[str, str]) -> dict[str, str]:
        """A statement with no loops of its own."""
        t = self.w.tiles[s.tile]
        value = Expressions(self.w, point).value(s.body, t.dtype, self.w.rough.get(id(s), frozenset()))
        text = value.text
        if isinstance(s, Fold) and s.accumulate:
            text = f"join({s.monoid!r}, {self._old(t, point)}, {_number_form(value.kind, text)})"
        return self._finish(t, text, value.kind, point, held)

    def _old(self, t: Tile, point: Point) -> str:
        v = Expressions(self.w, point).value(Access(t.name, tuple(Var(d) for d in t.dims)))
        return _number_form(v.kind, v.text)

    def _finish(self, t: Tile, text: str, kind: str, point: Point, held: dict[str, str], passing: bool = False,
                ) -> dict[str, str]:
        """Hold the value of a tile at this point; in memory too if others read it or the point is `passing`."""
        lanes = point.width if point.lane in t.dims else 1
        name = self._named(f"splat({text}, {lanes})" if kind != "bool" else text, kind, self.w.names[t.name])
        if passing or t.name not in self.local:
            self._put(t, name, kind, point)
        return held | {t.name: name}

    def _put(self, t: Tile, value: str, kind: str, point: Point) -> None:
        w = self.w
        last = None
        lanes = 1
        if point.lane and t.dims and t.dims[-1] == point.lane:
            last, lanes = f"at({point.width}, {point.base})", point.width
        number_text = f"cast('int32', {value})" if t.name in w.narrow else _number_form(kind, value)
        w.line(f"{w.tile_at(t.name, point.scalars, last)} = splat({number_text}, {lanes})")

    # -- statements with loops of their own ----------------------------------------------------------------------------

    def _segment(self, work: Sequence[Work], point: Point, held: dict[str, str]) -> dict[str, str]:
        """Statements that share all their loops; those that stay in the results are outermost."""
        tiles = self.w.tiles
        lane = self.g.lane or lane_of(work[0], tiles)
        folds = [s for s in work if isinstance(s, Fold)]
        rest = self._rest(work[0])
        order = list(dict.fromkeys(d for s in work for d in (*kept(s, tiles), *over(s)) if d in rest))
        outer = [d for d in order if folds and d in kept(folds[0], tiles)]
        inner = [d for d in order if d not in outer]
        if not self.g.lane:  # the vector dim innermost of its loops
            outer, inner = (sorted(x, key=lambda d: d == lane) for x in (outer, inner))
        if not outer:
            return self._inside(work, folds, inner, lane, point, held, False)
        self._walk(outer, lane, point, lambda q: self._inside(work, folds, inner, lane, q, held, True))
        return held

    def _walk(self, dims: list[str], lane: str, point: Point, body: Callable[[Point], object]) -> None:
        w = self.w
        if not dims:
            body(point)
        elif dims[0] == lane and not point.lane:
            with self._lanes(lane) as base:
                self._walk(dims[1:], lane, replace(point, lane=lane, width=w.wide(lane), base=base), body)
        else:
            v = w.names.fresh(w.names[dims[0]])
            with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
                self._walk(dims[1:], lane, point.at(**{dims[0]: v}), body)

    def _inside(self, work: Sequence[Work], folds: list[Fold], inner: list[str], lane: str, point: Point,
                held: dict[str, str], passing: bool) -> dict[str, str]:
        """Accumulators, the loops that are reduced, and what comes of them."""
        w = self.w
        width = point.width if point.lane else w.wide(lane) if lane in inner else 1
        sums = {id(s): self._total(s, width) for s in folds}
        rounded = [s for s in folds if s.monoid == "sum" and w.tiles[s.tile].dtype == "f32"]

        def step(q: Point) -> None:
            now = dict(held)
            for s in work:
                at = replace(q, held=now)
                t = w.tiles[s.tile]
                v = Expressions(w, at).value(s.body, t.dtype, self.w.rough.get(id(s), frozenset()))
                if isinstance(s, Fold):
                    element = TILE_ELEMENT[t.dtype]
                    text = f"splat({_number_form(v.kind, v.text)}, {width})"
                    if lane in s.over and not w.full(lane, width) and width > 1:
                        valid = f"lane({width}) < clip({w.count(lane)} - {q.base})"
                        text = f"select({valid}, {text}, {_identity(s.monoid, element)})"
                    v_at = f"{sums[id(s)]}[at({width})]"
                    w.line(f"{v_at} = join({s.monoid!r}, {v_at}, {text})")
                else:
                    text = v.text if v.kind == "bool" else f"splat({v.text}, {q.width if q.lane else 1})"
                    name = self._named(text, v.kind, w.names[t.name])
                    if not self._only_here(t.name, work):
                        self._put(t, name, v.kind, q)
                    now[t.name] = name

        def parts(q: Point) -> None:
            """Points of the long dim, `PART` at a time, each part summed and added to those before."""
            n, whole = w.fixed(long), dict(sums)
            with w.repeat("part", f"T.truncdiv({plus(w.count(long), PART - 1)}, {PART})" if n is None
                          else f"i64({-(-n // PART)})") as part:
                first = times(part, PART)
                points = f"i64({PART})" if w.full(long, PART) else f"T.min(i64({PART}), {w.count(long)} - {first})"
                sums.update({id(s): self._total(s, width) for s in rounded})
                v = w.names.fresh(w.names[long])
                with w.block(f"for {v} in T.serial({points}):"):
                    self._walk(inner[inner.index(long) + 1:], lane, q.at(**{long: f"({first} + {v})"}), step)
                for s in rounded:
                    total = f"{whole[id(s)]}[at({width})]"
                    w.line(f"{total} = {total} + {sums[id(s)]}[at({width})]")
            sums.update(whole)

        long = next((d for d in reversed(inner) if d != lane and w.dims[d].capacity > PART), "") if rounded else ""
        self._walk(inner[:inner.index(long)] if long else inner, lane, point, parts if long else step)
        for s in folds:
            t = w.tiles[s.tile]
            text = f"{sums[id(s)]}[at({width})]"
            if lane in s.over:
                text = f"across({s.monoid!r}, {text})"
            if s.accumulate:
                text = f"join({s.monoid!r}, {self._old(t, point)}, {text})"
            kind = t.dtype
            if kind == "bool":
                text = f"ne({text}, 0)"
            held = self._finish(t, text, kind, replace(point, held=held), held, passing)
        return held

    def _total(self, s: Fold, width: int) -> str:
        """An accumulator that holds nothing yet."""
        name = self.w.names.fresh("total")
        self.w.line(f"{name} = acc(splat({_identity(s.monoid, TILE_ELEMENT[self.w.tiles[s.tile].dtype])}, {width}))")
        return name

    def _only_here(self, tile: str, work: Sequence[Work]) -> bool:
        """Is a tile used in these loops only, first written?"""
        if tile not in self.local:
            return False
        inside = {id(s) for s in work}
        return all(id(s) in inside for s in self.everywhere
                   if tile in read_tiles(s, self.w.tiles) or getattr(s, "tile", None) == tile)


def _identity(monoid: str, element: str) -> str:
    x = MONOIDS[monoid].identity
    if element in ("int64", "int32"):
        top = (1 << (63 if element == "int64" else 31)) - 1
        n = int(x) if x == x and abs(x) != float("inf") else top if x > 0 else -top - 1
        return f"cast({element!r}, i64({n}))"
    return f"{'f64' if element == 'float64' else 'f32'}({number(x)})"


def _number_form(kind: str, text: str) -> str:
    """A truth value as the int32 that tiles hold."""
    return f"cast('int32', {text})" if kind == "bool" else text

