"""What a program costs on a machine: operations, traffic and footprint per level, and a floor for its time.

Operations: points that guards let take part, times the operations of the body, plus one per point for a reduction.
What tasks read and no other task's result is, each makes itself: a statement that lacks a space rank runs once for each
of its points where something that follows from it in the group has that rank.

Compulsory traffic: what arguments must move once: every element of inputs that is read and of outputs and new states
that is written, at its dtype (of a table that is gathered from at most as many elements as points read it).

Traffic as mapped: a group is a nest of loops, its space ranks and then its loop order, around tiles.  With

    inside(T, k) = bytes of T touched while loops 1..k stand still (k = number of loops: one tile)
    work(k)      = sum of inside(T, k) over arguments and temporaries of the group

a tensor that lacks loop k is touched again in every round of it, and is still there in a level of C bytes if
work(k) <= C.  So a level receives, from the level behind it,

    sum over T of bytes(T) * product of the extents of the loops k that T lacks and where work(k) > C.

Where not even a tile fits, the share 1 - C / work(tile) of it crosses the boundary for each statement of the group that
reads an argument again, and for temporaries, else kept, once as they are written and once for each reader.
Without mapping every statement is a group of its own without loops: it reads its inputs and writes its output.

A level that the program places its tensors in (`addressed`) holds one tile of each at a time, and no more: a tensor is
touched again in every round of the loops it lacks that stand outside the last loop it has.  `keep X @ level` says that
X stays in that level, and takes no room in those behind it.

Time: per group the largest of operations / peak, transcendentals / their peak, and traffic / bandwidth of each level
behind the second, at the points that its loops visit (`memcomp.ir.visits`); what maps inside the loop read and write
moves between the nearest two levels besides their operations, and what its steps load comes from the level after these,
over and over.  The lanes of a tile are computed all; what does not change along a dim of the tile is computed once for
it.  Where the last round of tasks leaves cores idle it takes as long as a full one (what waits for a level, by the
share of its bandwidth that so few cores draw).  Groups follow one another, each after its launch.  What else moves
between the nearest two (registers and cache) is counted but bounds nothing: an emitter cuts tiles into registers once
more.
On a target with arrays of processing elements `memcomp.ir.arrays` counts cycles instead of operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from memcomp.ir.arrays import PhaseCost, schedule
from memcomp.ir.cascade import Cascade, Einsum, Knob
from memcomp.ir.counts import Sizes, operations, tensor_of, width
from memcomp.ir.expr import Access, Call, Const, Expr, reads, variables, walk
from memcomp.ir.program import Group, Program
from memcomp.ir.target import Level, Target
from memcomp.ir.visits import Visits


@dataclass(frozen=True, slots=True)
class LevelCost:
    """traffic: bytes exchanged with the next nearer level; footprint: bytes that are held here at a time."""

    name: str
    traffic: float
    footprint: float


@dataclass(frozen=True, slots=True)
class UnitCost:
    """cycles: of work on this array; utilisation: their share of the whole time."""

    name: str
    cycles: float
    utilisation: float


@dataclass(frozen=True, slots=True)
class Cost:
    """flops: additions, multiplications, maxima; special: exp, log, division and so on; the rest in bytes, seconds.

    seconds: as mapped; floor: the roofline, with compulsory traffic, every unit busy and nothing computed twice.
    again: operations, of flops and special, that are made anew because several tasks need what they give.
    units, phases: on a target with arrays, else empty.
    """

    flops: float
    special: float
    compulsory: float
    levels: tuple[LevelCost, ...]
    seconds: float
    floor: float
    units: tuple[UnitCost, ...] = ()
    phases: tuple[PhaseCost, ...] = ()
    again: float = 0.0

    @property
    def traffic(self) -> float:
        """Bytes to and from memory."""
        return self.levels[-1].traffic

    @property
    def intensity(self) -> float:
        """Operations per byte of memory traffic."""
        return (self.flops + self.special) / self.traffic if self.traffic else math.inf

    def __str__(self) -> str:
        rows = [("operations", f"{self.flops:.6g}"), ("exp, division and the like", f"{self.special:.6g}"),
                *((("of them made again", f"{self.again:.6g}"),) if self.again else ()),
                ("compulsory traffic", f"{self.compulsory:.6g} B"),
                *((f"traffic to {x.name}", f"{x.traffic:.6g} B, holding {x.footprint:.6g} B") for x in self.levels),
                ("time", f"{self.seconds:.6g} s, at least {self.floor:.6g} s"),
                *((f"unit {u.name}", f"{u.cycles:.6g} cycles, busy {u.utilisation:.1%}") for u in self.units)]
        for k, p in enumerate(self.phases):
            work = ", ".join(f"{n:.6g} on {unit}" for unit, n in p.busy) or "drain"
            rows.append((f"phase {k + 1} of {p.group}", f"{p.cycles:.6g} cycles: {work}"))
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


def cost(program: Program, sizes: Mapping[str, int], target: Target, moved: float | None = None) -> Cost:
    """The cost with these extents of the symbolic ranks (a bounded or ragged rank may be left to its bound).

    moved: bytes to and from memory where they are known, by measurement or from another mapper; they stand in for what
    the model counts, shared out among the groups in its proportions.
    """
    c, n = program.cascade, Sizes(program.cascade, sizes)
    grouped = {t for g in program.mapping.groups for t in g.tensors}
    nests = [_Nest(c, n, g, tuple(e for e in c.einsums if e.names[0] in g.tensors)) for g in program.mapping.groups]
    nests += [_Nest(c, n, Group(e.out.tensor, e.names), (e,)) for e in c.einsums if e.names[0] not in grouped]
    flops = sum(x.flops for x in nests)
    special = sum(x.special for x in nests)
    levels = []
    for at, level in enumerate(target.levels[1:], 1):
        footprint = max((x.held(target, at) for x in nests), default=0.0)
        if at == len(target.levels) - 1:
            footprint = _arguments(c, n, nests)
        levels.append(LevelCost(level.name, sum(x.traffic(target, at - 1) for x in nests), footprint))
    share = 1.0
    if moved is not None:
        share = moved / levels[-1].traffic if levels[-1].traffic else 1.0
        levels[-1] = LevelCost(levels[-1].name, moved, levels[-1].footprint)
    phases = tuple(schedule(x.group, x.points, target) for x in nests) if target.arrays else ((),) * len(nests)
    seconds = sum(_seconds(x, target, p, share) for x, p in zip(nests, phases, strict=True))
    least = compulsory(program, sizes)
    floor = max(sum(f / target.peak(d) for x in nests for d, f in x.needed.items()),
                sum(x.special_needed for x in nests) / target.special, least / target.memory.bandwidth)
    again = flops + special - sum(x.once for x in nests)
    every = tuple(p for each in phases for p in each)
    return Cost(flops, special, least, tuple(levels), seconds, floor, _units(every, target, seconds), every, again)


def _units(phases: tuple[PhaseCost, ...], target: Target, seconds: float) -> tuple[UnitCost, ...]:
    busy = {u: sum(n for p in phases for unit, n in p.busy if unit == u) for u in target.arrays}
    return tuple(UnitCost(u, n, n / (seconds * target.clock) if seconds else 0.0) for u, n in busy.items())


def tile_bytes(program: Program, group: Group, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes of one tile of each tensor that only this group of the program knows."""
    c = program.cascade
    nest = _Nest(c, Sizes(c, sizes), group, tuple(e for e in c.einsums if e.names[0] in group.tensors))
    return {name: nest.tile(name) for name in nest.inner}


