"""Reductions as users write them: one region, the stated kernels and passes, right on tame and on hostile inputs.

What no law makes one pass is told, and right too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import memcomp
from memcomp.models.families import Family
from memcomp.models.families._refused import REFUSED, Refused
from memcomp.models.families.reductions import FAMILIES
from tests.families import DTYPES, LENGTH, ROWS, passes, right
from tests.hostile import leaves, wrong

CANCELLED = "values near 30 with a mean near 0: what f32 sums over a tile lose is of the values' size"
KNOWN = {  # less exact than they should be (docs/derivation.md, known gaps)
    ("l2_norm", "denormals"): "the product with denormals is rounded before it is divided by the norm",
    ("softmax_of_z_scores", "denormals"): "squares of denormals are 0 in fp32",
    ("weighted_mean_variance", "rising"): CANCELLED, ("skew", "rising"): CANCELLED,
}
OPTIONS: dict[str, Any] = {"rest": "eager", "strict": True, "chains": "all"}


pytestmark = pytest.mark.usefixtures("fresh", "no_grad")


def by_name(f: Family | Refused) -> str:
    return f.name


def hostile(args: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Variants of the first input (and of those of its shape): great, small, tied, drifting, with an outlier."""
    x, *more = args
    n = x.shape[-1]
    place = torch.arange(n)
    yield "large", [x * 3e3, *more]
    yield "ties", [x.round(), *more]
    yield "denormals", [x * 1e-40, *more]
    yield "an outlier", [torch.where(place == n // 3, x * 1e4, x), *more]
    yield "rising", [x + torch.linspace(-30, 30, n), *more]
    yield "far from zero", [x + 100.0, *more]


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_one_region_with_the_stated_kernels(family: Family) -> None:
    args = family.inputs(ROWS, LENGTH, torch.float32)
    fast = torch.compile(family.fn, backend="memcomp", options=OPTIONS, fullgraph=True, dynamic=False)
    got = fast(*args)
    stats = memcomp.stats()
    assert stats["regions"] == 1 and stats["launches"] == family.kernels and not stats["fallbacks"], stats
    assert not wrong(family.fn, args, got)


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_passes_and_tolerance(family: Family) -> None:
    dtype = list(DTYPES.values())[FAMILIES.index(family) % 3]
    args = family.inputs(ROWS - 2, LENGTH - 4, dtype)
    (region,) = memcomp.explain(family.fn, *args, **OPTIONS).regions
    assert passes(region, LENGTH - 4) == family.passes
    right(family, args, **OPTIONS)


@pytest.mark.parametrize("refused", REFUSED, ids=by_name)
def test_refusals_say_what_is_missing(refused: Refused) -> None:
    args = refused.inputs(ROWS, LENGTH, torch.float32)
    explained = memcomp.explain(refused.fn, *args)
    told = " ".join((*map(str, explained.refusals), *(p for r in explained.regions for p in r.program.proofs
                                                      if p.startswith("refused"))))
    assert "no law for" in told and all(word in told for word in refused.says), told
    report = memcomp.check(refused.fn, *args, rest="eager", strict=True)
    assert report.ok, report


def seen(fn: Callable[..., Any]) -> Callable[..., list[torch.Tensor]]:
    """fn, and instead of places what the softmax of the first input holds there: places of equal values are equally
    right, as long as they differ from each other."""
    def values(*args: torch.Tensor) -> list[torch.Tensor]:
        out = leaves(fn(*args))
        p = torch.softmax(args[0], -1)
        for k, t in enumerate(out):
            if t.dtype == torch.int64:
                at = t.reshape(len(p), -1)
                assert all(len(row.unique()) == len(row) for row in at)
                out[k] = p.gather(-1, at)
        return out

    return values


@pytest.mark.parametrize("name", ["softmax_written", "layer_norm_written", "softmax_of_z_scores"])
def test_two_passes_are_explained(name: str) -> None:
    (family,) = (f for f in FAMILIES if f.name == name)
    args = family.inputs(ROWS, LENGTH, torch.float32)
    told = memcomp.explain(family.fn, *args)
    written = not any(r.program.cascade.einsums for r in told.regions)
    assert written == name.endswith("written")
    if written:  # torch does as well, and that is said
        (refused,) = told.refusals
        assert refused.why.startswith("2 passes over M in any form (") and " | " in refused.why
    assert "now: 2 passes over M: " in str(memcomp.explain(family.fn, *args, **OPTIONS))


def test_a_mean_is_a_division() -> None:
    """1/301 is no float32: a product with it would be rounded twice."""
    (family,) = (f for f in FAMILIES if f.name == "mean_variance")
    (region,) = memcomp.explain(family.fn, *family.inputs(ROWS, LENGTH, torch.float32)).regions
    text = str(region.program)
    assert "/ 301.0" in text and "0.00332" not in text


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_hostile(family: Family) -> None:
    args = family.inputs(ROWS, LENGTH, torch.float32)
    fast = torch.compile(family.fn, backend="memcomp", options=OPTIONS, fullgraph=True, dynamic=False)
    fn, found = seen(family.fn), {}
    for name, other in hostile(args):
        found[name] = wrong(fn, other, seen(fast)(*other))
    assert not {name: errors for name, errors in found.items() if errors and (family.name, name) not in KNOWN}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,length", [(1, 67), (70, 65), (2, 65536)])
@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_every_dtype_at_every_length(family: Family, rows: int, length: int, dtype: str) -> None:
    right(family, family.inputs(rows, length, DTYPES[dtype]), **OPTIONS)
