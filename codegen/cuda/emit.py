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
from dataclasses import dataclass, replace

from memcomp.codegen.cuda.express import CTYPES, Point, Scope, number
from memcomp.codegen.cuda.memory import PACKED, WIDEST, Memory, Rows, moved, vectors
from memcomp.codegen.cuda.spread import blocks, bytes_held, pressure
from memcomp.codegen.cuda.words import HEAD
from memcomp.codegen.launches import Argument, Launch, Layout, loosened
from memcomp.codegen.names import Names
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.parts import parts
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, call, variables, walk
from memcomp.ir.ops import MONOIDS
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
    expressions,
    statements,
)

_JOIN = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "and": "And", "or": "Or"}
_AGAIN = ("max", "min", "and", "or")   # joining a number to itself changes nothing
_SIGNS = {"sum": "+", "prod": "*", "and": "&", "or": "|", "add": "+", "sub": "-"}
_INTEGER = {"i32": "int ", "i64": "long long "}
STEPS = 4           # that are under way at once, at most
OWN = 16 * 32 * 64  # bytes of shared memory for what passes between the most warps; the system's 1,024 are within
TENSOR_ROWS = 64    # of a product from which on tensor cores must have it
TAKEN = set("""
alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float for
friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
public register
reinterpret_cast return short signed sizeof static static_assert static_cast struct switch template
this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor
xor_eq threadIdx blockIdx blockDim gridDim warpSize INLINE Block fetch put Sum Prod Max Min And Or combine from_lane
AT_ONCE SHARED_BYTES copy_later ask asked come take loaded
from_bf16 from_f16 bf16_of f16_of i8_of u8_of to_bf16 to_f16 highest lowest most least mod floordiv sigmoid
xlogx abs fabs exp exp2 log log2 sin cos erf tanh expm1 log1p floor rint sqrt pow i main linux unix""".split())


