"""What tiles hold at points that do not count, and where one mask serves several reductions.

The laws are those of guards (`lower_laws.Fills`): a score of -inf stays so when a finite number is taken from it, and
its exponential is 0.  So a score that is masked once, with the identity of the reduction that reads it first, needs no
mask in the sums that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from memcomp.codegen.lower_laws import Fills
from memcomp.codegen.triton.layout import Axis, Layout
from memcomp.ir.expr import Access, Expr, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.tile import Dot, Fold, Map, Statement, Store, TileKernel, expressions, made, statements

_ANY: frozenset[Expr] = frozenset()


class Dead:
    """Known numbers at dead points, by tile and axis, as of the statement that is written."""

    def __init__(self, k: TileKernel, layout: Layout, real: Collection[str]) -> None:
        self.layout, self.real = layout, real
        self.tiles = {t.name: layout.of(t.dims) for t in k.tiles}
        self.held: dict[tuple[str, str], float] = {}
        self.never_low: set[str] = set()
        writing: dict[str, list[Statement]] = {}
        for s in statements(k.body):
            for t in made(s):
                writing.setdefault(t, []).append(s)
        for tile, writers in writing.items():   # each is known of before what is made of it
            laws = self._laws("")
            if all(isinstance(s, Map) and laws.never_low(s.body) for s in writers):
                self.never_low.add(tile)

    def _laws(self, axis: str) -> Fills:
        laws = Fills(finite=False)
        laws.held = {t: (_ANY, x) for (t, a), x in self.held.items() if a == axis}
        laws.bounded = self.never_low
        return laws

    def at(self, e: Expr, axis: Axis) -> float | None:
        """The value at dead points of an axis, where it is one known number."""
        return self._laws(axis.name).at(e, _ANY)

    def set(self, tile: str, known: Callable[[Axis], float | None]) -> None:
        """What a statement has just written."""
        for a in self.tiles[tile]:
            self.held.pop((tile, a.name), None)
            if tile in self.real and (x := known(a)) is not None:
                self.held[tile, a.name] = x

    def forget(self, body: tuple[Statement, ...], changing: Iterable[Axis]) -> None:
        """What is not so in every step of a loop: tiles that it writes, axes whose counts change."""
        written = {t for s in statements(body) for t in made(s)}
        gone = {a.name for a in changing}
        self.held = {(t, a): x for (t, a), x in self.held.items() if t not in written and a not in gone}

    def fill(self, s: Map, rest: tuple[Statement, ...], full: Collection[str]) -> tuple[float, tuple[Axis, ...]] | None:
        """What to write at dead points of which axes, so that the reduction that reads the tile next needs no mask."""
        if s.tile not in self.real:
            return None
        for x in rest:
            inner = tuple(statements((x,)))
            reads = any(isinstance(n, Access) and n.tensor == s.tile for y in inner for e in expressions(y)
                        for n in walk(e))
            if reads and isinstance(x, (Fold, Dot)):
                return self._absorbed(s.tile, x, full)
            if reads or any(s.tile in made(y) or isinstance(y, Store) and y.tile == s.tile for y in inner):
                return None
        return None

    def _absorbed(self, tile: str, s: Fold | Dot, full: Collection[str]) -> tuple[float, tuple[Axis, ...]] | None:
        gone = tuple(a for a in self.layout.of(s.over) if a in self.tiles[tile] and a.name not in full)
        identity = float(MONOIDS[s.monoid].identity) if isinstance(s, Fold) else 0.0
        before = dict(self.held)
        for value in dict.fromkeys((identity, 0.0)) if gone else ():
            self.held.update({(tile, a.name): value for a in gone})
            fits = value == 0.0 if isinstance(s, Dot) else all(self.at(s.body, a) == identity for a in gone)
            self.held = dict(before)
            if fits:
                return value, gone
        return None
