"""What a block of a kernel takes of a GPU before anything is compiled: shared memory, tensor memory, registers.

Triton keeps in shared memory: one copy of each operand of a product that a loop does not change; of each tensor that
a loop streams, as many tiles as the pipeline has stages where the tensor cores read them themselves (`wgmma` and
`tcgen05`, from 64 rows on), one less where warps fetch them (`mma.sync`); and, one after another, what passes from
warp to warp: a computed operand whose columns are spread over warps, partial results of a reduction.  The forms below
were read off its allocations (`benchmarks/gpu_resources.py` compares them with compiled kernels); `docs/gpu.md` says
how exact they are.  Registers are an estimate, good enough to order candidates: fitted, not derived.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from memcomp.codegen.triton.layout import Layout, layout, sides
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, walk
from memcomp.ir.target import BYTES, Target
from memcomp.ir.tile import (
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    TileKernel,
    TileProgram,
    expressions,
    statements,
)

ASYNC_ROWS = 64    # fewer rows and the tensor cores of sm_90 and sm_100 are fed through registers, as before
COLUMNS = 512      # of tensor memory
# registers = first number + the others times what `held` counts, in its order; `benchmarks/gpu_resources.py --fit`
FITTED = {"mma": (120.0, 0.7, 1.3, 0.5, 2.6), "wgmma": (48.0, 0.5, 1.0, 0.8, 6.0), "tcgen05": (65.0, 0.4, 0.8, 0.8, 4.8)}
SPILLED = 255.0    # an estimate from which on kernels spilled
BARRIER = 8        # bytes
ALIGNED = 1024     # bytes: of a tile that `tcgen05` reads; what lies before it is rounded up


@dataclass(frozen=True, slots=True)
class Setting:
    """How a kernel is compiled: warps of a block, stages of its loops' pipeline."""

    warps: int
    stages: int


SETTINGS = tuple(Setting(w, s) for w in (4, 8, 1, 2) for s in (3, 2, 1))


@dataclass(frozen=True, slots=True)
class Need:
    """Of one block.  shared: bytes; tensor_memory: columns (sm_100); registers: of a thread, estimated and not cut
    at what a thread can have, so that candidates beyond it are ordered too; spills: whether some are to be expected."""

    shared: int
    tensor_memory: int
    registers: float
    spills: bool


@dataclass(frozen=True, slots=True)
class Product:
    """A contraction as tensor cores see it: rows of the left operand, columns of the right one, points summed over;
    left, right: the operands' tiles; bytes: of one of their elements; exact: f32 operands, multiplied in three parts."""

    tile: str
    rows: int
    columns: int
    depth: int
    left: str
    right: str
    bytes: int
    exact: bool

    def asynchronous(self, capability: int, warps: int) -> bool:
        """Do the tensor cores read the right operand from shared memory?"""
        return capability >= 90 and self.rows >= ASYNC_ROWS and warps % 4 == 0 and not self.exact


def need(tp: TileProgram, k: TileKernel, target: Target, setting: Setting) -> Need:
    """What a block of one launch takes.  Raises Refusal where the kernel has no layout."""
    return _Reader(tp, k, layout(k), target.capability, setting).need()


def held(tp: TileProgram, k: TileKernel, target: Target, setting: Setting) -> dict[str, float]:
    """What the estimate of registers counts, of the loop that takes most of them."""
    reader = _Reader(tp, k, layout(k), target.capability, setting)
    return reader.held(max(reader.bodies(k.body), key=reader.estimate))


