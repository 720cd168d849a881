"""Execute one Einsum over a block of points: guards, reduction, blocks that bound memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from memcomp.ir.cascade import Einsum
from memcomp.ir.contract import contract
from memcomp.ir.errors import VerifyError
from memcomp.ir.evaluate import Array, Block, OutOfRange
from memcomp.ir.expr import Access, Call, Expr, Var, reads, variables
from memcomp.ir.extents import Extents
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import ordered, placed

Store: TypeAlias = Callable[[str, tuple[Any, ...], Array, Array | None], None]
POINTS = 1 << 21  # points of a statement evaluated at once
FACTOR = 1 << 24  # elements of a factor or result of a contraction held at once
SMALL = 1 << 12   # spaces below this take the plain way
_JOIN: dict[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum,
                              "and": np.logical_and, "or": np.logical_or}


def execute(e: Einsum, block: Block, ragged: tuple[Expr, ...], extents: Extents, store: Store) -> None:
    """Run the statement.  ragged: conditions that say which points exist.  Raises OutOfRange."""
    if e.reduce is None:
        for part in _pieces(block, tuple(block.axes), POINTS):
            live = _mask(part, (*ragged, *e.guards()))
            if live is None or live.any():
                _write(part, e.out, part.evaluate(e.body, live), live, live, store)
        return
    if MONOIDS[e.reduce.monoid].outs == 2:
        _select(e, block, ragged, extents, store)
        return
    over = tuple(v for v in e.reduce.over if v in block.axes)
    outer = tuple(v for v in block.axes if v not in over)
    block = block.only(outer + over)
    factors = _factors(e.body) if e.reduce.monoid == "sum" else ()
    fast = len(factors) > 1 and math.prod(block.shape) > SMALL
    for part in _pieces(block, outer, POINTS if not fast else FACTOR, None if not fast else factors):
        value = _contraction(part, factors, (*ragged, *e.guards()), len(outer)) if fast else None
        if value is None:
            pieces = [*_pieces(part, outer, POINTS)] if fast else [part]
        else:
            pieces = []
            _reduced(part.only(outer), e, value, ragged, store)
        for piece in pieces:
            _reduced(piece.only(outer), e, _fold(piece, e, (*ragged, *e.guards()), over), ragged, store)


def _reduced(outer: Block, e: Einsum, value: Array, ragged: tuple[Expr, ...], store: Store) -> None:
    """Write a reduction's result: at every point that exists, unless the guard alone keeps it out of its tensor."""
    mine = outer.axes.keys() | outer.fixed.keys()
    exists = _mask(outer, tuple(c for c in ragged if variables(c) <= mine))
    inside = _mask(outer, tuple(c for c in (*ragged, *e.guards()) if variables(c) <= mine))
    _write(outer, e.out, value, exists, inside, store)


