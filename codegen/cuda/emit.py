"""TileProgram -> CUDA C++: one kernel a launch, one block of warps for each task.

Text only; nothing here imports CUDA.  A tile's points are spread over threads and registers (`spread`); every loop over
registers is unrolled.  A reduction joins what a thread has; what threads have is joined where it is first read for more
than to be scaled or added to, so that a loop which only adds up joins its sums once, after its last step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from memcomp.codegen.cuda import chain
from memcomp.codegen.cuda.best import WORDS, Bests
from memcomp.codegen.cuda.chain import Chain, Within
from memcomp.codegen.cuda.computed import Computed
from memcomp.codegen.cuda.express import CTYPES
from memcomp.codegen.cuda.inline import inlined
from memcomp.codegen.cuda.lives import Lives
from memcomp.codegen.cuda.memory import Memory, declared
from memcomp.codegen.cuda.place import Places
from memcomp.codegen.cuda.rows import WIDEST, Held, Rows, moved, vectors
from memcomp.codegen.cuda.spread import LANE_BITS, blocks, places
from memcomp.codegen.cuda.steps import EXCHANGE, Steps
from memcomp.codegen.cuda.sums import Sums
from memcomp.codegen.cuda.words import HEAD, TAKEN
from memcomp.codegen.launches import Argument, Launch, Layout, loosened
from memcomp.codegen.names import Names
from memcomp.codegen.triton.arguments import arguments
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, call, reads, variables
from memcomp.ir.target import BYTES, INTEGERS, Target
from memcomp.ir.target import target as named
from memcomp.ir.tile import (
    NOWHERE,
    Best,
    Dot,
    Fold,
    Kernel,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    TileProgram,
    When,
    statements,
)

_INTEGER = {"i32": "int ", "i64": "long long "}
LONE = 128          # threads of a block where each has a task of its own
TENSOR_ROWS = 64    # of a product from which on tensor cores must have it


def emit(tp: TileProgram, target: Target | str, layout: Layout | None = None,
         settings: tuple[int, ...] = ()) -> Kernel:
    """Kernel text; deterministic.

    layout: of the tensors; the usual one by default: stride 1 in the last dimension, rows that begin at multiples of 16
    bytes wherever that lets a thread read 16 bytes at once.
    settings: how many of the program's kernels each launch does, one after another (`options`); one each by default.
    Raises Refusal where a stored format or an operator has no form here, and where tiles do not fit in registers.
    """
    machine = named(target) if isinstance(target, str) else target
    texts = [w.text for w in _launched(tp, machine, layout, settings)]
    lists = [WORDS] if any(isinstance(s, Best) for k in tp.kernels for s in statements(k.body)) else []
    meeting = [chain.WORDS] if any(n > 1 for n in settings) else []
    return Kernel(tp.name, "cuda", "\n".join([HEAD, *lists, *meeting, *texts]), "", tp, machine.name, runs=settings)


def launches(tp: TileProgram, target: Target | str, layout: Layout | None = None,
             settings: tuple[int, ...] = ()) -> tuple[Launch, ...]:
    """What the kernels of `emit` with the same arguments are launched with, in the program's order."""
    return tuple(w.launch for w in _launched(tp, target, layout, settings))


def options(tp: TileProgram, target: Target) -> dict[str, tuple[int, ...]]:
    """What `emit` may be given as `settings` to be chosen from by measuring, by words: "" a launch for each kernel."""
    return chain.options(writers(tp, target), target)


def preferred(tp: TileProgram, target: Target, sizes: Mapping[str, int]) -> str:
    """Of `options`, what is likely to be fastest at these sizes."""
    return chain.preferred(writers(tp, target), target, sizes) if len(tp.kernels) > 1 else ""


def admits(tp: TileProgram, target: Target) -> int:
    """0: every launch fits well; 1: one is `poor`; 2: a thread may need a stack.

    Raises Refusal where one has no text.
    """
    return max((2 if w.spills else int(w.poor) for w in writers(tp, target)), default=0)


