"""What this machine can do: products by torch's library, reads by a kernel that does nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memcomp.bench.measure import take_turns
from memcomp.ir.target import target

PRODUCT, READ = "products (torch.mm)", "read"
STREAMS, AHEAD = (1, 2, 4), (0, 2048)


def product(dtype: torch.dtype, flops: float) -> Callable[[], object]:
    """torch's own product of large matrices with about as many operations."""
    n = 1024
    a, b = torch.randn(2, n, n).to(dtype).unbind()
    times = max(1, round(flops / (2.0 * n**3)))
    rest = flops / times / (2.0 * n * n)  # rows, so that the operations agree
    a = a.repeat(-(-round(rest) // n), 1)[: max(1, round(rest))]

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return run


def reader(size: int) -> Callable[[], object]:
    """The fastest of several kernels that read `size` bytes once (rounded to what their tasks share evenly)."""
    from memcomp.codegen.tvm.build import build
    from memcomp.codegen.tvm.launcher import CHUNKS
    from memcomp.codegen.tvm.probe import LINE, LINES, probe

    found: dict[str, Callable[[], object]] = {}
    for streams in STREAMS:
        step = streams * CHUNKS * LINE * LINES
        x = torch.ones(max(1, round(size / 4 / step)) * step, dtype=torch.int32)
        out = torch.empty(CHUNKS * LINE, dtype=torch.int32)
        for ahead in AHEAD:
            kernel = build(probe(target("cpu"), streams, ahead))
            found[f"{streams} {ahead}"] = lambda kernel=kernel, x=x, out=out: kernel(x, out)  # type: ignore[misc]
            found[f"{streams} {ahead}"]()
            assert int(out.sum()) == x.numel()
    times = take_turns(found, rounds=9)
    return found[min(times, key=lambda n: times[n].median)]