@dataclass(frozen=True, slots=True)
class Partial:
    """Of a reduction each thread has a part: those that differ in these bits of their numbers join theirs."""

    monoid: str
    mask: int


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
        self.k, self.name, self.rows, self.most = k, name, rows, most
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
        self.pending: dict[str, Partial] = {}
        self.open: list[str] = []   # loop variables
        self.shared = 0             # bytes of shared memory for what is read ahead
        self.threads = 32 * self.block.warps
        self.lines: list[str] = []
        self.depth = 1
        self.text = self._kernel()
        extents = [e for _, e in k.grid]
        every: Expr = extents[0] if extents else Const(1)
        for e in extents[1:]:
            every = call("mul", every, e)
        self.launch = Launch(name, (every,), self.threads, self.shared, self.args)

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
                self.line(f"const int {self.names[f'{d}_at']} = {_places(self.thread, s.bits, s.vector)};")
        self._counts("")
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
        if self.shared:
            turn += f"  SHARED_BYTES({self.names['staged']});\n  int {self.names['slot']} = 0;\n"
        return (f'extern "C" __global__ void __launch_bounds__({self.threads}, 1) {self.name}({args}) {{\n'
                f"{room}{turn}{body}\n}}\n")

    def _declared(self, tile: str) -> str:
        n = self.block.registers(self.k.tile(tile).dims)
        if tile in self.packed:
            return f"unsigned {self.names[tile]}[{n * BYTES[self.packed[tile]] // 4}];"
        return f"{CTYPES[self.scope.tiles[tile]]} {self.names[tile]}[{n}];"

    def _grid(self) -> None:
        rest = "blockIdx.x"
        for n in range(len(self.k.grid) - 1, -1, -1):
            v, extent = self.k.grid[n]
            if n == 0:
                self.line(f"const int {self.names[v]} = {rest};")
                return
            held = self.names.fresh("rest")
            self.line(f"const int {held} = {rest};")
            size = self.scope.whole(extent)
            self.line(f"const int {self.names[v]} = {held} % {size};")
            rest = f"{held} / {size}"

    def _counts(self, var: str) -> None:
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

    def converted(self, text: str, source: Access, tile: str) -> str:
        """A param's number as one of the tile."""
        kind = self.scope.tiles[tile]
        return text if self.scope.type(source) == kind else f"({CTYPES[kind]})({text})"

    # -- statements --------------------------------------------------------------------------------------------------

    def body(self, body: tuple[Statement, ...]) -> None:
        for s in body:
            if isinstance(s, Loop):
                self.loop(s)
            elif isinstance(s, When):
                self.when(s)
            elif isinstance(s, Store):
                self.settle(s.target, s.mask, Access(s.tile, ()))
                self.memory.store(s)
            elif isinstance(s, Load):
                self.settle(s.source)
                self.memory.load(s)
                self.pending.pop(s.tile, None)
            elif isinstance(s, Map):
                self.map(s)
            elif isinstance(s, Fold):
                self.fold(s)
            else:
                self.fold(Fold(s.tile, "sum", s.over, call("mul", s.a, s.b), s.accumulate))

    def map(self, s: Map) -> None:
        dims, kind = self.k.tile(s.tile).dims, self.scope.tiles[s.tile]
        self.scope.real = kind if kind == "f64" else "f32"
        parts = {self.pending[t] for t in self.reads(s.body) if t in self.pending}
        lazy = bool(self.open) and len(parts) == 1 and self.linear(s.body)
        part = next(iter(parts)) if lazy else None
        if part is None or part.monoid != "sum" or part.mask & self.block.mask(dims):
            part = None
            self.settle(s.body)
        with self.points(dims) as at:
            text = self.scope.cast(s.body, kind, at) if part is None else self.partial(s.body, kind, at, part)
            self.line(f"{self.place(s.tile, at)} = {text};")
        self.scope.real = "f32"
        self.pending.pop(s.tile, None)
        if part is not None:
            self.pending[s.tile] = part

    def fold(self, s: Fold) -> None:
        dims, kind = self.k.tile(s.tile).dims, self.scope.tiles[s.tile]
        self.scope.real = kind if kind == "f64" else "f32"
        self.settle(s.body)
        part, own = Partial(s.monoid, self.block.mask(s.over)), self.pending.get(s.tile)
        identity = _identity(s.monoid, kind)
        once = ""   # the condition under which a thread adds what others hold as well
        if s.accumulate:
            again = s.monoid in _AGAIN
            if own is not None and (own.monoid != s.monoid or not (again or own == part or not part.mask)):
                self.join(s.tile)
                own = None
            if own is None and part.mask and not again:
                self.divide(s.tile, part)
            if own is not None:
                once = f"{self.thread} & {own.mask}" if not part.mask and not again else ""
                part = Partial(s.monoid, own.mask | part.mask)
        plain = s.accumulate and not once
        with self.points(dims, names=not plain) as at:
            place = self.place(s.tile, at)
            total = place if plain else self.names["total"]
            if not plain:
                self.line(f"{CTYPES[kind]} {total} = {identity};")
            with self.points(s.over) as inner:
                every = {**at, **inner}
                value = self.scope.cast(s.body, kind, every)
                if tests := self.live(s.over, every):
                    value = f"({' && '.join(tests)} ? {value} : {identity})"
                self.line(f"{total} = {_joined(s.monoid, kind, total, value)};")
            if not plain:
                value = f"({once} ? {identity} : {total})" if once else total
                self.line(f"{place} = {_joined(s.monoid, kind, place, value) if s.accumulate else value};")
        self.scope.real = "f32"
        self.pending.pop(s.tile, None)
        if part.mask:
            self.pending[s.tile] = part

    # -- what threads hold of a reduction ----------------------------------------------------------------------------

    def reads(self, *read: Expr | None) -> list[str]:
        return [n.tensor for e in read if e is not None for n in walk(e)
                if isinstance(n, Access) and n.tensor in self.scope.tiles]

    def settle(self, *read: Expr | None) -> None:
        """Join the tiles that these expressions read."""
        for t in dict.fromkeys(self.reads(*read)):
            if t in self.pending:
                self.join(t)

    def join(self, tile: str) -> None:
        part = self.pending.pop(tile)
        self.line(f"combine<{_JOIN[part.monoid]}, {part.mask}, {self.block.warps}>({self.names[tile]}, {self.rooms}, "
                  f"{self.turn});")

    def divide(self, tile: str, part: Partial) -> None:
        """Leave what a tile holds to one of the threads that hold it."""
        if part.monoid not in _AGAIN:
            name, identity = self.names[tile], _identity(part.monoid, self.scope.tiles[tile])
            self.unrolled("i", self.block.registers(self.k.tile(tile).dims),
                          f"{name}[i] = {self.thread} & {part.mask} ? {identity} : {name}[i];")
        self.pending[tile] = part

    def linear(self, e: Expr) -> bool:
        """Is an expression a sum of terms with one pending tile at most, each as it is or scaled?"""
        if not set(self.reads(e)) & set(self.pending) or isinstance(e, Access):
            return True
        if not isinstance(e, Call):
            return False
        if e.op in ("add", "sub", "neg"):
            return all(self.linear(a) for a in e.args)
        waits = [a for a in e.args if set(self.reads(a)) & set(self.pending)]
        if e.op == "mul":
            return len(waits) == 1 and self.linear(waits[0])
        return e.op == "where" and e.args[0] not in waits and all(self.linear(a) for a in e.args[1:])

    def partial(self, e: Expr, kind: str, at: Point, part: Partial) -> str:
        """The thread's part of an expression that is `linear`: what is whole counts in one thread."""
        if not set(self.reads(e)) & set(self.pending):
            if e in (Const(0), Const(0.0)):
                return number(0.0, kind)
            return f"({self.thread} & {part.mask} ? {number(0.0, kind)} : {self.scope.cast(e, kind, at)})"
        if isinstance(e, Access):
            return self.scope.cast(e, kind, at)
        assert isinstance(e, Call)
        if e.op == "neg":
            return f"(-{self.partial(e.args[0], kind, at, part)})"
        if e.op == "where":
            a, b = (self.partial(x, kind, at, part) for x in e.args[1:])
            return f"({self.scope.cast(e.args[0], 'bool', at)} ? {a} : {b})"
        if e.op == "mul":
            texts = [self.partial(a, kind, at, part) if set(self.reads(a)) & set(self.pending)
                     else self.scope.cast(a, kind, at) for a in e.args]
            return f"({' * '.join(texts)})"
        return f"({f' {_SIGNS[e.op]} '.join(self.partial(a, kind, at, part) for a in e.args)})"

    # -- control -----------------------------------------------------------------------------------------------------

    @contextmanager
    def aside(self) -> Iterator[list[str]]:
        """Lines for later."""
        before, self.lines = self.lines, []
        yield self.lines
        self.lines = before

    def when(self, s: When) -> None:
        self.settle(s.cond)
        start, sides, ends = dict(self.pending), [], []
        for body in (s.body, s.orelse):
            self.pending = dict(start)
            self.depth += 1
            with self.aside() as lines:
                self.body(body)
            self.depth -= 1
            sides.append(lines)
            ends.append(self.pending)
        agreed = dict(ends[0])
        for t in sorted({*ends[0], *ends[1]}):
            a, b = ends[0].get(t), ends[1].get(t)
            if a != b:
                self._agree(t, a or b if not (a and b) else None, ends, sides)
                agreed.pop(t, None)
                if part := ends[0].get(t):
                    agreed[t] = part
        self.pending = agreed
        self.line(f"if ({self.scope.cast(s.cond, 'bool', {})}) {{")
        self.lines += sides[0]
        if sides[1]:
            self.line("} else {")
            self.lines += sides[1]
        self.line("}")

    def _agree(self, tile: str, part: Partial | None, ends: list[dict[str, Partial]], sides: list[list[str]]) -> None:
        """Make both sides of a branch hold a tile alike: each thread its part, or joined."""
        for n in range(2):
            self.pending = ends[n]
            if self.pending.get(tile) == part:
                continue
            self.depth += 1
            with self.aside() as lines:
                if part is None:
                    self.join(tile)
                else:
                    self.divide(tile, part)
            self.depth -= 1
            sides[n] += lines

    def loop(self, s: Loop) -> None:
        """A loop in parts, of which the long one has no masks."""
        self.settle(s.lo, s.hi)
        own, pieces = self._own(s), parts(self.k, s)
        start, last = self.scope.whole(s.lo), self.names.fresh("end")
        self.line(f"const int {last} = {self.scope.whole(s.hi)};")
        for p in pieces:
            end = last
            if p.end is not None:
                self.settle(p.end)
                end = self.names.fresh("end")
                self.line(f"const int {end} = least(most({self.scope.whole(p.end)}, {start}), {last});")
            before = set(self.full)
            self.full |= {d for d in p.full if self.block.dims[d].exact}
            self.steps(s.var, start, end, early(p.body, self.memory.written), own)
            self.full, start = before, end

    def steps(self, var: str, lo: str, hi: str, body: tuple[Statement, ...], own: set[str]) -> None:
        """Steps that leave each tile to threads as they found it: joined, or each with its part.  Tried until they do;
        own: tiles that live within one step."""
        whole: set[str] = set()
        divided: dict[str, Partial] = {}
        start, known = dict(self.pending), (set(self.names.used), dict(self.names.known))
        while True:
            self.pending = dict(start)
            self.names.used, self.names.known = set(known[0]), dict(known[1])
            with self.aside() as lines:
                for t in sorted(whole & set(self.pending)):
                    self.join(t)
                for t in sorted(divided.keys() - whole - set(self.pending)):
                    self.divide(t, divided[t])
                entry = dict(self.pending)
                ahead = self.ahead(body)
                rest = body[len(ahead):]
                if ahead:
                    self.first(var, lo, hi, ahead)
                self.line("#pragma unroll 1")
                self.line(f"for (int {self.names[var]} = {lo}; {self.names[var]} < {hi}; ++{self.names[var]}) {{")
                self.depth += 1
                self.open.append(var)
                if ahead:
                    self.next(var, hi, ahead)
                self._counts(var)
                for s, at in ahead:
                    self.memory.load(s, f"{self.names['room']} + {at}" if at else self.names["room"])
                self.body(rest)
                for t in sorted(own & set(self.pending)):
                    self.pending.pop(t)
                for t in sorted(whole & set(self.pending)):
                    self.join(t)
                self.open.pop()
                self.depth -= 1
                self.line("}")
            if self.pending == entry:
                break
            for t in {*entry, *self.pending}:
                if entry.get(t) != self.pending.get(t):
                    if t in entry:
                        whole.add(t)
                    else:
                        divided[t] = self.pending[t]
        self.lines += lines

    # -- what is read steps before it is needed -----------------------------------------------------------------------

    def ahead(self, body: tuple[Statement, ...]) -> list[tuple[Load, int]]:
        """The loads that begin a step and can be asked for steps before, as they rest on nothing that a step writes,
        and where they lie in a room.  None in a loop round another."""
        made = {x.tile for x in statements(body) if isinstance(x, (Load, Map, Fold, Dot))}
        found: list[tuple[Load, int]] = []
        size = 0
        for s in () if any(isinstance(x, Loop) for x in statements(body)) else body:
            read = {n.tensor for n in walk(s.source) if isinstance(n, Access)} if isinstance(s, Load) else made
            if not isinstance(s, Load) or read & (made | self.memory.written) or not (n := self.memory.room(s)):
                break
            found.append((s, size))
            size += n
        return found if found and 2 * size <= self.most - OWN else []

    def rooms_of(self, ahead: list[tuple[Load, int]]) -> tuple[int, int]:
        """How many steps are under way, with the one at hand, and bytes of each: as many as let two blocks share a
        processor's memory, and two at least."""
        size = sum(self.memory.room(s) for s, _ in ahead)
        n = max(2, min(STEPS, (self.most // 2 - OWN) // size))
        self.shared = max(self.shared, n * size)
        return n, size

    def first(self, var: str, lo: str, hi: str, ahead: list[tuple[Load, int]]) -> None:
        """Before a loop: ask for its first steps."""
        n, size = self.rooms_of(ahead)
        slot, step = self.names["slot"], self.names["step"]
        self.line("#pragma unroll 1")
        self.line(f"for (int {step} = 0; {step} < {n - 1}; ++{step}) {{")
        self.depth += 1
        self.ask(var, f"{lo} + {step}", hi, ahead, f"{self.names['staged']} + {step} * {size}")
        self.depth -= 1
        self.line("}")
        self.line(f"{slot} = 0;")

    def next(self, var: str, hi: str, ahead: list[tuple[Load, int]]) -> None:
        """At the beginning of a step: ask for one that comes, wait for this one."""
        n, size = self.rooms_of(ahead)
        slot, staged = self.names["slot"], self.names["staged"]
        before = f"({slot} == 0 ? {n - 1} : {slot} - 1)"
        self.ask(var, f"{self.names[var]} + {n - 1}", hi, ahead, f"{staged} + {before} * {size}")
        self.line(f"come<{n - 1}>();")
        self.line(f"const char *{self.names['room']} = {staged} + {slot} * {size};")
        self.line(f"{slot} = {slot} == {n - 1} ? 0 : {slot} + 1;")

    def ask(self, var: str, step: str, hi: str, ahead: list[tuple[Load, int]], room: str) -> None:
        later, place = self.names["later"], self.names["place"]
        self.line(f"if (const int {later} = {step}; {later} < {hi}) {{")
        self.depth += 1
        self.open.append(var)
        self.line(f"const int {self.names[var]} = {later};")
        self.line(f"char *{place} = {room};")
        self._counts(var)
        for s, at in ahead:
            self.memory.ask(s, f"{place} + {at}" if at else place)
        self.open.pop()
        self.depth -= 1
        self.line("}")
        self.line("asked();")

    def _own(self, s: Loop) -> set[str]:
        """Tiles that live within one step: written before they are read, and nowhere else touched."""
        inside = list(statements(s.body))
        within = {id(x) for x in inside}
        outside: set[str] = set()
        for x in statements(self.k.body):
            if id(x) not in within:
                outside |= self._touched(x)
        own: set[str] = set()
        seen: set[str] = set()
        for x in s.body:
            if isinstance(x, (Load, Map, Fold, Dot)) and x.tile not in seen and x.tile not in self._read(x):
                own.add(x.tile)
            seen |= self._touched(x)
            if isinstance(x, (Loop, When)):
                for y in statements((x,)):
                    seen |= self._touched(y)
        return own - outside

    def _read(self, s: Statement) -> set[str]:
        found = set(self.reads(*expressions(s)))
        if isinstance(s, Store):
            found |= {s.tile, *self.reads(s.target)}
        return found | ({s.tile} if isinstance(s, (Fold, Dot)) and s.accumulate else set())

    def _touched(self, s: Statement) -> set[str]:
        return self._read(s) | ({s.tile} if isinstance(s, (Load, Map, Fold, Dot)) else set())


def early(body: tuple[Statement, ...], written: set[str]) -> tuple[Statement, ...]:
    """Loads first, so that they are under way together: those of params that the kernel does not write, into tiles that
    nothing reads before, at places that the step does not compute."""
    first: list[Statement] = []
    rest: list[Statement] = []
    touched: set[str] = set()
    for s in body:
        if isinstance(s, Load):
            read = {n.tensor for n in walk(s.source) if isinstance(n, Access)}
            if not read & (touched | written) and s.tile not in touched:
                first.append(s)
                continue
        rest.append(s)
        for x in statements((s,)):
            more = (x.target,) if isinstance(x, Store) else ()
            touched |= {n.tensor for e in (*expressions(x), *more) for n in walk(e) if isinstance(n, Access)}
            if not isinstance(x, (Loop, When)):
                touched.add(x.tile)
    return (*first, *rest)


def _places(thread: str, bits: tuple[int, ...], vector: int) -> str:
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


def _identity(monoid: str, kind: str) -> str:
    x = MONOIDS[monoid].identity
    if kind == "i64" and math.isinf(x):
        return number(INTEGERS["i64"][x > 0], "i64")
    return number(bool(x) if kind == "bool" else int(x) if kind == "i64" else float(x), kind)


def _joined(monoid: str, kind: str, a: str, b: str) -> str:
    if monoid in ("max", "min"):
        word = {"max": ("highest", "most"), "min": ("lowest", "least")}[monoid][kind == "i64"]
        return f"{word}({a}, {b})"
    return f"{a} {_SIGNS[monoid]} {b}"
