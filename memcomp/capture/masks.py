"""Reading masks: constant folding through choices, and what an expression is where a mask is false.

`parts(e)` says: inside the guard `e` is `inside`, outside it is the constant `outside`.  With it `where(c, s, -inf)`,
`s + where(c, 0, -inf)` and `s * tril(ones)` all become guards of the reductions that follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, conjunction, conjuncts, reads, substitute, walk
from memcomp.ir.ops import OPS
from memcomp.ir.simplify import Ranges, linear, proves, simplify

INF = math.inf
LOWEST = (-3.4028234663852886e38, -3.3895313892515355e38, -65504.0, -1.7976931348623157e308)
"""torch.finfo(dtype).min of f32, bf16, f16, f64: what masks add where they mean "not this one"."""


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of a temporary.  at: its index variables; guard and empty: where it was written, what it holds
    elsewhere; finite: no point is infinite where it is written; positive: all written points are > 0."""

    at: tuple[str, ...]
    guard: Expr | None
    empty: float
    finite: bool = True
    positive: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    guard: Expr | None
    inside: Expr
    outside: Const | None


def is_choice(e: Expr) -> bool:
    return isinstance(e, Call) and e.op == "where" and isinstance(e.args[1], Const) and isinstance(e.args[2], Const)


def fold(op: str, args: Sequence[Const]) -> Const:
    """The operator on constants, computed by its own definition."""
    with np.errstate(all="ignore"):
        out = OPS[op].numpy(*(a.value for a in args))
    value = np.asarray(out).item()
    if OPS[op].result == "real":
        value = float(value)
    return Const(value)


def make(op: str, *args: Expr) -> Expr:
    """`Call(op, args)`, folded where constants or a choice between two constants allow it."""
    if op == "where":
        c, a, b = args
        if isinstance(c, Const):
            return a if c.value else b
        if a == b:
            return a
        if a == Const(True) and b == Const(False):
            return c
        if a == Const(False) and b == Const(True):
            return make("not", c)
        return Call(op, args)
    if op == "not" and isinstance(args[0], Call) and args[0].op == "not":
        return args[0].args[0]
    if op == "not" and isinstance(args[0], Call) and args[0].op == "or":
        return make("and", *(make("not", a) for a in args[0].args))  # conjunctions say more about tiles
    if op in ("and", "or") and len(args) == 2:
        absorbing = Const(op == "or")
        for x, y in (args, args[::-1]):
            if isinstance(x, Const):
                return absorbing if bool(x.value) == absorbing.value else y
    if op == "add":
        for x, y in (args, args[::-1]):
            if isinstance(y, Const) and y.value == 0 and (isinstance(y.value, float) or not isinstance(x, Const)):
                return x
    if op == "real" and isinstance(args[0], Const):
        return Const(float(args[0].value))
    if all(isinstance(a, Const) for a in args):
        return fold(op, [a for a in args if isinstance(a, Const)])
    choices = [a for a in args if is_choice(a)]
    if choices and all(isinstance(a, Const) or a == choices[0] for a in args):
        c, a, b = choices[0].args  # type: ignore[union-attr]
        return make("where", c, *(make(op, *(pick if x == choices[0] else x for x in args)) for pick in (a, b)))
    return Call(op, args)


def lowest(c: Const | None) -> bool:
    return c is not None and not isinstance(c.value, bool) and c.value in LOWEST


