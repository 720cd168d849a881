"""The forms in which products of bf16 are emitted, beside each other and SDPA: prefill, causal, decode.

    python benchmarks/bf16.py [--rounds N] [--only WORD]

All forms come from the same tiles.  Rivals take turns; besides medians it prints the least CPU time of one thread,
which a busy machine disturbs less.  Errors are relative to float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import ratio, table_of, take_turns
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import memcomp
from memcomp.codegen.lower import lower
from memcomp.codegen.tvm import build, emit
from memcomp.codegen.tvm.isa import AMX, AVX512, AVX512_BF16, Isa, isa
from memcomp.ir.tile import TileProgram

FORMS: dict[str, Isa] = {"widened to f32": AVX512, "pairs": AVX512_BF16, "tiles": AMX}
CASES: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "prefill (1, 8, 1024, 64)": ((8, 8, 1024, 1024, 64), {}),
    "the same, causal": ((8, 8, 1024, 1024, 64), {"is_causal": True}),
    "decode, 32 heads on 8, 128 wide, 16,384 keys": ((32, 8, 1, 16384, 128), {"enable_gqa": True}),
}


def kernel(tiles: TileProgram, form: Isa, tensors: list[Tensor], sizes: dict[str, int]) -> tuple[Tensor, Any]:
    """(output, call) of one form."""
    out = torch.empty_like(tensors[0])
    args = [*tensors, out, *(sizes[s] for s in tiles.sizes)]
    run = build(emit(tiles, form))
    return out, lambda: run(*args)


def least_cpu(call: Callable[[], object], rounds: int) -> float:
    """Seconds of processor time of one thread."""
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    for _ in range(rounds):
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    torch.set_num_threads(threads)
    return best


def measure(name: str, rounds: int) -> dict[str, Any]:
    (heads, kv_heads, queries, keys, dim), options = CASES[name]
    torch.manual_seed(0)
    tensors = [torch.randn(1, h, n, dim).to(torch.bfloat16)
               for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]

    def peer(*qkv: Tensor) -> Tensor:
        return scaled_dot_product_attention(*qkv, **options)

    region = memcomp.explain(peer, *tensors).regions[0]
    tiles = lower(region.program)
    best = isa("cpu")
    able = {n: f for n, f in FORMS.items() if set(f.attributes) <= set(best.attributes) and f.lanes == best.lanes}
    made = {n: kernel(tiles, f, tensors, dict(region.sizes)) for n, f in able.items()}
    calls = {n: call for n, (_, call) in made.items()} | {"SDPA": lambda: peer(*tensors)}
    exact = peer(*(t.double() for t in tensors))
    times = take_turns(calls, rounds)
    outs = {n: out for n, (out, _) in made.items()} | {"SDPA": peer(*tensors)}
    return {"case": name, "rows": [{
        "form": n, "median": times[n].median, "least": times[n].least, "cpu": least_cpu(call, rounds),
        "ratio": str(ratio(times[n], times[list(made)[-1]])),
        "error": ((outs[n].double() - exact).norm() / exact.norm()).item()} for n, call in calls.items()]}


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for n, r in enumerate(result["rows"]):
        yield ("" if n else result["case"], r["form"], f"{r['median'] * 1e3:.3f}", f"{r['least'] * 1e3:.3f}",
               f"{r['cpu'] * 1e3:.2f}", f"{r['error']:.2e}", r["ratio"])


def main() -> int:
    columns = ("case", "form", "median ms", "least ms", "CPU ms, 1 thread", "error", "time over the last form's")
    table_of(__doc__ or "", __file__, {name: partial(measure, name) for name in CASES}, columns, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
