"""Kernels that write `empty` first, for outputs and workspace whose statements do not reach every element."""

from __future__ import annotations

from memcomp.codegen.lower_ops import GroupOps
from memcomp.ir.cascade import Cascade
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, variables
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.tile import Dim, Map, Param, Store, Tile, TileKernel

WIDE = 64


def fills(program: str, c: Cascade, grouped: list[GroupOps], params: tuple[Param, ...]) -> list[TileKernel]:
    """One kernel for every out or work param that the stores of `grouped` are not proved to cover."""
    out = []
    for p in params:
        if p.role not in ("out", "work"):
            continue
        stores = [(g, a) for g in grouped for n, a in g.stores.items() if n == p.name]
        if len(stores) == 1 and _whole_store(*stores[0], p):
            continue
        t = c.declared(p.name)
        out.append(_fill(f"{program}_fill_{p.name}", p, t.empty if t is not None else 0.0))
    return out


def _whole_store(g: GroupOps, a: Access, p: Param) -> bool:
    """Is every element written, the steps of a carried tensor in turn?"""
    k = g.carried[p.name] if p.name in g.each_step else len(p.shape)
    return covers(g, Access(a.tensor, a.index[:k] + a.index[k + 1 :]), p.shape[:k] + p.shape[k + 1 :])


def covers(g: GroupOps, a: Access, shape: tuple[Expr, ...]) -> bool:
    """Does the store reach every element: each index counts through its dimension, all with variables of their own?"""
    seen: set[str] = set()
    for i, n in zip(a.index, shape, strict=True):
        names = variables(i)
        if names & seen or not _counts_through(g, i, n):
            return False
        seen |= names
    return True


def _counts_through(g: GroupOps, i: Expr, n: Expr) -> bool:
    """Mixed radix: strides start at 1, each is the one before times that digit's extent, and the last ends at n."""
    terms = linear(i)
    if terms is None or terms.get(None, 0) or any(t is not None and not isinstance(t, Var) for t in terms):
        return False
    stride: Expr = Const(1)
    digits = sorted(((k, t) for t, k in terms.items() if isinstance(t, Var)), key=lambda x: (x[0], x[1].name))
    grid = dict(g.grid)
    at = 0
    while at < len(digits):
        k, v = digits[at]
        if simplify(stride) != Const(k):
            return False
        d = g.dims.get(v.name)
        if d is not None and variables(d.start) and at + 1 < len(digits):  # p1*P0 + p0 of a cut rank is one digit
            outer = digits[at + 1][1].name
            if (
                simplify(d.start) != simplify(call("mul", Var(outer), d.capacity))
                or digits[at + 1][0] != k * d.capacity
            ):
                return False
            extent = _whole(d, grid.get(outer, g.steps))
            at += 1
        else:
            extent = d.count if d is not None else grid.get(v.name, g.steps if v.name == g.loop else None)
        if extent is None:
            return False
        stride = simplify(call("mul", stride, extent))
        at += 1
    return simplify(stride, index=True) == simplify(n, index=True)


def _whole(d: Dim, outer: Expr) -> Expr | None:
    """The rank's extent N from the count `min(N - start, capacity)` and the number of tiles `ceil(N / capacity)`; all
    tiles are full where the count is the capacity."""
    if d.count == Const(d.capacity):
        return simplify(call("mul", outer, d.capacity), index=True)
    if not isinstance(d.count, Call) or d.count.op != "min":
        return None
    for part in d.count.args:
        n = simplify(call("add", part, d.start), index=True)
        if not variables(n) and simplify(call("ceildiv", n, d.capacity), index=True) == simplify(outer, index=True):
            return n
    return None


def _fill(name: str, p: Param, empty: float) -> TileKernel:
    value: bool | int | float = bool(empty) if p.dtype == "bool" else int(empty) if p.dtype[0] in "iu" else empty
    dtype = "bool" if p.dtype == "bool" else "i64" if p.dtype[0] in "iu" else "f64" if p.dtype == "f64" else "f32"
    *front, last = p.shape or (Const(1),)
    grid = tuple((f"x{k}", n) for k, n in enumerate(front))
    start = call("mul", Var("y1"), WIDE)
    dim = Dim("y0", WIDE, simplify(call("min", WIDE, last - start), index=True), start)
    index: tuple[Expr, ...] = ()
    if p.shape:
        index = (*(Var(v) for v, _ in grid), call("add", start, Var("y0")))
    tile = Tile(f"{p.name}_t", ("y0",) if p.shape else (), dtype)
    return TileKernel(
        name,
        (*grid, ("y1", simplify(call("ceildiv", last, WIDE), index=True))),
        (dim,),
        (tile,),
        (Map(tile.name, Const(value)), Store(Access(p.name, index), tile.name)),
    )