class Reading:
    """Facts about the temporaries written so far, and the ranges of the rank variables."""

    def __init__(self) -> None:
        self.written: dict[str, Written] = {}
        self.ranges: dict[str, tuple[Expr | int | None, Expr | int | None]] = {}
        self.integers: set[str] = set()

    def simplify(self, e: Expr) -> Expr:
        return simplify(e, self._known(e), integers=self.integers & reads(e))

    def proves(self, e: Expr) -> bool:
        return proves(e, self._known(e), integers=self.integers & reads(e))

    def _known(self, e: Expr) -> Ranges:
        """The ranges that matter to `e`: few, so that equal questions are answered once."""
        names = {n.name if isinstance(n, Var) else n.rank for n in walk(e) if isinstance(n, (Var, Size))}
        found = {n: self.ranges[n] for n in names if n in self.ranges}
        bounds = [b for pair in found.values() for b in pair if b is not None and not isinstance(b, int)]
        more = {n.rank for b in bounds for n in walk(b) if isinstance(n, Size)}
        return {**{n: self.ranges[n] for n in more if n in self.ranges}, **found}

    def tame(self, e: Expr, guarded: bool = False) -> bool:
        """Is `e` finite wherever the data is?  Inputs are.  guarded: where all that it reads is written."""
        for n in walk(e):
            if isinstance(n, Const) and (not math.isfinite(n.value) or lowest(n)):
                return False
            if isinstance(n, Access) and n.tensor in self.written:
                w = self.written[n.tensor]
                if not w.finite or not guarded and not math.isfinite(w.empty):
                    return False
        return True

    def positive(self, e: Expr) -> bool:
        """Is `e` > 0 wherever it is evaluated (in real arithmetic)?"""
        if isinstance(e, Const):
            return e.value > 0
        if isinstance(e, Access):
            return e.tensor in self.written and self.written[e.tensor].positive
        if isinstance(e, Call) and e.op in ("mul", "div", "add"):
            return all(self.positive(a) for a in e.args)
        return isinstance(e, Call) and e.op in ("exp", "exp2", "sigmoid")

    def parts(self, e: Expr) -> Parts:
        """The guard of `e`, what it is inside, and the constant it is outside (None: not one constant)."""
        if isinstance(e, Access) and e.tensor in self.written:
            w = self.written[e.tensor]
            if w.guard is None:
                return Parts(None, e, None)
            table: Mapping[Expr, Expr] = {Var(v): i for v, i in zip(w.at, e.index, strict=True)}
            return Parts(self.simplify(substitute(w.guard, table)), e, Const(w.empty))
        if not isinstance(e, Call):
            return Parts(None, e, None)
        if e.op == "where":
            return self._choice(e)
        if e.op in ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"):
            return Parts(None, e, None)
        kids = [self.parts(a) for a in e.args]
        held = [k for k in kids if k.guard is not None and k.outside is not None]
        if not held:
            return Parts(None, e, None)
        guards = list(dict.fromkeys(k.guard for k in held))
        outside = [self._outside(e, [k.outside if k.guard == g else None for k in kids], e.args) for g in guards]
        if outside[0] is None or any(o != outside[0] for o in outside):
            usable = [(g, o) for g, o in zip(guards, outside, strict=True) if o is not None]
            if not usable:
                return Parts(None, e, None)
            best = next(((g, o) for g, o in usable if o.value == -INF), usable[0])
            guards, outside = [best[0]], [best[1]]
        inside = make(e.op, *(k.inside if k.guard in guards else a for k, a in zip(kids, e.args, strict=True)))
        guard = conjunction([c for g in guards for c in conjuncts(g)])
        return Parts(guard, inside, outside[0])

    def absorbed(self, e: Expr) -> Expr:
        """`e`; where a mask adds the lowest number of a format, that number alone: in that format what it is added to
        is lost, but not in a wider one."""
        p = self.parts(e)
        return e if p.guard is None or p.outside is None or not lowest(p.outside) else make(
            "where", p.guard, p.inside, p.outside)

    def unseen(self, p: Parts, over: Sequence[str]) -> bool:
        """Is `p` the lowest number of a format outside its guard, and greater somewhere in each row of `over`?  Then
        the greatest of a row is inside; of a row that is -inf wherever the guard holds it would be that number."""
        return lowest(p.outside) and self.live(p.guard, over) and self.tame(p.inside)

    def _choice(self, e: Call) -> Parts:
        c, a, b = e.args
        flip = isinstance(a, Const) and (not isinstance(b, Const) or _rank(a) < _rank(b))
        if flip:
            c, a, b = make("not", c), b, a
        c = self.simplify(c)
        if not isinstance(b, Const):
            return Parts(None, e, None)
        if c == Const(True):
            return self.parts(a)
        inner = self.parts(a)
        if inner.guard is not None and inner.outside == b:
            return Parts(conjunction([*conjuncts(c), *conjuncts(inner.guard)]), inner.inside, b)
        return Parts(c, a, b)

    def _outside(self, e: Call, known: Sequence[Const | None], args: Sequence[Expr]) -> Const | None:
        """`e` where the arguments with a known constant have it and the others are any tame value."""
        if all(k is not None for k in known):
            consts = [k for k in known if k is not None]
            if any(lowest(k) for k in consts) and e.op in ("add", "sub"):
                return next(k for k in consts if lowest(k))
            return fold(e.op, consts)
        if e.op == "exp" or len(args) != 2:
            return None
        a, b = known
        k, other = (a, args[1]) if a is not None else (b, args[0])
        assert k is not None
        if isinstance(other, Const):
            return fold(e.op, [k, other] if a is not None else [other, k])
        if e.op in ("add", "sub") and self.tame(other):
            if k.value == -INF or lowest(k):
                return k if e.op == "add" or a is not None else None
        if e.op == "mul":
            if k.value == 0 and self.tame(other):
                return Const(0.0)
            if k.value == -INF and self.positive(other):
                return k
        if e.op == "div" and a is not None:
            if k.value == 0 and self.tame(other) and self.positive(other):
                return Const(0.0)
            if k.value == -INF and self.positive(other):
                return k
        return None

    def live(self, guard: Expr | None, over: Sequence[str]) -> bool:
        """Does every row keep a point of `over` where the guard holds?  Proved by a witness, else False.

        A row without points at all (extent 0) has no elements that could be wrong.
        """
        if guard is None:
            return True
        inner = [v for v in over if v in {n.name for n in walk(guard) if isinstance(n, Var)}]
        if len(inner) != 1:
            return False
        m = inner[0]
        high = self.ranges[m][1]
        last = Const(high - 1) if isinstance(high, int) else Call("sub", (high, Const(1))) if high is not None else None
        candidates: list[Expr] = [Const(0), *([last] if last is not None else [])]
        for c in conjuncts(guard):
            candidates += _solutions(c, m)
        for w in candidates:
            table: Mapping[Expr, Expr] = {Var(m): w}
            holds = [substitute(guard, table)]
            if high is not None and w != Const(0):
                holds += [Call("le", (Const(0), w)), Call("lt", (w, Const(high) if isinstance(high, int) else high))]
            if all(self.proves(h) for h in holds):
                return True
        return False


def _rank(c: Const) -> int:
    """Which constant of a choice is the masked one: the lower rank."""
    return 0 if c.value == -INF else 1 if lowest(c) else 2 if c.value == 0 else 3


def _solutions(c: Expr, m: str) -> list[Expr]:
    """Points where an affine comparison of variable `m` is tight."""
    if not isinstance(c, Call) or c.op not in ("lt", "le", "gt", "ge", "eq"):
        return []
    form = linear(Call("sub", c.args), integers=reads(c))
    if form is None or form.get(Var(m)) not in (1, -1):
        return []
    sign = form.pop(Var(m))
    total: Expr = Const(0)
    for t, k in form.items():
        total = total + Const(-k * sign) * (Const(1) if t is None else t)
    return [total + d for d in (0, -1, 1)]
