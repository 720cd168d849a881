"""Fibers of a cascade: what the passes are counted over (`ir.traversal`), and which statements walk along them.

A fiber is one dimension of a tensor, or several that a rank was cut into.  A rank cut in parts (`K[m1*M0 + m0]`) is a
fiber too, M, beside its parts M1 and M0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, reads, walk
from memcomp.ir.poly import cofactor
from memcomp.ir.simplify import polynomial, simplify

_STEERING = ("i64", "i32", "i16", "bool")  # bytes hold quantised data


@dataclass(frozen=True, slots=True)
class Index:
    """walked: its variables, outermost (largest stride) first; data: it gathers; fixed: a constant; forward: a prefix
    of elements is enough for a prefix of values; plain: the variable alone; steps: it is `v+1` of an iterative rank."""

    walked: tuple[str, ...]
    data: bool
    fixed: bool
    forward: bool
    plain: bool
    steps: bool = False

    @property
    def barrier(self) -> bool:
        """Does such a read need all that comes before: the last element, a gather, a walk backwards?"""
        return not self.fixed and not self.forward


Dims: TypeAlias = tuple[tuple[int, ...], ...]  # for each position, dimensions
Position: TypeAlias = tuple[tuple[str, ...], ...]  # for each position, variables


@dataclass(frozen=True, slots=True)
class Use:
    tensor: str
    index: tuple[Index, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A statement.  place: variable -> dimension of each result that walks along it (a scatter walks along nothing).
    A variable that is reduced up to that of an iterative rank (`sum{l} ... where l < i`) walks behind it."""

    uses: tuple[Use, ...]
    outs: tuple[Use, ...]
    place: tuple[dict[str, int], ...]


@dataclass(frozen=True, slots=True)
class Fiber:
    """Dimensions of a tensor that make up one fiber, outermost first.  A fiber is walked at positions, one for each
    variable; part: the passes over this position are counted, not those over the whole.  of: the rank that `rank` is a
    part of, or itself."""

    tensor: str
    rank: str
    dims: tuple[int, ...]
    part: int | None = None
    of: str = ""


class Walks:
    """A cascade, reduced to what walks along what."""

    def __init__(self, c: Cascade) -> None:
        self.cascade = c
        self.names = tuple(dict.fromkeys([t.name for t in c.tensors] + [n for e in c.einsums for n in e.names]))
        iterative = {r.var for r in c.ranks if r.iterative}
        self.steps = tuple(_step(e, iterative) for e in c.einsums)
        self.readers: dict[str, list[int]] = {}
        self.uses: dict[str, list[Use]] = {}
        last_writer: dict[str, int] = {}
        for k, s in enumerate(self.steps):
            for u in s.uses:
                self.uses.setdefault(u.tensor, []).append(u)
                at = self.readers.setdefault(u.tensor, [])
                if not at or at[-1] != k:
                    at.append(k)
            for o in s.outs:
                last_writer[o.tensor] = k
        # written at v+1 of an iterative rank: (tensor, dimension) -> its variables
        self.stepping = {(o.tensor, d): i.walked for s in self.steps for o in s.outs
                         for d, i in enumerate(o.index) if i.steps}
        # the last statement that writes what a statement reads: later ones are around a loop
        self.loop_end = [max((last_writer.get(u.tensor, -1) for u in s.uses), default=-1) for s in self.steps]
        self.carried = {name for name, _ in self.stepping}
        self._walked: dict[tuple[int, Dims], tuple[Position, bool, bool]] = {}  # fibers ask the same things
        self._placed: dict[tuple[int, Position], tuple[Dims, bool, bool]] = {}

    def walked(self, u: Use, dims: Dims) -> tuple[Position, bool, bool]:
        """An access (of `steps`) to a tensor that walks along `dims`, one for each position: the variables that walk
        there, whether it needs the whole fiber first, and whether all positions are walked."""
        known = self._walked.get((id(u), dims))
        if known is None:
            position = tuple(tuple(v for d in part if not u.index[d].data for v in u.index[d].walked) for part in dims)
            barrier = any(u.index[d].barrier for part in dims for d in part)
            known = self._walked[id(u), dims] = position, barrier, all(position)
        return known

    def placed(self, place: dict[str, int], position: Position) -> tuple[Dims, bool, bool]:
        """Dimensions of a result (one of `steps`, by its `place`) that walk where these variables do, one tuple for
        each position, whether there are any, and whether every variable has one."""
        known = self._placed.get((id(place), position))
        if known is None:
            dims = tuple(tuple(dict.fromkeys(place[v] for v in p if v in place)) if p and p[0] in place else ()
                         for p in position)
            everywhere = all(v in place for p in position for v in p)
            known = self._placed[id(place), position] = dims, any(dims), everywhere
        return known

    @cached_property
    def families(self) -> dict[str, tuple[str, ...]]:
        """Rank -> its parts, outermost first, from `M1 = ceil(M/M0)` and from indices `m1*M0 + m0`."""
        out: dict[str, tuple[str, ...]] = {}
        for r in self.cascade.ranks:
            x = r.extent
            if isinstance(x, Call) and x.op in ("ceildiv", "floordiv"):
                whole, part = x.args
                if isinstance(whole, Size) and isinstance(part, Size):
                    out[whole.rank] = (r.name, part.rank)
        for name, uses in self.uses.items():
            t = self.cascade.declared(name)
            for use in uses if t is not None else ():
                for rank, i in zip(t.ranks, use.index, strict=False):  # type: ignore[union-attr]
                    if len(i.walked) > 1:
                        out.setdefault(rank, tuple(v.upper() for v in i.walked))
        return out

    def fibers(self) -> Iterator[Fiber]:
        """All fibers of tensors that are read, in order of declaration, then of first writing."""
        part_of = {p: whole for whole, parts in self.families.items() for p in parts if len(parts) > 1}
        for name in self.names:
            for f in self._fibers(name):
                yield Fiber(f.tensor, f.rank, f.dims, f.part, part_of.get(f.rank, f.rank))

    def _fibers(self, name: str) -> Iterator[Fiber]:
        c, found = self.cascade, self.uses.get(name)
        try:
            t = c.tensor(name)
        except KeyError:  # its writers name no single rank: `verify` says so
            return
        if not found or (c.declared(name) is not None and t.dtype in _STEERING):
            return
        joint = {whole: tuple(t.ranks.index(p) for p in parts) for whole, parts in self.families.items()
                 if len(parts) > 1 and all(p in t.ranks for p in parts)}
        for whole, dims in joint.items():
            yield Fiber(name, whole, dims)
        for d, rank in enumerate(t.ranks):
            dims = next((dims for dims in joint.values() if d in dims), (d,))
            yield Fiber(name, rank, dims, dims.index(d) if len(dims) > 1 else None)
            ways = {u.index[d].walked for u in found if u.index[d].walked}
            if len(ways) == 1 and len(names := next(iter(ways))) > 1:
                for k, v in enumerate(names):
                    yield Fiber(name, v.upper(), (d,), k)
                for whole, parts in self.families.items():  # a rank that is cut inside this one
                    mine = [p.lower() for p in parts]
                    if 1 < len(mine) < len(names) and set(mine) < set(names):
                        yield Fiber(name, whole, (d,), names.index(mine[0]))

    @cached_property
    def parallel(self) -> frozenset[tuple[str, int]]:
        """Dimensions (tensor, number) from which no statement, however far, waits for a whole fiber: none reduces it,
        gathers from it or walks it backwards.  One pass is enough for those, whatever else there is."""
        sets = _Sets()
        for s in self.steps:
            for o, place in zip(s.outs, s.place, strict=True):
                for u in s.uses:
                    for d, i in enumerate(u.index):
                        if i.barrier or (not i.fixed and any(v not in place for v in i.walked)):
                            sets.mark((u.tensor, d))
                        for v in i.walked:
                            if v in place:
                                sets.join((u.tensor, d), (o.tensor, place[v]))
        return frozenset(x for x in sets.parent if not sets.marked(x))


