"""Is a tile program well formed?  Run after `lower`; emitters rely on it and check nothing again.

Names and scopes, dims of every access, tiles written before they are read on every path, reductions of the table,
counts that only sizes, grid and loop variables decide, and memory: every element that is loaded or stored lies inside
its tensor, by the counts of dims, the bounds of loops, the conditions around it and the mask of a store (`ir.inside`).
"""

from __future__ import annotations

from collections.abc import Collection

from memcomp.ir.cascade import DTYPES
from memcomp.ir.errors import VerifyError, nearest
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, children, conjuncts, reads, variables, walk
from memcomp.ir.inside import Facts
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.show import show_expr
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
    joins,
    made,
)

TILE_DTYPES = ("f32", "f64", "i64", "bool")
ROLES = ("in", "state", "out", "work")


def verify_tile(tp: TileProgram) -> None:
    """Raise VerifyError for the first invariant that the tile program breaks: what, and in which kernel."""
    _unique([p.name for p in tp.params] + list(tp.sizes), "param or size", tp.name)
    if [p.role for p in tp.params] != sorted((p.role for p in tp.params), key=_call_order):
        raise VerifyError(f"params of {tp.name} are not in call order", hint="inputs and states, then outs, then work")
    for p in tp.params:
        if p.dtype not in DTYPES or p.role not in ROLES:
            raise VerifyError(f"param {p.name!r} has dtype {p.dtype!r} and role {p.role!r}", tp.name)
        under = [(q.dtype, q.shape) for q in tp.params if (q.name, q.role) == (p.over, "in")]
        if p.over and under != [(p.dtype, p.shape)]:
            raise VerifyError(f"param {p.name!r} lies over {p.over!r}, which is no input like it", tp.name)
        for n in p.shape:
            _scope(n, tp, set(), set(), f"shape of {p.name}")
    for k in tp.kernels:
        _Kernel(tp, k).check()


def _call_order(role: str) -> int:
    return (0, 0, 1, 2)[ROLES.index(role)] if role in ROLES else 3


def _unique(names: Collection[str], what: str, where: str) -> None:
    seen: set[str] = set()
    for n in names:
        if n in seen:
            raise VerifyError(f"{what} {n!r} is declared twice", where)
        seen.add(n)


def _scope(e: Expr, tp: TileProgram, variables: Collection[str], tensors: Collection[str], where: str) -> None:
    """Every variable, size, operator and tensor of the expression is known here."""
    for n in walk(e):
        if isinstance(n, Var) and n.name not in variables:
            raise VerifyError(f"variable {n.name!r} is not in scope", where, nearest(n.name, variables))
        if isinstance(n, Size) and n.rank not in tp.sizes:
            raise VerifyError(f"size {n.rank!r} is not passed to the kernel", where, nearest(n.rank, tp.sizes))
        if isinstance(n, Access) and n.tensor not in tensors:
            raise VerifyError(f"{n.tensor!r} cannot be read here", where, nearest(n.tensor, tensors))
        if not isinstance(n, (Const, Var, Size, Access)) and n.op not in OPS:
            raise VerifyError(f"unknown operator {n.op!r}", where, nearest(n.op, OPS))


