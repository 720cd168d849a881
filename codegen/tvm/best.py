"""The best values of a row and their places: a sorted list in memory, into which few points are let.

Points come a vector at a time, neighbours along the row or one point of neighbouring rows.  A vector of which no lane
reaches the last of its list is done after one comparison; of the others each lane is compared, and what comes before
the last moves up to its place.  In a row in no order, the n-th point enters a list of k with probability k / n.
"""

from __future__ import annotations

from dataclasses import replace

from memcomp.codegen.tvm.express import Expressions
from memcomp.codegen.tvm.group import lane_of
from memcomp.codegen.tvm.writer import Point, Writer, plus, times
from memcomp.ir.places import LEAST
from memcomp.ir.tile import NOWHERE, Best, Fold


def best(w: Writer, s: Best, point: Point) -> None:
    """Write the loops."""
    t = w.tiles[s.tile]
    front = tuple(d for d in t.dims if d != s.order)
    lane = lane_of(Fold(s.tile, "max", s.over, s.body), w.tiles)
    if lane not in s.over and (lane == s.order or lane != t.dims[-1]):
        lane = ""
    _Loops(w, s, lane).rows(front, point)


class _Loops:
    def __init__(self, w: Writer, s: Best, lane: str) -> None:
        self.w, self.s, self.lane, self.t = w, s, lane, w.tiles[s.tile]
        self.k = w.dims[s.order].capacity

    def rows(self, dims: tuple[str, ...], point: Point) -> None:
        """Loops over rows, whose lists are begun; a dim across the lanes is left for `points`."""
        w = self.w
        if dims:
            v = w.names.fresh(w.names[dims[0]])
            if dims[0] != self.lane:
                with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
                    self.rows(dims[1:], point.at(**{dims[0]: v}))
                return
            if not self.s.accumulate:
                with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
                    self.begin(point.at(**{dims[0]: v}))
            self.rows(dims[1:], point)
            return
        if not self.s.accumulate and self.lane not in self.t.dims:
            self.begin(point)
        over = tuple(d for d in self.s.over if d != self.lane)
        self.points(over, point)

    def begin(self, point: Point) -> None:
        w = self.w
        least = f"i64({LEAST})" if self.t.dtype == "i64" else "f64(-inf)" if self.t.dtype == "f64" else "f32(-inf)"
        with w.repeat("k", f"i64({self.k})") as j:
            w.line(f"{self.value(point, j)} = {least}")
            w.line(f"{self.place(point, j)} = i64({NOWHERE})")

    def value(self, point: Point, k: str) -> str:
        return self.w.tile_at(self.s.tile, point.scalars | {self.s.order: k})

    def place(self, point: Point, k: str) -> str:
        return self.w.tile_at(self.s.place, point.scalars | {self.s.order: k})

    def points(self, dims: tuple[str, ...], point: Point) -> None:
        """Loops over a row's points, in the order of their dims."""
        w = self.w
        if dims:
            v = w.names.fresh(w.names[dims[0]])
            with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
                self.points(dims[1:], point.at(**{dims[0]: v}))
            return
        if not self.lane:
            self.insert(point, Expressions(w, point).value(self.s.body, self.t.dtype).text)
            return
        width, n = w.wide(self.lane), w.fixed(self.lane)
        steps = f"T.truncdiv({plus(w.count(self.lane), width - 1)}, {width})" if n is None else f"i64({-(-n // width)})"
        with w.repeat("j", steps) as j:
            base = times(j, width)
            self.vector(replace(point, lane=self.lane, width=width, base=base), width)

    def vector(self, point: Point, width: int) -> None:
        w = self.w
        x = w.keep(f"splat({Expressions(w, point).value(self.s.body, self.t.dtype).text}, {width})", "x")
        last = f"i64({self.k - 1})"
        if self.lane in self.t.dims:
            last = w.tile_at(self.s.tile, point.scalars | {self.s.order: last}, f"at({width}, {point.base})")
        else:
            last = self.value(point, last)
        with w.block(f"if reaches({x}, {last}):"):
            lanes = w.names.fresh("lanes")
            w.line(f"{lanes} = acc({x})")
            some = f"i64({width})" if w.full(self.lane, width) else \
                f"T.min(i64({width}), {w.count(self.lane)} - {point.base})"
            v = w.names.fresh("v")
            with w.block(f"for {v} in T.serial({some}):"):
                at = replace(point, lane="", width=1, base="").at(**{self.lane: f"({point.base} + {v})"})
                self.insert(at, f"{lanes}[{v}]")

    def insert(self, point: Point, value: str) -> None:
        """Put a point where it belongs, if it comes before the last of its list."""
        w = self.w
        x, last = w.keep(value, "x"), f"i64({self.k - 1})"
        with w.block(f"if reaches({x}, {self.value(point, last)}):"):
            i = w.keep(Expressions(w, point).value(self.s.at, "i64").text, "i")
            with w.block(f"if before({x}, {i}, {self.value(point, last)}, {self.place(point, last)}):"):
                self.put(point, last, x, i)
                if self.k > 1:
                    self.rise(point, x, i)

    def rise(self, point: Point, x: str, i: str) -> None:
        """The last of a list changes places with what it comes before."""
        w, v = self.w, self.w.names.fresh("v")
        with w.block(f"for {v} in T.serial(i64({self.k - 1})):"):
            up, down = f"({self.k - 2} - {v})", f"({self.k - 1} - {v})"
            y, j = w.keep(self.value(point, up), "y"), w.keep(self.place(point, up), "i")
            with w.block(f"if before({x}, {i}, {y}, {j}):"):
                self.put(point, down, y, j)
                self.put(point, up, x, i)

    def put(self, point: Point, k: str, value: str, place: str) -> None:
        self.w.line(f"{self.value(point, k)} = {value}")
        self.w.line(f"{self.place(point, k)} = {place}")

