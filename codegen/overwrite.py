"""Which input's memory a kernel's output may take: of an element, every read comes before the write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memcomp.ir.expr import Access, Const, Expr, Var, reads
from memcomp.ir.simplify import linear
from memcomp.ir.tile import (
    Best,
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Param,
    Statement,
    Store,
    TileKernel,
    TileProgram,
    When,
    expressions,
)


@dataclass(frozen=True, slots=True)
class _Place:
    """path: positions in the blocks around the statement, outermost first; loops: (length of the path to it, variable)
    of each Loop around it."""

    launch: int
    path: tuple[int, ...]
    loops: tuple[tuple[tuple[int, ...], str], ...]
    statement: Statement


def overwritable(tp: TileProgram) -> tuple[str, ...]:
    """Inputs whose memory the only output may take."""
    outs = [p for p in tp.params if p.role in ("out", "state")]
    if len(outs) != 1 or outs[0].role == "state":
        return ()
    return tuple(p.name for p in tp.params if p.role == "in" and _may(tp, p, outs[0]))


def overwrite(tp: TileProgram, name: str) -> TileProgram:
    """The output over the memory of an input, one of `overwritable`; a call then takes that tensor for both."""
    return replace(tp, params=tuple(replace(p, over=name) if p.role == "out" else p for p in tp.params))


def _may(tp: TileProgram, x: Param, out: Param) -> bool:
    """One statement writes; whatever reads the input does so in an earlier launch, or earlier in the same task.

    Loops around both must be at the same turn, and other tasks must stay away: an element shows its task and turn.
    """
    places = [p for n, k in enumerate(tp.kernels) for p in _places(n, k.body)]
    writers = [p for p in places if isinstance(p.statement, Store) and p.statement.target.tensor == out.name]
    if (x.dtype, x.shape) != (out.dtype, out.shape) or len(writers) != 1 or \
            any(out.name in _read(p.statement) for p in places):
        return False
    (writer,) = writers
    store, kernel = writer.statement, tp.kernels[writer.launch]
    assert isinstance(store, Store)
    readers = [p for p in places if p.launch >= writer.launch and x.name in _read(p.statement)]
    for p in readers:
        s = p.statement
        if p.launch > writer.launch or p.path >= writer.path or not isinstance(s, Load) or \
                any(x.name in reads(i) for i in s.source.index):
            return False
        if any(isinstance(d, Dot) and s.tile in (d.a.tensor, d.b.tensor) for d in _all(kernel)):
            return False  # it may read the input itself, later
        same = {v for v, n in kernel.grid if n != Const(1)} | {v for v in p.loops if v in writer.loops}
        same = {v if isinstance(v, str) else v[1] for v in same}
        if not same <= _shown(kernel, s.source, store.target):
            return False
    return store.mask is None


def _all(k: TileKernel) -> list[Statement]:
    return [p.statement for p in _places(0, k.body)]


def _places(launch: int, body: tuple[Statement, ...], path: tuple[int, ...] = (),
            loops: tuple[tuple[tuple[int, ...], str], ...] = ()) -> Iterator[_Place]:
    for n, s in enumerate(body):
        here = (*path, n)
        yield _Place(launch, here, loops, s)
        if isinstance(s, Loop):
            yield from _places(launch, s.body, here, (*loops, (here, s.var)))
        elif isinstance(s, When):
            yield from _places(launch, s.body, (*here, 0), loops)
            yield from _places(launch, s.orelse, (*here, 1), loops)


def _read(s: Statement) -> frozenset[str]:
    """Tensors and tiles that a statement reads, its own nested statements left out."""
    found: tuple[Expr, ...]
    match s:
        case Load():
            found = (s.source,)
        case Map() | Fold():
            found = (s.body,)
        case Best() | Dot():
            found = expressions(s)
        case Store():
            found = (*s.target.index, *(() if s.mask is None else (s.mask,)))
        case Loop():
            found = (s.lo, s.hi)
        case When():
            found = (s.cond,)
    return frozenset[str]().union(*map(reads, found))


def _shown(k: TileKernel, a: Access, b: Access) -> set[str]:
    """Variables whose value an element that both accesses reach shows: it is the same in both.

    Those are the leading digits of an index, c * v where all smaller terms together stay below c, as far as both have
    the same ones.
    """
    extents: dict[str, Expr] = dict(k.grid) | {d.name: Const(d.capacity) for d in k.dims}
    found: set[str] = set()
    for one, two in zip(a.index, b.index, strict=True):
        x, y = (_digits(i, extents) for i in (one, two))
        if x is None or y is None or x[0] != y[0]:
            continue
        for p, q in zip(x[1], y[1], strict=False):
            if p != q or not p[2]:
                break
            found.add(p[0])
    return found


def _digits(index: Expr, extents: dict[str, Expr]) -> tuple[int, list[tuple[str, int, bool]]] | None:
    """The constant of an index, and its terms from the largest factor on: variable, factor, and whether the smaller
    terms are within 0 .. factor - 1.  None where it is no such sum."""
    terms = linear(index)
    if terms is None or not all(t is None or isinstance(t, Var) and f > 0 for t, f in terms.items()):
        return None
    out: list[tuple[str, int, bool]] = []
    room: int | None = 1  # above all that the smaller terms reach; None where that is not known
    for t, f in sorted(((t, f) for t, f in terms.items() if isinstance(t, Var)), key=lambda x: x[1]):
        out.append((t.name, f, room is not None and f >= room))
        n = extents.get(t.name)
        room = room + f * (int(n.value) - 1) if isinstance(n, Const) and room is not None else None
    return terms.get(None, 0), out[::-1]
