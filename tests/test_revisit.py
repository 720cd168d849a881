"""What lives between passes, and what buffering, spilling and recomputing it costs, against counting by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from memcomp.analysis import analyse
from memcomp.ir.program import Program
from memcomp.ir.revisit import live, revisits
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.traversal import traversals
from tests.programs import arrays, programs
from tests.test_traversal import CASCADE_4, CASCADE_5, GOLDEN

SIZES = {"P": 10, "M": 640, "E": 16, "F": 8}
CPU = target("cpu")


def load(text: str) -> Program:
    return parse("program t on cpu\n" + text)


def footprint(text: str, tensor: str, rank: str) -> tuple[int, float]:
    found = next(x for x in live(load(text), SIZES) if (x.tensor, x.rank) == (tensor, rank))
    return found.elements, found.footprint


def test_footprints() -> None:
    """One row of scores over all keys; of the streaming form the scores of one tile, and no fiber of the keys."""
    assert footprint(CASCADE_4, "QK", "M") == (640, 4 * 640)
    assert footprint(CASCADE_4, "K", "M") == (1, 4 * 16)  # one key: its features are summed up before the next
    assert footprint(CASCADE_5, "QK", "M0") == (64, 4 * 64)
    assert footprint(CASCADE_5, "QK", "M") == (1, 4) and footprint(CASCADE_5, "V", "M")[0] == 1


def test_the_three_ways_of_the_scores() -> None:
    found = {r.tensor: r for r in revisits(load(CASCADE_4), SIZES, CPU)}
    assert set(found) == {"QK", "SN"}
    scores = found["QK"]
    assert scores.reads == (1, 2) and scores.footprint == 4 * 640 and scores.tasks == 10
    assert scores.buffer.bytes == 0 and scores.buffer.level
    assert scores.spill.bytes == 3 * 4 * 6400  # written once, read in two passes
    assert scores.recompute is not None
    assert scores.recompute.flops == 2 * 6400 * 16 and scores.recompute.bytes == 4 * 640 * 16  # the keys again
    again = found["SN"].recompute
    assert again is not None and again.special == 6400 and again.flops == 2 * 6400 * 16 + 6400  # GM is kept


def test_an_argument_is_read_again_and_never_recomputed() -> None:
    program = load(GOLDEN["layer norm, two moments"][0])
    row, = revisits(program, {"N": 7, "D": 100}, CPU)
    assert row.reads == (1, 2, 3) and row.recompute is None and row.tasks == 7
    assert row.spill.bytes == 2 * 4 * 700


def test_what_does_not_fit_is_not_kept() -> None:
    """A fiber beyond every level but memory is moved or made again."""
    big, = (r for r in revisits(load(CASCADE_4), SIZES | {"M": 1 << 34}, CPU) if r.tensor == "QK")
    assert math.isinf(big.buffer.seconds) and not big.buffer.level and big.best != "buffer"


def test_the_streaming_form_has_nothing_to_keep_over_the_data() -> None:
    assert not revisits(load(CASCADE_5), SIZES, CPU)


@settings(max_examples=40, deadline=None)
@given(p=programs(loops=False))
def test_laws(p: Program) -> None:
    """No tensor without several reads; every footprint and cost is positive, and finite but for what does not fit."""
    sizes = {r: n for t in p.cascade.inputs() for r, n in zip(t.ranks, arrays(p)[t.name].shape, strict=True)}
    sizes = {r.name: sizes.get(r.name, 3) for r in p.cascade.ranks if r.extent is None}
    found = analyse(p, sizes, CPU)
    several = {(t.tensor, t.rank) for t in traversals(p) if len(t.reads) > 1}
    for r in found.revisits:
        assert (r.tensor, r.rank) in several and len(r.reads) > 1
        assert r.footprint > 0 and r.tasks >= 1 and r.spill.bytes > 0 and math.isfinite(r.spill.seconds)
    assert {"fibers", "revisits", "class"} == set(found.json())
    text = list(found.lines(str))
    assert len(text) == len(found.why()) + len(found.revisits)


def test_reasons_are_said_once() -> None:
    found = analyse(load(CASCADE_4), SIZES, CPU)
    assert [t.chain for t in found.why()] == [(("K", "QK", "GM"), ("SN", "SD"), ("A",))]
    assert found.taxon is not None and str(found.taxon) == "3-pass over M"
    assert "3 passes over M: K, QK, GM | SN, SD | A" in set(found.lines(lambda n: f"{n:g}"))
    assert pytest.approx(3.0) == found.taxon.weight(lambda r: SIZES[r])
