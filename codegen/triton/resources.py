"""What a block of a kernel takes of a GPU before anything is compiled: shared memory, tensor memory, registers.

Triton keeps in shared memory: one copy of each operand of a product that a loop does not change; of each tensor that
a loop streams, as many tiles as the pipeline has stages where the tensor cores read them themselves (`wgmma` and
`tcgen05`, from 64 rows on), one less where warps fetch them; and, one after another, what passes from warp to warp: a
computed operand whose columns are spread over warps, partial results of a reduction.  The forms below were read off
its allocations (`benchmarks/gpu_resources.py` compares them with compiled kernels); `docs/gpu.md` says how exact they
are.  Registers are an estimate, good enough to order candidates: fitted, not derived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from memcomp.codegen.order import tasks
from memcomp.codegen.triton.boxes import FORMATS
from memcomp.codegen.triton.boxes import MOST as LONGEST
from memcomp.codegen.triton.loops import Body, Loops, Product, Step
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, variables, walk
from memcomp.ir.target import BYTES, Target
from memcomp.ir.tile import Best, Dot, Fold, Loop, Map, TileKernel, TileProgram, expressions, statements

FEWEST_ROWS = 16   # of one instruction of tensor cores
ASYNC_ROWS = 64    # fewer rows and the tensor cores of sm_90 and sm_100 are fed through registers, as before
COLUMNS = 512      # of tensor memory
BARRIER = 8        # bytes
SYSTEM = 1024      # bytes of each block that are not its own
MOST = 255         # registers of a thread
ALIGNED = 1024     # bytes: where a tile begins that tensor cores read themselves
COPIED = 4         # bytes: the least that a thread can copy ahead
# registers = first number + the others times what `held` counts, in its order, and the sum from which on kernels
# spill; `benchmarks/gpu_resources.py --fit`
FITTED = {"mma": (21.0, 2.01, 2.27, 1.54, 0.54, 0.85, 1.09, 0.21),
          "wgmma": (32.8, 1.01, 1.69, 0.0, 1.34, 0.11, 1.21, 0.24),
          "tcgen05": (19.0, 1.16, 1.8, 0.0, 1.51, 1.07, 1.06, 0.34)}
REGISTERS = 65536  # of one processor
BUSY = 8           # warps on one processor below which too little is under way: half of them compute while half wait
ALONE = 2.5        # registers of an element that is fetched alone: where it lies, and whether it counts
# registers of a point, besides its value, while a long word makes it
LONG, MEANWHILE = ("sin", "cos"), {"mma": 2.5, "wgmma": 3.0, "tcgen05": 5.5}
RANKED = 1.0       # registers of a point that is ranked
SPILLED = {"mma": 242.0, "wgmma": 250.0, "tcgen05": 252.0}


@dataclass(frozen=True, slots=True)
class Setting:
    """How a kernel is compiled: warps of a block, stages of its loops' pipeline.

    programs: the program instances that take all tasks in turns, 0 for one a task.  specialised: warps that fetch and
    warps that compute, where a loop's operands come by descriptors; `warps` are those that the text is written for.
    """

    warps: int
    stages: int
    programs: int = 0
    specialised: bool = False

    def __str__(self) -> str:
        return (f"{self.warps} warps, {self.stages} stages{f', {self.programs} programs' if self.programs else ''}"
                f"{', specialised' if self.specialised else ''}")


SETTINGS = tuple(Setting(w, s) for w in (4, 8, 1, 2) for s in (3, 2, 1))


@dataclass(frozen=True, slots=True)
class Need:
    """Of one block.  shared: bytes; tensor_memory: columns (sm_100); registers: of a thread, estimated and not cut
    at what a thread can have, so that candidates beyond it are ordered too; spills: whether some are to be expected;
    poor: whether it fits badly though it fits: nothing is fetched ahead, warps share rows that could have their own, a
    tile has too few rows for tensor cores to read it themselves, or one processor has too few warps under way.
    """

    shared: int
    tensor_memory: int
    registers: float
    spills: bool
    poor: bool

    @property
    def strain(self) -> float:
        """0: fits well; more: the candidates that are to be taken only where there are no better ones; of those that
        spill, the more the more registers they would take."""
        return self.poor + (2 + self.registers / 1024 if self.spills else 0)


def need(tp: TileProgram, k: TileKernel, target: Target, setting: Setting) -> Need:
    """What a block of one launch takes.  Raises Refusal where the kernel has no layout."""
    return _Block(Loops(tp, k), target, setting).need()


def held(tp: TileProgram, k: TileKernel, target: Target, setting: Setting) -> dict[str, float]:
    """What the estimate of registers counts, of the loop that takes most of them."""
    block = _Block(Loops(tp, k), target, setting)
    return block.held(max(block.loops.bodies, key=block.estimate))


def chosen(tp: TileProgram, k: TileKernel, target: Target) -> Setting:
    """The setting to compile a launch with: one that fits well, if there is one; of these warps that each have rows of
    their own, and the most stages.

    Raises Refusal where none fits: with the bytes needed and there, and the nearest tile sizes that would fit.
    """
    loops = Loops(tp, k)
    fitting = list(_fitting(loops, target))
    if fitting:
        wanted = _warps(loops)
        return min(fitting, key=lambda x: (x[1].strain, abs(x[0].warps - wanted), -x[0].stages, x[1].registers))[0]
    least = min((_Block(loops, target, s).need() for s in _settings(loops)), key=lambda n: n.shared)
    there = target.level("smem").bytes
    what = f"{least.shared:,} bytes of shared memory, and a block of {target.name} has {there:,}"
    if least.shared <= there:
        what = f"{least.tensor_memory} columns of tensor memory, and a block of {target.name} has {COLUMNS}"
    near = ", ".join(f"{d} = {n}" for d, n in nearest_fit(tp, k, target).items())
    raise Refusal(f"{k.name} needs {what}", tp.name, f"it fits with {near}" if near else
                  "no smaller tile of the ranks that are cut fits: cut the others")


def options(tp: TileProgram, k: TileKernel, target: Target) -> tuple[Setting, ...]:
    """Settings to be chosen from by measuring, the model's own first: with other warps or other stages, where they fit
    as well; with as many program instances as the machine holds at once; on sm_90 with specialised warps, where Triton
    is known to make them (two groups of 64 rows, one loop)."""
    loops, first = Loops(tp, k), chosen(tp, k, target)
    block = _Block(loops, target, first)
    n = block.need()
    out = [first, *(s for s, x in _fitting(loops, target) if x.strain <= n.strain
                    and (s.warps == first.warps) != (s.stages == first.stages))]
    places = target.threads * max(1, block.blocks(n.shared, n.tensor_memory, n.registers))
    if k.grid and not (isinstance(many := tasks(k), Const) and many.value <= places):
        out.append(replace(first, programs=places))
    rows = {p.rows for b in loops.bodies for p in b.products if b.looped}
    whole = len([s for s in statements(k.body) if isinstance(s, Loop)]) == 1
    if target.capability == 90 and rows == {2 * ASYNC_ROWS} and whole and not any(b.branched for b in loops.bodies):
        special = Setting(4, 2, specialised=True)
        if _Block(loops, target, special).need().shared <= target.level("smem").bytes:
            out.append(special)
    return tuple(out)


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
            if any(_fitting(Loops(tp, smaller), target)):
                found.append(sizes)
        if found:
            best = max(found, key=lambda sizes: min(sizes.values()))
            return {d.name: best[d.name] for d in cut if best[d.name] != d.capacity}
    return {}


def _settings(loops: Loops) -> list[Setting]:
    """Tensor cores of one processor are fed by four warps."""
    return [s for s in SETTINGS if s.warps >= 4 or not any(b.products for b in loops.bodies)]


def _fitting(loops: Loops, target: Target) -> Iterator[tuple[Setting, Need]]:
    for s in _settings(loops):
        n = _Block(loops, target, s).need()
        if n.shared <= target.level("smem").bytes and n.tensor_memory <= COLUMNS:
            yield s, n


def _warps(loops: Loops) -> int:
    """Warps for which there is work: 16 rows of a product each, else 32 numbers a thread at most."""
    products = [p for b in loops.bodies for p in b.products]
    if products:
        return 8 if max(p.rows for p in products) >= 128 else 4
    most = max((loops.points(t) for t in loops.tiles), default=1)
    return max(1, min(8, most // (32 * 32)))


class _Block:
    """A block of one kernel with one setting."""

    def __init__(self, loops: Loops, target: Target, setting: Setting) -> None:
        self.loops, self.capability = loops, target.capability
        self.there = target.level("smem").bytes + SYSTEM
        self.warps, self.stages, self.specialised = setting.warps, setting.stages, setting.specialised

    def need(self) -> Need:
        bodies = self.loops.bodies
        shared, columns = max(map(self.shared, bodies)), max(map(self.tensor_memory, bodies))
        registers = max(map(self.estimate, bodies))
        return Need(shared, columns, registers, any(self.estimate(b) > SPILLED[self.form(b)] for b in bodies),
                    any(b.looped and b.products and self.poor(b, self.blocks(shared, columns, registers))
                        for b in bodies))

    def blocks(self, shared: int, columns: int, registers: float) -> int:
        """Blocks that one processor holds at once."""
        threads = REGISTERS // (32 * self.warps * min(registers, MOST))
        return min(self.there // (shared + SYSTEM), int(threads), COLUMNS // max(columns, 1))

    def poor(self, body: Body, blocks: int) -> bool:
        """Is the loop one that waits: see `Need`."""
        shares = any((p.cut or self.asynchronous(p)) and self.warps * FEWEST_ROWS > p.rows for p in body.products)
        slow = any(self.capability >= 90 and p.cut and not self.asynchronous(p) for p in body.products)
        return self.stages == 1 or body.branched or shares or slow or self.warps * blocks < BUSY

    def asynchronous(self, p: Product) -> bool:
        """Do the tensor cores read the right operand from shared memory?"""
        return self.capability >= 90 and p.rows >= ASYNC_ROWS and self.warps % 4 == 0

    # -- shared memory -----------------------------------------------------------------------------------------------

    def shared(self, body: Body) -> int:
        """Bytes that a loop needs at once."""
        # Triton fetches nothing ahead for an f32 product, but where both operands come from memory
        parted = self.capability >= 100 and any(p.exact and not body.loaded(p.left) for p in body.products)
        ahead = self.stages if body.looped and not body.branched and not parted else 1
        own = body.written if body.looped else set()
        kept: dict[str, int] = {}      # operands that stay
        begun = 0                      # what a descriptor brings on its way to registers, before the loop
        streamed: dict[str, int] = {}
        passing, turns = [0], [0]      # what lies there for a moment; what one product needs if nothing is ahead
        for p in body.products:
            fetched, parts = self.asynchronous(p), 2 if p.exact else 1
            turn = moved = 0
            for tile, lines in ((p.left, p.rows), (p.right, p.columns)):
                size = lines * p.depth * p.bytes
                if tile not in own and body.looped and tile == p.left and not fetched and self.boxes(tile):
                    begun = max(begun, parts * size)
                elif tile not in own and body.looped:
                    kept[tile] = parts * size
                elif body.loaded(tile) and not p.exact:
                    streamed[tile] = max(streamed.get(tile, 0), size * (ahead if fetched else ahead - 1))
                    turn += size
                elif tile == p.right if fetched else tile == p.left and self.spread(body, p):
                    moved += parts * size
                elif fetched and not body.loaded(tile) and not self.loops.follows(body, tile):
                    moved += parts * size * (2 if self.capability >= 100 else 1)   # no product has laid it out
            passing.append(moved)
            turns.append(turn + moved)
            for tile in self.loops.feeding(body, (p.left, p.right)) - set(streamed):
                if self.copied(tile):
                    streamed[tile] = self.loops.points(tile) * self.loops.element(tile) * (ahead - 1)
        passing += [self.reduction(body, s) for s in body.steps if isinstance(s, (Fold, Dot)) and s.over
                    and not any(p.tile == s.tile for p in body.products)]
        fetched_ones = [p for p in body.products if self.asynchronous(p)]
        if ahead == 1:
            alone = 0
            if fetched_ones and self.capability >= 100:   # one waits; of a computed operand a quarter changes warps
                alone = BARRIER + max((p.rows * p.depth * p.bytes // 4 for p in fetched_ones
                                       if self.warps > 4 and p.left in self.loops.computed and not p.exact), default=0)
            return max(sum(kept.values()) + max(*turns, *passing) + alone, begun) + self.boxed(body)
        stream = sum(streamed.values()) if body.products else self.copies(body) * (ahead - 1)
        if fetched_ones:
            stream += -stream % ALIGNED
        if fetched_ones and self.capability >= 100:
            passing.append(ALIGNED)
            stream += 2 * BARRIER * len(fetched_ones)
        return max(sum(kept.values()) + stream + max(passing), begun) + self.boxed(body)

    def boxed(self, body: Body) -> int:
        """Bytes, at most, in which what descriptors bring waits to be whole and aligned, and in which specialised warps
        hand over what is stored."""
        if not any(self.boxes(t) for p in body.products for t in (p.left, p.right)):
            return 0
        last = body.products[-1]
        return ALIGNED + (last.rows * last.columns * last.bytes if self.specialised else 0)

    def boxes(self, tile: str) -> bool:
        """May a descriptor bring the tile?"""
        return self.capability >= 90 and tile in self.loops.loads and self.loops.stored(tile) in FORMATS and all(
            a.size <= LONGEST for a in self.loops.layout.of(self.loops.tiles[tile].dims))

    def copied(self, tile: str) -> bool:
        """Can the tile be copied ahead: has each thread enough of it?"""
        return self.loops.dims(tile) > 0 and self._enough(self.loops.points(tile), self.loops.element(tile))

    def copies(self, body: Body) -> int:
        """Bytes of what a step reads and a thread can copy ahead, in a loop without products, which is told to."""
        reads = {n for s in body.steps for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
        sizes = [(math.prod(a.size for a in axes), BYTES[self.loops.params[x.tensor]]) for x in reads
                 if x.tensor in self.loops.params and (axes := self.loops.layout.of(variables(x)))]
        return sum(points * size for points, size in sizes if self._enough(points, size))

    def _enough(self, points: int, size: int) -> bool:
        return max(1, points // (32 * self.warps)) * size >= COPIED

    def spread(self, body: Body, p: Product) -> bool:
        """Are the columns of the operand that feeds p spread over warps?  Products that feed one another are laid out
        alike, after the last of them: all warps along its rows if it has as many as columns.  A branch parts them."""
        last = body.products[-1]
        return body.branched or last.rows < last.columns or self.warps * 16 > last.rows > last.columns

    def reduction(self, body: Body, s: Fold | Dot) -> int:
        """Bytes that a reduction passes from warp to warp, at most: none where warps have whole rows of a product."""
        read = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
        if self.warps == 1 or any(p.tile in read and (self.asynchronous(p) or not self.spread(body, p))
                                  for p in body.products):
            return 0
        return self.loops.points(s.tile) * BYTES[self.loops.tiles[s.tile].dtype] * self.warps

    def tensor_memory(self, body: Body) -> int:
        """Columns of 32-bit numbers that the sums, and operands that follow from sums, take (sm_100)."""
        if self.capability < 100:
            return 0
        fetched = [p for p in body.products if self.asynchronous(p)]
        columns = sum((1 + p.exact) * (p.columns + (p.depth * p.bytes // 4 if p.left in self.loops.computed
                                                    and len(fetched) > 1 else 0)) for p in fetched)
        return 1 << max(columns - 1, 0).bit_length() if columns else 0

    # -- registers ---------------------------------------------------------------------------------------------------

    def form(self, body: Body) -> str:
        fetched = any(self.asynchronous(p) for p in body.products)
        return "mma" if not fetched else "wgmma" if self.capability < 100 else "tcgen05"

    def estimate(self, body: Body) -> float:
        """Registers of a thread."""
        base, *weights = FITTED[self.form(body)]
        held = sum(w * n for w, n in zip(weights, self.held(body).values(), strict=True))
        return base + held + ALONE * self.alone(body) + self.meanwhile(body)

    def meanwhile(self, body: Body) -> float:
        """Registers that what is made by long words takes beside the values, or points that are ranked with their
        places in one integer of 64 bits; at most at once."""
        threads = 32 * self.warps
        long = (self.loops.points(s.tile) for s in body.steps if isinstance(s, Map) and any(
            isinstance(n, Call) and n.op in LONG for n in walk(s.body)))
        ranked = (math.prod(a.size for a in self.loops.layout.of(
            (*(d for d in self.loops.tiles[s.tile].dims if d != s.order), *s.over)))
            for s in body.steps if isinstance(s, Best))
        return max((MEANWHILE[self.form(body)] * n / threads for n in long), default=0.0) + max(
            (RANKED * n / threads for n in ranked), default=0.0)

    def alone(self, body: Body) -> float:
        """Elements that a thread fetches for products, each by itself."""
        fed = {t for p in body.products for t in (p.left, p.right) if body.loaded(t)} if not self.boxed(body) else set()
        return sum(self.loops.points(t) for t in fed if self.loops.ragged(body, t)) / (32 * self.warps)

    def masked(self, tile: str) -> int:
        """2 where each address goes with a mask: an axis is longer than what there is of it."""
        return 1 + any(a.points < a.size for a in self.loops.layout.of(self.loops.tiles[tile].dims))

    def spanned(self, body: Body, s: Step) -> int:
        """Points of a reduction that are there at once beside its tiles: of one over tiles that each lack some of its
        dims, and of one that computes with a tile's points what is not the tile, which is read once more."""
        if not isinstance(s, (Fold, Dot)) or any(p.tile == s.tile for p in body.products):
            return 0
        read = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access)} & set(self.loops.tiles)
        points = math.prod(a.size for a in self.loops.layout.of((*self.loops.tiles[s.tile].dims, *s.over)))
        whole = {t for t in read if self.loops.points(t) == points}
        later = {n.tensor for x in body.steps[body.steps.index(s) + 1:] for e in expressions(x) for n in walk(e)
                 if isinstance(n, Access)}
        made = isinstance(s, Fold) and isinstance(s.body, Call)
        return points if not whole or made and whole & later else 0

    def placed(self, e: Expr) -> Iterator[Expr]:
        """The numbers and comparisons in an expression that follow from the indices of rows and columns alone."""
        if not isinstance(e, Call):
            return
        joined = e.op in ("and", "or", "not", "where") or any(isinstance(n, Access) for n in walk(e))
        if not joined and len(self.loops.layout.of(variables(e))) > 1:
            yield e
        for x in e.args if joined else ():
            yield from self.placed(x)

    def held(self, body: Body) -> dict[str, float]:
        """What a thread holds in 32-bit registers in a loop, by kind.

        sums:    of tiles that one step hands to the next.
        values:  at most at once of the tiles that a step computes, and of what it multiplies without tensor cores.
        rows:    of numbers for rows, which several threads hold alike.
        columns: of numbers for columns, which a thread has one of for each fourth.
        chunks:  addresses, one for each 16 bytes that a thread fetches, and masks of rows that are no power of two.
        passing: of operands on their way to tensor cores: both parts of left ones of f32, which warps that share rows
                 hold alike, and what is not copied ahead.
        places:  of points that are compared by their indices, or have a number for them, once for each.
        """
        threads, own = 32 * self.warps, body.written
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        carried: set[str] = set()
        for n, s in enumerate(body.steps):
            read = {x.tensor for e in expressions(s) for x in walk(e) if isinstance(x, Access)} & set(self.loops.tiles)
            if isinstance(s, (Fold, Dot)) and s.accumulate:
                read.add(s.tile)
            carried |= {t for t in read & own if t not in first}
            last |= dict.fromkeys(read, n)
            first.setdefault(s.tile, n)
        straight = {t for p in body.products for t in (p.left, p.right) if body.loaded(t)}
        local = [t for t in first if t not in carried and t not in straight]
        few = {p.tile: FEWEST_ROWS // p.rows for p in body.products if p.rows < FEWEST_ROWS}

        def points(tile: str) -> int:
            return self.loops.points(tile) * few.get(tile, 1)

        sums = sum(points(t) for t in carried if self.loops.dims(t) > 1) / threads
        values = max((sum(points(t) for t in local if self.loops.dims(t) > 1 and first[t] <= n <= last.get(t, first[t]))
                      + self.spanned(body, s) for n, s in enumerate(body.steps)), default=0) / threads
        fed = [p for p in body.products if not self.asynchronous(p)]
        along = 1 if any(self.spread(body, p) for p in fed) else self.warps
        across = {a for p in body.products for a in self.loops.layout.of(self.loops.tiles[p.tile].dims)[-1:]}
        lines = [t for t in (*carried, *local) if self.loops.dims(t) == 1]
        wide = [t for t in lines if set(self.loops.layout.of(self.loops.tiles[t].dims)) <= across]
        rows = sum(max(2.0, points(t) / (8 * along)) for t in lines if t not in wide)
        columns = sum(points(t) * BYTES[self.loops.tiles[t].dtype] / 16 for t in wide)
        chunks = sum(points(t) * self.loops.element(t) / 16 / threads * (1 if self.boxed(body) else self.masked(t))
                     for t in straight)
        passing = sum(2 * p.rows * p.depth / (32 * min(self.warps, max(1, p.rows // FEWEST_ROWS)))
                      for p in body.products if p.exact)
        if body.branched or self.stages == 1:
            passing += sum(points(t) * self.loops.element(t) / 4 / threads for t in straight)
        spans = [self.loops.layout.of(variables(e)) for e in {x for s in body.steps for e in expressions(s)
                                                              for x in self.placed(e)}]
        places = sum(math.prod(a.size for a in axes) for axes in spans) / threads
        return {"sums": sums, "values": values, "rows": rows, "columns": columns, "chunks": chunks, "passing": passing,
                "places": places}
