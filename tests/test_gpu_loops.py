"""Loops as the Triton backend writes them, without a compiler: what parts and trimmed loops compute, and masks."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from benchmarks import gpu_resources as bench
from memcomp.codegen.launches import value
from memcomp.codegen.lower import lower
from memcomp.codegen.triton.emit import emit
from memcomp.codegen.triton.parts import edge, parts, product
from memcomp.codegen.triton.straight import straight
from memcomp.ir.expr import Call, Expr, Size, Var, call
from memcomp.ir.parse import parse
from memcomp.ir.program import Program
from memcomp.ir.tile import Dot, Loop, Statement, TileKernel, TileProgram, When, statements
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.passes.derive.facts import Facts
from tests.mapped import ONEPASS, inputs, load, mapped, symbols

GUARDS = {
    "causal": "m <= p",
    "window": "m <= p and m > p - 24",
    "prefix": "m < 20 or m <= p",
    "sinks": "m <= p and (m < 4 or m > p - 24)",
    "documents": "Z[p] == Z[m] and m <= p",
}


def attention(guard: str) -> Program:
    text = bench.TEXT.format(heads=1, dim=4, group=1, **bench.USUAL | {
        "inputs": "in Z[M]: i32\n" if "Z" in guard else "", "keys": " = P", "where": f" where {guard}"})
    return parse(text.replace("Z[P]", "Z[M]").replace("rank J = 8", "rank J = 1"))


@lru_cache(maxsize=8)
def tiles(guard: str, size: int = 16) -> TileProgram:
    return bench.tiles(attention(GUARDS[guard]), "h100", {"p0": size, "m0": size})


def spelled(k: TileKernel) -> TileKernel:
    """The kernel with every loop written as its parts."""
    k = straight(k)

    def written(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
        out: list[Statement] = []
        for s in body:
            if not isinstance(s, Loop):
                out.append(s)
                continue
            begin = s.lo
            for p in parts(k, s):
                end = s.hi if p.end is None else call("min", call("max", p.end, begin), s.hi)
                out.append(Loop(s.var, begin, end, written(p.body)))
                begin = end
        return tuple(out)

    return replace(k, body=written(k.body))


def branches(k: TileKernel) -> list[When]:
    """Branches in loops with products."""
    return [w for s in statements(k.body) if isinstance(s, Loop) and product(s) for w in statements(s.body)
            if isinstance(w, When)]


@pytest.mark.parametrize("guard", GUARDS)
def test_parts_compute_what_the_loop_does(guard: str) -> None:
    tp, rng = tiles(guard), np.random.default_rng(1)
    plain = replace(tp, kernels=tuple(map(spelled, tp.kernels)))
    assert branches(tp.kernels[0]) and not branches(plain.kernels[0])
    for n in (1, 40):
        data = {p.name: rng.normal(size=[n if isinstance(e, Size) else int(e.value) for e in p.shape])
                for p in tp.params if p.role == "in"}
        for z in (np.sort(rng.integers(0, 4, n)), rng.integers(0, 3, n)) if "Z" in data else (None,):
            a = data if z is None else data | {"Z": z}
            want, got = interpret_tile(tp, a), interpret_tile(plain, a)
            np.testing.assert_allclose(got["O"], want["O"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ONEPASS)
def test_parts_of_every_case(name: str) -> None:
    p, rng = load(name), np.random.default_rng(4)
    tp = lower(mapped(p))
    plain = replace(tp, kernels=tuple(map(spelled, tp.kernels)))
    a = inputs(p, {s: 70 if s == "M" else 33 if s == "P" else 2 for s in symbols(p)}, rng)
    want, got = interpret_tile(tp, a), interpret_tile(plain, a)
    for out in want:
        np.testing.assert_allclose(got[out], want[out], rtol=1e-12, atol=1e-12)


def test_what_a_step_makes_says_nothing_of_other_steps() -> None:
    """A bound of the keys of a tile is known in its step alone."""
    p = parse("program p\nrank P\nrank M\nin X[P, M]: f32\nin L[P]: i64\nin I[M]: i64\nout A[P]: f32\n"
              "A[p] = sum{m} X[p, m] where m < L[p] + I[m]\n")
    tp, rng = lower(mapped(p, 1)), np.random.default_rng(2)
    assert any(isinstance(s, When) for k in tp.kernels for s in statements(k.body))
    made = {"X": rng.normal(size=(3, 900)), "L": np.array([-5, 0, 7]), "I": rng.integers(-500, 1300, 900)}
    want, got = interpret_tile(tp, made), interpret_tile(replace(tp, kernels=tuple(map(spelled, tp.kernels))), made)
    np.testing.assert_allclose(got["A"], want["A"])


def test_whole_steps_are_left_out_by_the_ends_of_loops() -> None:
    def loops(k: TileKernel) -> list[Loop]:
        return [s for s in straight(k).body if isinstance(s, Loop)]

    before, after = loops(tiles("sinks").kernels[0])
    assert product(before) and product(after) and before.hi != after.lo
    scan, run = loops(tiles("documents").kernels[0])
    assert not product(scan) and product(run) and not any(isinstance(s, Dot) for s in statements(scan.body))
    assert len(loops(tiles("causal").kernels[0])) == 1


def test_one_mask_serves_a_score_and_its_sums() -> None:
    """-inf right after the scale: the maximum, the sum and the product that follow need no mask."""
    for guard in ("causal", "prefix", "documents"):
        text = emit(tiles(guard, 64), "h100").source
        body = text.split("def attention")[1]
        masks = re.findall(r"tl\.where\(live_m0\[None, :\]", body)
        assert len(masks) == body.count("S = tl.where(live_m0[None, :]") == 1, guard


def test_edges_are_where_conditions_change() -> None:
    """Against every step, for conditions made of comparisons by chance."""
    rng = random.Random(3)

    def some(depth: int, up: bool) -> Expr:
        if depth and rng.random() < 0.6:
            return Call(rng.choice(("and", "or")), (some(depth - 1, up), some(depth - 1, up)))
        step, rest = rng.randint(1, 5), rng.randint(-30, 30)
        return call("lt" if up else "gt", call("add", call("mul", Var("t"), step), Size("N")), rest)

    for _ in range(200):
        up = rng.random() < 0.5
        cond = some(2, up)
        found = edge(cond, "t", set(), set())
        assert found is not None and found[0] == up
        for n in (0, 7):
            at = value(found[1], {"N": n}, {})
            for t in range(-20, 20):
                assert bool(value(cond, {"N": n}, {"t": t})) == (t < at if up else t >= at), (cond, n, t)


@pytest.mark.parametrize("guard, surely", [
    ("m < 3 or m <= p", True), ("Z[p] == Z[m] and m <= p", True), ("Z[p] == Z[m]", True),
    ("Z[p] == Z[m] and m < p", False), ("Z[p] < Z[m] or m < p", False), ("Z[m] == 3", False),
    ("m <= p and (m < 4 or m > p - 24)", True), ("m > p or m < p", False)])
def test_a_point_that_surely_takes_part_needs_no_count(guard: str, surely: bool) -> None:
    """Where one is said to be there for all rows, there is one; a count is kept for the others."""
    p = attention(guard)
    s = next(x for x in p.cascade.einsums if x.reduce is not None and x.reduce.monoid == "max")
    cond, rest = Facts(p.cascade).alive(s.reduce.over if s.reduce else (), s.guards())
    assert (not rest) == surely
    assert not surely or cond in (None, call("le", 1, Size("P"))), "a key there is, and nothing else is asked"
