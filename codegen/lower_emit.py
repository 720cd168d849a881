"""From tile operations to a kernel: loads where they are needed, masks where nothing else excludes a point, dots,
stores, and the loop with its run-time bounds.

Points that a guard excludes are kept out by, in this order: the count of a dim (tails), the bounds of the loop (tiles
that hold no live point), and a select on the earliest tile from which every reader then finds its identity
(`-inf` before an exponential makes 0 after it), skipped on tiles where the guard holds everywhere.  Policy: in a product
a weight that is exactly 0 at an excluded point makes the product 0 only while the other factor is finite, so excluded
points inside a loaded tile (never those in a tail) must hold finite values, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from memcomp.codegen import bounds
from memcomp.codegen.lower_fuse import factors, kind
from memcomp.codegen.lower_ops import LOOP, POST, PRE, GroupOps, Op
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, conjunction, rebuild, substitute, transform, variables, walk
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.simplify import proves, simplify
from memcomp.ir.tile import Dim, Dot, Fold, Load, Loop, Map, Param, Statement, Store, Tile, TileKernel, When

TILE_DTYPE = {"f64": "f64", "bool": "bool"}


def tile_dtype(dtype: str) -> str:
    """How elements of a stored dtype are held in a tile."""
    return TILE_DTYPE.get(dtype, "i64" if dtype[0] in "iu" else "f32")


class Emitter:
    """Writes one kernel.  `dtype`: dtype of each group tensor's tile; `home`: the buffer that holds it."""

    def __init__(self, g: GroupOps, params: dict[str, Param], dtype: dict[str, str], home: dict[str, str]) -> None:
        self.g, self.params, self.dtype, self.home = g, params, dict(dtype), home
        self.tiles: dict[str, Tile] = {}
        self.body: dict[int, list[Statement]] = {PRE: [], LOOP: [], POST: []}
        self.loaded: dict[tuple[Access, int], Access] = {}
        self.fill: dict[str, tuple[frozenset[Expr], float]] = {}
        self.bounded: set[str] = set()     # tiles that never hold -inf or NaN while their inputs do not
        self.scalars: dict[tuple[Expr, bool], Expr] = {}
        self.counted: set[Expr] = set()
        self.names: set[str] = set(params)

    # -- names, tiles, loads ---------------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        stem = stem.replace("'", "_new").replace("@", "_")
        name, k = (stem if stem not in self.names else f"{stem}_t"), 2
        while name in self.names:
            name, k = f"{stem}_t{k}", k + 1
        self.names.add(name)
        return name

    def tile(self, target: str, dims: tuple[str, ...]) -> str:
        buffer = self.home.get(target, target)
        if buffer not in self.tiles:
            self.tiles[buffer] = Tile(self.fresh(buffer), dims, self.dtype[buffer])
        return self.tiles[buffer].name

    def read(self, e: Expr, phase: int) -> Expr:
        """The expression over tiles: params are loaded, group tensors named by their buffers."""
        if isinstance(e, Access):
            if e.tensor in self.home:
                return Access(self.tile(e.tensor, _dims(e)), e.index)
            return self.load(e, phase)
        if isinstance(e, Call):
            return rebuild(e, tuple(self.read(a, phase) for a in e.args))
        return e

    def load(self, a: Access, phase: int, guards: tuple[Expr, ...] = ()) -> Access:
        phase = phase if phase != LOOP or self.moves(a) else PRE
        for p in (phase, PRE):
            if (a, p) in self.loaded:
                return self.loaded[a, p]
        dims: list[str] = []
        for i in a.index:
            for n in walk(i):
                if isinstance(n, Var) and n.name in self.g.dims and n.name not in dims:
                    dims.append(n.name)
        lane = (self.g.group.lane or "").lower()
        if lane in dims:
            dims.remove(lane)
            dims.append(lane)
        name = self.fresh(f"{a.tensor}_t")
        self.tiles[f"load {name}"] = Tile(name, tuple(dims), tile_dtype(self.params[a.tensor].dtype))
        self.dtype[name] = tile_dtype(self.params[a.tensor].dtype)
        self.body[phase].append(Load(name, self.clamped(a)))
        got = Access(name, tuple(Var(d) for d in dims))
        self.loaded[a, phase] = got
        return got

    def moves(self, e: Expr) -> bool:
        """Does a read change along the loop?"""
        names = variables(e)
        return self.g.loop in names or any(self.g.loop in variables(self.g.dims[n].count) for n in names & set(self.g.dims))

    def clamped(self, a: Access) -> Access:
        """Indices that only a guard keeps inside the tensor are cut to it, so that no load leaves memory."""
        shape = self.params[a.tensor].shape
        return Access(a.tensor, tuple(self._clamp(i, n) for i, n in zip(a.index, shape, strict=True)))

    def _clamp(self, i: Expr, extent: Expr) -> Expr:
        guarded = [o for o in self.g.ops if any(g not in self.counted for g in o.guards)]
        if not guarded or not variables(i) or self._inside(i, extent):
            return i
        return call("max", call("min", i, simplify(call("sub", extent, 1))), 0)

    def _inside(self, i: Expr, extent: Expr) -> bool:
        """Proved from the ranges of grid, loop and dim variables: 0 <= i < extent."""
        ranges: dict[str, tuple[Expr | int | None, Expr | int | None]] = {v: (0, n) for v, n in self.g.grid}
        if self.g.loop:
            ranges[self.g.loop] = (0, self.g.steps)
        for d in self.g.dims.values():
            ranges[d.name] = (0, d.count)
        if proves(call("and", call("ge", i, 0), call("lt", i, extent)), ranges):
            return True
        for d in self.g.dims.values():   # start + i of a dim that was cut from a rank of this extent
            whole = simplify(call("add", d.start, Var(d.name)), index=True)
            if simplify(i, index=True) == whole and self._cut_from(d, extent):
                return True
        return False

    def _cut_from(self, d: Dim, extent: Expr) -> bool:
        if not isinstance(d.count, Call) or d.count.op != "min":
            return False
        left = simplify(call("sub", extent, d.start), index=True)
        return any(simplify(a, index=True) == left for a in d.count.args)

    # -- guards ----------------------------------------------------------------------------------------------------

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
        key = (data, greatest)
        if key not in self.scalars:
            name = self.fresh("greatest" if greatest else "least")
            self.tiles[f"load {name}"] = Tile(name, (), "i64")
            self.body[PRE].append(Fold(name, "max" if greatest else "min", over, data))
            self.scalars[key] = Access(name, ())
        return self.scalars[key]

    def full(self, guards: tuple[Expr, ...]) -> Expr | None:
        """A scalar condition under which all `guards` (over tiles) hold at every point of the tile; None: unknown."""
        parts = []
        for guard in guards:
            if not variables(guard) & set(self.g.dims):
                parts.append(guard)
                continue
            h = self.half(guard)
            if h is None:
                return None
            parts.append(bounds.holds_everywhere(h.step, self.g.loop, self.extreme(h, True)))
        return conjunction(parts)

    def effective(self, o: Op) -> tuple[Expr, ...]:
        return tuple(g for g in o.guards if g not in self.counted)

    def weaker_reader(self, o: Op, guards: frozenset[Expr], after: int) -> bool:
        """Will someone look at points of `o.target` that `guards` exclude?"""
        return any(o.target in u.reads() and not guards <= set(self.effective(u)) for u in self.g.ops[after:])

    # -- operations ------------------------------------------------------------------------------------------------

    def emit(self, k: int) -> None:
        o = self.g.ops[k]
        guards = self.effective(o)
        out = self.body[o.phase]
        reduced = tuple(g for g in guards if o.monoid and (o.accumulate or self._mentions(g, o.over)))
        exact = tuple(g for g in guards if g not in reduced)
        if exact and o.target not in self.g.stores and not self.weaker_reader(o, frozenset(exact), k + 1) \
                and o.target not in self.g.carried:
            exact = ()      # nobody looks at the excluded points
        masks = tuple(self.read(c, o.phase) for c in reduced)
        body = o.body
        if o.monoid:
            self._reduce(k, o, reduced, masks, out)
        else:
            self._map(o, exact, guards, body, out)
        if o.monoid and exact and not o.accumulate:
            self._select(o, exact, o.empty, out)
        if o.target in self.g.stores and not any(u.target == o.target and u.phase == o.phase for u in self.g.ops[k + 1:]):
            self._store(o)

    def _mentions(self, guard: Expr, over: tuple[str, ...]) -> bool:
        return bool(variables(guard) & set(over))

    def _map(self, o: Op, exact: tuple[Expr, ...], guards: tuple[Expr, ...], body: Expr, out: list[Statement]) -> None:
        self._set_fill(o, body, exact, guards)
        tests = tuple(self.read(c, o.phase) for c in exact)
        plain = self.read(body, o.phase)
        name = self.tile(o.target, o.dims)
        if not tests:
            out.append(Map(name, plain))
            return
        masked = Map(name, call("where", _all(tests), plain, o.empty))
        full = self.full(tests)
        out.append(When(full, (Map(name, plain),), (masked,)) if full is not None else masked)

    def _set_fill(self, o: Op, body: Expr, exact: tuple[Expr, ...], guards: tuple[Expr, ...]) -> None:
        self.fill.pop(o.target, None)
        if exact:
            self.fill[o.target] = frozenset(exact), o.empty
        elif guards and (v := self.at_fill(body, frozenset(guards))) is not None:
            self.fill[o.target] = frozenset(guards), v
        if self.never_low(body):
            self.bounded.add(o.target)

    def _reduce(self, k: int, o: Op, guards: tuple[Expr, ...], masks: tuple[Expr, ...], out: list[Statement]) -> None:
        identity = MONOIDS[o.monoid].identity
        body, select = o.body, False
        if guards and self.at_fill(body, frozenset(guards)) != identity:
            select = not self._mask_operand(k, o, guards, masks, identity, out)
        plain = self.read(body, o.phase)
        name = self.tile(o.target, o.dims)
        if select:
            masked = Fold(name, o.monoid, o.over, call("where", _all(masks), plain, identity), o.accumulate)
            full = self.full(masks)
            fold = Fold(name, o.monoid, o.over, plain, o.accumulate)
            out.append(masked if full is None else When(full, (fold,), (masked,)))
        else:
            out.extend(self._product(o, name, plain) or [Fold(name, o.monoid, o.over, plain, o.accumulate)])

    def _product(self, o: Op, name: str, body: Expr) -> list[Statement] | None:
        """A sum of a product of two tiles as a `Dot`; factors free of the reduced dims are multiplied afterwards."""
        if o.monoid != "sum":
            return None
        parts = factors(body)
        two = [p for p in parts if isinstance(p, Access) and variables(p) & set(o.over)]
        rest = [p for p in parts if not variables(p) & set(o.over)]
        if len(two) != 2 or len(two) + len(rest) != len(parts) or (rest and o.accumulate):
            return None
        a, b = two
        if set(o.dims) - variables(a) - variables(b) or any(self.dtype_of(x) not in ("f32", "f64") for x in (a, b)):
            return None
        out: list[Statement] = [Dot(name, a, b, o.over, o.accumulate)]
        if rest:
            scaled: Expr = Access(name, tuple(Var(d) for d in o.dims))
            for r in rest:
                scaled = call("mul", scaled, r)
            out.append(Map(name, scaled))
        return out

    def dtype_of(self, a: Access) -> str:
        return next(t.dtype for t in self.tiles.values() if t.name == a.tensor)

    def _mask_operand(self, k: int, o: Op, guards: tuple[Expr, ...], masks: tuple[Expr, ...], identity: float,
                      out: list[Statement]) -> bool:
        """Write, into one operand tile, a value that makes the body the identity at excluded points."""
        over = set().union(*(variables(c) for c in masks)) & set(self.g.dims)
        held = frozenset(guards)
        for a in (n for n in walk(o.body) if isinstance(n, Access)):
            maker = next((p for p in self.g.ops[:k] if p.target == a.tensor), None)
            if maker is None or maker.phase != o.phase or a.tensor in self.g.carried or not over <= set(maker.dims):
                continue
            if self.weaker_reader(maker, held, k):
                continue
            before = self.fill.get(a.tensor)
            for value in dict.fromkeys((identity, 0.0)):
                self.fill[a.tensor] = held, value
                if self.at_fill(o.body, held) == identity:
                    self._select(maker, guards, value, out)
                    return True
            self.fill.pop(a.tensor)
            if before is not None:
                self.fill[a.tensor] = before
        return False

    def _select(self, o: Op, guards: tuple[Expr, ...], value: float, out: list[Statement]) -> None:
        """Put `value` at the points of a tile that the guards exclude; joined with the map that has just made it."""
        tests = tuple(self.read(c, o.phase) for c in guards)
        name = self.tile(o.target, o.dims)
        full = self.full(tests)
        last = next((i for i in reversed(range(len(out))) if _touches(out[i], name)), None)
        made = out[last] if last is not None else None
        if isinstance(made, Map) and made.tile == name and last is not None \
                and not any(_touches(later, n) for later in out[last + 1:] for n in _tiles_of(made)):
            del out[last]
            body = made.body
        else:
            made, body = None, Access(name, tuple(Var(d) for d in o.dims))
        masked = Map(name, call("where", _all(tests), body, _constant(value, self.dtype[self.home[o.target]])))
        if full is None:
            out.append(masked)
        elif made is not None:
            out.append(When(full, (made,), (masked,)))
        else:
            out.append(When(call("not", full), (masked,)))

    def _store(self, o: Op) -> None:
        target = self.g.stores[o.target]
        name = self.tile(o.target, o.dims)
        held = {v for i in target.index for v in variables(i)}
        phase = o.phase
        if o.target in self.g.carried and o.target not in self.g.each_step and phase != POST:
            return      # stored once, after the loop
        index = target.index
        if o.target in self.g.each_step:
            k = self.g.carried[o.target]
            index = tuple(Const(0) if i == k and phase == PRE else x for i, x in enumerate(index))
        self._check_store(o, Access(target.tensor, index))
        store: Statement = Store(Access(_param(target.tensor), index), name)
        self.body[phase].append(self._once(store, held, phase))

    def _once(self, store: Statement, held: set[str], phase: int) -> Statement:
        """Grid points that would write the same element leave it to the first of them."""
        spare = [v for v, _ in self.g.grid if v not in held]
        cond = conjunction([call("eq", Var(v), 0) for v in spare])
        return store if cond is None else When(cond, (store,))

    def _check_store(self, o: Op, target: Access) -> None:
        """A guard that is all that keeps a store inside its tensor must be a count: stores have no mask."""
        left = self.effective(o)
        if left and not all(self._inside(i, n) for i, n in zip(target.index, self.params[_param(target.tensor)].shape,
                                                              strict=True)):
            raise Refusal(f"{o.target} is written under a guard at points that may lie outside it", self.g.group.name,
                          "a store has no mask")

    def store_carried(self) -> None:
        for name in self.g.carried:
            if name in self.g.stores and name not in self.g.each_step:
                target = self.g.stores[name]
                held = {v for i in target.index for v in variables(i)}
                dims = next(o.dims for o in self.g.ops if o.target == name)
                store = Store(Access(_param(name), target.index), self.tile(name, dims))
                self.body[POST].append(self._once(store, held, POST))

    # -- what excluded points hold ---------------------------------------------------------------------------------

    def at_fill(self, e: Expr, guards: frozenset[Expr]) -> float | None:
        """The value of `e` at points that `guards` exclude, where it is one known number (by the laws of `ir.ops`)."""
        if isinstance(e, Const):
            return float(e.value)
        if isinstance(e, Access):
            held = self.fill.get(e.tensor)
            return held[1] if held is not None and held[0] == guards else None
        if not isinstance(e, Call):
            return None
        v = [self.at_fill(a, guards) for a in e.args]
        if all(x is not None for x in v):
            for at, value in OPS[e.op].limits:
                if len(v) == 1 and v[0] == at:
                    return value
            known = float(OPS[e.op].numpy(*v))
            return None if math.isnan(known) else known
        if e.op == "mul" and 0.0 in v:
            return 0.0                       # policy: excluded points of loaded tiles are finite
        if e.op == "max" and math.inf in v or e.op == "min" and -math.inf in v:
            return next(x for x in v if x is not None and math.isinf(x))
        if e.op == "sub" and v[0] == -math.inf and self.never_low(e.args[1]):
            return -math.inf
        if e.op == "where" and v[1] is not None and v[1] == v[2]:
            return v[1]
        return None

    def never_low(self, e: Expr) -> bool:
        """Is the value never -inf (for inputs that are not +inf or NaN)?"""
        if isinstance(e, Const):
            return e.value > -math.inf
        if isinstance(e, Access):
            return e.tensor in self.bounded
        if not isinstance(e, Call):
            return True
        if OPS[e.op].range[0] > -math.inf:
            return True
        if e.op == "max":
            return any(self.never_low(a) for a in e.args)
        if e.op == "where":
            test, yes, no = e.args
            if isinstance(test, Call) and test.op == "eq" and Const(-math.inf) in test.args and no in test.args:
                return self.never_low(yes)
            if isinstance(test, Call) and test.op in ("gt", "ne") and test.args == (yes, Const(-math.inf)):
                return self.never_low(no)
            return self.never_low(yes) and self.never_low(no)
        return False

    # -- the kernel ------------------------------------------------------------------------------------------------

    def kernel(self, name: str) -> TileKernel:
        self._counts()
        if self.g.loop:
            lo, hi = self._loop_bounds()
        for k in range(len(self.g.ops)):
            self.emit(k)
        self.store_carried()
        body = list(self.body[PRE])
        if self.g.loop:
            body.append(Loop(self.g.loop, lo, hi, tuple(self.body[LOOP])))
        body += self.body[POST]
        used = {d for t in self.tiles.values() for d in t.dims}
        for s in _statements(tuple(body)):
            used |= set(getattr(s, "over", ()))
        dims = tuple(d for d in self.g.dims.values() if d.name in used)
        return TileKernel(name, self.g.grid, dims, tuple(self.tiles.values()), tuple(body))

    def _counts(self) -> None:
        """Guards that cut off the tail of a dim in everything that reduces or stores it become the dim's count."""
        for d in list(self.g.dims.values()):
            needing = [o for o in self.g.ops if d.name in o.over or (o.target in self.g.stores and d.name in o.dims)]
            common = set.intersection(*(set(o.guards) for o in needing)) if needing else set()
            for guard in sorted(common, key=repr):
                if any(d.name in o.dims and o.target in self.g.stores and not self._keeps_inside(guard, o) for o in needing):
                    continue    # the excluded points exist, and are stored as empty
                h = bounds.half(guard, self.g.loop, set(self.g.dims), set(), set())
                count = bounds.count_of(h, d.name, self.g.loop, d.capacity) if h is not None else None
                if count is None:
                    continue
                old = self.g.dims[d.name].count
                if not isinstance(old, Const):
                    count = simplify(call("min", old, count), index=True)
                self.g.dims[d.name] = Dim(d.name, d.capacity, count, bounds.start_of(guard, d.name))
                self.counted.add(guard)

    def _keeps_inside(self, guard: Expr, o: Op) -> bool:
        """Is the guard just what keeps the store of `o` inside its tensor (`t1*T0 + j < T`)?"""
        target = self.g.stores[o.target]
        shape = self.params[_param(target.tensor)].shape
        return any(simplify(call("lt", i, n), index=True) == simplify(guard, index=True)
                   for i, n in zip(target.index, shape, strict=True))

    def _loop_bounds(self) -> tuple[Expr, Expr]:
        """The steps in which some reduction over the streamed dims has a live point; all steps where skipping is not
        proved to leave the carried tiles as they are."""
        lows: list[Expr] = [Const(0)]
        highs: list[Expr] = [self.g.steps]
        streamed = {d for d in self.g.dims if any(
            self.g.loop in variables(c) and d in variables(c) and d in o.over for o in self.g.ops for c in o.guards)}
        joins = [o for o in self.g.ops if o.phase == LOOP and o.monoid and set(o.over) & streamed]
        nonneg = {d for d in streamed if not self._at_least_one(d)}
        if joins and idle(self.g, {o.target for o in joins if not o.accumulate}, joins):
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
        return _joined("max", lows), _joined("min", highs)

    def _streams(self, guard: Expr) -> bool:
        """Does the guard read data that move along the loop?"""
        return any(isinstance(n, Access) and (n.tensor in self.home or self.moves(n)) for n in walk(guard))

    def _at_least_one(self, name: str) -> bool:
        """Is the dim's count at least 1 in every step of the whole loop?"""
        return proves(call("ge", self.g.dims[name].count, 0), {self.g.loop: (0, self.g.steps)})


