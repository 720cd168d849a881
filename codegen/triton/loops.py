"""What the loops of a kernel hold and stream, as Triton's pipeline and tensor cores see it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, Union

from memcomp.codegen.rounding import narrow
from memcomp.codegen.triton.layout import layout
from memcomp.codegen.triton.parts import parts
from memcomp.codegen.triton.straight import straight
from memcomp.ir.expr import Access, Const, variables, walk
from memcomp.ir.target import BYTES
from memcomp.ir.tile import (
    Best,
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    TileKernel,
    TileProgram,
    When,
    expressions,
    made,
    statements,
)

Step: TypeAlias = Union[Load, Map, Fold, Dot, Best]


@dataclass(frozen=True, slots=True)
class Product:
    """A contraction as tensor cores see it: rows of the left operand, columns of the right one, points summed over;
    left, right: the operands' tiles; bytes: of one of their elements; exact: in f32, as three products of two parts
    of each operand; cut: the rows are part of a longer rank."""

    tile: str
    rows: int
    columns: int
    depth: int
    left: str
    right: str
    bytes: int
    exact: bool
    cut: bool


@dataclass(frozen=True, slots=True)
class Body:
    """Statements that run as one loop, or those of a kernel in no loop.

    branched: a product stands in a branch, or anything where there are no products, so that nothing is fetched ahead.
    full: dims of which a loop's steps have all points.
    """

    steps: tuple[Step, ...]
    products: tuple[Product, ...]
    looped: bool
    branched: bool
    full: frozenset[str] = frozenset()

    @property
    def written(self) -> set[str]:
        return {s.tile for s in self.steps}

    def loaded(self, tile: str) -> bool:
        """Is the tile loaded in this body, and nothing else?"""
        found = [s for s in self.steps if s.tile == tile]
        return bool(found) and all(isinstance(s, Load) for s in found)


class Loops:
    """The loops of one kernel."""

    def __init__(self, tp: TileProgram, k: TileKernel) -> None:
        self.k, self.layout, self.narrow = straight(k), layout(k), narrow(tp)
        self.params = {p.name: p.dtype for p in tp.params}
        self.tiles = {t.name: t for t in self.k.tiles}
        self.loads: dict[str, list[Load]] = {}
        self.computed: set[str] = set()
        for s in statements(self.k.body):
            if isinstance(s, Load):
                self.loads.setdefault(s.tile, []).append(s)
            else:
                self.computed |= {*made(s)}

    def ragged(self, body: Body, tile: str) -> bool:
        """Do rows of the tile end at places that are known only when it runs, so that each element is fetched alone?"""
        along = variables(self.loads[tile][0].source.index[-1]) & {*self.tiles[tile].dims}
        return any(d not in body.full and not isinstance(self.k.dim(d).count, Const) for d in along)

    def dims(self, tile: str) -> int:
        return len(self.layout.of(self.tiles[tile].dims))

    def points(self, tile: str) -> int:
        """Elements of a tile as Triton holds it, sizes rounded up to powers of two."""
        return math.prod(a.size for a in self.layout.of(self.tiles[tile].dims))

    def element(self, tile: str) -> int:
        """Bytes of an element: as stored where the tile is only loaded."""
        if tile in self.loads and tile not in self.computed:
            return BYTES[self.params[self.loads[tile][0].source.tensor]]
        return BYTES[self.tiles[tile].dtype]

    @cached_property
    def bodies(self) -> tuple[Body, ...]:
        """The innermost loops, each part of one that is written in parts for itself; the kernel where there is none."""
        found = [b for s in statements(self.k.body) if isinstance(s, Loop)
                 and not any(isinstance(x, Loop) for x in statements(s.body)) for b in self._parts(s)]
        return tuple(found) or (self._body(self.k.body, False),)

    def _parts(self, s: Loop) -> Iterator[Body]:
        for p in parts(self.k, s):
            yield self._body(p.body, True, p.full)

    def _body(self, body: tuple[Statement, ...], looped: bool, full: frozenset[str] = frozenset()) -> Body:
        steps = tuple(s for s in statements(body) if isinstance(s, (Load, Map, Fold, Dot, Best)))
        found = tuple(p for s in steps if isinstance(s, Dot) if (p := self._product(s)) is not None)
        branched = any(isinstance(s, When) and (not found or any(isinstance(x, Dot) for x in statements((s,))))
                       for s in statements(body))
        return Body(steps, found, looped, branched, full)

    def _product(self, s: Dot) -> Product | None:
        """None where the contraction is multiplied and summed without tensor cores."""
        x = self.layout.matrices(self.k, s)
        if x is None or self.tiles[s.tile].dtype == "f64":
            return None
        a, b = x.a.tensor, x.b.tensor
        stored = {self.stored(a), self.stored(b)}
        rounded = len(stored) == 2 and "" in stored and (self.k.name, s.tile, max(stored)) in self.narrow
        exact = not (stored in ({"bf16"}, {"f16"}) or rounded or self.tiles[s.tile].dtype == "i64")
        size = 4 if exact else min(self.element(a), self.element(b))
        cut = any(self.k.dim(d).start != Const(0) for d in x.left.dims)
        return Product(s.tile, x.left.size, x.right.size, x.over.size, a, b, size, exact, cut)

    def stored(self, tile: str) -> str:
        """The format of a tile that is only loaded, "" for one that is computed."""
        return "" if tile in self.computed else self.params[self.loads[tile][0].source.tensor]

    def feeding(self, body: Body, tiles: Iterable[str]) -> set[str]:
        """Tiles that the loop loads and that these are computed from in one step, themselves included."""
        return {t for t in self._before(body, tiles) if body.loaded(t)}

    def follows(self, body: Body, tile: str) -> bool:
        """Is the tile computed from what a product has made, so that it lies as that does?"""
        return bool(self._before(body, [tile]) & {p.tile for p in body.products})

    def _before(self, body: Body, tiles: Iterable[str]) -> set[str]:
        seen: set[str] = set()
        todo = list(tiles)
        while todo:
            tile = todo.pop()
            if tile in seen:
                continue
            seen.add(tile)
            todo += [n.tensor for s in body.steps if s.tile == tile and not isinstance(s, Load)
                     for e in expressions(s) for n in walk(e) if isinstance(n, Access) and n.tensor in self.tiles]
        return seen
