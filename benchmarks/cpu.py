"""Kernels on this CPU beside torch's: fp32 prefill, the same with a soft cap, bf16 grouped-query decode.

    python benchmarks/cpu.py [--rounds N] [--only WORD]

Prints a table and writes results/cpu.json.  Random data; every result is compared with float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from measure import Ratio, ratio, table_of, take_turns
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Any]
CAP = 20.0


@dataclass(frozen=True)
class Case:
    """q (1, heads, queries, dim), k and v (1, kv_heads, keys, dim); `rivals` in the order of their turns, memcomp's
    first; `bars`: rival -> how many times faster than it memcomp is asked to be; `exact`: the meaning, in float64."""

    name: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    exact: Attention
    rivals: dict[str, Attention]
    bars: dict[str, float]


def ours(f: Attention) -> Attention:
    compiled: Attention = torch.compile(f, backend="memcomp", dynamic=False, options={"rest": "eager", "strict": True})
    return compiled


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 / CAP)) * CAP
    return torch.softmax(scores, -1) @ v


def flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s / CAP) * CAP)


def cases() -> list[Case]:
    prefill, f32 = (8, 8, 1024, 1024, 64), torch.float32
    return [
        Case("fp32 prefill", prefill, f32, plain, {"memcomp": ours(plain), "SDPA": plain}, {"SDPA": 0.7}),
        Case("fp32 prefill, causal", prefill, f32, causal, {"memcomp": ours(causal), "SDPA": causal}, {"SDPA": 0.7}),
        Case(f"fp32 prefill, soft cap {CAP:g}", prefill, f32, capped,
             {"memcomp": ours(capped), "FlexAttention": torch.compile(flex, dynamic=False),
              "Inductor": torch.compile(capped, dynamic=False), "eager": capped}, {"FlexAttention": 2.5}),
        Case("bf16 decode, 16,384 keys", (32, 8, 1, 16384, 128), torch.bfloat16, grouped,
             {"memcomp": ours(grouped), "SDPA": grouped}, {"SDPA": 1.5}),
    ]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    heads, kv_heads, queries, keys, dim = case.shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, dim).to(case.dtype)
               for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys)))
    exact = case.exact(q.double(), k.double(), v.double())
    torch._dynamo.reset()
    errors = {name: ((f(q, k, v).double() - exact).norm() / exact.norm()).item() for name, f in case.rivals.items()}

    def call(f: Attention) -> Callable[[], object]:
        return lambda: f(q, k, v)

    times = take_turns({name: call(f) for name, f in case.rivals.items()}, rounds)
    return {"case": case.name, "shape": case.shape, "dtype": str(case.dtype), "errors": errors,
            "times": {n: asdict(t) for n, t in times.items()},
            "ratios": {n: asdict(ratio(t, times["memcomp"])) for n, t in times.items() if n != "memcomp"},
            "bars": case.bars}


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, t in result["times"].items():
        r, bar = result["ratios"].get(name), result["bars"].get(name)
        yield (result["case"] if name == "memcomp" else "", name, f"{t['median'] * 1e3:.3f}",
               f"{t['least'] * 1e3:.3f}", f"{t['spread']:.0%}", f"{result['errors'][name]:.1e}",
               str(Ratio(**r)) if r else "", f"{bar:g}x" if bar else "")


def main() -> int:
    columns = ("case", "who", "median ms", "least ms", "spread", "error", "memcomp is faster", "asked")
    console, results = table_of(__doc__ or "", __file__, {c.name: partial(measure, c) for c in cases()}, columns, rows)
    missed = [f"{r['case']}: {r['ratios'][n]['value']:.2f}x of {n}, asked {bar:g}x" for r in results
              for n, bar in r["bars"].items() if r["ratios"][n]["sure"] and r["ratios"][n]["value"] < bar]
    for line in missed:
        console.print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
