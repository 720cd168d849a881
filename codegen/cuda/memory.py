"""What a kernel reads and writes of its params, as CUDA C++ text: addresses, vectors, stored formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memcomp.codegen.cuda.express import CTYPES, Point
from memcomp.codegen.launches import Layout
from memcomp.codegen.triton.arguments import arguments
from memcomp.ir.expr import Access, Const, Var, variables, walk
from memcomp.ir.simplify import linear
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Load, Store, TileKernel, TileProgram, expressions, statements

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer

STORED = {"f64": "double", "f32": "float", "f16": "unsigned short", "bf16": "unsigned short", "i64": "long long",
          "i32": "int", "i16": "short", "i8": "signed char", "u8": "unsigned char", "bool": "unsigned char"}
PACKED = ("bf16", "f16", "i8", "u8")   # formats that several of lie in one register
WIDEST = 16                            # bytes that a thread reads at once, and points of 1 byte that it holds together


@dataclass(frozen=True, slots=True)
class Rows:
    """Where params may be read by vectors.  units: by param the position of stride 1, -1 for none; even: params whose
    rows begin at multiples of 16 bytes.  The last vector of a row may reach beyond it, never beyond these 16 bytes."""

    units: Mapping[str, int]
    even: frozenset[str]

    @staticmethod
    def of(tp: TileProgram, layout: Layout) -> Rows:
        loose = {a.of for k in tp.kernels for a in arguments(tp, k, layout.units).args if a.name in layout.loose}
        return Rows({p.name: u for p, u in zip(tp.params, layout.units, strict=True)},
                    frozenset(p.name for p in tp.params) - loose)

    def along(self, a: Access, k: TileKernel) -> tuple[str, int] | None:
        """The dim whose neighbours are neighbours in memory, and how many of them begin at even places: any where 0.
        None where there is none."""
        unit = self.units[a.tensor]
        if a.tensor not in self.even or unit < 0:
            return None
        data = {n.tensor for n in walk(a) if isinstance(n, Access)}
        terms = linear(a.index[unit], integers=data)
        names = {d.name for d in k.dims}
        found = [t.name for t, c in (terms or {}).items() if isinstance(t, Var) and t.name in names and c == 1]
        if terms is None or len(found) != 1:
            return None
        dim, rest = found[0], {t: c for t, c in terms.items() if t != Var(found[0])}
        elsewhere = [*(i for n, i in enumerate(a.index) if n != unit), *(t for t in rest if t is not None)]
        if any(dim in variables(i) for i in elsewhere):
            return None
        even = 0
        for c in rest.values():
            even = _divisor(even, abs(c))
        return dim, even


def _divisor(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def vectors(tp: TileProgram, k: TileKernel, rows: Rows) -> dict[str, int]:
    """How many neighbours along each dim a thread holds together: 16 bytes of the narrowest tensor."""
    found: dict[str, int] = {}
    for a, dims in moved(k):
        if (x := rows.along(a, k)) is None or x[0] not in dims:
            continue
        dim, even = x
        n = WIDEST // BYTES[tp.param(a.tensor).dtype]
        while n > 1 and (k.dim(dim).capacity % n or even % n):
            n //= 2
        found[dim] = max(found.get(dim, 1), n)
    return found


def moved(k: TileKernel) -> Iterator[tuple[Access, tuple[str, ...]]]:
    """What tiles are loaded from and stored to, with the tile's dims."""
    for s in statements(k.body):
        if isinstance(s, (Load, Store)):
            yield s.source if isinstance(s, Load) else s.target, k.tile(s.tile).dims


