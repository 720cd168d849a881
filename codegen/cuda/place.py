"""Lines of a kernel's text, and where in them the numbers of a tile are.

Loops over a thread's registers, the register of a point, the conditions that it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from memcomp.codegen.cuda.express import CTYPES, Point, Scope
from memcomp.codegen.cuda.rows import Held, Row
from memcomp.codegen.cuda.spread import Block
from memcomp.codegen.names import Names
from memcomp.ir.expr import Access, Const
from memcomp.ir.target import BYTES
from memcomp.ir.tile import TileKernel


class Places:
    """The text of one kernel as far as it is written.

    full: dims all of whose points count; tiles: how each tile lies in registers; packed: formats of those that stay as
    they are stored.
    """

    def __init__(self, k: TileKernel, names: Names, block: Block, tiles: Mapping[str, Held]) -> None:
        self.k, self.names, self.block, self.tiles = k, names, block, tiles
        self.packed = {t: dtype for t, h in tiles.items() if (dtype := h.packed(block))}
        self.rows = {t: row for t, h in tiles.items() if (row := h.row(block)) is not None}
        self.full = {d.name for d in k.dims if d.count == Const(d.capacity) and block.dims[d.name].exact}
        self.scope = Scope(names, block.dims, {t.name: t.dtype for t in k.tiles}, {})
        self.scope.held = self.held
        self.lines: list[str] = []
        self.depth = 1

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    @contextmanager
    def aside(self) -> Iterator[list[str]]:
        """Lines for later."""
        before, self.lines = self.lines, []
        yield self.lines
        self.lines = before

    def unrolled(self, var: str, n: int, statement: str) -> None:
        self.line("#pragma unroll")
        self.line(f"for (int {var} = 0; {var} < {n}; ++{var}) {statement}")

    @contextmanager
    def points(self, dims: tuple[str, ...], row: Row | None = None, names: bool = False,
               runs: Mapping[str, tuple[str, int]] | None = None) -> Iterator[dict[str, str]]:
        """Loops over the registers of these dims; along a row over its groups of neighbours.  names: what stands in
        them declares some; runs: of a dim the first of so many registers to go through, or ("", n): every n-th."""
        at: dict[str, str] = {}
        before = self.depth
        for d in dims:
            start, step, end = "0", 1, self.block.dims[d].registers
            if row is not None and d == row.dim:
                step, end = row.vector, row.points
            if runs and d in runs:
                first, n = runs[d]
                start, step, end = (first, 1, n) if first else ("0", n, end)
            if end == step:
                at[d] = start
                continue
            at[d] = self.names[f"{d}_r"] if start == "0" else self.names[f"{d}_i"]
            most = str(end) if start == "0" else f"{start} + {end}"
            self.line("#pragma unroll")
            add = f"++{at[d]}" if step == 1 else f"{at[d]} += {step}"
            self.line(f"for (int {at[d]} = {start}; {at[d]} < {most}; {add}) {{")
            self.depth += 1
        if names and self.depth == before:
            self.line("{")
            self.depth += 1
        yield at
        while self.depth > before:
            self.depth -= 1
            self.line("}")

    # -- points ------------------------------------------------------------------------------------------------------

    def live(self, dims: tuple[str, ...], at: Point) -> list[str]:
        """Conditions that the point counts along these dims."""
        return [f"{self.scope.local(d, at)} < {self.most(d)}" for d in dims if d not in self.full]

    def left(self, dim: str, at: Point) -> str:
        """How many points are left along a dim."""
        return f"{self.most(dim)} - {self.scope.local(dim, at)}"

    def most(self, dim: str) -> str:
        count = self.k.dim(dim).count
        return str(count.value) if isinstance(count, Const) else self.names[f"{dim}_n"]

    # -- numbers -----------------------------------------------------------------------------------------------------

    def numbers(self, tile: str) -> int:
        """That a thread holds of a tile."""
        return self.tiles[tile].registers(self.block, self.k.tile(tile).dims)

    def flat(self, tile: str, at: Point) -> str:
        """The register of a tile's number, of a packed tile the number's place among the thread's."""
        last, row = self.fastest(tile), self.rows.get(tile)
        dims = sorted(self.k.tile(tile).dims, key=lambda d: d == last)
        text = "0"
        for d in dims:
            n, i = self.block.dims[d].registers, at[d]
            if row is not None and d == row.dim:
                i, n = _among(i, n, row), row.groups * row.elements
            if text != "0" and n > 1:
                text = f"({text}) * {n}" if " " in text else f"{text} * {n}"
            if i != "0":
                text = i if text == "0" else f"{text} + {i}"
        return text

    def fastest(self, tile: str) -> str:
        """The dim whose neighbours are neighbours in registers: the one that a load reads along, else the last."""
        dims = self.k.tile(tile).dims
        return self.tiles[tile].fastest(self.block) or (dims[-1] if dims else "")

    def place(self, tile: str, at: Point) -> str:
        return f"{self.names[tile]}[{self.flat(tile, at)}]"

    def held(self, tile: str, at: Point) -> str:
        """A tile's number at a point."""
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


def _among(register: str, registers: int, row: Row) -> str:
    """The number that serves a register of a row's dim."""
    text = register
    if text == "0":
        return text
    if row.points < registers:
        text = f"({text}) % {row.points}"
    return f"({text}) / {row.share}" if row.share > 1 else text
