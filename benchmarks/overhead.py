"""What a call of a region costs besides its kernel: the op's dispatch, the outputs' allocation, the argument checks.

    python benchmarks/overhead.py

The region has one query and one key, so that all of its time is overhead; the built kernel alone is timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from measure import Times, record, take_turns, terminal
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memcomp import runtime

BAR, CALLS = 25e-6, 200


def region() -> tuple[runtime.Entry, list[Tensor], list[int]]:
    """The smallest region as registered, and the (inputs, sizes) that torch hands to its op."""
    seen: list[tuple[runtime.Entry, list[Tensor], list[int]]] = []

    def watched(entry: runtime.Entry, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
        seen.append((entry, inputs, sizes))
        return run(entry, inputs, sizes)

    run, runtime.run = runtime.run, watched  # type: ignore[assignment]
    try:
        compiled = torch.compile(scaled_dot_product_attention, backend="memcomp",
                                 options={"rest": "eager", "strict": True})
        compiled(*torch.randn(3, 1, 1, 1, 16).unbind())
    finally:
        runtime.run = run
    return seen[-1]


def main() -> int:
    with torch.inference_mode():
        entry, inputs, sizes = region()
        outs = runtime.allocate(entry, inputs, sizes)
        work = [inputs[0].new_empty(extents(inputs, sizes), dtype=dtype) for extents, dtype in entry.work]
        args = [*inputs[: len(entry.dims)], *outs, *work, *entry.ints(inputs, sizes)]
        op = torch.ops.memcomp.call.default

        def many(call: Callable[[], object]) -> Callable[[], None]:
            def loop() -> None:
                for _ in range(CALLS):
                    call()

            return loop

        times = take_turns({"op": many(lambda: op(inputs, sizes, entry.key)),
                            "kernel": many(lambda: entry.kernel(*args))}, rounds=51)
    one = {n: Times(t.median / CALLS, t.least / CALLS, t.spread) for n, t in times.items()}
    overhead = one["op"].median
    console = terminal()
    console.print(f"a call of a region: {overhead * 1e6:.1f} us, at most {BAR * 1e6:g} allowed; "
                  f"of that the built kernel {one['kernel'].median * 1e6:.1f} us; spread {one['op'].spread:.0%}")
    console.print(f"written: {record(__file__, [{n: asdict(t) for n, t in one.items()}])}")
    return 1 if overhead > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