def idle(g: GroupOps, parts: set[str], joins: list[Op]) -> bool:
    """Does a step in which the reductions of `joins` find no point leave every carried tile as it is?

    Decided by evaluating the loop's operations at one point, with the carried tiles at their initial values and at
    random ones: the updates are closed forms in them, so equality there is equality (Schwartz-Zippel, up to chance).
    """
    import numpy as np

    if g.each_step or any(o.target in g.stores and o.target not in g.carried for o in g.ops if o.phase == LOOP):
        return False
    start = {o.target: o.body for o in g.ops if o.phase == PRE and o.target in g.carried}
    joined = {id(o) for o in joins}
    rng = np.random.default_rng(0)
    for trial in range(4):
        env: dict[str, float] = {}
        for name in g.carried:
            init = start.get(name)
            random = float(rng.uniform(0.5, 2.0))
            env[name] = random if trial or not isinstance(init, Const) else float(init.value)
        before = dict(env)
        for o in g.ops:
            if o.phase != LOOP:
                continue
            if id(o) in joined:
                if not o.accumulate:
                    env[o.target] = MONOIDS[o.monoid].identity
            elif o.monoid:
                if o.accumulate or o.target in g.carried:
                    return False
                env[o.target] = float(rng.uniform(0.5, 2.0))
            else:
                with np.errstate(all="ignore"):
                    env[o.target] = _evaluate(o.body, env, rng)
        if any(not (env[n] == before[n] or abs(env[n] - before[n]) <= 1e-12 * abs(before[n])) for n in g.carried):
            return False
    return True