class Memory:
    """Loads and stores of one kernel."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        written = {s.target.tensor for s in statements(w.k.body) if isinstance(s, Store)}
        read = {a.tensor for s in statements(w.k.body) for e in expressions(s) for a in walk(e)
                if isinstance(a, Access)} & set(w.params)
        alike = {p.name: p.over for p in w.params.values() if p.over}
        touched = written | {alike[n] for n in written if n in alike}
        self.shared = {n for n in touched if n in read or any(alike.get(m) == n for m in written)} | {
            n for n in written if alike.get(n) in read}
        self.written = written

    # -- arguments ---------------------------------------------------------------------------------------------------

    def argument(self, param: str) -> str:
        """The declaration of a pointer.  What is read and written in one kernel is neither constant nor alone."""
        const = "" if param in self.written or param in self.shared else "const "
        alone = "" if param in self.shared else "__restrict__ "
        return f"{const}{STORED[self.w.params[param].dtype]} *{alone}"

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

    def wide(self, a: Access, dims: tuple[str, ...]) -> str | None:
        """The dim along which a tile's numbers are read or written by vectors."""
        if (x := self.w.rows.along(a, self.w.k)) is None or x[0] not in dims:
            return None
        dim, even = x
        s = self.w.block.dims[dim]
        return dim if s.vector > 1 and even % s.vector == 0 and s.capacity % s.vector == 0 else None

    def ask(self, s: Load, room: str) -> None:
        """Bring what a load reads to the thread's places in `room`, without waiting for it."""
        w, t = self.w, self.w.k.tile(s.tile)
        dim = self.wide(s.source, t.dims)
        assert dim is not None
        size = w.block.dims[dim].vector * BYTES[w.params[s.source.tensor].dtype]
        with w.points(t.dims, dim) as at:
            live = self.live(s, dim, at, BYTES[w.params[s.source.tensor].dtype])
            w.line(f"ask<{size}, {w.threads}>({room} + {self.spot(s, dim, at)}, {self.address(s.source, at)}{live});")

    def live(self, s: Load, dim: str, at: Point, unit: float) -> str:
        """Arguments that say whether neighbours count, and of more than 16 bytes how many are left, in units."""
        w = self.w
        tests = w.live(tuple(d for d in w.k.tile(s.tile).dims if d in variables(s.source)), at)
        live = f", {' && '.join(tests)}" if tests else ""
        if dim in w.full or w.block.dims[dim].vector * BYTES[w.params[s.source.tensor].dtype] <= WIDEST:
            return live
        return f"{live}, {_times(w.left(dim, at), unit)}"

    def spot(self, s: Load, dim: str, at: Point) -> str:
        """Where a thread's neighbours lie in a room, by bytes."""
        w, text = self.w, "0"
        for d in (*(d for d in w.k.tile(s.tile).dims if d != dim), dim):
            x = w.block.dims[d]
            n, i = (x.registers // x.vector, f"{at[d]} / {x.vector}") if d == dim else (x.registers, at[d])
            if n > 1:
                text = i if text == "0" else f"({text}) * {n} + {i}"
        size = w.block.dims[dim].vector * BYTES[w.params[s.source.tensor].dtype]
        unit = min(size, WIDEST)
        return f"(({text}) * {size // unit * w.threads} + {w.thread}) * {unit}"

    def room(self, s: Load) -> int:
        """Bytes that a block needs for what a load reads; 0 where it cannot be asked for ahead."""
        w, t = self.w, self.w.k.tile(s.tile)
        dim = self.wide(s.source, t.dims)
        size = BYTES[w.params[s.source.tensor].dtype]
        if dim is None or w.block.dims[dim].vector * size < 4:
            return 0
        return w.block.registers(t.dims) * size * w.threads

    def load(self, s: Load, room: str = "") -> None:
        """room: where the numbers have come to; "" where they must be read from the param."""
        w, t = self.w, self.w.k.tile(s.tile)
        dtype, dim = w.params[s.source.tensor].dtype, self.wide(s.source, t.dims)
        if dim is None:
            with w.points(t.dims) as at:
                got = self.element(s.source, at)
                kind = w.scope.tiles[s.tile]
                if w.scope.type(s.source) != kind:
                    got = f"({got}) != 0" if kind == "bool" else f"({CTYPES[kind]})({got})"
                w.line(f"{w.place(s.tile, at)} = {got};")
            return
        vector = w.block.dims[dim].vector
        with w.points(t.dims, dim, names=dim is not None) as at:
            live, start = self.live(s, dim, at, w.held_as(s.tile)), w.flat(s.tile, at)
            more = f", {w.threads}>(" if room else ">("
            word, origin = ("take<", f"{room} + {self.spot(s, dim, at)}") if room else (
                "fetch<", f"{self.address(s.source, at)}{live}")
            if s.tile in w.packed:
                words = 4 // BYTES[dtype]
                w.line(f"{word}{vector // words}{more}{w.scope.names[s.tile]} + {_over(start, words)}, {origin});")
                return
            if STORED[dtype] == CTYPES[w.scope.tiles[s.tile]] and w.fastest(s.tile) == dim:
                w.line(f"{word}{vector}{more}{w.scope.names[s.tile]} + {start}, {origin});")
                return
            raw = w.scope.names["raw"]
            w.line(f"{STORED[dtype]} {raw}[{vector}];")
            w.line(f"{word}{vector}{more}{raw}, {origin});")
            inner = {**at, dim: f"({at[dim]} + i)" if at[dim] != "0" else "i"}
            w.unrolled("i", vector, f"{w.place(s.tile, inner)} = "
                                    f"{w.converted(self.number(f'{raw}[i]', dtype), s.source, s.tile)};")

    # -- stores ------------------------------------------------------------------------------------------------------

    def store(self, s: Store) -> None:
        w, t = self.w, self.w.k.tile(s.tile)
        dtype = w.params[s.target.tensor].dtype
        if s.target.tensor in self.shared:
            w.line("__syncthreads();")
        dim = self.wide(s.target, t.dims)
        if dim is not None and s.mask is not None and dim in variables(s.mask):
            dim = None
        others = 0 if w.lone else (w.threads - 1) & ~w.block.mask(t.dims)
        with w.points(t.dims, dim, names=dim is not None) as at:
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
            w.line("__syncthreads();")

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


def _times(text: str, n: float) -> str:
    """n: a whole number, or a part of 1 by which the division is rounded up."""
    if n == 1:
        return text
    return f"({text}) * {n:.0f}" if n > 1 else f"({text} + {1 / n - 1:.0f}) / {1 / n:.0f}"


def _over(text: str, n: int) -> str:
    return text if n == 1 or text == "0" else f"({text}) / {n}"


