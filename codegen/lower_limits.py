"""Which part of the loop and of a tile is live: loop bounds, steps in between, counts, and where a guard holds
everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from memcomp.codegen import bounds
from memcomp.codegen.lower_laws import idle
from memcomp.codegen.lower_ops import LOOP, POST, PRE, Op
from memcomp.codegen.lower_tiles import Tiles, param_name
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, conjunction, reads, variables, walk
from memcomp.ir.simplify import linear, proves, simplify
from memcomp.ir.tile import Dim, Fold, Load, Tile

TRUE = Const(True)


class Limits(Tiles):
    """Guards of one kernel, read once more for what they say about whole tiles and whole steps."""

    def integers(self) -> set[str]:
        return {t.name for t in self.tiles.values() if t.dtype == "i64"}

    # -- the least and the greatest of a tile ------------------------------------------------------------------------

    def end(self, e: Expr, greatest: bool, still: bool = False) -> Expr | None:
        """A bound of an integer expression over tiles at the points of a tile, from above or from below; None: not
        known, or not cheap.  still: it may not change along the loop.

        Exact for what is linear in dims and in data over different dims.  Dims whose count the loop changes count as
        full; data are folded, before the loop or, over one dim, in every step.
        """
        terms = linear(e, integers=self.integers())
        if terms is None or (still and self.g.loop in variables(e)):
            return None
        out: list[Expr] = []
        data: dict[tuple[str, ...], list[Expr]] = {}
        for term, c in terms.items():
            dims = tuple(sorted(variables(term) & set(self.g.dims))) if term is not None else ()
            if term is None or not dims:
                if still and term is not None and self._changes(term):
                    return None
                out.append(bounds.scaled(term, c))
            elif (known := self._monotone(term, greatest == (c > 0), still)) is not None:
                out.append(bounds.scaled(known, c))
            else:
                data.setdefault(dims, []).append(bounds.scaled(term, c))
        for dims, parts in data.items():
            folded = self._extreme(bounds.total(parts), dims, "max" if greatest else "min", still)
            if folded is None:
                return None
            out.append(folded)
        return bounds.total(out)

    def _monotone(self, e: Expr, greatest: bool, still: bool) -> Expr | None:
        """The end of a dim, or of a growing function of what has ends."""
        if isinstance(e, Var):
            d = self.g.dims[e.name]
            if not greatest:
                return Const(0)
            return Const(d.capacity - 1) if self.g.loop in variables(d.count) else call("sub", d.count, 1)
        if not isinstance(e, Call):
            return None
        if e.op in ("floordiv", "ceildiv") and isinstance(k := e.args[1], Const) and k.value > 0:
            x = self.end(e.args[0], greatest, still)
            return None if x is None else call(e.op, x, k)
        if e.op in ("max", "min"):
            a, b = (self.end(x, greatest, still) for x in e.args)
            return None if a is None or b is None else call(e.op, a, b)
        return None

    def _extreme(self, data: Expr, dims: tuple[str, ...], monoid: str, still: bool) -> Expr | None:
        """All of the data's points joined to one number, where that is cheap."""
        if isinstance(data, Call) and data.op == "neg":
            inner = self._extreme(data.args[0], dims, "min" if monoid == "max" else "max", still)
            return None if inner is None else call("neg", inner)
        moving = {*self.streamed(), *(d for d in dims if self.moves(Var(d)))}
        phase = LOOP if self._changes(data) or moving & {*dims} else PRE
        if phase == LOOP and (still or len(dims) > 1 or any(self._computed(n) for n in walk(data))):
            return None
        if any(self._computed(n, POST) for n in walk(data)):
            return None  # not known there
        key = (data, monoid)
        if key not in self.scalars:
            name = self.fresh({"max": "greatest", "min": "least", "and": "every", "or": "some"}[monoid])
            self.tiles[f"fold {name}"] = Tile(name, (), "bool" if monoid in ("and", "or") else "i64")
            self.body[phase].append(Fold(name, monoid, dims, data))
            self.scalars[key] = Access(name, ())
        return self.scalars[key]

    def _changes(self, e: Expr) -> bool:
        """Does an expression over tiles change along the loop?"""
        moved = {s.tile for s in (*self.head, *self.body[LOOP]) if isinstance(s, Load)}
        return self.g.loop in variables(e) or any(
            isinstance(n, Access) and (n.tensor in moved or self._computed(n)) for n in walk(e)
        )

    def _computed(self, n: Expr, phase: int = LOOP) -> bool:
        """A tile that operations in the loop, or of another phase, write?"""
        return isinstance(n, Access) and any(
            o.phase == phase and (t := self.tiles.get(self.home[o.target])) is not None and t.name == n.tensor
            for o in self.g.ops
        )

    # -- whole tiles --------------------------------------------------------------------------------------------------

    def full(self, guards: Iterable[Expr]) -> Expr | None:
        """A scalar condition under which all `guards` (over tiles) hold at every point of the tile; None: unknown, or
        never the case."""
        guards = tuple(guards)
        if any(self.named(g, d.name) is not None for g in guards for d in self.g.dims.values() if d.capacity > 1):
            return None  # it holds at one point
        parts = [self._everywhere(bounds.plainer(g, self.integers())) for g in guards]
        known = [p for p in parts if p is not None]
        return (conjunction([p for p in known if p != TRUE]) or TRUE) if len(known) == len(parts) else None

    def named(self, g: Expr, dim: str) -> Expr | None:
        """The one point of a dim at which an equality holds, which it says itself; None where it is of another kind."""
        if not isinstance(g, Call) or g.op != "eq":
            return None
        terms = linear(Call("sub", g.args), integers=self.integers())
        c = terms.pop(Var(dim), 0) if terms is not None else 0
        if terms is None or abs(c) != 1 or any(t is not None and dim in variables(t) for t in terms):
            return None
        return bounds.total([bounds.scaled(t, -c * n) for t, n in terms.items()])

    def _everywhere(self, g: Expr) -> Expr | None:
        if isinstance(g, Const):
            return g if g.value else None
        if not variables(g) & set(self.g.dims):
            return g
        if isinstance(g, Call) and g.op in ("and", "or"):
            parts = [self._everywhere(a) for a in g.args]
            known = [p for p in parts if p is not None]
            if not known or (g.op == "and" and len(known) < len(parts)):
                return None
            return simplify(Call(g.op, tuple(known)) if len(known) > 1 else known[0])
        if (d := bounds.difference(g)) is not None and (top := self.end(d, True)) is not None:
            everywhere = simplify(call("le", top, 0), index=True)
            return None if proves(call("not", everywhere), self.ranges()) else everywhere
        return self._truth(g, "and")

    def _somewhere(self, g: Expr) -> Expr | None:
        """A scalar condition without which the guard holds at no point of the tile; None: not known."""
        if isinstance(g, Call) and g.op in ("and", "or"):
            parts = [self._somewhere(a) for a in g.args]
            known = [p for p in parts if p is not None]
            if not known or (g.op == "or" and len(known) < len(parts)):
                return None
            return simplify(Call(g.op, tuple(known)) if len(known) > 1 else known[0])
        if any(isinstance(n, Access) and n.tensor in self.home for n in walk(g)):
            return None  # not computed yet
        g = self.read(g, LOOP)
        if not variables(g) & set(self.g.dims):
            return g
        if (d := bounds.difference(g)) is not None and (least := self.end(d, False)) is not None:
            return simplify(call("le", least, 0), index=True)
        return self._truth(g, "or")

    def _truth(self, g: Expr, monoid: str) -> Expr | None:
        """Whether data say so at every point, or at some."""
        dims = tuple(sorted(variables(g) & set(self.g.dims)))
        return self._extreme(g, dims, monoid, False) if len(dims) == 1 else None

    def ranges(self) -> dict[str, tuple[Expr | int | None, Expr | int | None]]:
        """Of grid and loop variables."""
        out: dict[str, tuple[Expr | int | None, Expr | int | None]] = {v: (0, n) for v, n in self.g.grid}
        return out | ({self.g.loop: (0, self.g.steps)} if self.g.loop else {})

    # -- counts -------------------------------------------------------------------------------------------------------

    def _counts(self) -> None:
        """Guards that cut off the tail of a dim in everything that reduces or stores it become the dim's count."""
        for d in list(self.g.dims.values()):
            needing = [o for o in self.g.ops if d.name in o.over or (o.target in self.g.stores and d.name in o.dims)]
            common = set.intersection(*(set(o.guards) for o in needing)) if needing else set()
            if any(o.place and not o.accumulate and d.name in o.over for o in needing):
                common = set()  # points that are kept out have places, after all others
            for guard in sorted(common, key=repr):
                if any(
                    d.name in o.dims and o.target in self.g.stores and not self._keeps_inside(guard, o) for o in needing
                ):
                    continue  # the excluded points exist, and are stored as empty
                h = bounds.half(guard, self.g.loop, set())
                if h is None or variables(h.rest) & set(self.g.dims) != {d.name}:
                    continue
                count = bounds.count_of(h, d.name, self.g.loop, d.capacity, self.end)
                if count is None:
                    continue
                old = self.g.dims[d.name].count
                count = count if isinstance(old, Const) else joined("min", [old, count])
                start = bounds.start_of(guard, d.name)
                moved = self.g.loop in variables(start)  # else the dim is a rank as it is, or one the mapping has cut
                self.g.dims[d.name] = Dim(d.name, d.capacity, count, start if moved else d.start)
                self.counted.add(guard)

    def _keeps_inside(self, guard: Expr, o: Op) -> bool:
        """Is the guard just what keeps the store of `o` inside its tensor (`t1*T0 + j < T`)?"""
        target = self.g.stores[o.target]
        shape = self.params[param_name(target.tensor)].shape
        return any(
            simplify(call("lt", i, n), index=True) == simplify(guard, index=True)
            for i, n in zip(target.index, shape, strict=True)
        )

    def _shorter(self, name: str, guard: Expr) -> Expr | None:
        """How many points of a dim come before those where a guard holds nowhere in the tile: the rest of a step."""
        if isinstance(guard, Call) and guard.op in ("and", "or"):
            return of_parts(guard, lambda part: self._shorter(name, part), "min", "max")
        h = self.half(guard)
        return None if h is None else bounds.count_of(h, name, self.g.loop, self.g.dims[name].capacity, self.end)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _loop_bounds(self) -> tuple[Expr, Expr]:
        """The steps in which some reduction over the streamed dims has a live point; all steps where skipping is not
        proved to leave the carried tiles as they are.  What the ends of a loop cannot say becomes `self.live`."""
        lows: list[Expr] = [Const(0)]
        highs: list[Expr] = [self.g.steps]
        streamed = self.streamed()
        nonneg = {d for d in streamed if not self._at_least_one(d)}
        tests: list[Expr] = []
        counts: dict[str, list[Expr]] = {}
        if self.idle_joins():
            for guard in self.common_guards():
                plain = bounds.plainer(guard, self.integer_params())
                first, last = self._steps(plain)
                if first is not None and (reads(first) or not self.moved):
                    lows.append(first)
                highs += [last] if last is not None else []
                if guard in self.counted:
                    nonneg -= variables(guard)
                    continue
                tests += [plain] if self._leaves_gaps(plain) else []
                for name in streamed:
                    if all(o.phase == LOOP for o in self.g.ops if name in (*o.dims, *o.over)):
                        if (count := self._shorter(name, plain)) is not None:
                            counts.setdefault(name, [self.g.dims[name].count]).append(count)
        lo, hi = joined("max", lows), joined("min", highs)
        for name, parts in counts.items():
            self.g.dims[name] = replace(self.g.dims[name], count=joined("min", parts))
        for name in streamed:
            d = self.g.dims[name]
            if name in nonneg or not self.facts().within(self.g.loop, 0, hi).proves(call("ge", d.count, 0)):
                self.g.dims[name] = replace(d, count=simplify(call("max", 0, d.count), index=True))
        self._live(tests)
        return lo, hi

    def streamed(self) -> list[str]:
        """Dims that guards cut from step to step, and that are reduced."""
        return sorted(
            d
            for d in self.g.dims
            if any(
                self.g.loop in variables(c) and d in variables(c) and d in o.over for o in self.g.ops for c in o.guards
            )
        )

    def _joins(self) -> list[Op]:
        streamed = set(self.streamed())
        return [o for o in self.g.ops if o.phase == LOOP and o.monoid and set(o.over) & streamed]

    def idle_joins(self) -> bool:
        """May steps be left out in which no reduction over a streamed dim has a live point?"""
        joins = self._joins()
        return bool(joins) and idle(self.g, joins)

    def common_guards(self) -> list[Expr]:
        """Guards of all reductions over streamed dims."""
        return sorted(set.intersection(*(set(o.guards) for o in self._joins())), key=repr)

    def _live(self, tests: list[Expr]) -> None:
        """Steps between the first and the last in which a guard holds nowhere."""
        parts = [self._somewhere(t) for t in tests]
        self.live = conjunction([p for p in dict.fromkeys(parts) if p is not None and not proves(p, self.ranges())])
        if self.live is not None:  # what it reads comes before it
            self.head[:], self.body[LOOP][:] = self.body[LOOP], []

    def _steps(self, guard: Expr) -> tuple[Expr | None, Expr | None]:
        """The first step in which a guard has a live point, and the one after the last, where that is known before
        the loop."""
        if isinstance(guard, Call) and guard.op in ("and", "or"):
            every = guard.op == "and"
            ends: list[Expr | None] = []
            for parts, op in zip(zip(*(self._steps(a) for a in guard.args), strict=True), ("max", "min"), strict=True):
                known = [p for p in parts if p is not None]
                known = known if every or len(known) == len(parts) else []
                ends.append(joined(op if every else {"max": "min", "min": "max"}[op], known) if known else None)
            return ends[0], ends[1]
        h = self.half(guard)
        least = self.end(h.rest, False, True) if h is not None else None
        if h is None or least is None:
            return None, None
        return bounds.first_step(h.step, least), bounds.last_step(h.step, least)

    def _leaves_gaps(self, guard: Expr) -> bool:
        """May a guard be empty in a step that `_steps` leaves to the loop?"""
        if isinstance(guard, Call) and guard.op in ("and", "or"):
            sides = {(a is None, b is None) for a, b in map(self._steps, guard.args)}
            split = guard.op == "or" and sides not in ({(True, False)}, {(False, True)})
            return split or any(map(self._leaves_gaps, guard.args))
        return self.g.loop in variables(guard) and self._steps(guard) == (None, None)

    def half(self, guard: Expr) -> bounds.Half | None:
        """A guard that reads nothing that moves along the loop, over tiles."""
        if self._streams(guard):
            return None
        return bounds.half(self.read(guard, PRE), self.g.loop, self.integers())

    def integer_params(self) -> set[str]:
        return {n for n, p in self.params.items() if p.dtype[0] in "iu"}

    def _streams(self, guard: Expr) -> bool:
        """Does the guard read data that move along the loop?"""
        return any(isinstance(n, Access) and (n.tensor in self.home or self.moves(n)) for n in walk(guard))

    def _at_least_one(self, name: str) -> bool:
        """Is the dim's count at least 1 in every step of the whole loop?"""
        return proves(call("ge", self.g.dims[name].count, 0), {self.g.loop: (0, self.g.steps)})


def of_parts(guard: Call, of: Callable[[Expr], Expr | None], both: str, either: str) -> Expr | None:
    """What is known of the parts of a conjunction, joined by `both`; of an alternative, all of whose parts must be
    known, joined by `either`."""
    parts = [of(part) for part in guard.args]
    known = [p for p in parts if p is not None]
    if not known or (guard.op == "or" and len(known) < len(parts)):
        return None
    return joined(both if guard.op == "and" else either, known)


def joined(op: str, parts: list[Expr]) -> Expr:
    """`min` or `max` of all parts, nested ones flattened, each once."""

    def flat(e: Expr) -> list[Expr]:
        return [f for a in e.args for f in flat(a)] if isinstance(e, Call) and e.op == op else [e]

    first, *rest = dict.fromkeys(f for p in parts for f in flat(p))
    for p in rest:
        first = call(op, first, p)
    return simplify(first, index=True)
