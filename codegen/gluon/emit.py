"""TileProgram -> Gluon text for sm_90: a launch's warps divide its work.

One group of warps fetches, two multiply and compute, 64 rows each (`form` says for which kernels).  A step's second
product waits for the next step's first one: both are under way while the groups compute what lies between them.

    fetches:   K(j) into its slot;  V's slot free?  V(j) into it
    computes:  K(j) there?  S = Q K(j);  O += P(j-1) V(j-1);  S ready?
               ... S becomes P(j) ...
               V(j) there?  O ready?  the slot of V(j-1) is free;  O = O * again

The wait for V(j), a loop in the machine code, stands where it does so that the wait for O is not moved up over the
exponentials: a compiler moves it to the wait for S otherwise, and the products no longer run while they are computed.

V's slots count from 1: slot 0 is zeros and P begins as 0, so that the first step has a second product to start and no
step is written apart.  So loops may follow one another, be in parts, or have no steps.  K needs no word that its slot
is free: before K(j) the slot of V(j-3) was waited for, which is freed when all products of step j-2 are done, and K(j)
takes the slot of K(j-2).
"""

from __future__ import annotations

from dataclasses import replace

from memcomp.codegen.gluon.box import NAMES, Box, box, offsets
from memcomp.codegen.gluon.form import HALF, Form, form, needed, reads, taken, useful, wrote
from memcomp.codegen.gluon.group import Group, Places
from memcomp.codegen.gluon.rows import STAGES, Rows, Slots, Steps
from memcomp.codegen.gluon.words import HEAD, RESERVED, spoken
from memcomp.codegen.order import order
from memcomp.codegen.rounding import narrow
from memcomp.codegen.triton.arguments import Arguments, arguments
from memcomp.codegen.triton.emit import function_names
from memcomp.codegen.triton.layout import Axis, layout
from memcomp.codegen.triton.parts import Part, parts
from memcomp.codegen.triton.resources import Setting
from memcomp.codegen.triton.straight import straight
from memcomp.codegen.triton.words import used
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, variables, walk
from memcomp.ir.target import BYTES, Target
from memcomp.ir.target import target as named
from memcomp.ir.tile import Kernel, Load, Loop, Statement, Store, TileKernel, TileProgram, expressions, statements

WARPS = 4          # of a group
REGISTERS = 240, 24   # of a thread that computes, at most, and of one that fetches
PARTS = 3          # of all loops: of more, each loop is one, with masks; the text of a step is long
ROOM = 88          # registers that a thread that computes has beside what it holds
BARRIERS = 1024    # bytes at most of barriers, of what groups are handed, and of alignment
HELD = 176         # registers for sums, scores and weights, beyond which kernels spilled


def emit(tp: TileProgram, target: Target | str, units: tuple[int, ...] | None = None) -> Kernel:
    """Kernel text; deterministic.

    units: for each param the position whose stride is 1 in memory, -1 where there is none; the last by default.
    Raises Refusal for machines other than sm_90, and where a launch has not the form or does not fit.
    """
    machine = named(target) if isinstance(target, str) else target
    if why := unfit(machine):
        raise Refusal(f"the backend gluon has no kernels for {machine.name}: {why}", tp.name,
                      "the triton backend takes it")
    places = units if units is not None else tuple(len(p.shape) - 1 for p in tp.params)
    words: set[str] = set()
    allowed = narrow(tp)
    texts: list[str] = []
    names = function_names(tp)
    for k, name in zip(tp.kernels, names, strict=True):
        if (wanted := shared(tp, k)) > (there := machine.level("smem").bytes):
            raise Refusal(f"{k.name} needs {wanted:,} bytes of shared memory, and a block of {machine.name} has "
                          f"{there:,}", tp.name, "fewer keys in a step")
        texts += _Launch(tp, k, machine, places, allowed, words).functions(name)
    told = "".join(f"    {name!r}: dict(num_warps={WARPS}),\n" for name in names)
    source = "\n\n".join([HEAD, *map(spoken, used(words)), *map(spoken, texts), f"SETTINGS = {{\n{told}}}\n"])
    return Kernel(tp.name, "gluon", source, "SETTINGS", tp, machine.name)


def unfit(machine: Target) -> str:
    """Why no kernel is written for a machine; "" where one may be."""
    if not machine.has("cuda"):
        return "it writes for GPUs"
    return "" if machine.capability == 90 else f"it writes for sm_90, and that has sm_{machine.capability}"


