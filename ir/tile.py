"""Tile programs: what a kernel does, one tile at a time.  Emitters read this and nothing above it.

A kernel is a grid of independent tasks (`grid`), each running `body` in order on its own tiles.  Tiles are mutable
buffers private to a task.  A tile's dims are *dim names* (`p0`, `m0`, `e`): lower-case variables, each with a static
capacity and a run-time count `<= capacity`; every statement works on the first `count` points of each of its dims, so
tails need no guards.  The LAST dim of a tile is the one emitters lay across vector lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, Union

from memcomp.ir.expr import Access, Expr


@dataclass(frozen=True, slots=True)
class Dim:
    """A tile dimension: variable name, static capacity, run-time number of valid points (an expression over
    `Size`s, grid and loop variables; at most `capacity`), and `start`: the global index of its first point
    (0 where the dim is a whole rank), so that point i of `p0` is element `start + i` of the rank it was cut from."""

    name: str
    capacity: int
    count: Expr
    start: Expr


@dataclass(frozen=True, slots=True)
class Tile:
    """A private buffer.  dims: names of `Dim`s (() = one scalar).  dtype: f32, i64, bool, or f64: where a param
    is, and for sums that a loop carries."""

    name: str
    dims: tuple[str, ...]
    dtype: str = "f32"


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor argument: shape as extents over `Size`s, any strides (in elements), element-aligned only.

    role: in | out | state | work (workspace, allocated by the launcher, f32 unless said).
    over: the input whose memory an output takes: a call passes one tensor for both; "" for memory of its own.
    """

    name: str
    dtype: str
    shape: tuple[Expr, ...]
    role: str
    over: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """tile[dims] = tensor[index]; index uses dim variables, grid and loop variables, and may gather from other
    params.  Converted to the tile's dtype on the way.  Points outside the counts are not read."""

    tile: str
    source: Access


@dataclass(frozen=True, slots=True)
class Map:
    """tile[dims] = body, element-wise over the tile's dims.  `body` accesses tiles as `Access(tile, (Var(dim), ...))`
    with dims that are a subset of this tile's (broadcast), dim/grid/loop variables (`Var`), `Size`s.
    A dim variable has its LOCAL value (0 .. count-1); lower writes `start + i` where the global index is meant."""

    tile: str
    body: Expr


@dataclass(frozen=True, slots=True)
class Fold:
    """tile[dims] = monoid over dims `over` of body (monoid: sum prod max min and or).
    With `accumulate`, the result is joined to what the tile holds."""

    tile: str
    monoid: str
    over: tuple[str, ...]
    body: Expr
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class Best:
    """tile[dims], place[dims]: of the points over `over` the greatest values of `body`, and `at` there, as many as dim
    `order` has points.  In falling order: of equal values the lower place first, a NaN before all others; where there
    are fewer points -inf (of integers, `ir.places.LEAST`) with the place `NOWHERE`.  With `accumulate`, joined to what
    both tiles hold, which is such a list."""

    tile: str
    place: str
    order: str
    over: tuple[str, ...]
    body: Expr
    at: Expr
    accumulate: bool = False


NOWHERE = (1 << 31) - 1
"""The place of what no point filled: later than all others (an emitter may hold places in 32 bits)."""


@dataclass(frozen=True, slots=True)
class Dot:
    """tile[dims] (+)= sum over `over` of a * b, where a and b are tiles (or params read in place) whose dims
    together cover the tile's dims and `over`.  Dims present in a, b and the tile are batch dims.  held: as of a
    `cascade.Reduce`."""

    tile: str
    a: Access
    b: Access
    over: tuple[str, ...]
    accumulate: bool = False
    held: str = ""


@dataclass(frozen=True, slots=True)
class Store:
    """tensor[index] = tile (converted to the tensor's dtype, round to nearest even), at the points where `mask` holds:
    an expression over the tile's dims, over tiles and scalars; None = everywhere.  No index leaves the tensor there."""

    target: Access
    tile: str
    mask: Expr | None = None


