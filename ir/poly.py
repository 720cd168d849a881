"""Integer polynomials over atoms: the normal form of index expressions.

A polynomial is a dict: monomial (a sorted tuple of atoms, () for the constant) -> non-zero coefficient.  Atoms are
expressions that are not sums or products themselves: variables, sizes, accesses, `x // n`, `max(..)`.
`m1*M0 + m0 + 3` is {(m1, M0): 1, (m0,): 1, (): 3}.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var

Mono: TypeAlias = tuple[Expr, ...]
Poly: TypeAlias = dict[Mono, int]


@lru_cache(maxsize=1 << 16)
def atom_key(e: Expr) -> tuple[int, str]:
    """Order of atoms in a product: variables, then data and calls, then sizes (`m1*M0`)."""
    return (2 if isinstance(e, Size) else 0 if isinstance(e, Var) else 1), spell(e)


@lru_cache(maxsize=1 << 16)
def spell(e: Expr) -> str:
    """A text that is equal exactly for equal expressions; only good for ordering."""
    if isinstance(e, Const):
        return repr(e.value)
    if isinstance(e, Var):
        return e.name
    if isinstance(e, Size):
        return e.rank
    if isinstance(e, Access):
        return f"{e.tensor}[{','.join(map(spell, e.index))}]"
    return f"{e.op}({','.join(map(spell, e.args))})"


def constant(c: int) -> Poly:
    return {(): c} if c else {}


def single(atom: Expr) -> Poly:
    return {(atom,): 1}


def plus(a: Mapping[Mono, int], b: Mapping[Mono, int], k: int = 1) -> Poly:
    """a + k*b."""
    out = dict(a)
    for m, c in b.items():
        s = out.get(m, 0) + k * c
        if s:
            out[m] = s
        else:
            out.pop(m, None)
    return out


def times(a: Mapping[Mono, int], b: Mapping[Mono, int]) -> Poly:
    out: Poly = {}
    for ma, ca in a.items():
        for mb, cb in b.items():
            m = tuple(sorted(ma + mb, key=atom_key)) if ma and mb else ma or mb
            out[m] = out.get(m, 0) + ca * cb
    return {m: c for m, c in out.items() if c}


def as_const(p: Mapping[Mono, int]) -> int | None:
    """The number this polynomial is, or None."""
    if not p:
        return 0
    return p[()] if len(p) == 1 and () in p else None


def atoms(p: Mapping[Mono, int]) -> dict[Expr, None]:
    return {a: None for m in p for a in m}


def without(m: Mono, part: Mono) -> Mono | None:
    """m / part where `part` divides it, else None."""
    rest = list(m)
    for a in part:
        if a not in rest:
            return None
        rest.remove(a)
    return tuple(rest)


def cofactor(p: Mapping[Mono, int], atom: Expr) -> tuple[Poly, Poly] | None:
    """(c, rest) with p = c*atom + rest and neither containing `atom`; None where p is not linear in it."""
    c: Poly = {}
    rest: Poly = {}
    for m, k in p.items():
        n = m.count(atom)
        if n > 1:
            return None
        if n:
            cut = without(m, (atom,))
            assert cut is not None
            c[cut] = k
        else:
            rest[m] = k
    return c, rest


def divide(p: Mapping[Mono, int], n: Mapping[Mono, int]) -> tuple[Poly, Poly] | None:
    """(q, r) with p = q*n + r for a divisor of one term with a positive coefficient; None for other divisors.

    Terms that n divides go to q, the others to r; for a number n, 0 <= constant of r < n.
    """
    if len(n) != 1:
        return None
    (part, k), = n.items()
    if k <= 0:
        return None
    q: Poly = {}
    r: Poly = {}
    for m, c in p.items():
        cut = without(m, part)
        if cut is not None and (c % k == 0 or not m):
            q = plus(q, {cut: c // k} if c // k else {})
            if c % k:
                r[m] = c % k
        else:
            r[m] = c
    return q, r


def _term_order(item: tuple[Mono, int]) -> tuple[bool, bool, int, int, tuple[tuple[int, str], ...]]:
    m, c = item
    return not m, c < 0, -len(m), -abs(c), tuple(atom_key(a) for a in m)


def to_expr(p: Mapping[Mono, int]) -> Expr:
    """The canonical expression: positive terms first, outer (higher, larger) terms before inner ones, constant last."""
    out: Expr | None = None
    for m, c in sorted(p.items(), key=_term_order):
        if out is None:
            out = term(m, c)
        elif c < 0:
            out = Call("sub", (out, term(m, -c)))
        else:
            out = Call("add", (out, term(m, c)))
    return Const(0) if out is None else out


def term(m: Mono, c: int) -> Expr:
    """c * m as an expression, the coefficient last (`j*3`)."""
    if not m:
        return Const(c)
    out = m[0]
    for a in m[1:]:
        out = Call("mul", (out, a))
    if c == 1:
        return out
    if c == -1:
        return Call("neg", (out,))
    return Call("mul", (out, Const(c)))
