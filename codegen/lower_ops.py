"""A mapping group as a list of tile operations: the statements of one kernel, over tile dims, before loads and masks.

Grid and loop variables are scalars, every other variable is a tile dim.  An iterative tensor becomes one carry tile:
its element at the loop variable reads `X@old`, the element after it is the tile `X` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from memcomp.codegen.lower_pieces import Sizes, normal, ragged_guards, stream
from memcomp.codegen.lower_places import filled
from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, rebuild, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import LEAST, Placed, explicit, order_of, placed, row_major
from memcomp.ir.program import Group
from memcomp.ir.simplify import simplify
from memcomp.ir.tile import Dim

PRE, LOOP, POST = 0, 1, 2
OLD = "@old"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation on a tile: `target[dims] (=|join=) monoid over (body where guards)`; no monoid = a map.

    body: group tensors as `Access(name, (Var(dim), ...))`, params with their full index.  empty: what points that the
    guards exclude hold: the identity of a reduction, the old value of a state, what an earlier statement wrote there.
    when: the steps of the loop in which a map runs; None = all.  held: as of a `cascade.Reduce`.

    The best values of a row and their places are one operation that writes two tiles: its body is `at(value, place)`,
    `place` the second tile, `order` the dim that counts them.  One more follows, which stands for the writer of the
    second tile and does nothing (`twin`: the first tile).
    """

    target: str
    dims: tuple[str, ...]
    body: Expr
    guards: tuple[Expr, ...] = ()
    monoid: str = ""
    over: tuple[str, ...] = ()
    accumulate: bool = False
    phase: int = PRE
    empty: Expr = Const(0.0)
    when: Expr | None = None
    held: str = ""
    place: str = ""
    order: str = ""
    twin: str = ""

    @property
    def points(self) -> tuple[str, ...]:
        """Dims over which the body is computed."""
        return tuple(d for d in (*self.dims, *self.over) if d != self.order)

    def accesses(self) -> list[Access]:
        return [a for e in (self.body, *self.guards) for a in _accesses(e)]

    def reads(self) -> frozenset[str]:
        return reads(self.body).union(*map(reads, self.guards))


@lru_cache(maxsize=4096)
def _accesses(e: Expr) -> tuple[Access, ...]:
    return tuple(n for n in walk(e) if isinstance(n, Access))


@dataclass(slots=True)
class GroupOps:
    """The operations of one kernel in order, and what surrounds them."""

    group: Group
    grid: tuple[tuple[str, Expr], ...]
    loop: str  # loop variable, "" = none
    steps: Expr  # extent of the loop
    dims: dict[str, Dim]
    ops: list[Op]
    carried: dict[str, int] = field(default_factory=dict)  # iterative tensor -> position of its iterative index
    stores: dict[str, Access] = field(default_factory=dict)  # group tensor -> element written, over dims and grid
    each_step: set[str] = field(default_factory=set)  # carried tensors stored after every step, not once
    unwritten: dict[str, Expr] = field(default_factory=dict)  # what an element of a stored tensor holds without a store


def lane_last(group: Group, names: Iterable[str]) -> tuple[str, ...]:
    """Dims of a tile: as given, the group's lane last."""
    out = list(dict.fromkeys(names))
    lane = (group.lane or "").lower()
    return tuple([d for d in out if d != lane] + [d for d in out if d == lane])


