"""Lines of kernel text, safe names, and what every part of the emitter must know about the kernel it writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from memcomp.codegen.names import Names
from memcomp.codegen.tvm.isa import Isa
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, walk
from memcomp.ir.tile import (
    Dim,
    Load,
    Param,
    Statement,
    Store,
    Tile,
    TileKernel,
    TileProgram,
    expressions,
    joins,
    made,
)

if TYPE_CHECKING:
    from memcomp.codegen.tvm.codes import Codes
    from memcomp.codegen.tvm.pairs import Product

ELEMENT = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
           "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool"}
BITS = {"bf16": "uint16", "bool": "uint8"}  # what is read and written in memory where it is not ELEMENT
TILE_ELEMENT = {"f64": "float64", "f32": "float32", "i64": "int64", "bool": "int32"}


@dataclass(frozen=True, slots=True)
class Point:
    """Where in its loops an expression is evaluated.

    lane: the dim laid across `width` lanes, whose first lane is element `base` (text of an int64); scalars: text of
    every other variable; held: values of tiles at this point, by tile name, as register names; phase: which of the
    numbers (or pairs) of a word of codes.
    """

    scalars: dict[str, str]
    lane: str = ""
    width: int = 1
    base: str = ""
    held: dict[str, str] = field(default_factory=dict)
    phase: int = 0

    def at(self, **scalars: str) -> Point:
        return replace(self, scalars=self.scalars | scalars)


class Writer:
    """Text of one kernel."""

    def __init__(self, program: TileProgram, kernel: TileKernel, isa: Isa, names: Names) -> None:
        self.program, self.kernel, self.isa, self.names = program, kernel, isa, names
        self.tiles: dict[str, Tile] = {t.name: t for t in kernel.tiles}
        self.dims: dict[str, Dim] = {d.name: d for d in kernel.dims}
        self.params: dict[str, Param] = {p.name: p for p in program.params}
        self.lines: list[str] = []
        self.depth = 1
        self.counts: dict[str, str] = {}
        self.in_place: dict[str, Load] = {}   # tiles that are never filled: their reader goes to the param itself
        self.loops: list[str] = []            # variables of the enclosing Loops, outermost first
        self.units: dict[str, int] = {}       # per param the position whose stride is 1, or -1
        self.products: dict[int, Product] = {}  # contractions on bf16 pairs, by id of the statement
        self.coded: dict[str, Codes] = {}     # tiles of codes that are never filled
        self.hidden: set[int] = set()         # statements (by id) that would fill them
        self.rough: dict[int, frozenset[Expr]] = {}  # calls that may be rough, by id of the statement
        self.narrow: set[str] = set()         # tiles of i64 that are held in 32 bits
        self.packed: dict[str, str] = {}      # tiles that are filled as pairs only -> their buffer
        self.buffers: dict[str, tuple[tuple[int, ...], str]] = {}  # besides the tiles: name -> shape, element
        self.diagonals: dict[Expr, tuple[str, str, str, str]] = {}  # by a - b: buffer, a, b, kind

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def let(self, name: str, value: str) -> None:
        """Bind a name to a value, once (a plain assignment would make a variable in memory)."""
        self.line(f"{name}: T.let = {value}")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head)
        self.depth += 1
        start = len(self.lines)
        yield
        if len(self.lines) == start:
            self.line("pass")
        self.depth -= 1

    def keep(self, value: str, stem: str = "x") -> str:
        """A register holding `value`, computed here."""
        name = self.names.fresh(stem)
        self.let(name, f"reg({value})")
        return name

    @contextmanager
    def repeat(self, stem: str, times: str) -> Iterator[str]:
        """A loop from 0; yields its variable, or "i64(0)" without a loop where it runs once."""
        if times == "i64(1)":
            yield times.replace("1", "0")
            return
        v = self.names.fresh(stem)
        with self.block(f"for {v} in T.serial({times}):"):
            yield v

    # -- dims --------------------------------------------------------------------------------------------------------

    def count(self, dim: str) -> str:
        """Text of the number of points of a dim, here."""
        c = self.dims[dim].count
        return f"i64({c.value})" if isinstance(c, Const) else self.counts[dim]

    def fixed(self, dim: str) -> int | None:
        c = self.dims[dim].count
        return int(c.value) if isinstance(c, Const) else None

    def vector(self, dim: str) -> int:
        """Lanes that one machine vector of this dim uses: fewer than the machine has only for a short dim."""
        return min(self.isa.lanes, power_of_two(self.dims[dim].capacity))

    def padded(self, dim: str) -> int:
        v = self.vector(dim)
        return -(-self.dims[dim].capacity // v) * v

    def wide(self, dim: str) -> int:
        """Lanes of an element-wise step: two machine vectors where that divides the tile, to overlap latencies."""
        v = self.vector(dim)
        return 2 * v if v == self.isa.lanes and self.padded(dim) % (2 * v) == 0 else v

    def shape(self, tile: Tile) -> tuple[int, ...]:
        if not tile.dims:
            return (1,)
        return (*(self.dims[d].capacity for d in tile.dims[:-1]), self.padded(tile.dims[-1]))

    def element(self, tile: Tile) -> str:
        """What the elements of a tile's buffer are."""
        return "int32" if tile.name in self.narrow else TILE_ELEMENT[tile.dtype]

    def full(self, dim: str, step: int) -> bool:
        """Is the count a known multiple of `step`?"""
        n = self.fixed(dim)
        return n is not None and n % step == 0

    def tile_at(self, tile: str, dims: dict[str, str], last: str | None = None) -> str:
        """Text of an element (or of a vector, when the last index is given) of a tile."""
        t = self.tiles[tile]
        index = [dims[d] for d in t.dims[:-1]] + [last if last is not None else dims[t.dims[-1]]] if t.dims else ["0"]
        return f"{self.names[tile]}[{', '.join(index)}]"


def plus(a: str, k: int) -> str:
    """Text of a + k."""
    return a if k == 0 else f"i64({k})" if a == "i64(0)" else f"({a} + {k})"


def times(a: str, k: int) -> str:
    """Text of a * k."""
    return a if k == 1 or a == "i64(0)" else f"{a} * {k}"


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def read_tiles(s: Statement, tiles: dict[str, Tile]) -> set[str]:
    """Tiles that a statement reads, its own nested statements left out."""
    found = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access) and n.tensor in tiles}
    return found | ({s.tile} if isinstance(s, Store) else {*made(s)} if joins(s) else set())


def element(dtype: str, where: str) -> str:
    if dtype not in ELEMENT:
        raise Refusal(f"{where} is stored as {dtype}", hint=f"the tvm backend reads {', '.join(ELEMENT)}")
    return ELEMENT[dtype]
