"""Costs against counting by hand: every point visited, every byte of a simulated cache."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from memcomp.ir.cost import Cost, cost
from memcomp.ir.counts import Sizes, operations
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, walk
from memcomp.ir.ops import OPS
from memcomp.ir.program import Program
from memcomp.ir.target import BYTES, Level, Target, target
from memcomp.ir.text import parse
from memcomp.ir.visits import Visits
from tests.programs import arrays, programs
from tests.test_traversal import CASCADE_4, CASCADE_5

SIZES = {"P": 128, "M": 256, "E": 16, "F": 16}
CPU = target("cpu")


def load(text: str) -> Program:
    return parse("program t on cpu\n" + text)


def index_value(e: Expr, env: dict[str, int], sizes: Sizes) -> int | bool:
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Var):
        return env[e.name]
    if isinstance(e, Size):
        return sizes(e.rank)
    assert isinstance(e, Call)
    return OPS[e.op].numpy(*(index_value(a, env, sizes) for a in e.args)).item()


@settings(max_examples=60, deadline=None)
@given(p=programs())
def test_points_are_what_the_guards_leave(p: Program) -> None:
    """On small spaces the count is exact; a guard that looks at data counts as true."""
    known = {r: n for t in p.cascade.inputs() for r, n in zip(t.ranks, arrays(p)[t.name].shape, strict=True)}
    n = Sizes(p.cascade, known)
    for e in p.cascade.einsums:
        box = [range(n(v.upper())) for v in e.space()]
        conds = [g for g in e.guards() if not any(isinstance(x, Access) for x in walk(g))]
        count = sum(all(index_value(g, dict(zip(e.space(), at, strict=True)), n) for g in conds)
                    for at in itertools.product(*box))
        assert n.live(e) == pytest.approx(count)


def test_large_guards_are_sampled_closely() -> None:
    p = load("rank P\nrank M\nin x[M]: f32\nout y[P]: f32\ny[p] = sum{m} x[m] where m <= p and m + 512 > p\n")
    for size in (1000, 4096, 30000):
        got = Sizes(p.cascade, {"P": size, "M": size}).live(p.cascade.einsums[0])
        rows = np.arange(size)
        assert got == pytest.approx(np.minimum(rows + 1, 512).sum(), rel=0.03)


def test_operations_of_an_expression() -> None:
    x, y = Access("x", (Var("m"),)), Access("y", (Var("m") * 3 + 1,))
    assert operations(x * y + 1.0) == (2, 0)
    assert operations(Call("exp", (x - y,))) == (1, 1)
    assert operations(x / y * (Const(1.0) / Const(3.0))) == (1, 1), "constants are free"
    assert operations(Call("where", (Call("lt", (Var("m"), Size("M"))), x, -y))) == (0, 0)


def test_attention_flops_by_hand() -> None:
    got = cost(load(CASCADE_4), SIZES, CPU)
    p, m, e, f = (SIZES[r] for r in "PMEF")
    assert got.flops == 2 * p * m * e + p * m + p * m + p * m + 2 * p * m * f
    assert got.special == 2 * p * m  # exp, division
    assert got.compulsory == 4 * (p * e + m * e + m * f + p * f)


def test_without_a_mapping_every_statement_reads_and_writes() -> None:
    program = load(CASCADE_4)
    n = Sizes(program.cascade, SIZES)
    total = 0
    for e in program.cascade.einsums:
        for name in {a.tensor for a in walk(e.body) if isinstance(a, Access)} | set(e.names):
            total += 4 * n.elements(program.cascade.tensor(name))
    assert cost(program, SIZES, CPU).traffic == total


MAPPED = """group g0: QK, RM, RD, RN, LM, SLN, SLD, SLNV, PRM, O
  partition P: 32
  space P1
  loop-order M1
