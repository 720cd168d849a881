"""What an artifact costs: a call of a kernel and of a whole model besides the machine code, loading it, and the machine
code itself beside what the compiler keeps in its own process.

    python benchmarks/artifact.py [--rounds N]

The region is SmolLM2's attention (9 heads, 3 of keys and values, 64 numbers each) at symbolic lengths.  A call is timed
where it has next to nothing to compute, with torch's tensors and with numpy's; "machine code" is the same function with
tensors that are there.  Loading is timed in fresh processes in which torch, TVM, Triton and sympy cannot be imported,
from the first file to the last, all imports included; held to the bar is the processor's time, which is the clock's on
a machine that does nothing else.

The whole model is a Llama of two layers at two rows of two tokens.  Its call is timed in turn with the machine code
that walks its steps, and with the same call in which that walks none of them, which is the call's own time; to that
comes what the walk takes for a step that does nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Times, record, take_turns, terminal
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import memcomp
from memcomp.artifact.compile import regions, whole, write
from memcomp.artifact.walk import KERNEL, Program
from memcomp.config import config
from memcomp.inputs import Function
from memcomp.signature import Dim

BAR, LOAD, CALLS, PROCESSES, STEPS = 5e-6, 0.5, 20, 7, 1000
KINDS = ("median", "least")
MORE = 20  # rounds of calls for each round of kernels: a turn is a fraction of a millisecond
SHAPES = {"prefill 512": (512, 512), "decode 2048": (1, 2048)}  # queries, keys
FRESH = """
import sys, time
for name in ("torch", "tvm", "triton", "sympy", "networkx"):
    sys.modules[name] = None
import memcomp
start = time.process_time(), time.perf_counter()
memcomp.load(sys.argv[1])
print(time.process_time() - start[0], time.perf_counter() - start[1])
"""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def tensors(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 9, queries, 64), torch.randn(1, 3, keys, 64), torch.randn(1, 3, keys, 64)


def many(call: Callable[[], object]) -> Callable[[], None]:
    def loop() -> None:
        for _ in range(CALLS):
            call()

    return loop


def calls(kernel: Any, rounds: int) -> dict[str, Times]:
    """Seconds a call of one query and one key."""
    torch.set_num_threads(1)
    inputs = tensors(1, 1)
    arrays = [x.numpy() for x in inputs]
    numbers = kernel.arguments(dict(zip([r.name for r in kernel.spec.sizes], (1, 1), strict=True)))
    out = torch.empty(1, 9, 1, 64)
    array = out.numpy()
    found = take_turns({
        "machine code, torch": many(lambda: kernel.function(*inputs, out, *numbers)),
        "call, torch": many(lambda: kernel(*inputs)),
        "machine code, numpy": many(lambda: kernel.function(*arrays, array, *numbers)),
        "call, numpy": many(lambda: kernel(*arrays)),
    }, MORE * rounds)
    return {n: Times(t.median / CALLS, t.least / CALLS, t.spread) for n, t in found.items()}


def whole_model(rounds: int) -> tuple[int, dict[str, Times]]:
    """Steps of a small model's plan, and seconds of a call, of its steps alone, of all but them, of an empty step."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True)).eval()
    given = Function(model, (torch.arange(32).reshape(2, 16),), ({0: Dim("B"), 1: Dim("S")},))
    with TemporaryDirectory() as folder:
        write(whole(given, [config({"target": "cpu", "strict": True})]), Path(folder) / "llama")
        run, without = (memcomp.load(Path(folder) / "llama") for _ in range(2))
    token = torch.zeros(2, 2, dtype=torch.long)
    given = [token, *run(token)]
    (mine,), bound = run._model.at((token.shape,)).acts, without._model.at((token.shape,))
    without._model._mine.known[token.shape,] = replace(bound, acts=[replace(bound.acts[0], last=0)])
    empty, nothing = Program(), Program().ready()
    for _ in range(STEPS):
        empty.add(KERNEL, [nothing, 0, 0], mine.walker)
    steps = empty.ready()
    found = take_turns({
        "call": many(lambda: run(token)), "steps": many(lambda: mine.walker(mine.place, 0, mine.last, *given)),
        "no steps": many(lambda: mine.walker(mine.place, 0, 0, *given)),
        "call without steps": many(lambda: without(token)),
        "empty steps": many(lambda: mine.walker(steps, 0, STEPS))}, MORE * rounds)
    times = {n: Times(t.median / CALLS, t.least / CALLS, t.spread) for n, t in found.items()}
    e = times.pop("empty steps")
    return mine.last, times | {"empty step": Times(e.median / STEPS, e.least / STEPS, e.spread)}