@dataclass(frozen=True, slots=True)
class Loop:
    """for var in lo .. hi-1: body, in order; lo and hi may access scalar (0-dim) tiles."""

    var: str
    lo: Expr
    hi: Expr
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class When:
    """if cond: body (else: orelse); cond is scalar: grid/loop variables, Sizes, scalar tiles.

    spare: the branch only spares work: its last side (orelse, or body where that is all) does right whatever cond says.
    """

    cond: Expr
    body: tuple[Statement, ...]
    orelse: tuple[Statement, ...] = ()
    spare: bool = False

    @property
    def last(self) -> tuple[Statement, ...]:
        return self.orelse or self.body


Statement: TypeAlias = Union[Load, Map, Fold, Best, Dot, Store, Loop, When]


@dataclass(frozen=True, slots=True)
class TileKernel:
    """One launch: `grid` = (variable, extent) outermost first, all independent; `body` runs per grid point."""

    name: str
    grid: tuple[tuple[str, Expr], ...]
    dims: tuple[Dim, ...]
    tiles: tuple[Tile, ...]
    body: tuple[Statement, ...]

    def dim(self, name: str) -> Dim:
        return next(d for d in self.dims if d.name == name)

    def tile(self, name: str) -> Tile:
        return next(t for t in self.tiles if t.name == name)


@dataclass(frozen=True, slots=True)
class TileProgram:
    """Launches in order over shared params.

    params: tensor arguments in call order (inputs and states first, then outs, then work).
    sizes:  names of the symbolic ranks whose extents the caller passes as integers, in call order after the tensors.
    """

    name: str
    params: tuple[Param, ...]
    sizes: tuple[str, ...]
    kernels: tuple[TileKernel, ...]
    target: str = ""

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    def __str__(self) -> str:
        from memcomp.ir.tile_text import show_tile

        return show_tile(self)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Emitted text.  `entry` is called as entry(*tensors, *sizes) in the order of `program.params` and
    `program.sizes`; work params included.  Text until built.  isa: the instruction set the text is written for, where
    the backend knows several.  scratch: bytes that one thread holds in buffers of its own while it runs.  runs: how
    many of the program's kernels each launch does, one after another; one each where it is empty."""

    name: str
    backend: str
    source: str
    entry: str
    program: TileProgram = field(repr=False)
    isa: str = ""
    scratch: int = 0
    runs: tuple[int, ...] = ()

    @property
    def launches(self) -> int:
        """Launches of a call."""
        return len(self.runs or self.program.kernels)


def statements(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """All statements, in text order, inner ones after their Loop or When."""
    for s in body:
        yield s
        if isinstance(s, (Loop, When)):
            yield from statements(s.body)
        if isinstance(s, When):
            yield from statements(s.orelse)


def made(s: Statement) -> tuple[str, ...]:
    """Tiles that a statement writes, its own nested statements left out."""
    if isinstance(s, (Store, Loop, When)):
        return ()
    return (s.tile, s.place) if isinstance(s, Best) else (s.tile,)


def joins(s: Statement) -> bool:
    """Does a statement add to what its tiles hold?"""
    return isinstance(s, (Fold, Best, Dot)) and s.accumulate


def expressions(s: Statement) -> tuple[Expr, ...]:
    """What a statement reads, its own nested statements left out."""
    if isinstance(s, Load):
        return (s.source,)
    if isinstance(s, (Map, Fold)):
        return (s.body,)
    if isinstance(s, Best):
        return (s.body, s.at)
    if isinstance(s, Dot):
        return (s.a, s.b)
    if isinstance(s, Store):
        return (*s.target.index, *(() if s.mask is None else (s.mask,)))
    if isinstance(s, Loop):
        return (s.lo, s.hi)
    return (s.cond,)