def _pieces(block: Block, names: tuple[str, ...], limit: int, factors: tuple[Expr, ...] | None = None
            ) -> Iterator[Block]:
    """Cut the axes `names` until a piece has at most `limit` points (or its factors and result that many)."""
    span = {v: hi - lo for v, (lo, hi) in block.axes.items()}
    if factors is None:
        parts: list[set[str]] = [set(span)]
    else:
        parts = [set(variables(f) & span.keys()) for f in factors] + [set(names)]
    steps = dict(span)
    while True:
        worst = max(parts, key=lambda p: math.prod(steps[v] for v in p))
        if math.prod(steps[v] for v in worst) <= limit:
            break
        cuttable = [v for v in names if v in worst and steps[v] > 1]
        if not cuttable:
            break
        v = next((v for v in cuttable if steps[v] > 1), cuttable[0])
        steps[v] = -(-steps[v] // 2)
    ranges = []
    for v, (lo, hi) in block.axes.items():
        cut = range(lo, hi, steps[v]) if v in names and steps[v] < span[v] else [lo]
        ranges.append([(v, (s, min(s + steps[v], hi) if v in names else hi)) for s in cut])
    for box in itertools.product(*ranges):
        yield Block(dict(box), block.fixed, block.tensor, block.size)


def _mask(block: Block, conds: tuple[Expr, ...]) -> Array | None:
    """Where all conditions hold; each is only asked where the ones before hold."""
    live: Array | None = None
    for c in conds:
        v = block.evaluate(c, live).astype(bool)
        live = v if live is None else live & v
    return live


def _write(block: Block, out: Access, value: Array, live: Array | None, inside: Array | None, store: Store) -> None:
    """Store the values of the points of `block`.  live: points to write; inside: points whose index must fit."""
    if math.prod(block.shape) == 0:
        return
    shape = block.tensor(out.tensor).shape
    index = block.index(out, shape, inside)
    keep = live
    if inside is not None:
        for dim, i in enumerate(index):  # an index that was clipped belongs to a point that is not written
            if not isinstance(i, slice):
                at = block.evaluate(out.index[dim], inside)
                fits = (at >= 0) & (at < shape[dim]) & (inside if reads(out.index[dim]) else True)
                if not fits.all():
                    keep = fits if keep is None else keep & fits
    value = np.broadcast_to(value, np.broadcast_shapes(value.shape, block.shape))
    if all(isinstance(i, (slice, int)) for i in index):
        names = [n for i in out.index if (n := block.name_of(i)) is not None]
        axes = list(block.axes)
        order = [axes.index(n) for n in names]
        drop = [k for k in range(len(axes)) if k not in order]
        assert all(value.shape[k] == 1 for k in drop), "an axis of the space is not in the output"

        def arranged(x: Array) -> Array:
            x = np.broadcast_to(x, block.shape)
            return x.transpose(order + drop).reshape([x.shape[k] for k in order])

        store(out.tensor, index, arranged(value), None if keep is None else arranged(keep))
        return
    arrays = tuple(block.along(block.name_of(out.index[k]) or "", np.arange(i.start, i.stop))
                   if isinstance(i, slice) else i for k, i in enumerate(index))
    store(out.tensor, arrays, value, keep)


# -- reductions -------------------------------------------------------------------------------------------------------


def _identity(monoid: str, dtype: np.dtype[Any]) -> Any:
    if monoid in ("and", "or"):
        return monoid == "and"
    if dtype.kind == "i" and monoid in ("max", "min"):
        return np.iinfo(dtype).min if monoid == "max" else np.iinfo(dtype).max
    return np.asarray(MONOIDS[monoid].identity).astype(dtype)


def _fold(block: Block, e: Einsum, conds: tuple[Expr, ...], over: tuple[str, ...]) -> Array:
    """The reduction, a slab of the reduced axes at a time; the result has the other axes only."""
    assert e.reduce is not None
    monoid, keep = e.reduce.monoid, len(block.axes) - len(over)
    join = _JOIN[monoid]
    total: Array | None = None
    some: Any = False  # where a point took part; only asked for integers, where the identity is no number of the type
    for part in _pieces(block, over, POINTS):
        live = _mask(part, conds)
        value = part.evaluate(e.body, live)
        if monoid in ("and", "or"):
            value = value.astype(bool)
        elif value.dtype == bool:
            value = value.astype(np.int64)
        identity = _identity(monoid, value.dtype)
        full = np.broadcast_to(value, part.shape)
        if live is not None:
            full = np.where(live, full, identity)
        axes = tuple(range(keep, len(part.shape)))
        sub = np.asarray(join.reduce(full, axis=axes, initial=identity) if axes else full)
        if value.dtype.kind == "i" and monoid in ("max", "min"):
            some = some | np.broadcast_to(True if live is None else live, part.shape).any(axis=axes)
        total = sub if total is None else join(total, sub)
    assert total is not None, "a block has at least one piece"
    if total.dtype.kind == "i" and monoid in ("max", "min") and not np.all(some):
        total = np.where(some, total.astype(np.float64), MONOIDS[monoid].identity)
    return total


def _select(e: Einsum, block: Block, ragged: tuple[Expr, ...], extents: Extents, store: Store) -> None:
    """argmax, argmin and top-k: values and row-major indices."""
    assert e.reduce is not None
    if len(e.outs) != 2:
        raise VerifyError(f"{e.reduce.monoid} writes two outputs (value, index), found {len(e.outs)}")
    over, given = e.reduce.over, placed(e.body)
    order = e.out.index[-1] if e.reduce.monoid == "topk" else None
    if order is not None and not isinstance(order, Var):
        raise VerifyError("the last index of a top-k output is the variable of its order rank")
    rank = order.name if isinstance(order, Var) else None
    count = block.axes[rank][1] if rank is not None else 1
    outer = tuple(v for v in block.axes if v not in over and v != rank)
    strides = [math.prod(extents.limit(w.upper(), block.fixed) for w in over[k + 1:]) for k in range(len(over))]
    body = block.only(outer + over)
    for part in _pieces(body, outer, POINTS):
        live = _mask(part, (*ragged, *e.guards()))
        value = part.evaluate(given.value, live)
        value = value.astype(np.int64) if value.dtype == bool else value
        full = np.broadcast_to(value, part.shape)
        if live is not None:
            full = np.where(live, full.astype(np.float64), MONOIDS[e.reduce.monoid].identity)
        row = (*part.shape[:len(outer)], math.prod(part.shape[len(outer):]))
        flat = full.reshape(row)
        if given.place is not None:
            places = part.evaluate(given.place, live)
        else:
            each = (part.evaluate(Var(v)) * s for v, s in zip(over, strides, strict=True))
            places = sum(each, np.zeros((), np.int64))
        places = np.broadcast_to(places, part.shape).reshape(row)
        if given.old is not None:
            lists = Block({**part.only(outer).axes, rank or "": (0, count)}, block.fixed, block.tensor, block.size)
            flat, places = (np.concatenate([np.broadcast_to(lists.evaluate(x), lists.shape), y], -1)
                            for x, y in zip(given.old, (flat, places), strict=True))
        best, index = (x[..., :count] for x in ordered(flat, places, rising=e.reduce.monoid == "argmin"))
        if rank is None:
            if best.shape[-1] == 0:
                best = np.full((*best.shape[:-1], 1), MONOIDS[e.reduce.monoid].identity)
                index = np.zeros(best.shape, np.int64)
            target, best, index = part.only(outer), best[..., 0], index[..., 0]
        else:
            target = Block({**part.only(outer).axes, rank: (0, best.shape[-1])}, block.fixed, block.tensor, block.size)
        mine = target.axes.keys() | block.fixed.keys()
        exists = _mask(target, tuple(c for c in ragged if variables(c) <= mine))
        for out, x in zip(e.outs, (best, index), strict=True):
            _write(target, out, x, exists, exists, store)


# -- sums of products -------------------------------------------------------------------------------------------------


def _factors(e: Expr) -> tuple[Expr, ...]:
    if isinstance(e, Call) and e.op == "mul":
        return tuple(f for a in e.args for f in _factors(a))
    return (e,)


def _contraction(block: Block, factors: tuple[Expr, ...], conds: tuple[Expr, ...], keep: int) -> Array | None:
    """The sum by matrix products; None where that could differ from the plain way: a point that a guard excludes holds
    a number that is not finite, or an index is only in range thanks to a guard on other axes."""
    try:
        masks = [block.evaluate(c).astype(bool) for c in conds]
        parts = [_factor(block, f, masks) for f in factors]
    except OutOfRange:
        return None
    inner = [m for m in masks if any(n > 1 for n in m.shape[keep:])]
    if inner and not all(p.dtype.kind != "f" or np.isfinite(p).all() for p in parts):
        return None
    for m in inner:
        host = next((k for k, p in enumerate(parts) if _covers(p.shape, m.shape)), None)
        if host is None:
            parts.append(m.astype(np.float64 if any(p.dtype.kind == "f" for p in parts) else np.int64))
        else:
            parts[host] = np.where(m, parts[host], np.zeros((), parts[host].dtype))
    out = contract(parts, block.shape, keep)
    for m in masks:
        if all(n == 1 for n in m.shape[keep:]):
            out = np.where(m.reshape(m.shape[:keep]), out, np.zeros((), out.dtype))
    return out


def _factor(block: Block, f: Expr, masks: list[Array]) -> Array:
    """One factor over its own axes; an index must fit wherever the masks over these axes alone hold."""
    mine = tuple(hi - lo if v in variables(f) else 1 for v, (lo, hi) in block.axes.items())
    live: Array | None = None
    for m in masks:
        if _covers(mine, m.shape):
            live = m if live is None else live & m
    return block.evaluate(f, live)


def _covers(big: tuple[int, ...], small: tuple[int, ...]) -> bool:
    return not small or (len(big) == len(small) and all(s in (1, b) for b, s in zip(big, small, strict=True)))
