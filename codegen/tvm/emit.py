"""TileProgram -> TVMScript text: one function that runs the launches in order, each a parallel loop over its grid.

Text only; nothing here imports tvm.  The words that TVMScript does not know are in `vocabulary` and `maths`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from memcomp.codegen.names import Names
from memcomp.codegen.rough import rough
from memcomp.codegen.tvm import dot as contraction
from memcomp.codegen.tvm import pairs
from memcomp.codegen.tvm.access import load, some_element, store, view
from memcomp.codegen.tvm.best import best
from memcomp.codegen.tvm.codes import codes
from memcomp.codegen.tvm.express import Expressions, truth
from memcomp.codegen.tvm.group import Group, Nest, grouped, without_branch
from memcomp.codegen.tvm.isa import Isa, isa
from memcomp.codegen.tvm.launcher import CHUNKS
from memcomp.codegen.tvm.narrow import narrow
from memcomp.codegen.tvm.words import WORDS
from memcomp.codegen.tvm.writer import BITS, Point, Writer, element, read_tiles
from memcomp.ir.expr import Call, Const, variables
from memcomp.ir.target import BYTES, Target
from memcomp.ir.tile import (
    Best,
    Dim,
    Dot,
    Kernel,
    Load,
    Loop,
    Param,
    Statement,
    Store,
    TileKernel,
    TileProgram,
    When,
    statements,
)

Layout = tuple[int, ...]


def emit(tp: TileProgram, target: Target | Isa | str, layout: Layout | None = None) -> Kernel:
    """Kernel text for a machine; deterministic.

    layout: for each param the position whose stride is 1 in memory, -1 where there is none; the last by default.
    Raises Refusal where a stored format or an operator has no form here.
    """
    shape = target if isinstance(target, Isa) else isa(target)
    units = layout if layout is not None else tuple(len(p.shape) - 1 for p in tp.params)
    source, scratch = _program(tp, shape, units)
    return Kernel(tp.name, "tvm", source, "main", tp, shape.name, scratch)


def _program(tp: TileProgram, shape: Isa, units: Layout) -> tuple[str, int]:
    """The text, and the bytes of the buffers of its largest launch."""
    names = Names({*WORDS, "main"})
    for p in tp.params:
        names[p.name]
    arguments = [f"{names[p.name]}_arg: T.handle" for p in tp.params] + [f"{names[s]}: T.int64" for s in tp.sizes]
    lines = [f"# {shape.name}", "@T.prim_func(s_tir=True)", f"def main({', '.join(arguments)}):",
             '    T.func_attr({"global_symbol": "main"})']
    probe = Writer(tp, TileKernel("", (), (), (), ()), shape, names)
    for p, u in zip(tp.params, units, strict=True):
        lines += _param(probe, p, u)
    for p, u in zip(tp.params, units, strict=True):
        probe.units[p.name] = u
        lines += _view(probe, p, u)
    scratch = 0
    straight = replace(tp, kernels=tuple(replace(k, body=_straight(k.body)) for k in tp.kernels))
    allowed = rough(straight)
    for k in straight.kernels:
        w = Writer(tp, k, shape, names)
        w.rough = allowed
        w.units = {p.name: u for p, u in zip(tp.params, units, strict=True)}
        w.coded, w.hidden = codes(w)
        w.products = pairs.products(w)
        w.narrow = narrow(w)
        scratch = max(scratch, _kernel(w))
        lines += w.lines
        names.forget({t.name for t in k.tiles} | {d.name for d in k.dims})
    return "\n".join(lines) + "\n", scratch


def _param(w: Writer, p: Param, unit: int) -> list[str]:
    """Declare a tensor: extents over the sizes, any strides but the one that is 1, aligned to its elements only."""
    name, kind = w.names[p.name], element(p.dtype, p.name)
    strides = [_stride(name, k, unit) for k in range(len(p.shape))]
    lines = [f"    {s} = T.int64()" for k, s in enumerate(strides) if k != unit]
    extents = _extents(w, p, range(len(p.shape)))
    layout = f"{_strides(strides)}, align={BYTES[p.dtype]}"
    return [*lines, f"    {name} = T.match_buffer({name}_arg, {extents}, {kind!r}{layout})"]


def _view(w: Writer, p: Param, unit: int) -> list[str]:
    """The buffer that accesses go through where the argument itself does not serve."""
    name, order = view(w, p)
    if name == w.names[p.name]:
        return []
    kind = BITS.get(p.dtype) or element(p.dtype, p.name)
    strides = _strides([_stride(w.names[p.name], k, unit) for k in order])
    data = f"data={w.names[p.over or p.name]}.data"
    return [f"    {name} = T.decl_buffer({_extents(w, p, order)}, {kind!r}, {data}{strides}, align={BYTES[p.dtype]})"]


def _stride(name: str, k: int, unit: int) -> str:
    return "i64(1)" if k == unit else f"{name}_stride{k}"


def _strides(strides: list[str]) -> str:
    return f", strides=({', '.join(strides)},)" if strides else ""


def _extents(w: Writer, p: Param, order: Sequence[int]) -> str:
    return f"({''.join(Expressions(w, Point({})).index(p.shape[k]) + ', ' for k in order)})"


def _kernel(w: Writer) -> int:
    """Write one launch; returns the bytes of its buffers."""
    k, names = w.kernel, w.names
    w.line(f"# {k.name}")
    total = names.fresh("points")
    extents = [Expressions(w, Point({})).index(e) for _, e in k.grid]
    w.let(total, " * ".join(e for e in extents if e != "i64(1)") or "i64(1)")
    chunk, chunks, point = names.fresh("chunk"), names.fresh("chunks"), names.fresh("point")
    w.let(chunks, f"T.min({total}, i64({CHUNKS}))")
    w.line(f"tasks({chunks})")
    with w.block(f"for {chunk} in T.parallel({chunks}):"):
        start = len(w.lines)
        depth = w.depth
        first, last = (f"T.truncdiv({c} * {total}, {chunks})" for c in (chunk, f"({chunk} + 1)"))
        with w.block(f"for {point} in T.serial({first}, {last}):"):
            scalars: dict[str, str] = {}
            rest = point
            for n in range(len(k.grid) - 1, -1, -1):
                v = names[k.grid[n][0]]
                scalars[k.grid[n][0]] = v
                if extents[n] == "i64(1)":
                    scalars[k.grid[n][0]] = "i64(0)"
                elif all(e == "i64(1)" for e in extents[:n]):
                    w.let(v, rest)
                else:
                    w.let(v, f"T.truncmod({rest}, {extents[n]})")
                    nxt = names.fresh("rest")
                    w.let(nxt, f"T.truncdiv({rest}, {extents[n]})")
                    rest = nxt
            Body(w).run(k.body, Point(scalars))
        text = "\n".join(w.lines[start:])
        used = [t for t in k.tiles if re.search(rf"\b{names[t.name]}\b", text)]
        buffers = {names[t.name]: (w.shape(t), w.element(t)) for t in used} | w.buffers
        tiles = any(p.form == "tiles" for p in w.products.values())
        if tiles:
            w.line("tile_stop()")
        w.lines[start:start] = ["    " * depth + text for text in (
            *(f"{name} = T.alloc_buffer({shape}, {kind!r})" for name, (shape, kind) in buffers.items()),
            *(["tile_start()"] if tiles else []))]
    names.forget({v for v, _ in k.grid})
    return sum(math.prod(shape) * int(re.sub(r"\D", "", kind)) // 8 for shape, kind in buffers.values())


def _bounded(d: Dim) -> bool:
    """Does the count say itself that it fits?"""
    parts = [d.count]
    while parts:
        e = parts.pop()
        if isinstance(e, Const) and e.value <= d.capacity:
            return True
        if isinstance(e, Call) and (e.op == "min" or e.op == "max" and Const(0) in e.args):
            parts += [a for a in e.args if e.op == "min" or a != Const(0)]
    return False


def _straight(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """The statements without the branches that a select replaces."""
    out: list[Statement] = []
    for s in body:
        if isinstance(s, Loop):
            s = replace(s, body=_straight(s.body))
        elif isinstance(s, When):
            s = without_branch(replace(s, body=_straight(s.body), orelse=_straight(s.orelse)))
        out.append(s)
    return tuple(out)


class Body:
    """Writes statements in order."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        self.all = list(statements(w.kernel.body))

    def run(self, body: Sequence[Statement], point: Point) -> None:
        self._counts(point)
        w = self.w
        body = [s for s in body if id(s) not in w.hidden]
        for s in body:
            if isinstance(s, Load) and self._in_place(s, body):
                w.in_place[s.tile] = s
        for item in grouped(body, w.tiles):
            self._statement(item, point)

    def _in_place(self, s: Load, body: Sequence[Statement]) -> bool:
        """May and should the readers of a loaded tile read the param instead?"""
        w = self.w
        readers = [x for x in self.all if s.tile in read_tiles(x, w.tiles)]
        writers = [x for x in self.all if getattr(x, "tile", "") == s.tile and not isinstance(x, Store)]
        dots = [x for x in readers if isinstance(x, Dot)]
        if len(writers) != 1 or len(dots) != len(readers):
            return False
        if any(isinstance(x, Store) and x.target.tensor == s.source.tensor for x in self.all):
            return False
        moving = any(isinstance(x, Loop) and x.var in variables(s.source) for x in self.all)
        inside = {id(x) for x in statements(tuple(body))}
        return (not moving or all(id(x) in inside for x in readers)) and contraction.in_place(w, s, dots)

    def _as_pairs(self, s: Load) -> pairs.Side | None:
        """The form in which a tile is filled that nothing reads but products of pairs."""
        w = self.w
        readers = [x for x in self.all if s.tile in read_tiles(x, w.tiles)]
        ways = [w.products[id(x)] for x in readers if id(x) in w.products]
        if not readers or len(ways) != len(readers) or s.tile in w.in_place:
            return None
        return pairs.packed(s, ways)

    def _counts(self, point: Point) -> None:
        """Name the counts of dims whose variables have just become known."""
        w = self.w
        for d in w.dims.values():
            if d.name in w.counts or isinstance(d.count, Const):
                continue
            if variables(d.count) <= set(point.scalars):
                name = w.names.fresh(f"n_{w.names[d.name]}")
                text = Expressions(w, point).index(d.count)
                w.let(name, text)
                w.counts[d.name] = name
                if not _bounded(d):  # a rank whose bound the caller keeps
                    w.line(f"assert {name} <= i64({d.capacity}), {f'rank {d.name.upper()} is over its bound'!r}")

    def _statement(self, s: Statement | Group, point: Point) -> None:
        w = self.w
        if isinstance(s, Group):
            Nest(w, s, point)
        elif isinstance(s, Load):
            for n in some_element(w, s.source):  # an index that is cut to a tensor is inside only then
                why = f"{w.program.name} reads an element of an empty tensor"
                w.line(f"assert {Expressions(w, point).index(n)} > i64(0), {why!r}")
            side = self._as_pairs(s)
            if side is not None:
                pairs.load(w, s, side, point)
            elif s.tile not in w.in_place:
                load(w, s, point)
        elif isinstance(s, Store):
            store(w, s, point)
        elif isinstance(s, Best):
            best(w, s, point)
        elif isinstance(s, Dot):
            fold = contraction.dot(w, s, point)
            if fold is not None:
                for a in (s.a, s.b):
                    if a.tensor in w.in_place:  # only the micro-kernels can go to the param itself
                        load(w, w.in_place[a.tensor], point)
                (g,) = grouped((fold,), w.tiles)
                assert isinstance(g, Group)
                Nest(w, g, point)
        elif isinstance(s, Loop):
            lo, hi = (Expressions(w, point).index(e) for e in (s.lo, s.hi))
            v = w.names.fresh(w.names[s.var])
            known = set(w.counts)
            with w.block(f"for {v} in T.serial({lo}, T.max({lo}, {hi})):"):
                w.loops.append(s.var)
                self.run(s.body, point.at(**{s.var: v}))
                w.loops.pop()
            for d in set(w.counts) - known:
                del w.counts[d]
        elif isinstance(s, When):
            cond = truth(Expressions(w, point).value(s.cond)).text
            self._branch(f"if {cond}:", s.body, point)
            if s.orelse:
                self._branch("else:", s.orelse, point)

    def _branch(self, head: str, body: tuple[Statement, ...], point: Point) -> None:
        known = set(self.w.counts)
        with self.w.block(head):
            self.run(body, point)
        for d in set(self.w.counts) - known:
            del self.w.counts[d]

