"""Loops with products, without a branch round them: Triton fetches ahead only in loops that always do the same.

A step that may be left out is so by the ends of its loop.  Where the guard is known of a step (sinks and a window), the
loop becomes two, one on each side of the gap.  Where data decide (documents), a loop that reads only them finds the
first and the last step that count; those between do right, though some for nothing.  Branches inside a step that only
spare masks are left to `parts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from memcomp.codegen.triton.parts import edge, fixed, product
from memcomp.ir.expr import Access, Call, Expr, Var, call
from memcomp.ir.tile import Loop, Map, Statement, Tile, TileKernel, When, statements


def straight(k: TileKernel) -> TileKernel:
    """The kernel with whole steps spared by the ends of loops, in loops that hold products."""
    tiles = list(k.tiles)
    body = tuple(_written(k, k.body, tiles))
    return k if body == k.body else replace(k, body=body, tiles=tuple(tiles))


def _written(k: TileKernel, body: tuple[Statement, ...], tiles: list[Tile]) -> Iterator[Statement]:
    for s in body:
        if not isinstance(s, Loop):
            yield s
        elif isinstance(last := s.body[-1] if s.body else None, When) and last.spare and not last.orelse and product(s):
            yield from _trimmed(k, s, last, tiles)
        else:
            yield replace(s, body=tuple(_written(k, s.body, tiles)))


def _trimmed(k: TileKernel, s: Loop, guard: When, tiles: list[Tile]) -> Iterator[Statement]:
    """`s`, whose body ends in a guard of all that it does."""
    head, plain = s.body[:-1], replace(s, body=(*s.body[:-1], *guard.body))
    if (gap := _gap(k, s, guard.cond)) is not None:
        before, after = gap
        middle = call("min", before, s.hi)
        yield replace(plain, hi=middle)
        yield replace(plain, lo=call("max", call("max", after, middle), s.lo))
        return
    names = {t.name for t in tiles} | {d.name for d in k.dims} | {v for v, _ in k.grid} | {s.var} | {
        x.var for x in statements(k.body) if isinstance(x, Loop)}
    first, last = _fresh("first", names), _fresh("last", names)
    tiles += [Tile(first, (), "i64"), Tile(last, (), "i64")]
    begun, ended, at = Access(first, ()), Access(last, ()), Var(s.var)
    yield Map(first, s.hi)
    yield Map(last, s.lo)
    yield replace(s, body=(*head, Map(first, call("where", guard.cond, call("min", begun, at), begun)),
                           Map(last, call("where", guard.cond, call("add", at, 1), ended))))
    yield replace(plain, lo=begun, hi=ended)


def _gap(k: TileKernel, s: Loop, cond: Expr) -> tuple[Expr, Expr] | None:
    """(b, a): the condition holds before step b and from step a on; None where it is not of this kind."""
    if not isinstance(cond, Call) or cond.op != "or" or len(cond.args) != 2:
        return None
    integers, dims = fixed(k, s), {d.name for d in k.dims}
    edges = dict(e for a in cond.args if (e := edge(a, s.var, integers, dims)) is not None)
    return (edges[True], edges[False]) if len(edges) == 2 else None


def _fresh(stem: str, names: set[str]) -> str:
    name = next(n for n in (stem, *(f"{stem}{i}" for i in range(2, len(names) + 3))) if n not in names)
    names.add(name)
    return name