def code(kernel: Any, made: Any, rounds: int) -> dict[str, dict[str, Times]]:
    """Seconds of the library's code and of the compiler's, which must agree."""
    (one,) = made.kernels
    entry = one.compiled["cpu"].entry
    found = {}
    for name, (queries, keys) in SHAPES.items():
        inputs = tensors(queries, keys)
        mine, (out,) = torch.empty(1, 9, queries, 64), kernel(*inputs)
        sizes = dict(zip([r.name for r in kernel.spec.sizes], (queries, keys), strict=True))
        assert not kernel.work(sizes), "the region has a form with partial results"
        numbers = kernel.arguments(sizes)
        entry(*inputs, mine, *numbers)
        assert torch.equal(mine, out), "the library computes something else"
        found[name] = take_turns({"library": lambda x=inputs, o=mine, n=numbers: kernel.function(*x, o, *n),
                                  "in the compiler's process": lambda x=inputs, o=mine, n=numbers: entry(*x, o, *n)},
                                 rounds)
    return found


def loads(place: Path) -> list[tuple[float, ...]]:
    """Seconds of the processor and by the clock, in processes of their own."""
    command = [sys.executable, "-c", FRESH, str(place)]
    return [tuple(map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))
            for _ in range(PROCESSES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=51)
    args = parser.parse_args()
    console, table = terminal(), Table("what", "median", "spread")
    threads = torch.get_num_threads()
    opened = ({2: Dim("P")}, {2: Dim("M")}, {2: Dim("M")})
    with TemporaryDirectory() as folder, torch.inference_mode(), console.status("measuring"):
        made = regions(Function(attention, tensors(16, 32), opened), [config({"target": "cpu"})])
        write(made, Path(folder) / "smollm2")
        seconds = loads(Path(folder) / "smollm2")
        kernel, = memcomp.load(Path(folder) / "smollm2").kernels.values()
        torch.set_num_threads(threads)
        running = code(kernel, made, args.rounds)
        calling = calls(kernel, args.rounds)
        steps, model = whole_model(args.rounds)
        torch.set_num_threads(threads)
    for name, t in calling.items():
        table.add_row(name, f"{t.median * 1e6:.1f} us", f"{t.spread:.0%}")
    over = {w: calling[f"call, {w}"].median - calling[f"machine code, {w}"].median for w in ("torch", "numpy")}
    for which, x in over.items():
        table.add_row(f"call - machine code, {which}", f"{x * 1e6:.1f} us")
    for name, t in model.items():
        table.add_row(f"model, {name}", f"{t.median * 1e6:.3g} us", f"{t.spread:.0%}")
    own = [getattr(model["call without steps"], k) + steps * getattr(model["empty step"], k) for k in KINDS]
    more = [getattr(model["call"], k) - getattr(model["steps"], k) + getattr(model["no steps"], k) for k in KINDS]
    table.add_row(f"model of {steps} steps, own time", f"{own[0] * 1e6:.1f} us", f"least {own[1] * 1e6:.1f} us")
    table.add_row("model, call - steps", f"{more[0] * 1e6:.1f} us", f"least {more[1] * 1e6:.1f} us")
    over["model"] = own[0]
    for shape, both in running.items():
        for name, t in both.items():
            table.add_row(f"{shape}, {name}", f"{t.median * 1e3:.2f} ms", f"{t.spread:.0%}")
    busy, clock = (median(x) for x in zip(*seconds, strict=True))
    table.add_row("load, in a fresh process", f"{busy * 1e3:.0f} ms", f"{clock * 1e3:.0f} ms by the clock")
    console.print(table)
    console.print(f"a call besides its machine code: {max(over.values()) * 1e6:.1f} us, at most {BAR * 1e6:g} allowed; "
                  f"load: {busy:.2f} s, at most {LOAD:g} allowed")
    results = [{"overhead": over, "load": seconds, "model": {n: asdict(t) for n, t in model.items()}, "steps": steps,
                "call - steps": more, "calls": {n: asdict(t) for n, t in calling.items()},
                "code": {s: {n: asdict(t) for n, t in both.items()} for s, both in running.items()}}]
    console.print(f"written: {record(__file__, results)}")
    return 1 if max(over.values()) > BAR or busy > LOAD else 0


if __name__ == "__main__":
    raise SystemExit(main())
