"""One stage: which reductions are accepted, the gauges that keep their states safe, and the states themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Einsum
from memcomp.ir.expr import Access, Expr, reads, variables
from memcomp.ir.ops import MONOIDS
from memcomp.passes.derive.facts import Facts, Interval
from memcomp.passes.derive.linear import added, flatten, keyed, linear, ratio, scaled, to_expr
from memcomp.passes.derive.order import Lifted, lift
from memcomp.passes.derive.separate import Separator
from memcomp.passes.derive.sides import NoLaw, Sides, short
from memcomp.passes.derive.states import OrderState, PlaceState, State, SumState
from memcomp.passes.derive.terms import Gauge, Powers, Term, masked

BOUNDED = 60.0  # |exponent| up to which exp and its sums stay inside f32 without a gauge


@dataclass(slots=True)
class Stage:
    """Accepts reductions over the stream variable and collects their states.

    extent: what the stream variable stays below (may read tensors and variables: a ragged rank).
    final: state -> how its finished value is read; rho: the same for the reference of a gauge.
    fresh: a free tensor name like the given one.
    frame: "first" or "running", the reference of polynomial states.
    weighted: may powers under a weight be measured from their weighted mean (else they wait for another stage)?
    """

    carried: str
    extent: Expr
    facts: Facts
    late: Callable[[str], bool]
    final: Callable[[State], Access]
    rho: Callable[[str], Access]
    fresh: Callable[[str], str]
    frame: str = "first"
    merged: bool = False
    orders: list[OrderState] = field(default_factory=list)
    gauges: dict[str, Gauge] = field(default_factory=dict)
    sums: list[SumState] = field(default_factory=list)
    places: list[PlaceState] = field(default_factory=list)
    heads: dict[str, str] = field(default_factory=dict)  # reduction -> its order state
    finished: list[tuple[Gauge, Access]] = field(default_factory=list)  # extremes of earlier stages
    made: set[str] = field(default_factory=set)  # gauges that no reduction of the program asked for
    gauge_vars: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gauge_over: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gauge_weight: dict[str, SumState] = field(default_factory=dict)  # of gauges at a weighted mean
    weighted: bool = True

    def sides(self, over: tuple[str, ...]) -> Sides:
        return Sides(frozenset(over), lambda t: t.startswith("$rho") or self.late(t))

    # -- order reductions -----------------------------------------------------------------------------------------

    def order(self, s: Einsum, body: Expr, guard: tuple[Expr, ...]) -> tuple[Expr, Lifted]:
        """Accept a reduction by max, min, prod, and, or; returns its final value and how it was lifted."""
        assert s.reduce is not None
        monoid, over = s.reduce.monoid, s.reduce.over
        sides = self.sides(over)
        if monoid not in MONOIDS or MONOIDS[monoid].outs != 1:
            raise NoLaw(monoid, body, f"{monoid} keeps more than one value per point")
        if sides.free(body) and monoid != "prod":
            return body, Lifted(body, lambda x: x, laws=("a constant",))  # where a point takes part
        if monoid in ("max", "min"):
            lifted = lift(body, sides, self.facts)
            if lifted.flip:
                monoid = "min" if monoid == "max" else "max"
        elif sides(body) == "carried":
            lifted = Lifted(body, lambda x: x)
        else:
            raise NoLaw(monoid, body, f"{monoid} moves through carried bodies only")
        inner, extra = _unmasked(lifted.inner, monoid, sides)
        state = self._order(s, monoid, inner, tuple(dict.fromkeys(guard + extra)), over)
        self.heads[s.names[0]] = state.name
        return lifted.rebuild(self.final(state)), lifted

    def whole(self, s: Einsum, body: Expr, guard: tuple[Expr, ...]) -> tuple[Expr, Lifted]:
        """Accept a reduction of integers to an integer as it stands: the laws are those of reals, and round."""
        assert s.reduce is not None
        if reads(body) and self.sides(s.reduce.over)(body) != "carried":  # a count is of points, not of data
            raise NoLaw(s.reduce.monoid, body, "the result is an integer, and the laws are those of reals")
        end = self.final(self._order(s, s.reduce.monoid, body, guard, s.reduce.over, True))
        return end, Lifted(body, lambda x: x, laws=("integers as they are",))

    def _order(self, s: Einsum, monoid: str, body: Expr, guard: tuple[Expr, ...], over: tuple[str, ...],
               whole: bool = False) -> OrderState:
        for o in self.orders:
            if (o.monoid, o.body, set(o.guard), set(o.over), o.whole) == (monoid, body, set(guard), set(over), whole):
                return o
        state = OrderState(self.fresh("R" + s.names[0]), monoid, body, guard, over, self.rows(s, body, *guard), whole)
        self.orders.append(state)
        return state

    def rows(self, s: Einsum, *exprs: Expr) -> tuple[str, ...]:
        """Variables of the result that a state of these expressions has."""
        assert s.reduce is not None
        used = variables(self.extent).union(*(variables(e) for e in exprs))
        return tuple(v for v in s.space() if v in used and v not in s.reduce.over)

    # -- sums -----------------------------------------------------------------------------------------------------

    def sum(self, s: Einsum, body: Expr, guard: tuple[Expr, ...]) -> tuple[list[Term], tuple[str, ...]]:
        """Accept a sum; returns the terms of its finalise map (c-side only) and the laws used.  Raises NoLaw."""
        assert s.reduce is not None
        over = s.reduce.over
        sides = self.sides(over)
        plain = Separator(sides, self.facts)
        terms = self._settled(plain.terms(body), guard)
        laws = dict(plain.laws)
        needed = self._growth(s, terms, guard)
        centre = self._cancelling(s, terms, guard)
        for centred in (True, False) if centre else (False,):
            gauges = [*needed, *centre] if centred else needed
            try:
                while True:
                    again = Separator(self.sides(over), self.facts, gauges)
                    found = self._settled(again.terms(body), guard) if gauges else terms
                    covered = [g for g in gauges if _covers(g, found, guard)]
                    if covered == gauges:
                        break
                    gauges = covered
            except NoLaw:
                if not centred:
                    raise  # the frame that growth asks for does not separate
                laws.update(dict.fromkeys(f"no frame on {short(g.body, 40)}: it does not separate" for g in centre))
                continue
            terms = found
            break
        laws.update(again.laws)
        for g in dict.fromkeys([*needed, *gauges]):
            self._adopt(s, g)
            laws.setdefault(f"{g.kind} gauge {g.name} on {short(g.body, 40)}")
        for _, end in self.finished:
            if any(x == end for t in terms for x, _ in t.ea):
                laws.setdefault(f"measured from {end.tensor}, which is finished")
        return [self._placed(s, t, guard) for t in terms], tuple(laws)

    def _adopt(self, s: Einsum, g: Gauge) -> None:
        if g.name in self.gauges:
            return
        assert s.reduce is not None
        self.gauges[g.name] = g
        self.gauge_vars[g.name] = self.rows(s, g.body, *g.guard, *g.weight)
        self.gauge_over[g.name] = s.reduce.over
        reference = OrderState(g.name, g.kind, g.body, g.guard, s.reduce.over, self.gauge_vars[g.name])
        self.final(reference)
        if g.kind in ("max", "min") and all(o.name != g.name for o in self.orders):
            self.orders.append(reference)
        if g.kind in ("first", "running"):
            self.count(s, g.guard, self.gauge_vars[g.name])

    def _growth(self, s: Einsum, terms: list[Term], guard: tuple[Expr, ...]) -> list[Gauge]:
        """A max (or min) gauge for every exponent without a proved bound."""
        out: list[Gauge] = []
        for t in terms:
            if not t.ea or self._bounded(t):
                continue
            points = tuple(dict.fromkeys(guard + t.when + t.mask))
            if not any(_fits(g, t.ea, points) for g in out):
                out.append(self._found(t.ea, points, s) or self._made(s, "max", dict(t.ea), points))
        return out

    def _found(self, ea: Powers, points: tuple[Expr, ...], s: Einsum) -> Gauge | None:
        assert s.reduce is not None
        known = list(self.gauges.values())
        for o in self.orders:
            if o.monoid in ("max", "min") and set(o.over) == set(s.reduce.over) and not o.whole:
                known.append(self.gauge(o.name, o.monoid, o.body, o.guard, o.over))
        return next((g for g in known if _fits(g, ea, points)), None)

    def gauge(self, name: str, kind: str, body: Expr, guard: tuple[Expr, ...], over: tuple[str, ...]) -> Gauge:
        sides = self.sides(over)
        parts = flatten(body)
        level = [(x, k) for k, x in parts if not sides.free(x)]
        offset = [(x, k) for k, x in parts if sides.free(x)]
        return Gauge(name, kind, body, guard, _linear(level), _linear(offset), self.carried)

    def _made(self, s: Einsum, kind: str, ea: dict[Expr, float], points: tuple[Expr, ...]) -> Gauge:
        assert s.reduce is not None
        name = self.fresh({"max": "RMAX", "min": "RMIN", "weighted": "RWM"}.get(kind, "RREF"))
        self.made.add(name)
        return self.gauge(name, kind, to_expr(ea.items()), points, s.reduce.over)

    def _cancelling(self, s: Einsum, terms: list[Term], guard: tuple[Expr, ...]) -> list[Gauge]:
        """A mean gauge for an atom that appears in two terms with equal cofactors and different powers."""
        assert s.reduce is not None
        out: list[Gauge] = []
        for x in dict.fromkeys(x for t in terms for x, p in t.a if p > 0 and p == int(p)):
            rests: dict[object, set[float]] = {}
            weighted: tuple[Expr, ...] = ()
            for t in terms:
                power = dict(t.a).get(x, 0)
                rest = (frozenset((y, p) for y, p in t.a if y != x), frozenset(t.ea), frozenset(t.when + t.mask))
                rests.setdefault(rest, set()).add(power)
                if power > 1 and t.ea:
                    weighted += (*(y for y, _ in t.ea), *(y for y, _ in t.a if y != x), *t.when, *t.mask)
                    signed = [y for y, p in t.a if y != x and p % 2 and not self.facts.nonneg(y)]
            if not any(len(powers) > 1 for powers in rests.values()) or any(x == y for t in terms for y, _ in t.ea):
                continue
            hit = (self._subtracted(x, terms, guard, s)
                   or self._centred(x, guard, ("weighted",) if weighted else ("first", "running")))
            if hit is None and weighted:
                if not self.weighted:
                    raise NoLaw("square", x, "a frame at the weighted mean is not asked for")
                if signed:
                    raise NoLaw("square", x, f"the weighted mean needs weights proved >= 0: {short(signed[0])}")
                hit = replace(self._made(s, "weighted", linear(x), guard), weight=tuple(dict.fromkeys(weighted)))
            out.append(hit or self._made(s, self.frame, linear(x), guard))
        return out

    def _subtracted(self, x: Expr, terms: list[Term], guard: tuple[Expr, ...], s: Einsum) -> Gauge | None:
        """The extreme of the atom that the body itself measures it from: the difference is then exact."""
        assert s.reduce is not None
        names = {self.heads.get(n) for t in terms for c, _ in t.c + t.ec for n in reads(c)}
        known = [self.gauge(o.name, o.monoid, o.body, o.guard, o.over) for o in self.orders
                 if o.name in names and o.monoid in ("max", "min") and set(o.over) == set(s.reduce.over)
                 and not o.whole]
        return next((g for g in known if ratio(keyed(linear(x)), keyed(dict(g.level))) is not None
                     and set(g.guard) <= set(guard)), None)

    def _centred(self, x: Expr, guard: tuple[Expr, ...], kinds: tuple[str, ...]) -> Gauge | None:
        """A known mean of the atom over at least these points (an extreme may be far from where the points are)."""
        return next((g for g in self.gauges.values() if g.kind in kinds and set(g.guard) <= set(guard)
                     and ratio(keyed(linear(x)), keyed(dict(g.level))) is not None), None)

    def _placed(self, s: Einsum, t: Term, guard: tuple[Expr, ...]) -> Term:
        """The term with its carried part replaced by a state."""
        shifts: dict[Expr, str] = {g.shift: g.name for g in self.gauges.values()}
        a: list[tuple[Expr, float]] = []
        ds: list[tuple[str, int]] = []
        es: list[tuple[str, float]] = []
        bounded: list[tuple[Expr, float]] = []
        for x, p in t.a:
            if x in shifts:
                if p != int(p) or p < 0:
                    raise NoLaw("pow", x, "a gauge difference to a power that is not a natural number")
                ds.append((shifts[x], int(p)))
            else:
                a.append((x, p))
        points = tuple(dict.fromkeys(guard + t.when + t.mask))
        ec = dict(t.ec)
        if t.ea and self._bounded(t):
            bounded = list(t.ea)
        elif t.ea:
            g = next((g for g in self.gauges.values() if _fits(g, t.ea, points)), None)
            if g is None:
                g = self._found(t.ea, points, s) or self._made(s, "max", dict(t.ea), points)
                self._adopt(s, g)
            lam = ratio(keyed(dict(t.ea)), keyed(dict(g.level)))
            assert lam is not None
            es.append((g.name, lam))
            ec = added(ec, {g.rho: lam}, scaled(dict(g.offset), -lam))
        state = self._state(s, tuple(a), tuple(ds), tuple(es), tuple(bounded), points)
        return replace(t, a=(), ea=(), mask=(), c=((self.final(state), 1), *t.c), ec=tuple(ec.items()))

    def _settled(self, terms: list[Term], guard: tuple[Expr, ...]) -> list[Term]:
        """An exponent less its finished extreme is bounded as it stands: the extreme joins the carried part."""
        out = []
        for t in terms:
            for f, end in self.finished:
                k = ratio(keyed(dict(t.ea)), keyed(dict(f.level)))
                if k is None or not _fits(f, t.ea, guard + t.when + t.mask):
                    continue
                rest = ((end, -k), *((x, c * k) for x, c in f.offset))
                if set(rest) <= set(t.ec):
                    t = replace(t, ea=(*t.ea, *rest), ec=tuple(x for x in t.ec if x not in rest))
            out.append(t)
        return out

    def _bounded(self, t: Term) -> bool:
        if any(x == end for x, _ in t.ea for _, end in self.finished):
            return True
        span = self.facts.interval(to_expr(t.ea))
        return -BOUNDED <= span.lo and span.hi <= BOUNDED

    def _state(self, s: Einsum, a: Powers, ds: tuple[tuple[str, int], ...], es: tuple[tuple[str, float], ...],
               bounded: Powers, guard: tuple[Expr, ...], rows: tuple[str, ...] | None = None) -> SumState:
        assert s.reduce is not None
        bodies = [self.gauges[g].body for g, _ in ds + es]
        guards = [c for g, _ in ds + es for c in self.gauges[g].guard]
        own = self.rows(s, *(x for x, _ in a + bounded), *bodies, *guards, *guard)
        new = SumState("", a, ds, es, bounded, guard, s.reduce.over,
                       tuple(v for v in s.space() if v in own or v in (rows or ())))
        for old in self.sums:
            spread = set(new.vars) <= set(old.vars) <= set(s.space()) and rows is None
            if old.tag() == new.tag() and (spread or set(old.vars) == set(new.vars)):
                return old
        for k, (g, _) in enumerate(ds):  # closed downward where the frame moves
            if self.gauges[g].kind != "first" or self.merged:
                lower = tuple((h, i - (n == k)) for n, (h, i) in enumerate(ds) if i - (n == k))
                counts = not (a or lower or es or bounded)
                less = self._state(s, a, lower, es, bounded, guard, new.vars if counts else None)
                if self.gauges[g].kind == "weighted" and not lower:
                    self.gauge_weight.setdefault(g, less)
        for g, _ in ds + es:
            if self.gauges[g].kind in ("first", "running"):
                self.count(s, self.gauges[g].guard, self.gauge_vars[g])
        new = replace(new, name=self.fresh("R" + s.names[0]))
        self.sums.append(new)
        factors = [self.facts.interval(x) for x, p in a if p % 2]
        signed = any(j % 2 for _, j in ds)
        low = 0.0 if not signed and all(f.nonneg for f in factors) else -math.inf
        positive = not ds and all(self.facts.positive(x) for x, _ in a)
        self.facts.learn(self.final(new).tensor, Interval(low, math.inf, positive))
        if positive and not guard:
            self.facts.sure.add(self.final(new).tensor)
        return new

    def count(self, s: Einsum, guard: tuple[Expr, ...], rows: tuple[str, ...] | None = None) -> SumState:
        """How many points of the guard there are (kept per row of `rows`, so that it lives where its readers do)."""
        return self._state(s, (), (), (), (), guard, rows)


def _linear(items: list[tuple[Expr, float]]) -> Powers:
    return tuple(added(*({x: k} for x, k in items)).items())


def _covers(g: Gauge, terms: list[Term], guard: tuple[Expr, ...]) -> bool:
    """Does the reference see every point where a difference from it is a factor?"""
    return all(set(g.guard) <= set(guard + t.when + t.mask) for t in terms for x, _ in t.a if x == g.shift)


def _fits(g: Gauge, ea: Powers, points: tuple[Expr, ...]) -> bool:
    """Is the gauge's reference an extreme of this exponent over (at least) these points?"""
    k = ratio(keyed(dict(ea)), keyed(dict(g.level)))
    sign = {"max": 1, "min": -1}.get(g.kind, 0)
    return k is not None and k * sign > 0 and set(g.guard) <= set(points)


def _unmasked(body: Expr, monoid: str, sides: Sides) -> tuple[Expr, tuple[Expr, ...]]:
    """max of `where(c, y, -inf)`: y under the guard c."""
    if monoid != "max":
        return body, ()
    conds: list[Expr] = []
    rest: list[tuple[Expr, float]] = []
    todo = flatten(body)
    while todo:
        k, x = todo.pop(0)
        mask = masked(x) if k > 0 else None
        if mask is not None:
            conds.append(mask[0])
            todo[:0] = flatten(mask[1], k)
        else:
            rest.append((x, k))
    if not conds:
        return body, ()
    inner = to_expr(_linear(rest))
    return (inner, tuple(conds)) if not sides.free(inner) else (body, ())
