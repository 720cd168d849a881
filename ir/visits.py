"""Points that the loops of a nest visit: what guards leave of every statement's readers, not of itself alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

from memcomp.ir.cascade import Einsum
from memcomp.ir.counts import Sizes, fraction
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, substitute, symbols, variables, walk
from memcomp.ir.poly import spell
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
        self.n, self.loops, self.steps, self.cut, self.extent = n, frozenset(loops), steps, cut, extent
        self.guards = self._guards(einsums)
        sums = [self.guards[e.names[0]] for e in einsums if e.reduce is not None and e.names[0] in self.guards]
        self.common = _in_all(sums)

    def points(self, e: Einsum) -> float:
        """Points of a statement that are visited; of one outside the steps those that its guard leaves."""
        if e.names[0] not in self.guards:
            return self.n.live(e)
        own = frozenset(e.space()).difference(self.cut)
        return self.n.points(e.space()) * self._share(self.common | self.guards[e.names[0]], own)

    def share(self) -> float:
        """The share of the steps that are made."""
        return self._share(self.common, frozenset())

    def _share(self, conds: frozenset[Expr], own: frozenset[str]) -> float:
        names = sorted(frozenset[str]().union(*map(symbols, conds)))
        cut = tuple((v, self.cut[v]) for v in names if v in self.cut)
        parts = {v: self.extent(v) for name in names if name == name.lower()
                 for v in ((name + "1", name + "0") if name in self.cut and name not in own else (name,))}
        return _share(conds, own, self.loops.intersection(parts), cut, tuple(parts.items()),
                      tuple((r, self.n(r)) for r in names if r != r.lower()))

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


@lru_cache(maxsize=4096)
def _share(conds: frozenset[Expr], own: frozenset[str], loops: frozenset[str], cut: tuple[tuple[str, int], ...],
           extents: tuple[tuple[str, int], ...], sizes: tuple[tuple[str, int], ...]) -> float:
    """The share of the points of loops and the variables in `own` where all conditions may hold somewhere in the other
    dims of the tile.  extents: of the variables of the conditions, cut or not; sizes: of ranks."""
    known: dict[Expr, Expr] = {Size(r): Const(n) for r, n in sizes}
    parts: dict[Expr, Expr] = {Var(v): Var(v + "1") * size + Var(v + "0") for v, size in cut if v not in own}
    last, tests = {v: n - 1 for v, n in extents}, list[Expr]()
    for c in sorted((substitute(substitute(c, known), parts) for c in conds), key=spell):
        inside = sorted(variables(c) - loops - own)
        some: list[Expr] = [substitute(c, {Var(v): Const(x) for v, x in zip(inside, at, strict=True)})
                            for at in product(*((0, last[v]) for v in inside))]
        tests.append(some[0] if len(some) == 1 else call("or", *some))
    names = {v for c in tests for v in variables(c)}
    return fraction(tuple(tests), tuple(sorted((v, n) for v, n in extents if v in names))) if tests else 1.0


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

