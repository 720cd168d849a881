"""Running sums, made exact: a loop adds a thousand tiles one after the other, and their roundings add up.

On targets that say so (`Target.long_sums`) a carried sum of few elements is held in f64, and so is what is computed
from it at as few points; where more points read such a value it is rounded to f32 first, once. References of frames
are such values: any reference is legal, as long as all read the same. A sum of many elements would pay for that at
each step: where steps only add to it, a few of them are summed in f32 and their sums in f64. (One that steps scale,
in an exponential frame, stays in f32.) The sum over one tile is short and needs nothing, unless a reference is made
of it. """

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import prod

from memcomp.codegen.lower_fuse import addends, is_product
from memcomp.codegen.lower_ops import LOOP, OLD, POST, GroupOps, Op, lane_last
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, reads, rebuild, variables

SHARE = 16  # so many times more elements has the largest tile of a step: doubling the sum then costs next to nothing
PART = 16  # steps that are summed in f32


def small_sums(g: GroupOps, dtype: dict[str, str], declared: Collection[str]) -> set[str]:
    """Carried f32 sums of few elements, before anything is composed.  declared: tiles that keep their dtype."""
    inside = [o for o in g.ops if o.phase == LOOP]
    touched = [x for o in inside for x in (frozenset(o.dims), *map(variables, o.accesses()))]
    largest = max((_points(g, names) for names in touched), default=0)
    summed = {o.target for o in inside if o.monoid == "sum"}
    return {
        o.target
        for o in inside
        if o.target in g.carried
        and o.target not in declared
        and dtype[o.target] == "f32"
        and any(isinstance(x, Access) and x.tensor in summed for x in addends(o.body, "add"))
        and SHARE * _points(g, o.dims) <= largest
    }


def references(g: GroupOps, small: Collection[str]) -> set[str]:
    """Sums over a tile that go into a small sum and into a reference, from which everything else is measured."""
    maps = [o for o in g.ops if o.phase == LOOP and not o.monoid and o.target in g.carried]
    sums, frames = (set[str]().union(*(o.reads() for o in maps if (o.target in small) is x)) for x in (True, False))
    made = [o for o in g.ops if o.monoid == "sum" and o.target in sums & frames and not is_product(o)]
    return {o.target for o in made if reads(o.body)}


def in_parts(g: GroupOps, dtype: dict[str, str], declared: Collection[str]) -> None:
    """Let the other carried f32 sums go into sums of their own, in f64, now and then and at the end.

    For composed operations; changes them and `dtype`.
    """
    if isinstance(g.steps, Const) and g.steps.value < PART:
        return
    some = None if reads(g.steps) else call("ge", g.steps, PART)  # else nothing is moved, and the second sum idles
    for name in list(g.carried):
        writes = [k for k, o in enumerate(g.ops) if o.phase == LOOP and o.target == name]
        if name in declared or name in g.each_step or dtype[name] != "f32" or not _only_added(g, name, writes):
            continue
        whole, dims = f"{name}_sum", g.ops[writes[0]].dims
        at = tuple(Var(d) for d in dims)
        both = call("add", Access(whole + OLD, at), Access(name, at))
        full = call("eq", call("mod", Var(g.loop), PART), PART - 1)
        full = full if some is None else call("and", some, full)
        end = next((k for k, o in enumerate(g.ops) if o.phase == POST), len(g.ops))
        g.ops.insert(end, Op(name, dims, call("add", Access(whole, at), Access(name, at)), phase=POST, when=some))
        g.ops[writes[-1] + 1 : writes[-1] + 1] = [
            Op(whole, dims, both, phase=LOOP, when=full),
            Op(name, dims, Const(0.0), phase=LOOP, when=full),
        ]
        g.ops.insert(0, Op(whole, dims, Const(0.0), when=some))
        g.carried[whole] = g.carried[name]
        dtype[whole] = "f64"


def _only_added(g: GroupOps, name: str, writes: list[int]) -> bool:
    """Do steps add to the sum, one of them the sum over its tile, and nothing else?"""
    old, mine = name + OLD, [g.ops[k] for k in writes]
    if any(o.reads() & {name, old} for k, o in enumerate(g.ops) if o.phase == LOOP and k not in writes):
        return False
    if mine and not mine[0].monoid:  # what else is added
        first, *mine = mine
        parts = addends(first.body, "add")
        plain = [x for x in parts if isinstance(x, Access) and x.tensor == old]
        if first.guards or len(plain) != 1 or any(old in reads(x) for x in parts if x != plain[0]):
            return False
    return bool(mine) and all(o.monoid == "sum" and o.accumulate for o in mine)


def _points(g: GroupOps, names: Collection[str]) -> int:
    return prod(g.dims[d].capacity for d in names if d in g.dims)


def spread(g: GroupOps, dtype: dict[str, str], fixed: Collection[str]) -> None:
    """Hold in f64 what is computed from f64 values at no more points than theirs; operations at more points read such
    a value through an f32 tile.  fixed: tiles whose dtype is declared.  Changes `dtype` and the operations."""
    stay = {*fixed, *g.carried, *(a.tensor for o in g.ops for a in o.accesses() if not _full(g, o, a))}
    changed = True
    while changed:
        changed = False
        for o in g.ops:
            if dtype[o.target] == "f32" and not o.monoid and o.target not in stay and _fine(g, o, dtype):
                dtype[o.target] = "f64"
                changed = True
    ops: list[Op] = []
    for o in g.ops:
        if dtype[o.target] != "f64" and not _fine(g, o, dtype):
            made: list[Op] = []
            o = replace(o, body=_rounded(g, o, o.body, dtype, made))
            ops += made
        ops.append(o)
    g.ops[:] = ops


def _full(g: GroupOps, o: Op, a: Access) -> bool:
    """Is the tile read at no more points than it has?"""
    return variables(a) & set(g.dims) == set(_dims(o))


def _fine(g: GroupOps, o: Op, dtype: dict[str, str]) -> bool:
    """Does an operation compute in f64 at every point whatever is done?"""
    return any(dtype.get(a.tensor) == "f64" and _full(g, o, a) for a in o.accesses())


def _dims(o: Op) -> tuple[str, ...]:
    return o.points


def _rounded(g: GroupOps, o: Op, e: Expr, dtype: dict[str, str], made: list[Op]) -> Expr:
    """The expression with its f64 parts of fewer points than `o` has replaced by tiles."""
    if not any(dtype.get(t) == "f64" for t in reads(e)):
        return e
    names = variables(e) & set(g.dims)
    if names < set(_dims(o)) and not (isinstance(e, Call) and e.op == "at"):
        own = lane_last(g.group, [d for d in _dims(o) if d in names])
        known = next((m for m in made if m.body == e), None)
        if known is None:
            known = Op(f"{o.target}_f32{len(made)}", own, e, phase=o.phase)
            made.append(known)
            dtype[known.target] = "f32"
        return Access(known.target, tuple(Var(d) for d in own))
    return rebuild(e, tuple(_rounded(g, o, a, dtype, made) for a in e.args)) if isinstance(e, Call) else e

