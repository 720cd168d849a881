"""How rows of tensors lie in memory and in registers: which dim's neighbours are neighbours there, how many of them one
stored element serves, and after how many it comes again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from memcomp.codegen.cuda.spread import Block, Spread
from memcomp.codegen.launches import Layout
from memcomp.codegen.triton.arguments import arguments
from memcomp.ir.expr import Access, Call, Const, Expr, Var, variables, walk
from memcomp.ir.simplify import linear
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Load, Loop, Store, TileKernel, TileProgram, made, statements

PACKED = ("bf16", "f16", "i8", "u8")   # formats that several of lie in one register
WIDEST = 16                            # bytes that a thread reads at once, and points of 1 byte that it holds together


@dataclass(frozen=True, slots=True)
class Along:
    """The dim whose neighbours are neighbours in memory.

    even: how many elements begin at even places, any where 0; share: so many neighbours read one element (`e // 2`);
    period: after so many points elements come again (`e % 64`), 0 where they do not.
    """

    dim: str
    even: int = 0
    share: int = 1
    period: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """An `Along` as one thread sees it: it reads `elements` neighbours at once, each of which serves `share` of its
    points, in `groups` that differ; `vector` points each."""

    dim: str
    vector: int
    elements: int
    share: int
    groups: int

    @property
    def points(self) -> int:
        """Registers of the dim until elements come again."""
        return self.groups * self.vector

    @staticmethod
    def of(a: Along, s: Spread) -> Row | None:
        """None where a thread's neighbours are none in memory."""
        v = s.vector
        if v == 1 or s.capacity % v or (v % a.share and a.share % v) or a.period % v:
            return None
        share = min(v, a.share)
        if a.even % (v // share):
            return None
        groups = s.registers // v
        if a.period and (s.step % a.period == 0 or a.period % s.step == 0):
            groups = min(groups, max(a.period // s.step, 1))
        return Row(a.dim, v, v // share, share, groups)


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

    def along(self, a: Access, k: TileKernel) -> Along | None:
        """None where neighbours along no dim are neighbours in memory."""
        unit = self.units[a.tensor]
        if a.tensor not in self.even or unit < 0:
            return None
        found = _along(a.index[unit], {d.name for d in k.dims}, {n.tensor for n in walk(a) if isinstance(n, Access)})
        elsewhere = (i for n, i in enumerate(a.index) if n != unit)
        if found is None or any(found.dim in variables(i) for i in elsewhere):
            return None
        return found


def _along(e: Expr, names: set[str], data: set[str]) -> Along | None:
    """What one index walks along, in steps of one element."""
    if isinstance(e, Var):
        return Along(e.name) if e.name in names else None
    if isinstance(e, Call) and e.op in ("floordiv", "mod") and isinstance(n := e.args[1], Const):
        by, inner = int(n.value), _along(e.args[0], names, data)
        if inner is None or inner.period or by < 1:
            return None
        if e.op == "mod":
            return replace(inner, even=math.gcd(inner.even, by), period=by * inner.share)
        return None if inner.even % by else replace(inner, even=inner.even // by, share=inner.share * by)
    terms = linear(e, integers=data)
    if terms is None or terms == {e: 1}:
        return None
    # the terms that hold a dim which nothing else does, and of these the one that goes by single elements
    found = [(x, t) for t, c in terms.items() if t is not None and c == 1 and (x := _along(t, names, data))]
    if len(found) != 1:
        return None
    x, own = found[0]
    rest = {t: c for t, c in terms.items() if t != own}
    if any(t is not None and x.dim in variables(t) for t in rest):
        return None
    return replace(x, even=math.gcd(x.even, *rest.values()))


def vectors(tp: TileProgram, k: TileKernel, rows: Rows) -> dict[str, int]:
    """How many neighbours along each dim a thread holds together: 16 bytes of the narrowest tensor.

    Where several neighbours read one element these are more.  What steps read besides tensors of more than four times
    its elements and bytes (scales, masks) has no say: a thread need not read 16 bytes of it.
    """
    found: dict[str, int] = {}
    read = []
    for a, dims, streamed in moved(k):
        x, size = rows.along(a, k), BYTES[tp.param(a.tensor).dtype]
        elements = math.prod(k.dim(d).capacity for d in dims) // (x.share if x is not None else 1)
        read.append((x if x is not None and x.dim in dims else None, size, elements, streamed))
    steps = [(n, n * size) for _, size, n, streamed in read if streamed]
    most, bytes_ = max((n for n, _ in steps), default=0), max((n for _, n in steps), default=0)
    for x, size, n, streamed in read:
        if x is None or streamed and 4 * n < most and 4 * n * size < bytes_:
            continue
        v = WIDEST // size * x.share
        while v > 1 and (k.dim(x.dim).capacity % v or x.even % max(v // x.share, 1) or x.period % v):
            v //= 2
        found[x.dim] = max(found.get(x.dim, 1), v)
    return found


def moved(k: TileKernel) -> Iterator[tuple[Access, tuple[str, ...], bool]]:
    """What tiles are loaded from and stored to, with the tile's dims, and whether steps of a loop do."""
    steps = {id(x) for s in statements(k.body) if isinstance(s, Loop) for x in statements(s.body)}
    for s in statements(k.body):
        if isinstance(s, (Load, Store)):
            yield s.source if isinstance(s, Load) else s.target, k.tile(s.tile).dims, id(s) in steps


@dataclass(frozen=True, slots=True)
class Held:
    """How a tile lies in registers.

    size: bytes of a number; along: what the load that fills it walks along; alone: does nothing else write it;
    dtype: its format in memory where numbers may stay as they are stored, else "".
    """

    size: int
    along: Along | None = None
    alone: bool = False
    dtype: str = ""

    @staticmethod
    def tiles(tp: TileProgram, k: TileKernel, rows: Rows) -> dict[str, Held]:
        """Of each tile of a kernel."""
        loads: dict[str, Load] = {}
        written: dict[str, int] = {}
        for x in statements(k.body):
            for name in made(x):
                written[name] = written.get(name, 0) + 1
            if isinstance(x, Load):
                loads.setdefault(x.tile, x)
        found = {}
        for t in k.tiles:
            size, s = max(4, BYTES[t.dtype]), loads.get(t.name)
            along = rows.along(s.source, k) if s else None
            if s is None or along is None or along.dim not in t.dims:
                found[t.name] = Held(size)
                continue
            stored, alone = tp.param(s.source.tensor).dtype, written[t.name] == 1
            stays = alone and stored in PACKED and t.dtype in ("f32", "i64")
            found[t.name] = Held(size, along, alone, stored if stays else "")
        return found

    def fastest(self, b: Block) -> str:
        """The dim whose neighbours are read at once, "" where there is none."""
        return self.along.dim if self.along is not None and Row.of(self.along, b.dims[self.along.dim]) else ""

    def row(self, b: Block) -> Row | None:
        """Which points have a number of their own; None where all have."""
        return Row.of(self.along, b.dims[self.along.dim]) if self.along is not None and self.alone else None

    def packed(self, b: Block) -> str:
        """The format that numbers stay in until they are read; "" where they are converted when they come."""
        row = self.row(b)
        return self.dtype if row is not None and self.dtype and row.elements * BYTES[self.dtype] >= 4 else ""

    def registers(self, b: Block, dims: tuple[str, ...]) -> int:
        """Numbers that a thread holds."""
        row = self.row(b)
        return math.prod(row.groups * row.elements if row is not None and d == row.dim else b.dims[d].registers
                         for d in dims)

    def words(self, b: Block, dims: tuple[str, ...]) -> float:
        """Registers of 32 bits."""
        packed = self.packed(b)
        return self.registers(b, dims) * (BYTES[packed] if packed else self.size) / 4