def group_ops(c: Cascade, group: Group, members: list[Einsum], outside: Callable[[str], list[Access]]) -> GroupOps:
    """Statements of one kernel as tile operations.

    outside: accesses to a tensor in statements of other groups (they decide what is stored).
    Raises Refusal with the reason where the tile form cannot say it.
    """
    einsums = [explicit(ragged_guards(c, normal(e))) for e in members]
    for e in einsums:
        if len(e.outs) > 1 and order_of(e) is None:
            raise Refusal(
                f"{e.reduce.monoid if e.reduce else 'tuple'} has no tile form",
                e.out.tensor,
                "tile programs reduce with sum, prod, max, min, and, or",
            )
    cut = {r: s.value for r, s in group.partition if isinstance(s, Const) and isinstance(s.value, int)}
    ranks, streamed = list(c.ranks), dict[Einsum, Const]()
    for r in group.loop_order:
        if r.endswith("1") and (base := r[:-1]) in cut and r not in {x.name for x in c.ranks}:
            done: list[Einsum] = []  # the last of each four holds the identity where its guard is false
            for e in einsums:
                if e.reduce is not None and base.lower() in e.reduce.over:
                    least = Const(LEAST if _whole(c, e) else MONOIDS[e.reduce.monoid].identity)
                    four, r1, r0 = stream(e, base.lower(), cut[base], _empty(c, e), least)
                    done += four
                    for x, o in zip(four[-len(e.outs):], e.outs, strict=True):
                        streamed[x] = least if o is e.out else Const(0)
                    ranks += [x for x in (r1, r0) if x.name not in {y.name for y in ranks}]
                else:
                    done.append(e)
            einsums = done
            del cut[base]
    return _Grouping(Cascade(tuple(ranks), c.tensors, tuple(einsums)), c, group, cut, outside, streamed).run()