def _evaluate(e: Expr, env: dict[str, float], rng: object) -> float:
    if isinstance(e, Const):
        return float(e.value)
    if isinstance(e, Access):
        if e.tensor not in env:
            env[e.tensor] = float(rng.uniform(0.5, 2.0))  # type: ignore[attr-defined]
        return env[e.tensor]
    if isinstance(e, Call):
        return float(OPS[e.op].numpy(*(_evaluate(a, env, rng) for a in e.args)))
    return float(rng.integers(1, 9))  # type: ignore[attr-defined]


def _param(name: str) -> str:
    """The param of a tensor: the new value of a state (`X'`) is written over the old one."""
    return name.removesuffix("'")


def _dims(a: Access) -> tuple[str, ...]:
    return tuple(i.name for i in a.index if isinstance(i, Var))


def _joined(op: str, parts: list[Expr]) -> Expr:
    def flat(e: Expr) -> list[Expr]:
        return [f for a in e.args for f in flat(a)] if isinstance(e, Call) and e.op == op else [e]

    first, *rest = dict.fromkeys(f for p in parts for f in flat(p))
    for p in rest:
        first = call(op, first, p)
    return simplify(first, index=True)


def _all(tests: tuple[Expr, ...]) -> Expr:
    out = conjunction(tests)
    assert out is not None
    return out


def _constant(value: float, dtype: str) -> bool | int | float:
    return bool(value) if dtype == "bool" else int(value) if dtype == "i64" else value


def _tiles_of(s: Statement) -> set[str]:
    """Names that a statement reads or writes."""
    out = {getattr(s, "tile", "")}
    for e in (getattr(s, n, None) for n in ("body", "source", "target", "a", "b", "cond")):
        if e is not None and not isinstance(e, tuple):
            out |= {n.tensor for n in walk(e) if isinstance(n, Access)}
    for inner in (*getattr(s, "orelse", ()), *(s.body if isinstance(s, (When, Loop)) else ())):
        out |= _tiles_of(inner)
    return out


def _touches(s: Statement, name: str) -> bool:
    return name in _tiles_of(s)


def _statements(body: tuple[Statement, ...]) -> list[Statement]:
    out: list[Statement] = []
    for s in body:
        out.append(s)
        if isinstance(s, Loop):
            out += _statements(s.body)
        elif isinstance(s, When):
            out += _statements(s.body) + _statements(s.orelse)
    return out


__all__ = ["Emitter", "Refusal", "kind", "substitute", "tile_dtype", "transform", "Callable"]
