"""TileProgram -> Triton text: one `@triton.jit` function per launch, one program instance per grid point.

Text only; nothing here imports triton.  Tiles are tensors over axes (`layout`); what runs past the counts of dims is
masked where it is loaded, reduced, contracted or stored, and nowhere else.  A loop whose tiles are full, or whose
branches go one way, from some step on or up to some step is written as up to three loops (`parts`), so that the long
one has no masks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from memcomp.codegen.names import Names
from memcomp.codegen.order import TASK, Order, numbered, order, tasks
from memcomp.codegen.rounding import narrow
from memcomp.codegen.triton.arguments import Arguments, arguments
from memcomp.codegen.triton.best import best
from memcomp.codegen.triton.dead import Dead
from memcomp.codegen.triton.express import DTYPES, Scope, dims_of, number
from memcomp.codegen.triton.layout import Axis, layout
from memcomp.codegen.triton.memory import Memory
from memcomp.codegen.triton.parts import Part, parts
from memcomp.codegen.triton.resources import Setting, chosen, need
from memcomp.codegen.triton.resources import options as settings_to_measure
from memcomp.codegen.triton.straight import straight
from memcomp.codegen.triton.words import FUNCTIONS, HEAD, used
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, call, reads, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.target import BYTES, Target
from memcomp.ir.target import target as named
from memcomp.ir.tile import (
    Best,
    Dim,
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
    made,
    statements,
)

SPANNED = 1 << 17  # bytes of what a reduction makes of smaller tiles, beyond which registers cannot hold it
STORED = ("bf16", "f16")  # formats that tensor cores multiply, and that f32 holds exactly
_FOLDS = {"sum": "tl.sum({}, {})", "prod": "tl.reduce({}, {}, times)", "and": "tl.reduce({}, {}, both)",
          "or": "tl.reduce({}, {}, either)"}
_ENDS = {"max": ("highest", "most"), "min": ("lowest", "least")}  # of reals, where a NaN stays one, and of integers
_JOINS = {"sum": "{} + {}", "prod": "{} * {}", "and": "{} & {}", "or": "{} | {}"}
_WORDS = ("times", "both", "either")
_TOLD = re.compile(r"^ +'(\w+)': dict\(num_warps=(\d+), num_stages=(\d+)(?:, programs=(\d+))?(, specialised=1)?\),$",
                   re.MULTILINE)
TAKEN = {"tl", "triton", "INTERPRET", "NAN", *FUNCTIONS}


def emit(tp: TileProgram, target: Target | str, units: tuple[int, ...] | None = None,
         aligned: bool = True, settings: Mapping[str, Setting] | None = None) -> Kernel:
    """Kernel text; deterministic.

    units: for each param the position whose stride is 1 in memory, -1 where there is none; the last by default.
    aligned: tensors begin at multiples of 16 bytes and their other strides are multiples of 16 elements, so that a
    machine's copy engine can take them.  settings: by function, of those that are not to be as the resource model says.
    Raises Refusal where a stored format, an operator or a contraction has no form here.
    """
    places = units if units is not None else tuple(len(p.shape) - 1 for p in tp.params)
    words: set[str] = set()
    allowed = narrow(tp)
    machine = named(target) if isinstance(target, str) else target
    launches = list(zip(tp.kernels, function_names(tp), strict=True))
    given = {n: (settings or {}).get(n) or chosen(tp, k, machine) for k, n in launches}
    texts = [_Writer(tp, k, arguments(tp, k, places), allowed, words, given[n], order(tp, k, machine),
                     aligned and machine.has("tma")).kernel(n) for k, n in launches]
    told = "".join(f"    {n!r}: dict(num_warps={x.warps}, num_stages={x.stages}"
                   f"{f', programs={x.programs}' if x.programs else ''}"
                   f"{', specialised=1' if x.specialised else ''}),\n" for n, x in given.items())
    source = "\n\n".join([HEAD, *used(words), *texts, f"SETTINGS = {{\n{told}}}\n"])
    return Kernel(tp.name, "triton", source, "SETTINGS", tp, machine.name)


def settings_of(source: str) -> dict[str, Setting]:
    """The settings that a text says of itself, by function."""
    return {name: Setting(int(w), int(s), int(programs or 0), bool(special))
            for name, w, s, programs, special in _TOLD.findall(source)}


def admits(tp: TileProgram, target: Target) -> float:
    """0: every launch fits the machine well; more: some spill, or wait (`resources.Need`).  Raises Refusal where one
    does not fit or has no text."""
    emit(tp, target)
    return max((need(tp, k, target, chosen(tp, k, target)).strain for k in tp.kernels), default=0)


def options(tp: TileProgram, target: Target) -> dict[str, dict[str, Setting]]:
    """What `emit` may be given as `settings` to be chosen from by measuring, by words that name no function: "" as the
    resource model says, then one launch at a time with another setting."""
    found: dict[str, dict[str, Setting]] = {"": {}}
    for n, (k, name) in enumerate(zip(tp.kernels, function_names(tp), strict=True)):
        found |= {f"launch {n}: {s}": {name: s} for s in settings_to_measure(tp, k, target)[1:]}
    return found


def function_names(tp: TileProgram) -> list[str]:
    """The names of the launches' functions in the text."""
    names = Names(TAKEN)
    return [names.fresh(re.sub(r"\W", "_", k.name), plain=True) for k in tp.kernels]


