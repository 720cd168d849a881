"""Knobs closed one after another, where there are too many candidates to look at them all."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memcomp.ir.errors import Refusal
from memcomp.ir.program import Mapping, Program, close, knobs
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from memcomp.stations import rewrite
from memcomp.tune.model import CANDIDATES, _descended, modelled
from tests.mapped import load

WORTHS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=5)


@given(WORTHS)
def test_what_adds_up_is_closed_as_if_all_were_looked_at(worths: list[list[int]]) -> None:
    def worth(choice: tuple[int, ...]) -> tuple[float, ...]:
        return (float(sum(w[c] for w, c in zip(worths, choice, strict=True))),)

    choices = [tuple(range(len(w))) for w in worths]
    assert worth(_descended(choices, worth)) == min(worth(x) for x in product(*choices))


def test_of_many_kernels_each_has_a_mapping() -> None:
    """The smallest tiles fit if any do: where only they fit, they are taken."""
    read = replace(load("attention_backward"), target="h100")
    program, sizes = rewrite(read, observe=lambda *_: None), {r: 256 for r in "HPMEF"}
    assert math.prod(len(k.choices) for k in knobs(program)) > CANDIDATES
    assert not knobs(close(program, modelled(program, sizes)))
    least = {k.name: min(k.choices) for k in knobs(program)}
    only = close(program, least)
    assert modelled(program, sizes, lambda p: 0.0 if p == only else math.inf) == least


def test_a_knob_without_a_choice_is_refused() -> None:
    program = partition(fuse(load("attention_1pass")))
    k = knobs(program)[0]
    with pytest.raises(Refusal, match="no choice"):
        modelled(_without(program, k.name), {})


def _without(program: Program, name: str) -> Program:
    groups = tuple(replace(g, partition=tuple(
        (r, replace(x, choices=()) if getattr(x, "name", "") == name else x) for r, x in g.partition))
        for g in program.mapping.groups)
    return replace(program, mapping=Mapping(groups))
