"""Statements of a kernel as text: what they touch, and branches on one condition made one branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memcomp.ir.expr import call, reads
from memcomp.ir.tile import Fold, Statement, Store, When, expressions, joins, made, statements

Body = tuple[Statement, ...]


def read(s: Statement) -> set[str]:
    """Names of tiles and params that a statement reads."""
    out = set[str]()
    for x in statements((s,)):
        out = out.union(*map(reads, expressions(x)))
        out |= {x.tile} if isinstance(x, Store) else {*made(x)} if joins(x) else set()
    return out


def written(s: Statement) -> set[str]:
    return {n for x in statements((s,)) for n in ((x.target.tensor,) if isinstance(x, Store) else made(x))}


def touched(s: Statement) -> set[str]:
    return read(s) | written(s)


def branches_joined(body: Sequence[Statement]) -> Body:
    """The same work, with later branches on a condition joined to the first one, where what stands between allows it,
    and with a reduction of what a branch makes inside of it: each tile of points is walked once."""
    out: list[Statement] = []
    for s in body:
        for k, first in enumerate(out):
            if isinstance(first, When) and not any(_depends(s, x) for x in out[k + 1:]):
                if isinstance(s, When) and s.cond == first.cond:
                    out[k] = When(s.cond, (*first.body, *s.body), (*first.orelse, *s.orelse), first.spare and s.spare)
                    break
                if isinstance(s, Fold) and first.orelse and written(first) & reads(s.body):
                    out[k] = _with(first, s)
                    break
        else:
            out.append(s)
    return tuple(_tidy(s) if isinstance(s, When) else s for s in out)


def _with(w: When, s: Fold) -> When:
    """The branch with a fold at the end of each side."""
    sides = [(*side[:-1], _with(side[-1], s)) if side and isinstance(side[-1], When) and side[-1].orelse else (*side, s)
             for side in (w.body, w.orelse)]
    return replace(w, body=sides[0], orelse=sides[1])


def _tidy(w: When) -> When:
    """Sides joined in turn, and none that is empty stands first."""
    body, orelse = branches_joined(w.body), branches_joined(w.orelse)
    return replace(w, body=body, orelse=orelse) if body or not orelse else \
        replace(w, cond=call("not", w.cond), body=orelse, orelse=())


def _depends(late: Statement, early: Statement) -> bool:
    """May the two not change places?"""
    return bool(written(early) & touched(late) or written(late) & read(early))
