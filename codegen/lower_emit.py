"""From tile operations to a kernel: loads where they are needed, masks where nothing else excludes a point, dots,
stores, and the loop with its run-time bounds.

Points that a guard excludes are kept out by, in this order: the count of a dim (tails), the bounds of the loop (tiles
that hold no live point), and a select on the earliest tile from which every reader then finds its identity
(`-inf` before an exponential makes 0 after it), skipped on tiles where the guard holds everywhere.  Policy: in a
product a weight that is exactly 0 at an excluded point makes the product 0 only while the other factor is finite, so
excluded points inside a loaded tile (never those in a tail) must hold finite values, as in torch.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from memcomp.codegen.lower_fuse import factors
from memcomp.codegen.lower_join import branches_joined, touched
from memcomp.codegen.lower_masked import Masked, every
from memcomp.codegen.lower_ops import LOOP, POST, PRE, Op
from memcomp.codegen.lower_tiles import param_name
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, Var, call, conjunction, reads, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import integer, placed
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.tile import (
    Best,
    Dot,
    Fold,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    When,
    expressions,
    statements,
)


class Emitter(Masked):
    """Writes one kernel."""

    def weaker_reader(self, o: Op, guards: frozenset[Expr], after: int) -> bool:
        """Will someone look at points of `o.target` that `guards` exclude?"""
        return any(o.target in u.reads() and not guards <= set(self.effective(u)) for u in self.g.ops[after:])

    # -- operations ------------------------------------------------------------------------------------------------

    def emit(self, k: int) -> None:
        o = self.g.ops[k]
        guards = self.effective(o)
        out = self.body[o.phase]
        if o.twin:  # written with the values
            self._stored(k, o)
            return
        if o.when is not None:
            self._sometimes(o, o.when, out)
            if o.phase == POST and o.target in self.g.stores and not any(
                u.target == o.target for u in self.g.ops[k + 1 :]
            ):
                self._store(o)  # what the tile holds either way
            return
        guards = tuple(g for g in guards if g not in self._after(o, guards))
        reduced = tuple(g for g in guards if o.monoid and (o.accumulate or o.place or self._mentions(g, o.over)))
        exact = tuple(g for g in guards if g not in reduced)
        again = any(u.target == o.target and not u.accumulate for u in self.g.ops[k + 1 :])
        if (
            exact
            and not again
            and o.target not in self.g.stores
            and o.target not in self.g.carried
            and not self.weaker_reader(o, frozenset(exact), k + 1)
        ):
            exact = ()  # nobody looks at the excluded points
        masks = tuple(self.read(c, o.phase) for c in reduced)
        body = o.body
        if o.monoid:
            self._reduce(k, o, reduced, masks, out)
        else:
            self._map(o, exact, guards, body, out)
        if o.monoid and exact and not o.accumulate:
            self._select(o, exact, o.empty, out)
        self._stored(k, o)

    def _after(self, o: Op, guards: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Guards that keep whole results out of a reduction that a loop goes on with, in all of its steps: written
        once, after the loop, where somebody looks at these results."""
        begun = [u for u in self.g.ops if u.target == o.target and u.phase == PRE]
        late = tuple(c for c in guards if o.monoid and o.accumulate and not o.place and not self._mentions(c, o.over)
                     and not self.moves(c) and not reads(c) & set(self.home))
        others = [u for u in self.g.ops if o.target in u.reads() and u.target != o.target]
        if not late or o.phase != LOOP or any(u.phase == LOOP for u in others) or o.target in self.g.each_step or not (
                len(begun) == 1 and isinstance(begun[0].body, Const)) or len(
                [u for u in self.g.ops if u.target == o.target]) > 2:
            return ()
        if o.target in self.g.stores or any(not set(late) <= set(self.effective(u)) for u in others):
            self._select(replace(o, phase=POST), late, begun[0].body, self.body[POST])
        return late

    def _stored(self, k: int, o: Op) -> None:
        """Store what no later operation of the phase writes again."""
        if o.target in self.g.stores and not any(
            u.target == o.target and u.phase == o.phase for u in self.g.ops[k + 1 :]
        ):
            self._store(o)

    def _sometimes(self, o: Op, when: Expr, out: list[Statement]) -> None:
        self.fills.held.pop(o.target, None)
        made = Map(self.tile(o.target, o.dims), self.read(o.body, o.phase))
        before = out[-1] if out else made
        if isinstance(before, When) and before.cond == when and not before.orelse:
            out[-1] = replace(before, body=(*before.body, made))
        else:
            out.append(When(when, (made,)))

    def _mentions(self, guard: Expr, over: tuple[str, ...]) -> bool:
        return bool(variables(guard) & set(over))

    def _map(self, o: Op, exact: tuple[Expr, ...], guards: tuple[Expr, ...], body: Expr, out: list[Statement]) -> None:
        self._set_fill(o, body, exact, guards)
        tests = tuple(self.read(c, o.phase) for c in exact)
        plain = self._typed(body, o)
        name = self.tile(o.target, o.dims)
        if not tests:
            if plain != Access(name, tuple(Var(d) for d in o.dims)):  # a copy within one buffer is nothing
                out.append(Map(name, plain))
            return
        empty = self._typed(o.empty, o)
        out.extend(self.guarded(tests, (Map(name, plain),), lambda tests: (
            Map(name, call("where", every(tests), plain, empty)),)))

    def _set_fill(self, o: Op, body: Expr, exact: tuple[Expr, ...], guards: tuple[Expr, ...]) -> None:
        self.fills.held.pop(o.target, None)
        if exact:
            if isinstance(o.empty, Const):
                self.fills.held[o.target] = frozenset(exact), float(o.empty.value)
        elif guards and (v := self.fills.at(body, frozenset(guards))) is not None:
            self.fills.held[o.target] = frozenset(guards), v
        if self.fills.never_low(body):
            self.fills.bounded.add(o.target)

    def _reduce(self, k: int, o: Op, guards: tuple[Expr, ...], masks: tuple[Expr, ...], out: list[Statement]) -> None:
        identity = MONOIDS[o.monoid].identity
        body, select = o.body, False
        if guards and self.fills.at(body, frozenset(guards)) != identity:
            select = not self._mask_operand(k, o, guards, masks, identity, out)
        plain = self.read(body, o.phase)
        name = self.tile(o.target, o.dims)
        if o.place:
            mine = self._best(o, name, plain)
            mask = self._typed(o.empty, o)
            out.extend([mine] if not select else self.guarded(masks, (mine,), lambda tests: (replace(
                mine, body=call("where", every(tests), mine.body, mask)),)))
            return
        fold = self._number(o, name, plain) or Fold(name, o.monoid, o.over, plain, o.accumulate)
        whole = self._product(o, name, plain) or (fold,)

        def masked(tests: tuple[Expr, ...]) -> tuple[Statement, ...]:
            one = self._typed(Const(identity), o)
            return self.kept_out(whole, tests) or self.pinned(o, name, plain, tests) or (Fold(
                name, o.monoid, o.over, call("where", every(tests), plain, one), o.accumulate),)

        out.extend(self.guarded(masks, whole, masked) if select else whole)

    def _best(self, o: Op, name: str, body: Expr) -> Best:
        given = placed(body)
        assert given.place is not None
        return Best(name, self.tile(o.place, o.dims), o.order, o.over, given.value, given.place, o.accumulate)

    def _number(self, o: Op, name: str, body: Expr) -> Map | None:
        """The sum of a constant: so many times the number of points."""
        if o.monoid != "sum" or not isinstance(body, Const) or not isfinite(body.value):
            return None
        points: Expr = Const(1)
        for d in o.over:
            points = simplify(call("mul", points, self.g.dims[d].count), index=True)
        if self.dtype[self.home[o.target]] != "i64":
            points = call("real", points)
        made = points if body.value == 1 else call("mul", points, body)
        if o.accumulate:
            made = call("add", Access(name, tuple(Var(d) for d in o.dims)), made)
        return Map(name, made)

    def _product(self, o: Op, name: str, body: Expr) -> tuple[Statement, ...] | None:
        """A sum of a product of two tiles as a `Dot`; factors free of the reduced dims are multiplied afterwards."""
        if o.monoid != "sum":
            return None
        parts = factors(body)
        two = [p for p in parts if isinstance(p, Access) and variables(p) & set(o.over)]
        rest = [p for p in parts if not variables(p) & set(o.over)]
        if len(two) != 2 or len(two) + len(rest) != len(parts) or (rest and o.accumulate):
            return None
        a, b = two
        kinds = {self.dtype_of(x) for x in (a, b)}
        integers = kinds == {"i64"} == {self.dtype[self.home[o.target]]} and not rest
        if {*o.dims, *o.over} - variables(a) - variables(b) or not (integers or kinds <= {"f32", "f64"}):
            return None
        out: list[Statement] = [Dot(name, a, b, o.over, o.accumulate, o.held)]
        if rest:
            scaled: Expr = Access(name, tuple(Var(d) for d in o.dims))
            for r in rest:
                scaled = call("mul", scaled, r)
            out.append(Map(name, scaled))
        return tuple(out)

    def _mask_operand(
        self, k: int, o: Op, guards: tuple[Expr, ...], masks: tuple[Expr, ...], identity: float, out: list[Statement]
    ) -> bool:
        """Write, into one operand tile, a value that makes the body the identity at excluded points."""
        over = set().union(*(variables(c) for c in masks)) & set(self.g.dims)
        held = frozenset(guards)
        for a in (n for n in walk(o.body) if isinstance(n, Access)):
            maker = next((p for p in self.g.ops[:k] if p.target == a.tensor), None)
            if maker is None or maker.phase != o.phase or a.tensor in self.g.carried or not over <= set(maker.dims):
                continue
            if self.weaker_reader(maker, held, k):
                continue
            before = self.fills.held.get(a.tensor)
            for value in dict.fromkeys((identity, 0.0)):
                self.fills.held[a.tensor] = held, value
                if self.fills.at(o.body, held) == identity:
                    self._select(maker, guards, Const(value), out)
                    return True
            self.fills.held.pop(a.tensor)
            if before is not None:
                self.fills.held[a.tensor] = before
        return False

    def _select(self, o: Op, guards: tuple[Expr, ...], value: Expr, out: list[Statement]) -> None:
        """Put `value` at the points of a tile that the guards exclude; joined with the map that has just made it."""
        tests = tuple(self.read(c, o.phase) for c in guards)
        name = self.tile(o.target, o.dims)
        last = next((i for i in reversed(range(len(out))) if name in touched(out[i])), None)
        made = out[last] if last is not None else None
        if (
            isinstance(made, Map)
            and made.tile == name
            and last is not None
            and not any(touched(later) & touched(made) for later in out[last + 1 :])
        ):
            del out[last]
            body = made.body
        else:
            made, body = None, Access(name, tuple(Var(d) for d in o.dims))
        fill = self._typed(value, o)
        out.extend(self.guarded(tests, (made,) if made else (), lambda tests: (
            Map(name, call("where", every(tests), body, fill)),)))

    def _typed(self, value: Expr, o: Op) -> Expr:
        """A constant as the tile's dtype holds it."""
        if not isinstance(value, Const):
            return self.read(value, o.phase)
        dtype = self.dtype[self.home[o.target]]
        return Const(
            bool(value.value) if dtype == "bool" else integer(value.value) if dtype == "i64" else float(value.value)
        )

    def _store(self, o: Op) -> None:
        target = self.g.stores[o.target]
        name = self.tile(o.target, o.dims)
        held = {v for i in target.index for v in variables(i)}
        phase = o.phase
        if o.target in self.g.carried and o.target not in self.g.each_step and phase != POST:
            return  # stored once, after the loop
        index = target.index
        if o.target in self.g.each_step:
            k = self.g.carried[o.target]
            index = tuple(Const(0) if i == k and phase == PRE else x for i, x in enumerate(index))
        store = self._once(self._masked(o, Access(param_name(target.tensor), index), name, phase), held)
        if o.target.endswith("'"):  # a new state goes over the old one, which what follows may still read
            (self.late_loop if phase == LOOP else self.late).append(store)
        else:
            self.body[phase].append(store)

    def _once(self, store: Statement, held: set[str]) -> Statement:
        """Grid points that would write the same element leave it to the first of them."""
        spare = [v for v, _ in self.g.grid if v not in held]
        cond = conjunction([call("eq", Var(v), 0) for v in spare])
        return store if cond is None else When(cond, (store,))

    def _masked(self, o: Op, target: Access, name: str, phase: int) -> Store:
        """The store of a tile, at points whose element is inside the tensor.

        Points that guards exclude are stored as what they hold, empty, where each has an element of its own; they must
        not be stored where the index is data, where other points or other statements write the same element.
        """
        shape = self.params[target.tensor].shape
        index = tuple(self.read(i, phase) for i in target.index)
        left = tuple(c for c in self.effective(o) if not variables(c) & set(o.over))
        chosen = any(isinstance(n, Access) for i in index for n in walk(i))
        mask: list[Expr] = []
        same = o.empty == self.g.unwritten.get(o.target, o.empty)
        if left and (chosen or not self._one_to_one(target.index) or (o.target in self.pieces and same)):
            if not chosen and not same:
                raise Refusal(
                    f"{o.target} is written where its guard excludes points that share elements with others",
                    self.g.group.name,
                    "give every point an element of its own",
                )
            mask = [self.read(c, phase) for c in left]
        dims = tuple(Var(d) for d in o.dims)
        for i, n in zip(index, shape, strict=True):
            for inside in (call("ge", i, 0), call("lt", i, n)):
                known = self.facts(i, *dims).where(conjunction(mask) or Const(True))
                if not known.proves(inside):
                    mask.append(simplify(inside, integers=known.integers))
        return Store(Access(target.tensor, index), name, conjunction(mask))

    def _one_to_one(self, index: tuple[Expr, ...]) -> bool:
        """Do different points, with no guard, write different elements?  Each index in mixed radix."""
        extent = dict(self.g.grid) | {d.name: Const(d.capacity) for d in self.g.dims.values()}
        for i in index:
            terms = linear(i)
            if terms is None or any(t is not None and variables(t) and not isinstance(t, Var) for t in terms):
                return False
            digits = sorted((abs(k), t.name) for t, k in terms.items() if isinstance(t, Var))
            below = 0  # the greatest value of the lower digits
            for n, (k, v) in enumerate(digits):
                last = extent.get(v)
                if k <= below or (n + 1 < len(digits) and not isinstance(last, Const)):
                    return False
                below += k * (int(last.value) - 1) if isinstance(last, Const) else 0
        return True

    def store_carried(self) -> None:
        for name in self.g.carried:
            done = any(o.target == name and o.phase == POST for o in self.g.ops)
            if name in self.g.stores and name not in self.g.each_step and not done:
                target = self.g.stores[name]
                held = {v for i in target.index for v in variables(i)}
                last = next(o for o in reversed(self.g.ops) if o.target == name)
                store = self._masked(last, Access(param_name(name), target.index), self.tile(name, last.dims), POST)
                self.body[POST].append(self._once(store, held))

    # -- the kernel ------------------------------------------------------------------------------------------------

    def kernel(self, name: str) -> TileKernel:
        if self.g.loop:
            self.start_at_first()
        self._counts()
        if self.g.loop:
            lo, hi = self._loop_bounds()
        for k in range(len(self.g.ops)):
            self.emit(k)
        self.store_carried()
        body = list(branches_joined(self.body[PRE]))
        if self.g.loop:
            step = branches_joined((*self.body[LOOP], *self.late_loop))
            if self.live is not None:
                step = (*self.head, When(self.live, step, spare=True))  # a step without live points changes nothing
            body.append(Loop(self.g.loop, lo, hi, step))
        body += branches_joined((*self.body[POST], *self.late))
        body = list(self._used(tuple(body)))
        used = {d for t in self.tiles.values() for d in t.dims}
        for s in statements(tuple(body)):
            used |= set(getattr(s, "over", ()))
        dims = tuple(d for d in self.g.dims.values() if d.name in used)
        return TileKernel(name, self.g.grid, dims, tuple(self.tiles.values()), tuple(body))

    def _used(self, body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        """Without the folds of guards' data that nothing asks for."""
        asked = {n.tensor for s in statements(body) for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
        spare = {k: t.name for k, t in self.tiles.items() if k.startswith("fold ") and t.name not in asked}
        for k in spare:
            del self.tiles[k]

        def keep(part: tuple[Statement, ...]) -> tuple[Statement, ...]:
            return tuple(
                replace(s, body=keep(s.body)) if isinstance(s, (Loop, When)) else s
                for s in part
                if not (isinstance(s, Fold) and s.tile in spare.values())
            )

        return keep(body)
