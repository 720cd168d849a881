"""The law table: every row is true as far as numbers say, is used, and is missed when it is false or gone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from memcomp.ir import ops
from memcomp.ir.laws import KINDS, counterexample, law, laws, named
from memcomp.ir.text import parse
from memcomp.passes.reduce_passes import reduce_passes
from tests.broken_laws import YES, broken, false_row, noticed
from tests.chains import NAMES, load

ROWS = [x.name for x in laws()]
ONE_OF_A_KIND = ["exp.hom", "relu.degree", "sub.linear", "min.monotone", "exp.strict", "tanh.range",
                 "sigmoid.positive", "log.domain", "exp2.limits"]


def test_rows_have_names_and_words() -> None:
    assert len(set(ROWS)) == len(ROWS)
    assert {x.kind for x in laws()} == set(KINDS)
    assert all(law(x.op, x.kind) == x and named([str(x)]) == (x.name,) for x in laws())
    assert law("round", "hom") is None and law("unheard", "hom") is None


@pytest.mark.parametrize("op", ops.OPS)
def test_rows_are_true(op: str) -> None:
    assert counterexample(ops.OPS[op]) is None


@pytest.mark.parametrize("row", [r for r in ROWS if r.split(".")[1] not in YES and r != "neg.linear"])
def test_numbers_contradict_a_false_row(row: str) -> None:
    op, kind = row.split(".")
    assert counterexample(false_row(ops.OPS[op], kind)) is not None


CLAIMS: list[tuple[str, dict[str, Any]]] = [
    ("relu", {"strict": True}), ("tanh", {"positive": True}), ("floor", {"strict": True}),
    ("abs", {"monotone": ("inc",)}),
    ("round", {"hom": ("mul", "mul")}), ("round", {"degree": 1.0}), ("tanh", {"hom": ("add", "add")}),
    ("sin", {"monotone": ("inc",)}), ("exp", {"degree": 1.0}), ("log", {"range": (0.0, ops.INF)}),
    ("max", {"linear": ((0, 1),)}), ("square", {"domain": "nonneg", "monotone": ("dec",)}),
    ("exp", {"limits": ((ops.INF, 0.0),)}), ("rsqrt", {"domain": "real"}),
]


@pytest.mark.parametrize(("op", "claim"), CLAIMS)
def test_numbers_contradict_a_false_claim(op: str, claim: dict[str, Any]) -> None:
    found = counterexample(replace(ops.OPS[op], **claim))
    assert found is not None and op in found[1]


def seen(row: str, seeds: int) -> None:
    """A false or missing row gives wrong values on some random chain, or rewrites fewer of them."""
    op, kind = row.split(".")
    got = noticed(row, range(seeds))
    assert got["used"] or got["wrong"]
    if kind == "domain" and not got["wrong"]:  # where the function is defined at all; no rule asks for more
        assert got["numbers"]
    else:
        assert got["wrong"] or got["refused"], got


@pytest.mark.parametrize("row", ONE_OF_A_KIND)
def test_random_chains_notice_a_false_row(row: str) -> None:
    seen(row, 200)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_random_chains_notice_every_false_row(row: str) -> None:
    seen(row, 600)


def test_a_proof_names_the_rows() -> None:
    program = load("relu_squared")
    used = named(reduce_passes(program, tile=(4,), ranks=("M",)).proofs)
    assert "div.linear" in used
    every = {n for name in NAMES for n in named(reduce_passes(load(name), tile=(4,)).proofs)}
    assert {"exp.hom", "exp.limits", "mul.linear", "div.linear", "where.linear", "log.hom"} <= every


def test_a_dropped_row_is_missed_by_name() -> None:
    text = """program t
rank P
rank M
in X[P, M]: f32
out G[P]: f32
out O[P]: f32
G[p] = max{m} abs(X[p, m])
O[p] = sum{m} relu(X[p, m] / G[p])
"""
    program = parse(text)
    assert "relu.degree" in named(reduce_passes(program).proofs)
    with broken("relu.degree", drop=True):
        refused = [p for p in reduce_passes(program).proofs if p.startswith("refused O")]
    assert len(refused) == 1 and "relu" in refused[0]
