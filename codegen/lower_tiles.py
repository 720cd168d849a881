"""Tiles of one kernel, their names, and the loads that fill them."""

from __future__ import annotations

from collections.abc import Collection

from memcomp.codegen.lower_laws import Fills
from memcomp.codegen.lower_ops import LOOP, POST, PRE, GroupOps, Op, lane_last
from memcomp.ir.expr import Access, Call, Expr, Var, call, rebuild, variables, walk
from memcomp.ir.inside import Facts
from memcomp.ir.simplify import simplify
from memcomp.ir.tile import Load, Param, Statement, Tile

TILE_DTYPE = {"f64": "f64", "bool": "bool"}


def tile_dtype(dtype: str) -> str:
    """How elements of a stored dtype are held in a tile."""
    return TILE_DTYPE.get(dtype, "i64" if dtype[0] in "iu" else "f32")


class Tiles:
    """What has been written of one kernel: tiles, and statements before, in and after the loop.

    dtype: of each group tensor's tile.  home: the buffer that holds it.  pieces: tensors that several kernels write.
    """

    def __init__(
        self,
        g: GroupOps,
        params: dict[str, Param],
        dtype: dict[str, str],
        home: dict[str, str],
        pieces: Collection[str],
    ) -> None:
        self.g, self.params, self.dtype, self.home, self.pieces = g, params, dict(dtype), home, pieces
        self.tiles: dict[str, Tile] = {}
        self.body: dict[int, list[Statement]] = {PRE: [], LOOP: [], POST: []}
        self.head: list[Statement] = []  # what decides whether a step of the loop runs
        self.live: Expr | None = None
        self.moved = False  # do steps begin where guards without data begin?
        self.late_loop: list[Statement] = []
        self.late: list[Statement] = []
        self.loaded: dict[tuple[Access, int], Access] = {}
        self.fills = Fills()
        self.scalars: dict[tuple[Expr, str], Expr] = {}
        self.counted: set[Expr] = set()
        self.names: set[str] = set(params)

    def effective(self, o: Op) -> tuple[Expr, ...]:
        return tuple(g for g in o.guards if g not in self.counted)

    def fresh(self, stem: str) -> str:
        stem = stem.replace("'", "_new").replace("@", "_")
        name, k = (stem if stem not in self.names else f"{stem}_t"), 2
        while name in self.names:
            name, k = f"{stem}_t{k}", k + 1
        self.names.add(name)
        return name

    def tile(self, target: str, dims: tuple[str, ...]) -> str:
        buffer = self.home.get(target, target)
        if buffer not in self.tiles:
            self.tiles[buffer] = Tile(self.fresh(buffer), dims, self.dtype[buffer])
        return self.tiles[buffer].name

    def read(self, e: Expr, phase: int) -> Expr:
        """The expression over tiles: params are loaded, group tensors named by their buffers."""
        if isinstance(e, Access):
            if e.tensor in self.home:
                return Access(self.tile(e.tensor, tile_dims(e)), e.index)
            return self.load(e, phase)
        if isinstance(e, Call):
            return rebuild(e, tuple(self.read(a, phase) for a in e.args))
        return e

    def load(self, a: Access, phase: int) -> Access:
        chosen = any(isinstance(n, Access) and n.tensor in self.home for i in a.index for n in walk(i))
        phase = phase if chosen or phase != LOOP or self.moves(a) else PRE
        for p in () if chosen else (phase, PRE):  # a place that was computed may be another one later
            if (a, p) in self.loaded:
                return self.loaded[a, p]
        dims: list[str] = []
        for i in a.index:
            for n in walk(i):
                if isinstance(n, Var) and n.name in self.g.dims and n.name not in dims:
                    dims.append(n.name)
        own = lane_last(self.g.group, dims)
        name = self.fresh(f"{a.tensor}_t")
        self.tiles[f"load {name}"] = Tile(name, own, tile_dtype(self.params[a.tensor].dtype))
        self.dtype[name] = tile_dtype(self.params[a.tensor].dtype)
        self.body[phase].append(Load(name, self.clamped(a)))
        got = Access(name, tuple(Var(d) for d in own))
        self.loaded[a, phase] = got
        return got

    def moves(self, e: Expr) -> bool:
        """Does a read change along the loop?"""
        names = variables(e)
        return self.g.loop in names or any(
            self.g.loop in variables(self.g.dims[n].count) for n in names & set(self.g.dims)
        )

    def clamped(self, a: Access) -> Access:
        """Indices that nothing proves inside the tensor (a guard keeps them there, or data) are cut to it, so that no
        load leaves memory."""

        def nested(e: Expr) -> Expr:
            if isinstance(e, Access) and e.tensor in self.home:
                return Access(self.tile(e.tensor, tile_dims(e)), e.index)
            if isinstance(e, Access):
                return self.clamped(e)
            return rebuild(e, tuple(nested(x) for x in e.args)) if isinstance(e, Call) else e

        shape = self.params[a.tensor].shape
        return Access(a.tensor, tuple(self._clamp(nested(i), n) for i, n in zip(a.index, shape, strict=True)))

    def _clamp(self, i: Expr, extent: Expr) -> Expr:
        if self.facts(i).inside(i, extent):
            return i
        return call("max", call("min", i, simplify(call("sub", extent, 1))), 0)

    def facts(self, *exprs: Expr) -> Facts:
        """What holds at the points of `exprs`: of the grid, and of the dims and the loop that they mention."""
        dims, used = self.g.dims, set[str]().union(*map(variables, exprs))
        out = Facts({n for n, p in self.params.items() if p.dtype[0] in "iu"}
                    | {t.name for t in self.tiles.values() if t.dtype == "i64"})
        for v, n in self.g.grid:
            out = out.within(v, 0, n)
        own = [d for d in dims.values() if d.name in used]
        if self.g.loop and self.g.loop in used.union(*(variables(d.count) for d in own)):
            out = out.within(self.g.loop, 0, self.g.steps)
        for d in own:
            out = out.within(d.name, 0, d.count)
        return out


def tile_dims(a: Access) -> tuple[str, ...]:
    return tuple(i.name for i in a.index if isinstance(i, Var))


def param_name(tensor: str) -> str:
    """The param of a tensor: the new value of a state (`X'`) is written over the old one."""
    return tensor.removesuffix("'")