def footprint(program: Program, group: Group, sizes: Mapping[str, int]) -> float:
    """Bytes of a task's tiles: of the group's own tensors and of the arguments that it reads and writes."""
    c = program.cascade
    nest = _Nest(c, Sizes(c, sizes), group, tuple(e for e in c.einsums if e.names[0] in group.tensors))
    return nest.work(len(nest.loops))


def tasks(program: Program, group: Group, sizes: Mapping[str, int]) -> int:
    """How many tasks of the group may run at a time: the points of its space ranks."""
    c = program.cascade
    return _Nest(c, Sizes(c, sizes), group, tuple(e for e in c.einsums if e.names[0] in group.tensors)).tasks


def steps(program: Program, group: Group, sizes: Mapping[str, int]) -> int:
    """How many steps the longest loop of a task of the group has; its ranks may be tiles of a rank."""
    c = program.cascade
    nest = _Nest(c, Sizes(c, sizes), group, tuple(e for e in c.einsums if e.names[0] in group.tensors))
    return max((nest.extent(v) for v in nest.loops if v.upper() not in group.space), default=1)


def compulsory(program: Program, sizes: Mapping[str, int]) -> float:
    """Bytes that the arguments must move at least once."""
    c, n = program.cascade, Sizes(program.cascade, sizes)
    total = 0.0
    for t in c.tensors:
        if t.role == "temp":
            continue
        names = (t.name, t.name + "'")
        read = [a for e in c.einsums for a in e.accesses() if a.tensor in names and t.role != "out"]
        written = [o for e in c.einsums for o in e.outs if o.tensor in names]
        for accesses in (read, written):
            ways = {a.index for a in accesses}  # K[2*h] and K[2*h + 1] are different elements
            asked = sum(n.points({v for i in index for v in variables(i)}) for index in ways)
            total += min(asked, n.elements(t)) * width(c, t.name)
    return total


