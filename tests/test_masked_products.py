"""Sums of products some of whose points a guard keeps out stay products, on whole tiles and on others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memcomp.codegen.lower import lower
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot, Fold, TileKernel, statements
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.stations import rewrite
from tests.mapped import inputs, load, mapped, same

HEAD = """program p
rank P
rank M
rank E
in Q[P, E]: f32
in K[M, E]: f32
in W[P, M]: f32
in ids[P]: i32
out O[P, M]: f32
out R[P, E]: f32
"""
# what guards say: of whole results, of what is summed, of both; by data, and that a dim is one place
GUARDS = {
    "of results": "O[p, m] = sum{e} Q[p, e] * K[m, e] where m <= p\nR[p, e] = Q[p, e] where e < 3",
    "of what is summed": "O[p, m] = sum{e} Q[p, e] * K[m, e] where e < 20\n"
                         "R[p, e] = sum{m} W[p, m] * K[m, e] where m <= p",
    "of both": "O[p, m] = sum{e} Q[p, e] * K[m, e] where m <= p and e < 20\n"
               "R[p, e] = sum{m} W[p, m] * K[m, e] where m <= p and p < 40",
    "by data": "O[p, m] = sum{e} Q[p, e] * K[m, e] where m < ids[p]\n"
               "R[p, e] = sum{m} W[p, m] * K[m, e] where ids[p] < m",
    "one place": "O[p, m] = Q[p, 0] * K[m, 0]\nR[p, e] = sum{m} Q[p, e] where m == ids[p]",
    "one place by data": "O[p, m] = Q[p, 0] * K[m, 0]\nR[p, e] = sum{m} Q[p, e] where m == ids[p] and W[p, m] > 0.0",
}


def kernels(text: str, choice: int = 0) -> tuple[TileKernel, ...]:
    return lower(mapped(parse(text), choice)).kernels


@pytest.mark.parametrize("name", GUARDS)
def test_they_mean_the_program(name: str) -> None:
    program, rng = parse(HEAD + GUARDS[name]), np.random.default_rng(3)
    for choice, (p, m, e) in enumerate(((1, 1, 1), (40, 70, 21), (64, 64, 64), (130, 33, 300))):
        sizes = {"P": p, "M": m, "E": e}
        given = inputs(program, sizes, rng)
        want, got = interpret(program, given, sizes), interpret_tile(lower(mapped(program, choice)), given, sizes)
        assert all(same(got[n], want[n], 1e-9, 1e-11) for n in want), sizes


@pytest.mark.parametrize("name", [n for n in GUARDS if not n.startswith("one place")])
def test_no_product_is_summed_up_point_by_point(name: str) -> None:
    made = [s for k in kernels(HEAD + GUARDS[name]) for s in statements(k.body)]
    assert any(isinstance(s, Dot) for s in made)
    assert not any(isinstance(s, Fold) and s.monoid == "sum" for s in made)


def test_what_a_test_names_is_not_looked_for() -> None:
    """The sum of what is the same at all places, at one of them: that, if the place is there."""
    made = [s for k in kernels(HEAD + GUARDS["one place"]) for s in statements(k.body)]
    assert not any(isinstance(s, Fold) for s in made)


def test_the_gradients_of_attention_are_products_whatever_their_features() -> None:
    read = replace(load("attention_backward"), target="h100")
    tiles = lower(mapped(rewrite(read, observe=lambda *_: None, names=("canonicalize", "specialize", "generalize"))))
    made = [s for k in tiles.kernels for s in statements(k.body)]
    assert sum(isinstance(s, Dot) for s in made) >= 5
    assert not any(isinstance(s, Fold) and s.monoid == "sum" for s in made)
