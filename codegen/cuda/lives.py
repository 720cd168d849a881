"""How many registers a thread needs, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from memcomp.codegen.cuda.inline import Inline, reads
from memcomp.codegen.cuda.rows import Held
from memcomp.codegen.cuda.spread import Block
from memcomp.ir.expr import Access, walk
from memcomp.ir.tile import Loop, Statement, TileKernel, When, made

OTHER = 40   # registers for addresses, counts, indices
TAKEN = 8    # for what is on its way out of stored codes


@dataclass(frozen=True, slots=True)
class Lives:
    """From which statement of a kernel to which the numbers of each tile are needed.

    held: how each tile lies in registers; inline: tiles that are computed where they are read.
    """

    k: TileKernel
    held: Mapping[str, Held]
    inline: Mapping[str, Inline]
    statements: int
    spans: Mapping[str, tuple[int, int]]

    @staticmethod
    def of(k: TileKernel, held: Mapping[str, Held], inline: Mapping[str, Inline]) -> Lives:
        order: list[Statement] = []
        loops: list[tuple[int, int]] = []

        def visit(body: tuple[Statement, ...]) -> None:
            for s in body:
                order.append(s)
                at = len(order) - 1
                if isinstance(s, (Loop, When)):
                    visit(s.body)
                if isinstance(s, When):
                    visit(s.orelse)
                if isinstance(s, Loop):
                    loops.append((at, len(order) - 1))

        visit(k.body)
        names = {t.name for t in k.tiles}
        uses: dict[str, list[int]] = {t: [] for t in names}
        fresh: dict[str, list[int]] = {t: [] for t in names}
        for n, s in enumerate(order):
            read = reads(s) & names
            for t in read & inline.keys():
                read |= {x.tensor for x in walk(inline[t].body) if isinstance(x, Access)}
            for t in made(s):
                if t not in read:
                    fresh[t].append(n)
                uses[t].append(n)
            for t in read:
                uses[t].append(n)
        spans = {}
        for t, at in uses.items():
            if not at:
                continue
            first, last = min(at), max(at)
            for lo, hi in loops:
                inside = [n for n in at if lo <= n <= hi]
                if inside and not (first >= lo and last <= hi and min(inside) in fresh[t]):
                    first, last = min(first, lo), max(last, hi)
            spans[t] = first, last
        return Lives(k, held, inline, len(order), spans)

    def words(self, b: Block, tile: str) -> float:
        """Registers of a thread for a tile while it is needed."""
        dims = self.k.tile(tile).dims
        size = self.held[tile].words(b, dims)
        if tile not in self.inline:
            return size
        # the compiler has some of them ready
        return max(size / 4, self.held[tile].words(b, tuple(d for d in dims if d in self.inline[tile].over)))

    def pressure(self, b: Block) -> float:
        """Registers of a thread at the statement that needs most: of what is written before it and read after."""
        change = [0.0] * (self.statements + 1)
        for t, (first, last) in self.spans.items():
            size = self.words(b, t)
            change[first] += size
            change[last + 1] -= size
        return OTHER + TAKEN * bool(self.inline) + max(accumulate(change), default=0.0)

    def largest(self, b: Block) -> float:
        """Registers of the largest tile."""
        return max((self.words(b, t) for t in self.spans if t not in self.inline), default=0)
