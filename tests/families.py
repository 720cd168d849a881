"""What the tests of all families share: types, lengths, and how passes are read off a report."""

from __future__ import annotations

import torch

from memcomp.pipeline import fixed
from memcomp.report import RegionReport

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROWS, LENGTH = 33, 301  # divide nothing


def passes(region: RegionReport, length: int) -> int:
    """The most passes of any input over a rank of this extent."""
    sizes = {**fixed(region.program), **region.sizes}
    inputs = {t.name for t in region.program.cascade.inputs()}
    return max(n for (t, r), n in region.passes.after.items() if t in inputs and sizes.get(r) == length)
