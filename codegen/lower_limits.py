"""Which part of the loop and of a tile is live: loop bounds, counts, and where a guard holds everywhere."""

from __future__ import annotations

from dataclasses import replace

from memcomp.codegen import bounds
from memcomp.codegen.lower_laws import idle
from memcomp.codegen.lower_ops import LOOP, PRE, Op
from memcomp.codegen.lower_tiles import Tiles, param_name
from memcomp.ir.expr import Access, Call, Const, Expr, call, conjunction, variables, walk
from memcomp.ir.simplify import proves, simplify
from memcomp.ir.tile import Dim, Fold, Load, Tile


class Limits(Tiles):
    """Guards of one kernel, read once more for what they say about whole tiles and whole steps."""

    def integers(self) -> set[str]:
        return {t.name for t in self.tiles.values() if t.dtype == "i64"}

    def half(self, guard: Expr) -> bounds.Half | None:
        """`guard` is over tiles already."""
        inside = {t.name for k, t in self.tiles.items() if self._written_in_loop(k, t.name)}
        return bounds.half(guard, self.g.loop, set(self.g.dims), self.integers(), inside)

    def _written_in_loop(self, key: str, name: str) -> bool:
        if key.startswith("load "):
            return any(isinstance(s, Load) and s.tile == name for s in self.body[LOOP])
        return any(o.phase == LOOP and self.home[o.target] == key for o in self.g.ops)

    def extreme(self, h: bounds.Half, greatest: bool) -> Expr:
        fixed = {d.name for d in self.g.dims.values() if self.g.loop not in variables(d.count)}
        return bounds.extreme(h, greatest, self.g.dims.__getitem__, fixed, self.scalar)

    def scalar(self, data: Expr, over: tuple[str, ...], greatest: bool) -> Expr:
        """The greatest or least of data over a tile's points, computed once before the loop."""
        if isinstance(data, Call) and data.op == "neg":
            return call("neg", self.scalar(data.args[0], over, not greatest))
        key = (data, greatest)
        if key not in self.scalars:
            name = self.fresh("greatest" if greatest else "least")
            self.tiles[f"load {name}"] = Tile(name, (), "i64")
            inside = tuple(d for d in over if d in self.g.dims)  # a grid variable is one number in a tile
            self.body[PRE].append(Fold(name, "max" if greatest else "min", inside, data))
            self.scalars[key] = Access(name, ())
        return self.scalars[key]

    def full(self, guards: tuple[Expr, ...]) -> Expr | None:
        """A scalar condition under which all `guards` (over tiles) hold at every point of the tile; None: unknown, or
        never the case."""
        parts = []
        for guard in guards:
            if not variables(guard) & set(self.g.dims):
                parts.append(guard)
                continue
            h = self.half(guard)
            if h is None:
                return None
            everywhere = bounds.holds_everywhere(h.step, self.g.loop, self.extreme(h, True))
            if proves(call("not", everywhere), self.ranges()):
                return None
            parts.append(everywhere)
        return conjunction(parts)

    def ranges(self) -> dict[str, tuple[Expr | int | None, Expr | int | None]]:
        """Of grid and loop variables."""
        out: dict[str, tuple[Expr | int | None, Expr | int | None]] = {v: (0, n) for v, n in self.g.grid}
        return out | ({self.g.loop: (0, self.g.steps)} if self.g.loop else {})

    def _counts(self) -> None:
        """Guards that cut off the tail of a dim in everything that reduces or stores it become the dim's count."""
        for d in list(self.g.dims.values()):
            needing = [o for o in self.g.ops if d.name in o.over or (o.target in self.g.stores and d.name in o.dims)]
            common = set.intersection(*(set(o.guards) for o in needing)) if needing else set()
            for guard in sorted(common, key=repr):
                if any(
                    d.name in o.dims and o.target in self.g.stores and not self._keeps_inside(guard, o) for o in needing
                ):
                    continue  # the excluded points exist, and are stored as empty
                h = bounds.half(guard, self.g.loop, set(self.g.dims), set(), set())
                count = bounds.count_of(h, d.name, self.g.loop, d.capacity) if h is not None else None
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

    def _loop_bounds(self) -> tuple[Expr, Expr]:
        """The steps in which some reduction over the streamed dims has a live point; all steps where skipping is not
        proved to leave the carried tiles as they are."""
        lows: list[Expr] = [Const(0)]
        highs: list[Expr] = [self.g.steps]
        streamed = {
            d
            for d in self.g.dims
            if any(
                self.g.loop in variables(c) and d in variables(c) and d in o.over for o in self.g.ops for c in o.guards
            )
        }
        joins = [o for o in self.g.ops if o.phase == LOOP and o.monoid and set(o.over) & streamed]
        nonneg = {d for d in streamed if not self._at_least_one(d)}
        if joins and idle(self.g, joins):
            common = set.intersection(*(set(o.guards) for o in joins))
            for guard in sorted(common, key=repr):
                test = self.read(guard, PRE) if not self._streams(guard) else None
                h = self.half(test) if test is not None else None
                if h is None:
                    continue
                least = self.extreme(h, False)
                first, last = bounds.first_step(h.step, least), bounds.last_step(h.step, least)
                lows += [first] if first is not None else []
                highs += [last] if last is not None else []
                if guard in self.counted:
                    nonneg -= variables(guard)
        for name in nonneg:
            d = self.g.dims[name]
            self.g.dims[name] = replace(d, count=simplify(call("max", 0, d.count), index=True))
        return joined("max", lows), joined("min", highs)

    def _streams(self, guard: Expr) -> bool:
        """Does the guard read data that move along the loop?"""
        return any(isinstance(n, Access) and (n.tensor in self.home or self.moves(n)) for n in walk(guard))

    def _at_least_one(self, name: str) -> bool:
        """Is the dim's count at least 1 in every step of the whole loop?"""
        return proves(call("ge", self.g.dims[name].count, 0), {self.g.loop: (0, self.g.steps)})


def joined(op: str, parts: list[Expr]) -> Expr:
    """`min` or `max` of all parts, nested ones flattened, each once."""

    def flat(e: Expr) -> list[Expr]:
        return [f for a in e.args for f in flat(a)] if isinstance(e, Call) and e.op == op else [e]

    first, *rest = dict.fromkeys(f for p in parts for f in flat(p))
    for p in rest:
        first = call(op, first, p)
    return simplify(first, index=True)
