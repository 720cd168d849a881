"""Statements of a kernel as text: what they touch, and branches on one condition made one branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memcomp.ir.expr import Expr, reads
from memcomp.ir.tile import Dot, Fold, Loop, Map, Statement, Store, When

Body = tuple[Statement, ...]


def statements(body: Sequence[Statement]) -> list[Statement]:
    """All of them, inner ones after the loop or branch that they stand in."""
    out: list[Statement] = []
    for s in body:
        out += [s, *statements(s.body if isinstance(s, (Loop, When)) else ())]
        out += statements(s.orelse) if isinstance(s, When) else []
    return out


def expressions(s: Statement) -> list[Expr]:
    """Those of the statement itself, not of inner ones."""
    found = (getattr(s, n, None) for n in ("body", "source", "target", "a", "b", "cond", "lo", "hi", "mask"))
    return [e for e in found if e is not None and not isinstance(e, tuple)]


def read(s: Statement) -> set[str]:
    """Names of tiles and params that a statement reads."""
    out = set[str]()
    for x in statements((s,)):
        out = out.union(*map(reads, expressions(x)))
        if isinstance(x, Store) or (isinstance(x, (Fold, Dot)) and x.accumulate):
            out.add(x.tile)
    return out


def written(s: Statement) -> set[str]:
    return {x.target.tensor if isinstance(x, Store) else x.tile
            for x in statements((s,)) if not isinstance(x, (Loop, When))}


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
                    out[k] = When(s.cond, branches_joined((*first.body, *s.body)),
                                  branches_joined((*first.orelse, *s.orelse)))
                    break
                if isinstance(s, Fold) and (both := _into(first, s)) is not None:
                    out[k] = both
                    break
        else:
            out.append(s)
    return tuple(out)


def _depends(late: Statement, early: Statement) -> bool:
    """May the two not change places?"""
    return bool(written(early) & touched(late) or written(late) & read(early))


def _into(w: When, s: Fold) -> When | None:
    """The branch with a fold at the end of each side, if each makes what it folds."""
    sides: list[Body] = []
    for side in (w.body, w.orelse):
        last = side[-1] if side else None
        if isinstance(last, When):
            inner = _into(last, s)
            if inner is None:
                return None
            sides.append((*side[:-1], inner))
        elif any(isinstance(x, Map) and x.tile in reads(s.body) for x in side):
            sides.append((*side, s))
        else:
            return None
    return replace(w, body=sides[0], orelse=sides[1])