class _Sets:
    """Disjoint sets of dimensions; a mark on one holds for its whole set."""

    def __init__(self) -> None:
        self.parent: dict[tuple[str, int], tuple[str, int]] = {}
        self.marks: set[tuple[str, int]] = set()

    def find(self, x: tuple[str, int]) -> tuple[str, int]:
        up = self.parent.setdefault(x, x)
        while up != x:
            self.parent[x] = self.parent[up]
            x, up = up, self.parent[up]
        return x

    def join(self, x: tuple[str, int], y: tuple[str, int]) -> None:
        a, b = self.find(x), self.find(y)
        if a != b:
            self.parent[a] = b
            if a in self.marks:
                self.marks.add(b)

    def mark(self, x: tuple[str, int]) -> None:
        self.marks.add(self.find(x))

    def marked(self, x: tuple[str, int]) -> bool:
        return self.find(x) in self.marks


def _step(e: Einsum, iterative: Collection[str]) -> Step:
    where = (e.body, *((e.guard,) if e.guard is not None else ()), *(i for o in e.outs for i in o.index))
    accesses = dict.fromkeys(n for x in where for n in walk(x) if isinstance(n, Access))
    outs = tuple(_use(o, iterative) for o in e.outs)
    place = tuple({v: d for d, i in reversed(list(enumerate(o.index))) if not i.data for v in i.walked} for o in outs)
    over = e.reduce.over if e.reduce is not None else ()
    for g in e.guards() if over and iterative else ():
        if isinstance(g, Call) and g.op in ("lt", "le") and isinstance(g.args[0], Var) and isinstance(g.args[1], Var):
            behind, ahead = g.args[0].name, g.args[1].name
            if behind in over and ahead in iterative:
                for p in place:
                    p.update({behind: p[ahead]} if ahead in p else {})
    return Step(tuple(_use(a, ()) for a in accesses), outs, place)


def _use(a: Access, iterative: Collection[str]) -> Use:
    return Use(a.tensor, tuple(_index(i, iterative) for i in a.index))


def _index(i: Expr, iterative: Collection[str]) -> Index:
    if isinstance(i, Var):
        return Index((i.name,), False, False, True, True)
    i = simplify(i, index=True)
    walked = tuple(dict.fromkeys(n.name for n in walk(i) if isinstance(n, Var)))
    plain, data = isinstance(i, Var), bool(reads(i))
    forward = plain or (bool(walked) and not data and _rising(i, walked))
    steps = isinstance(i, Call) and i.op == "add" and not data and any(v in iterative for v in walked)
    return Index(walked, data, isinstance(i, Const), forward, plain, steps)


def _rising(i: Expr, names: tuple[str, ...]) -> bool:
    """Does the index grow with each of its variables?"""
    p = polynomial(i, index=True)
    parts = [] if p is None else [cofactor(p, Var(v)) for v in names]
    return bool(parts) and all(c is not None and all(k > 0 for k in c[0].values()) for c in parts)
