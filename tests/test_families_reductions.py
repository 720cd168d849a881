"""Reductions as users write them: one region, the stated kernels and passes, right on tame and on hostile inputs.

What no law makes one pass is told, and right too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import memcomp
from memcomp.models.families import Family
from memcomp.models.families._refused import REFUSED, Refused
from memcomp.models.families.reductions import FAMILIES
from memcomp.pipeline import fixed
from memcomp.report import RegionReport
from tests.hostile import wrong

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROWS, LENGTH = 33, 301  # divide nothing
OPTIONS: dict[str, Any] = {"rest": "eager", "strict": True, "chains": "all"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    memcomp.reset()
    with torch.no_grad():
        yield


def by_name(f: Family | Refused) -> str:
    return f.name


def passes(region: RegionReport, length: int) -> int:
    """The most passes of any input over a rank of this extent."""
    sizes = {**fixed(region.program), **region.sizes}
    inputs = {t.name for t in region.program.cascade.inputs()}
    return max(n for (t, r), n in region.passes.after.items() if t in inputs and sizes.get(r) == length)


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
    right(family, args)


def right(family: Family, args: tuple[torch.Tensor, ...]) -> None:
    """fp32 is judged row by row; others as the oracle does, against what torch's own rounding makes of it."""
    if args[0].dtype == torch.float32:
        assert not wrong(family.fn, args, torch.compile(family.fn, backend="memcomp", options=OPTIONS)(*args))
    else:
        report = memcomp.check(family.fn, *args, **OPTIONS)
        assert report.ok, report


@pytest.mark.parametrize("refused", REFUSED, ids=by_name)
def test_refusals_say_what_is_missing(refused: Refused) -> None:
    args = refused.inputs(ROWS, LENGTH, torch.float32)
    explained = memcomp.explain(refused.fn, *args)
    told = " ".join((*map(str, explained.refusals), *(p for r in explained.regions for p in r.program.proofs
                                                      if p.startswith("refused"))))
    assert "no law for" in told and all(word in told for word in refused.says), told
    report = memcomp.check(refused.fn, *args, rest="eager", strict=True)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_hostile(family: Family) -> None:
    args = family.inputs(ROWS, LENGTH, torch.float32)
    fast = torch.compile(family.fn, backend="memcomp", options=OPTIONS, fullgraph=True, dynamic=False)
    found = {name: errors for name, other in hostile(args) if (errors := wrong(family.fn, other, fast(*other)))}
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,length", [(1, 67), (70, 65), (2, 65536)])
@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_every_dtype_at_every_length(family: Family, rows: int, length: int, dtype: str) -> None:
    right(family, family.inputs(rows, length, DTYPES[dtype]))