class _Grouping:
    """Scratch of `group_ops`."""

    def __init__(
        self,
        inner: Cascade,
        whole: Cascade,
        group: Group,
        cut: dict[str, int],
        outside: Callable[[str], list[Access]],
        streamed: dict[Einsum, Const],
    ) -> None:
        self.streamed = streamed
        self.c, self.whole, self.group, self.cut, self.outside = inner, whole, group, cut, outside
        self.sizes = Sizes(inner)
        if len(group.loop_order) > 1:
            raise Refusal(
                f"group {group.name} has {len(group.loop_order)} sequential ranks",
                " ".join(group.loop_order),
                "a kernel runs one loop",
            )
        self.loop = group.loop_order[0].lower() if group.loop_order else ""
        self.grid: dict[str, Expr] = {}
        self.dims: dict[str, Dim] = {}
        self.points: dict[Expr, Expr] = {}
        self.writers: dict[str, Access] = {}
        self.carried: dict[str, int] = {}

    def run(self) -> GroupOps:
        self._space()
        for e in self.c.einsums:
            for k, i in enumerate(e.out.index):
                if self.loop and i == call("add", Var(self.loop), 1):
                    self.carried |= dict.fromkeys(e.names, k)
            for o in e.outs:
                self.writers.setdefault(o.tensor, o)
        for name, k in self.carried.items():  # the initialisation may come first
            self.writers[name] = next(
                o
                for e in self.c.einsums
                for o in e.outs
                if o.tensor == name and o.index[k] == call("add", Var(self.loop), 1)
            )
        ops = [o for e in self.c.einsums for o in (self._best(e) if len(e.outs) > 1 else [self._op(e)])]
        started = {o.target for o in ops if o.target in self.carried and o.phase == PRE}
        ops[:0] = [Op(n, self.tile_dims(n), self.empty(n)) for n in self.carried if n not in started]
        steps = self.sizes.extent(self.loop.upper()) if self.loop else Const(0)
        out = GroupOps(
            self.group, tuple(self.grid.items()), self.loop, steps, self.dims, _phases(ops), dict(self.carried)
        )
        self._stores(out)
        return out

    def empty(self, name: str) -> Expr:
        """What a point of the tensor holds that no statement writes."""
        t = self.c.declared(name)
        return Const(t.empty if t is not None else 0.0)

    def excluded(self, e: Einsum) -> Expr:
        """What a point of the result holds that the statement's guards exclude."""
        name, before = e.out.tensor, self.c.einsums[: self.c.einsums.index(e)]
        if any(w.out.tensor == name and w.out.index == e.out.index for w in before):
            return self._tile(e.out)
        if e.reduce or e in self.streamed:
            return self.streamed[e] if e.reduce is None else Const(MONOIDS[e.reduce.monoid].identity)
        if name.endswith("'"):
            return self.point(Access(name[:-1], e.out.index))
        return self.empty(name)

    def _space(self) -> None:
        names = {r.name for r in self.c.ranks}
        for r, size in self.cut.items():
            outer, inner = f"{r}1", f"{r}0"
            if outer in names or inner in names:
                raise Refusal(
                    f"cutting rank {r} needs the names {outer} and {inner}, which the cascade has taken",
                    self.group.name,
                )
            start: Expr = call("mul", Var(outer.lower()), size)
            extent = self.sizes.index(self.sizes.extent(r))
            count = simplify(call("min", size, extent - start), index=True)
            if isinstance(extent, Const) and isinstance(extent.value, int):
                if size >= extent.value:  # one tile: the rank as it is
                    start, size, count = Const(0), max(extent.value, 1), extent
                elif extent.value % size == 0:
                    count = Const(size)
            self.points[Var(r.lower())] = simplify(call("add", start, Var(inner.lower())), index=True)
            self.dims[inner.lower()] = Dim(inner.lower(), size, count, simplify(start))
        for r in self.group.space:
            base = r[:-1]
            if r.endswith("1") and base in self.cut:
                self.grid[r.lower()] = simplify(call("ceildiv", self.sizes.extent(base), self.cut[base]), index=True)
            else:
                self.grid[r.lower()] = self.sizes.index(self.sizes.extent(r))

    def dim(self, var: str) -> str | None:
        """The tile dim of a rank variable, None where it is a grid or loop variable."""
        if var in self.grid or var == self.loop:
            return None
        if Var(var) in self.points:
            return f"{var}0"
        if var not in self.dims:
            rank = self.c.rank(var.upper())
            extent = self.sizes.index(self.sizes.extent(rank.name))
            if isinstance(extent, Const) and isinstance(extent.value, int):
                self.dims[var] = Dim(var, max(extent.value, 1), extent, Const(0))
            elif rank.bound is not None:
                self.dims[var] = Dim(var, rank.bound, extent, Const(0))
            else:
                raise Refusal(
                    f"rank {rank.name} has no bound and the mapping does not cut it",
                    f"group {self.group.name}",
                    "cut it, or put it into space or loop-order",
                )
        return var

    def index_dims(self, index: tuple[Expr, ...]) -> tuple[str, ...]:
        names = [self.dim(n.name) for i in index for n in walk(i) if isinstance(n, Var)]
        return lane_last(self.group, (n for n in names if n is not None))

    def tile_dims(self, name: str) -> tuple[str, ...]:
        return self.index_dims(self.writers[name].index)

    def point(self, e: Expr) -> Expr:
        """Over dims: cut variables become `outer * size + inner`, sizes their extents; group tensors become tiles."""
        if isinstance(e, Access):
            if e.tensor in self.writers:
                return self._tile(e)
            return Access(e.tensor, tuple(simplify(self.point(i), index=True) for i in e.index))
        if isinstance(e, Var):
            self.dim(e.name)
            return self.points.get(e, e)
        if isinstance(e, Size):
            return self.sizes.extent(e.rank)
        return rebuild(e, tuple(self.point(k) for k in e.args)) if isinstance(e, Call) else e

    def _tile(self, a: Access) -> Access:
        """A read of a tensor that this group writes, as a tile."""
        out, k = self.writers[a.tensor], self.carried.get(a.tensor)
        name = a.tensor
        for i, (got, want) in enumerate(zip(a.index, out.index, strict=True)):
            if i == k:
                if got == Var(self.loop):
                    name = a.tensor + OLD
                elif got not in (want, Size(self.loop.upper())):
                    raise Refusal(
                        f"{a.tensor} is read at another step than the one before",
                        self.group.name,
                        "a carry tile holds one step",
                    )
            elif got != want:
                raise Refusal(
                    f"{a.tensor} is read at another point than the task writes",
                    self.group.name,
                    "such a tensor needs a kernel of its own",
                )
        return Access(name, tuple(Var(d) for d in self.tile_dims(a.tensor)))

    def _op(self, e: Einsum) -> Op:
        name = e.out.tensor
        over = tuple(d for v in (e.reduce.over if e.reduce else ()) if (d := self.dim(v)) is not None)
        if e.reduce and len(over) != len(e.reduce.over):
            lost = set(e.reduce.over) & (set(self.grid) | {self.loop})
            raise Refusal(
                f"{name} reduces over {', '.join(sorted(lost))}, which the mapping runs in parallel or in order",
                self.group.name,
            )
        for v in e.space():
            self.dim(v)
        phase = LOOP if self.loop and any(self.loop in variables(i) for i in e.out.index) else PRE
        guards = tuple(simplify(self.point(g), index=False) if not _data(g) else self.point(g) for g in e.guards())
        return Op(
            name,
            self.tile_dims(name),
            self.point(e.body),
            tuple(dict.fromkeys(guards)),
            e.reduce.monoid if e.reduce else "",
            over,
            False,
            phase,
            self.excluded(e),
            held=e.reduce.held if e.reduce else "",
        )

    def _best(self, e: Einsum) -> list[Op]:
        """The best values of a row and their places."""
        one = self._op(e)
        given, order = placed(one.body), order_of(e)
        assert order is not None and e.reduce is not None
        value, place = e.names
        own = tuple(Access(n, tuple(Var(d) for d in one.dims)) for n in e.names)
        before, old = [], given.old
        if old is not None and old != tuple(Access(a.tensor + OLD, a.index) for a in own):
            before = [Op(n, one.dims, x, phase=one.phase) for n, x in zip(e.names, old, strict=True)]
        least = Const(LEAST) if _whole(self.whole, e) else one.empty
        one = replace(one, body=Placed(given.value, given.place).body(), accumulate=old is not None, empty=least,
                      place=place, order=order)
        out = [*before, one, Op(place, one.dims, own[0], (), "topk", (), False, one.phase, twin=value)]
        if old is not None:
            return out
        total = self.sizes.index(row_major(e.reduce.over)[1])
        full = simplify(call("le", self.sizes.extent(order.upper()), total), index=True)
        if full != Const(True):
            empty, nowhere = _empty(self.whole, e)
            ends = filled(e, (own[0], own[1]), (empty, nowhere), total)
            out += [Op(n, one.dims, self.point(x), phase=one.phase) for n, x in zip(e.names, ends, strict=True)]
        return out

    def _stores(self, out: GroupOps) -> None:
        """Which tiles leave the kernel, and where to."""
        for name in dict.fromkeys(o.target for o in out.ops):
            declared = self.whole.declared(name.removesuffix("'"))
            role = declared.role if declared is not None else "temp"
            readers = self.outside(name)
            if role in ("temp", "in") and not readers:
                continue
            index = [self.sizes.index(self.point(i)) for i in self.writers[name].index]
            k = self.carried.get(name)
            if k is not None:
                if role == "temp" and all(a.index[k] == Size(self.loop.upper()) for a in readers):
                    del index[k]
                else:
                    out.each_step.add(name)
            out.stores[name] = Access(name, tuple(index))
            if not name.endswith("'"):  # a state keeps what it held
                out.unwritten[name] = self.empty(name)


