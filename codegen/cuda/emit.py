"""TileProgram -> CUDA C++: one kernel a launch, one block of warps for each task.

Text only; nothing here imports CUDA.  A tile's points are spread over threads and registers (`spread`); every loop over
registers is unrolled.  A reduction joins what a thread has; what threads have is joined where it is first read for more
than to be scaled or added to, so that a loop which only adds up joins its sums once, after its last step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from memcomp.codegen.cuda.express import CTYPES, Point, Scope
from memcomp.codegen.cuda.memory import PACKED, WIDEST, Memory, Rows, moved, vectors
from memcomp.codegen.cuda.spread import blocks, bytes_held, places, pressure
from memcomp.codegen.cuda.steps import Steps
from memcomp.codegen.cuda.sums import AGAIN, Partial, Sums, identity, joined
from memcomp.codegen.cuda.words import HEAD, TAKEN
from memcomp.codegen.launches import Argument, Launch, Layout, loosened
from memcomp.codegen.names import Names
from memcomp.codegen.triton.arguments import arguments
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, call, variables
from memcomp.ir.target import BYTES, INTEGERS, Target
from memcomp.ir.target import target as named
from memcomp.ir.tile import (
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


def emit(tp: TileProgram, target: Target | str, layout: Layout | None = None) -> Kernel:
    """Kernel text; deterministic.

    layout: of the tensors; the usual one by default: stride 1 in the last dimension, rows that begin at multiples of 16
    bytes wherever that lets a thread read 16 bytes at once.
    Raises Refusal where a stored format or an operator has no form here, and where tiles do not fit in registers.
    """
    machine = named(target) if isinstance(target, str) else target
    texts = [w.text for w in writers(tp, machine, layout)]
    return Kernel(tp.name, "cuda", "\n".join([HEAD, *texts]), "", tp, machine.name)


def launches(tp: TileProgram, target: Target | str, layout: Layout | None = None) -> tuple[Launch, ...]:
    """What the kernels of `emit` with the same arguments are launched with, in the program's order."""
    return tuple(w.launch for w in writers(tp, target, layout))


def admits(tp: TileProgram, target: Target) -> int:
    """0: every launch fits its registers; 1: some may spill.  Raises Refusal where one has no text."""
    return max((int(w.spills) for w in writers(tp, target)), default=0)


def writers(tp: TileProgram, target: Target | str, layout: Layout | None = None) -> list[Writer]:
    """The text of each launch, and what it was made of."""
    machine = named(target) if isinstance(target, str) else target
    for p in tp.params:
        if p.dtype in ("e4m3", "e5m2"):
            raise Refusal(f"{p.name} is stored as {p.dtype}", tp.name,
                          "the cuda backend reads f64, f32, f16, bf16, integers and bool")
    layout = layout or Layout(tuple(len(p.shape) - 1 for p in tp.params))
    rows, names = Rows.of(tp, layout), Names(TAKEN)
    return [Writer(tp, k, names.fresh(re.sub(r"\W", "_", k.name), plain=True), rows, layout,
                   machine.level("smem").bytes) for k in tp.kernels]


