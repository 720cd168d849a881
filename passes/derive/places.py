"""Reductions that return places: argmax, argmin and top-k as states of (value, place).

They move through strictly monotone maps.  A tie goes to the lower place, as in the form that was written
(docs/derivation.md, "Places").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, extent_of
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call
from memcomp.ir.kinds import kind_of
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import Placed, order_of, placed, row_major, whole
from memcomp.ir.simplify import simplify
from memcomp.passes._ranks import fresh_rank
from memcomp.passes.derive.closing import Closing
from memcomp.passes.derive.emit import Writer
from memcomp.passes.derive.order import lift
from memcomp.passes.derive.sides import NoLaw
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import PlaceState


@dataclass(frozen=True, slots=True)
class Places:
    """An accepted reduction: its state, and the value from the state's."""

    state: PlaceState
    rebuild: Callable[[Expr], Expr]
    laws: tuple[str, ...]


def accept(stage: Stage, s: Einsum, body: Expr, guard: tuple[Expr, ...]) -> Places:
    """Raises NoLaw."""
    assert s.reduce is not None
    monoid, over = s.reduce.monoid, s.reduce.over
    sides = stage.sides(over)
    if over[0] != stage.carried:
        raise NoLaw(monoid, body, f"places over {', '.join(over)} do not grow with {stage.carried}")
    k = order_of(s)
    if placed(body).value is not body:
        raise NoLaw(monoid, body, "its places are given")
    if k is not None and extent_of(stage.facts.cascade, k.upper()) is None:
        raise NoLaw(monoid, body, f"a state of {k.upper()} values needs a fixed {k.upper()}")
    if k is not None and any(extent_of(stage.facts.cascade, v.upper()) is None for v in over[1:]):
        raise NoLaw(monoid, body, f"a tile of {stage.carried.upper()} holds all of {over[1].upper()}, which has no end")
    if sides.free(body):
        raise NoLaw(monoid, body, "nothing carried to reduce")
    lifted = lift(body, sides, stage.facts, strict=True)
    inner, rebuild = lifted.inner, lifted.rebuild
    if lifted.flip:  # the greatest of -x stand where the least of x do
        inner, rebuild = Call("neg", (inner,)), lambda x: lifted.rebuild(Call("neg", (x,)))
    vs = stage.rows(s, inner, *guard)
    state = PlaceState(stage.fresh("R" + s.names[0]), stage.fresh("R" + s.names[1]), monoid, inner, guard, over,
                       (*vs, k) if k is not None else vs, k)
    stage.places.append(state)
    return Places(state, rebuild, lifted.laws)


def write(w: Writer, state: PlaceState, space: tuple[str, ...], c: Cascade) -> None:
    """The better of the state and the tile's best; a list is joined with the tile's points at once."""
    stem, place = state.name[1:], state.place[1:]
    value, where = w.stage.final(state), w.stage.final(replace(state, name=state.place))
    w.dtypes |= dict.fromkeys((state.place, where.tensor), "i64")
    w.start(state.name, state.vars, _identity(c, state))
    index, total = row_major(state.over)
    w.start(state.place, state.vars, Const(0) if state.order is None else total)
    y = w.operand(state.body, "Y" + stem, space, state.guard)
    if _whole(c, state.body):
        made = (y.tensor,) if isinstance(y, Access) and c.declared(y.tensor) is None else ()
        w.dtypes |= dict.fromkeys((state.name, value.tensor, *made), "i64")
    over, guard = w.inside(state.over), w.guarded(state.guard)
    old, kept = (w.at(n, w.now, state.vars) for n in (state.name, state.place))
    new, moved = (w.at(n, w.then, state.vars) for n in (state.name, state.place))
    ends = [w.at(n, Size(w.cut.step.upper()), state.vars) for n in (state.name, state.place)]
    if state.order is not None:
        body = Placed(y, w.tile(index), (old, kept)).body()
        w.body.append(Einsum((new, moved), body, Reduce(state.monoid, over), guard))
        if w.cut.outer is not None:
            again = Rank(fresh_rank(c, state.order.upper() + "2", {r.name for r in w.more}),
                         c.rank(state.order.upper()).extent)
            w.more.append(again)
            best, at = (Access(a.tensor, (*a.index[:-1], Var(again.var))) for a in ends)
            w.merge.append(Einsum((value, where), Placed(best, at).body(), Reduce("topk", (w.cut.outer, again.var))))
        return
    best, at = (Access(w.fresh("L" + n), w.step(state.vars)) for n in (stem, place))
    if _whole(c, state.body):
        w.dtypes |= dict.fromkeys((best.tensor, at.tensor), "i64")
    w.body.append(Einsum((best, at), y, Reduce(state.monoid, over), guard))
    shift: Expr = call("mul", _outer_step(w), Size(w.cut.inner.upper()))
    for v in state.over[1:]:
        shift = call("mul", shift, Size(v.upper()))
    here = call("add", at, shift)
    up = "gt" if state.monoid == "argmax" else "lt"
    first_nan = call("and", call("ne", best, best), call("eq", old, old))
    w.body.append(Einsum((moved,), call("where", call("or", call(up, best, old), first_nan), here, kept)))
    w.body.append(Einsum((new,), call("max" if state.monoid == "argmax" else "min", old, best)))
    if w.cut.outer is not None:
        share = Access(w.fresh("W" + stem), value.index)
        w.merge.append(Einsum((value, share), ends[0], Reduce(state.monoid, (w.cut.outer,))))
        picked = call("where", call("eq", Var(w.cut.outer), share), ends[1], Const(0))
        w.merge.append(Einsum((where,), picked, Reduce("sum", (w.cut.outer,))))  # a gather, as a sum with one term


