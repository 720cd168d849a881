"""Which exponentials and the like may be rough: those that reach bf16 outputs only, with the error they have.

A relative error of a weight is one of every term of a sum, so of the sum at most; it passes through products and
quotients as it is, also below the line where nothing can cancel there (a sum of what is not negative).  At 2**-12 it is
an eighth of what rounding a bf16 result costs (`rounding`).  Values that steps multiply up (the factors of a running
frame) stay exact: errors of one after the other would add up.

A rough function errs by at most, `ERROR`, relative; tanh absolute.  Inside an exponential an absolute error becomes a
relative one: 20 tanh(x) errs by 20 times as much.
"""

from __future__ import annotations

from collections.abc import Iterable

from memcomp.codegen.rounding import linear_in
from memcomp.ir.expr import Access, Call, Const, Expr, call, reads, transform, walk
from memcomp.ir.tile import (
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    TileProgram,
    When,
    expressions,
    joins,
    made,
)

ERROR = {"exp": 2.0**-13, "exp2": 2.0**-13, "sigmoid": 2.0**-12, "tanh": 2.0**-18}
STEEP = 2.0**-13 / ERROR["tanh"]  # the largest factor of tanh in an exponent
_NONNEGATIVE = ("exp", "exp2", "sigmoid", "square", "abs", "sqrt", "relu")
Writers = dict[tuple[int, str], set[int]]


def rough(tp: TileProgram) -> dict[int, frozenset[Expr]]:
    """`id` of a map or sum -> the calls in its body that may be rough.

    The statements must be those of `tp` itself, which lives as long as what is returned.
    """
    if not any(p.dtype == "bf16" for p in tp.params if p.role == "out"):
        return {}
    flow = _Flow(tp)
    found = {}
    for n, (_, s) in flow.all.items():
        if isinstance(s, Map) and (calls := _relative(s.body)) and flow.weighs(n):
            found[n] = frozenset(calls)
    return found


def _relative(e: Expr) -> set[Expr]:
    """Calls in a value whose relative errors, 2**-12 of them together, are the value's."""
    if not isinstance(e, Call):
        return set()
    if e.op in ("exp", "exp2", "sigmoid"):
        return {e} | (_absolute(e.args[0], 1.0) if e.op != "sigmoid" else set())
    if e.op == "where":
        return _relative(e.args[1]) | _relative(e.args[2])
    if e.op in ("mul", "div"):  # one of both sides: two errors would be twice as much
        scale = [a for a in e.args if isinstance(a, Const)]
        return next((found for a in e.args if (found := _relative(a))), set()) if scale or e.op == "mul" else set()
    return set()


def _absolute(e: Expr, by: float) -> set[Expr]:
    """Calls in an exponent, of which `by` times the value is taken, whose absolute errors may be those of tanh."""
    if not isinstance(e, Call):
        return set()
    if e.op == "tanh":
        return {e} if by <= STEEP else set()
    if e.op in ("add", "sub"):
        return next((found for a in e.args if (found := _absolute(a, by))), set())
    if e.op in ("mul", "div"):
        for k, a in enumerate(e.args):
            if isinstance(a, Const) and a.value and (e.op == "mul" or k):
                size = abs(float(a.value))
                return _absolute(e.args[1 - k], by * size if e.op == "mul" else by / size)
    return set()


