"""What a kernel reads and writes of its params, as CUDA C++ text: addresses, vectors, stored formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memcomp.codegen.cuda.express import CTYPES, Point
from memcomp.codegen.cuda.rows import WIDEST, Row
from memcomp.ir.expr import Access, Const, variables, walk
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Load, Param, Store, TileKernel, expressions, statements

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer

STORED = {"f64": "double", "f32": "float", "f16": "unsigned short", "bf16": "unsigned short", "i64": "long long",
          "i32": "int", "i16": "short", "i8": "signed char", "u8": "unsigned char", "bool": "unsigned char"}
SMALL = 8   # registers of a tile whose numbers are asked for one by one


class Memory:
    """Loads and stores of one kernel."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        self.written, self.shared = _touched(w.params, [w.k])

    # -- addresses ---------------------------------------------------------------------------------------------------

    def address(self, a: Access, at: Point) -> str:
        strides = {x.at: x.name for x in self.w.args if x.kind == "stride" and x.of == a.tensor}
        names, parts = self.w.scope.names, [self.w.scope.names[f"{a.tensor}_ptr"]]
        for n, index in enumerate(a.index):
            if index == Const(0):
                continue
            text = f"(long long)({self.w.scope.text(index, at)})"
            parts.append(f"{text} * {names[strides[n]]}" if n in strides else text)
        return " + ".join(parts)

    # -- loads -------------------------------------------------------------------------------------------------------

    def element(self, a: Access, at: Point) -> str:
        """One element that an expression reads, as a number; 0 where its point does not count."""
        dtype = self.w.params[a.tensor].dtype
        text = self.number(f"*({self.address(a, at)})", dtype)
        tests = self.w.live(tuple(d for d in at if d in variables(a)), at)
        zero = {"f32": "0.0f", "f64": "0.0", "bool": "false"}.get(self.w.scope.type(a), "0")
        return f"({' && '.join(tests)} ? {text} : {zero})" if tests else text

    def number(self, text: str, dtype: str) -> str:
        if dtype in ("bf16", "f16"):
            return f"from_{dtype}({text})"
        return f"({text} != 0)" if dtype == "bool" else text

    def row(self, a: Access, dims: tuple[str, ...]) -> Row | None:
        """How a thread reads or writes a tile's numbers by vectors; None where it does not."""
        x = self.w.layout.along(a, self.w.k)
        return Row.of(x, self.w.block.dims[x.dim]) if x is not None and x.dim in dims else None

    def read(self, s: Load) -> Row | None:
        """How a load reads; not by vectors where a tile that others write too has fewer elements than points."""
        row = self.row(s.source, self.w.k.tile(s.tile).dims)
        part = row is not None and (row.share > 1 or row.points < self.w.block.dims[row.dim].registers)
        return None if part and s.tile not in self.w.rows else row

    def size(self, s: Load, row: Row | None) -> int:
        """Bytes of the neighbours that are read at once, or of an element."""
        return BYTES[self.w.params[s.source.tensor].dtype] * (row.elements if row else 1)

    def together(self, s: Load) -> int:
        """How many neighbouring lanes one asks for: as many as share 16 bytes."""
        w, row = self.w, self.read(s)
        x = w.layout.along(s.source, w.k)
        if row is None or x is None or (size := self.size(s, row)) not in (4, 8) or row.dim not in w.full:
            return 1
        n, bits = WIDEST // size, w.block.dims[row.dim].bits
        known = w.reach[row.dim] // min(x.share, w.reach[row.dim]) >= n * row.elements   # that rows begin there
        near = bits[:n.bit_length() - 1] == tuple(range(n.bit_length() - 1))
        return n if known and near and not x.even % (n * row.elements) and not x.period % (n * row.vector) else 1

    def ask(self, s: Load, room: str) -> None:
        """Bring what a load reads to the thread's places in `room`, without waiting for it.

        Where a thread needs less than 16 bytes of a row, lanes ask for their neighbours too, each for rows of its own
        where there are as many.
        """
        w, t = self.w, self.w.k.tile(s.tile)
        row, n = self.read(s), self.together(s)
        size = self.size(s, row)
        if row is None or n == 1:
            with w.points(t.dims, row) as at:
                live = self.live(s, row, at, size / row.vector if row else size)
                word = f"ask<{size}, {w.threads}>" if size >= 4 else "ask_around"
                w.line(f"{word}({room} + {self.spot(s, row, at)}, {self.address(s.source, at)}{live});")
            return
        lane, first = f"({w.thread} & {n - 1})", f"({w.thread} & ~{n - 1})"
        own = next((d for d in t.dims if d != row.dim and w.block.dims[d].registers % n == 0), "")
        with w.points(t.dims, row, runs={own: ("", n)}) as at:
            at |= {own: lane if at[own] == "0" else f"({at[own]} + {lane})"} if own else {}
            live = self.live(s, row, at, 1)
            alone = "" if own else f"if ({lane} == 0) "   # what does not count would be filled with zeros
            w.line(f"{alone}ask<{WIDEST}, {w.threads}>({room} + {self.spot(s, row, at, first)}, "
                   f"{self.address(s.source, at)} - {lane} * {row.elements}{live});")

    def live(self, s: Load, row: Row | None, at: Point, unit: float) -> str:
        """Arguments that say whether neighbours count, and of more than 16 bytes how many units are left."""
        w = self.w
        tests = w.live(tuple(d for d in w.k.tile(s.tile).dims if d in variables(s.source)), at)
        live = f", {' && '.join(tests)}" if tests else ""
        if row is None or row.dim in w.full or self.size(s, row) <= WIDEST:
            return live
        return f"{live}, {_times(w.left(row.dim, at), unit)}"

    def spot(self, s: Load, row: Row | None, at: Point, thread: str = "") -> str:
        """Where a thread's neighbours lie in a room, by bytes.  thread: whose, if not those of the thread at hand."""
        w, text = self.w, "0"
        dims = w.k.tile(s.tile).dims
        for d in (*(d for d in dims if row is None or d != row.dim), *((row.dim,) if row else ())):
            n, i = w.block.dims[d].registers, at[d]
            if row is not None and d == row.dim:
                n, i = row.groups, f"{at[d]} / {row.vector}"
            if n > 1:
                text = i if text == "0" else f"({text}) * {n} + {i}"
        size = max(self.size(s, row), 4)
        unit = min(size, WIDEST)
        return f"(({text}) * {size // unit * w.threads} + {thread or w.thread}) * {unit}"

    def room(self, s: Load) -> int:
        """Bytes that a block needs for what a load reads; 0 where it cannot be asked for ahead, or is not."""
        w, t = self.w, self.w.k.tile(s.tile)
        row = self.read(s)
        if row is None:
            n = w.block.registers(t.dims)
            return n * max(self.size(s, row), 4) * w.threads if n <= SMALL else 0
        others = w.block.registers(tuple(d for d in t.dims if d != row.dim))
        return others * row.groups * max(self.size(s, row), 4) * w.threads

    def load(self, s: Load, room: str = "") -> None:
        """room: where the numbers have come to; "" where they must be read from the param."""
        w, t = self.w, self.w.k.tile(s.tile)
        dtype, row, kind = w.params[s.source.tensor].dtype, self.read(s), w.scope.tiles[s.tile]
        if row is None and not room:
            with w.points(t.dims) as at:
                got = self.element(s.source, at)
                if w.scope.type(s.source) != kind:
                    got = f"({got}) != 0" if kind == "bool" else f"({CTYPES[kind]})({got})"
                w.line(f"{w.place(s.tile, at)} = {got};")
            return
        n = row.elements if row else 1
        size = n * BYTES[dtype]
        with w.points(t.dims, row, names=True) as at:
            start = w.flat(s.tile, at)
            if room and size < 4:
                word, more, origin = f"take_around<{n}", ">(", f"{room} + {self.spot(s, row, at)}, " \
                    f"{self.address(s.source, at)}"
            elif room:
                word, more, origin = "take<", f", {w.threads}>(", f"{room} + {self.spot(s, row, at)}"
            else:
                live = self.live(s, row, at, w.held_as(s.tile) / (row.share if row else 1))
                word, more, origin = "fetch<", ">(", f"{self.address(s.source, at)}{live}"
            if s.tile in w.packed:
                words = 4 // BYTES[dtype]
                w.line(f"{word}{n // words}{more}{w.scope.names[s.tile]} + {_over(start, words)}, {origin});")
                return
            if word.endswith("<"):
                word += str(n)
            if row and STORED[dtype] == CTYPES[kind] and w.fastest(s.tile) == row.dim:
                w.line(f"{word}{more}{w.scope.names[s.tile]} + {start}, {origin});")
                return
            raw = w.scope.names["raw"]
            w.line(f"{STORED[dtype]} {raw}[{n}];")
            w.line(f"{word}{more}{raw}, {origin});")
            if row is None:
                w.line(f"{w.place(s.tile, at)} = {w.converted(self.number(f'{raw}[0]', dtype), s.source, s.tile)};")
                return
            step = "i" if row.share == 1 else f"i * {row.share}"
            inner = {**at, row.dim: f"({at[row.dim]} + {step})" if at[row.dim] != "0" else step}
            w.unrolled("i", n, f"{w.place(s.tile, inner)} = "
                               f"{w.converted(self.number(f'{raw}[i]', dtype), s.source, s.tile)};")

    # -- stores ------------------------------------------------------------------------------------------------------

    def store(self, s: Store) -> None:
        w, t = self.w, self.w.k.tile(s.tile)
        dtype = w.params[s.target.tensor].dtype
        if s.target.tensor in self.shared:
            w.line(f"meet<{w.block.warps}>();")
        row = self.row(s.target, t.dims)
        once = row is not None and row.share == 1 and row.points == w.block.dims[row.dim].registers
        if row is not None and (not once or s.mask is not None and row.dim in variables(s.mask)):
            row = None
        dim = row.dim if row else None
        others = 0 if w.lone else (w.threads - 1) & ~w.block.mask(t.dims)
        with w.points(t.dims, row, names=row is not None) as at:
            tests = [f"({w.thread} & {others}) == 0"] * bool(others)
            tests += w.live(tuple(d for d in t.dims if d != dim), at)
            if s.mask is not None:
                tests.append(w.scope.cast(s.mask, "bool", at))
            address = self.address(s.target, at)
            if dim is None:
                test = f"if ({' && '.join(tests)}) " if tests else ""
                w.line(f"{test}*({address}) = {self.stored(w.scope.held(s.tile, at), s.tile, dtype)};")
            else:
                self.vector(s, at, dim, tests, address)
        if s.target.tensor in self.shared:
            w.line(f"meet<{w.block.warps}>();")

    def vector(self, s: Store, at: Point, dim: str, tests: list[str], address: str) -> None:
        """Neighbours at once; one by one where not all of them count."""
        w, n, dtype = self.w, self.w.block.dims[dim].vector, self.w.params[s.target.tensor].dtype
        raw = w.scope.names["raw"]
        w.line(f"{STORED[dtype]} {raw}[{n}];")
        inner = {**at, dim: f"({at[dim]} + i)" if at[dim] != "0" else "i"}
        w.unrolled("i", n, f"{raw}[i] = {self.stored(w.scope.held(s.tile, inner), s.tile, dtype)};")
        if dim in w.full:
            test = f"if ({' && '.join(tests)}) " if tests else ""
            w.line(f"{test}put<{n}>({address}, {raw});")
            return
        test = f"if ({' && '.join(tests)}) " if tests else ""
        w.line(f"{test}put<{n}>({address}, {raw}, {w.left(dim, at)});")

    def stored(self, text: str, tile: str, dtype: str) -> str:
        kind = self.w.scope.tiles[tile]
        if dtype in ("bf16", "f16"):
            return f"to_{dtype}({text})"
        if dtype == "bool":
            return text if kind == "bool" else f"({text}) != 0"
        return text if CTYPES[kind] == STORED[dtype] else f"({STORED[dtype]})({text})"


