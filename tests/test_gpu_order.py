"""In which order the tasks of a launch run: each once, those that share what they stream together, long ones first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import pytest

from memcomp.codegen.launches import value
from memcomp.codegen.lower import lower
from memcomp.codegen.order import TASK, Order, numbered, order
from memcomp.config import Config
from memcomp.ir.expr import Access, Const, Expr, Size, call, walk
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Loop, TileKernel, TileProgram, statements
from memcomp.pipeline import map_program
from tests.mapped import CHAINS, ONEPASS, arguments, inputs, load, mapped, same, symbols

MACHINES = ("a100", "rtx4090", "h100", "b200")


def tasks(k: TileKernel, how: Order, sizes: Mapping[str, int]) -> Iterator[tuple[int, ...]]:
    """The grid variables of each task, in order."""
    for n in range(math.prod(value(e, sizes, {}) for _, e in k.grid)):
        at = {TASK: n}
        for name, e in numbered(k, how):
            at[name] = value(e, sizes, at)
        yield tuple(at[v] for v, _ in k.grid)


def extents(k: TileKernel, n: int) -> dict[str, int]:
    named = {r for _, e in k.grid for r in _sizes(e)} | {r for s in statements(k.body) if isinstance(s, Loop)
                                                         for e in (s.lo, s.hi) for r in _sizes(e)}
    return {r: n + 3 * i for i, r in enumerate(sorted(named))}


def _sizes(e: Expr) -> set[str]:
    return {n.rank for n in walk(e) if isinstance(n, Size)}


@lru_cache(maxsize=1)
def every() -> tuple[tuple[TileProgram, TileKernel], ...]:
    programs = [lower(mapped(load(name))) for name in ONEPASS + CHAINS]
    return tuple((tp, k) for tp in programs for k in tp.kernels)


@pytest.mark.parametrize("machine", MACHINES)
def test_each_task_runs_once(machine: str) -> None:
    for tp, k in every():
        how = order(tp, k, target(machine))
        assert sorted((*how.outer, *how.panel, *how.slow, *how.inner)) == sorted(v for v, _ in k.grid)
        for n in (1, 5, 70):
            sizes = extents(k, n)
            if (total := math.prod(value(e, sizes, {}) for _, e in k.grid)) < 1000:
                found = list(tasks(k, how, sizes))
                assert len(set(found)) == len(found) == total, (k.name, sizes)
                assert all(0 <= x < value(e, sizes, {}) for t in found for x, (_, e) in zip(t, k.grid, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("groups", ["p", "po", "pi", "poi", "pp", "poil"])
def test_panels_that_do_not_divide_the_extent(groups: str, size: int) -> None:
    """Every form of an order, with last values first or not, visits a box once."""
    tp, k = every()[0]
    box = {"a": 5, "b": 3, "c": 2, "d": 4, "e": 3}
    own = {"a": "panel", "b": "slow", "c": "outer" if "o" in groups else "slow",
           "d": "inner" if "i" in groups else "slow", "e": "panel" if "pp" in groups else "slow"}
    k = replace(k, grid=tuple((v, Size(v.upper())) for v in box))
    parts = {g: tuple(v for v in box if own[v] == g) for g in ("outer", "panel", "slow", "inner")}
    how = Order(**parts, size=Const(size), last=frozenset("be" if "l" in groups else ""))
    found = list(tasks(k, how, {v.upper(): n for v, n in box.items()}))
    assert len(set(found)) == len(found) == math.prod(box.values())
    whole = box["b"] * math.prod(n for v, n in box.items() if own[v] in ("slow", "inner") and v != "b")
    first = found[:whole * min(size, math.prod(n for v, n in box.items() if own[v] == "panel"))]
    at = [list(box).index(v) for v in parts["panel"]]
    assert len({tuple(t[n] for n in at) for t in first}) == min(size, math.prod(box[v] for v in parts["panel"]))


ATTENTION = """
program attention
rank H
rank P
rank M
rank E = 64
in Q[H, P, E]: bf16
in K[H, M, E]: bf16
in V[H, M, E]: bf16
out O[H, P, E]: f32
S[h, p, m] = sum{{e}} Q[h, p, e] * K[h, m, e]
GM[h, p] = max{{m}} S[h, p, m] {0}
W[h, p, m] = exp(S[h, p, m] - GM[h, p]) {0}
D[h, p] = sum{{m}} W[h, p, m] {0}
N[h, p, e] = sum{{m}} W[h, p, m] * V[h, m, e] {0}
O[h, p, e] = N[h, p, e] / D[h, p]
"""
SIZES = {"H": 12, "P": 4096, "M": 4096}


def made(guard: str) -> tuple[TileProgram, TileKernel]:
    tp = lower(map_program(parse(ATTENTION.format(guard)), config=Config(target="h100"), sizes=SIZES))
    (k,) = tp.kernels
    return tp, k


def steps(k: TileKernel, sizes: Mapping[str, int], at: Mapping[str, int]) -> int:
    (loop,) = (s for s in statements(k.body) if isinstance(s, Loop))
    return max(0, value(loop.hi, sizes, at) - value(loop.lo, sizes, at))


@pytest.mark.parametrize(("guard", "uneven"), [("", False), ("where m <= p", True), ("where m >= p", True),
                                               ("where m <= p and m > p - 256", False),
                                               ("where m <= p or m < 256", True)])
def test_long_tasks_come_first(guard: str, uneven: bool) -> None:
    """In a panel of heads steps never rise from one task to the next, and the last ones are short."""
    tp, k = made(guard)
    how = order(tp, k, target("h100"))
    assert bool(how.slow) == uneven
    if not uneven:
        return
    assert how.panel == ("h",) and how.slow == ("p1",) and how.size is not None
    size = min(SIZES["H"], value(how.size, SIZES, {}))
    blocks = value(dict(k.grid)["p1"], SIZES, {})
    found = [steps(k, SIZES, dict(zip(("h", "p1"), t, strict=True))) for t in tasks(k, how, SIZES)]
    for n in range(0, len(found), size * blocks):
        panel = found[n:n + size * blocks]
        assert panel == sorted(panel, reverse=True) and panel[0] > panel[-1]


def busy(found: list[int], places: int) -> float:
    """How long the machine takes, by its least: tasks start in order wherever one has ended."""
    ends = [0] * places
    for n in found:
        at = ends.index(min(ends))
        ends[at] += n
    return max(ends) / max(sum(found) / places, max(found))


@pytest.mark.parametrize("guard", ["where m <= p", "where m >= p"])
def test_no_processor_waits_for_a_long_task(guard: str) -> None:
    """On 132 processors the machine is done sooner than in the order of the grid, and within Graham's bound for tasks
    that come longest first (4/3 of the least time)."""
    tp, k = made(guard)
    plain = Order(tuple(v for v, _ in k.grid))
    lengths = {}
    for name, how in (("plain", plain), ("order", order(tp, k, target("h100")))):
        found = [1 + steps(k, SIZES, dict(zip(("h", "p1"), t, strict=True))) for t in tasks(k, how, SIZES)]
        lengths[name] = busy(found, 132)
    assert lengths["order"] < lengths["plain"] and lengths["order"] <= 4 / 3
    turns = max(sum(found[n::132]) for n in range(132)) / max(sum(found) / 132, max(found))
    assert lengths["order"] < turns, "instances that take every 132nd task would be done later"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("guard", ["", "where m <= p"])
def test_what_runs_at_once_streams_few_heads(machine: str, guard: str) -> None:
    """Keys and values of the heads that a wave of tasks reads fit the second level cache, between two panels too."""
    tp, k = made(guard)
    made_for = target(machine)
    sizes = {"H": 64, "P": 8192, "M": 8192}
    found = [t[0] for t in tasks(k, order(tp, k, made_for), sizes)]
    wave = 2 * made_for.threads
    most = max(len(set(found[n:n + wave])) for n in range(0, len(found) - wave, wave))
    head = 2 * 2 * 64 * sizes["M"]
    assert head < most * head <= made_for.level("l2").bytes < sizes["H"] * head


PRODUCT = """
program product
rank P
rank X
rank M
in A[P, M]: bf16
in B[X, M]: bf16
out O[P, X]: f32
O[p, x] = sum{m} A[p, m] * B[x, m]
"""


def test_products_run_in_panels() -> None:
    """A wave of blocks of a product reads fewer bytes than in the order of rows, or of columns."""
    sizes = {"P": 8192, "X": 8192, "M": 4096}
    tp = lower(map_program(parse(PRODUCT), config=Config(target="h100"), sizes=sizes))
    (k,) = tp.kernels
    assert {v for v, _ in k.grid} == {"p1", "x1"}
    how = order(tp, k, target("h100"))
    assert how.panel and how.slow
    lines = {v: next(d.capacity for d in k.dims if d.name == v.replace("1", "0")) for v in ("p1", "x1")}

    def read(how: Order) -> int:
        wave = list(tasks(k, how, sizes))[:132]
        return sum(lines[v] * len({t[n] for t in wave}) for n, (v, _) in enumerate(k.grid))

    assert read(how) < min(read(Order(("p1", "x1"))), read(Order(("x1", "p1"))))


def test_an_order_names_only_extents_that_the_kernel_is_told() -> None:
    from memcomp.codegen.triton.arguments import arguments

    for tp, k in every():
        told = {a.name for a in arguments(tp, k, tuple(len(p.shape) - 1 for p in tp.params)).args}
        for _, e in numbered(k, order(tp, k, target("h100"))):
            assert _sizes(e) <= told, k.name


def test_data_in_a_loop_bound_leave_the_order_alone() -> None:
    """How many steps a task takes is then not known before it runs."""
    tp, k = made("where m <= p")
    (loop,) = (s for s in k.body if isinstance(s, Loop))
    unknown = replace(loop, hi=call("min", loop.hi, Access("Z", ())))
    k = replace(k, body=tuple(unknown if s is loop else s for s in k.body))
    how = order(tp, k, target("h100"))
    assert not how.slow and not how.last


# -- program instances that take several tasks -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "programs"), [("onepass_causal_gqa", 3), ("onepass_window", 5), ("layer_norm", 1),
                                                ("layer_norm", 1000)])
def test_tasks_in_turns_change_nothing(name: str, programs: int) -> None:
    """By Triton's interpreter: instances that take all tasks in turns, fewer or more than there are tasks."""
    pytest.importorskip("triton", reason="Triton is not installed")
    import numpy as np

    from memcomp.codegen.triton import emit, interpreted
    from memcomp.codegen.triton.emit import function_names
    from memcomp.codegen.triton.resources import Setting
    from memcomp.ir.interpret import interpret

    p = mapped(load(name))
    tp = lower(p)
    kernel = emit(tp, "h100", settings={n: Setting(4, 2, programs) for n in function_names(tp)})
    assert kernel.source.count("tl.num_programs(0)") == kernel.source.count(f"programs={programs}") == len(tp.kernels)
    sizes = {s: 20 if s in ("M", "P") else 2 for s in symbols(p)}
    given = inputs(p, sizes, np.random.default_rng(5))
    args, known = arguments(tp, given, sizes)
    interpreted(kernel)(*args, *known)
    want = interpret(p, given, sizes)
    for x, q in zip(args, tp.params, strict=True):
        if q.role in ("out", "state"):
            assert same(x.double().numpy(), want[q.name], 2e-4, 2e-4), q.name


def test_a_launch_has_as_many_blocks_as_program_instances() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from memcomp.codegen.launches import Layout
    from memcomp.codegen.triton import compiled, emit
    from memcomp.codegen.triton.emit import function_names, settings_of
    from memcomp.codegen.triton.resources import Setting

    tp = lower(mapped(load("layer_norm")))
    (name,), setting = function_names(tp), Setting(2, 2, 132)
    kernel = emit(tp, "h100", settings={name: setting})
    assert settings_of(kernel.source) == {name: setting}
    layout = Layout(tuple(len(p.shape) - 1 for p in tp.params))
    (launch,) = compiled(kernel, layout).launches
    for n in (1, 131, 5000):
        assert launch.blocks(dict.fromkeys(tp.sizes, n)) == (min(n, 132), 1, 1)
    (loose,) = compiled(kernel, replace(layout, loose=frozenset({"X_ptr"}))).launches
    assert loose.grid == launch.grid, "the text for another layout has the same settings"