def _outer_step(w: Writer) -> Expr:
    if w.cut.outer is None:
        return Var(w.cut.step)
    return call("add", call("mul", Var(w.cut.outer), Size(w.cut.step.upper())), Var(w.cut.step))


def close(close: Closing, s: Einsum, found: Places, guard: tuple[Expr, ...]) -> list[Einsum]:
    """Value and place from the finished state; top-k over fewer than k points leaves the rest empty."""
    assert s.reduce is not None
    stage, state = close.stage, found.state
    c, facts = stage.facts.cascade, stage.facts
    value = stage.final(state)
    place: Expr = stage.final(replace(state, name=state.place))
    body = close.finals.expr(found.rebuild(value))
    live: Expr | None = None  # where a point was kept out the value is the identity, not its image
    if found.laws and state.order is None:
        live = close.some(s, guard)
    elif found.laws and guard:
        points = stage.final(stage.count(s, guard, tuple(v for v in state.vars if v != state.order)))
        live = call("lt", Var(state.order or ""), points)
    if live is not None:
        body = call("where", live, body, _identity(c, replace(state, monoid=s.reduce.monoid)))
    filled: Expr | None = None
    if state.order is not None:
        total: Expr = Const(1)
        for v in state.over:
            total = call("mul", total, facts.extent(v.upper()))
        filled = simplify(call("lt", Var(state.order), total), facts.ranges())
        filled = None if filled == Const(True) else filled
        if guard:  # where no point took part a list may still hold what it began with
            place = call("min", place, simplify(call("sub", total, 1), facts.ranges(), index=True))
    out = []
    empty, nowhere = (0.0 if (d := c.declared(n)) is None else d.empty for n in s.names)
    first = Const(int(empty) if _whole(c, state.body) else empty)
    for o, x, none in ((s.outs[0], body, first), (s.outs[1], place, Const(int(nowhere)))):
        out.append(Einsum((o,), x if filled is None else call("where", filled, x, none)))
    t = close.finals.term(body)
    if filled is None or empty == 0 and any(x == value and k > 0 for x, k in t.ec):  # exp(-inf) is what empty is
        close.finals.learn(replace(out[0], body=body), body, t)
    return out


def _whole(c: Cascade, body: Expr) -> bool:
    """Are the values integers?  (A tensor that a stage has made holds reals.)"""
    return kind_of(body, lambda n: "f32" if (t := c.declared(n)) is None else t.dtype) == "int"


def _identity(c: Cascade, state: PlaceState) -> Const:
    """What comes after all values."""
    monoid = MONOIDS[state.monoid]
    return whole(monoid) if _whole(c, state.body) else Const(monoid.identity)
