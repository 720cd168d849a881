"""Is an index inside its tensor?  Linear arithmetic over what the counts, loops and conditions of a kernel say.

Facts and goals are integer polynomials (`ir.poly`) that are at least 0.  A goal follows where it is a sum of facts with
non-negative factors and of terms that cannot be negative; divisions, `min` and `max` are taken apart by the
inequalities that define them.  "Not proved" is always a legal answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator

from memcomp.ir.expr import Call, Const, Expr, Size, Var, call, conjuncts, reads
from memcomp.ir.poly import Mono, Poly, atoms, cofactor, constant, plus, single, times, without
from memcomp.ir.simplify import polynomial, simplify

DEPTH = 10  # facts used for one goal
TRIES = 400  # goals looked at for one question


class Facts:
    """What is known to be at least 0.  integers: names of tensors and tiles that hold integers; said: what is known as
    it was said, before divisions were taken apart."""

    def __init__(self, integers: Collection[str], known: Iterable[Poly] = (), said: Iterable[Poly] = ()) -> None:
        self.integers = frozenset(integers)
        self.known: tuple[Poly, ...] = tuple(known)
        self.said: tuple[Poly, ...] = tuple(said)
        self.left = 0
        self.failed: dict[frozenset[tuple[Mono, int]], int] = {}

    def within(self, name: str, low: int, high: Expr | int) -> Facts:
        """With `low <= name < high`."""
        while isinstance(high, Call) and high.op == "max" and Const(low) in high.args:
            high = high.args[high.args[0] == Const(low)]
        return self.where(call("le", low, Var(name))).where(call("lt", Var(name), high))

    def where(self, cond: Expr) -> Facts:
        """With every comparison of integers that `cond` says holds."""
        known, said = list(self.known), list(self.said)
        for c in conjuncts(cond):
            if (p := self.difference(c)) is not None:
                said.append(p)
                known += [q for q in _consequences(p) if q not in known]
        return Facts(self.integers, known, said)

    def difference(self, c: Expr) -> Poly | None:
        """The polynomial that is at least 0 exactly where the comparison holds; None for other conditions."""
        if not isinstance(c, Call) or c.op not in ("lt", "le", "gt", "ge"):
            return None
        a, b = c.args if c.op in ("lt", "le") else c.args[::-1]
        p, q = (polynomial(x, integers=self.integers) for x in (a, b))
        return None if p is None or q is None else plus(plus(q, p, -1), constant(int(c.op in ("lt", "gt"))), -1)

    def proves(self, cond: Expr) -> bool:
        """Does a comparison, or a conjunction of some, follow?"""
        for c in conjuncts(cond):
            if c == Const(True):
                continue
            p = self.difference(c)
            if p is None:
                return False
            if p in self.said:
                continue
            self.left, self.failed = TRIES, {}
            if not self._follows(p, DEPTH):
                return False
        return True

    def inside(self, index: Expr, extent: Expr) -> bool:
        """0 <= index < extent?  An index that is cut to its tensor, `max(min(x, extent - 1), 0)`, is."""
        return cut_to(index, extent) or (self.proves(call("ge", index, 0)) and self.proves(call("lt", index, extent)))

    # -- search --------------------------------------------------------------------------------------------------------

    def _follows(self, p: Poly, depth: int) -> bool:
        p = _shortened(p)
        bad = [m for m, c in p.items() if c < 0 or not all(map(self._natural, m))]
        if not bad:
            return True
        self.left -= 1
        key = frozenset(p.items())
        if depth == 0 or self.left < 0 or self.failed.get(key, -1) >= depth:
            return False
        self.failed[key] = depth
        for a in atoms(p):
            if isinstance(a, Call) and (found := self._apart(p, a, depth)) is not None:
                return found
        m = next((m for m in bad if any(not isinstance(a, Size) for a in m)), None)
        if m is None:
            m = next((m for m in bad if m), ())
        for fact in self.known:
            for of, k in fact.items():
                rest = without(m, of) if k * p[m] > 0 and (of or not m) else None
                if rest is None or not all(map(self._natural, rest)):
                    continue
                whole = times(fact, {rest: 1}) if rest else fact
                n = math.lcm(abs(k), abs(p[m]))
                scaled = plus({x: c * (n // abs(p[m])) for x, c in p.items()}, whole, -(n // abs(k)))
                if self._follows(scaled, depth - 1):
                    return True
        return False

    def _natural(self, a: Expr) -> bool:
        """Is the atom at least 0, at a glance?"""
        if isinstance(a, Size) or {(a,): 1} in self.known:
            return True
        if not isinstance(a, Call) or a.op not in ("floordiv", "ceildiv", "mod"):
            return False
        parts = [self._poly(x) for x in a.args]
        return all(p is not None and all(c > 0 and all(map(self._natural, m)) for m, c in p.items()) for p in parts)

    def _apart(self, p: Poly, a: Call, depth: int) -> bool | None:
        """p >= 0, by what defines the atom `a`; None where `a` has no such definition or stands in a product."""
        parts = cofactor(p, a)
        if parts is None or set(parts[0]) != {()}:
            return None
        k, rest = parts[0][()], parts[1]
        args = [self._poly(x) for x in (a.args[1:] if a.op == "where" else a.args)]
        if a.op in ("min", "max", "where") and all(x is not None for x in args):
            goals = (self._follows(plus(rest, x, k), depth - 1) for x in args if x is not None)
            return any(goals) if a.op == ("max" if k > 0 else "min") else all(goals)
        if a.op not in ("floordiv", "ceildiv", "mod") or None in args:
            return None
        x, n = args
        assert x is not None and n is not None
        if set(n) != {()} or n[()] < 1:
            return None
        d = n[()]
        if a.op == "mod":
            return self._follows(rest if k > 0 else plus(rest, constant(d - 1), k), depth - 1)
        for q in _exactly(p, a, x, d):
            return self._follows(q, depth - 1)
        low = 1 - d if a.op == "floordiv" else 0  # d*a lies in x + low .. x + low + d - 1
        end = plus(x, constant(low if k > 0 else low + d - 1))
        return self._follows(plus({m: c * d for m, c in rest.items()}, end, k), depth - 1)

    def _poly(self, e: Expr) -> Poly | None:
        return polynomial(e, integers=self.integers)


def cut_to(index: Expr, extent: Expr) -> bool:
    """Is the index 0 or `max(min(x, extent - 1), 0)`?  Inside every tensor that has an element; backends refuse to
    read one from a tensor that has none."""
    if index == Const(0):
        return True
    if not (isinstance(index, Call) and index.op == "max" and Const(0) in index.args):
        return False
    last = simplify(call("sub", extent, 1), index=True)
    return any(isinstance(x, Call) and x.op == "min" and last in x.args for x in index.args)


def _shortened(p: Poly) -> Poly:
    """p / g, rounded to what integers allow: 4*x + 3 >= 0 says x >= 0."""
    g = math.gcd(*(c for m, c in p.items() if m), 0)
    return p if g < 2 else {m: v for m, c in p.items() if (v := c // g)}


def _consequences(p: Poly) -> Iterator[Poly]:
    """p, with `min`, `max` and divisions by numbers taken apart where that loses nothing."""
    for a in atoms(p):
        parts = cofactor(p, a)
        if not isinstance(a, Call) or parts is None or set(parts[0]) != {()}:
            continue
        k, rest = parts[0][()], parts[1]
        args = [polynomial(x, integers=reads(x)) for x in a.args]
        if None in args:
            continue
        if a.op == ("min" if k > 0 else "max"):
            for x in args:
                assert x is not None
                yield from _consequences(plus(rest, x, k))
            return
        if a.op in ("floordiv", "ceildiv") and args[1] is not None and set(args[1]) == {()} and args[1][()] > 0:
            assert args[0] is not None
            for q in _exactly(p, a, args[0], args[1][()]):
                yield from _consequences(q)
                return
    yield _shortened(p)


def _exactly(p: Poly, a: Call, x: Poly, d: int) -> Iterator[Poly]:
    """p >= 0 without the quotient `a` of x by d, where its factor is 1 or -1: a <= r says x < d*(r + 1), and so on."""
    k = p.get((a,), 0)
    rest = plus(p, single(a), -k)
    scaled = {m: c * d for m, c in rest.items()}
    if k == 1:  # a >= -rest
        yield plus(plus(x, scaled), constant(d - 1 if a.op == "ceildiv" else 0))
    elif k == -1:  # a <= rest
        yield plus(plus(scaled, x, -1), constant(0 if a.op == "ceildiv" else d - 1))
