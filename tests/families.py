"""What the tests of all families share: types, lengths, and how passes are read off a report."""

from __future__ import annotations

from typing import Any

import torch

import memcomp
from memcomp.models.families import Family
from memcomp.report import RegionReport
from memcomp.sizes import fixed
from tests.hostile import COPIES, wrong

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROWS, LENGTH = 33, 301  # divide nothing


def passes(region: RegionReport, length: int) -> int:
    """The most passes of any input over a rank of this extent."""
    sizes = {**fixed(region.program), **region.sizes}
    inputs = {t.name for t in region.program.cascade.inputs()}
    return max(n for (t, r), n in region.passes.after.items() if t in inputs and sizes.get(r) == length)


def right(family: Family, args: tuple[torch.Tensor, ...], **options: Any) -> None:
    """fp32 is judged row by row; others as the oracle does, against what torch's own rounding makes of it."""
    if args[0].dtype == torch.float32:
        fast = torch.compile(family.fn, backend="memcomp", options=options)
        copies = COPIES if max(t.numel() for t in args) < 1 << 20 else 2  # float64 takes its time
        assert not wrong(family.fn, args, fast(*args), copies)
    else:
        report = memcomp.check(family.fn, *args, **options)
        assert report.ok, report
