"""Which task of a launch comes when: tasks that stream the same data run at one time, and the longest first.

A GPU starts tasks in the order of their numbers and holds some hundreds at once.  Two things follow from the tile
program.  What a loop streams without an index over a grid variable is the same for all of that variable's values, and
is fetched once for those that run together.  Where the trip count of the loops depends on a grid variable (a causal
mask), long tasks that come last leave the machine idle, so they come first; then as many values of the other
variables as fit the second level cache run together.  An order changes nothing that is computed, so extents that are
not known may be guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from memcomp.codegen.launches import value
from memcomp.ir.expr import Access, Const, Expr, Size, Var, call, children, symbols, variables, walk
from memcomp.ir.target import BYTES, Target
from memcomp.ir.tile import Loop, Param, Statement, TileKernel, TileProgram, When, expressions, made, statements

TASK = "task"      # the number of a task
USUAL = 8192       # extents that are not known
SAMPLES = 9        # values of a grid variable at which loops are looked at
SMALL = 8          # a stream of so many times fewer bytes than the largest does not count
UNEVEN = 1.25      # the longest task, by their mean, from which on it matters


@dataclass(frozen=True, slots=True)
class Order:
    """Grid variables from slowest to fastest: outer; of panel `size` values together; slow; those values; inner.

    size: None where panel is empty.  last: variables of which the last value comes first.
    """

    outer: tuple[str, ...]
    panel: tuple[str, ...] = ()
    size: Expr | None = None
    slow: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    last: frozenset[str] = frozenset()


def order(tp: TileProgram, k: TileKernel, target: Target) -> Order:
    """The order of a launch's tasks."""
    grid = [v for v, _ in k.grid]
    streams = _streams(tp, k)
    size = {a: BYTES[_param(tp, a.tensor).dtype] * _points(k, a) for a in streams}
    most = max(size.values(), default=0)
    streams = {a: used for a, used in streams.items() if size[a] * SMALL >= most}
    lacking = {v: frozenset(a for a, used in streams.items() if v not in used) for v in grid}
    rising = {v: r for v in grid if (r := _rising(k, v)) is not None}
    apart = tuple(v for v in grid if not lacking[v])
    if rising:
        slow = tuple(rising)
        rest = tuple(v for v in grid if v not in rising)
        last = frozenset(v for v, r in rising.items() if r)
        panel = tuple(v for v in rest if not lacking[v])
        if not panel:
            return Order((*slow, *rest), last=last)
        inner = tuple(v for v in rest if lacking[v])
        return Order((), panel, _held(tp, k, set(streams), {*panel}, target), slow, inner, last)
    shared = [v for v in grid if lacking[v]]
    kinds = list(dict.fromkeys(lacking[v] for v in shared))
    if len(kinds) < 2:
        return Order((*apart, *shared))
    kinds.sort(key=lambda kind: sum(size[a] for a in kind))
    panel = tuple(v for v in shared if lacking[v] == kinds[0])
    slow = tuple(v for v in shared if lacking[v] != kinds[0])
    # of W tasks at once, a panel values by W/a others: a X + W/a Y bytes are least at a = sqrt(W Y / X)
    own = sum(size[a] for a in streams if a not in lacking[panel[0]])
    others = sum(size[a] for a in lacking[panel[0]])
    many = 1 << round(math.log2(max(1.0, math.sqrt(target.threads * others / max(own, 1)))))
    extents = [e.value if isinstance(e, Const) else math.inf for v, e in k.grid if v in panel]
    return Order((*apart, *slow, *panel)) if math.prod(extents) <= many else Order(apart, panel, Const(many), slow)


def numbered(k: TileKernel, how: Order) -> tuple[tuple[str, Expr], ...]:
    """What task number `TASK` works on, from 0: assignments in order, of each grid variable and of names that begin
    with `TASK` and a point."""
    extents, task = dict(k.grid), Var(TASK)
    out: list[tuple[str, Expr]] = []

    def note(stem: str, e: Expr) -> Expr:
        if isinstance(e, (Const, Var, Size)):
            return e
        out.append((f"{TASK}.{stem}", e))
        return Var(out[-1][0])

    def digits(stem: str, rest: Expr, names: tuple[str, ...], whole: bool = True) -> Expr:
        """Assign names by the last digits of rest, and give what is left; whole: nothing is."""
        rest = note(stem, rest) if len(names) > 1 else rest
        for n in range(len(names) - 1, -1, -1):
            v = names[n]
            place = rest if whole and n == 0 else call("mod", rest, extents[v])
            if extents[v] == Const(1):
                place = Const(0)
            elif not (whole and n == 0):
                rest = note(f"by_{v}", call("floordiv", rest, extents[v]))
            out.append((v, call("sub", call("sub", extents[v], 1), place) if v in how.last else place))
        return rest

    if not how.panel:
        digits("", task, how.outer)
        return tuple(out)
    assert how.size is not None
    panels, slow = (note(stem, _product([extents[v] for v in names]))
                    for stem, names in (("panel", how.panel), ("slow", how.slow)))
    size = note("size", call("min", panels, how.size))
    rest = digits("", task, how.inner, whole=False)
    if how.outer:
        whole = note("whole", call("mul", panels, slow))
        inside = note("inside", call("mod", rest, whole))
        digits("outside", call("floordiv", rest, whole), how.outer)
        rest = inside
    each = note("each", call("mul", size, slow))
    first = note("first", call("mul", call("floordiv", rest, each), size))
    count = note("count", call("min", call("sub", panels, first), size))
    within = note("within", call("mod", rest, each))
    digits("at", call("add", first, call("mod", within, count)), how.panel)
    digits("turn", call("floordiv", within, count), how.slow)
    return tuple(out)


