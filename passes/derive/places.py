"""Reductions that return places: argmax, argmin and top-k as states of (value, place).

They move through strictly monotone maps.  A tie goes to the state, whose places are lower than the tile's, so the
lowest place wins as in the form that was written (docs/derivation.md, "Places").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, extent_of
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call
from memcomp.ir.ops import MONOIDS
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
    k = _order(s)
    if k is not None and extent_of(stage.facts.cascade, k.upper()) is None:
        raise NoLaw(monoid, body, f"a state of {k.upper()} values needs a fixed {k.upper()}")
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


def _order(s: Einsum) -> str | None:
    assert s.reduce is not None
    last = s.out.index[-1] if s.out.index else None
    return last.name if s.reduce.monoid == "topk" and isinstance(last, Var) else None


def write(w: Writer, state: PlaceState, space: tuple[str, ...], c: Cascade) -> None:
    """Best of the tile, then the better of both."""
    stem, place = state.name[1:], state.place[1:]
    value, where = w.stage.final(state), w.stage.final(replace(state, name=state.place))
    w.dtypes |= dict.fromkeys((state.place, where.tensor), "i64")
    w.start(state.name, state.vars, Const(MONOIDS[state.monoid].identity))
    w.start(state.place, state.vars, Const(0) if state.order is None else Var(state.order))
    y = w.operand(state.body, "Y" + stem, space, state.guard)
    best, at = (Access(w.fresh("L" + n), w.step(state.vars)) for n in (stem, place))
    w.body.append(Einsum((best, at), y, Reduce(state.monoid, w.inside(state.over)), w.guarded(state.guard)))
    old, kept = (w.at(n, w.now, state.vars) for n in (state.name, state.place))
    new, moved = (w.at(n, w.then, state.vars) for n in (state.name, state.place))
    shift: Expr = call("mul", _outer_step(w), Size(w.cut.inner.upper()))
    for v in state.over[1:]:
        shift = call("mul", shift, Size(v.upper()))
    here = call("add", at, shift)
    if state.order is None:
        up = "gt" if state.monoid == "argmax" else "lt"
        first_nan = call("and", call("ne", best, best), call("eq", old, old))
        w.body.append(Einsum((moved,), call("where", call("or", call(up, best, old), first_nan), here, kept)))
        w.body.append(Einsum((new,), call("max" if state.monoid == "argmax" else "min", old, best)))
        if w.cut.outer is not None:
            end = [w.at(n, Size(w.cut.step.upper()), state.vars) for n in (state.name, state.place)]
            share = Access(w.fresh("W" + stem), value.index)
            w.merge.append(Einsum((value, share), end[0], Reduce(state.monoid, (w.cut.outer,))))
            w.merge.append(_picked(where, (w.cut.outer,), Var(w.cut.outer), share, end[1]))
        return
    two = Rank(fresh_rank(c, "T2", {r.name for r in w.more}), Const(2))
    again = Rank(fresh_rank(c, state.order.upper() + "2", {r.name for r in w.more}), c.rank(state.order.upper()).extent)
    w.more += [two, again]
    both = (*w.step(state.vars[:-1]), Var(two.var), Var(state.order))
    values, places = Access(w.fresh("C" + stem), both), Access(w.fresh("C" + place), both)
    w.dtypes[places.tensor] = "i64"
    first = call("eq", Var(two.var), Const(0))
    w.body.append(Einsum((values,), call("where", first, old, best)))
    w.body.append(Einsum((places,), call("where", first, kept, here)))
    index = (*w.step(state.vars[:-1]), Var(again.var))
    best, at = Access(w.fresh("B" + stem), index), Access(w.fresh("W" + stem), index)
    pair = (two.var, state.order)
    slot = call("add", call("mul", Var(two.var), Size(state.order.upper())), Var(state.order))
    w.body.append(Einsum((best, at), values, Reduce("topk", pair)))
    new, moved = (Access(n.tensor, (*n.index[:-1], Var(again.var))) for n in (new, moved))
    w.body.append(_picked(moved, pair, slot, at, places))
    w.body.append(Einsum((new,), best))
    if w.cut.outer is not None:
        end = [w.at(n, Size(w.cut.step.upper()), state.vars) for n in (state.name, state.place)]
        index = (*value.index[:-1], Var(again.var))
        share = Access(w.fresh("W" + stem), index)
        pair = (w.cut.outer, state.order)
        slot = call("add", call("mul", Var(w.cut.outer), Size(state.order.upper())), Var(state.order))
        w.merge.append(Einsum((Access(value.tensor, index), share), end[0], Reduce("topk", pair)))
        w.merge.append(_picked(Access(where.tensor, index), pair, slot, share, end[1]))


def _outer_step(w: Writer) -> Expr:
    if w.cut.outer is None:
        return Var(w.cut.step)
    return call("add", call("mul", Var(w.cut.outer), Size(w.cut.step.upper())), Var(w.cut.step))


def _picked(out: Access, over: tuple[str, ...], slot: Expr, at: Expr, x: Expr) -> Einsum:
    """x at the slot `at`: a gather inside a state, as a sum with one term."""
    return Einsum((out,), call("where", call("eq", slot, at), x, Const(0)), Reduce("sum", over))


def close(close: Closing, s: Einsum, found: Places, guard: tuple[Expr, ...]) -> list[Einsum]:
    """Value and place from the finished state; top-k over fewer than k points leaves the rest empty."""
    assert s.reduce is not None
    stage, state = close.stage, found.state
    c, facts = stage.facts.cascade, stage.facts
    value, place = stage.final(state), stage.final(replace(state, name=state.place))
    body = close.finals.expr(found.rebuild(value))
    live: Expr | None = None  # where a point was kept out the value is the identity, not its image
    if found.laws and state.order is None:
        live = close.some(s, guard)
    elif found.laws and guard:
        points = stage.final(stage.count(s, guard, tuple(v for v in state.vars if v != state.order)))
        live = call("lt", Var(state.order or ""), points)
    if live is not None:
        body = call("where", live, body, Const(MONOIDS[s.reduce.monoid].identity))
    filled: Expr | None = None
    if state.order is not None:
        total: Expr = Const(1)
        for v in state.over:
            total = call("mul", total, facts.extent(v.upper()))
        filled = simplify(call("lt", Var(state.order), total), facts.ranges())
        filled = None if filled == Const(True) else filled
    out = []
    empty, nowhere = (0.0 if (d := c.declared(n)) is None else d.empty for n in s.names)
    for o, x, none in ((s.outs[0], body, Const(empty)), (s.outs[1], place, Const(int(nowhere)))):
        out.append(Einsum((o,), x if filled is None else call("where", filled, x, none)))
    t = close.finals.term(body)
    if filled is None or empty == 0 and any(x == value and k > 0 for x, k in t.ec):  # exp(-inf) is what empty is
        close.finals.learn(replace(out[0], body=body), body, t)
    return out


def least_tile(stage: Stage) -> int:
    """Points that a tile must hold: as many as any state keeps."""
    sizes = [extent_of(stage.facts.cascade, p.order.upper()) for p in stage.places if p.order is not None]
    return max((n for n in sizes if n is not None), default=1)


def tile_choices(sizes: tuple[int, ...], least: int) -> tuple[int, ...]:
    """The choices of a tile size that hold `least` points; the next power of two where none does."""
    return tuple(n for n in sizes if n >= least) or (1 << (least - 1).bit_length(),)