def admits(tp: TileProgram, target: Target) -> int:
    """0: every launch fits the machine with its registers; 1: some spill.  Raises Refusal where one does not fit or has
    no text."""
    emit(tp, target)
    return int(max(map(held, tp.kernels), default=0) > HELD)


def shared(tp: TileProgram, k: TileKernel) -> int:
    """Bytes of shared memory of a block, at most: the queries, and slots for what is streamed."""
    f = parted(k)
    streamed = f.keys.size * (f.depth.size + f.columns.size)
    return (f.rows.size * f.depth.size + STAGES * streamed) * BYTES[tp.param(f.query.source.tensor).dtype] + BARRIERS


def held(k: TileKernel) -> int:
    """32-bit registers of a thread for what a step holds: sums, scores, the weights of the step before in 16 bits, and
    what it loads over keys, of which four threads hold all."""
    f = parted(k)
    own = HALF * (2 * f.columns.size + 2 * f.keys.size + f.keys.size) // (2 * 32 * WARPS)
    for s in f.loops[0].body:
        if isinstance(s, Load) and s not in f.fetched and f.keys in (axes := layout(k).of(k.tile(s.tile).dims)):
            own += f.keys.size * (HALF // 32 if len(axes) > 1 else 1) // 4 * max(1, BYTES[k.tile(s.tile).dtype] // 4)
    return own


def parted(k: TileKernel) -> Form:
    """The parts of a kernel; Refusal where it has not the form."""
    return form(straight(k), layout(k))


def boxes(tp: TileProgram, k: TileKernel, units: tuple[int, ...]) -> dict[str, Box]:
    """What a launch takes before its other arguments, by name: the box of each tile that is fetched."""
    f = parted(k)
    unit = dict(zip((p.name for p in tp.params), units, strict=True))

    def one(s: Load, axes: tuple[Axis, Axis], rows: int = 0) -> Box:
        return box(tp, k, s, axes, unit[s.source.tensor], rows)

    found = (one(f.query, (f.rows, f.depth), HALF), one(f.left, (f.keys, f.depth)), one(f.right, (f.keys, f.columns)))
    number = tp.kernels.index(k)
    return {f"{s.tile}_box{number or ''}": x for s, x in zip(f.fetched, found, strict=True)}


def given(tp: TileProgram, k: TileKernel, units: tuple[int, ...]) -> Arguments:
    """The other arguments: of tensors that a launch reads or writes by address, and sizes."""
    tiles = {s.tile for s in parted(k).fetched}
    rest = [s for s in statements(k.body) if not (isinstance(s, Load) and s.tile in tiles)]
    touched = {n.tensor for s in rest for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
    touched |= {s.target.tensor for s in rest if isinstance(s, Store)}
    return Arguments(tuple(a for a in arguments(tp, k, units).args if a.kind == "size" or a.of in touched))


class _Launch:
    """Text of one launch: what starts the groups, and the groups."""

    def __init__(self, tp: TileProgram, k: TileKernel, machine: Target, units: tuple[int, ...],
                 allowed: set[tuple[str, str, str]], words: set[str]) -> None:
        self.boxes = boxes(tp, k, units)
        common = given(tp, k, units), allowed, words, Setting(WARPS, STAGES), order(tp, k, machine)
        self.host, self.fetch, self.rows = Group(tp, k, *common), Group(tp, k, *common), Rows(tp, k, *common)
        self.k, self.names = self.host.k, self.host.names
        self.plan = f = form(self.k, self.host.layout)
        for d in (*f.depth.dims, *f.columns.dims):
            if self.k.dim(d).count != Const(self.k.dim(d).capacity):
                raise Refusal(f"the number of {d} is not known", k.name, "the triton backend takes it")
        self.kind = self.rows.form(f.first)
        if self.kind not in NAMES or self.rows.form(f.last) != self.kind:
            raise Refusal(f"{f.first.tile} and {f.last.tile} are no products of {' or '.join(NAMES)}", k.name,
                          "the triton backend takes it")
        self.names.used |= RESERVED
        matrices = {a: self.names[f"L_{a.size}"] for a in (f.keys, f.columns)}
        for g in (self.host, self.fetch, self.rows):
            g.names = g.scope.names = self.names
            g.place(f, Places(f.rows, matrices if g is self.rows else {}))
        self.tiles = [self.names[s.tile] for s in f.fetched]
        self.bars = [self.names[f"{self.tiles[n]}_{what}"] for n, what in
                     ((0, "full"), (1, "full"), (2, "full"), (2, "free"))]

    def functions(self, name: str) -> list[str]:
        f, h, names = self.plan, self.host, self.names
        pieces = [parts(self.k, s) for s in f.loops]
        if sum(map(len, pieces)) > PARTS:
            pieces = [[replace(next((p for p in ps if p.edge), ps[0]), end=None)] for ps in pieces]
        every = [(s, p) for s, ps in zip(f.loops, pieces, strict=True) for p in ps]
        rest = useful((*(replace(s, lo=Const(0), hi=Const(0), body=p.body) for s, p in every), *f.after))
        bodies = [s.body for s in rest[:len(every)] if isinstance(s, Loop)]
        bounds = [e for s in f.loops for e in (s.lo, s.hi)] + [p.end for ps in pieces for p in ps if p.end is not None]
        read = taken(rest)
        boxes = {s.tile for s in f.fetched}
        # numbers that are known before the first step are the same in all groups
        numbers = {t.name for t in self.k.tiles if not t.dims} & wrote(f.before)
        own = needed(tuple(s for s in f.before if not wrote((s,)) <= numbers | boxes), read - numbers - boxes)
        handed_over = numbers & (read | reads(own))
        before = needed(f.before, handed_over | numbers & _tensors(bounds))
        h._grid()
        h.indices([a for a in h.layout.axes if self._met(before, a)])
        h.body(before)
        loops: list[Steps] = []
        for s, ps in zip(f.loops, pieces, strict=True):
            written = tuple(replace(p, body=bodies.pop(0)) for p in ps)
            loops.append(self._steps(s, written, loops[-1].done if loops else ""))
        self._memory()
        texts = [*(names[a.name] for a in h.given.args), *(names[v] for v, _ in self.k.grid),
                 *(names[t] for t in sorted(handed_over)), *(x for s in loops for x in (*s.ends, s.skip, s.done)),
                 *self.tiles, *self.bars]
        handed = ", ".join(x for x in dict.fromkeys(texts) if x.isidentifier())
        described = ", ".join(names[x] for x in self.boxes)
        fetches, computes = names.fresh(f"{name}_fetch", True), names.fresh(f"{name}_rows", True)
        h.line("gl.warp_specialize([")
        for half in (0, 1):
            h.line(f"    ({computes}, ({handed}, {half})),")
        h.line(f"    ({fetches}, ({described}, {handed})),")
        most, few = REGISTERS
        h.line(f"], [{WARPS}, {WARPS}], [{min(most, -(-(held(self.k) + ROOM) // 8) * 8)}, {few}])")
        args = ", ".join((described, *(names[a.name] for a in h.given.args)))
        self._fetch(loops)
        self._rows(loops, own)
        return [self.fetch.function(f"def {fetches}({described}, {handed}):"),
                self.rows.function(f"def {computes}({handed}, half: gl.constexpr):"),
                h.function(f"def {name}({args}):")]

    def _met(self, body: tuple[Statement, ...], a: Axis) -> bool:
        """Do statements meet an axis?"""
        dims = {d for s in statements(body) for e in expressions(s) for d in variables(e)}
        dims |= {d for t in wrote(body) for d in self.k.tile(t).dims}
        return bool(dims & set(a.dims))

    def _steps(self, s: Loop, pieces: tuple[Part, ...], done: str) -> Steps:
        """Where a loop and its parts begin and end; done: steps before it."""
        h = self.host

        def kept(stem: str, text: str) -> str:
            if text.isdecimal():
                return text
            name = self.names.fresh(stem, True)
            h.line(f"{name} = {text}")
            return name

        lo, hi = kept("first", h.end(s.lo)), kept("last", h.end(s.hi))
        ends = [lo]
        for p in pieces:
            ends.append(hi if p.end is None else
                        kept("end", f"tl.minimum(tl.maximum({h.end(p.end)}, {ends[-1]}), {hi})"))
        skip = kept("skip", f"{lo} - {done}") if done else lo
        own = f"tl.maximum({hi} - {lo}, 0)" if lo != "0" else f"tl.maximum({hi}, 0)"
        return Steps(s, pieces, tuple(ends), skip, kept("steps", f"{done} + {own}" if done else own))

    def _memory(self) -> None:
        """Slots for the tiles, and the barriers."""
        h, (*_, v) = self.host, self.tiles
        for tile, x, slots in zip(self.tiles, self.boxes.values(), (2, STAGES, STAGES), strict=True):
            h.line(f"{tile} = gl.allocate_shared_memory(gl.{NAMES[x.dtype]}, {[slots, *x.shape]}, gl.NVMMASharedLayout("
                   f"swizzle_byte_width={x.swizzle}, element_bitwidth=16, rank={len(x.shape)}))")
        for name, slots, count in zip(self.bars, (1, STAGES, STAGES, STAGES), (1, 1, 1, 2), strict=True):
            h.line(f"{name} = gl.allocate_shared_memory(gl.int64, [{slots}, 1], mbarrier.MBarrierLayout())")
            for n in range(slots):
                h.line(f"mbarrier.init({name}.index({n}), count={count})")
        *_, right = self.boxes.values()
        slow, fast = right.matrix
        across = min(32, fast // 8)
        h.line(f"{_matrix(f'{v}.index(0)', right)}.store(gl.full([{slow}, {fast}], 0.0, gl.{NAMES[right.dtype]}, "
               f"gl.BlockedLayout([1, 8], [{32 // across}, {across}], [{WARPS}, 1], [1, 0])))")
        h.line("fence_async_shared()")
        h.line(f"mbarrier.arrive({self.bars[2]}.index(0))")

    def _fetch(self, loops: list[Steps]) -> None:
        g, names, (q, k, v) = self.fetch, self.names, self.tiles
        q_full, k_full, v_full, v_free = self.bars
        (query_name, query), (left_name, left), (right_name, right) = ((names[n], x) for n, x in self.boxes.items())
        g.line(f"mbarrier.expect({q_full}.index(0), {2 * query.bytes})")
        for half in (0, 1):
            g.line(f"fetch({query_name}, {self._at(query, half)}, {q_full}.index(0), {q}.index({half}))")
        for s in loops:
            g.line(f"for {names[s.loop.var]} in range({s.ends[0]}, {s.ends[-1]}):")
            g.depth += 1
            n = s.count(g)
            slot, after = f"{n} % {STAGES}", f"({n} + 1) % {STAGES}"
            g.line(f"mbarrier.expect({k_full}.index({slot}), {left.bytes})")
            g.line(f"fetch({left_name}, {self._at(left)}, {k_full}.index({slot}), {k}.index({slot}))")
            g.line(f"mbarrier.wait({v_free}.index({after}), ((({n} + 1) // {STAGES}) & 1) ^ 1)")
            g.line(f"mbarrier.expect({v_full}.index({after}), {right.bytes})")
            g.line(f"fetch({right_name}, {self._at(right)}, {v_full}.index({after}), {v}.index({after}))")
            g.depth -= 1

    def _at(self, x: Box, half: int = 0) -> str:
        """Where a box begins, or that of the second half of the rows."""
        texts = [self.fetch.scope.scalar(e) for e in x.at]
        for d, more in offsets(self.k, self.plan.rows, HALF).items() if half else ():
            n = next(n for n, p in enumerate(x.places) if d in variables(self.plan.query.source.index[p]))
            texts[n] = f"{texts[n]} + {more}" if more else texts[n]
        return f"[{', '.join(texts)}]"

    def _rows(self, loops: list[Steps], before: tuple[Statement, ...]) -> None:
        g, f, (q, k, v) = self.rows, self.plan, self.tiles
        g.kind = NAMES[self.kind]
        for name, a in {name: a for a, name in g.places.matrices.items()}.items():
            g.line(f"{name}: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[{WARPS}, 1], "
                   f"instr_shape=[16, {min(a.size, 256)}, 16])")
        query, left, right = self.boxes.values()
        g.slots = Slots(_operand(f"{q}.index(half)", query, f.rows), _operand(f"{k}.index({{}})", left, f.depth),
                        _operand(f"{v}.index({{}})", right, f.keys), *self.bars)
        g.indices([*dict.fromkeys((f.rows, f.keys, f.columns))])
        g.body(before)
        g.loops(loops)
        g.body(f.after)


def _tensors(found: list[Expr]) -> set[str]:
    return {n.tensor for e in found for n in walk(e) if isinstance(n, Access)}


def _matrix(slot: str, x: Box) -> str:
    """A slot as a matrix as it lies in memory."""
    return f"{slot}.reshape([{x.matrix[0]}, {x.matrix[1]}])" if len(x.shape) > 2 else slot


def _operand(slot: str, x: Box, slow: Axis) -> str:
    """A slot as a matrix whose rows are the points of an axis."""
    text = _matrix(slot, x)
    return text if x.sides[0] == slow else f"{text}.permute((1, 0))"
