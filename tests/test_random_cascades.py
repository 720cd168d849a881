"""Random chains of reductions, drawn from the operator table: streaming and merging never change what they mean.

`benchmarks/random_cascades.py` runs 20,000 of them and records how often each row of the law table was used.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from memcomp.ir.laws import laws, named
from memcomp.ir.text import show
from memcomp.ir.verify import verify
from memcomp.passes.derive import frames, order, plan, separate
from memcomp.passes.reduce_passes import reduce_passes
from tests.random_cascades import TILES, Parts, cascade, difference

RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "random_cascades.json"


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(10**6, 10**9))
def test_streaming_and_merging_keep_the_meaning(seed: int) -> None:
    """`pytest --hypothesis-show-statistics` lists the laws that the examples reached."""
    program = cascade(seed)
    verify(program)
    streamed, why, _ = difference(program, seed)
    assert not why, f"seed {seed}: {why}\n{show(program)}"
    if streamed is not None:
        verify(streamed)
        for name in named(streamed.proofs):
            event(name)
        again = reduce_passes(program, tile=TILES)
        assert reduce_passes(again, tile=TILES) == again


def test_merge_trees_are_compared() -> None:
    """Most one-stage chains can be cut into shares, a merge and a finalise map."""
    split = [reduce_passes(cascade(seed), tile=TILES, splits=3) for seed in range(40)]
    derived = [p for p in split if any("M2" == r.name for r in p.cascade.ranks)]
    assert len(derived) > 10 and sum(Parts.of(p) is not None for p in derived) > len(derived) / 2


@pytest.mark.parametrize("law", ["flip", "sign", "mask", "gauge"])
def test_the_generator_reaches(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule is broken in turn, and a random chain shows it (rows of the law table: tests/test_laws.py)."""
    if law == "flip":  # max of -x is -max of x
        step = order._step
        monkeypatch.setattr(order, "_step", lambda inner, outer, flip, laws: step(inner, outer, False, laws))
    elif law == "sign":  # a factor leaves any homogeneous function
        monkeypatch.setattr(separate.Separator, "_nonneg", lambda self, e, p: True)
    elif law == "mask":  # a map's guard is forgotten where its reader has none
        monkeypatch.setattr(plan.Inliner, "missing", lambda self, conds, guard: [])
    else:  # the states stay in their first frame
        monkeypatch.setattr(frames.Frames, "factor", lambda self, state: None)
    assert any(difference(cascade(seed), seed)[1] for seed in range(600))


def test_the_record() -> None:
    """What the 20,000 said: none wrong, no crash, every row that the law table had then was used."""
    record = json.loads(RECORD.read_text())
    assert record["cascades"] >= 20000 and record["wrong"] == {} and all(record["laws"].values())


@pytest.mark.slow
def test_the_record_is_of_this_table() -> None:
    assert set(json.loads(RECORD.read_text())["laws"]) >= {x.name for x in laws()}
