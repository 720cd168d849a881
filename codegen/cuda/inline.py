"""Tiles that need no registers: each number is computed of what was loaded where a reduction reads it."""

from __future__ import annotations

from dataclasses import dataclass

from memcomp.ir.expr import Access, Call, Expr, walk
from memcomp.ir.tile import (
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    When,
    expressions,
    joins,
    statements,
)
from memcomp.ir.tile import made as tiles_of


@dataclass(frozen=True, slots=True)
class Inline:
    """body: what a number is, of loaded tiles alone; over: the dims that the reduction sums over."""

    body: Expr
    over: tuple[str, ...]


def inlined(k: TileKernel) -> dict[str, Inline]:
    """Tiles that one statement computes, of tiles that a load alone fills, and that one reduction beside it reads."""
    writers: dict[str, list[Statement]] = {}
    readers: dict[str, list[Statement]] = {}
    for s in statements(k.body):
        for t in tiles_of(s):
            writers.setdefault(t, []).append(s)
        for t in reads(s):
            readers.setdefault(t, []).append(s)
    loaded = {t for t, (s, *more) in writers.items() if isinstance(s, Load) and not more}
    found: dict[str, Inline] = {}
    for body in _bodies(k.body):
        made: dict[str, Expr] = {}
        for s in body:
            if isinstance(s, (Fold, Dot)):
                found.update({t: Inline(made[t], s.over) for t in reads(s) & made.keys() if len(readers[t]) == 1})
            if isinstance(s, Map) and len(writers[s.tile]) == 1 and reads(s) and reads(s) <= loaded:
                made[s.tile] = s.body
    return found


def _bodies(body: tuple[Statement, ...]) -> list[tuple[Statement, ...]]:
    found = [body]
    for s in body:
        if isinstance(s, (Loop, When)):
            found += _bodies(s.body)
        if isinstance(s, When):
            found += _bodies(s.orelse)
    return found


def reads(s: Statement) -> set[str]:
    """Names of the tiles and params that a statement itself reads."""
    more = [s.target] if isinstance(s, Store) else []
    found = {n.tensor for e in (*expressions(s), *more) for n in walk(e) if isinstance(n, Access)}
    return found | ({s.tile} if isinstance(s, Store) else {*tiles_of(s)} if joins(s) else set())


def substituted(e: Expr, table: dict[str, Inline]) -> Expr:
    """An expression with what tiles are computed of in their places."""
    if isinstance(e, Access):
        return table[e.tensor].body if e.tensor in table else e
    return Call(e.op, tuple(substituted(a, table) for a in e.args)) if isinstance(e, Call) else e
