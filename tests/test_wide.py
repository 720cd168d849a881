"""Long rows of running states: whole or in tiles, what that computes anew, what it costs, and that it stays right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import memcomp
from memcomp.codegen.lower import lower
from memcomp.ir.cost import cost
from memcomp.ir.counts import Sizes, operations
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program, close, knobs
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.models.families.attention import causal, with_lse
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition, tiles_of
from memcomp.passes.reduce_passes import reduce_passes
from memcomp.tune.model import close_knobs, modelled
from tests.mapped import same

ATTENTION = """
program wide on {on}
rank P
rank M
rank E = 3
rank F = {f}
in Q[P, E]: f32
in K[M, E]: f32
in V[M, F]: f32
out O[P, F]: f32
out L[P]: f32
{more}
S[p, m] = sum{{e}} Q[p, e] * K[m, e]
GM[p] = max{{m}} S[p, m] where m <= p
SN[p, m] = exp(S[p, m] - GM[p]) where m <= p
SD[p] = sum{{m}} SN[p, m] where m <= p
O[p, f] = sum{{m}} SN[p, m] / SD[p] * V[m, f] where m <= p
L[p] = GM[p] + log(SD[p])
{last}
"""
SIZES = {"P": 21, "M": 37}


def wide(f: int, on: str = "cpu", more: str = "", last: str = "") -> Program:
    return partition(fuse(reduce_passes(parse(ATTENTION.format(f=f, on=on, more=more, last=last)), tile=(16,))))


def closed(program: Program, f0: int) -> Program:
    values = {k.name: k.choices[0] for k in knobs(program)}
    return close(program, {**values, "f0": f0})


@pytest.mark.parametrize("f", [1024, 1100])
def test_tiles_mean_what_the_whole_means(f: int) -> None:
    """Also where tiles do not divide the rank, and a result that lacks it is written once."""
    program = wide(f)
    (knob,) = (k for k in knobs(program) if k.name == "f0")
    assert knob.choices == tiles_of(f, 16) and knob.choices[-1] == f
    rng = np.random.default_rng(0)
    data = {"Q": rng.normal(size=(21, 3)), "K": rng.normal(size=(37, 3)), "V": rng.normal(size=(37, f))}
    want = interpret(program, data)
    for f0 in knob.choices:
        tiles = lower(closed(program, f0))
        (kernel,) = tiles.kernels  # nothing has to be filled before
        assert ("f1" in dict(kernel.grid)) and max(d.capacity for d in kernel.dims) == f0
        got = interpret_tile(tiles, data, SIZES)
        assert all(same(got[n], want[n], 1e-9, 1e-12) for n in ("O", "L"))


def test_what_is_made_again_is_counted() -> None:
    program, n = wide(1024), None
    whole = cost(closed(program, 1024), SIZES, target("cpu"))
    assert whole.again == 0
    for f0 in (256, 512):
        shut = closed(program, f0)
        n = Sizes(shut.cascade, SIZES)
        once = sum((sum(operations(e.body)) + (e.reduce is not None)) * n.live(e) for e in shut.cascade.einsums
                   if "f" not in e.space() and e.out.tensor != "L")
        spent = cost(shut, SIZES, target("cpu"))
        assert spent.again == pytest.approx((1024 // f0 - 1) * once)
        assert spent.flops + spent.special - spent.again == pytest.approx(whole.flops + whole.special)
        assert spent.floor == whole.floor


@pytest.mark.parametrize("f,cut", [(1024, None), (4096, True)])
def test_the_fastest_way_is_taken(f: int, cut: bool | None) -> None:
    """Rows that fit beside the processor have no choice; of others the fastest by the model is taken."""
    sizes, machine, program = {"P": 2048, "M": 2048}, target("h100"), wide(f, on="h100")
    taken = cost(close_knobs(program, sizes), sizes, machine)
    assert (taken.again > 0) == bool(cut)
    if cut is None:
        assert "f0" not in {k.name for k in knobs(program)}
        return
    for x in tiles_of(f, 16):
        assert taken.seconds <= cost(close_knobs(close(program, {"f0": x}), sizes), sizes, machine).seconds


@pytest.mark.parametrize("more,last", [("out N[P]: f32", "N[p] = sum{f} O[p, f]")])
def test_a_rank_that_is_summed_stays_whole(more: str, last: str) -> None:
    assert "f0" not in {k.name for k in knobs(wide(1024, more=more, last=last))}


def test_short_rows_have_no_choice() -> None:
    assert "f0" not in {k.name for k in knobs(wide(64))}


@pytest.mark.usefixtures("fresh", "no_grad")
@pytest.mark.parametrize("f0", [1024, 4096])
def test_kernels_of_either_way(f0: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, launched once, right; and explain says what it costs."""
    monkeypatch.setattr("memcomp.forms.modelled", lambda program, sizes, strain=None: {
        "f0": f0, **modelled(close(program, {"f0": f0}), sizes)})
    for kept in ("_READ", "_BUILT"):  # what another size was chosen for
        monkeypatch.setattr(f"memcomp.pipeline.{kept}", {})
    q, k = torch.randn(2, 1, 1, 40, 16)
    v = torch.randn(1, 1, 40, 4096)
    for fn in (causal, with_lse):
        memcomp.reset()
        explained = memcomp.explain(fn, q, k, v)
        (region,) = explained.regions
        (told,) = region.wide
        assert told.rank == "F" and told.taken.tiles == 4096 // f0 and told.other.tiles != told.taken.tiles
        (plain,) = explained.json()["regions"]
        assert plain["wide"][0]["taken"]["again"] == told.taken.again
        assert "Long rows of running states" in explained.html()
        said = " ".join(str(region).split()).split("tiles: F ")[1].split("; or")[0]
        assert said.startswith("whole, ") == (f0 == 4096) != ("operations made again" in said)
        memcomp.reset()
        report = memcomp.check(fn, q, k, v, rest="eager", strict=True)
        assert report.ok and memcomp.stats()["launches"] == 1, report
