"""Fixed extents that a kernel need not know become run-time symbols: equal layers and other lengths share it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from memcomp.ir.cascade import Cascade, Einsum, extent_of
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, substitute, variables, walk
from memcomp.ir.program import Program
from memcomp.ir.simplify import linear, simplify
from memcomp.passes._roles import HELD, WHOLE, accesses, out_vars, product_operands

SMALL = 8  # a group of at most so many rows stays a number: it is unrolled
FEATURES = HELD  # a contraction of at most so many terms stays a number: it is a tile


def generalize(program: Program) -> Program:
    """Ranks that run in parallel or are streamed lose their number; what shapes the code keeps it.

    Kept: contractions, features of a result that other statements lack, small groups, groups of one sum, what a chain
    of reductions runs over beside a longer rank, and every rank whose number an index relies on.  Where an index ties
    ranks together (`j*3 + g`) the outer one is derived from the others.

    before:
        program p
        rank J = 2
        rank G = 3
        rank H = 6
        rank M = 100
        rank E = 8
        in Q[H, E]: f32
        in K[J, M, E]: f32
        out GM[H]: f32
        S[j, g, m] = sum{e} Q[j*3 + g, e] * K[j, m, e]
        GM[j*3 + g] = max{m} S[j, g, m]
    after:
        program p
        rank J
        rank G = 3
        rank H = J*3
        rank M
        rank E = 8
        in Q[H, E]: f32
        in K[J, M, E]: f32
        out GM[H]: f32
        S[j, g, m] = sum{e} Q[j*3 + g, e] * K[j, m, e]
        GM[j*3 + g] = max{m} S[j, g, m]
    """
    c = program.cascade
    free = _free(c)
    derived: dict[str, Expr] = {}
    while True:
        pinned = _tie(c, free, derived)
        if not pinned:
            break
        free -= pinned
        derived = {}
    if not free:
        return program
    ranks = tuple(
        replace(r, extent=derived[r.name]) if r.name in derived else replace(r, extent=None) if r.name in free else r
        for r in c.ranks
    )
    return replace(program, cascade=replace(c, ranks=ranks))


def numbers(program: Program, sizes: Mapping[str, int]) -> set[str]:
    """Symbolic ranks that should be numbers: with the extents in `sizes` they would not have become symbols, or an
    index is divided by them (heads of a group).

    sizes: an extent for each symbolic rank.
    """
    c = program.cascade
    symbols = {r.name for r in c.ranks if r.extent is None and r.name in sizes}
    # a symbol that happens to be small now is not a small group
    ranks = tuple(replace(r, extent=Const(max(sizes[r.name], SMALL + 1))) if r.name in symbols else r for r in c.ranks)
    divisors = {
        size.rank
        for e in c.einsums
        for a in (*accesses(e), *e.outs)
        for i in a.index
        for n in walk(i)
        if isinstance(n, Call) and n.op in ("floordiv", "mod")
        for size in walk(n.args[1])
        if isinstance(size, Size)
    }
    return symbols & divisors | symbols - _free(replace(c, ranks=ranks))


def _free(c: Cascade) -> set[str]:
    """Ranks with a number that is only a length: streamed, or common to all reductions; and ranks only indexed."""
    fixed = {r.name for r in c.ranks if extent_of(c, r.name) is not None}
    made = {v for e in c.einsums for v in out_vars(e)}
    reduced = {v for e in c.einsums for v in (e.reduce.over if e.reduce else ())}
    sums = [(e, set(e.reduce.over)) for e in c.einsums if e.reduce]
    kinds = {(frozenset(out_vars(e)), frozenset(over)) for e, over in sums}  # alike in every layer
    inner = {v for outs, over in kinds for _, more in kinds if outs & (more - over) for v in over - more}
    parts = _parts(kinds)
    beside = _beside(c, sums)
    # inner: of what makes what others walk
    products = inner | {v for e, over in sums if product_operands(e) for v in over}
    products -= {v for e, over in sums if not product_operands(e) for v in over - inner}  # a chain of reductions
    guarded = {v for e in c.einsums for g in e.guards() for v in variables(g)}
    # what is computed of inputs alone, element by element (a stored number times its scale), is made where it is read
    given = {t.name for t in c.inputs()}
    late = {v for e in c.einsums if e.reduce or e.reads() - given or set(e.names) & {t.name for t in c.outputs()}
            for v in out_vars(e)}
    streamed = {v for v in reduced - parts
                if v in late or v not in products or (extent_of(c, v.upper()) or 0) > FEATURES}
    core = [e for e in c.einsums if e.reduce and (set(e.reduce.over) & streamed or product_operands(e))] or list(
        c.einsums
    )
    shared = (
        set.intersection(*(set(out_vars(e)) | set(e.reduce.over if e.reduce else ()) for e in core)) if core else set()
    )
    rows = _rows(core, streamed, shared)
    out = set()
    for r in sorted(fixed):
        v, n = r.lower(), extent_of(c, r) or 0
        if v in parts and n <= WHOLE or v in beside and n <= HELD:
            continue
        iterated = v in made | reduced
        if not iterated or v in streamed or (v in shared and not (v in rows and n <= SMALL and v not in guarded)):
            out.add(r)
    return out


def _parts(kinds: Collection[tuple[frozenset[str], frozenset[str]]]) -> set[str]:
    """Variables that are summed only together with what was reduced for each of them before: groups of one sum, each
    of which is finished with its own values and then joined.  kinds: variables of results, and those reduced."""
    found = {v for outs, over in kinds for _, more in kinds if over & more for v in outs & more}
    return {v for v in found if all(v not in more or any(v in outs and over & more for outs, over in kinds)
                                    for _, more in kinds)}


def _beside(c: Cascade, sums: list[tuple[Einsum, set[str]]]) -> set[str]:
    """Of ranks that a chain of reductions runs over together all but the longest, which is the one to be streamed."""
    again: set[str] = set()
    for v in {v for _, over in sums if len(over) > 1 for v in over}:
        late: set[str] = set()
        for e in c.einsums:
            mine = e.reduce is not None and v in e.reduce.over
            waits = bool(e.reads() & late)
            again |= {v} if mine and waits else set()
            late |= set(e.names) if mine or waits else set()
    together = [sorted(over & again, key=lambda v: extent_of(c, v.upper()) or math.inf) for _, over in sums]
    return {v for vs in together for v in vs[:-1]}


def _rows(core: list[Einsum], streamed: set[str], shared: set[str]) -> set[str]:
    """Shared ranks that a streamed operand of a product lacks: one element of it serves them all."""
    operands = [a for e in core for a in product_operands(e) if variables(a) & streamed]
    return {v for v in shared if any(v not in variables(a) for a in operands)}


def _tie(c: Cascade, free: set[str], derived: dict[str, Expr]) -> set[str]:
    """Ranks that must keep their number after all, because an index relies on it; fills `derived` on the way."""
    iterated = {v.upper() for e in c.einsums for v in e.space()}
    named: set[str] = set()  # ranks that some index reaches
    pinned: set[str] = set()
    for e in c.einsums:
        for a in (*accesses(e), *e.outs):
            for rank, i in zip(_ranks(c, a), a.index, strict=False):
                named.add(rank)
                ranks = {v.upper() for v in variables(i)}
                if i == Var(rank.lower()) or any(isinstance(n, Access) for n in walk(i)) or not (ranks | {rank}) & free:
                    continue
                tied = _relation(c, rank, i, iterated)
                if tied is None or derived.get(tied[0], tied[1]) != tied[1] or tied[0] not in free:
                    pinned |= (ranks | {rank}) & free
                else:
                    derived[tied[0]] = tied[1]
                    pinned |= {v.upper() for v in variables(i) if _stays(c, v, i)} & free
    given = {r for t in c.inputs() for r in t.ranks}
    pinned |= {r for r in free if r not in named | set(derived) or r not in given | set(derived)}
    for r, x in derived.items():  # no circles, and numbers stay where everything they rest on does
        sizes = {n.rank for n in walk(x) if isinstance(n, Size)}
        if sizes & set(derived) or not sizes & free:
            pinned.add(r)
    return pinned & free


def _ranks(c: Cascade, a: Access) -> tuple[str, ...]:
    """Ranks of the tensor; none where only constants index it (it is a scalar then)."""
    try:
        return c.tensor(a.tensor).ranks
    except KeyError:
        return ()


def _relation(c: Cascade, rank: str, i: Expr, iterated: set[str]) -> tuple[str, Expr] | None:
    """(rank to derive, its extent) when the index exactly covers the rank, for the numbers that there are now."""
    n = extent_of(c, rank)
    if isinstance(i, Call) and i.op == "floordiv" and isinstance(i.args[0], Var) and isinstance(i.args[1], Const):
        outer, k = i.args[0].name.upper(), i.args[1].value
        if n is not None and isinstance(k, int) and extent_of(c, outer) == n * k:
            return outer, simplify(Size(rank) * k)
        return None
    if isinstance(i, Var) and n is not None and extent_of(c, i.name.upper()) == n:
        return i.name.upper(), Size(rank)
    terms = linear(i)
    if terms is None or n is None or rank in iterated or not variables(i):
        return None
    extent: Expr = Const(terms.get(None, 0) + 1)
    for term, k in terms.items():
        if term is None:
            continue
        if not isinstance(term, Var) or k <= 0 or extent_of(c, term.name.upper()) is None:
            return None
        extent = extent + (Size(term.name.upper()) - 1) * k
    fixed: dict[Expr, Expr] = {
        Size(r.name): Const(extent_of(c, r.name) or 0) for r in c.ranks if extent_of(c, r.name) is not None
    }
    if simplify(substitute(extent, fixed)) != Const(n):
        return None
    small: dict[Expr, Expr] = {Size(v.upper()): fixed[Size(v.upper())] for v in variables(i) if _stays(c, v, i)}
    return rank, simplify(substitute(extent, small))


def _stays(c: Cascade, v: str, i: Expr) -> bool:
    """Is the number of this rank written into the index as the stride of another (`j*3 + g`: G is 3)?"""
    terms = linear(i) or {}
    mine = terms.get(Var(v), 0)
    n = extent_of(c, v.upper()) or 0
    return any(t is not None and t != Var(v) and k == mine * n for t, k in terms.items())