def chosen(tp: TileProgram, k: TileKernel, target: Target) -> Setting:
    """The setting to compile a launch with: one that fits and does not spill, if there is one; of these the most stages,
    and warps that each have rows of their own.

    Raises Refusal where none fits: with the bytes needed and there, and the nearest tile sizes that would fit.
    """
    axes = layout(k)
    fitting = list(_fitting(tp, k, axes, target))
    if fitting:
        wanted = _Reader(tp, k, axes, target.capability, Setting(4, 1)).warps()
        return min(fitting, key=lambda x: (x[1].spills, -x[0].stages, abs(x[0].warps - wanted), x[1].registers))[0]
    least = min((need(tp, k, target, s) for s in SETTINGS), key=lambda n: n.shared)
    there = target.level("smem").bytes
    what = f"{k.name} needs {least.shared:,} bytes of shared memory, and a block of {target.name} has {there:,}"
    if least.shared <= there:
        what = f"{k.name} needs {least.tensor_memory} columns of tensor memory, and a block of {target.name} has {COLUMNS}"
    near = nearest_fit(tp, k, target)
    raise Refusal(what, tp.name, "it fits with " + ", ".join(f"{d} = {n}" for d, n in near.items()) if near else
                  "no smaller tile of the ranks that are cut fits: cut the others")


def nearest_fit(tp: TileProgram, k: TileKernel, target: Target) -> dict[str, int]:
    """The capacities of tile dims, of those that are cut from a longer rank, that differ least from the kernel's and
    fit; {} where none do."""
    cut = [d for d in k.dims if d.start != Const(0) and d.capacity > 1]
    for steps in range(1, sum(d.capacity.bit_length() for d in cut) + 1):
        found: list[dict[str, int]] = []
        for halved in combinations_with_replacement(cut, steps):
            sizes = {d.name: d.capacity >> halved.count(d) for d in cut}
            if min(sizes.values()) < 1:
                continue
            smaller = replace(k, dims=tuple(replace(d, capacity=sizes.get(d.name, d.capacity)) for d in k.dims))
            if any(_fitting(tp, smaller, layout(smaller), target)):
                found.append(sizes)
        if found:
            best = max(found, key=lambda sizes: min(sizes.values()))
            return {d.name: best[d.name] for d in cut if best[d.name] != d.capacity}
    return {}


def _fitting(tp: TileProgram, k: TileKernel, axes: Layout, target: Target) -> Iterator[tuple[Setting, Need]]:
    multiplies = any(isinstance(s, Dot) for s in statements(k.body))
    for s in SETTINGS:
        if multiplies and s.warps < 4:
            continue   # tensor cores of one processor are fed by four warps
        n = _Reader(tp, k, axes, target.capability, s).need()
        if n.shared <= target.level("smem").bytes and n.tensor_memory <= COLUMNS:
            yield s, n