"""


def test_fused_attention_moves_what_it_must() -> None:
    """One group: scores never leave, K and V come in once per tile of queries unless a cache keeps them."""
    got = cost(load(CASCADE_5 + MAPPED), SIZES, CPU)
    p, m, e, f = (SIZES[r] for r in "PMEF")
    assert got.traffic == got.compulsory == 4 * (p * e + m * e + m * f + p * f)
    small = with_caches(1 << 17, 1 << 17, 1 << 30)
    tiles = p // 32
    reg = cost(load(CASCADE_5 + MAPPED), SIZES, replace(small, levels=(Level("reg", 40000, 1e12), *small.levels[1:])))
    assert reg.levels[0].traffic == 4 * (p * e + (m * e + m * f) * tiles + p * f)
    assert got.intensity == (got.flops + got.special) / got.traffic


def with_caches(*sizes: int) -> Target:
    levels = tuple(Level(f"l{k}", s, 1e12 / 4**k) for k, s in enumerate(sizes))
    return replace(CPU, levels=(*levels, Level("dram", 0, 1e9)))


def lru(program: Program, sizes: dict[str, int], loops: list[str], tile: int, capacity: int) -> int:
    """Bytes that a fully associative LRU cache of this many bytes loads, running the one statement's nest of loops."""
    e, n = program.cascade.einsums[0], Sizes(program.cascade, sizes)
    order = [*loops, *[v for v in e.space() if v not in loops]]
    cache: OrderedDict[tuple[str, tuple[int, ...]], None] = OrderedDict()
    loaded = 0
    reads = [a for a in walk(e.body) if isinstance(a, Access)]
    for at in itertools.product(*(range(n(v.upper())) for v in order)):
        env = dict(zip(order, at, strict=True))
        for a in (*reads, e.out):
            key = a.tensor, tuple(int(index_value(i, env, n)) for i in a.index)
            if key not in cache:
                loaded += 4
            cache[key] = None
            cache.move_to_end(key)
            while len(cache) * 4 > capacity:
                cache.popitem(last=False)
    return loaded


MATMUL = """rank I
rank J
rank K
in A[I, K]: f32
in B[K, J]: f32
out C[I, J]: f32
C[i, j] = sum{k} A[i, k] * B[k, j]
group g: C
  space I, J
"""


@pytest.mark.parametrize("capacity", [200, 1000, 4000, 100000])
def test_traffic_against_a_simulated_cache(capacity: int) -> None:
    """The model says when a loop's working set fits; a cache with room to spare, or far too little, agrees exactly."""
    p, sizes = load(MATMUL), {"I": 12, "J": 10, "K": 16}
    machine = with_caches(capacity)
    assert cost(p, sizes, machine).traffic == lru(p, sizes, ["i", "j"], 1, capacity)


def test_ragged_ranks_count_with_their_bound_and_gathers_with_their_points() -> None:
    p = load("rank B\nrank N\nrank W = 8\nrank T = len[b] <= 4\nin len[B]: i64\nin at[B, T]: i64\n"
             "in table[N, W]: bf16\n"
             "out y[B, W]: f32\ny[b, w] = sum{t} table[at[b, t], w]\n")
    got = cost(p, {"B": 3, "N": 1000}, CPU)
    assert got.flops == 3 * 8 * 4
    assert got.compulsory == 3 * 4 * 8 * BYTES["bf16"] + 3 * 4 * 8 + 3 * 8 * 4, "rows read, their numbers, the result"
    assert cost(p, {"B": 3, "N": 5}, CPU).compulsory == 5 * 8 * 2 + 96 + 96, "never more than the table"
    with pytest.raises(InputError, match="extent of rank N is not known"):
        cost(p, {"B": 3}, CPU)


def test_appending_moves_only_what_is_written() -> None:
    p = load("rank T\nrank S\nrank E = 4\nin pos[]: i64\nin new[S, E]: f32\nstate C[T, E]: bf16\n"
             "C'[pos[] + s, e] = new[s, e]\n")
    assert cost(p, {"T": 10000, "S": 2}, CPU).compulsory == 8 + 2 * 4 * 4 + 2 * 4 * 2


@settings(max_examples=40, deadline=None)
@given(p=programs())
def test_laws(p: Program) -> None:
    """Larger caches never add traffic, farther levels never see more, time is at least each roof."""
    known = {r: n for t in p.cascade.inputs() for r, n in zip(t.ranks, arrays(p)[t.name].shape, strict=True)}
    previous: Cost | None = None
    for k in (1, 8, 64):
        machine = with_caches(64 * k, 256 * k, 1024 * k)
        got = cost(p, known, machine)
        assert all(math.isfinite(x) and x >= 0 for x in (got.flops, got.special, got.compulsory, got.seconds))
        flow = [level.traffic for level in got.levels]
        assert flow == sorted(flow, reverse=True)
        assert got.seconds * (1 + 1e-12) >= got.floor > 0
        assert got.seconds >= got.traffic / machine.memory.bandwidth * (1 - 1e-12)
        assert previous is None or got.traffic <= previous.traffic
        previous = got


@pytest.mark.parametrize("first, second", [("2*h", "2*h + 1"), ("2*h", "2*h"), ("h", "h + 4")])
def test_compulsory_bytes_are_those_of_the_elements_touched(first: str, second: str) -> None:
    text = f"""program p on cpu
rank G = 8
rank H = 4
rank M = 6
in K[G, M]: f32
out O[H]: f32
O[h] = sum{{m}} K[{first}, m] * K[{second}, m]
"""
    touched = {eval(i, {"h": h}) for h in range(4) for i in (first, second)}
    found = cost(parse(text), {}, target("cpu"))
    assert found.compulsory == (len(touched) * 6 + 4) * 4 <= found.traffic


