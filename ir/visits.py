"""Points that the loops of a nest visit: what guards leave of every statement's readers, not of itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from memcomp.ir.cascade import Einsum
from memcomp.ir.counts import Sizes, fraction
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, substitute, variables, walk
from memcomp.ir.simplify import linear


class Visits:
    """Statements of a group whose loops are `loops`, of which `steps` are the sequential ones.

    A point that is needed for nothing is not visited: loops begin and end where a guard of all that is summed in their
    steps first and last holds, and so do the statements that only such sums read.  A statement that lacks a dim of the
    guard is made where the guard holds for some point of that dim's tile, and so is one whose dim the mapping cuts: its
    tile is made as a whole.
    cut: variables that the mapping cuts into `v1` and `v0`, with their tiles.  extent: of a variable, cut or not.
    """

    def __init__(self, n: Sizes, einsums: Sequence[Einsum], loops: Sequence[str], steps: set[str],
                 cut: dict[str, int], extent: Callable[[str], int]) -> None:
        self.n, self.loops, self.steps, self.cut, self.extent = n, set(loops), steps, cut, extent
        self.guards = self._guards(einsums)
        sums = [self.guards[e.names[0]] for e in einsums if e.reduce is not None and e.names[0] in self.guards]
        self.common = _in_all(sums)

    def points(self, e: Einsum) -> float:
        """Points of a statement that are visited; of one outside the steps those that its guard leaves."""
        if e.names[0] not in self.guards:
            return self.n.live(e)
        conds = self._conditions(self.common | self.guards[e.names[0]], set(e.space()) - self.cut.keys())
        return self.n.points(e.space()) * self._share(conds)

    def share(self) -> float:
        """The share of the steps that are made."""
        return self._share(self._conditions(self.common, set()))

    def _conditions(self, conds: Iterable[Expr], own: set[str]) -> list[Expr]:
        """The same over loops and the variables in `own`: may it hold somewhere in the other dims of the tile?"""
        tests = list[Expr]()
        for c in sorted((self._tiled(c, own) for c in conds), key=str):
            inside = sorted(variables(c) - self.loops - own)
            corners = product(*((0, self.extent(v) - 1) for v in inside))
            some: list[Expr] = [substitute(c, {Var(v): Const(x) for v, x in zip(inside, at, strict=True)})
                                for at in corners]
            tests.append(some[0] if len(some) == 1 else call("or", *some))
        return tests

    def _share(self, conds: list[Expr]) -> float:
        names = sorted({v for c in conds for v in variables(c)})
        return fraction(tuple(conds), tuple((v, self.extent(v)) for v in names)) if conds else 1.0

    def _guards(self, einsums: Sequence[Einsum]) -> dict[str, frozenset[Expr]]:
        """Of each statement in a step what holds wherever it is needed: its own guard, and that of all its readers."""
        found: dict[str, frozenset[Expr]] = {}
        later: list[Einsum] = []
        for e in reversed(einsums):
            if not self._split(set(e.space())) & self.steps:
                continue
            own = frozenset(c for c in e.guards() if _tests_tiles(c))
            ways = [(u, a) for u in later for x in (u.body, *u.guards()) for a in walk(x)
                    if isinstance(a, Access) and a.tensor in e.names]
            if ways and all(a.index == e.out.index for _, a in ways):
                own |= _in_all([found[u.names[0]] for u, _ in ways])
            found[e.names[0]] = own
            later.append(e)
        return found

    def _split(self, names: set[str]) -> set[str]:
        return {part for v in names for part in ((v + "1", v + "0") if v in self.cut else (v,))}

    def _tiled(self, c: Expr, whole: set[str]) -> Expr:
        known: dict[Expr, Expr] = {x: Const(self.n(x.rank)) for x in walk(c) if isinstance(x, Size)}
        parts: dict[Expr, Expr] = {Var(v): Var(v + "1") * size + Var(v + "0") for v, size in self.cut.items()
                                   if v not in whole}
        return substitute(substitute(c, known), parts)


def _in_all(sets: Sequence[frozenset[Expr]]) -> frozenset[Expr]:
    return frozenset(x for x in sets[0] if all(x in s for s in sets)) if sets else frozenset()


def _tests_tiles(c: Expr) -> bool:
    """Can a loop tell where the condition is false on a whole tile: inequalities linear in indices, also joined?"""
    if isinstance(c, Call) and c.op in ("and", "or"):
        return all(map(_tests_tiles, c.args))
    if not isinstance(c, Call) or c.op not in ("lt", "le", "gt", "ge") or reads(c):
        return False
    terms = linear(c.args[0] - c.args[1])
    return terms is not None and all(t is None or isinstance(t, (Var, Size)) or not variables(t) or _scaled(t)
                                     for t in terms)


def _scaled(t: Expr) -> bool:
    """An index times sizes."""
    return isinstance(t, Call) and t.op == "mul" and all(isinstance(a, (Var, Size)) or _scaled(a) for a in t.args) \
        and len(variables(t)) == 1