def _arguments(c: Cascade, n: Sizes, nests: list[_Nest]) -> float:
    names = {t.name for t in c.tensors if t.role != "temp"}
    names |= {name.removesuffix("'") for x in nests for name in x.outer}
    return sum(n.elements(tensor_of(c, x)) * width(c, x) for x in names)


def _seconds(x: _Nest, target: Target, phases: tuple[PhaseCost, ...], share: float) -> float:
    if target.arrays:
        times = [sum(p.cycles for p in phases) / target.clock]
    else:
        idle = _idle(x.tasks, target.threads, 1.0 / target.threads)
        busy = sum(n * max(1.0, target.rows(dtype) / rows) / target.peak(dtype)
                   for (dtype, rows), n in x.visited.items()) + x.passed / target.levels[1].bandwidth
        busy += x.loaded / target.levels[min(2, len(target.levels) - 1)].bandwidth
        times = [busy * idle, x.special_visited / target.special * idle]
    for at, level in enumerate(target.levels[2:], 1):
        known = share if level is target.memory else x.made
        waits = _idle(x.tasks, target.threads, level.alone)
        times.append(x.traffic(target, at) * known / level.bandwidth * waits)
    return max(times) + target.launch


def _idle(tasks: int, threads: int, alone: float) -> float:
    """How many times longer tasks take because cores idle in their last round; alone: the share of a resource that one
    core draws."""
    if not tasks:
        return 0.0
    last = tasks % threads
    return (tasks - last + (last / min(1.0, alone * last) if last else 0.0)) / tasks


