"""Bytes that a call holds at its worst moment, besides its inputs and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves


def allocated(call: Callable[[], Any]) -> int:
    """Through torch's allocator, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = call()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most = 0, 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        now += change
        most = max(most, now)
    kept: dict[int, int] = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(out)}
    return max(0, most - sum(kept.values(), start=0))


def scratch(fn: Callable[..., Any], args: Sequence[Any], target: str = "cpu") -> tuple[int, int]:
    """(held, predicted): buffers of memcomp's kernels over all threads, one launch at a time, and what the cost model
    says that as many tasks hold in tiles, packed operands among them."""
    import memcomp
    from memcomp.ir.cost import footprint

    regions = memcomp.explain(fn, *args, target=target).regions
    threads = torch.get_num_threads()
    held = max((k.scratch for r in regions for k in r.kernels), default=0)
    said = max((footprint(r.program, g, r.sizes) for r in regions for g in r.program.mapping.groups), default=0.0)
    return held * threads, int(said) * threads
