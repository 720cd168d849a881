"""Contractions of pairs on tile registers: blocks of up to 32 x 32 sums, whole tiles along the contracted dim."""

from __future__ import annotations

from collections.abc import Callable

from memcomp.codegen.tvm.access import over_points
from memcomp.codegen.tvm.isa import TILE
from memcomp.codegen.tvm.pairs import Pairs, Product, order
from memcomp.codegen.tvm.writer import ELEMENT, Point, Writer, plus, times
from memcomp.ir.tile import Dot


def product(w: Writer, s: Dot, p: Product, x: Pairs, y: Pairs, point: Point) -> None:
    """Write a contraction whose operands lie packed: rows of x by columns of y.

    Sums go to the tile at once where its rows lie together and fill whole tile registers, else over a buffer: what is
    beyond the counts is rubbish and must find room.
    """
    t, n = w.tiles[s.tile], w.fixed(p.k)
    lane = t.dims[-1]
    batch = tuple(d for d in t.dims[:-1] if d != p.row)
    deeper = tuple(d for d in s.over if d != p.k)
    deep = p.by.each * TILE
    steps = f"i64({-(-n // deep)})" if n is not None else f"T.truncdiv({w.count(p.k)} + {deep - 1}, {deep})"
    rows, columns = (-(-c // TILE) for c in (w.dims[p.row].capacity, w.dims[lane].capacity))
    whole = t.dims[-2] == p.row and w.dims[p.row].capacity % TILE == 0 == w.padded(lane) % TILE
    direct = whole and not deeper and w.element(t) == ELEMENT[p.by.sums]
    sums = w.names[s.tile] if direct else w.names.fresh(f"{w.names[s.tile]}_sums")
    if not direct:
        w.buffers[sums] = ((2 * TILE, 2 * TILE), ELEMENT[p.by.sums])

    def block(q: Point, r: str, c: str, down: int, right: int) -> None:
        def multiply(inside: Point, add: bool) -> None:
            a = inside.scalars | {p.row: r, p.k: "i64(0)"}
            b = inside.scalars | {lane: c, p.k: "i64(0)"}
            at_a, at_b = (", ".join(v[d] for d in order(w, o.side)) for o, v in ((x, a), (y, b)))
            to = ", ".join([*(inside.scalars[d] for d in t.dims[:-2]), r, c] if direct else ["i64(0)", "i64(0)"])
            w.line(f"tile_product({sums}, [{to}], {x.buffer}, [{at_a}], {y.buffer}, [{at_b}], {steps}, {down}, "
                   f"{right}, {add}, {p.by.instruction!r})")

        if direct:
            multiply(q, s.accumulate)
            return
        if deeper:
            zero = "f32(0.0)" if p.by.sums == "f32" else "T.int32(0)"
            i, j = w.names.fresh("i"), w.names.fresh("j")
            with w.block(f"for {i} in T.serial({down * TILE}):"), w.block(f"for {j} in T.serial({right}):"):
                w.line(f"{sums}[{i}, at({TILE}, {j} * {TILE})] = splat({zero}, {TILE})")
        over_points(w, deeper, q, lambda inside: multiply(inside, bool(deeper)))
        i = w.names.fresh("i")
        with w.block(f"for {i} in T.serial(T.min(i64({down * TILE}), {w.count(p.row)} - {r})):"):
            for start in range(0, right * TILE, TILE):
                got = f"{sums}[{i}, at({TILE}, {start})]"
                got = got if t.dtype == "f32" else f"cast({w.element(t)!r}, {got})"
                out = w.tile_at(t.name, q.scalars | {p.row: f"({r} + {i})"}, f"at({TILE}, {plus(c, start)})")
                w.line(f"{out} = {out + ' + ' if s.accumulate else ''}{got}")

    over_points(w, batch, point, lambda q: _blocks(
        w, p.row, rows, lambda r, down: _blocks(w, lane, columns, lambda c, right: block(q, r, c, down, right))))


def _blocks(w: Writer, dim: str, most: int, body: Callable[[str, int], None]) -> None:
    """Call body(first element, tiles) for pairs of tiles along a dim that has points there, then for a last single."""
    n, wide = w.fixed(dim), 2 * TILE
    if most > 1:
        reached = f"i64({min(-(-n // wide), most // 2)})" if n is not None else \
            f"T.min(T.truncdiv({w.count(dim)} + {wide - 1}, {wide}), i64({most // 2}))"
        with w.repeat("block", reached) as i:
            body(times(i, wide), 2)
    if most % 2:
        start = most // 2 * wide
        if n is not None:
            body(f"i64({start})", 1)
        else:
            with w.block(f"if {w.count(dim)} > {start}:"):
                body(f"i64({start})", 1)