WINDOW = """program w on cpu
rank P = 24
rank M = 32
rank M0 = {tile}
rank M1 = ceil(M/M0) iter
in X[P, M]: f32
out O[P]: f32
R[0, p] = -inf
S[p, m1, m0] = X[p, m1*M0 + m0] * 2.0 where m1*M0 + m0 < M
L[m1, p] = max{{m0}} S[p, m1, m0] where m1*M0 + m0 < M and {guard}
R[m1 + 1, p] = max(R[m1, p], L[m1, p])
O[p] = R[M1, p]
group g0: R, S, L, O
  partition P: {rows}
  space P1
  loop-order M1
  lane P0
"""
SEEN = {"m1*M0 + m0 <= p": lambda p, m: m <= p,
        "p < m1*M0 + m0 + 5 and m1*M0 + m0 <= p": lambda p, m: p - 5 < m <= p,
        "m1*M0 + m0 < 3 or m1*M0 + m0 <= p": lambda p, m: m < 3 or m <= p,
        "(p + m1*M0 + m0) % 7 == 1": lambda p, m: True}


@pytest.mark.parametrize("tile", [2, 8, 16])
@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("guard", list(SEEN))
def test_what_no_reader_needs_is_not_visited(guard: str, rows: int, tile: int) -> None:
    """S has no such guard itself; a step is made where some point of its tile is needed, and for all of its rows."""
    c = parse(WINDOW.format(tile=tile, rows=rows, guard=guard)).cascade
    extents = {"p1": 24 // rows, "p0": rows, "m1": 32 // tile, "m0": tile, "p": 24}
    found = Visits(Sizes(c, {}), c.einsums, ("p1", "m1"), {"m1"}, {"p": rows}, lambda v: extents[v])
    seen = [(p, m) for p in range(24) for m in range(32) if SEEN[guard](p, m)]
    statement = {e.names[0]: e for e in c.einsums if e.names[0] in "SL"}
    made = rows * len({(p // rows, m) for p, m in seen})
    assert found.points(statement["S"]) == pytest.approx(made)
    assert found.points(statement["L"]) == pytest.approx(made)
    assert found.share() == pytest.approx(len({(p // rows, m // tile) for p, m in seen}) / (24 // rows * 32 // tile))


@pytest.mark.parametrize("n", [1, 12, 24, 30])
def test_rows_of_a_tile_that_are_not_there_take_time_across_the_lanes(n: int) -> None:
    """A tile of 12 lanes is computed whole; one of 12 rows beside them is not."""
    text = WINDOW.format(tile=8, rows=12, guard="0 < 1").replace("rank P = 24", f"rank P = {n}")
    text = text.replace("m0] * 2.0", "m0]" + " * 2.0" * 99)  # it waits for arithmetic
    flat = replace(target("cpu"), launch=0.0, threads=1)
    times = [cost(parse(text.replace("  lane P0\n", lane)), {}, flat).seconds for lane in ("  lane P0\n", "")]
    whole = cost(parse(text.replace(f"rank P = {n}", f"rank P = {-(-n // 12) * 12}")), {}, flat).seconds
    assert times[0] >= times[1] and (times[0] > times[1]) == (n % 12 > 0)
    assert times[0] <= whole * (1 + 1e-9)


def test_a_tile_that_serves_more_rows_is_loaded_less_often() -> None:
    """Rows of 4 and of 12 take part in as many operations; the streamed rank is brought to three times as many."""
    text = """program w on cpu
rank P = 48
rank M = 4096
rank M0 = 64
rank M1 = ceil(M/M0) iter
in X[P]: f32
in Y[M]: f32
out O[P]: f32
R[0, p] = 0.0
L[m1, p] = sum{{m0}} X[p] * Y[m1*M0 + m0] where m1*M0 + m0 < M
R[m1 + 1, p] = R[m1, p] + L[m1, p]
O[p] = R[M1, p]
group g0: R, L, O
  partition P: {rows}
  space P1
  loop-order M1
  lane P0
"""
    four, twelve = (cost(parse(text.format(rows=n)), {}, target("cpu")) for n in (4, 12))
    assert four.flops == twelve.flops and four.traffic == twelve.traffic and four.seconds > twelve.seconds


def test_tails_of_tiles_are_not_visited() -> None:
    c = parse(WINDOW.format(tile=12, rows=4, guard="0 < 1")).cascade
    extents = {"p1": 6, "p0": 4, "m1": 3, "m0": 12, "p": 24}
    found = Visits(Sizes(c, {}), c.einsums, ("p1", "m1"), {"m1"}, {"p": 4}, extents.__getitem__)
    assert found.points(c.einsums[1]) == pytest.approx(24 * 32)
    assert found.points(c.einsums[3]) == 24 * 3
