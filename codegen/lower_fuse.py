"""Fewer tiles: maps composed into their only reader, sums that start from another value accumulated in place, old
values kept only where they are read after the new one is written, and buffers reused where a map's operand dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import combinations, count

from memcomp.codegen.lower_ops import LOOP, OLD, POST, PRE, GroupOps, Op, lane_last
from memcomp.ir.counts import operations
from memcomp.ir.expr import Access, Call, Expr, Var, conjunction, depth, reads, rebuild, substitute, variables, walk
from memcomp.ir.ops import MONOIDS, OPS

DEEPEST = 40  # of a body: the text of kernels is Python, whose parser takes 200 brackets around each other


def compose(g: GroupOps, exact: Collection[str] = ()) -> None:
    """Inline maps that one operation reads once, at the same points, and merge joined reductions into accumulations.

    exact: sums that are held finer than what a step adds to them; the sum over a step's tile stays one of its own.
    """
    changed = True
    while changed:
        uses = _uses(g)
        changed = any(_inline(g, k, uses) or (g.ops[k].target not in exact and _merge(g, k, uses))
                      for k in range(len(g.ops)))


def _uses(g: GroupOps) -> Counter[str]:
    return Counter(a.tensor for o in g.ops for a in o.accesses())


def _private(g: GroupOps, o: Op, uses: Counter[str]) -> bool:
    """Is the result read exactly once, by this kernel, and by nothing else?"""
    return (
        uses[o.target] == 1
        and o.target not in g.stores
        and o.target not in g.carried
        and sum(p.target == o.target for p in g.ops) == 1
    )


def factors(e: Expr) -> list[Expr]:
    return [f for a in e.args for f in factors(a)] if isinstance(e, Call) and e.op == "mul" else [e]


def addends(e: Expr, op: str) -> list[Expr]:
    return [f for a in e.args for f in addends(a, op)] if isinstance(e, Call) and e.op == op else [e]


def is_product(o: Op) -> bool:
    """A sum of products of data: what becomes a `Dot`."""
    return o.monoid == "sum" and len([p for p in factors(o.body) if reads(p) and variables(p) & set(o.over)]) > 1


def _inline(g: GroupOps, k: int, uses: Counter[str]) -> bool:
    """The map at `k` moves into its only reader when that runs over the same points (nothing is computed twice)."""
    o = g.ops[k]
    if o.monoid or not _private(g, o, uses):
        return False
    for j in range(k + 1, len(g.ops)):
        user = g.ops[j]
        if o.target not in user.reads():
            continue
        copy = isinstance(o.body, Access)
        if (
            user.phase != o.phase
            or not set(o.guards) <= set(user.guards)
            or (user.accumulate and not user.place)
            or set(o.dims) != set(user.points)
            or (is_product(user) and not copy)
            or depth(o.body) + depth(user.body) > DEEPEST
        ):
            return False
        read = next(a for a in user.accesses() if a.tensor == o.target)
        g.ops[j] = replace(
            user,
            body=substitute(user.body, {read: o.body}),
            guards=tuple(substitute(c, {read: o.body}) for c in user.guards),
        )
        del g.ops[k]
        return True
    return False


def _merge(g: GroupOps, k: int, uses: Counter[str]) -> bool:
    """`x = r + rest` where r is a reduction of its own: write rest into x, then reduce into x.

    The reduction moves down to its reader; it reads nothing that is written in between but carried tiles, whose old
    value is kept where needed (`keep_old`).
    """
    o = g.ops[k]
    if o.monoid or o.guards or not isinstance(o.body, Call):
        return False
    parts = addends(o.body, o.body.op)
    for p in parts:
        j = next((i for i in range(k) if isinstance(p, Access) and g.ops[i].target == p.tensor), None)
        if j is None:
            continue
        r = g.ops[j]
        if (
            (MONOIDS[r.monoid].join if r.monoid else "") != o.body.op
            or not _private(g, r, uses)
            or r.accumulate
            or r.phase != o.phase
            or set(r.dims) != set(o.dims)
        ):
            continue
        rest = list(parts)
        rest.remove(p)
        body = rest[0]
        for q in rest[1:]:
            body = Call(o.body.op, (body, q))
        joined = replace(r, target=o.target, dims=o.dims, accumulate=True)
        first = [] if body == _old(o) else [replace(o, body=body)]
        g.ops[j : k + 1] = [*g.ops[j + 1 : k], *first, joined]
        return True
    return False


def _old(o: Op) -> Access:
    return Access(o.target + OLD, tuple(Var(d) for d in o.dims))


def split_products(g: GroupOps, dtype: dict[str, str]) -> None:
    """Sums of products get two operands that are elements: what is computed in a factor becomes a tile of its own,
    before the loop where it does not move along it; of several factors those over the fewest dims go first.  An integer
    among reals is converted there.  dtype: of tiles and params."""
    for o in list(g.ops):
        if not is_product(o):
            continue
        parts = [p for p in factors(o.body) if variables(p) & set(o.over)]
        rest = [p for p in factors(o.body) if not variables(p) & set(o.over)]
        dims = {p: variables(p) & set(g.dims) for p in parts}
        while len(parts) > 2:
            i, j = min(
                combinations(range(len(parts)), 2), key=lambda two: len(dims[parts[two[0]]] | dims[parts[two[1]]])
            )
            both = Call("mul", (parts[i], parts[j]))
            dims[both] = dims[parts[i]] | dims[parts[j]]
            parts = [both, *(p for k, p in enumerate(parts) if k not in (i, j))]
        if {*o.dims, *o.over} - dims[parts[0]] - dims[parts[1]]:
            continue
        kinds = [kind(p, dtype) for p in parts]
        if "real" in kinds:
            parts = [p if k != "int" else Call("real", (p,)) for p, k in zip(parts, kinds, strict=True)]
            dims |= {p: variables(p) & set(g.dims) for p in parts}
        at = next(k for k, x in enumerate(g.ops) if x is o)
        made: list[Expr] = []
        for n, p in enumerate(parts):
            if isinstance(p, Access):
                made.append(p)
                continue
            own = tuple(d for d in lane_last(g.group, (*o.over, *o.dims)) if d in dims[p])
            if own and own[-1] != (g.group.lane or "").lower():
                own = _as_made(p, own)
            phase = o.phase if o.phase != LOOP or _moves(g, p) else PRE
            factor = Op(f"{o.target}_factor{n}", own, p, phase=phase)
            before = at if phase == o.phase else next(k for k, x in enumerate(g.ops) if x.phase > PRE)
            g.ops.insert(before, factor)
            at += 1
            made.append(Access(factor.target, tuple(Var(d) for d in own)))
        body = made[0]
        for p in (*made[1:], *rest):
            body = Call("mul", (body, p))
        g.ops[at] = replace(o, body=body)


def _as_made(e: Expr, dims: tuple[str, ...]) -> tuple[str, ...]:
    """The dims in the order in which what the expression reads has all of them."""
    for a in walk(e):
        if isinstance(a, Access):
            found = dict.fromkeys(n.name for i in a.index for n in walk(i) if isinstance(n, Var))
            if found.keys() >= set(dims):
                return tuple(d for d in found if d in dims)
    return dims


def split_costly(g: GroupOps) -> None:
    """Divisions and functions of values of fewer dims than their operation has become tiles of their own, before the
    loop where they do not move: each is computed once a point (a sum of products computes what stands beside them at
    the points of its result)."""
    known = {o.target for o in g.ops}
    for o in list(g.ops):
        made: dict[Expr, Access] = {}
        if o.when is not None:
            continue

        def part(e: Expr, o: Op = o, made: dict[Expr, Access] = made) -> Expr:
            names = variables(e) & set(g.dims)
            beside = is_product(o) and not names & set(o.over)
            if not isinstance(e, Call) or not operations(e)[1]:
                return e
            if e.op == "at" or not names < ({*o.dims} if beside else {*o.points}):
                return rebuild(e, tuple(part(a) for a in e.args))
            if e not in made:
                name = next(n for n in (f"{o.target}_once{k}" for k in count()) if n not in known)
                known.add(name)
                made[e] = Access(name, tuple(Var(d) for d in lane_last(g.group, [d for d in g.dims if d in names])))
            return made[e]

        body = part(o.body)
        for e, a in made.items():
            early = o.phase == LOOP and not _moves(g, e)
            at = next(k for k, x in enumerate(g.ops) if (x.phase > PRE if early else x is o))
            dims = tuple(i.name for i in a.index if isinstance(i, Var))
            g.ops.insert(at, Op(a.tensor, dims, e, phase=PRE if early else o.phase))
        if made:
            at = next(k for k, x in enumerate(g.ops) if x is o)
            g.ops[at] = replace(o, body=body)


def split_deep(g: GroupOps) -> None:
    """What is nested deeper than a kernel's text can say becomes tiles of its own, the innermost first."""
    for o in list(g.ops):
        if len(o.guards) <= DEEPEST and all(depth(e) <= DEEPEST for e in (o.body, *o.guards)):
            continue
        parts: list[Op] = []

        def part(e: Expr, o: Op = o, parts: list[Op] = parts) -> Access:
            own = lane_last(g.group, [d for d in (*o.dims, *o.over) if d in variables(e)])
            parts.append(Op(f"{o.target}_part{len(parts)}", own, e, phase=o.phase))
            return Access(parts[-1].target, tuple(Var(d) for d in own))

        def cut(e: Expr, part: Callable[[Expr], Access] = part) -> tuple[Expr, int]:
            """The expression over the parts, and its depth."""
            if not isinstance(e, Call):
                return e, 1
            kids = [(part(k), 1) if deep >= DEEPEST // 2 else (k, deep) for k, deep in map(cut, e.args)]
            return rebuild(e, tuple(k for k, _ in kids)), 1 + max((deep for _, deep in kids), default=0)

        body, conds = cut(o.body)[0], [cut(c)[0] for c in o.guards]
        while len(conds) > DEEPEST:
            some = conjunction(conds[: DEEPEST // 2])
            assert some is not None
            conds[: DEEPEST // 2] = [part(some)]
        at = next(k for k, x in enumerate(g.ops) if x is o)
        g.ops[at : at + 1] = [*parts, replace(o, body=body, guards=tuple(conds))]


def _moves(g: GroupOps, e: Expr) -> bool:
    """Does the expression change along the loop: by its variable, dims cut along it, or what it reads?"""
    roots = [x for o in g.ops for a in o.accesses() for x in a.index] + [c for o in g.ops for c in o.guards]
    streamed = {g.loop} | {v for x in roots if g.loop in variables(x) for v in variables(x) & set(g.dims)}
    inside = {o.target for o in g.ops if o.phase == LOOP} | {n + OLD for n in g.carried}
    return bool(variables(e) & streamed or reads(e) & inside)


def keep_old(g: GroupOps) -> None:
    """Resolve `X@old`: the carry tile itself until it is overwritten, a copy where it is read later than that."""
    for name in g.carried:
        old = name + OLD
        writes = [k for k, o in enumerate(g.ops) if o.target == name and o.phase == LOOP]
        if not writes:
            continue
        first = writes[0]
        late = [k for k, o in enumerate(g.ops) if old in o.reads() and (k > first or (k == first and o.monoid))]
        copy = f"{name}_old"
        for k, o in enumerate(g.ops):
            if old in o.reads():
                g.ops[k] = _rename(o, old, copy if k in late else name)
        if late:
            dims = g.ops[first].dims
            body = Access(name, tuple(Var(d) for d in dims))
            g.ops.insert(first, Op(copy, dims, body, phase=LOOP))


def _rename(o: Op, old: str, new: str) -> Op:
    table: dict[Expr, Expr] = {a: Access(new, a.index) for a in o.accesses() if a.tensor == old}
    return replace(o, body=substitute(o.body, table), guards=tuple(substitute(c, table) for c in o.guards))


def buffers(g: GroupOps, dtype: dict[str, str]) -> dict[str, str]:
    """Which buffer holds each tile: a map takes over the buffer of an operand that it is the last to read."""
    home = {o.target: o.target for o in g.ops}
    for k, o in enumerate(g.ops):
        if o.monoid or o.accumulate or o.target in g.carried or home[o.target] != o.target:
            continue
        if any(p.target == o.target for p in g.ops[:k]):
            continue
        for a in o.accesses():
            x = a.tensor
            if x.endswith("'") or (x in g.carried and x in g.stores):
                continue  # stored at the end
            made = [i for i, p in enumerate(g.ops) if p.target == x]
            last = max((i for i, p in enumerate(g.ops) if x in p.reads()), default=-1)
            if not made or last != k or g.ops[made[-1]].dims != o.dims or dtype[x] != dtype[o.target]:
                continue
            if (
                all(g.ops[i].phase == o.phase for i in made)
                and x not in g.carried
                or (x in g.carried and o.phase == POST)
            ):
                home[o.target] = home[x]
                break
    return home


def kind(e: Expr, dtype: dict[str, str]) -> str:
    """What a body computes: bool, int or real; "" where it rests on tiles whose kind is not known yet."""
    if isinstance(e, Access):
        d = dtype.get(e.tensor.removesuffix(OLD), "")
        return "" if not d else "bool" if d == "bool" else "int" if d[0] in "iu" else "real"
    if isinstance(e, Call):
        result = OPS[e.op].result
        if result != "same":
            return result
        kinds = {kind(a, dtype) for a in (e.args[1:] if e.op == "where" else e.args)}
        return "real" if "real" in kinds else "" if "" in kinds else "int" if "int" in kinds else "bool"
    value = getattr(e, "value", 0)
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
