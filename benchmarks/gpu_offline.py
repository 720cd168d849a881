"""Kernels for GPUs that are not there: every operator below is mapped, emitted and compiled for each machine.

`python benchmarks/gpu_offline.py [--target h100 ...] [--only WORD]` prints a table and writes
benchmarks/results/gpu_offline.json: mapping, warps, stages, registers, stack, shared memory and instructions of each
launch, read from the machine code.  Nothing here runs on a GPU, and no time is measured.  The operators are those that
`memcomp bench --device cuda` times.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
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
from memcomp.models.bench import Case, cases

RESULTS = Path(__file__).parent / "results" / "gpu_offline.json"
TARGETS = ("a100", "rtx4090", "h100", "b200")
USED = ("HGMMA", "UTCHMMA", "HMMA", "LDGSTS", "UTMALDG", "UTMASTG", "USETMAXREG", "STL")


def operators() -> tuple[Case, ...]:
    return cases("cuda")


def shapes(op: Case) -> tuple[Tensor, ...]:
    """Its arguments, without elements."""
    with torch.device("meta"):
        return op.inputs()


def compiled(op: Case, machine: str) -> dict[str, Any]:
    """What became of an operator for a machine."""
    made = target(machine)
    try:
        with torch.inference_mode():
            told = memcomp.explain(op.fn, *shapes(op), target=machine)
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