class _Reader:
    """One kernel with one setting."""

    def __init__(self, tp: TileProgram, k: TileKernel, axes: Layout, capability: int, setting: Setting) -> None:
        self.k, self.layout, self.capability, self.setting = k, axes, capability, setting
        self.params = {p.name: p.dtype for p in tp.params}
        self.tiles = {t.name: t for t in k.tiles}
        self.loads: dict[str, list[Load]] = {}
        self.written: dict[str, int] = {}
        for s in statements(k.body):
            if isinstance(s, (Load, Map, Fold, Dot)):
                self.written[s.tile] = self.written.get(s.tile, 0) + 1
            if isinstance(s, Load):
                self.loads.setdefault(s.tile, []).append(s)

    def points(self, tile: str) -> int:
        """Elements of a tile as Triton holds it, sizes rounded up to powers of two."""
        return math.prod(a.size for a in self.layout.of(self.tiles[tile].dims))

    def element(self, tile: str) -> int:
        """Bytes of an element where the tile is kept: as stored, if it is only loaded."""
        if tile in self.loads and self.written[tile] == 1:
            return BYTES[self.params[self.loads[tile][0].source.tensor]]
        return BYTES[self.tiles[tile].dtype]

    def product(self, s: Dot) -> Product | None:
        """None where the contraction is multiplied and summed without tensor cores."""
        x = sides(self.k, s)
        left, right, over = (self.layout.of(d) for d in (x.left, x.right, x.over))
        if len(left) != 1 or len(right) != 1 or len(over) != 1 or len(x.batch) > 1 or self.tiles[s.tile].dtype == "f64":
            return None
        a, b = s.a.tensor, s.b.tensor
        if self.layout.axes.index(right[0]) < self.layout.axes.index(left[0]):
            a, b, left, right = b, a, right, left
        size = min(self.element(a), self.element(b))
        return Product(s.tile, left[0].size, right[0].size, over[0].size, a, b, size, size > 2)

    # -- shared memory -----------------------------------------------------------------------------------------------

    def need(self) -> Need:
        shared = max((self.shared(body) for body in self.bodies(self.k.body)), default=0)
        columns = max((self.tensor_memory(body) for body in self.bodies(self.k.body)), default=0)
        registers, spills = self.registers()
        return Need(shared, columns, registers, spills)

    def bodies(self, body: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
        """What runs as one loop: the statements of each innermost loop, and those in no loop."""
        inner = [s for s in statements(body) if isinstance(s, Loop)]
        for s in inner:
            if not any(isinstance(x, Loop) for x in statements(s.body)):
                yield tuple(statements(s.body))
        if not inner:
            yield tuple(statements(body))

    def products(self, body: Iterable[Statement]) -> list[Product]:
        return [p for s in body if isinstance(s, Dot) if (p := self.product(s)) is not None]

    def shared(self, body: tuple[Statement, ...]) -> int:
        """Bytes that a loop needs at once."""
        products = self.products(body)
        stages = self.setting.stages
        own = {s.tile: s for s in body if isinstance(s, (Load, Map, Fold, Dot))}
        looped = body != tuple(statements(self.k.body))
        held: dict[str, int] = {}
        streamed: dict[str, int] = {}
        passing = [0]
        turns = [0]   # what lies there while one product is computed, where nothing is fetched ahead
        for p in products:
            fetched = p.asynchronous(self.capability, self.setting.warps)
            turn = 0
            for tile, left in ((p.left, True), (p.right, False)):
                size = (p.rows if left else p.columns) * p.depth * p.bytes
                if tile not in own and looped:
                    held[tile] = size
                elif isinstance(own.get(tile), Load) and not p.exact:
                    streamed[tile] = max(streamed.get(tile, 0), size * (stages if fetched else stages - 1))
                    turn += size
                elif not (left and (fetched or not self.spread(products, p))):
                    passing.append(size)
                    turn += size
            turns.append(turn)
            for tile in self.feeding((p.left, p.right), own):
                if tile not in (p.left, p.right) or p.exact:
                    streamed.setdefault(tile, self.points(tile) * self.element(tile) * (stages - 1))
        for s in body:
            if isinstance(s, (Fold, Dot)) and s.over and not any(p.tile == s.tile for p in products):
                passing.append(self.reduction(s, products))
        if stages == 1 or not looped:
            return sum(held.values()) + max(*turns, *passing)
        fetched = [p for p in products if p.asynchronous(self.capability, self.setting.warps)]
        if fetched and self.capability >= 100:
            passing.append(ALIGNED)
        barriers = 2 * BARRIER * len(fetched) if self.capability >= 100 else 0
        return sum(held.values()) + sum(streamed.values()) + max(passing) + barriers

    def spread(self, products: list[Product], p: Product) -> bool:
        """Are the columns of the operand that feeds p spread over warps?  Products that feed one another are laid out
        alike, after the last of them: all warps along its rows if it has as many as columns."""
        last = products[-1]
        return last.rows < last.columns or self.setting.warps * 16 > last.rows > last.columns

    def feeding(self, tiles: Iterable[str], own: dict[str, Load | Map | Fold | Dot]) -> set[str]:
        """Tiles that the loop loads and that these are computed from; single numbers and rows are not fetched ahead."""
        seen: set[str] = set()
        todo = list(tiles)
        while todo:
            tile = todo.pop()
            if tile in seen or tile not in own:
                continue
            seen.add(tile)
            todo += [n.tensor for e in expressions(own[tile]) for n in walk(e)
                     if isinstance(n, Access) and n.tensor in self.tiles]
        return {t for t in seen if isinstance(own[t], Load) and len(self.layout.of(self.tiles[t].dims)) > 1}

    def reduction(self, s: Fold | Dot, products: list[Product]) -> int:
        """Bytes that a reduction passes from warp to warp, at most: none where each warp has whole rows of a product."""
        read = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
        if self.setting.warps == 1 or any(
                p.tile in read and (p.asynchronous(self.capability, self.setting.warps) or not self.spread(products, p))
                for p in products):
            return 0
        return self.points(s.tile) * BYTES[self.tiles[s.tile].dtype] * self.setting.warps

    def tensor_memory(self, body: tuple[Statement, ...]) -> int:
        """Columns of 32-bit numbers that the sums, and operands that follow from sums, take (sm_100)."""
        if self.capability < 100:
            return 0
        fetched = [p for p in self.products(body) if p.asynchronous(self.capability, self.setting.warps)]
        sums = {p.tile for p in fetched}
        columns = sum(p.columns + (p.depth * p.bytes // 4 if p.left not in self.loads and len(sums) > 1 else 0)
                      for p in fetched)
        return 1 << max(columns - 1, 0).bit_length() if columns else 0

    def warps(self) -> int:
        """Warps for which there is work: 16 rows of a product each, else 32 numbers a thread at most."""
        products = [p for body in self.bodies(self.k.body) for p in self.products(body)]
        if products:
            return 8 if max(p.rows for p in products) >= 128 else 4
        most = max((self.points(t) for t in self.tiles), default=1)
        return max(1, min(8, most // (32 * 32)))

    # -- registers ---------------------------------------------------------------------------------------------------

    def registers(self) -> tuple[float, bool]:
        """Of a thread, estimated, and whether spills are to be expected."""
        found = [self.estimate(body) for body in self.bodies(self.k.body)]
        most = max(found, default=0.0)
        return most, most > SPILLED

    def estimate(self, body: tuple[Statement, ...]) -> float:
        fetched = any(p.asynchronous(self.capability, self.setting.warps) for p in self.products(body))
        form = "mma" if not fetched else "wgmma" if self.capability < 100 else "tcgen05"
        base, *weights = FITTED[form]
        return base + sum(w * n for w, n in zip(weights, self.held(body).values(), strict=True))

    def held(self, body: tuple[Statement, ...]) -> dict[str, float]:
        """What a thread holds in 32-bit registers in a loop, by kind.

        sums:      of tiles that one step hands to the next.
        values:    at most at once of the tiles that a step computes.
        rows:      of numbers for rows, which several threads hold alike.
        chunks:    addresses, one for each 16 bytes that a thread fetches.
        """
        threads, products = 32 * self.setting.warps, self.products(body)
        own = [s for s in body if isinstance(s, (Load, Map, Fold, Dot))]
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        carried: set[str] = set()
        for n, s in enumerate(own):
            read = {x.tensor for e in expressions(s) for x in walk(e) if isinstance(x, Access)} & set(self.tiles)
            if isinstance(s, (Fold, Dot)) and s.accumulate:
                read.add(s.tile)
            carried |= {t for t in read if t not in first and any(x.tile == t for x in own)}
            last |= dict.fromkeys(read, n)
            first.setdefault(s.tile, n)
        straight = {t for p in products for t in (p.left, p.right) if t in first and isinstance(own[first[t]], Load)}
        local = [t for t in first if t not in carried and t not in straight]
        matrices = [t for t in local if len(self.layout.of(self.tiles[t].dims)) > 1]
        sums = sum(self.points(t) for t in carried if len(self.layout.of(self.tiles[t].dims)) > 1) / threads
        values = max((sum(self.points(t) for t in matrices if first[t] <= n <= last.get(t, first[t]))
                      for n in range(len(own))), default=0) / threads
        along = self.setting.warps
        if any(self.spread(products, p) for p in products if not p.asynchronous(self.capability, self.setting.warps)):
            along = 1
        vectors = [t for t in (*carried, *local) if len(self.layout.of(self.tiles[t].dims)) == 1]
        rows = sum(max(2.0, self.points(t) / (8 * along)) for t in vectors)
        chunks = sum(self.points(t) * self.element(t) / 16 / threads for t in straight)
        return {"sums": sums, "values": values, "rows": rows, "chunks": chunks}
