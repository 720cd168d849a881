"""What ranges prove about integer expressions: kinds, polynomials, bounds, signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var
from memcomp.ir.ops import OPS
from memcomp.ir.poly import (
    Poly,
    as_const,
    atom_key,
    atoms,
    cofactor,
    constant,
    divide,
    plus,
    single,
    times,
    without,
)


class Known:
    """Ranges of atoms (inclusive polynomials, None = unbounded) and tensors of integers, with what follows.

    Expressions given to it are simplified already.  "Not proved" is always a legal answer.
    """

    def __init__(self, integers: frozenset[str]) -> None:
        self.integers = integers
        self.ranges: dict[Expr, tuple[Poly | None, Poly | None]] = {}
        self.decided: dict[frozenset[tuple[tuple[Expr, ...], int]], bool] = {}

    def kind(self, e: Expr) -> str:
        """int, bool, real, or any where only the tensor's dtype would tell."""
        if isinstance(e, Const):
            return "bool" if isinstance(e.value, bool) else "int" if isinstance(e.value, int) else "real"
        if isinstance(e, (Var, Size)):
            return "int"
        if isinstance(e, Access):
            return "int" if e.tensor in self.integers else "any"
        result = OPS[e.op].result if e.op in OPS else "real"
        if result in ("bool", "real") or e.op == "int":
            return result
        kinds = {self.kind(a) for a in (e.args[1:] if e.op == "where" else e.args)}
        if "real" in kinds:
            return "real"
        return "int" if kinds == {"int"} else "any"

    def poly(self, e: Expr) -> Poly | None:
        """Polynomial of a simplified integer expression; None for any other kind."""
        return self._poly(e) if self.kind(e) == "int" else None

    def _poly(self, e: Expr) -> Poly:
        if isinstance(e, Const):
            return constant(int(e.value))
        if isinstance(e, Call):
            if e.op == "neg":
                return plus({}, self._poly(e.args[0]), -1)
            if e.op in ("add", "sub"):
                return plus(self._poly(e.args[0]), self._poly(e.args[1]), 1 if e.op == "add" else -1)
            if e.op in ("mul", "square"):
                a, b = self._poly(e.args[0]), self._poly(e.args[-1])
                if min(len(a), len(b)) <= 1 or len(a) * len(b) <= 16:
                    return times(a, b)
        return single(e)

    def range_of(self, a: Expr) -> tuple[Poly | None, Poly | None]:
        """Inclusive bounds of an atom."""
        if isinstance(a, (Var, Size)):
            return self.ranges.get(a, ({} if isinstance(a, Size) else None, None))
        if not isinstance(a, Call):
            return None, None
        parts = [self.poly(x) for x in a.args]
        if any(p is None for p in parts):
            return None, None
        ps = [p for p in parts if p is not None]
        nums = [as_const(p) for p in ps]
        if a.op == "mod" and self.nonneg(ps[1]):
            return {}, plus(ps[1], constant(1), -1)
        if a.op in ("floordiv", "ceildiv", "shr") and self.nonneg(ps[1]):
            low, high = self.extreme(ps[0]), self.extreme(plus({}, ps[0], -1))
            k = nums[1] if a.op != "shr" else None if nums[1] is None else 1 << nums[1]
            up = k - 1 if k and a.op == "ceildiv" else 0
            lo = None if low is None else as_const(low)
            hi = None if high is None else as_const(high)
            lo_p = None if lo is None else constant((lo + up) // k) if k else {} if lo >= 0 else None
            hi_p = constant((-hi + up) // k) if hi is not None and k else None
            if lo_p is None and self.nonneg(ps[0]):
                lo_p = {}
            if hi_p is None and high is not None and a.op == "floordiv":
                cut = divide(plus(plus({}, high, -1), constant(1)), ps[1])  # x < q*n  =>  x // n < q
                if cut is not None and not cut[1]:
                    hi_p = plus(cut[0], constant(1), -1)
            return lo_p, hi_p
        if a.op == "max":
            return next((constant(n) for n in nums if n is not None), None), None
        if a.op == "min":
            return ({} if all(self.nonneg(p) for p in ps) else None,
                    next((constant(n) for n in nums if n is not None), None))
        if a.op == "bitand" and any(n is not None and n >= 0 for n in nums):
            return {}, constant(max(n for n in nums if n is not None))
        if a.op in ("abs", "relu", "square"):
            return {}, None
        return None, None

    def extreme(self, p: Poly) -> Poly | None:
        """A lower bound of p free of everything but sizes; None where there is none."""
        for _ in range(32):
            todo = [a for a in atoms(p) if not isinstance(a, Size)]
            if not todo:
                return p
            q = self._eliminate(p, todo)
            if q is None:
                return None
            p = q
        return None

    def _eliminate(self, p: Poly, todo: Sequence[Expr]) -> Poly | None:
        """Replace one atom by the end of its range that makes p least; triangular ranges (m < p + 1) first."""
        options = []
        for a in todo:
            low, high = self.range_of(a)
            inner = any(not isinstance(x, Size) for b in (low, high) if b is not None for x in atoms(b))
            options.append((not inner, atom_key(a), a, low, high))
        for _, _, a, low, high in sorted(options, key=lambda o: o[:2]):
            parts = cofactor(p, a)
            if parts is None:
                continue
            c, rest = parts
            if low is not None and self.nonneg(c):
                return plus(rest, times(c, low))
            if high is not None and self.nonneg(plus({}, c, -1)):
                return plus(rest, times(c, high))
        return None

    def nonneg(self, p: Poly) -> bool:
        """Is p >= 0 at every point?  False: not proved."""
        c = as_const(p)
        if c is not None:
            return c >= 0
        key = frozenset(p.items())
        known = self.decided.get(key)
        if known is None:
            self.decided[key] = False  # a question that leads back to itself is not proved
            known = self.decided[key] = self._nonneg(p)
        return known

    def _nonneg(self, p: Poly) -> bool:
        # A variable that takes a value has a non-empty range, so the sizes that bound it are at least 1.
        least: dict[Expr, int] = {}
        for a in atoms(p):
            if isinstance(a, Var) and a in self.ranges:
                low, high = self.ranges[a]
                if low is not None and high is not None:
                    width = plus(plus(high, constant(1)), low, -1)
                    if len(width) == 1:
                        least.update((s, 1) for m in width for s in m if isinstance(s, Size))
        for _ in range(32):
            if self._plainly(p, least):
                return True
            todo = [a for a in atoms(p) if not isinstance(a, Size)]
            q = self._eliminate(p, todo) if todo else None
            if q is None:
                break
            p = q
        sizes = [a for a in atoms(p) if isinstance(a, Size) and a in self.ranges]
        while sizes:
            q = self._eliminate(p, sizes)
            if q is None:
                return False
            p = q
            if self._plainly(p, least):
                return True
            sizes = [a for a in atoms(p) if isinstance(a, Size) and a in self.ranges]
        return False

    def _plainly(self, p: Poly, least: Mapping[Expr, int]) -> bool:
        """No negative term once every size is written as its least value plus something."""
        for s, k in least.items():
            while any(s in m for m in p):
                shifted: Poly = {}
                for m, c in p.items():
                    if s in m:
                        rest = without(m, (s,))
                        assert rest is not None
                        more = Call("sub", (s, Const(k)))  # stands for the part above the least value
                        shifted = plus(shifted, times({rest: c}, {(): k, (more,): 1}))
                    else:
                        shifted = plus(shifted, {m: c})
                p = shifted
        return all(c > 0 and all(self._atom_nonneg(a) for a in m) for m, c in p.items())

    def _atom_nonneg(self, a: Expr) -> bool:
        if isinstance(a, Size):
            return True
        if isinstance(a, Call) and a.op == "sub":  # made by `_plainly`
            return True
        low = self.range_of(a)[0]
        return low is not None and (not low or self.nonneg(low))