class Writer:
    """Text and launch of one kernel."""

    def __init__(self, tp: TileProgram, k: TileKernel, name: str, rows: Rows, layout: Layout, most: int) -> None:
        self.k, self.name, self.rows = k, name, rows
        self.params = {p.name: p for p in tp.params}
        for s in statements(k.body):
            if isinstance(s, Dot) and (few := self._rows(s)) >= TENSOR_ROWS:
                raise Refusal(f"{s.tile} is a product of {few} rows and more, which tensor cores multiply", k.name,
                              "the backend triton uses them")
        reach = vectors(tp, k, rows)
        usual = tuple(self._argument(a, reach) for a in arguments(tp, k, layout.units).args)
        self.args = loosened(usual, layout)
        self.names = Names(TAKEN)
        for a in self.args:
            self.names[a.name]
        writers: dict[str, list[Statement]] = {}
        for s in statements(k.body):
            if isinstance(s, (Load, Map, Fold, Dot)):
                writers.setdefault(s.tile, []).append(s)
        self.packed = {t: dtype for t, (s, *more) in writers.items() if isinstance(s, Load) and not more
                       and (dtype := self._packs(s, reach))}
        held = {t.name: float(BYTES[self.packed[t.name]] if t.name in self.packed else bytes_held(t.dtype))
                for t in k.tiles}
        self.block = blocks(k, reach, held)
        self.pressure = pressure(k, self.block, held)
        if self.pressure > self.block.most:
            raise Refusal(f"{k.name} would hold about {self.pressure:.0f} registers a thread, and there are "
                          f"{self.block.most} with {32 * self.block.warps} threads",
                          tp.name, "smaller tiles; or the backend triton, which keeps operands in shared memory")
        self.scope = Scope(self.names, self.block.dims, {t.name: t.dtype for t in k.tiles},
                           {p.name: p.dtype for p in tp.params})
        self._narrow(writers)
        self.memory = Memory(self)
        self.scope.held, self.scope.element = self.held, self.memory.element
        self.full = {d.name for d in k.dims if d.count == Const(d.capacity) and self.block.dims[d.name].exact}
        self.thread = self.names["thread"]
        self.rooms, self.turn = self.names["rooms"], self.names["turn"]
        self.sums, self.steps = Sums(self), Steps(self, most)
        self.open: list[str] = []   # loop variables
        # where a task has nothing to share out, each thread has a task of its own
        self.lone = not self.block.mask(frozenset(self.block.dims)) and not self.memory.shared
        self.threads = LONE if self.lone else 32 * self.block.warps
        self.lines: list[str] = []
        self.depth = 1
        self.text = self._kernel()
        extents = [e for _, e in k.grid]
        every: Expr = extents[0] if extents else Const(1)
        for e in extents[1:]:
            every = call("mul", every, e)
        if self.lone:
            every = call("ceildiv", every, LONE)
        self.launch = Launch(name, (every,), self.threads, self.steps.shared, self.args)

    @property
    def spills(self) -> bool:
        """May a thread need a stack?"""
        return self.pressure > self.block.safe

    def _rows(self, s: Dot) -> int:
        """Of a contraction as a product of matrices, the fewer of rows and columns."""
        a, b = (variables(x) for x in (s.a, s.b))
        own = self.k.tile(s.tile).dims
        sides = [[self.k.dim(d).capacity for d in own if d in x and d not in y] for x, y in ((a, b), (b, a))]
        return min(math.prod(x) for x in sides)

    def _argument(self, a: Argument, reach: dict[str, int]) -> Argument:
        """What vectors take for granted."""
        read = any(x.tensor == a.of and (d := self.rows.along(x, self.k)) and reach.get(d[0], 1) > 1
                   for x, _ in moved(self.k))
        if a.kind == "size" or not read:
            return replace(a, multiple=1)
        return replace(a, multiple=WIDEST if a.kind == "pointer" else WIDEST // BYTES[self.params[a.of].dtype])

    def _packs(self, s: Load, reach: dict[str, int]) -> str:
        """The format that a tile is held in as it is stored; "" where it is converted when it is read."""
        dtype = self.params[s.source.tensor].dtype
        dims = self.k.tile(s.tile).dims
        found = self.rows.along(s.source, self.k)
        if dtype not in PACKED or found is None or found[0] not in dims or self.k.tile(s.tile).dtype == "bool":
            return ""
        n = reach.get(found[0], 1)
        return dtype if n * BYTES[dtype] >= 4 and found[1] % n == 0 and self.k.tile(s.tile).dtype in ("f32", "i64") \
            else ""

    def _narrow(self, writers: dict[str, list[Statement]]) -> None:
        """Tiles of integers that 32 bits hold."""
        for t, made in writers.items():
            if self.scope.tiles[t] != "i64":
                continue
            bodies = [s.source if isinstance(s, Load) else s.body for s in made if isinstance(s, (Load, Map))]
            spans = [self.scope.span(e) for e in bodies]
            known = [s for s in spans if s is not None]
            if len(known) < len(made):
                continue
            span = min(s[0] for s in known), max(s[1] for s in known)
            if INTEGERS["i32"][0] <= span[0] and span[1] <= INTEGERS["i32"][1]:
                self.scope.spans[t], self.scope.tiles[t] = span, "int"  # type: ignore[index]

    # -- text --------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def _kernel(self) -> str:
        for t in self.k.tiles:
            self.names[t.name]
        self.line(f"const int {self.thread} = threadIdx.x;")
        self._grid()
        for d, s in self.block.dims.items():
            if s.bits:
                self.line(f"const int {self.names[f'{d}_at']} = {places(self.thread, s.bits, s.vector)};")
        self.counts("")
        for t in self.k.tiles:
            self.line(self._declared(t.name))
        self.body(self.k.body)
        args = ", ".join(f"{self.memory.argument(a.of) if a.kind == 'pointer' else _INTEGER[a.type]}"
                         f"{self.names[a.name]}" for a in self.args)
        body = "\n".join(self.lines)
        if any(int(n) >> 5 for n in re.findall(r"combine<\w+, (\d+),", body)):
            room = f"  __shared__ __align__(16) char {self.rooms}[2 * AT_ONCE * {self.block.warps} * 32 * 8];\n"
        else:
            room = f"  char *{self.rooms} = nullptr;\n"
        if "combine<" not in body:
            room = ""
        turn = f"  int {self.turn} = 0;\n" if room else ""
        if self.steps.shared:
            turn += f"  SHARED_BYTES({self.names['staged']});\n  int {self.names['slot']} = 0;\n"
        return (f'extern "C" __global__ void __launch_bounds__({self.threads}, 1) {self.name}({args}) {{\n'
                f"{room}{turn}{body}\n}}\n")

    def _declared(self, tile: str) -> str:
        n = self.block.registers(self.k.tile(tile).dims)
        if tile in self.packed:
            return f"unsigned {self.names[tile]}[{n * BYTES[self.packed[tile]] // 4}];"
        return f"{CTYPES[self.scope.tiles[tile]]} {self.names[tile]}[{n}];"

    def _grid(self) -> None:
        """The task: the block's, or in lone blocks the thread's."""
        task = self.names["task"]
        if self.lone:
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

    def live(self, dims: tuple[str, ...], at: Point) -> list[str]:
        """Conditions that the point counts along these dims."""
        out = []
        for d in dims:
            if d not in self.full:
                count = self.k.dim(d).count
                most = str(count.value) if isinstance(count, Const) else self.names[f"{d}_n"]
                out.append(f"{self.scope.local(d, at)} < {most}")
        return out

    def left(self, dim: str, at: Point) -> str:
        """How many points are left along a dim."""
        count = self.k.dim(dim).count
        most = str(count.value) if isinstance(count, Const) else self.names[f"{dim}_n"]
        return f"{most} - {self.scope.local(dim, at)}"

    @contextmanager
    def points(self, dims: tuple[str, ...], grouped: str | None = None, names: bool = False
               ) -> Iterator[dict[str, str]]:
        """Loops over the registers of these dims; of `grouped` over its groups of neighbours.  names: what stands in
        them declares some."""
        at: dict[str, str] = {}
        before = self.depth
        for d in dims:
            s = self.block.dims[d]
            step = s.vector if d == grouped else 1
            if s.registers == step:
                at[d] = "0"
                continue
            at[d] = self.names[f"{d}_r"]
            self.line("#pragma unroll")
            add = f"++{at[d]}" if step == 1 else f"{at[d]} += {step}"
            self.line(f"for (int {at[d]} = 0; {at[d]} < {s.registers}; {add}) {{")
            self.depth += 1
        if names and self.depth == before:
            self.line("{")
            self.depth += 1
        yield at
        while self.depth > before:
            self.depth -= 1
            self.line("}")

    def unrolled(self, var: str, n: int, statement: str) -> None:
        self.line("#pragma unroll")
        self.line(f"for (int {var} = 0; {var} < {n}; ++{var}) {statement}")

    def flat(self, tile: str, at: Point) -> str:
        """The register of a tile's number."""
        last = self.fastest(tile)
        dims = sorted(self.k.tile(tile).dims, key=lambda d: d == last)
        text = "0"
        for d in dims:
            n = self.block.dims[d].registers
            if text != "0" and n > 1:
                text = f"({text}) * {n}" if " " in text else f"{text} * {n}"
            if at[d] != "0":
                text = at[d] if text == "0" else f"{text} + {at[d]}"
        return text

    def fastest(self, tile: str) -> str:
        """The dim whose neighbours are neighbours in registers: the one that a load reads along, else the last."""
        dims = self.k.tile(tile).dims
        loads = (s.source for s in statements(self.k.body) if isinstance(s, Load) and s.tile == tile)
        found = (d for a in loads if (d := self.memory.wide(a, dims)) is not None)
        return next(found, dims[-1] if dims else "")

    def place(self, tile: str, at: Point) -> str:
        return f"{self.names[tile]}[{self.flat(tile, at)}]"

    def held(self, tile: str, at: Point) -> str:
        if tile not in self.packed:
            return self.place(tile, at)
        dtype, where = self.packed[tile], self.flat(tile, at)
        n = 4 // BYTES[dtype]
        return f"{dtype}_of({self.names[tile]}[({where}) / {n}], ({where}) % {n})"

    def held_as(self, tile: str) -> float:
        """Words of a packed tile for one number."""
        return BYTES[self.packed[tile]] / 4 if tile in self.packed else 1

    def converted(self, text: str, source: Access, tile: str) -> str:
        """A param's number as one of the tile."""
        kind = self.scope.tiles[tile]
        return text if self.scope.type(source) == kind else f"({CTYPES[kind]})({text})"

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
                self.map(s)
            elif isinstance(s, Fold):
                self.fold(s)
            else:
                self.fold(Fold(s.tile, "sum", s.over, call("mul", s.a, s.b), s.accumulate))

    def map(self, s: Map) -> None:
        dims, kind = self.k.tile(s.tile).dims, self.scope.tiles[s.tile]
        self.scope.real = kind if kind == "f64" else "f32"
        parts = {self.sums.pending[t] for t in self.sums.reads(s.body) if t in self.sums.pending}
        lazy = bool(self.open) and len(parts) == 1 and self.sums.linear(s.body)
        part = next(iter(parts)) if lazy else None
        if part is None or part.monoid != "sum" or part.mask & self.block.mask(dims):
            part = None
            self.sums.settle(s.body)
        with self.points(dims) as at:
            text = self.scope.cast(s.body, kind, at) if part is None else self.sums.partial(s.body, kind, at, part)
            self.line(f"{self.place(s.tile, at)} = {text};")
        self.scope.real = "f32"
        self.sums.pending.pop(s.tile, None)
        if part is not None:
            self.sums.pending[s.tile] = part

    def fold(self, s: Fold) -> None:
        dims, kind = self.k.tile(s.tile).dims, self.scope.tiles[s.tile]
        self.scope.real = kind if kind == "f64" else "f32"
        self.sums.settle(s.body)
        part, own = Partial(s.monoid, self.block.mask(s.over)), self.sums.pending.get(s.tile)
        zero = identity(s.monoid, kind)
        once = ""   # the condition under which a thread adds what others hold as well
        if s.accumulate:
            again = s.monoid in AGAIN
            if own is not None and (own.monoid != s.monoid or not (again or own == part or not part.mask)):
                self.sums.join(s.tile)
                own = None
            if own is None and part.mask and not again:
                self.sums.divide(s.tile, part)
            if own is not None:
                once = f"{self.thread} & {own.mask}" if not part.mask and not again else ""
                part = Partial(s.monoid, own.mask | part.mask)
        plain = s.accumulate and not once
        with self.points(dims, names=not plain) as at:
            place = self.place(s.tile, at)
            total = place if plain else self.names["total"]
            if not plain:
                self.line(f"{CTYPES[kind]} {total} = {zero};")
            with self.points(s.over) as inner:
                every = {**at, **inner}
                value = self.scope.cast(s.body, kind, every)
                if tests := self.live(s.over, every):
                    value = f"({' && '.join(tests)} ? {value} : {zero})"
                self.line(f"{total} = {joined(s.monoid, kind, total, value)};")
            if not plain:
                value = f"({once} ? {zero} : {total})" if once else total
                self.line(f"{place} = {joined(s.monoid, kind, place, value) if s.accumulate else value};")
        self.scope.real = "f32"
        self.sums.pending.pop(s.tile, None)
        if part.mask:
            self.sums.pending[s.tile] = part

    @contextmanager
    def aside(self) -> Iterator[list[str]]:
        """Lines for later."""
        before, self.lines = self.lines, []
        yield self.lines
        self.lines = before
