"""Kernels for GPUs that are not there: every operator below is mapped, emitted and compiled for each machine.

`python benchmarks/gpu_offline.py [--target h100 ...] [--only WORD]` prints a table and writes
benchmarks/results/gpu_offline.json: mapping, warps, stages, registers, stack, shared memory and instructions of each
launch, read from the machine code.  Nothing here runs on a GPU, and no time is measured.

The first ten operators are those of Neptune (PLDI 2026, scripts/neptune_bench/operators.py): fp16 there, bf16 here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memcomp
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.emit import function_names
from memcomp.codegen.triton.offline import compile_text, module
from memcomp.ir.errors import MemcompError
from memcomp.ir.target import target
from memcomp.models.bench import attention as layers
from memcomp.models.bench import decode

RESULTS = Path(__file__).parent / "results" / "gpu_offline.json"
TARGETS = ("a100", "rtx4090", "h100", "b200")
USED = ("HGMMA", "UTCHMMA", "HMMA", "LDGSTS", "STL")


@dataclass(frozen=True, slots=True)
class Operator:
    """fn on tensors that have shapes and no elements."""

    name: str
    fn: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]


def tensors(batch: int, heads: int, kv: int, rows: int, keys: int, dim: int, out: int = 0) -> tuple[Tensor, ...]:
    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    return made(batch, heads, rows, dim), made(batch, kv, keys, dim), made(batch, kv, keys, out or dim)


def vector(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(n, dtype=dtype, device="meta")


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softcap, causal, grouped heads."""
    return layers.attend(_causal(50.0 * torch.tanh(_scores(q, k) / 50.0)), _heads(q, v))


def capped_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = _causal(50.0 * torch.tanh(_scores(q, k) / 50.0))
    at, key = layers.places(q, k)
    return layers.attend(s.masked_fill(key <= at - 4096, -layers.INF), _heads(q, v))


def biased(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi of the last row."""
    key = torch.arange(k.shape[-2], device=k.device)
    return layers.attend(layers.scores(q, k) - slopes[:, None, None] * (k.shape[-2] - 1 - key), v)


def capped_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layers.attend(50.0 * torch.tanh(_scores(q, k) / 50.0), _heads(q, v))


def grouped_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _heads(q: Tensor, x: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return layers.scores(q, _heads(q, k))


def _causal(s: Tensor) -> Tensor:
    rows, keys = s.shape[-2:]
    at, key = torch.arange(rows, device=s.device)[:, None], torch.arange(keys, device=s.device)
    return s.masked_fill(key > at, -layers.INF)


def operators() -> Iterator[Operator]:
    n = 8192

    def one(name: str, fn: Callable[..., Any], heads: int, kv: int, rows: int, dim: int = 128,
            more: tuple[Tensor, ...] = (), keys: int = n, out: int = 0) -> Operator:
        return Operator(name, fn, lambda: (*tensors(1, heads, kv, rows, keys, dim, out), *more))

    yield one("prefill_global", layers.full, 32, 32, n)
    yield one("prefill_causal", layers.causal, 32, 32, n)
    yield one("prefill_alibi", layers.alibi, 32, 32, n, more=(vector(32),))
    yield one("prefill_gqa", grouped_causal, 64, 8, n)
    yield one("prefill_softcap", capped, 32, 16, n)
    yield one("prefill_windowed", capped_window, 32, 8, n)
    yield one("decode_causal", decode.grouped, 32, 32, 1)
    yield one("decode_alibi", biased, 32, 32, 1, more=(vector(32),))
    yield one("decode_gqa", decode.grouped, 64, 8, 1)
    yield one("decode_softcap", capped_decode, 32, 16, 1)
    for dim in (64, 96, 192, 256):
        yield one(f"prefill_global D {dim}", layers.full, 32, 32, n, dim)
        yield one(f"prefill_causal D {dim}", layers.causal, 32, 32, n, dim)
    for dim in (64, 128):
        yield one(f"window 256 D {dim}", layers.windowed, 32, 32, n, dim)
        yield one(f"documents D {dim}", layers.documents, 32, 32, n, dim, (vector(n, torch.int64),))
        yield one(f"prefix D {dim}", layers.prefix, 32, 32, n, dim)
        yield one(f"sigmoid D {dim}", layers.sigmoids, 32, 32, n, dim)
        yield one(f"softmax1 D {dim}", layers.softmax1, 32, 32, n, dim)
    for group in (3, 4, 5, 6, 7, 16):
        yield one(f"decode group {group}", decode.grouped, 8 * group, 8, 1)
    yield one("latent decode 576/512", layers.full, 16, 1, 1, 576, out=512)


def compiled(op: Operator, machine: str) -> dict[str, Any]:
    """What became of an operator for a machine."""
    made = target(machine)
    try:
        with torch.inference_mode():
            told = memcomp.explain(op.fn, *op.inputs(), target=machine)
        if not told.regions:
            return {"refused": "; ".join(r.why for r in told.refusals)}
        region = told.regions[0]
        from memcomp.codegen.lower import lower

        tiles, source = lower(region.program), region.kernels[0].source
        settings = module(source).SETTINGS
        launches = []
        for k, name in zip(tiles.kernels, function_names(tiles), strict=True):
            given = arguments(tiles, k, tuple(len(p.shape) - 1 for p in tiles.params))
            how = settings[name]
            b = compile_text(source, name, given.signature, {}, given.aligned, made.capability, how["num_warps"],
                             how["num_stages"])
            launches.append({"name": name, **how, "tiles": {d.name: d.capacity for d in k.dims}, "shared": b.shared,
                             **asdict(b.resources), "spills": b.spills, "instructions": b.instructions(*USED)})
        return {"launches": launches, "passes left": len(told.regions) > 1}
    except MemcompError as error:
        return {"refused": str(error).splitlines()[0]}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--target", nargs="*", default=TARGETS)
    args.add_argument("--only", default="")
    chosen = args.parse_args()
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for op in operators():
        if chosen.only not in op.name:
            continue
        for machine in chosen.target:
            told = compiled(op, machine)
            found.setdefault(op.name, {})[machine] = told
            for x in told.get("launches", ()):
                held = ", ".join(f"{d} {n}" for d, n in x["tiles"].items())
                used = ", ".join(f"{i} {n}" for i, n in x["instructions"].items() if n)
                print(f"{op.name:24} {machine:8} {x['name']:12} {x['num_warps']} warps, {x['num_stages']} stages, "
                      f"{x['shared']:>7} B, {x['registers']:>3} registers, stack {x['stack']}, {used}; {held}",
                      flush=True)
            if "refused" in told:
                print(f"{op.name:24} {machine:8} REFUSED: {told['refused']}", flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
