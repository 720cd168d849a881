"""What a call of a region costs besides its kernel: the op's dispatch, the outputs' allocation, the argument checks.

    python benchmarks/overhead.py

The op is timed against a bare call of its kernel on the same tensors, turn by turn.
"""

from __future__ import annotations

import torch
from measure import Times, record, take_turns
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from memcomp import runtime

BAR, CALLS = 25e-6, 200


def region() -> tuple[runtime.Entry, list[torch.Tensor], list[int]]:
    """A small region as registered, and the (inputs, sizes) that torch hands to its op."""
    seen: list[tuple[str, list[torch.Tensor], list[int]]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.memcomp.call.default:
                seen.append((args[2], list(args[0]), list(args[1])))
            return func(*args, **(kwargs or {}))

    q, k, v = torch.randn(3, 1, 2, 16, 16).unbind()
    compiled = torch.compile(scaled_dot_product_attention, backend="memcomp", options={"rest": "eager", "strict": True})
    compiled(q, k, v)
    with Watch():
        compiled(q, k, v)
    key, inputs, sizes = seen[-1]
    return runtime._ENTRIES[key], inputs, sizes


def main() -> int:
    with torch.inference_mode():
        entry, inputs, sizes = region()
        outs = runtime.allocate(entry, inputs, sizes)
        work = [inputs[0].new_empty(extents(inputs, sizes), dtype=dtype) for extents, dtype in entry.work]
        args = [*inputs[: len(entry.dims)], *outs, *work, *entry.ints(inputs, sizes)]
        op = torch.ops.memcomp.call.default

        def many(call: object) -> object:
            def loop() -> None:
                for _ in range(CALLS):
                    call()  # type: ignore[operator]
            return loop

        times = take_turns({"op": many(lambda: op(inputs, sizes, entry.key)),
                            "kernel": many(lambda: entry.kernel(*args))}, rounds=51)  # type: ignore[dict-item]
    one = {n: Times(t.median / CALLS, t.least / CALLS, t.spread) for n, t in times.items()}
    overhead = one["op"].median - one["kernel"].median
    console = Console()
    console.print(f"op {one['op'].median * 1e6:.1f} us, kernel alone {one['kernel'].median * 1e6:.1f} us: overhead "
                  f"{overhead * 1e6:.1f} us, at most {BAR * 1e6:g} allowed")
    console.print(f"written: {record(__file__, [{n: vars(t) for n, t in one.items()} | {'overhead': overhead}])}")
    return 1 if overhead > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