class _Nest:
    """A group as loops around tiles."""

    def __init__(self, c: Cascade, n: Sizes, g: Group, einsums: tuple[Einsum, ...]) -> None:
        self.c, self.n, self.group, self.einsums = c, n, g, einsums
        self.cut = {r.lower(): self._tile(size) for r, size in g.partition}
        written = {name for e in einsums for name in e.names}
        elsewhere = {a.tensor for e in c.einsums if e not in einsums for a in e.accesses()}
        declared = {t.name + s for t in c.tensors if t.role in ("out", "state") for s in ("", "'")}
        # argument -> (variables, statements that touch it so); temporary -> variables
        self.outer: dict[str, dict[frozenset[str], int]] = {}
        self.inner: dict[str, frozenset[str]] = {}
        self.places: dict[tuple[str, frozenset[str]], set[tuple[Expr, ...]]] = {}  # indices of an argument
        self.readers: Counter[str] = Counter()
        self.size: dict[str, tuple[int, int]] = {}
        self.touched: dict[tuple[str, frozenset[str], int], float] = {}
        self.crossed: dict[tuple[Level, frozenset[str]], float] = {}
        self.points: list[tuple[Einsum, float]] = []
        for e in einsums:
            self.readers.update({a.tensor for a in e.accesses()})
            for a in e.accesses():
                self.places.setdefault((a.tensor, self._variables(a)), set()).add(a.index)
            for name, vs in {(a.tensor, self._variables(a)) for a in e.accesses()}:
                if name not in written:
                    self._touch(name, vs)
            for o in e.outs:
                if o.tensor in declared or o.tensor in elsewhere or len(einsums) == 1:
                    self._touch(o.tensor, self._variables(o))
                else:
                    self.inner[o.tensor] = self.inner.get(o.tensor, frozenset()) | self._variables(o)
        inside = {v for e in einsums for v in self._split(set(e.space()))}
        self.loops = [v for v in (r.lower() for r in (*g.space, *g.loop_order)) if v in inside]
        self.tasks = math.prod(self.extent(v) for v in self.loops if v.upper() in g.space)
        self.again = self._again()
        self.flops = self.special = self.once = 0.0  # once: of both, without what is computed again
        # operations, by dtype and rows of the smaller operand's tile, at every point that the loops visit
        self.visited: dict[tuple[str, int], float] = {}
        self.needed: dict[str, float] = {}  # of them at points that own guards leave too, once
        self.special_visited = self.special_needed = self.passed = 0.0
        steps = {v for v in self.loops if v.upper() not in g.space}
        visits = Visits(n, einsums, self.loops, steps, self.cut, self.extent)
        self.made = visits.share()  # of the steps
        for e in einsums:
            plain, special = operations(e.body)
            live, reached, again = n.live(e), visits.points(e) * self._padded(e), self.again[e.names[0]]
            rows = self._rows(e)
            self.points.append((e, live * again))
            plain += e.reduce is not None
            self.flops += plain * live * again
            self.special += special * live * again
            self.once += (plain + special) * live
            each, costly = self._hoisted(e)
            dtype = self._dtype(e)
            key = dtype, rows
            self.visited[key] = self.visited.get(key, 0.0) + each * reached * again
            self.needed[dtype] = self.needed.get(dtype, 0.0) + each * min(live, reached)
            self.special_visited += costly * reached * again
            self.special_needed += costly * min(live, reached)
            if e.reduce is None and self._split(set(e.space())) & steps:
                touched = (*e.names, *(a.tensor for a in walk(e.body) if isinstance(a, Access)))
                self.passed += reached * again * sum(width(c, name) for name in touched)  # bytes
        self.loaded = self.made * self._loaded(steps)  # bytes

    def _hoisted(self, e: Einsum) -> tuple[float, float]:
        """Operations at a point, as `operations`: what does not change along a dim of the tile is made once for it."""
        plain, special = float(e.reduce is not None), 0.0
        dims = self._split(set(e.space())) - set(self.loops)
        for x in walk(e.body):
            if isinstance(x, Call) and reads(x):
                inner = sum(operations(a)[0] for a in x.args), sum(operations(a)[1] for a in x.args)
                own = [n - m for n, m in zip(operations(x), inner, strict=True)]
                times = math.prod(self.extent(v) for v in dims - self._split(set(variables(x))))
                plain, special = plain + own[0] / max(times, 1), special + own[1] / max(times, 1)
        return plain, special

    def _rows(self, e: Einsum) -> int:
        """Of a product, the points of a tile that one operand has and the other lacks: the fewer of both sides."""
        operands = [a for a in walk(e.body) if isinstance(a, Access)] if e.reduce is not None else []
        if len(operands) != 2:
            return 1 << 30
        a, b = ({v for v in self._variables(x) if v not in self.loops} for x in operands)
        return max(1, min(math.prod(self.extent(v) for v in own) for own in (a - b, b - a)))

    def _padded(self, e: Einsum) -> float:
        """How many times more points than its rank has the tiles across the lanes hold."""
        lane = (self.group.lane or "").lower().removesuffix("0")
        if lane not in self.cut or lane not in e.space():
            return 1.0
        n = self.n(lane.upper())
        return -(-n // self.cut[lane]) * self.cut[lane] / n if n else 1.0

    def _loaded(self, steps: set[str]) -> float:
        """Bytes of arguments that all steps of all tasks bring into their tiles."""
        return sum(self._bytes(name, vs, 0) * math.prod(self.extent(v) for v in self.loops if v not in vs)
                   for name, ways in self.outer.items() for vs in ways if vs & steps)

    def _again(self) -> dict[str, int]:
        """How often each tensor of the group is made: the points of the space ranks that it lacks and a reader has."""
        space = {v for v in self.loops if v.upper() in self.group.space}
        own: dict[str, set[str]] = {}
        for e in self.einsums:
            for name in e.names:
                own[name] = own.get(name, set()) | self._split(set(e.space())) & space
        asked = {name: set(has) for name, has in own.items()}
        grew = any(has != space for has in own.values())
        edges = [(e.names, {*e.names, *(a.tensor for a in e.accesses())} & own.keys()) for e in reversed(self.einsums)]
        while grew:  # once back to front, and once more for each loop
            grew = False
            for names, from_ in edges:
                mine = set[str]().union(*(asked[name] for name in names))
                for name in from_:
                    grew |= not mine <= asked[name]
                    asked[name] |= mine
        return {name: math.prod(self.extent(v) for v in asked[name] - has) for name, has in own.items()}

    def _tile(self, size: object) -> int:
        if isinstance(size, Knob):
            return self.n.given.get(size.name, size.choices[0])
        assert isinstance(size, Const)
        return int(size.value)

    def _variables(self, a: Access) -> frozenset[str]:
        return frozenset(self._split({v for i in a.index for v in variables(i)}))

    def _touch(self, name: str, vs: frozenset[str]) -> None:
        known = self.outer.setdefault(name, {})
        known[vs] = known.get(vs, 0) + 1

    def _split(self, names: set[str]) -> set[str]:
        """Variables of ranks that the mapping cuts become their two parts."""
        out: set[str] = set()
        for v in names:
            out |= {v + "1", v + "0"} if v in self.cut else {v}
        return out

    def extent(self, v: str) -> int:
        whole = v[:-1]
        if whole in self.cut:
            size = self.cut[whole]
            n = self.n(whole.upper())
            return min(size, n) if v.endswith("0") else -(-n // size)
        return self.n(v.upper())

    def _dtype(self, e: Einsum) -> str:
        """What the multipliers see: the common dtype of the operands, f32 where a temporary takes part."""
        dtypes = {tensor_of(self.c, a.tensor).dtype for a in walk(e.body) if isinstance(a, Access)}
        return dtypes.pop() if len(dtypes) == 1 else "f32"

    def _bytes(self, name: str, vs: frozenset[str], fixed: int) -> float:
        """Bytes of one tensor touched while the first `fixed` loops stand still."""
        key = name, vs, fixed
        if key not in self.touched:
            if name not in self.size:
                self.size[name] = self.n.elements(tensor_of(self.c, name)), width(self.c, name)
            elements, each = self.size[name]
            still = set(self.loops[:fixed])
            places = max(len(self.places.get((name, vs), ())), 1)
            asked = places * math.prod(self.extent(v) for v in vs if v not in still)
            self.touched[key] = float(min(asked, elements)) * each
        return self.touched[key]

    def tile(self, name: str) -> float:
        """Bytes of a tile of a temporary."""
        return self._bytes(name, self.inner[name], len(self.loops))

    def work(self, fixed: int, nearer: frozenset[str] = frozenset()) -> float:
        """Bytes in use while the first `fixed` loops stand still, without what is kept in `nearer` levels."""
        away = self._kept(nearer)
        arguments = (max(self._bytes(t, vs, fixed) for vs in ways) for t, ways in self.outer.items() if t not in away)
        inner = (self.tile(t) for t in self.inner if t not in away)
        return sum(arguments) + sum(inner)

    def _kept(self, levels: frozenset[str]) -> set[str]:
        return {t for t, level in self.group.keep if level in levels}

    def held(self, target: Target, at: int) -> float:
        """The largest working set that fits in a level; a tile if none does."""
        level, nearer = target.levels[at], frozenset(x.name for x in target.levels[:at])
        tile = self.work(len(self.loops), nearer)
        if level.addressed:
            return tile
        return max((w for k in range(len(self.loops)) if (w := self.work(k, nearer)) <= level.bytes), default=tile)

    def traffic(self, target: Target, at: int) -> float:
        """Bytes across the boundary behind a level."""
        key = target.levels[at], frozenset(x.name for x in target.levels[:at])
        if key not in self.crossed:
            self.crossed[key] = self._traffic(*key)
        return self.crossed[key]

    def _traffic(self, level: Level, nearer: frozenset[str]) -> float:
        total, capacity, loops = 0.0, level.bytes, self.loops
        tile = self.work(len(loops), nearer)
        over = 1.0 - capacity / tile if tile > capacity else 0.0
        spilled = [k for k in range(len(loops)) if self.work(k + 1, nearer) > capacity]
        for name, ways in self.outer.items():
            for vs, readers in ways.items():
                if level.addressed:
                    spilled = list(range(max((k for k, v in enumerate(loops) if v in vs), default=0)))
                again = math.prod(self.extent(loops[k]) for k in spilled if loops[k] not in vs)
                total += self._bytes(name, vs, 0) * (again + over * (readers - 1))
        for name, vs in self.inner.items():
            if name in self._kept(nearer):
                continue
            total += over * (1 + self.readers[name]) * self._bytes(name, vs, 0) * self.again.get(name, 1)
        return total