class _Flow:
    """Who reads what whom has written: statements are named by their `id`."""

    def __init__(self, tp: TileProgram) -> None:
        self.tp = tp
        self.all: dict[int, tuple[TileKernel, Statement]] = {}
        self.writers: Writers = {}  # (statement, tile) -> the statements whose value it may read there
        self.loads: dict[str, list[int]] = {}
        for k in tp.kernels:
            self._block(k, k.body, {})
        self.readers: dict[int, set[tuple[int, str]]] = {}
        for (n, tile), writers in self.writers.items():
            for m in writers:
                self.readers.setdefault(m, set()).add((n, tile))

    def _block(self, k: TileKernel, body: Iterable[Statement], last: dict[str, set[int]]) -> dict[str, set[int]]:
        tiles = {t.name for t in k.tiles}
        for s in body:
            self.all[id(s)] = k, s
            again = joins(s)
            touched = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access)} & tiles
            touched |= {s.tile} if isinstance(s, Store) else {*made(s)} if again else set()
            for t in touched:
                self.writers.setdefault((id(s), t), set()).update(last.get(t, ()))
            if isinstance(s, Loop):
                for _ in range(2):  # once more with what a step leaves to the next
                    last = _joined(last, self._block(k, s.body, dict(last)))
            elif isinstance(s, When):
                last = _joined(self._block(k, s.body, dict(last)), self._block(k, s.orelse, dict(last)))
            elif not isinstance(s, Store):
                last = {**last, **{t: {id(s)} | (last.get(t, set()) if again else set()) for t in made(s)}}
                if isinstance(s, Load):
                    self.loads.setdefault(s.source.tensor, []).append(id(s))
        return last

    def weighs(self, n: int) -> bool:
        """Do only sums read the value, and does what comes of them reach bf16 outputs with its relative error?"""
        return all(isinstance(self.all[m][1], (Fold, Dot)) and self._passes(m, tile, set())
                   for m, tile in self.readers.get(n, ()))

    def _passes(self, n: int, tile: str, seen: set[tuple[int, str]]) -> bool:
        """Does the statement hand on the relative error of a tile it reads, to bf16 outputs and to nothing else?"""
        if (n, tile) in seen:
            return True
        seen.add((n, tile))
        _, s = self.all[n]
        if isinstance(s, Store):
            p = self.tp.param(s.target.tensor)
            if s.tile != tile or any(tile in reads(i) for i in expressions(s)):
                return False
            return p.dtype == "bf16" if p.role != "work" else all(self._onward(m, seen) for m in self.loads[p.name])
        if isinstance(s, Dot):
            return (s.a.tensor == tile) + (s.b.tensor == tile) + (s.tile == tile) == 1 and self._onward(n, seen)
        if isinstance(s, Map) or isinstance(s, Fold) and s.monoid == "sum":
            if isinstance(s, Fold) and s.accumulate and s.tile == tile and tile not in reads(s.body):
                return self._onward(n, seen)
            below = {x.args[1] for x in walk(s.body) if isinstance(x, Call) and x.op == "div"
                     and self._nonnegative(x.args[1], n, set())}
            body = transform(s.body, lambda x: call("mul", *x.args)
                             if isinstance(x, Call) and x.op == "div" and x.args[1] in below else x)
            return tile in linear_in(body) and self._onward(n, seen)
        return False

    def _onward(self, n: int, seen: set[tuple[int, str]]) -> bool:
        return all(self._passes(m, tile, seen) for m, tile in self.readers.get(n, ()))

    def _nonnegative(self, e: Expr, at: int, seen: set[int]) -> bool:
        """Is what a statement reads never below 0?"""
        if isinstance(e, Const):
            return e.value >= 0
        if isinstance(e, Access):
            made = self.writers.get((at, e.tensor), set())
            return bool(made) and all(self._made_nonnegative(n, seen) for n in made)
        if not isinstance(e, Call):
            return False
        if e.op in _NONNEGATIVE:
            return True
        inside = e.args[1:] if e.op == "where" else e.args
        return e.op in ("add", "mul", "div", "max", "where") and all(self._nonnegative(a, at, seen) for a in inside)

    def _made_nonnegative(self, n: int, seen: set[int]) -> bool:
        if n in seen:
            return True
        seen.add(n)
        _, s = self.all[n]
        if isinstance(s, (Fold, Dot)) and s.accumulate and not all(
                self._made_nonnegative(m, seen) for m in self.writers.get((n, s.tile), ())):
            return False
        summed = isinstance(s, Map) or isinstance(s, Fold) and s.monoid in ("sum", "max") or isinstance(s, Dot)
        return summed and all(self._nonnegative(e, n, seen) for e in expressions(s))


def _joined(a: dict[str, set[int]], b: dict[str, set[int]]) -> dict[str, set[int]]:
    return {t: a.get(t, set()) | b.get(t, set()) for t in {*a, *b}}
