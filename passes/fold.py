"""Decode arithmetic leaves the sums over what it decodes: scales, zero points and offsets are applied where they have
the fewest points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from memcomp.ir.cascade import Cascade, Einsum, Knob, Reduce
from memcomp.ir.counts import Sizes, operations
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, conjunction, reads, substitute, variables, walk
from memcomp.ir.kinds import kind_of
from memcomp.ir.program import Program
from memcomp.ir.simplify import simplify
from memcomp.ir.span import span
from memcomp.ir.target import target
from memcomp.passes._ranks import ranges, split_by, unused
from memcomp.passes._roles import factors
from memcomp.passes.derive.assemble import live, roots

TYPICAL = 1024  # points of a rank whose extent is a symbol without a bound
SAVES = 0.95    # a form is another where it takes at most this share of the operations
WIDE = 255      # of a code: from the least to the greatest
TERMS = 4       # addends that a product is multiplied out to
FACTORS = 6     # of one of them
SHORT = ("u8", "i8", "i16", "i32", "i64", "bool", "e4m3", "e5m2")  # how codes are stored, or words of them


def fold(program: Program) -> Program:
    """Sums of products by what their factors vary with, where that takes fewer operations.

    Of sums that read what is stored in codes.  A temporary that only decodes (products and sums, `(c - z) * s`) is
    read as what it is made of.  Then a factor that
    does not vary along a summed rank leaves that sum; of three factors the two with the fewest points together meet
    first (`Q*s` once for a group of keys); a code is summed apart from what is added to it, measured from the middle of
    its range, so that nothing cancels and whoever rounds what stands beside it loses little.  A rank that a factor
    reads at `e//k` becomes two.  An offset leaves only codes of at most 8 bits whose range masks and shifts tell: reals
    might cancel, and so might bytes of which few values are in use.  A sum that waits for a value reduced over its own
    ranks is not cut in two: it shares a pass with that only whole.
    Infinite data may give NaN where the written form gives an infinity.  On a GPU the writer of kernels does this for
    what a thread holds (`codegen/cuda`), and nothing is done here.

    before:
        program p
        rank J
        rank G = 4
        rank M
        rank E = 64
        in Q[J, G, E]: f32
        in K[J, M, E]: u8
        in Z[J, M]: u8
        in S[J, M]: f16
        out O[J, G, M]: f32
        D[j, m, e] = ((K[j, m, e] & 15) - Z[j, m]) * S[j, m]
        O[j, g, m] = sum{e} Q[j, g, e] * D[j, m, e]
    after:
        program p
        rank J
        rank G = 4
        rank M
        rank E = 64
        in Q[J, G, E]: f32
        in K[J, M, E]: u8
        in Z[J, M]: u8
        in S[J, M]: f16
        out O[J, G, M]: f32
        OA[j, g, m] = sum{e} Q[j, g, e] * ((K[j, m, e] & 15) - 8)
        OB[j, g] = sum{e} Q[j, g, e]
        O[j, g, m] = OA[j, g, m] * S[j, m] + OB[j, g] * (8 - Z[j, m]) * S[j, m]
    """
    c = program.cascade
    if any(r.iterative for r in c.ranks):  # loops are cut already
        return program
    if program.target and target(program.target).has("cuda"):
        return program
    while True:
        least, found = SAVES * _work(c), None
        for start in (c, *_splits(c)):
            new = _folded(start)
            if new is not None and (work := _work(new)) < least:
                least, found = work, new
        if found is None:
            return program if c is program.cascade else replace(program, cascade=c)
        c = found


# -- what it costs -----------------------------------------------------------------------------------------------------


def _points(c: Cascade) -> Callable[[frozenset[str] | set[str]], float]:
    sizes = Sizes(c, {r.name: TYPICAL for r in c.ranks if r.extent is None and r.bound is None})
    return lambda names: float(math.prod(sizes(v.upper()) for v in names))


def _work(c: Cascade) -> float:
    """Operations of all statements; of sums of products as tiles compute them, whose constant factors come last."""
    points, total = _points(c), 0.0
    for s in c.einsums:
        if (parts := _product(c, s)) is not None and s.reduce is not None:
            over = set(s.reduce.over)
            outer = [f for f in parts if not variables(f) & over and reads(f)]
            total += _paired(parts, over, points)[0] + len(outer) * points(set(s.space()) - over)
        else:
            total += (_operations(s.body) + (s.reduce is not None)) * points(set(s.space()))
    return total


def _operations(e: Expr) -> int:
    """At one point; what is added to a code once for all is taken along when it is converted."""
    return sum(operations(e)) - sum(1 for n in walk(e) if isinstance(n, Call) and n.op in ("add", "sub")
                                    and reads(n.args[0]) and isinstance(n.args[1], Const))


def _paired(parts: list[Expr], over: set[str], points: Callable[[set[str]], float]) -> tuple[float, tuple[Expr, ...]]:
    """(operations, factors) of a sum of products whose factors have met in two: those of the first are multiplied at
    the fewest points that there are."""
    inner = [f for f in parts if variables(f) & over]
    own = sum(_operations(f) * points(set(variables(f))) for f in inner)
    every = set().union(over, *(variables(f) for f in inner))
    whole = (2 if len(inner) > 1 else 1) * points(every) + own
    if len(inner) < 3:
        return whole, tuple(inner)

    def meet(group: tuple[Expr, ...]) -> float:
        return (len(group) - 1) * points(set().union(*(variables(f) for f in group)))

    ways = []
    for n in range(len(inner) - 1):
        for some in combinations(range(1, len(inner)), n):
            a = tuple(f for k, f in enumerate(inner) if k in (0, *some))
            b = tuple(f for k, f in enumerate(inner) if k not in (0, *some))
            ways.append((meet(a) + meet(b), a, b))
    cost, a, b = min(ways, key=lambda w: w[0])
    return whole + cost, (_times(a), _times(b))


def _times(parts: tuple[Expr, ...] | list[Expr]) -> Expr:
    out = parts[0]
    for f in parts[1:]:
        out = call("mul", out, f)
    return out


# -- what a sum is made of ---------------------------------------------------------------------------------------------


def _product(c: Cascade, s: Einsum) -> list[Expr] | None:
    """The factors of a sum of reals; None where a statement is no such sum."""
    if s.reduce is None or s.reduce.monoid != "sum" or len(s.outs) > 1 or any(map(reads, s.out.index)) \
            or _kind(c, s.body) != "real":
        return None
    return factors(s.body)


def _kind(c: Cascade, e: Expr) -> str:
    return kind_of(e, lambda t: _dtype(c, t))


def _dtype(c: Cascade, tensor: str) -> str:
    """What a tensor holds; reals where it is not (yet) of the cascade."""
    return c.tensor(tensor).dtype if c.declared(tensor.removesuffix("'")) or c.writers(tensor) else "f32"


def _decodes(c: Cascade, e: Expr) -> Einsum | None:
    """The statement of a temporary that is a product or a sum at each point, and nothing else."""
    if not isinstance(e, Access) or not c.temporary(e.tensor) or c.declared(e.tensor.removesuffix("'")) is not None:
        return None
    made = c.writers(e.tensor)
    if len(made) != 1 or made[0].reduce is not None or made[0].guard is not None or len(made[0].outs) > 1:
        return None
    s = made[0]
    plain = all(isinstance(i, Var) for i in s.out.index) and len(set(s.out.index)) == len(s.out.index)
    return s if plain and isinstance(s.body, Call) and s.body.op in ("mul", "add", "sub", "neg", "real", "bitand") \
        else None


def _written_out(c: Cascade, e: Expr) -> list[Expr]:
    """Factors, with what decodes in the place of temporaries."""
    out: list[Expr] = []
    for f in factors(e):
        s = _decodes(c, f)
        if s is not None and isinstance(f, Access):
            out += _written_out(c, substitute(s.body, dict(zip(s.out.index, f.index, strict=True))))
        elif isinstance(f, Call) and f.op == "real":
            out += _written_out(c, f.args[0]) if isinstance(f.args[0], Access) else [f.args[0]]
        else:
            out.append(f)
    return out


def _addends(e: Expr, sign: int = 1) -> list[tuple[int, Expr]]:
    if isinstance(e, Call) and e.op in ("add", "sub"):
        return _addends(e.args[0], sign) + _addends(e.args[1], -sign if e.op == "sub" else sign)
    if isinstance(e, Call) and e.op == "neg":
        return _addends(e.args[0], -sign)
    return [(sign, e)]


def _code(c: Cascade, e: Expr) -> int | None:
    """The middle of the range of an integer of at most 8 bits that is stored, and no number of its own."""
    got = span(e, lambda t: _dtype(c, t)) if reads(e) and _kind(c, e) != "real" else None
    return (got[0] + got[1] + 1) // 2 if got is not None and got[1] - got[0] <= WIDE else None


def _masked(e: Expr) -> bool:
    """Is the range of a code told by masks and shifts?  Where few values of a byte are in use, far from the middle of
    all that it could hold, what leaves the sum cancels."""
    while isinstance(e, Call) and e.op in ("real", "int"):
        e = e.args[0]
    return not isinstance(e, Access)


def _multiplied_out(c: Cascade, parts: list[Expr]) -> list[tuple[int, list[Expr]]]:
    """The product as a sum of products: codes and what is added to them apart, where that varies with less."""
    for k, f in enumerate(parts):
        terms = [(sign, _written_out(c, x)) for sign, x in _addends(f)]
        if len(terms) != 2:
            continue
        for n, (sign, mine) in enumerate(terms):
            at = next((i for i, x in enumerate(mine) if _masked(x) and _code(c, x) is not None
                       and variables(x) == variables(f)), None)
            other_sign, other = terms[1 - n]
            if at is None or not reads(_times(other)) or not variables(_times(other)) < variables(f):
                continue
            code, beside = mine[at], [x for i, x in enumerate(mine) if i != at]
            middle = _code(c, code)
            assert middle is not None
            far: Expr = _times([Const(middle), *beside]) if beside else Const(middle)
            if middle and variables(_times(other)) >= variables(far):
                code, rest = call("sub", code, middle), _sum(sign, far, other_sign, _times(other))
                other_sign = 1
            else:
                rest = _times(other)
            head, tail = parts[:k], parts[k + 1:]
            done = _multiplied_out(c, [*head, code, *beside, *tail])
            more = [[*head, rest, *tail]]
            if len(done) + len(more) > TERMS:
                continue
            return [(sign * x, p) for x, p in done] + [(other_sign, p) for p in more]
    return [(1, parts)]


def _sum(a: int, x: Expr, b: int, y: Expr) -> Expr:
    if a > 0:
        return call("add" if b > 0 else "sub", x, y)
    return call("sub", y, x) if b > 0 else call("neg", call("add", x, y))


# -- another form ------------------------------------------------------------------------------------------------------


class _Stays(Exception):
    """A sum has no form but its own."""


@dataclass(slots=True)
class _Sum:
    """Scratch of one statement."""

    c: Cascade
    s: Einsum
    points: Callable[[set[str]], float]
    taken: set[str]
    made: list[Einsum] = field(default_factory=list)

    def value(self, parts: list[Expr], over: frozenset[str]) -> Expr:
        """A sum of a product, as an expression over new temporaries."""
        outer = [f for f in parts if not variables(f) & over]
        inner = [f for f in parts if variables(f) & over]
        if not inner or not over <= frozenset().union(*map(variables, inner)) or len(inner) > FACTORS:
            raise _Stays
        cost, two = _paired(inner, set(over), self.points)
        chosen: Expr | None = None
        best = cost
        for f in inner:
            apart = over - variables(f)
            coarse = [x for x in inner if not variables(x) & apart]
            fine = [x for x in inner if variables(x) & apart]
            if not apart or not fine or any(map(self._late, fine)):
                continue
            left = frozenset().union(*map(variables, fine)) - apart
            one = Access("", tuple(Var(v) for v in sorted(left)))  # what the inner sum will be
            spent = _paired(fine, set(apart), self.points)[0]
            spent += _paired([*coarse, one], set(over - apart), self.points)[0]
            if spent < best:
                best, chosen = spent, f
        if chosen is not None:
            apart = over - variables(chosen)
            coarse = [x for x in inner if not variables(x) & apart]
            got = self.value([x for x in inner if variables(x) & apart], apart)
            total = self.value([*coarse, *factors(got)], over - apart)
        else:
            total = self._statement(_times([self._met(f, over) for f in two]), over)
        return _times([total, *outer])

    def _late(self, f: Expr) -> bool:
        """Is a factor made of what is reduced over ranks of this sum?  The sum shares a pass with that only whole."""
        assert self.s.reduce is not None
        over, seen, waiting = set(self.s.reduce.over), set[str](), set(reads(f))
        while waiting - seen:
            seen.add(name := (waiting - seen).pop())
            for s in self.c.writers(name):
                if s.reduce is not None and over & set(s.reduce.over):
                    return True
                waiting |= s.reads()
        return False

    def _met(self, f: Expr, over: frozenset[str]) -> Expr:
        """What has met of several factors, as a temporary of its own."""
        if len(factors(f)) == 1:
            return f
        return self._statement(f, frozenset())

    def _statement(self, body: Expr, over: frozenset[str]) -> Access:
        names = variables(body)
        index = tuple(Var(v) for v in self.s.space() if v in names - over)
        guards = []
        for g in self.s.guards():
            if variables(g) <= names:
                guards.append(g)
            elif variables(g) & names:
                raise _Stays
        stem = self.s.names[0].removesuffix("'")
        name = next((n for x in "ABCDEFGH" if (n := stem + x) not in self.taken), unused(stem + "A", self.taken))
        self.taken.add(name)
        assert self.s.reduce is not None
        coded = any(_code(self.c, f) is not None for f in factors(body))
        reduce = Reduce("sum", tuple(v for v in self.s.reduce.over if v in over),
                        self.s.reduce.held if coded else "") if over else None
        self.made.append(Einsum((Access(name, index),), body, reduce, conjunction(guards)))
        return self.made[-1].out


def _folded(c: Cascade) -> Cascade | None:
    """The cascade with its sums by what their factors vary with; None where none of them has another form."""
    points = _points(c)
    taken = {t.name for t in c.tensors} | {n for s in c.einsums for n in s.names}
    statements: list[Einsum] = []
    changed = False
    for s in c.einsums:
        new = _other(c, s, points, taken)
        changed |= new is not None
        statements += new or [s]
    if not changed:
        return None
    kept = live(statements, roots(c))
    written = {n for s in kept for n in s.names}
    tensors = tuple(t for t in c.tensors if t.role != "temp" or t.name in written)
    return replace(c, tensors=tensors, einsums=tuple(kept))


def _other(c: Cascade, s: Einsum, points: Callable[[set[str]], float], taken: set[str]) -> list[Einsum] | None:
    parts = _product(c, s)
    if parts is None or s.reduce is None:
        return None
    names = set(taken)
    try:
        written = _written_out(c, s.body)
        if not any(_dtype(c, x) in SHORT for f in written for x in reads(f)):
            return None
        terms = _multiplied_out(c, written)
        if terms == [(1, parts)]:
            return None
        scratch = _Sum(c, s, points, names)
        body: Expr | None = None
        for sign, term in terms:
            x = scratch.value(term, frozenset(s.reduce.over))
            body = (x if sign > 0 else call("neg", x)) if body is None else call("add" if sign > 0 else "sub", body, x)
    except _Stays:
        return None
    assert body is not None
    taken |= names
    free = tuple(g for g in s.guards() if not variables(g) & set(s.reduce.over))
    last = scratch.made[-1]
    if body == last.out and last.out.index == s.out.index and last.reduce is not None:  # one sum, under its own name
        return [*scratch.made[:-1], replace(last, outs=s.outs)]
    own = c.declared(s.out.tensor)
    if free and (len(free) < len(s.guards()) or own is not None and own.empty):  # a sum of no points is 0
        return None
    return [*scratch.made, replace(s, body=simplify(body, ranges(c)), reduce=None, guard=conjunction(free))]


def _splits(c: Cascade) -> Iterator[Cascade]:
    """The cascade with a rank that a sum reads at `e//k` beside others as two ranks."""
    for r in c.ranks:
        if r.iterative or r.extent is None or isinstance(r.extent, Knob):
            continue
        found = {n.args[1] for s in c.einsums if s.reduce is not None for a in _reached(c, s)
                 for n in walk(a) if isinstance(n, Call) and n.op == "floordiv" and n.args[0] == Var(r.var)}
        for k in sorted(found, key=str):
            if isinstance(k, Const) and isinstance(k.value, int) and k.value > 1 \
                    and simplify(call("mod", r.extent, k)) == Const(0):
                yield split_by(c, r, k.value)


def _reached(c: Cascade, s: Einsum) -> list[Expr]:
    return [s.body, *(d.body for f in factors(s.body) if (d := _decodes(c, f)) is not None)]
