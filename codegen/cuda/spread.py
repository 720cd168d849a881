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
from itertools import product
from typing import TYPE_CHECKING

from memcomp.ir.expr import Access, Expr, variables, walk
from memcomp.ir.tile import (
    Best,
    Dot,
    Fold,
    Load,
    Loop,
    Store,
    TileKernel,
    When,
    expressions,
    statements,
)

if TYPE_CHECKING:
    from memcomp.codegen.cuda.lives import Lives

LANE_BITS = 5
MOST, FEW = 255, 128   # registers of a thread: that there are, and that leave room for a second block
SPARE = 56             # by which `Lives.pressure` may be too low
LARGE = 64             # registers of one tile
MORE = 1.25            # times the least work that threads may do for wider loads and fewer registers
FILE = 65536           # registers of a processor


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


def blocks(k: TileKernel, vectors: Mapping[str, int], lives: Lives) -> Block:
    """The spread of a kernel: of those with which registers suffice and threads compute little more than they must, the
    most neighbours, then the least warps, and threads along a row.

    vectors: by dim how many neighbours are read at once.  A thread needs registers for every row that its neighbours
    are multiplied with: where they do not suffice it has fewer neighbours, and after that, such rows are divided among
    lanes that hold the same ones.
    """
    meeting = list(_spaces(k))
    streamed = _streamed(k)
    inner = sorted(_rows(k), key=lambda d: vectors.get(d, 1) == 1)   # lanes side by side read side by side
    found: dict[tuple[Spread, ...], tuple[float, Block]] = {}
    fit: list[tuple[int, Block]] = []
    for own, part in product((0, 1, 2), (1, 2, 4)):
        less = {d: max(n // part, 1) for d, n in vectors.items()}
        tried = {}
        for warps, lanes in product((0, 1, 2, 3, 4), (3, 4, 5)):
            b = _spread(k, less, meeting, streamed, inner, warps, lanes, own)
            key = tuple(b.dims.values())
            if key not in found:
                found[key] = tried[key] = lives.pressure(b), b
        fit += [(work(k, b), b) for most in (FEW, MOST) for p, b in tried.values()
                if p <= min(most, b.safe) and lives.largest(b) <= LARGE]
    least = min((n for n, _ in fit), default=0)
    fewest = min(found.values(), key=lambda x: x[0] - x[1].most)[1]
    return next((b for n, b in fit if n <= MORE * least), fewest)


def work(k: TileKernel, b: Block) -> int:
    """Numbers that the threads of a block compute in a step of each loop, or in all where there is none: what several
    threads hold counts as often."""
    loops = [s for s in statements(k.body) if isinstance(s, Loop)]
    body = [s for loop in loops for s in statements(loop.body)] or list(statements(k.body))
    return 32 * b.warps * sum(b.registers((*k.tile(s.tile).dims, *(getattr(s, "over", ())))) for s in body
                              if not isinstance(s, (Load, Store, Loop, When)))


def _spread(k: TileKernel, vectors: Mapping[str, int], meeting: list[frozenset[str]], streamed: set[str],
            inner: list[str], warps: int, lanes: int, own: int) -> Block:
    """lanes, own: bits at most for each dim of rows, and of all that are neither such nor streamed, before others."""
    lists = {s.order for s in statements(k.body) if isinstance(s, Best)}   # a thread has all of a list
    dims = {d.name: Spread(d.capacity, vectors.get(d.name, 1)) for d in k.dims}

    def give(d: str, most: int) -> None:
        """Up to so many bits, of those that no dim has that d meets, while they leave fewer points to a thread."""
        if d in lists:
            return
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
        over = s.over if isinstance(s, (Fold, Best, Dot)) else ()
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
