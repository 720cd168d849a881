"""What a call of a region costs besides its kernel (dispatch, allocation, checks), and what torch.compile costs around.

    python benchmarks/overhead.py [--rounds N]

The region, causal attention of symbolic length, is so small that its kernel starts no thread.  The built kernel alone
is timed beside the op: the difference is held to the bar, in inference mode and in grad mode where no gradient is asked
for.  The kernel's time includes how TVM takes its arguments.  What torch.compile adds (guards, the runtime of its
autograd, Inductor's code) is shown for memcomp's backend and for torch's own two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from measure import Times, record, take_turns, terminal
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memcomp import runtime

BAR, CALLS = 10e-6, 200
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode, "grad mode": torch.enable_grad}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


Call = tuple[runtime.Entry, list[Tensor], list[int]]


def region(rest: str, inputs: tuple[Tensor, ...]) -> tuple[Callable[..., Tensor], Call]:
    """The compiled function, and the (entry, inputs, sizes) that torch hands to its op."""
    seen: list[Call] = []

    def watched(entry: runtime.Entry, inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
        seen.append((entry, inputs, sizes))
        return run(entry, inputs, sizes)

    compiled = torch.compile(attention, backend="memcomp", dynamic=True, options={"rest": rest, "strict": True})
    run, runtime.run = runtime.run, watched  # type: ignore[assignment]
    try:
        compiled(*inputs)
    finally:
        runtime.run = run
    return compiled, seen[-1]


def measured(mode: str, rounds: int) -> dict[str, Times]:
    """Seconds a call."""
    with MODES[mode]():
        torch._dynamo.reset()
        inputs = torch.randn(3, 1, 1, 4, 16).unbind()
        compiled, (entry, tensors, sizes) = region("eager", inputs)
        rests = {"rest eager": compiled, "rest inductor": region("inductor", inputs)[0]}
        rests |= {f"torch's {b}": torch.compile(attention, backend=b, dynamic=True) for b in ("eager", "inductor")}
        _, args = entry.prepare(tensors, sizes)
        op = torch.ops.memcomp.call.default

        def many(call: Callable[[], object]) -> Callable[[], None]:
            def loop() -> None:
                for _ in range(CALLS):
                    call()

            return loop

        times = take_turns({
            "kernel": many(lambda: entry.kernel(*args)),
            "op": many(lambda: op(tensors, sizes, entry.key)),
            **{f"compiled, {n}": many(lambda f=f: f(*inputs)) for n, f in rests.items()},  # type: ignore[misc]
            "torch, not compiled": many(lambda: attention(*inputs)),
        }, rounds)
    return {n: Times(t.median / CALLS, t.least / CALLS, t.spread) for n, t in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=51)
    args = parser.parse_args()
    console, table = terminal(), Table("us a call", *MODES, "spread")
    found = {mode: measured(mode, args.rounds) for mode in MODES}

    def row(name: str, one: Callable[[dict[str, Times]], float], spread: str = "") -> None:
        table.add_row(name, *(f"{one(t) * 1e6:.1f}" for t in found.values()), spread)

    names = next(iter(found.values()))
    for name in names:
        row(name, lambda t, name=name: t[name].median,  # type: ignore[misc]
            ", ".join(f"{t[name].spread:.0%}" for t in found.values()))
    row("op - kernel", lambda t: t["op"].median - t["kernel"].median)
    for name in (n for n in names if n.startswith("compiled, rest")):
        row(f"{name} - op", lambda t, name=name: t[name].median - t["op"].median)  # type: ignore[misc]
    console.print(table)
    overhead = max(t["op"].median - t["kernel"].median for t in found.values())
    console.print(f"a call of a region without its kernel: {overhead * 1e6:.1f} us, at most {BAR * 1e6:g} allowed")
    results = [{"mode": mode, "overhead": t["op"].median - t["kernel"].median,
                "times": {n: asdict(x) for n, x in t.items()}} for mode, t in found.items()]
    console.print(f"written: {record(__file__, results)}")
    return 1 if overhead > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
