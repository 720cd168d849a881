"""Proved facts about values: intervals and signs through a cascade, and when a reduction has a live point."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from memcomp.ir.cascade import Cascade, Einsum, Knob
from memcomp.ir.expr import (
    Access,
    Call,
    Const,
    Expr,
    Size,
    Var,
    children,
    conjunction,
    reads,
    rebuild,
    substitute,
    variables,
    walk,
)
from memcomp.ir.laws import law, value
from memcomp.ir.ops import OPS, Op
from memcomp.ir.simplify import linear, simplify

INF = math.inf


@dataclass(frozen=True, slots=True)
class Interval:
    """lo <= value <= hi; `positive` says value > 0 (a sum's or product's: over a non-empty set)."""

    lo: float = -INF
    hi: float = INF
    positive: bool = False

    @property
    def nonneg(self) -> bool:
        return self.lo >= 0


REAL = Interval()
TRUTH = Interval(0.0, 1.0)


def _add(a: Interval, b: Interval) -> Interval:
    lo, hi = a.lo + b.lo, a.hi + b.hi
    return Interval(-INF if lo != lo else lo, INF if hi != hi else hi,
                    (a.positive and b.nonneg) or (b.positive and a.nonneg) or lo > 0)


def _neg(a: Interval) -> Interval:
    return Interval(-a.hi, -a.lo, a.hi < 0)


def _mul(a: Interval, b: Interval) -> Interval:
    ends = [0.0 if 0 in (x, y) else x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    return Interval(min(ends), max(ends), (a.positive and b.positive) or min(ends) > 0)


def _recip(a: Interval) -> Interval:
    if a.positive or a.lo > 0:
        return Interval(0.0 if a.hi == INF else 1 / a.hi, 1 / a.lo if a.lo > 0 else INF, True)
    return REAL


def _even(a: Interval, least: float = 0.0) -> Interval:
    low = least if a.lo <= 0 <= a.hi else min(abs(a.lo), abs(a.hi))
    return Interval(low, max(abs(a.lo), abs(a.hi)), a.positive or low > 0)


def _image(row: Op, a: Interval) -> Interval:
    """Image of a monotone function: its values at the ends, clipped to its range."""
    with_limits = dict(row.limits)

    def at(x: float, default: float) -> float:
        if x in with_limits:
            return with_limits[x]
        if not math.isfinite(x):
            return default
        y = value(row, x)
        return y if y == y else default

    low, high = (a.lo, a.hi) if row.monotone == ("inc",) else (a.hi, a.lo)
    lo, hi = at(low, row.range[0]), at(high, row.range[1])
    return _ranged(row, Interval(lo, hi, lo > 0))


def _ranged(row: Op, a: Interval = REAL) -> Interval:
    """`a`, a value of the function, within the range that the table states."""
    return Interval(max(a.lo, row.range[0]), min(a.hi, row.range[1]), a.positive or row.positive or row.range[0] > 0)


@dataclass(slots=True)
class Facts:
    """Facts over one cascade.  Intervals assume that reductions run over at least one point (see `alive`).

    sure: positive tensors whose reductions no guard can leave without a point.
    """

    cascade: Cascade
    sure: set[str] = field(default_factory=set)
    _tensors: dict[str, Interval] = field(default_factory=dict)
    _because: dict[str, dict[str, None]] = field(default_factory=dict)

    def interval(self, e: Expr) -> Interval:
        if isinstance(e, Const):
            v = float(e.value)
            return Interval(v, v, v > 0) if v == v else REAL
        if isinstance(e, Var):
            return Interval(0.0)
        if isinstance(e, Size):  # a rank without points asks for nothing
            return Interval(1.0, INF, True)
        if isinstance(e, Access):
            return self.tensor(e.tensor)
        return self._call(e)

    def nonneg(self, e: Expr) -> bool:
        return self.interval(e).nonneg

    def positive(self, e: Expr) -> bool:
        return self.interval(e).positive

    def because(self, e: Expr) -> dict[str, None]:
        """The rows of the law table that what is known about `e` may come from."""
        if isinstance(e, Access):
            if e.tensor not in self._because:
                self._because[e.tensor] = {}  # a tensor that reads itself adds nothing
                for s in self.cascade.writers(e.tensor):
                    self._because[e.tensor] |= self.because(s.body)
            return self._because[e.tensor]
        if not isinstance(e, Call):
            return {}
        found = (law(e.op, k) for k in ("range", "positive", "limits"))
        out: dict[str, None] = {str(x): None for x in found if x is not None}
        if OPS[e.op].range[0] < 0:  # else the sign does not depend on the arguments
            for a in e.args:
                out |= self.because(a)
        return out

    def learn(self, name: str, fact: Interval) -> None:
        """A fact about a tensor that is not (yet) written in the cascade."""
        self._tensors[name] = fact

    def tensor(self, name: str) -> Interval:
        if name not in self._tensors:
            self._tensors[name] = REAL  # a tensor that reads itself is not proved
            declared = self.cascade.declared(name)
            writers = self.cascade.writers(name)
            if declared is not None and declared.role in ("in", "state"):
                self._tensors[name] = (TRUTH if declared.dtype == "bool" else Interval(0.0, 255.0)
                                       if declared.dtype == "u8" else REAL)
            elif len(writers) == 1:
                self._tensors[name] = self._written(writers[0], name)
        return self._tensors[name]

    def _written(self, s: Einsum, name: str) -> Interval:
        body = self.interval(self._under(s.body, s.guards()))
        if s.reduce is None:
            declared = self.cascade.declared(name)
            empty = 0.0 if declared is None else declared.empty
            return body if s.guard is None else Interval(min(body.lo, empty), max(body.hi, empty))
        if s.names[0] != name:
            return Interval(0.0)  # an index
        if s.reduce.monoid in ("max", "min", "argmax", "argmin"):
            return body
        if s.reduce.monoid == "topk":  # places beyond the points of a short rank stay empty
            declared = self.cascade.declared(name)
            return Interval(hi=max(body.hi, 0.0 if declared is None else declared.empty))
        if s.reduce.monoid in ("sum", "prod"):
            return Interval(0.0 if body.nonneg else -INF, INF, body.positive)
        return TRUTH

    def _under(self, e: Expr, guards: tuple[Expr, ...]) -> Expr:
        """`e` with maps that are written wherever `guards` hold replaced by their bodies (elsewhere they are empty)."""
        if isinstance(e, Access):
            writers = self.cascade.writers(e.tensor)
            if len(writers) == 1 and (w := writers[0]).reduce is None and w.guard is not None \
                    and w.out.index == e.index and set(w.guards()) <= set(guards):
                return self._under(w.body, guards)
        kids = children(e)
        return rebuild(e, tuple(self._under(k, guards) for k in kids)) if kids else e

    def _call(self, e: Call) -> Interval:
        args = [self.interval(a) for a in e.args]
        match e.op:
            case "add":
                return _add(args[0], args[1])
            case "sub":
                return _add(args[0], _neg(args[1]))
            case "neg":
                return _neg(args[0])
            case "mul" if e.args[0] == e.args[1]:
                return _even(args[0])
            case "mul":
                return _mul(args[0], args[1])
            case "div":
                return _mul(args[0], _recip(args[1]))
            case "recip":
                return _recip(args[0])
            case "max":
                return Interval(max(args[0].lo, args[1].lo), max(args[0].hi, args[1].hi),
                                args[0].positive or args[1].positive)
            case "min":
                return Interval(min(args[0].lo, args[1].lo), min(args[0].hi, args[1].hi),
                                args[0].positive and args[1].positive)
            case "where":
                return Interval(min(args[1].lo, args[2].lo), max(args[1].hi, args[2].hi),
                                args[1].positive and args[2].positive)
            case "square" | "abs":
                even = _even(args[0], OPS[e.op].range[0])
                return _ranged(OPS[e.op], even if e.op == "abs" else _mul(even, even))
            case "sqrt":
                return _ranged(OPS[e.op], Interval(positive=args[0].positive))
            case "real" | "int":
                return args[0]
        row = OPS[e.op]
        if row.result == "bool":
            return TRUTH
        return _image(row, args[0]) if row.monotone in (("inc",), ("dec",)) else _ranged(row)

    # -- liveness -------------------------------------------------------------------------------------------------

    def ranges(self) -> dict[str, tuple[Expr | int | None, Expr | int | None]]:
        """Variable -> half-open range, for the index simplifier."""
        out: dict[str, tuple[Expr | int | None, Expr | int | None]] = {}
        for r in self.cascade.ranks:
            out[r.var] = (0, Size(r.name) if r.extent is None or isinstance(r.extent, Knob) else r.extent)
            if r.extent is not None and isinstance(r.extent, Const):
                out[r.var] = (0, int(r.extent.value))
        return out

    def extent(self, rank: str) -> Expr:
        x = self.cascade.rank(rank).extent
        return Size(rank) if x is None or isinstance(x, Knob) else x

    def alive(self, over: Iterable[str], guard: Iterable[Expr]) -> tuple[Expr | None, tuple[Expr, ...]]:
        """Is there a point with all of `guard` true?  Returns (condition, rest).

        condition: closed form over what does not vary along `over` (None = always true).  rest: conjuncts that have no
        closed form; where it is not empty a count has to be kept.
        """
        over, guard = tuple(over), tuple(guard)
        low: dict[str, list[Expr]] = {v: [Const(0)] for v in over}
        high: dict[str, list[Expr]] = {v: [self.extent(v.upper())] for v in over}
        need: list[Expr] = []
        rest: list[Expr] = []
        for g in guard:
            mine = variables(g) & set(over)
            if not mine:
                need.append(g)
            elif len(mine) == 1 and (cut := bound(g, next(iter(mine)))) is not None:
                (low if cut[0] == "low" else high)[next(iter(mine))].append(cut[1])
            else:
                rest.append(g)
        ranges = self.ranges()
        if rest and len(over) == 1 and self._witnessed(over[0], guard):
            return simplified(Call("lt", (Const(0), self.extent(over[0].upper()))), ranges), ()
        need += [Call("lt", (a, b)) for v in over for a in low[v] for b in high[v]]
        return conjunction([s for n in need if (s := simplified(n, ranges)) is not None]), tuple(rest)

    def _witnessed(self, v: str, guard: tuple[Expr, ...]) -> bool:
        """Is there one point of v, if it has any, at which all of `guard` holds whatever the other variables are?

        Tried are the first point, those where a comparison holds just so (`m <= p`: p), and places of what is compared
        (`Z[m] == Z[p]`: p).
        """
        points: list[Expr] = [Const(0)]
        for c in (n for g in guard for n in walk(g) if v in variables(n)):
            if (cut := bound(c, v)) is not None:
                points.append(cut[1] if cut[0] == "low" else Call("sub", (cut[1], Const(1))))
        points += [i for g in guard for n in walk(g) if isinstance(n, Access) for i in n.index if v not in variables(i)]
        ranges, high = self.ranges(), self.extent(v.upper())
        for w in dict.fromkeys(points):
            inside = () if w == Const(0) else (Call("le", (Const(0), w)), Call("lt", (w, high)))
            if all(simplified(substitute(c, {Var(v): w}), ranges) is None for c in (*guard, *inside)):
                return True
        return False


def simplified(cond: Expr, ranges: Mapping[str, tuple[Expr | int | None, Expr | int | None]]) -> Expr | None:
    """A condition on indices; None where it always holds."""
    left = simplify(cond, ranges, index=True)
    return None if left == Const(True) else left


def bound(cond: Expr, v: str) -> tuple[str, Expr] | None:
    """("low", a) for `a <= v`, ("high", b) for `v < b`, when the condition says just that; a, b free of v."""
    if not isinstance(cond, Call) or cond.op not in ("lt", "le", "gt", "ge"):
        return None
    a, b = cond.args if cond.op in ("lt", "le") else cond.args[::-1]  # a < b or a <= b
    diff = linear(Call("sub", (b, a)), integers=reads(cond))
    if diff is None:
        return None
    slope = diff.pop(Var(v), 0)
    if slope not in (1, -1) or any(e is not None and v in variables(e) for e in diff):
        return None
    strict = 1 if cond.op in ("lt", "gt") else 0
    rest: Expr = Const(0)
    for e, c in diff.items():
        rest = Call("add", (rest, Const(c) if e is None else Call("mul", (e, Const(c)))))
    if slope == 1:  # v + rest > 0 or >= 0:  -rest + strict <= v
        return "low", simplify(Call("sub", (Const(strict), rest)), index=True)
    return "high", simplify(Call("add", (rest, Const(1 - strict))), index=True)  # -v + rest > 0: v < rest
