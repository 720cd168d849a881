"""A weighted frame or another pass: the cost model chooses, says so, and both are right."""

from __future__ import annotations

import re
import textwrap

import numpy as np
import pytest
import torch

import memcomp
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.models.families import families
from memcomp.pipeline import compile_program, map_program
from tests.chains import FOLDER

CHOSEN = re.compile(r"by cost at (.*): (.*), (\S+) s, not (.*), (\S+) s")


def variance(features: int) -> Program:
    """The variance of values under softmax(Q K), in this many features."""
    text = (FOLDER / "weighted_variance.mc").read_text()
    return parse(text.replace("rank F = 2", f"rank F = {features}").replace("rank E = 3", "rank E = 16"))


@pytest.mark.parametrize("rows,features,choice", [(300, 2, "a weighted frame"), (300, 64, "another pass"),
                                                  (1, 64, "a weighted frame")])
def test_cost_chooses(rows: int, features: int, choice: str) -> None:
    """The weighted mean has the indices of row and feature: its updates are no product, which many rows and features
    pay for, while another pass makes scores and reads keys anew."""
    read = variance(features)
    closed = map_program(read, config=Config(), sizes={"P": rows, "M": 4000})
    told = CHOSEN.fullmatch(closed.proofs[-1])
    assert told is not None, closed.proofs
    assert told[2] == choice and float(told[3]) <= float(told[5]) and {told[2], told[4]} == {
        "a weighted frame", "another pass"}
    assert ("weighted gauge" in " ".join(closed.proofs)) == (choice == "a weighted frame")
    assert f"M: 4 -> {1 if choice == 'a weighted frame' else 2} passes" in closed.proofs
    rng = np.random.default_rng(0)
    x = {"Q": rng.standard_normal((3, 16)), "K": rng.standard_normal((70, 16)),
         "V": rng.standard_normal((70, features)) + 100}
    got = interpret_tile(lower(closed), x, {"P": 3, "M": 70})["O"]
    np.testing.assert_allclose(got, interpret(read, x)["O"], rtol=1e-3)


def test_nothing_is_said_where_there_is_no_choice() -> None:
    text = """
    program p on cpu
    rank P
    rank M
    in S[P, M]: f32
    out D[P]: f32
    GM[p] = max{m} S[p, m]
    D[p] = sum{m} exp(S[p, m] - GM[p])
    """
    assert not any("by cost" in p for p in map_program(parse(textwrap.dedent(text)), config=Config()).proofs)


def test_stations_show_the_form_that_runs() -> None:
    seen: dict[str, object] = {}
    made = compile_program(variance(64), config=Config(), sizes={"P": 300, "M": 4000}, observe=seen.__setitem__)
    assert len(made.tiles.kernels) == 2 and "weighted gauge" not in str(seen["reduce_passes"])
    assert str(made.program).startswith(str(seen["tune"]).rpartition("proof")[0])


def test_the_explanation_says_what_was_chosen() -> None:
    (family,) = (f for f in families() if f.name == "softmax_variance")
    told = memcomp.explain(family.fn, *family.inputs(33, 301, torch.float32))
    assert re.search(r"by cost at .*: a weighted frame, .*, not another pass", " ".join(str(told).split()))