class _Kernel:
    """The checks of one kernel."""

    def __init__(self, tp: TileProgram, k: TileKernel) -> None:
        self.tp, self.k = tp, k
        self.params: dict[str, Param] = {p.name: p for p in tp.params}
        self.tiles = {t.name: t for t in k.tiles}
        self.dims = {d.name: d for d in k.dims}
        self.grid = [v for v, _ in k.grid]
        self.counted: set[str] = set()  # dims whose counts were looked at
        self.some: dict[Expr, set[str]] = {}  # condition -> tiles that are written where it holds
        self.facts = Facts(
            {p.name for p in tp.params if p.dtype[0] in "iu"} | {t.name for t in k.tiles if t.dtype == "i64"}
        )
        for v, n in k.grid:
            self.facts = self.facts.within(v, 0, n)

    def check(self) -> None:
        k = self.k
        loops = _loop_variables(k.body)
        _unique([*self.grid, *self.dims, *loops], "variable", k.name)
        _unique([*self.tiles, *self.params], "tile or param", k.name)
        for v, n in k.grid:
            _scope(n, self.tp, (), (), f"{k.name}, grid {v}")
        for d in k.dims:
            if d.capacity < 1:
                raise VerifyError(f"dim {d.name} has capacity {d.capacity}", k.name)
            for e in (d.count, d.start):
                _scope(e, self.tp, [*self.grid, *loops], (), f"{k.name}, dim {d.name}")
        for t in k.tiles:
            if t.dtype not in TILE_DTYPES:
                raise VerifyError(f"tile {t.name} has dtype {t.dtype!r}", k.name, f"known: {', '.join(TILE_DTYPES)}")
            _unique(t.dims, f"tile {t.name}: dim", k.name)
            for name in t.dims:
                if name not in self.dims:
                    raise VerifyError(f"tile {t.name} has the unknown dim {name!r}", k.name, nearest(name, self.dims))
        self.block(k.body, set(), [])

    def block(self, body: tuple[Statement, ...], written: set[str], loops: list[str]) -> set[str]:
        """Check statements in order; the tiles that are written for certain afterwards."""
        outside = self.facts
        for s in body:
            where = f"{self.k.name}, {type(s).__name__.lower()} {getattr(s, 'tile', '')}".rstrip()
            if isinstance(s, Loop):
                for e in (s.lo, s.hi):
                    self.value(e, (), written, loops, f"{where} {s.var}")
                self.facts = outside.within(s.var, 0, s.hi) if least(s.lo) >= 0 else outside
                self.block(s.body, set(written), [*loops, s.var])  # it may not run at all
                self.facts = outside
            elif isinstance(s, When):
                self.value(s.cond, (), written, loops, where)
                self.facts = outside if reads(s.cond) else outside.where(s.cond)  # tiles may be written again inside
                known = set[str]().union(*(self.some.get(c, set()) for c in conjuncts(s.cond)))
                yes = self.block(s.body, written | known, loops)
                whole = body is self.k.body and not reads(s.cond) and variables(s.cond) <= set(self.grid)
                if whole:  # the condition stays what it is
                    self.some.setdefault(s.cond, set()).update(yes)
                self.facts = outside
                written |= yes & self.block(s.orelse, set(written), loops)
            elif isinstance(s, Store):
                self.store(s, written, loops, where)
            else:
                self.compute(s, written, loops, where)
                written |= {*made(s)}
        return written

    def compute(self, s: Load | Map | Fold | Best | Dot, written: set[str], loops: list[str], where: str) -> None:
        if s.tile not in self.tiles:
            raise VerifyError(f"unknown tile {s.tile!r}", where, nearest(s.tile, self.tiles))
        t = self.tiles[s.tile]
        self.visible(t.dims, loops, where)
        if isinstance(s, Load):
            self.element(s.source, t.dims, written, loops, where)
            return
        over = () if isinstance(s, Map) else s.over
        if set(over) & set(t.dims):
            raise VerifyError(f"tile {t.name} is reduced over its own dim {min(set(over) & set(t.dims))!r}", where)
        for d in over:
            if d not in self.dims:
                raise VerifyError(f"unknown dim {d!r}", where, nearest(d, self.dims))
        self.visible(over, loops, where)
        for tile in made(s) if joins(s) else ():
            if tile not in written:
                raise VerifyError(f"tile {tile} is accumulated into before it is written", where)
        if isinstance(s, Dot):
            have = {v.name for a in (s.a, s.b) for i in a.index for v in walk(i) if isinstance(v, Var)}
            if missing := (set(t.dims) | set(over)) - have:
                raise VerifyError(f"dim {min(missing)!r} of a dot is in neither operand", where)
            for a in (s.a, s.b):
                if a.tensor in self.params:
                    self.element(a, (*t.dims, *over), written, loops, where)
                else:
                    self.value(a, (*t.dims, *over), written, loops, where)
            return
        if isinstance(s, Fold) and (s.monoid not in MONOIDS or not MONOIDS[s.monoid].join):
            raise VerifyError(
                f"unknown reduction {s.monoid!r}", where, nearest(s.monoid, [m for m in MONOIDS if MONOIDS[m].join])
            )
        if isinstance(s, Best):
            self.best(s, t.dims, where)
            self.value(s.at, tuple(d for d in (*t.dims, *over) if d != s.order), written, loops, where)
        dims = tuple(d for d in (*t.dims, *over) if not isinstance(s, Best) or d != s.order)
        self.value(s.body, dims, written, loops, where)

    def best(self, s: Best, dims: tuple[str, ...], where: str) -> None:
        """Two tiles over the same dims, one of which counts the results; a fixed number of them."""
        if s.place not in self.tiles:
            raise VerifyError(f"unknown tile {s.place!r}", where, nearest(s.place, self.tiles))
        if s.place == s.tile or self.tiles[s.place].dims != dims or self.tiles[s.place].dtype != "i64":
            raise VerifyError(f"places of {s.tile} lie in an i64 tile of its dims, and {s.place} is none", where)
        if s.order not in dims or not s.over:
            raise VerifyError(f"tile {s.tile} has no dim {s.order!r} for its results", where, nearest(s.order, dims))
        if self.dims[s.order].count != Const(self.dims[s.order].capacity):
            raise VerifyError(f"the number of results, {show_expr(self.dims[s.order].count)}, is no constant", where)

    def visible(self, dims: tuple[str, ...], loops: list[str], where: str) -> None:
        """A dim whose count a loop variable decides exists only inside that loop; no count is below 0."""
        for d in dims:
            for n in walk(self.dims[d].count):
                if isinstance(n, Var) and n.name not in (*self.grid, *loops):
                    raise VerifyError(f"dim {d} has no count here: it depends on {n.name}", where)
            if d not in self.counted and not self.facts.proves(call("ge", self.dims[d].count, 0)):
                raise VerifyError(f"nothing shows that the count of dim {d} is 0 or more", where, "write max(0, ..)")
            self.counted.add(d)

    def value(self, e: Expr, dims: tuple[str, ...], written: set[str], loops: list[str], where: str) -> None:
        """An expression over tiles at the points of `dims`."""
        _scope(e, self.tp, {*dims, *self.grid, *loops}, self.tiles, where)
        for n in walk(e):
            if not isinstance(n, Access):
                continue
            own = tuple(i.name if isinstance(i, Var) else show_expr(i) for i in n.index)
            if own != self.tiles[n.tensor].dims:
                raise VerifyError(f"tile {n.tensor} has dims {self.tiles[n.tensor].dims} and is read at {own}", where)
            if n.tensor not in written:
                raise VerifyError(f"tile {n.tensor} is read before it is written", where)

    def element(
        self,
        a: Access,
        dims: tuple[str, ...],
        written: set[str],
        loops: list[str],
        where: str,
        mask: Expr | None = None,
    ) -> None:
        """An element of a param, inside it; indices may gather from other params and read tiles."""
        if a.tensor not in self.params:
            raise VerifyError(f"unknown param {a.tensor!r}", where, nearest(a.tensor, self.params))
        if len(a.index) != len(self.params[a.tensor].shape):
            raise VerifyError(
                f"{a.tensor} has {len(self.params[a.tensor].shape)} dimensions, and is read with "
                f"{len(a.index)} indices",
                where,
            )
        facts = self.facts
        for d in dims:
            facts = facts.within(d, 0, self.dims[d].count)
        if mask is not None:
            facts = facts.where(mask)
        for i, n in zip(a.index, self.params[a.tensor].shape, strict=True):
            if not facts.inside(i, n):
                raise VerifyError(
                    f"nothing shows that index {show_expr(i)} of {a.tensor!r} is inside {show_expr(n)} elements",
                    where,
                    "cut the index of a load, max(min(i, n - 1), 0); mask a store",
                )
        for i in a.index:
            _scope(i, self.tp, {*dims, *self.grid, *loops}, {*self.params, *self.tiles}, where)
            for n in _outermost(i):
                if n.tensor in self.params:
                    self.element(n, dims, written, loops, where)
                else:
                    self.value(n, dims, written, loops, where)

    def store(self, s: Store, written: set[str], loops: list[str], where: str) -> None:
        if s.tile not in self.tiles:
            raise VerifyError(f"unknown tile {s.tile!r}", where, nearest(s.tile, self.tiles))
        dims = self.tiles[s.tile].dims
        self.visible(dims, loops, where)
        if s.tile not in written:
            raise VerifyError(f"tile {s.tile} is stored before it is written", where)
        if s.mask is not None:
            self.value(s.mask, dims, written, loops, where)
        self.element(s.target, dims, written, loops, where, s.mask)
        if self.params[s.target.tensor].role == "in":
            raise VerifyError(f"input {s.target.tensor!r} is written", where)


def _outermost(e: Expr) -> list[Access]:
    """Accesses that stand in no index of another."""
    return [e] if isinstance(e, Access) else [a for k in children(e) for a in _outermost(k)]


def least(e: Expr) -> int:
    """A number that a loop's first step is not below; -1 where it may be negative."""
    if isinstance(e, Call) and e.op == "max":
        return max(least(a) for a in e.args)
    return e.value if isinstance(e, Const) and isinstance(e.value, int) else -1


def _loop_variables(body: tuple[Statement, ...]) -> list[str]:
    out: list[str] = []
    for s in body:
        if isinstance(s, Loop):
            out += [s.var, *_loop_variables(s.body)]
        elif isinstance(s, When):
            out += _loop_variables(s.body) + _loop_variables(s.orelse)
    return out