class _Writer:
    """Text of one launch."""

    def __init__(self, tp: TileProgram, k: TileKernel, given: Arguments, allowed: set[tuple[str, str, str]],
                 words: set[str], setting: Setting, how: Order, boxed: bool = False) -> None:
        self.setting, self.order = setting, how
        self.k, self.given, self.allowed = straight(k), given, allowed
        k = self.k
        self.params = {p.name: p for p in tp.params}
        for p in tp.params:
            if p.dtype in ("e4m3", "e5m2"):
                raise Refusal(f"{p.name} is stored as {p.dtype}", tp.name, "the triton backend reads f64, f32, f16, "
                              "bf16, integers and bool")
        self.layout = layout(k)
        names = Names(TAKEN)
        for a in given.args:
            names[a.name]
        writers: dict[str, list[Statement]] = {}
        for s in statements(k.body):
            for t in made(s):
                writers.setdefault(t, []).append(s)
        loaded = {t: self.params[first.source.tensor].dtype for t, (first, *more) in writers.items()
                  if isinstance(first, Load) and all(x == first for x in more)}
        self.stored = {t: dtype for t, dtype in loaded.items() if dtype in STORED}
        self.small = {t for t, dtype in loaded.items() if dtype == "i8" and k.tile(t).dtype == "i64"}
        dtypes = {p.name: p.dtype for p in tp.params} | {t.name: t.dtype for t in k.tiles}
        tiles = {t.name: self.layout.of(t.dims) for t in k.tiles}
        self.scope = Scope(names, self.layout, dtypes, tiles, set(self.stored), {d.name: d.capacity for d in k.dims},
                           words)
        self.names = names
        self.full: set[str] = {a.name for a in self.layout.axes if self._always_full(a)}
        self.dead = Dead(k, self.layout, {t for t, kind in dtypes.items() if kind in ("f32", "f64")})
        self.boxed = boxed and any(isinstance(s, Dot) and self.multiplied(s) for s in statements(k.body))
        self.memory = Memory(self)
        self.scope.element = self.memory.element
        self.lines: list[str] = []
        self.depth = self.top = 1

    # -- the function ------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def kernel(self, name: str) -> str:
        for a in self.layout.axes:
            self._axis(a)
        self._grid()
        inside = {s.var for s in statements(self.k.body) if isinstance(s, Loop)}
        self._counts([a for a in self.layout.axes if not self._changes(a, inside)])
        self.body(self.k.body)
        args = ", ".join(self.names[a.name] for a in self.given.args)
        text = "\n".join(self.lines)
        self.lines = [line for line in self.lines if not self._idle(line, text)]
        return f"@triton.jit\ndef {name}({args}):\n" + ("\n".join(self.lines) or "    pass")

    def _idle(self, line: str, text: str) -> bool:
        """Is the line the definition of an index that nothing reads?"""
        found = re.match(r"\s+([in]_\w+) = tl\.(arange|full)", line)
        return bool(found) and len(re.findall(rf"\b{found[1] if found else ''}\b", text)) == 1

    def _grid(self) -> None:
        """What the program instance works on: a task, or in turns tasks as far apart as there are instances."""
        if self.setting.programs and self.k.grid:
            total = self.scope.scalar(tasks(self.k))
            # the copies of a task's loops are not to be made ahead of the task
            steps = f"tl.range(tl.program_id(0), {total}, tl.num_programs(0), num_stages=1)"
            self.line(f"for {self.names[TASK]} in {steps}:")
            self.depth = self.top = 2
        elif self.k.grid:
            self.line(f"{self.names[TASK]} = tl.program_id(0)")
        for name, e in numbered(self.k, self.order):
            self.line(f"{self.names[name]} = {self.scope.scalar(e)}")

    def _axis(self, a: Axis) -> None:
        name = self.names[f"i_{a.name}"]
        self.line(f"{name} = {self.points(a)}")
        step = 1
        for d in reversed(a.dims if len(a.dims) > 1 else ()):
            size = self.k.dim(d).capacity
            at = name if step == 1 else f"{name} // {step}"
            self.line(f"{self.names[f'i_{a.name}__{d}']} = ({at}) % {size}")
            step *= size

    def points(self, a: Axis) -> str:
        """The numbers of an axis' points."""
        return f"tl.arange(0, {a.size})"

    def _changes(self, a: Axis, names: set[str]) -> bool:
        return any(variables(self.k.dim(d).count) & names for d in a.dims)

    def _always_full(self, a: Axis) -> bool:
        return a.points == a.size and all(self._filled(self.k.dim(d)) for d in a.dims)

    def _filled(self, d: Dim) -> bool:
        return d.count == Const(d.capacity)

    def _counts(self, axes: list[Axis]) -> None:
        """The points of each axis that count, where they are not all."""
        for a in axes:
            if a.name in self.full:
                continue
            tests = [f"{self.names[f'i_{a.name}']} < {a.points}"] if a.points < a.size and len(a.dims) > 1 else []
            for d in a.dims:
                dim = self.k.dim(d)
                if not self._filled(dim) or (len(a.dims) == 1 and a.points < a.size):
                    tests.append(f"{self.scope.local(d, (a,))} < {self.scope.scalar(dim.count)}")
            test = " & ".join(f"({t})" if len(tests) > 1 else t for t in tests)
            self.line(f"{self.names[f'live_{a.name}']} = {test}")

    def live(self, axes: tuple[Axis, ...], want: tuple[Axis, ...] | None = None) -> list[str]:
        """Texts, broadcast over `axes`, of the conditions that points of the axes `want` (all) count."""
        return [self.scope.spread(self.names[f"live_{a.name}"], (a,), axes)
                for a in (axes if want is None else want) if a.name not in self.full]

    # -- statements --------------------------------------------------------------------------------------------------

    def body(self, body: tuple[Statement, ...]) -> None:
        for n, s in enumerate(body):
            if self.depth == self.top:
                self.memory.describe(s)
            if isinstance(s, Loop):
                self.loop(s)
            elif isinstance(s, When):
                self.when(s)
            elif isinstance(s, Store):
                self.memory.store(s)
            elif isinstance(s, Load):
                self.memory.load(s)
                own = dims_of(s.source, self.scope.dims)
                self.dead.set(s.tile, {a: 0.0 for a in self.scope.tiles[s.tile] if own & set(a.dims)}.get)
            elif isinstance(s, Map):
                self.map(s, body[n + 1:])
            elif isinstance(s, Fold):
                self.fold(s)
            elif isinstance(s, Best):
                best(self, s)
            else:
                self.dot(s)

    def assign(self, tile: str, text: str) -> None:
        self.line(f"{self.names[tile]} = {text}")

    def map(self, s: Map, rest: tuple[Statement, ...]) -> None:
        """rest: what follows in the same block; one mask here may serve all of it."""
        axes = self.scope.tiles[s.tile]
        value, gone = self.dead.fill(s, rest, self.full) or (0.0, ())
        masked = tuple(a for a in gone if self.dead.at(s.body, a) != value)
        known = {a: self.dead.at(s.body, a) for a in axes} | dict.fromkeys(masked, value)
        self.assign(s.tile, self.filled(s.body, axes, self.scope.dtypes[s.tile], self.live(axes, masked),
                                        number(value)))
        self.dead.set(s.tile, known.get)

    def when(self, s: When) -> None:
        self.line(f"if {self.scope.scalar(s.cond)}:")
        before = dict(self.dead.held)
        self._block(s.body)
        after, self.dead.held = self.dead.held, before
        if s.orelse:
            self.line("else:")
            self._block(s.orelse)
        self.dead.held = dict(self.dead.held.items() & after.items())

    def _block(self, body: tuple[Statement, ...]) -> None:
        self.depth += 1
        self.body(body)
        if not body:
            self.line("pass")
        self.depth -= 1

    def loop(self, s: Loop) -> None:
        lo, hi = self.end(s.lo), self.end(s.hi)
        changing = [a for a in self.layout.axes if self._changes(a, {s.var})]
        pieces = parts(self.k, s)
        if self.specialises(s.body):   # Triton takes one loop, so every step has masks
            pieces = [replace(next((p for p in pieces if p.edge), pieces[0]), end=None, edge=False)]
        ends = [lo]
        for p in pieces:
            end = hi
            if p.end is not None:
                end = self.names.fresh("end")
                self.line(f"{end} = tl.minimum(tl.maximum({self.end(p.end)}, {ends[-1]}), {hi})")
            ends.append(end)
        for p, start, end in zip(pieces, ends, ends[1:], strict=False):
            self._part(s, p, start, end, changing)

    def specialises(self, body: tuple[Statement, ...]) -> bool:
        """Do some warps fetch what others compute with?  Where tensor cores do the work and descriptors bring it."""
        return self.setting.specialised and self.boxed and any(
            isinstance(x, Dot) and self.multiplied(x) for x in statements(body))

    def end(self, e: Expr) -> str:
        """An end of a loop.  Steps are counted in 32 bits, as sizes are; data have 64."""
        text = self.scope.scalar(e)
        if not any(isinstance(n, Access) for n in walk(e)):
            return text
        return f"tl.cast({self.scope.word('least')}({self.scope.word('most')}({text}, 0), {2**31 - 1}), tl.int32)"

    def _part(self, s: Loop, p: Part, lo: str, hi: str, changing: list[Axis]) -> None:
        before = set(self.full)
        self.full |= {a.name for a in changing if a.points == a.size and set(a.dims) <= p.full}
        self._loop(s.var, lo, hi, p.body, changing, p.edge)
        self.full = before

    def _loop(self, var: str, lo: str, hi: str, body: tuple[Statement, ...], changing: list[Axis],
              edge: bool) -> None:
        self.line(f"for {self.names[var]} in {self.steps(lo, hi, body, edge)}:")
        self.depth += 1
        self.dead.forget(body, changing)
        self._counts(changing)
        self.body(body)
        if not body:
            self.line("pass")
        self.depth -= 1

    def steps(self, lo: str, hi: str, body: tuple[Statement, ...], edge: bool) -> str:
        """What a loop runs over.  Triton fetches ahead by itself only what feeds tensor cores; elsewhere it is told.

        The addresses of two loops that fetch ahead are more than there are registers: without descriptors the few steps
        at the edges of a loop with products wait instead.
        """
        inner = list(statements(body))
        if self.specialises(body):
            return f"tl.range({lo}, {hi}, warp_specialize=True)"
        if edge and not self.boxed and any(isinstance(s, Dot) for s in inner):
            return f"tl.range({lo}, {hi}, num_stages=1)"
        if self.setting.stages > 1 and any(isinstance(s, Load) for s in inner) and not any(
                isinstance(s, (Loop, When)) or (isinstance(s, Dot) and self.multiplied(s)) for s in inner):
            return f"tl.range({lo}, {hi}, num_stages={self.setting.stages})"
        return f"range({lo}, {hi})"

    def filled(self, e: Expr, axes: tuple[Axis, ...], dtype: str, live: Collection[str] = (),
               other: str = "0.0") -> str:
        """The expression as a tensor over all of `axes`, of the tile's dtype; `other` where one of `live` fails."""
        text = self.scope.text(e, axes)
        if isinstance(e, Const):
            text = self.constant(axes, text, DTYPES[dtype])
            return f"tl.where({' & '.join(live)}, {text}, {other})" if live else text
        joined = isinstance(e, Call) and e.op == "where" and self.scope.text(e.args[2], axes) == other
        if live and joined:   # one choice for both conditions
            test, chosen = (self.scope.text(a, axes) for a in e.args[:2])  # type: ignore[union-attr]
            text = f"tl.where({' & '.join((*live, test))}, {chosen}, {other})"
        held = {"f32": "real", "i64": "int", "bool": "bool"}.get(dtype)
        got = self.exact(e)
        if self.scope.kind(e) != held or got != dtype:
            text = f"tl.cast({text}, {DTYPES[dtype]})"
        if live and not joined:
            text = f"tl.where({' & '.join(live)}, {text}, {other})"
        dims = dims_of(e, self.scope.dims)
        if any(not dims & set(a.dims) for a in axes):
            return self.widened(text, axes)
        return text

    def constant(self, axes: tuple[Axis, ...], text: str, dtype: str) -> str:
        return f"tl.full({self.shape(axes)}, {text}, {dtype})"

    def widened(self, text: str, axes: tuple[Axis, ...]) -> str:
        """A tensor over some of the axes as one over all."""
        return f"tl.broadcast_to({text}, {self.shape(axes)})"

    def exact(self, e: Expr) -> str:
        """The dtype that Triton surely gives an expression; "" where it may be another."""
        if isinstance(e, Access) and e.tensor in self.scope.tiles:
            return "f32" if e.tensor in self.stored else self.scope.dtypes[e.tensor]
        args = getattr(e, "args", ())
        kind = self.scope.kind(e)
        if kind != "real" or not args:
            return "bool" if kind == "bool" and args and e.op not in ("where",) else ""  # type: ignore[union-attr]
        found = {self.exact(a) for a in args if self.scope.kind(a) == "real" and not isinstance(a, Const)}
        return found.pop() if len(found) == 1 else ""

    def fold(self, s: Fold) -> None:
        axes, dtype = self.scope.tiles[s.tile], self.scope.dtypes[s.tile]
        gone = self.layout.of(s.over)
        every = tuple(a for a in self.layout.axes if a in axes or a in gone)
        points = math.prod(a.size for a in every)
        if points * BYTES[dtype] > SPANNED and not any(
                set(every) <= set(self.scope.tiles.get(t, ())) for t in reads(s.body)):
            raise Refusal(f"{s.tile} sums up {points:,} numbers that are made of smaller tiles, and is no product of two "
                          "matrices that tensor cores read", self.k.name,
                          "a smaller tile, or operands of f32 or bf16")
        masked = [a for a in gone if self.dead.at(s.body, a) != MONOIDS[s.monoid].identity]
        value = self.filled(s.body, every, dtype, self.live(every, tuple(masked)), self.identity(s.monoid, dtype))
        join = _JOINS.get(s.monoid, "")
        form = _FOLDS.get(s.monoid, "")
        if s.monoid in _ENDS:
            real, whole = _ENDS[s.monoid]
            join = f"{self.scope.word(real if dtype[0] == 'f' else whole)}({{}}, {{}})"
            form = f"{self.scope.word(real + '_over')}({{}}, {{}})" if dtype[0] == "f" else f"tl.{s.monoid}({{}}, {{}})"
        for word in set(_WORDS) & set(re.findall(r"\w+", form)):
            self.scope.word(word)
        for a in reversed(gone):
            value = form.format(value, every.index(a))
            if dtype == "bool":
                value = f"({value} != 0)"
        self.assign(s.tile, join.format(self.names[s.tile], value) if s.accumulate else value)

    def identity(self, monoid: str, dtype: str) -> str:
        x = MONOIDS[monoid].identity
        if dtype == "i64" and x in (float("inf"), float("-inf")):
            return str(2**63 - 1) if x > 0 else f"({-2**63})"
        return number(bool(x) if dtype == "bool" else int(x) if dtype == "i64" else float(x))

    def shape(self, axes: tuple[Axis, ...]) -> str:
        return f"[{', '.join(str(a.size) for a in axes)}]"

    # -- contractions ------------------------------------------------------------------------------------------------

    def dot(self, s: Dot) -> None:
        axes, dtype = self.scope.tiles[s.tile], self.scope.dtypes[s.tile]
        x, form = self.layout.matrices(self.k, s), self.form(s)
        if x is None or not self.multiplied(s):
            self.fold(Fold(s.tile, "sum", s.over, call("mul", s.a, s.b), s.accumulate))
            return
        first = self.operand(x.a, (*x.batch, x.left, x.over), x.over, form)
        second = self.operand(x.b, (*x.batch, x.over, x.right), x.over, form)
        exactly = ', input_precision="tf32x3"' if form == "f32" else ""
        made = (*x.batch, x.left, x.right)
        if s.accumulate and made == axes and dtype == "f32":
            self.assign(s.tile, f"tl.dot({first}, {second}, {self.names[s.tile]}{exactly})")
            return
        value = self.turned(f"tl.dot({first}, {second}{exactly})", made, axes)
        if form == "i8":
            value = f"{value}.to(tl.int64)"
        self.assign(s.tile, f"{self.names[s.tile]} + {value}" if s.accumulate else value)

    def multiplied(self, s: Dot) -> bool:
        """Is a contraction one of tensor cores?"""
        return self.layout.matrices(self.k, s) is not None and self.form(s) != ""

    def form(self, s: Dot) -> str:
        """The format that tensor cores read both operands in; "" where they cannot serve.

        A computed operand is rounded to what the other is stored as where `rounding` allows it.
        """
        operands = s.a, s.b
        held = [self.stored.get(x.tensor, "") for x in operands]
        if self.scope.dtypes[s.tile] == "i64":
            return "i8" if all(x.tensor in self.small for x in operands) else ""
        if self.scope.dtypes[s.tile] != "f32":
            return ""
        if held[0] and held[0] == held[1]:
            return held[0]
        if "" in held and (self.k.name, s.tile, word := max(held)) in self.allowed:
            return word
        return "f32" if all(self.scope.dtypes[x.tensor] in ("f32", *STORED) for x in operands) else ""

    def operand(self, a: Access, want: tuple[Axis, ...], over: Axis, form: str) -> str:
        """A tile as an operand: in the format, over `want` in this order, 0 where contracted points do not count."""
        own = self.scope.tiles[a.tensor]
        text = self.names[a.tensor]
        if a.tensor not in self.stored and a.tensor not in self.small:
            if self.dead.held.get((a.tensor, over.name)) != 0.0 and (conditions := self.live(own, (over,))):
                text = f"tl.where({' & '.join(conditions)}, {text}, 0.0)"
            if form == "bf16":
                text = f"{self.scope.word('to_bf16')}({text})"
            elif form == "f16":
                text = f"tl.cast({text}, tl.float16)"
        elif form == "f32":
            text = f"{text}.to(tl.float32)"
        return self.turned(text, own, want)

    def turned(self, text: str, own: tuple[Axis, ...], want: tuple[Axis, ...]) -> str:
        if own == want:
            return text
        order = [own.index(a) for a in want]
        return f"tl.trans({text}{''.join(f', {n}' for n in order)})"
