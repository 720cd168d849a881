"""Passes as counted by the analysis against passes as executed: tile programs run, and every read is counted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from memcomp.codegen.lower import lower
from memcomp.ir.errors import Refusal
from memcomp.ir.program import Program
from memcomp.ir.tile_interpret import measure_tile
from memcomp.ir.traversal import traversals
from memcomp.passes.canonicalize import canonicalize
from memcomp.passes.fuse import fuse
from memcomp.passes.generalize import generalize
from memcomp.passes.partition import partition
from memcomp.passes.reduce_passes import reduce_passes
from memcomp.passes.specialize import specialize
from memcomp.sizes import evaluate
from memcomp.tune.model import close_knobs
from tests.chains import NAMES, arrays, load

P, M = 1, 25  # one row: what several rows read each for themselves is no pass
SIZES = {"P": P, "M": M, "N": M, "E": 3, "F": 2, "MG": -(-M // 4)}


def measured(read: Program, mapped: Program) -> tuple[Program, dict[str, float]]:
    """The closed program, and how often each element of an argument or workspace is read on average."""
    closed = close_knobs(partition(fuse(mapped)), SIZES)
    tiles, inputs = lower(closed), arrays(read, P, M, "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        moved = measure_tile(tiles, inputs, SIZES)[1]
    elements = {p.name: 1 for p in tiles.params}
    for p in tiles.params:
        for n in p.shape:
            elements[p.name] *= _extent(n)
    return closed, {name: count / max(1, elements[name]) for name, count in moved.reads.items()}


def _extent(x: Any) -> int:
    return int(evaluate(x, SIZES))


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_passes_as_often_as_the_counter_says(name: str) -> None:
    """One kernel reads an argument once for each pass over the long rank; guards that make tiles empty only save.

    Several kernels, another index (`X[m + 1]`), or several reductions over a short fiber (a row of features) read more.
    """
    read = load(name)
    try:
        closed, reads = measured(read, reduce_passes(generalize(specialize(canonicalize(read))), tile=(8,)))
    except Refusal as why:
        pytest.skip(str(why).splitlines()[0])
    inputs = {t.name for t in read.cascade.inputs()}
    found = [t for t in traversals(closed) if t.rank == t.of and t.tensor in reads and t.tensor in inputs]
    saved = any(e.guard is not None for e in read.cascade.einsums) or "len" in inputs
    one = len(closed.mapping.groups) == 1
    for t in (t for t in found if t.rank == "M"):
        ways = {a for e in closed.cascade.einsums for a in e.accesses() if a.tensor == t.tensor}
        short = {v for e in closed.cascade.readers(t.tensor) if e.reduce for v in e.reduce.over} - {"m", "m0", "m1"}
        if one and len(ways) == 1 and (not short or len(closed.cascade.readers(t.tensor)) == 1):
            assert reads[t.tensor] <= t.passes, (t, reads)
        assert saved or reads[t.tensor] >= (t.passes if one else len(t.reads)), (t, reads)


@pytest.mark.parametrize("name", ["plain", "layernorm", "rmsnorm_matmul", "entropy", "exp_product"])
def test_no_mapping_reads_less_than_the_counter_says(name: str) -> None:
    """The form as read, its temporaries in memory: a tensor that several passes read is read at least that often."""
    read = load(name)
    closed, reads = measured(read, generalize(canonicalize(read)))
    several = [t for t in traversals(closed) if t.rank == "M" and t.tensor in reads and len(t.reads) > 1]
    assert several
    for t in several:
        assert reads[t.tensor] >= len(t.reads), (t, reads)
