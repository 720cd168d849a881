"""Every chain of reductions, through the whole pipeline to tiles: the tiles mean what the chain says, split or not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from memcomp.codegen.lower import lower
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.passes.canonicalize import canonicalize
from memcomp.passes.fuse import fuse
from memcomp.passes.generalize import generalize
from memcomp.passes.partition import partition
from memcomp.passes.reduce_passes import reduce_passes
from memcomp.passes.specialize import specialize
from memcomp.tune.model import close_knobs
from tests.chains import NAMES, arrays, load
from tests.test_reduce_passes import same

# lower says no where a merged state without the row rank stands between the rows' kernels, and where a second
# reduced rank is a symbol without a bound, so that no tile holds it
REFUSED = {(name, 3): "rank P has no bound" for name in ("layernorm_matmul", "groups_joined")} | {
    (name, splits): "has no bound" for splits in (None, 3)
    for name in ("layernorm_pair", "normalised_keys", "median_deviation")} | {
    ("normalised_short", 3): "has no bound"} | {
    ("greatest_place", splits): "has no tile form" for splits in (None, 3)}


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_of_a_derived_chain_equal_the_chain(name: str, splits: int | None) -> None:
    read = load(name)
    mapped: Any = generalize(specialize(canonicalize(read)))
    mapped = partition(fuse(reduce_passes(mapped, tile=(8,), splits=splits)))
    closed = close_knobs(mapped, {"P": 6, "M": 25, "N": 25, "E": 3, "F": 2, "MG": 7})
    if (name, splits) in REFUSED:
        with pytest.raises(Refusal, match=REFUSED[name, splits]):
            lower(closed)
        return
    tiles = lower(closed)
    rows = ((6, 25), (3, 10)) if name == "top_renormalised" else ((6, 25), (3, 10), (3, 0))  # it reads V at places
    for p, m in rows:
        inputs = arrays(read, p, m, "plain")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            expected = interpret(read, inputs)
            found = interpret_tile(tiles, inputs, {"P": p, "M": m, "N": m, "E": 3, "F": 2, "MG": -(-m // 4)})
        for k, v in expected.items():
            assert same(v, found[k]), (k, p, m)
