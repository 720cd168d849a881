"""The table of cascades: passes before and after, what is refused and why, and numbers no worse than the plain form's.

`test_reduce_passes` compares meaning in float64; here are the counts, the refusals, and float32 on adversarial data.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from memcomp.ir.interpret import interpret
from memcomp.ir.traversal import passes
from memcomp.passes.reduce_passes import reduce_passes, refusals
from tests.chains import COUNTS, KINDS, NAMES, REFUSED, arrays, load
from tests.rows import bound
from tests.single import TILE, rounded, single

ROWS, POINTS = 2, 38  # the tile divides neither


def derived(name: str, **options: Any) -> Any:
    program = load(name)
    carried = any("M" in t.ranks for t in program.cascade.outputs())
    return reduce_passes(program, tile=(TILE,), ranks=("M",) if carried else None, **options)


@pytest.mark.parametrize("name", NAMES)
def test_passes(name: str) -> None:
    """The counter of `ir.traversal` on the cascade that was written and on the one that came out."""
    before, after = COUNTS.get(name, (3, 1))
    given = {t.name for t in load(name).cascade.inputs()}
    for program, most in ((load(name), before), (derived(name), after), (derived(name, splits=3), after)):
        along = [n for (t, r), n in passes(program).items() if t in given and r in ("M", "N", "M1")]
        assert max(along) == most
        said = [line for line in program.proofs if re.fullmatch(r"[MN]: \d+ -> \d+ passes", line)]
        assert all(line.endswith(f": {before} -> {after} passes") for line in said)


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str) -> None:
    """A refusal names the reduction, the edge that blocks, the operator and the law."""
    found = refusals(derived(name))
    assert [w.where for w in found] == [f"{t} over M" for t, _, _ in REFUSED.get(name, [])]
    for why, (t, needs, op) in zip(found, REFUSED.get(name, []), strict=True):
        assert "no law for" in why.why and op in why.why.replace("/", "div")
        edge = re.search(r"\(edge (.*) -> (.*)\)", why.why)
        assert edge and needs in edge[1].split(", ") and edge[2] == t if needs else edge is None


def error(got: Any, want: Any) -> Any:
    """The largest error of each row; where the plain form is NaN anything will do."""
    with np.errstate(all="ignore"):
        e = np.where((got == want) | np.isnan(want), 0.0, np.abs(got - want))
    return np.nan_to_num(e.reshape(len(e), -1), nan=np.inf).max(1)


def moved(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same data with other roundings."""
    rng = np.random.default_rng(seed)
    return {k: rounded(v * (1 + 1e-5 * rng.standard_normal(v.shape))) if v.dtype.kind == "f" else v
            for k, v in inputs.items()}


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("plain", "masked")])
@pytest.mark.parametrize("name", NAMES)
def test_numbers(name: str, kind: str) -> None:
    """float64: equal to rounding.  float32: no row worse than twice the plain form, or a few last places."""
    program, new = load(name), derived(name, frame="running" if kind in ("drift", "outlier") else "first")
    inputs = {k: rounded(v) for k, v in arrays(program, ROWS, POINTS, kind).items()}
    want = interpret(program, inputs)
    exact, got = interpret(new, inputs), single(new, inputs)
    plain = [(interpret(program, x), single(program, x)) for x in (inputs, moved(inputs, 1))]
    for t, w in want.items():
        if w.dtype.kind != "f":  # places: equal where values are not equal to rounding, which `exact` says
            np.testing.assert_array_equal(exact[t], w)
            continue
        row = np.abs(np.nan_to_num(w, posinf=0, neginf=0)).reshape(len(w), -1).max(1)
        assert (error(exact[t], w) <= 1e-11 * np.maximum(row, 1)).all()
        naive = np.maximum.reduce([error(b[t], a[t]) for a, b in plain])
        assert (error(got[t], w) <= bound(naive, row)).all(), (t, error(got[t], w), naive, row)