def _launched(tp: TileProgram, target: Target | str, layout: Layout | None,
              runs: tuple[int, ...]) -> Sequence[Writer | Chain]:
    """The text of each launch."""
    alone = writers(tp, target, layout)
    within: list[Within | None] = []
    for n in runs:
        some = alone[len(within):len(within) + n]
        within += [Within.of(some) if n > 1 else None] * n
    if not any(within):
        return alone
    parts, names = writers(tp, target, layout, within), Names({*TAKEN, *(w.name for w in alone)})
    found: list[Writer | Chain] = []
    for n in runs:
        some, parts = parts[:n], parts[n:]
        name = f"{some[0].name}_to_{some[-1].name}"
        found.append(Chain.of(names.fresh(name, plain=True), some) if n > 1 else some[0])
    return found


def writers(tp: TileProgram, target: Target | str, layout: Layout | None = None,
            within: Sequence[Within | None] = ()) -> list[Writer]:
    """The text of each kernel, and what it was made of.  within: the launches that kernels are parts of."""
    machine = named(target) if isinstance(target, str) else target
    for p in tp.params:
        if p.dtype in ("e4m3", "e5m2"):
            raise Refusal(f"{p.name} is stored as {p.dtype}", tp.name,
                          "the cuda backend reads f64, f32, f16, bf16, integers and bool")
    layout = layout or Layout(tuple(len(p.shape) - 1 for p in tp.params))
    rows, names = Rows.of(tp, layout), Names(TAKEN)
    return [Writer(tp, k, names.fresh(re.sub(r"\W", "_", k.name), plain=True), rows, layout,
                   machine.level("smem").bytes, part)
            for k, part in zip(tp.kernels, within or [None] * len(tp.kernels), strict=True)]


