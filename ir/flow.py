"""Who writes what, and when: single assignment, written before read, order inside iterative ranks.

Every test is a proof from the extents and the guards.  An index that reads data (`KC'[b, pages[b], e]`) cannot be
proved; writing it states that its points differ, as a scatter does everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from memcomp.ir.cascade import Cascade, Einsum, Knob
from memcomp.ir.expr import (
    Access,
    Call,
    Const,
    Expr,
    Size,
    Var,
    call,
    conjuncts,
    reads,
    substitute,
    transform,
    variables,
)
from memcomp.ir.simplify import linear, proves, simplify

Ranges: TypeAlias = dict[str, tuple[Expr | int, Expr]]
_NEGATION = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a cascade when a statement runs: extents, integer tensors, loops; `seen`: views asked for."""

    cascade: Cascade
    integers: frozenset[str]
    fixed: dict[Expr, Expr]
    loops: tuple[tuple[tuple[str, int], ...], ...]
    seen: dict[Einsum, tuple[Ranges, Ranges]] = field(default_factory=dict, compare=False, repr=False)

    def ground(self, e: Expr) -> Expr:
        """The expression with fixed sizes put in."""
        return substitute(e, self.fixed) if self.fixed else e

    def extent(self, var: str) -> Expr:
        """The extent of a variable's rank: a number, a size, or the ragged expression itself."""
        rank = self.cascade.rank(var.upper())
        if rank.extent is None or isinstance(rank.extent, Knob):
            return Size(rank.name)
        ragged = variables(rank.extent) or reads(rank.extent)
        return self.ground(rank.extent) if ragged or isinstance(rank.extent, Const) else Size(rank.name)

    def ranges(self, names: Collection[str], guard: Expr | None) -> Ranges:
        """Half-open ranges of variables, narrowed by guards of the form v < x, v <= x, v > x, v >= x, v == x."""
        out: Ranges = {v: (0, self.extent(v)) for v in sorted(names)}
        for c in conjuncts(guard):
            for op, v, x in _about(self.ground(c)):
                if v not in out or v in variables(x):
                    continue
                low, high = out[v]
                if op in ("lt", "le") and not any(v in variables(b) for b in _ends(out, variables(x))):
                    high = x if op == "lt" else x + 1
                elif op in ("gt", "ge") and isinstance(x, Const) and isinstance(low, int):
                    low = max(low, int(x.value) + (op == "gt"))
                out[v] = low, high
        return out

    def views(self, s: Einsum) -> tuple[Ranges, Ranges]:
        """The ranges of a statement's variables by extent alone, and as its guard narrows them."""
        if s not in self.seen:
            whole = self.ranges(s.space(), None)
            self.seen[s] = whole, whole if s.guard is None else self.ranges(s.space(), s.guard)
        return self.seen[s]

    def proves(self, cond: Expr, ranges: Ranges) -> bool:
        return proves(self.ground(cond), ranges, integers=self.integers)


def _ends(out: Ranges, names: Collection[str]) -> Iterator[Expr]:
    for n in out.keys() & names:
        for b in out[n]:
            if not isinstance(b, int):
                yield b


def _about(c: Expr) -> Iterator[tuple[str, str, Expr]]:
    """A comparison as facts (op, variable, other side)."""
    mirror = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
    if isinstance(c, Call) and c.op in mirror:
        a, b = c.args
        if isinstance(a, Var):
            yield c.op, a.name, b
        if isinstance(b, Var):
            yield mirror[c.op], b.name, a


def facts(c: Cascade, integers: frozenset[str]) -> Facts:
    fixed: dict[Expr, Expr] = {Size(r.name): r.extent for r in c.ranks if isinstance(r.extent, Const)}
    return Facts(c, integers, fixed, c.once(loops))


# -- single assignment ------------------------------------------------------------------------------------------------


