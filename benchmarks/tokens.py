"""Tokens per second of SmolLM2-135M, float32: prefill of 2,048 tokens, and decoding after 4,096.

    python benchmarks/tokens.py [--rounds N] [--layers N]

torch.compile with memcomp beside torch.compile alone and eager, in turn, in one process, each with caches of its own: a
cache that grows (`DynamicCache`, which torch copies at every step, whoever compiles) and one of fixed size that is
written in place (`StaticCache`).  --layers keeps only the first ones, for a quick look; nothing is recorded then.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from measure import Times, ratio, record, take_turns, terminal
from rich.table import Table

import memcomp
from memcomp import smollm
from memcomp.demo import prompt

PREFILL, CONTEXT, STEPS = 2048, 4096, 8
BARS = {"prefill": 1.1, "decode, growing cache": 1.25, "decode, static cache": 1.25}
OWN = "memcomp"


def last(ids: torch.Tensor) -> torch.Tensor:
    """The last token, with the strides that every later one has: torch compiles once."""
    return torch.tensor([[int(ids[0, -1])]])


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model(ids[:, :PREFILL], use_cache=False, logits_to_keep=1).logits


def growing(model: Any, lm: smollm.SmolLM2, ids: torch.Tensor) -> Callable[[], object]:
    from transformers import DynamicCache

    cache = DynamicCache(config=lm.model.config)
    lm.model(ids, past_key_values=cache, logits_to_keep=1)
    kept = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]

    def steps() -> object:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        token, out = last(ids), []
        for _ in range(STEPS):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            out.append(token)
        return torch.cat(out)

    return steps


def static(model: Any, lm: smollm.SmolLM2, ids: torch.Tensor) -> Callable[[], object]:
    from transformers import StaticCache

    cache = StaticCache(config=lm.model.config, max_cache_len=CONTEXT + STEPS)
    lm.model(ids, past_key_values=cache, cache_position=torch.arange(CONTEXT), logits_to_keep=1)

    def steps() -> object:
        for layer in cache.layers:
            layer.cumulative_length = layer.cumulative_length * 0 + CONTEXT
        token, out = last(ids), []
        for n in range(STEPS):
            token = model(token, past_key_values=cache, cache_position=torch.tensor([CONTEXT + n]),
                          logits_to_keep=1).logits.argmax(-1)
            out.append(token)
        return torch.cat(out)

    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=0)
    args = parser.parse_args()
    console = terminal()
    lm = smollm.load()
    if args.layers:
        lm.model.model.layers = lm.model.model.layers[: args.layers]
        lm.model.config.num_hidden_layers = args.layers
    ids = prompt(lm, CONTEXT)
    assert ids.shape[1] == CONTEXT
    memcomp.reset()
    models = {OWN: torch.compile(lm.model, backend="memcomp", dynamic=True),
              "torch.compile": torch.compile(lm.model, dynamic=True), "eager": lm.model}
    table = Table("", "who", "tokens/s", "spread", "memcomp is faster", "asked")
    results, missed = [], []
    with torch.no_grad():
        for name, make in (("prefill", lambda m: prefill(m, ids)),
                           ("decode, growing cache", lambda m: growing(m, lm, ids)),
                           ("decode, static cache", lambda m: static(m, lm, ids))):
            console.print(f"compiling: {name}")
            calls = {who: make(m) for who, m in models.items()}
            outs = {who: call() for who, call in calls.items()}
            for who, out in outs.items():
                if name != "prefill" and not torch.equal(out, outs["eager"]):
                    missed.append(f"{name}: tokens of {who} differ from eager's")
            times = take_turns(calls, args.rounds, warm=1)
            tokens = PREFILL if name == "prefill" else STEPS
            for who, t in times.items():
                r = ratio(t, times[OWN])
                asked = BARS[name] if who == "torch.compile" else 0.0
                table.add_row(name if who == OWN else "", who, f"{tokens / t.median:.1f}", f"{t.spread:.0%}",
                              "" if who == OWN else str(r), f"{asked}x" if asked else "")
                if asked and r.sure and r.value < asked:
                    missed.append(f"{name}: {r.value:.2f}x {who}, asked {asked}x")
            results.append(row(name, tokens, times))
    console.print(table)
    console.print(f"memcomp: {memcomp.stats()}")
    for line in missed:
        console.print(f"missed: {line}")
    if not args.layers:
        console.print(f"written: {record(__file__, results)}")
    return 1 if missed else 0


def row(name: str, tokens: int, times: dict[str, Times]) -> dict[str, Any]:
    return {"case": name, "tokens": tokens, "times": {w: asdict(t) for w, t in times.items()},
            "ratios": {w: asdict(ratio(t, times[OWN])) for w, t in times.items() if w != OWN}}


if __name__ == "__main__":
    raise SystemExit(main())
