"""How the points of tiles are spread over the threads of a block.

A dim has one spread in a whole kernel: bits of the thread's number say which of its points a thread holds, the rest of
them lie in the thread's registers.  Dims that meet in a statement have bits of their own; dims that never meet may
share them (the width of keys and that of values).  So no tile ever changes hands: a tile is held alike by all threads
that differ in bits of other dims only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memcomp.ir.expr import Access, Expr, variables, walk
from memcomp.ir.tile import Dot, Fold, Loop, Statement, Store, TileKernel, When, expressions, statements

if TYPE_CHECKING:
    from memcomp.codegen.cuda.rows import Held

LANE_BITS = 5
MOST, FEW = 255, 128   # registers of a thread: that there are, and that leave room for a second block
SPARE = 48             # by which `pressure` may be too low
LARGE = 64             # registers of one tile
FILE = 65536           # registers of a processor
OTHER = 40             # addresses, counts, indices


@dataclass(frozen=True, slots=True)
class Spread:
    """capacity: points; vector: neighbours that a thread holds together; bits: of the thread's number, lowest first."""

    capacity: int
    vector: int = 1
    bits: tuple[int, ...] = ()

    @property
    def step(self) -> int:
        """Points from one group of a thread to its next."""
        return self.vector << len(self.bits)

    @property
    def registers(self) -> int:
        return -(-self.capacity // self.step) * self.vector

    @property
    def exact(self) -> bool:
        """Is there a point at every place?"""
        return self.capacity % self.step == 0

    @property
    def mask(self) -> int:
        return sum(1 << b for b in self.bits)


Spreads = Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class Block:
    """warps: of a block; dims: the spread of each."""

    warps: int
    dims: Spreads

    @property
    def most(self) -> int:
        """Registers that a thread may have."""
        return min(MOST, FILE // (32 * self.warps))

    @property
    def safe(self) -> int:
        """What an estimate may say."""
        return self.most - SPARE

    def mask(self, dims: tuple[str, ...] | frozenset[str]) -> int:
        """Bits of the thread's number that say something of these dims."""
        return sum(1 << b for b in {b for d in dims for b in self.dims[d].bits})

    def registers(self, dims: tuple[str, ...]) -> int:
        return math.prod(self.dims[d].registers for d in dims)


def blocks(k: TileKernel, vectors: Mapping[str, int], held: Mapping[str, Held]) -> Block:
    """The spread of a kernel: the widest loads, then the least warps, and threads along a row, with which registers
    suffice.

    vectors: by dim how many neighbours are read at once; held: how each tile lies in registers.  What reads neighbours
    needs registers for every row that they are multiplied with; where these do not suffice, such rows are divided among
    neighbouring lanes, which then read the same; after that, less is read at once.
    """
    meeting = list(_spaces(k))
    streamed = _streamed(k)
    inner = _rows(k)
    found: list[tuple[float, Block]] = []
    for part in (1, 2, 4):
        less = {d: max(n // part, 1) for d, n in vectors.items()}
        for own in (0, 1, 2):
            tried = []
            for warps in (0, 1, 2, 3, 4):
                for lanes in (3, 4, 5):
                    b = _spread(k, less, meeting, streamed, inner, warps, lanes, own)
                    tried.append((pressure(k, b, held), b))
            for most in (FEW, MOST):
                for p, b in tried:
                    if p <= min(most, b.safe) and _largest(k, b, held) <= LARGE:
                        return b
            found += tried
    return min(found, key=lambda x: x[0] - x[1].most)[1]


def _largest(k: TileKernel, b: Block, held: Mapping[str, Held]) -> float:
    """Registers of the largest tile."""
    return max((held[t.name].words(b, t.dims) for t in k.tiles), default=0)


def _spread(k: TileKernel, vectors: Mapping[str, int], meeting: list[frozenset[str]], streamed: set[str],
            inner: list[str], warps: int, lanes: int, own: int) -> Block:
    """lanes, own: bits at most for each dim of rows, and of all that are neither such nor streamed, before others."""
    dims = {d.name: Spread(d.capacity, vectors.get(d.name, 1)) for d in k.dims}

    def give(d: str, most: int) -> None:
        """Up to so many bits, of those that no dim has that d meets, while they leave fewer points to a thread."""
        taken = {b for s in meeting if d in s for x in s if x != d for b in dims[x].bits}
        for bit in range(LANE_BITS + warps):
            s = dims[d]
            more = Spread(s.capacity, s.vector, (*s.bits, bit))
            if bit in taken or bit in s.bits or len(s.bits) >= most or more.registers == s.registers:
                continue
            dims[d] = more

    every = [d.name for d in sorted(k.dims, key=lambda d: (d.name not in streamed, -d.capacity))]
    for d in inner:
        give(d, lanes)
    for d in every:
        if d not in inner and d not in streamed and own:
            give(d, own)
    for d in every:
        if d not in inner:
            give(d, LANE_BITS + warps)
    for d in every:
        give(d, LANE_BITS + warps)
    used = max((b for s in dims.values() for b in s.bits), default=0)
    return Block(1 << max(used + 1 - LANE_BITS, 0), dims)


def _spaces(k: TileKernel) -> Iterator[frozenset[str]]:
    """The dims that meet in each statement."""
    for s in statements(k.body):
        if isinstance(s, (Loop, When)):
            continue
        over = s.over if isinstance(s, (Fold, Dot)) else ()
        yield frozenset((*k.tile(s.tile).dims, *over))


def _streamed(k: TileKernel) -> set[str]:
    """Dims that a loop walks along."""
    loops = {s.var for s in statements(k.body) if isinstance(s, Loop)}
    return {d.name for d in k.dims if variables(d.start) & loops}


def _rows(k: TileKernel) -> list[str]:
    """Dims that the last index of a param walks along, those of the largest tiles first."""
    weight: dict[str, int] = {}
    names = {d.name for d in k.dims}
    for s in statements(k.body):
        if isinstance(s, (Loop, When)):
            continue
        read: list[Expr] = [*expressions(s), *([s.target] if isinstance(s, Store) else [])]
        for a in (n for e in read for n in walk(e) if isinstance(n, Access)):
            if a.index and a.tensor not in {t.name for t in k.tiles}:
                size = math.prod(k.dim(d).capacity for d in k.tile(s.tile).dims)
                for d in variables(a.index[-1]) & names:
                    weight[d] = max(weight.get(d, 0), size)
    return sorted(weight, key=lambda d: -weight[d])


def pressure(k: TileKernel, b: Block, held: Mapping[str, Held]) -> float:
    """Registers of a thread at the statement that needs most: of tiles that are written before it and read after."""
    order: list[Statement] = []
    spans: list[tuple[int, int]] = []

    def visit(body: tuple[Statement, ...]) -> None:
        for s in body:
            order.append(s)
            at = len(order) - 1
            if isinstance(s, (Loop, When)):
                visit(s.body)
            if isinstance(s, When):
                visit(s.orelse)
            if isinstance(s, Loop):
                spans.append((at, len(order) - 1))

    visit(k.body)
    names = {t.name for t in k.tiles}
    uses: dict[str, list[int]] = {t: [] for t in names}
    fresh: dict[str, list[int]] = {t: [] for t in names}
    for n, s in enumerate(order):
        read = {x.tensor for e in expressions(s) for x in walk(e) if isinstance(x, Access)} & names
        if isinstance(s, Store):
            read |= {s.tile} | ({x.tensor for x in walk(s.target) if isinstance(x, Access)} & names)
        elif not isinstance(s, (Loop, When)):
            if getattr(s, "accumulate", False):
                read.add(s.tile)
            if s.tile not in read:
                fresh[s.tile].append(n)
            uses[s.tile].append(n)
        for t in read:
            uses[t].append(n)
    load = [0.0] * len(order)
    for t, at in uses.items():
        if not at:
            continue
        first, last = min(at), max(at)
        for lo, hi in spans:
            inside = [n for n in at if lo <= n <= hi]
            if inside and not (first >= lo and last <= hi and min(inside) in fresh[t]):
                first, last = min(first, lo), max(last, hi)
        size = held[t].words(b, k.tile(t).dims)
        for n in range(first, last + 1):
            load[n] += size
    return OTHER + max(load, default=0.0)


def places(thread: str, bits: tuple[int, ...], vector: int) -> str:
    """The first point of a thread along a dim: these bits of its number, in a row, times the vector."""
    runs: list[list[int]] = []
    for b in bits:
        if runs and runs[-1][-1] == b - 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    texts, low = [], 0
    for run in runs:
        text = f"({thread} >> {run[0]} & {(1 << len(run)) - 1})" if run[0] else f"({thread} & {(1 << len(run)) - 1})"
        texts.append(f"{text} * {vector << low}" if vector << low > 1 else text)
        low += len(run)
    return " + ".join(texts)