class Writer(Places):
    """Text and launch of one kernel, or lines of one that is a part of a launch.  room: bytes of shared memory for what
    passes between warps."""

    def __init__(self, tp: TileProgram, k: TileKernel, name: str, rows: Rows, layout: Layout, most: int,
                 within: Within | None = None) -> None:
        self.name, self.layout, self.within = name, rows, within
        self.params = {p.name: p for p in tp.params}
        for s in statements(k.body):
            if isinstance(s, Dot) and (few := _least_side(k, s)) >= TENSOR_ROWS:
                raise Refusal(f"{s.tile} is a product of {few} rows and more, which tensor cores multiply", k.name,
                              "the backend triton uses them")
        self.inline = inlined(k)
        self.reach, tiles = vectors(tp, k, rows), Held.tiles(tp, k, rows)
        lives = Lives.of(k, tiles, self.inline)
        block = blocks(k, self.reach, lives)
        self.pressure = lives.pressure(block)
        if self.pressure > block.most:
            raise Refusal(f"{k.name} would hold about {self.pressure:.0f} registers a thread, and there are "
                          f"{block.most} with {32 * block.warps} threads",
                          tp.name, "smaller tiles; or the backend triton, which keeps operands in shared memory")
        names = Names(TAKEN)
        self.args = within.args if within else loosened(
            tuple(self._argument(k, a) for a in arguments(tp, k, layout.units).args), layout)
        for a in self.args:
            names[a.name]
        self.thread, self.rooms, self.turn = names["thread"], names["rooms"], names["turn"]
        super().__init__(k, names, block, tiles)
        self.scope.params = {p.name: p.dtype for p in tp.params}
        self._narrow()
        self.memory = Memory(self)
        self.scope.element = self.memory.element
        self.sums, self.steps = Sums(self), Steps(self, most)
        self.computed, self.bests = Computed(self), Bests(self)
        self.open: list[str] = []   # loop variables
        # where a task has nothing to share out, each thread has a task of its own
        self.lone = not block.mask(frozenset(block.dims)) and not self.memory.shared
        self.threads = LONE if self.lone else 32 * block.warps
        self._kernel()
        every: Expr = Const(1)
        for n, (_, e) in enumerate(k.grid):
            every = call("mul", every, e) if n else e
        if self.lone:
            every = call("ceildiv", every, LONE)
        self.launch = Launch(name, (every,), self.threads, self.steps.shared, self.args)

    @property
    def spills(self) -> bool:
        """May a thread need a stack?"""
        return self.pressure > self.block.safe

    @property
    def poor(self) -> bool:
        """Do several lanes convert the same numbers, or do steps wait for memory for want of shared memory?"""
        loaded = {t for x in self.inline.values() for t in reads(x.body) if t in self.packed}
        every = self.block.mask(frozenset(self.block.dims))
        return self.steps.crowded or any(every & ~self.block.mask(self.k.tile(t).dims) for t in loaded)

    def _argument(self, k: TileKernel, a: Argument) -> Argument:
        """What vectors take for granted."""
        size, most = BYTES[self.params[a.of].dtype] if a.kind != "size" else 0, 1
        for x, _, _ in moved(k):
            if x.tensor == a.of and (d := self.layout.along(x, k)):
                n = self.reach.get(d.dim, 1)
                most = max(most, n // min(d.share, n))
        if a.kind == "size" or most == 1:
            return replace(a, multiple=1)
        most = min(most, WIDEST // size)
        return replace(a, multiple=most * size if a.kind == "pointer" else most)

    def _narrow(self) -> None:
        """Tiles of integers that 32 bits hold."""
        bodies: dict[str, list[Expr | None]] = {}
        for s in statements(self.k.body):
            if isinstance(s, (Load, Map, Fold, Dot)):
                bodies.setdefault(s.tile, []).append(
                    s.source if isinstance(s, Load) else s.body if isinstance(s, Map) else None)
            elif isinstance(s, Best):
                bodies.setdefault(s.tile, []).append(None)
                index = s.accumulate and not reads(s.at)  # indices are of 32 bits, as is how many there are
                bodies.setdefault(s.place, []).append(Const(NOWHERE) if index else s.at)
        for t, made in bodies.items():
            if self.scope.tiles[t] != "i64":
                continue
            span = self._span([e for e in made if e is None or t not in reads(e)])
            if span is None or span[0] < INTEGERS["i32"][0] or span[1] > INTEGERS["i32"][1]:
                continue
            self.scope.spans[t] = span   # what is made of itself is no more than that
            if self._span([*made, Const(span[0]), Const(span[1])]) == span:
                self.scope.tiles[t] = "int"
            else:
                del self.scope.spans[t]

    def _span(self, made: list[Expr | None]) -> tuple[int, int] | None:
        """The least and the greatest of several values, where all are known."""
        spans = [None if e is None else self.scope.span(e) for e in made]
        known = [s for s in spans if s is not None]
        return None if len(known) < len(made) or not known else (min(s[0] for s in known), max(s[1] for s in known))

    # -- text --------------------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        args = self.declaration(self.args, declared(self.params, [self.k]))
        return (f'extern "C" __global__ void __launch_bounds__({self.threads}, 1) {self.name}({args}) {{\n'
                + "\n".join(self.lines) + "\n}\n")

    def _kernel(self) -> None:
        for t in self.k.tiles:
            self.names[t.name]
        self.depth = 3 if self.within else 1
        with self.aside() as body:
            self._grid()
            for d, s in self.block.dims.items():
                if s.bits:
                    self.line(f"const int {self.names[f'{d}_at']} = {places(self.thread, s.bits, s.vector)};")
            self.counts("")
            for t in self.k.tiles:
                if t.name not in self.inline:
                    self.line(self._declared(t.name))
            self.body(self.k.body)
        joins = re.findall(r"combine<\w+, (\d+),", "\n".join(body))
        self.room = EXCHANGE * self.block.warps if any(int(n) >> LANE_BITS for n in joins) else 0
        self.depth = 2 if self.within else 1
        if joins:
            if not self.room:
                self.line(f"char *{self.rooms} = nullptr;")
            elif not self.within:
                self.line(f"SHARED({self.rooms}, {self.room});")
            self.line(f"int {self.turn} = 0;")
        if self.steps.shared:
            self.line(f"SHARED_BYTES({self.names['staged']});")
            self.line(f"int {self.names['slot']} = 0;")
        self.line(f"const int {self.thread} = threadIdx.x;")
        self.lines += [*self._turns(), *body, "    }"] if self.within else body

    def declaration(self, args: Sequence[Argument], pointers: Mapping[str, str]) -> str:
        """Of arguments; pointers: their types, by param."""
        return ", ".join(f"{pointers[a.of] if a.kind == 'pointer' else _INTEGER[a.type]}{self.names[a.name]}"
                         for a in args)

    def _turns(self) -> list[str]:
        """The head of a loop over the tasks of a block that does other kernels too; of its threads some may be idle."""
        step, first = ("1", "blockIdx.x") if not self.lone else (LONE, f"blockIdx.x * {LONE}LL + {self.thread}")
        busy = f"{self.thread} < {self.threads} && " if self.within and self.threads < self.within.threads else ""
        at = self.names["next"]
        total = " * ".join(["1LL", *(self.scope.whole(e) for _, e in self.k.grid)])
        return ["#pragma unroll 1",
                f"    for (long long {at} = {first}; {busy}{at} < {total}; {at} += {step}LL * gridDim.x) {{"]

    def _declared(self, tile: str) -> str:
        n = self.numbers(tile)
        if tile in self.packed:
            return f"unsigned {self.names[tile]}[{n * BYTES[self.packed[tile]] // 4}];"
        return f"{CTYPES[self.scope.tiles[tile]]} {self.names[tile]}[{n}];"

    def _grid(self) -> None:
        """The task: the block's, or in lone blocks the thread's, or of several the one whose turn it is."""
        task = self.names["task"]
        if self.within:
            self.line(f"long long {task} = {self.names['next']};")
        elif self.lone:
            total = " * ".join(["1LL", *(self.scope.whole(e) for _, e in self.k.grid)])
            self.line(f"long long {task} = (long long)blockIdx.x * {LONE} + {self.thread};")
            self.line(f"if ({task} >= {total}) return;")
        else:
            self.line(f"long long {task} = blockIdx.x;")
        for v, extent in self.k.grid[:0:-1]:
            self.line(f"const int {self.names[v]} = digit({task}, {self.scope.whole(extent)});")
        for v, _ in self.k.grid[:1]:
            self.line(f"const int {self.names[v]} = (int){task};")

    def counts(self, var: str) -> None:
        """The points that count, of dims whose count is known once this loop variable is ("": without any)."""
        loops = {s.var for s in statements(self.k.body) if isinstance(s, Loop)}
        for d in self.k.dims:
            needed = variables(d.count) & loops
            if d.name in self.full or isinstance(d.count, Const) or not needed <= set(self.open):
                continue
            if (var in needed) if var else not needed:
                self.line(f"const int {self.names[f'{d.name}_n']} = {self.scope.whole(d.count)};")

    # -- statements --------------------------------------------------------------------------------------------------

    def body(self, body: tuple[Statement, ...]) -> None:
        for s in body:
            if isinstance(s, Loop):
                self.steps.loop(s)
            elif isinstance(s, When):
                self.steps.when(s)
            elif isinstance(s, Store):
                self.sums.settle(s.target, s.mask, Access(s.tile, ()))
                self.memory.store(s)
            elif isinstance(s, Load):
                self.sums.settle(s.source)
                self.memory.load(s)
                self.sums.pending.pop(s.tile, None)
            elif isinstance(s, Map):
                self.computed.map(s)
            elif isinstance(s, Fold):
                self.computed.fold(s)
            elif isinstance(s, Best):
                self.bests.best(s)
            else:
                self.computed.fold(Fold(s.tile, "sum", s.over, call("mul", s.a, s.b), s.accumulate))


def _least_side(k: TileKernel, s: Dot) -> int:
    """Of a contraction as a product of matrices, the fewer of rows and columns."""
    a, b = (variables(x) for x in (s.a, s.b))
    own = k.tile(s.tile).dims
    sides = [[k.dim(d).capacity for d in own if d in x and d not in y] for x, y in ((a, b), (b, a))]
    return min(math.prod(x) for x in sides)
