"""Simplify index, guard and constant expressions; decide comparisons from ranges.

Sound for every integer point that the ranges allow, negative numbers included, up to `POINTS`.  Integers are brought
into the normal form of `ir.poly`; truth values are folded; real expressions are only touched where the result is the
same number (never `x * 0.0`, never re-associated).  A divisor is taken to be non-zero: a division by zero has no
meaning here.

What is an integer: variables, sizes, integer constants, and tensors that an index, an extent or the caller's
`integers` shows to be integers; any other `Access` may be real and is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, children, reads, rebuild, symbols, walk
from memcomp.ir.fold import folded, reduced
from memcomp.ir.ops import OPS
from memcomp.ir.poly import (
    Poly,
    as_const,
    atom_key,
    atoms,
    constant,
    divide,
    plus,
    term,
    times,
    to_expr,
    without,
)
from memcomp.ir.ranges import Known

Bound: TypeAlias = Expr | int | None
Ranges: TypeAlias = Mapping[str, tuple[Bound, Bound]]
_Frozen: TypeAlias = tuple[tuple[str, Bound, Bound], ...]
NOTHING: Ranges = MappingProxyType({})
TRUE = Const(True)
POINTS = 2**60  # more than any rank has; constants that large stand for infinity (`sys.maxsize`)
_SWAP = {"gt": "lt", "ge": "le"}
_NEGATION = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def simplify(expr: Expr, ranges: Ranges = NOTHING, *, integers: Collection[str] = (), index: bool = False) -> Expr:
    """The same value at every point, in normal form.

    ranges:   variable (or size, by its upper-case name) -> half-open range; None = unbounded.  A size is >= 0.
    integers: names of tensors known to hold integers.  index: every tensor read holds integers (an index or extent).
    """
    return _context(expr, ranges, integers, index).simplify(expr)


def bounds(expr: Expr, ranges: Ranges = NOTHING, *, integers: Collection[str] = ()) -> tuple[Bound, Bound]:
    """Least and greatest value (both inclusive) over the ranges, as numbers or expressions over sizes.

    None where no bound is found.  Safe, not always tight.
    """
    ctx = _context(expr, ranges, integers, False)
    p = ctx.poly(ctx.simplify(expr))
    if p is None:
        return None, None
    low, high = ctx.extreme(p), ctx.extreme(plus({}, p, -1))

    def out(q: Poly | None) -> Bound:
        if q is None:
            return None
        c = as_const(q)
        return c if c is not None else to_expr(q)

    return out(low), out(None if high is None else plus({}, high, -1))


def linear(expr: Expr, *, integers: Collection[str] = ()) -> dict[Expr | None, int] | None:
    """`expr` as a sum of coefficient * term (products of atoms are one term), None -> the constant.

    None where the expression is not known to be an integer.  `linear(m1*64 + m0 + 3) == {m1: 64, m0: 1, None: 3}`.
    """
    p = polynomial(expr, integers=integers)
    return None if p is None else {(term(m, 1) if m else None): c for m, c in p.items()}


def polynomial(expr: Expr, *, integers: Collection[str] = (), index: bool = False) -> Poly | None:
    """`expr` as a polynomial over its atoms (`ir.poly`); None where it is not known to be an integer."""
    data = reads(expr)
    found = _polynomial(expr, data if index else data.intersection(integers), index)
    return None if found is None else dict(found)


@lru_cache(maxsize=1 << 14)
def _polynomial(expr: Expr, integers: frozenset[str], index: bool) -> Poly | None:
    ctx = _context(expr, NOTHING, integers, index)
    return ctx.poly(ctx.simplify(expr))


def proves(cond: Expr, ranges: Ranges = NOTHING, *, integers: Collection[str] = ()) -> bool:
    """Is the condition true at every point of the ranges?  False means: not proved."""
    return simplify(cond, ranges, integers=integers) == TRUE


def _context(expr: Expr, ranges: Ranges, integers: Collection[str], index: bool) -> _Context:
    """What is known of the names that the expression holds, or a bound of one of those; equal for equal names, so that
    like expressions of one program share it."""
    used: dict[str, tuple[Bound, Bound]] = {}
    names: set[str] = set()
    data = reads(expr)
    todo = [expr]
    while todo:
        e = todo.pop()
        for n in symbols(e):
            if n in ranges and n not in used:
                used[n] = ranges[n]
                for b in ranges[n]:
                    if b is not None and not isinstance(b, int):
                        names |= reads(b)
                        todo.append(b)
        if reads(e):
            names |= {t for a in walk(e) if isinstance(a, Access) for i in a.index for t in reads(i)}
    if data:
        names |= data if index else data.intersection(integers)
    return _shared(tuple((k, *v) for k, v in sorted(used.items())), frozenset(names))


@lru_cache(maxsize=512)
def _shared(ranges: _Frozen, integers: frozenset[str]) -> _Context:
    return _Context(ranges, integers)


class _Context(Known):
    """One set of ranges with everything already simplified under it."""

    def __init__(self, ranges: _Frozen, integers: frozenset[str]) -> None:
        super().__init__(integers)
        self.seen: dict[Expr, Expr] = {}
        for name, lo, hi in ranges:
            key: Expr = Size(name) if name == name.upper() and name != name.lower() else Var(name)
            low, high = self._bound(lo), self._bound(hi)
            if isinstance(key, Size) and low is None:
                low = {}
            self.ranges[key] = low, None if high is None else plus(high, constant(1), -1)

    def _bound(self, b: Bound) -> Poly | None:
        if b is None:
            return None
        return constant(b) if isinstance(b, int) else self.poly(self.simplify(b))

    def simplify(self, e: Expr) -> Expr:
        known = self.seen.get(e)
        if known is None:
            kids = children(e)
            known = self._rule(rebuild(e, tuple(self.simplify(k) for k in kids))) if kids else e
            if len(self.seen) > 1 << 16:
                self.seen.clear()
            self.seen[e] = self.seen[known] = known
        return known

    def _rule(self, e: Expr) -> Expr:
        if not isinstance(e, Call) or e.op not in OPS:
            return e
        if all(isinstance(a, Const) for a in e.args):
            return folded(e)
        op = e.op
        if op in ("and", "or"):
            return self._logic(op, e.args)
        if op in _NEGATION:
            return _in_64_bits(self._compare(op, e.args[0], e.args[1]), e)
        if op == "not":
            inner = e.args[0]
            if isinstance(inner, Call) and inner.op == "not":
                return inner.args[0] if self.kind(inner.args[0]) == "bool" else e
            # not (a < b) is b <= a only where nothing can be NaN; == and != are complements even then
            if isinstance(inner, Call) and inner.op in _NEGATION and (
                    inner.op in ("eq", "ne") or all(self.kind(a) == "int" for a in inner.args)):
                return self._compare(_NEGATION[inner.op], inner.args[0], inner.args[1])
            return e
        if op == "where":
            c, a, b = e.args
            if isinstance(c, Const):
                return a if c.value else b
            return a if a == b else e
        if self.kind(e) == "int":
            return _in_64_bits(self._integer(e), e)
        return reduced(e, self.kind)

    def _integer(self, e: Call) -> Expr:
        op, args = e.op, e.args
        if op in ("floordiv", "mod", "ceildiv"):
            return self._division(op, args[0], args[1])
        if op in ("max", "min"):
            a, b = (self._poly(x) for x in args)
            if op == "min":
                a, b = b, a
            if self.nonneg(plus(a, b, -1)):
                return args[0]
            if self.nonneg(plus(b, a, -1)):
                return args[1]
            return Call(op, tuple(sorted(args, key=lambda x: (isinstance(x, Const), *atom_key(x)))))
        if op == "int":
            return args[0] if self.kind(args[0]) == "int" else e
        if op in ("abs", "relu"):
            p = self._poly(args[0])
            if self.nonneg(p):
                return args[0]
            if self.nonneg(plus({}, p, -1)):
                return to_expr(plus({}, p, -1)) if op == "abs" else Const(0)
            return e
        return to_expr(self._rejoin(self._poly(e)))

    def _rejoin(self, p: Poly) -> Poly:
        """(x // n)*n + x % n = x; where x is y // a, its quotient stands there as y // (a*n)."""
        for m, c in list(p.items()):
            for a in m:
                if not (isinstance(a, Call) and a.op == "mod" and m in p):
                    continue
                n = self._poly(a.args[1])
                rest = without(m, (a,))
                assert rest is not None
                pair = times({rest: c}, times(n, self._poly(self._division("floordiv", *a.args))))
                if pair and all(p.get(k) == v for k, v in pair.items()):
                    p = plus(plus(plus(p, {m: c}, -1), pair, -1), times({rest: c}, self._poly(a.args[0])))
                    return self._rejoin(p)
        return p

    def _division(self, op: str, x: Expr, n: Expr) -> Expr:
        p, d = self._poly(x), self._poly(n)
        plain = Call(op, (x, n))
        if not d or not self.nonneg(d):
            return plain
        cut = divide(p, d)
        if cut is None:
            cut = (constant(1), constant(0)) if p == d else (constant(0), p)
        q, r = cut
        below = plus(plus(d, constant(1), -1), r, -1)  # d - 1 - r
        if not r:
            return to_expr({} if op == "mod" else q)
        if op == "mod":
            if self.nonneg(r) and self.nonneg(below):
                return to_expr(r)
            inner = to_expr(r)
            if isinstance(inner, Call) and inner.op == "mod":  # (y % (a*n)) % n = y % n
                outer = divide(self._poly(inner.args[1]), d)
                if outer is not None and not outer[1]:
                    return self._division("mod", inner.args[0], n)
            return Call("mod", (inner, n))
        if op == "ceildiv":
            r = plus(r, plus(d, constant(1), -1))  # ceil(r / d) = floor((r + d - 1) / d)
            if not self.nonneg(r):
                return self._offset(q, Call("ceildiv", (to_expr(plus(r, plus(d, constant(1), -1), -1)), n)))
            if self.nonneg(plus(plus(d, constant(1), -1), r, -1)):
                return to_expr(q)
            if self.nonneg(plus(r, d, -1)) and self.nonneg(plus(plus(times(d, constant(2)), constant(1), -1), r, -1)):
                return to_expr(plus(q, constant(1)))
            return self._offset(q, Call("ceildiv", (to_expr(plus(r, plus(d, constant(1), -1), -1)), n)))
        if self.nonneg(r) and self.nonneg(below):
            return to_expr(q)
        inner = to_expr(r)
        if isinstance(inner, Call) and inner.op == "floordiv":  # (y // a) // n = y // (a*n)
            a = self._poly(inner.args[1])
            if self.nonneg(a):
                flat = self._division("floordiv", inner.args[0], to_expr(times(a, d)))
                return self._offset(q, flat)
        if isinstance(inner, Call) and inner.op == "mod":  # (y % (a*n)) // n = (y // n) % a
            outer = divide(self._poly(inner.args[1]), d)
            if outer is not None and not outer[1] and self.nonneg(outer[0]):
                low = self._division("floordiv", inner.args[0], n)
                return self._offset(q, self._division("mod", low, to_expr(outer[0])))
        return self._offset(q, Call("floordiv", (inner, n)))

    def _offset(self, q: Poly, e: Expr) -> Expr:
        return to_expr(self._rejoin(plus(q, self._poly(e))))

    def _compare(self, op: str, a: Expr, b: Expr) -> Expr:
        if op in _SWAP:
            op, a, b = _SWAP[op], b, a
        if self.kind(a) != "int" or self.kind(b) != "int":
            if op in ("eq", "ne") and atom_key(b) < atom_key(a) and not isinstance(b, Const):
                a, b = b, a
            return Call(op, (a, b))
        d = plus(self._poly(b), self._poly(a), -1)  # the comparison is d > 0, d >= 0, d == 0, d != 0
        if (far := _far(d)) is not None:
            return Const(op == "ne" if op in ("eq", "ne") else far)
        one = constant(1)
        above, below = self.nonneg(plus(d, one, -1)), self.nonneg(plus(plus({}, d, -1), one, -1))
        if op == "lt":
            if above or self.nonneg(plus({}, d, -1)):
                return Const(above)
        elif op == "le":
            if below or self.nonneg(d):
                return Const(not below)
        elif above or below or not d:
            return Const((op == "ne") if d else (op == "eq"))
        return _balanced(op, d)

    def _logic(self, op: str, args: tuple[Expr, ...]) -> Expr:
        absorbing = op == "or"
        parts: dict[Expr, None] = {}
        todo = list(reversed(args))
        while todo:
            a = todo.pop()
            if isinstance(a, Call) and a.op == op:
                todo.extend(reversed(a.args))
            elif isinstance(a, Const):
                if bool(a.value) == absorbing:
                    return Const(absorbing)
            else:
                parts[a] = None
        for a in parts:
            if self._rule(Call("not", (a,))) in parts:
                return Const(absorbing)
        out: Expr | None = None
        for a in parts:
            out = a if out is None else Call(op, (out, a))
        if out is None:
            return Const(not absorbing)
        if len(parts) == 1 and self.kind(out) != "bool":  # `x and true` is the truth of x, not x
            return Call(op, (out, Const(not absorbing)))
        return out


def _far(d: Poly) -> bool | None:
    """Is d positive (or negative), whatever its indices and extents are, because its constant is that large?"""
    k, rest = d.get((), 0), [m for m in d if m]
    if all(len(m) == 1 and isinstance(m[0], (Var, Size)) for m in rest) and \
            abs(k) >= POINTS * max(sum(abs(d[m]) for m in rest), 1):
        return k > 0
    return None


def _in_64_bits(new: Expr, old: Expr) -> Expr:
    """`new`, unless it needs a number that no machine's integer holds, or adds one that leaves no room for others."""
    for n in walk(new):
        if type(n) is Const and not -(2**63) <= n.value < 2**63:
            return old
        if isinstance(n, Call) and n.op in ("add", "sub") and any(
                type(a) is Const and abs(a.value) >= 4 * POINTS for a in n.args):
            return old
    return new


def _balanced(op: str, d: Poly) -> Expr:
    """d > 0 (lt), d >= 0 (le), d == 0, d != 0 with every term on the side where it is positive: `m <= p + 2`."""
    k = d.get((), 0)
    rest = {m: c for m, c in d.items() if m}
    g = math.gcd(*rest.values())
    if g > 1:
        if op in ("eq", "ne"):
            if k % g:
                return Const(op == "ne")
            k //= g
        elif op == "le":
            k //= g  # g*x + k >= 0  <=>  x >= ceil(-k/g)  <=>  x + floor(k/g) >= 0
        else:
            k = -(-k // g)  # g*x + k > 0  <=>  x + ceil(k/g) > 0
        rest = {m: c // g for m, c in rest.items()}
    right: Poly = {m: c for m, c in rest.items() if c > 0}
    left: Poly = {m: -c for m, c in rest.items() if c < 0}
    if op in ("eq", "ne"):
        if not left or (right and min(map(atom_key, atoms(right))) < min(map(atom_key, atoms(left)))):
            left, right, k = right, left, -k
        sides = plus(left, constant(max(-k, 0)) if right else {}), plus(right, constant(k if not right else max(k, 0)))
        return Call(op, (to_expr(sides[0]), to_expr(sides[1])))
    if not right:  # a bound by a number: m < 64
        if op == "le":
            op, k = "lt", k + 1
        return Call("lt", (to_expr(left), Const(k)))
    if not left:  # 3 <= m
        if op == "lt":
            op, k = "le", k - 1
        return Call("le", (Const(-k), to_expr(right)))
    if op == "lt" and k >= 1:
        op, k = "le", k - 1
    elif op == "le" and k <= -1:
        op, k = "lt", k + 1
    return Call(op, (to_expr(plus(left, constant(max(-k, 0)))), to_expr(plus(right, constant(max(k, 0))))))