def declared(params: Mapping[str, Param], kernels: Sequence[TileKernel]) -> dict[str, str]:
    """The types of pointers in a launch of these kernels.  What is read and written in it is neither constant nor
    alone."""
    written, shared = _touched(params, kernels)
    return {n: f"{'' if n in written | shared else 'const '}{STORED[p.dtype]} *{'' if n in shared else '__restrict__ '}"
            for n, p in params.items()}


def _touched(params: Mapping[str, Param], kernels: Sequence[TileKernel]) -> tuple[set[str], set[str]]:
    """Params that some of the kernels write, and those in memory that some write and some read."""
    every = [s for k in kernels for s in statements(k.body)]
    written = {s.target.tensor for s in every if isinstance(s, Store)}
    read = {a.tensor for s in every for e in expressions(s) for a in walk(e) if isinstance(a, Access)} & set(params)
    alike = {p.name: p.over for p in params.values() if p.over}
    touched = written | {alike[n] for n in written if n in alike}
    shared = {n for n in touched if n in read or any(alike.get(m) == n for m in written)} | {
        n for n in written if alike.get(n) in read}
    return written, shared


def _times(text: str, n: float) -> str:
    """n: a whole number, or a part of 1 by which the division is rounded up."""
    if n == 1:
        return text
    return f"({text}) * {n:.0f}" if n > 1 else f"({text} + {1 / n - 1:.0f}) / {1 / n:.0f}"


def _over(text: str, n: int) -> str:
    return text if n == 1 or text == "0" else f"({text}) / {n}"