def collides(s: Einsum, out: Access, f: Facts) -> set[str]:
    """Variables whose different points may write the same element; empty where the index is one to one or gathers."""
    space = set(s.space()) - set(s.reduce.over if s.reduce else ())
    known = {i.name for i in out.index if isinstance(i, Var)}
    if space <= known:
        return set()
    for ranges in f.views(s):
        dims = [simplify(f.ground(i), ranges, integers=f.integers) for i in out.index]
        for c in s.guards():  # an equation pins one more combination
            if isinstance(c, Call) and c.op == "eq":
                dims += [simplify(f.ground(a), ranges, integers=f.integers) for a in c.args if not reads(a)]
        size = -1
        while size != len(known):
            size = len(known)
            known |= {v for d in dims for v in _recovered(d, known, ranges, f)} | _quotients(dims)
    return space - known - {v for i in out.index if reads(i) for v in variables(i)}


def _recovered(dim: Expr, known: set[str], ranges: Ranges, f: Facts) -> set[str]:
    """Variables that the value of one index gives away: v, v*k + w with 0 <= w < k."""
    terms = linear(dim, integers=f.integers)
    if terms is None:
        return set()
    rest = {t: k for t, k in terms.items() if t is not None and variables(t) - known}
    found: set[str] = set()
    while rest:
        for t in rest:
            v, scale = _scaled(t, rest[t])
            others = _sum({u: k for u, k in rest.items() if u != t})
            if v is None or v in variables(others):
                continue
            if others == Const(0) or (f.proves(call("ge", others, 0), ranges)
                                      and f.proves(call("lt", others, scale), ranges)):
                found.add(v)
                del rest[t]
                break
        else:
            return found
    return found


def _scaled(term: Expr, k: int) -> tuple[str | None, Expr]:
    """A term as variable times scale: m1*M0 -> (m1, M0)."""
    factors = _factors(term)
    found = [x for x in factors if isinstance(x, Var)]
    if len(found) != 1 or any(variables(x) for x in factors if x is not found[0]):
        return None, Const(k)
    scale: Expr = Const(k)
    for x in factors:
        if x is not found[0]:
            scale = call("mul", x, scale)
    return found[0].name, simplify(scale)


def _factors(e: Expr) -> list[Expr]:
    return [x for a in e.args for x in _factors(a)] if isinstance(e, Call) and e.op == "mul" else [e]


def _sum(terms: dict[Expr, int]) -> Expr:
    out: Expr = Const(0)
    for t, k in terms.items():
        out = simplify(out + t * k)
    return out


def _quotients(dims: list[Expr]) -> set[str]:
    """Variables known from both v // k and v % k."""
    pairs = {(d.op, d.args) for d in dims if isinstance(d, Call) and d.op in ("floordiv", "mod")}
    return {a[0].name for op, a in pairs if op == "mod" and ("floordiv", a) in pairs and isinstance(a[0], Var)}


def disjoint(s: Einsum, a: Access, t: Einsum, b: Access, f: Facts) -> bool:
    """Do two statements write different elements of one tensor?  Indices that gather are taken at their word.

    The guard of a reduction keeps no element apart: where it is false the reduction writes its identity.
    """
    if any(isinstance(i, Const) and isinstance(j, Const) and i != j for i, j in zip(a.index, b.index, strict=True)):
        return True
    other = {v: v + "__b" for v in t.space()}

    def apart(e: Expr) -> Expr:
        return transform(e, lambda n: Var(other[n.name]) if isinstance(n, Var) and n.name in other else n)

    views = (f.views(e) if e.reduce is None else (f.views(e)[0],) * 2 for e in (s, t))
    for mine, theirs in zip(*views, strict=True):
        ranges = mine | {other[v]: (low if isinstance(low, int) else apart(low), apart(high))
                         for v, (low, high) in theirs.items()}
        for i, j in zip(a.index, b.index, strict=True):
            if any(f.proves(call("lt", *pair), ranges) for pair in ((i, apart(j)), (apart(j), i))):
                return True
    same = a.index == b.index and all(isinstance(i, (Var, Const)) for i in a.index)
    if same and s.reduce is None and t.reduce is None and _exclude(s, t, f):
        return True
    return any(reads(i) for i in (*a.index, *b.index))