def _whole(c: Cascade, e: Einsum) -> bool:
    """Are the values of a result integers?"""
    t = c.declared(e.out.tensor)
    return t is not None and t.dtype[0] in "iu"


def _empty(c: Cascade, e: Einsum) -> tuple[Expr, ...]:
    """What points of the results hold that nothing writes."""
    found = (c.declared(n) for n in e.names)
    return tuple(Const((int if t.dtype[0] in "iu" else float)(t.empty) if t else 0.0) for t in found)


def _data(e: Expr) -> bool:
    return any(isinstance(n, Access) for n in walk(e))


def _phases(ops: list[Op]) -> list[Op]:
    """Operations in phase order: what needs the loop's result runs after it, and so does what only that needs."""
    looped = {o.target for o in ops if o.phase == LOOP}
    late: set[str] = set()
    out: list[Op] = []
    for o in ops:
        if o.phase == PRE and o.target not in looped and o.reads() & (looped | late):
            late.add(o.target)
            o = replace(o, phase=POST)
        out.append(o)
    for k in reversed(range(len(out))):
        o = out[k]
        users = [u.phase for u in out if u is not o and o.target in {n.removesuffix(OLD) for n in u.reads()}]
        if o.phase == PRE and o.target not in looped and looped and users and min(users) == POST:
            out[k] = replace(o, phase=POST)
    return sorted(out, key=lambda o: o.phase)
