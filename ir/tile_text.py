"""Tile programs as text: `parse_tile(show_tile(t)) == t`.  Expressions are those of `memcomp.ir.parse`.

    tiles NAME [on TARGET]
    param X[EXTENT, ...]: DTYPE in|out|state|work [over NAME]
    sizes P, M
    kernel NAME
      grid b: EXTENT, p1: EXTENT
      dim p0[CAPACITY] count EXPR start EXPR
      tile S[m0, p0]: DTYPE
      load S = X[index, ...]                  map S = EXPR
      fold S = max{m0} EXPR                   fold S += max{m0} EXPR      joined to what S holds
      best V, I: k = {m0} EXPR at EXPR         best V, I: k += {m0} EXPR at EXPR
      dot S = {e} A[e, m0] * B[e, p0]         dot S += {e} ...
      store X[index, ...] = S
      for m1 = EXPR to EXPR {                 if EXPR {
      }                                       } else {
      when EXPR {                             an if whose last side does right whatever the condition says
                                              }
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NoReturn

from memcomp.ir.cascade import DTYPES
from memcomp.ir.errors import ParseError, nearest
from memcomp.ir.expr import Access, Expr
from memcomp.ir.lex import Line, picture, read_line, spelled
from memcomp.ir.ops import MONOIDS
from memcomp.ir.parse import parse_expr
from memcomp.ir.show import show_expr
from memcomp.ir.tile import (
    Best,
    Dim,
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Param,
    Statement,
    Store,
    Tile,
    TileKernel,
    TileProgram,
    When,
)

ROLES = ("in", "out", "state", "work")
HEADS = ("param", "sizes", "kernel")
PARTS = ("grid", "dim", "tile")
STATEMENTS = ("load", "map", "fold", "best", "dot", "store", "for", "if", "when")
_HEADER = re.compile(r"\s*tiles\s+(?P<name>\S+)(?:\s+on\s+(?P<target>\S+))?\s*$")
_FIRST = "the first line is tiles NAME, or tiles NAME on cpu"


# -- print ------------------------------------------------------------------------------------------------------------


def _list(items: Iterable[str]) -> str:
    return ", ".join(items)


def show_statement(s: Statement, indent: str = "") -> Iterator[str]:
    """The lines of one tile statement."""
    if isinstance(s, Load):
        yield f"{indent}load {s.tile} = {show_expr(s.source)}"
    elif isinstance(s, Map):
        yield f"{indent}map {s.tile} = {show_expr(s.body)}"
    elif isinstance(s, Fold):
        yield f"{indent}fold {s.tile} {_assign(s)} {s.monoid}{{{_list(s.over)}}} {show_expr(s.body)}"
    elif isinstance(s, Best):
        over = _list(s.over)
        yield (f"{indent}best {s.tile}, {s.place}: {s.order} {_assign(s)} {{{over}}} {show_expr(s.body)} "
               f"at {show_expr(s.at)}")
    elif isinstance(s, Dot):
        held = f": {s.held}" if s.held else ""
        yield f"{indent}dot {s.tile} {_assign(s)} {{{_list(s.over)}}}{held} {show_expr(s.a)} * {show_expr(s.b)}"
    elif isinstance(s, Store):
        mask = f" where {show_expr(s.mask)}" if s.mask is not None else ""
        yield f"{indent}store {show_expr(s.target)} = {s.tile}{mask}"
    elif isinstance(s, Loop):
        yield f"{indent}for {s.var} = {show_expr(s.lo)} to {show_expr(s.hi)} {{"
        yield from _block(s.body, indent)
    else:
        yield f"{indent}{'when' if s.spare else 'if'} {show_expr(s.cond)} {{"
        if s.orelse:
            *body, _ = _block(s.body, indent)
            yield from (*body, f"{indent}}} else {{")
        yield from _block(s.orelse or s.body, indent)


def _assign(s: Fold | Best | Dot) -> str:
    return "+=" if s.accumulate else "="


def _block(body: tuple[Statement, ...], indent: str) -> Iterator[str]:
    for s in body:
        yield from show_statement(s, indent + "  ")
    yield f"{indent}}}"


def _kernel(k: TileKernel) -> Iterator[str]:
    yield f"kernel {k.name}"
    if k.grid:
        yield f"  grid {_list(f'{v}: {show_expr(n)}' for v, n in k.grid)}"
    for d in k.dims:
        yield f"  dim {d.name}[{d.capacity}] count {show_expr(d.count)} start {show_expr(d.start)}"
    for t in k.tiles:
        yield f"  tile {t.name}[{_list(t.dims)}]: {t.dtype}"
    for s in k.body:
        yield from show_statement(s, "  ")


def show_tile(program: TileProgram) -> str:
    """The text of a tile program; ends with a newline."""
    lines = [f"tiles {program.name}" + f" on {program.target}" * bool(program.target)]
    lines += [f"param {p.name}[{_list(map(show_expr, p.shape))}]: {p.dtype} {p.role}{p.over and f' over {p.over}'}"
              for p in program.params]
    if program.sizes:
        lines.append(f"sizes {_list(program.sizes)}")
    for k in program.kernels:
        lines += _kernel(k)
    return "\n".join(lines) + "\n"


# -- parse ------------------------------------------------------------------------------------------------------------


def parse_tile(text: str) -> TileProgram:
    """The tile program a text says; ParseError shows the line with a caret."""
    return _Reader(text).program()


class _Reader:
    """Lines in order; blocks nest by their braces."""

    def __init__(self, text: str) -> None:
        self.header = next((m for s in text.splitlines() if (m := _HEADER.match(s.partition("#")[0]))), None)
        numbered = [(n, s) for n, s in enumerate(text.splitlines(), 1) if s.partition("#")[0].strip()]
        if not numbered:
            raise ParseError("the text holds no tile program", hint=_FIRST)
        number, source = numbered[0]
        if self.header is None or not _HEADER.match(source.partition("#")[0]):
            raise ParseError("expected a tile program", picture(number, source, 0, len(source)), _FIRST)
        self.lines = [read_line(n, s) for n, s in numbered[1:]]
        self.last = picture(*numbered[-1], len(numbered[-1][1]))
        self.at = 0

    def peek(self) -> str:
        return self.lines[self.at].next.text if self.at < len(self.lines) else ""

    def line(self) -> Line:
        """The next line, past its first word."""
        line = self.lines[self.at]
        self.at, line.at = self.at + 1, 1
        return line

    def unknown(self, known: tuple[str, ...]) -> NoReturn:
        line = self.lines[self.at]
        line.fail(f"a line cannot start with {spelled(line.next)} here", nearest(line.next.text, known))

    def program(self) -> TileProgram:
        params: list[Param] = []
        sizes: tuple[str, ...] = ()
        kernels: list[TileKernel] = []
        while self.at < len(self.lines):
            head = self.peek()
            if head == "param":
                params.append(_param(self.line()))
            elif head == "sizes":
                line = self.line()
                sizes += tuple(line.listed(_name))
                line.end("write sizes P, M")
            elif head == "kernel":
                kernels.append(self.kernel())
            else:
                self.unknown(HEADS)
        assert self.header is not None
        return TileProgram(self.header["name"], tuple(params), sizes, tuple(kernels), self.header["target"] or "")

    def kernel(self) -> TileKernel:
        line = self.line()
        name = _name(line)
        line.end("write kernel g0")
        grid: tuple[tuple[str, Expr], ...] = ()
        dims: list[Dim] = []
        tiles: list[Tile] = []
        while self.peek() in PARTS:
            head, line = self.peek(), self.line()
            if head == "grid":
                grid += tuple(line.listed(_axis))
                line.end("write grid b: B, p1: ceil(P/32)")
            elif head == "dim":
                dims.append(_dim(line))
            else:
                tiles.append(_tile(line))
        body = self.statements()
        if self.at < len(self.lines) and self.peek() not in HEADS:
            self.unknown((*HEADS, *PARTS, *STATEMENTS))
        return TileKernel(name, grid, tuple(dims), tuple(tiles), body)

    def statements(self) -> tuple[Statement, ...]:
        out: list[Statement] = []
        while self.peek() in STATEMENTS:
            out.append(self.statement())
        return tuple(out)

    def statement(self) -> Statement:
        head, line = self.peek(), self.line()
        if head == "for":
            var = _name(line)
            line.expect("=", "write for m1 = 0 to M1 {")
            lo = parse_expr(line)
            line.expect("to", "write for m1 = 0 to M1 {")
            loop = Loop(var, lo, parse_expr(line), self.block(line))
            self.close()
            return loop
        if head in ("if", "when"):
            cond = parse_expr(line)
            body = self.block(line)
            orelse: tuple[Statement, ...] = ()
            if self.at < len(self.lines) and self.lines[self.at].peek().text == "else":
                line = self.line()
                line.at += 1
                orelse = self.block(line)
            self.close()
            return When(cond, body, orelse, head == "when")
        s = _simple(line, head)
        line.end("one statement to a line")
        return s

    def block(self, line: Line) -> tuple[Statement, ...]:
        """The statements after an opening brace, up to the closing one, which stays."""
        line.expect("{", "a block opens with { at the end of the line")
        line.end("a block opens with { at the end of the line")
        body = self.statements()
        if self.at == len(self.lines):
            raise ParseError("expected '}', found the end of the text", self.last, "a block that opens must close")
        if self.peek() != "}":
            self.unknown((*STATEMENTS, "}"))
        return body

    def close(self) -> None:
        self.line().end("a closing brace stands alone, or before else {")


def _simple(line: Line, head: str) -> Statement:
    if head == "store":
        target = _access(line)
        line.expect("=", "write store X[p] = S")
        tile = _name(line)
        return Store(target, tile, parse_expr(line) if line.take("where") is not None else None)
    tile = _name(line)
    if head == "best":
        return _best(line, tile)
    accumulate = head in ("fold", "dot") and line.take("+=") is not None
    if not accumulate:
        line.expect("=", f"write {head} {tile} = ...")
    if head == "load":
        return Load(tile, _access(line))
    if head == "map":
        return Map(tile, parse_expr(line))
    monoid = line.one_of("reduction", MONOIDS).text if head == "fold" else ""
    line.expect("{", f"write {head} {tile} = {monoid}{{m0}} ...")
    over = tuple(line.listed(_name, "}"))
    if head == "fold":
        return Fold(tile, monoid, over, parse_expr(line), accumulate)
    held = line.one_of("dtype", DTYPES).text if line.take(":") else ""
    a = _access(line)
    line.expect("*", f"write dot {tile} = {{e}} A[e] * B[e]")
    return Dot(tile, a, _access(line), over, accumulate, held)


def _best(line: Line, tile: str) -> Best:
    hint = f"write best {tile}, I: k = {{m0}} X[m0] at m0"
    line.expect(",", hint)
    place = _name(line)
    line.expect(":", hint)
    order = _name(line)
    accumulate = line.take("+=") is not None
    if not accumulate:
        line.expect("=", hint)
    line.expect("{", hint)
    over = tuple(line.listed(_name, "}"))
    body = parse_expr(line)
    line.expect("at", hint)
    return Best(tile, place, order, over, body, parse_expr(line), accumulate)


def _name(line: Line) -> str:
    return line.name("a name", "names are letters, digits and _").text


def _access(line: Line) -> Access:
    t = line.name("a tensor or tile", "write X[p, e]")
    line.expect("[", f"write {t.text}[...]")
    return Access(t.text, tuple(line.listed(parse_expr, "]")))


def _axis(line: Line) -> tuple[str, Expr]:
    var = _name(line)
    line.expect(":", "write grid b: B, p1: ceil(P/32)")
    return var, parse_expr(line)


def _param(line: Line) -> Param:
    hint = "write param X[B, M]: f32 in"
    name = _name(line)
    line.expect("[", hint)
    shape = tuple(line.listed(parse_expr, "]"))
    line.expect(":", hint)
    dtype, role = line.one_of("dtype", DTYPES).text, line.one_of("role", ROLES).text
    over = _name(line) if line.take("over") is not None else ""
    line.end(hint)
    return Param(name, dtype, shape, role, over)


def _dim(line: Line) -> Dim:
    hint = "write dim p0[32] count min(32, P - p1*32) start p1*32"
    name = _name(line)
    line.expect("[", hint)
    capacity = line.integer("a capacity", hint)
    line.expect("]", hint)
    line.expect("count", hint)
    count = parse_expr(line)
    line.expect("start", hint)
    start = parse_expr(line)
    line.end(hint)
    return Dim(name, capacity, count, start)


def _tile(line: Line) -> Tile:
    hint = "write tile S[m0, p0]: f32"
    name = _name(line)
    line.expect("[", hint)
    dims = tuple(line.listed(_name, "]"))
    line.expect(":", hint)
    dtype = line.one_of("dtype", DTYPES).text
    line.end(hint)
    return Tile(name, dims, dtype)
