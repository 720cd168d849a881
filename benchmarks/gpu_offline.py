"""Kernels for GPUs that are not there: every operator below is mapped, emitted and compiled for each machine.

`python benchmarks/gpu_offline.py [--target h100 ...] [--backend gluon] [--only WORD]` prints a table and writes
benchmarks/results/gpu_offline.json: mapping, warps, stages, registers, stack, shared memory and instructions of each
launch, read from the machine code.  Nothing here runs on a GPU, and no time is measured.  The operators are those that
`memcomp bench --device cuda` times.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memcomp
from memcomp.codegen.binary import Binary
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.emit import function_names
from memcomp.codegen.triton.offline import compile_text, module
from memcomp.ir.errors import MemcompError
from memcomp.ir.target import target
from memcomp.ir.tile import Kernel
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


def compiled(op: Case, machine: str, backend: str = "") -> dict[str, Any]:
    """What became of an operator for a machine, written by a backend (the machine's own)."""
    try:
        with torch.inference_mode():
            told = memcomp.explain(op.fn, *shapes(op), target=machine, backend=backend)
        if not told.regions:
            return {"refused": "; ".join(r.why for r in told.refusals)}
        from memcomp.codegen.lower import lower

        writer = import_module(f"memcomp.codegen.{backend or target(machine).backend}")
        kernel = writer.emit(lower(told.regions[0].program), target(machine))
        settings = module(kernel.source).SETTINGS
        launches = []
        for k, name, b in zip(kernel.program.kernels, function_names(kernel.program), binaries(kernel), strict=True):
            launches.append({"name": name, **settings[name], "tiles": {d.name: d.capacity for d in k.dims},
                             "shared": b.shared, **asdict(b.resources), "spills": b.spills,
                             "instructions": b.instructions(*USED)})
        return {"launches": launches, "passes left": len(told.regions) > 1}
    except MemcompError as error:
        return {"refused": str(error).splitlines()[0]}


def binaries(kernel: Kernel) -> list[Binary]:
    """Machine code of each launch, for tensors laid out as usual."""
    if kernel.backend == "gluon":
        from memcomp.codegen.gluon.build import binaries

        return binaries(kernel)
    tiles, settings = kernel.program, module(kernel.source).SETTINGS
    out = []
    for k, name in zip(tiles.kernels, function_names(tiles), strict=True):
        given = arguments(tiles, k, tuple(len(p.shape) - 1 for p in tiles.params))
        out.append(compile_text(kernel.source, name, given.signature, {}, given.aligned, target(kernel.isa).capability,
                                settings[name]["num_warps"], settings[name]["num_stages"]))
    return out


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--target", nargs="*", default=TARGETS)
    args.add_argument("--backend", default="", choices=("", "triton", "gluon"))
    args.add_argument("--only", default="")
    chosen = args.parse_args()
    for op in operators():
        if chosen.only not in op.name:
            continue
        for machine in chosen.target:
            told = compiled(op, machine, chosen.backend)
            key = f"{machine} {chosen.backend}".strip()
            found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            found.setdefault(op.name, {})[key] = told
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            for x in told.get("launches", ()):
                held = ", ".join(f"{d} {n}" for d, n in x["tiles"].items())
                used = ", ".join(f"{i} {n}" for i, n in x["instructions"].items() if n)
                print(f"{op.name:24} {key:10} {x['name']:12} {x['num_warps']} warps, {x.get('num_stages', 2)} stages, "
                      f"{x['shared']:>7} B, {x['registers']:>3} registers, stack {x['stack']}, {used}; {held}",
                      flush=True)
            if "refused" in told:
                print(f"{op.name:24} {key:10} REFUSED: {told['refused']}", flush=True)


if __name__ == "__main__":
    main()