def _exclude(s: Einsum, t: Einsum, f: Facts) -> bool:
    """Do the guards of two statements that write the same index exclude each other?"""
    for one, two in ((s, t), (t, s)):
        ranges = f.ranges(one.space(), one.guard)
        for c in two.guards():
            against = call(_NEGATION[c.op], *c.args) if isinstance(c, Call) and c.op in _NEGATION else call("not", c)
            if against in one.guards() or (variables(c) <= ranges.keys() and f.proves(against, ranges)):
                return True
    return False


# -- written before read ----------------------------------------------------------------------------------------------


def loops(c: Cascade) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The loops around each statement, outermost first: (variable of the iterative rank, number of its first one).

    A loop is a maximal run of consecutive statements that write at the variable; of several that start at one
    statement the longest is the outermost, then the one whose rank is declared first.
    """
    own = [{v for o in s.outs for i in o.index for v in variables(i)} for s in c.einsums]
    order = [r.var for r in c.ranks if r.iterative]
    paths: list[tuple[tuple[str, int], ...]] = [()] * len(own)

    def visit(at: int, end: int, path: tuple[tuple[str, int], ...]) -> None:
        while at < end:
            ends = {v: next((k for k in range(at, end) if v not in own[k]), end)
                    for v in order if v in own[at] and v not in (u for u, _ in path)}
            if not ends:
                paths[at] = path
                at += 1
                continue
            v = max(ends, key=lambda v: ends[v])
            visit(at, ends[v], (*path, (v, at)))
            at = ends[v]

    visit(0, len(own), ())
    return tuple(paths)


def earlier(reader: int, access: Access, writer: int, target: Access, f: Facts) -> bool:
    """Is the element that statement `reader` reads never written later by statement `writer`?"""
    for mine, theirs in zip(f.loops[reader], f.loops[writer], strict=False):
        if mine != theirs:
            break
        v = mine[0]
        views = f.views(f.cascade.einsums[reader])
        written = f.views(f.cascade.einsums[writer])[0]
        orders = {_compare(v, access, target, ranges, written, f) for ranges in views}
        if "before" in orders:
            return True
        if orders == {"unknown"}:
            return False
    return writer < reader


def _compare(v: str, read: Access, write: Access, ranges: Ranges,
             written: Ranges, f: Facts) -> Literal["before", "same", "unknown"]:
    """When the element read was written, in iterations of `v`: before this one, at the latest in it, or unknown."""
    best: Literal["same", "unknown"] = "unknown"
    mine = [(i, w) for i, w in zip(read.index, write.index, strict=True) if v in variables(w)]
    if mine and all(i == w for i, w in mine):
        best = "same"
    for i, w in mine:
        at, to = _after(i, v), _after(w, v)
        if at is not None and to is not None:  # v+1 is written, v read
            if at < to:
                return "before"
            best = "same" if at == to else best
            continue
        terms = linear(f.ground(w), integers=f.integers) or {}
        step = next((t for t in terms if t is not None and _scaled(t, terms[t])[0] == v), None)
        if step is None:
            continue
        k = _scaled(step, terms[step])[1]
        base = terms.get(None, 0)
        inner = _sum({t: n for t, n in terms.items() if t not in (None, step) and t is not None})
        if not (f.proves(call("ge", inner, 0), written) and f.proves(call("lt", inner, k), written)):
            continue
        start = Var(v) * k + base  # the first element that this iteration writes
        if f.proves(call("lt", i, start), ranges):
            return "before"
        if f.proves(call("lt", i, start + k), ranges):
            best = "same"
    return best


def _after(i: Expr, v: str) -> int | None:
    """n of an index v + n; None for any other index."""
    if i == Var(v):
        return 0
    if isinstance(i, Call) and i.op == "add" and i.args[0] == Var(v) and isinstance(i.args[1], Const):
        return int(i.args[1].value)
    return None
