"""Reading a cascade along one rank: which side each tensor stands on, inlining of carried maps, passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Var, children, conjuncts, rebuild, substitute, variables, walk
from memcomp.passes._roles import held
from memcomp.passes.derive.sides import Side

_LARGEST_BODY = 400  # nodes; a larger inlined body is left to its own statement


@dataclass(frozen=True, slots=True)
class View:
    """A cascade seen along the variable v.

    sides:   tensor -> neutral | carried | late | mixed, for tensors written by the statements looked at.
    writer:  tensor -> its only statement, for carried and mixed tensors that readers may look through.
    """

    v: str
    sides: dict[str, Side]
    writer: dict[str, Einsum]

    def late(self, tensor: str) -> bool:
        return self.sides.get(tensor) in ("late", "mixed")


def reduces(s: Einsum, v: str) -> bool:
    return s.reduce is not None and v in s.reduce.over


def carries(s: Einsum, v: str) -> bool:
    return any(v in variables(i) for o in s.outs for i in o.index)


def long(c: Cascade, s: Einsum) -> frozenset[str]:
    """Variables of the result whose ranks are no dims of a tile: a kernel's tasks have points of them."""
    return frozenset(x for o in s.outs for i in o.index for x in variables(i)
                     if c.rank(x.upper()).bound is None and not held(c, x))


def view(cascade: Cascade, statements: Sequence[Einsum], v: str) -> View:
    """Sides of everything `statements` write; what other statements wrote is neutral."""
    opaque = cascade.once(Unaligned(v))
    sides: dict[str, Side] = {}
    while True:  # a loop reads what later statements write
        before = dict(sides)
        writer = _sides(statements, v, opaque, sides)
        if sides == before:
            return View(v, sides, writer)


def _sides(statements: Sequence[Einsum], v: str, opaque: frozenset[str], sides: dict[str, Side]) -> dict[str, Einsum]:
    """One walk over the statements; completes `sides`."""
    writer: dict[str, Einsum] = {}
    for s in statements:
        read = [sides.get(t, "neutral") for t in s.reads()]
        waits = "late" in read or "mixed" in read
        if reduces(s, v):
            side: Side = "late"
        elif carries(s, v):
            side = "mixed" if waits else "carried"
        else:
            side = "late" if waits else "neutral"
        for name in s.names:
            if side == "carried" and name in opaque:
                sides.setdefault(name, "neutral")  # stays whole; readers index it like an input
                continue
            if side == "mixed" and name in opaque:
                sides[name] = "late"
                continue
            if sides.get(name) != "late" or side == "mixed":  # written in parts: one late part makes it late
                sides[name] = side
            if side in ("carried", "mixed"):
                writer[name] = s
    return writer


@dataclass(frozen=True, slots=True)
class Unaligned:
    """Tensors along v that no tile can hold: read at another index than v, written more than once or not over plain
    variables, by a reduction with several results, or by one over a long rank that what is reduced over v has points
    of (each of those tasks would walk all of that rank in every step)."""

    v: str

    def __call__(self, cascade: Cascade) -> frozenset[str]:
        out: set[str] = set()
        place: dict[str, int] = {}
        along = Var(self.v)
        for s in cascade.einsums:
            for o in s.outs:
                if not any(self.v in variables(i) for i in o.index):
                    continue
                at = [k for k, i in enumerate(o.index) if i == along]
                plain = all(isinstance(i, Var) for i in o.index) and len(set(o.index)) == len(o.index)
                again = o.tensor in place or len(cascade.writers(o.tensor)) > 1
                if len(at) != 1 or not plain or again or len(s.outs) > 1:
                    out.add(o.tensor)
                place[o.tensor] = at[0] if at else 0
        points = {x for s in cascade.einsums if reduces(s, self.v) for x in long(cascade, s)}
        for s in cascade.einsums:
            if s.reduce is not None and carries(s, self.v) and points & set(s.reduce.over):
                out.update(s.names)
        for name, k in place.items():
            if any(a.index[k] != along for s in cascade.readers(name) for a in s.accesses() if a.tensor == name):
                out.add(name)
        return frozenset(out)


@dataclass(slots=True)
class Inliner:
    """Carried and mixed maps replaced by their bodies."""

    cascade: Cascade
    look: View
    known: dict[tuple[Access, tuple[Expr, ...]], Expr] = field(default_factory=dict)

    def expr(self, e: Expr, guard: tuple[Expr, ...]) -> Expr:
        """`e` read at points where `guard` holds.  A body that is read again is made once."""
        if isinstance(e, Access):
            s = self.look.writer.get(e.tensor)
            if s is not None and s.reduce is None:
                if (e, guard) not in self.known:
                    self.known[e, guard] = self._map(e, s, guard)
                return self.known[e, guard]
        kids = children(e)
        return rebuild(e, tuple(self.expr(k, guard) for k in kids)) if kids else e

    def _map(self, e: Access, s: Einsum, guard: tuple[Expr, ...]) -> Expr:
        table: dict[Expr, Expr] = dict(zip(s.out.index, e.index, strict=True))
        body = self.expr(substitute(s.body, table), guard)
        size = sum(1 for _ in islice(walk(body), _LARGEST_BODY + 1))
        if size > _LARGEST_BODY and self.look.sides[e.tensor] == "carried":
            return e
        conds = [self.expr(substitute(c, table), guard) for c in s.guards()]
        declared = self.cascade.declared(e.tensor)
        empty = Const(0.0 if declared is None else declared.empty)
        for c in reversed(self.missing(conds, guard)):
            body = Call("where", (c, body, empty))
        return body

    def mixed(self, s: Einsum) -> bool:
        """Does what the statement reads, inlined, reduce another rank over a reduced value?"""
        todo, seen = set(s.reads()), set[str]()
        while todo:
            t = todo.pop()
            seen.add(t)
            w = self.look.writer.get(t)
            if w is not None and w.reduce is None:
                todo |= w.reads() - seen
            elif self.look.sides.get(t) == "mixed":
                return True
        return False

    def missing(self, conds: list[Expr], guard: tuple[Expr, ...]) -> list[Expr]:
        """Conditions under which the map was written that the reader does not have; elsewhere it is empty."""
        return [c for c in conds if c not in guard]

    def guard(self, s: Einsum) -> tuple[Expr, ...]:
        out: list[Expr] = []
        for c in s.guards():
            out += conjuncts(self.expr(c, tuple(out)))
        return tuple(dict.fromkeys(out))

    def body(self, s: Einsum) -> tuple[Expr, tuple[Expr, ...]]:
        guard = self.guard(s)
        return self.expr(s.body, guard), guard


def count(cascade: Cascade, statements: Sequence[Einsum], v: str) -> int:
    """Passes over v that the statements need, the most of any tensor.

    A statement that walks v needs another pass after every reduction over v that it waits for; `ir.traversal` counts
    whole programs and every fiber, this only tells streamed from unstreamed statements.
    """
    ready: dict[str, int] = {}
    along: set[str] = {t.name for t in cascade.tensors if v.upper() in t.ranks and t.role in ("in", "state")}
    most = 0
    for s in statements:
        iterates = reduces(s, v) or carries(s, v)
        p = 1 if iterates else 0
        for t in s.reads():
            at = ready.get(t, 1 if t in along else 0)
            p = max(p, at + 1 if iterates and t not in along and t in ready and ready[t] > 0 else at)
        for name in s.names:
            ready[name] = p
            if carries(s, v):
                along.add(name)
        if iterates:
            most = max(most, p)
    return most


def iterative(cascade: Cascade) -> set[str]:
    return {r.var for r in cascade.ranks if r.iterative}