def tasks(k: TileKernel) -> Expr:
    """How many there are."""
    return _product([e for _, e in k.grid])


def _product(extents: list[Expr]) -> Expr:
    return reduce(lambda a, b: call("mul", a, b), extents) if extents else Const(1)


def _param(tp: TileProgram, name: str) -> Param:
    return next(p for p in tp.params if p.name == name)


def _points(k: TileKernel, a: Access) -> int:
    used = variables(a)
    return math.prod(d.capacity for d in k.dims if d.name in used)


def _streams(tp: TileProgram, k: TileKernel) -> dict[Access, frozenset[str]]:
    """What loops read anew in each step, and the grid variables on which it depends, through scalars too."""
    params, grid = {p.name for p in tp.params}, {v for v, _ in k.grid}
    depends: dict[str, frozenset[str]] = {}

    def used(e: Expr) -> frozenset[str]:
        return variables(e).union(*(depends.get(n.tensor, frozenset()) for n in walk(e) if isinstance(n, Access)))

    found: dict[Access, frozenset[str]] = {}

    def look(body: tuple[Statement, ...], loops: frozenset[str]) -> None:
        for s in body:
            for e in (n for x in expressions(s) for n in walk(x)):
                if loops and isinstance(e, Access) and e.tensor in params and loops & used(e):
                    found[e] = used(e) & grid
            if isinstance(s, Loop):
                look(s.body, loops | {s.var})
            elif isinstance(s, When):
                look(s.body, loops)
                look(s.orelse, loops)
            for t in made(s):
                depends[t] = depends.get(t, frozenset()).union(*map(used, expressions(s)))

    look(k.body, frozenset())
    return found


def _held(tp: TileProgram, k: TileKernel, streams: set[Access], apart: set[str], target: Target) -> Expr:
    """How many values of the variables `apart` stream no more than half of the second level cache, by the extents that
    the kernel is told."""
    told = _sizes(k)
    share = target.level("l2").bytes // 2 // max(1, len({a.tensor for a in streams}))
    sizes: list[Expr] = []
    for a in streams:
        p = _param(tp, a.tensor)
        each: Expr = Const(share // BYTES[p.dtype])
        for index, extent in zip(a.index, p.shape, strict=True):
            if not variables(index) & apart and symbols(extent) <= told:
                each = call("floordiv", each, extent if isinstance(extent, Const) else call("max", extent, 1))
        sizes.append(_folded(each))
    out, *rest = sorted(set(sizes), key=str)
    for e in rest:
        out = call("min", out, e)
    return call("max", out, 1)


def _folded(e: Expr) -> Expr:
    """Quotients of a number by several others as one, the numbers first: (1000 // M) // 64 is 15 // M."""
    by: list[Expr] = []
    while not isinstance(e, Const) and getattr(e, "op", "") == "floordiv":
        by.append(children(e)[1])
        e = children(e)[0]
    if not by or not isinstance(e, Const):
        return e
    out: Expr = Const(int(e.value) // math.prod(int(x.value) for x in by if isinstance(x, Const)))
    for x in (x for x in by if not isinstance(x, Const)):
        out = call("floordiv", out, x)
    return out


def _sizes(k: TileKernel) -> set[str]:
    """The extents that a kernel's expressions name."""
    found = [e for _, e in k.grid] + [e for s in statements(k.body) for e in expressions(s)]
    return {r for e in found for r in symbols(e)}


def _rising(k: TileKernel, v: str) -> bool | None:
    """Do tasks of later values of a grid variable take more steps?  None: as many, or it is not known."""
    known = dict.fromkeys(_sizes(k), USUAL)
    at = dict.fromkeys((name for name, _ in k.grid), 0)
    extent = int(value(dict(k.grid)[v], known, at))
    values = sorted({n * (extent - 1) // (SAMPLES - 1) for n in range(SAMPLES)})
    try:
        steps = [_steps(k.body, known, at | {v: n}) for n in values]
    except LookupError:   # the ends of a loop are data
        return None
    if max(steps, default=0) < UNEVEN * sum(steps) / max(1, len(steps)) or sum(steps) == 0:
        return None
    turns = {b > a for a, b in zip(steps, steps[1:], strict=False) if a != b}
    return turns.pop() if len(turns) == 1 else None


def _steps(body: tuple[Statement, ...], sizes: Mapping[str, int], at: Mapping[str, int]) -> int:
    """Innermost steps of a task; a nested loop as in its first turn."""
    total = 0
    for s in body:
        if isinstance(s, Loop):
            lo, hi = value(s.lo, sizes, at), value(s.hi, sizes, at)
            total += max(0, hi - lo) * max(1, _steps(s.body, sizes, {**at, s.var: lo}))
        elif isinstance(s, When):
            total += max(_steps(s.body, sizes, at), _steps(s.orelse, sizes, at))
    return total
