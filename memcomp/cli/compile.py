"""`memcomp compile`: a model as a directory that runs where no compiler is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcomp.cli import given, options
from memcomp.cli.parser import Commands
from memcomp.inputs import used
from memcomp.ir.program import Program

if TYPE_CHECKING:
    from memcomp.artifact.compile import Made


def add(commands: Commands) -> None:
    p = commands.add("compile", run, "Write a directory that runs the model, or its regions, without a compiler.", (
        "memcomp compile model.py:layer --input 'x=f32[2,S,64]' --dynamic x.S=1:4096 -o layer",
        "memcomp compile model.pt2 --target cpu --target avx2 --strict -o model"))
    options.given(p, sizes="extent of an open input or rank in the example that is compiled with")
    p.add_argument("-o", "--output", dest="directory", metavar="DIR", type=Path, required=True,
                   help="the directory; one that `memcomp compile` wrote is replaced")
    options.as_json(p)
    options.target(p, several=True)
    options.backend(p)
    p.add_argument("--regions", action="store_true",
                   help="the kernels of attention and memory layers alone, to be called from a torch model")
    p.add_argument("--strict", action="store_true",
                   help="refuse a model with operators that would need torch at run time, and list them")


def run(args: argparse.Namespace) -> int:
    from memcomp.artifact import compile as artifact
    from memcomp.artifact.pack import check_directory
    from memcomp.config import config

    check_directory(args.directory)
    configs = [config(m | {"strict": args.strict}) for m in options.machines(args)]
    found = given.whole(args)
    with used(found):
        make = artifact.regions if args.regions else artifact.whole
        made = make(found, configs, name=args.directory.resolve().name)
    digest = artifact.write(made, args.directory)
    told = _told(made, args.directory, digest)
    dims = () if isinstance(found, Program) else found.dims
    asked = {x.name.upper(): x.least for given_dims in dims for x in given_dims.values()}
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    for name, (least, _) in told["sizes"].items():
        if asked.get(name, least) < least:
            print(f"{name} begins at {least}: torch.export takes an extent of 0 or 1 for fixed here", file=sys.stderr)
    for x in told["torch"]:
        print(f"needs torch: {x['operator']} ({x['where']}): {x['why']}", file=sys.stderr)
    print("\n".join(_lines(told)))
    return 0


def _told(made: Made, place: Path, digest: str) -> dict[str, Any]:
    from memcomp.artifact.plan import written

    plan = made.plan
    of = {t.name: t for t in plan.tensors} if plan else {}
    return {
        "directory": str(place), "digest": f"sha256:{digest}",
        "kernels": [{"name": k.name, "where": k.source, "calls": k.calls} for k in made.kernels],
        "targets": sorted({t for k in made.kernels for t in k.compiled}),
        "inputs": [f"{n} {of[n].dtype}[{', '.join(of[n].shape)}]" for n in plan.inputs] if plan else [],
        "outputs": [f"{n} {of[n].dtype}[{', '.join(of[n].shape)}]" for n in plan.outputs] if plan else [],
        "states": [f"{t.name} {t.dtype}[{', '.join(t.shape)}]" for t in of.values() if t.kind == "state"],
        "writes": sorted(written(plan)) if plan else [],
        "sizes": {s.name: [s.least, s.most] for s in plan.sizes} if plan else {},
        "steps": len(plan.steps) if plan else 0,
        "weights": {"tensors": len(made.weights), "bytes": sum(t.nbytes for t in made.weights.values())},
        "arena": {"bytes": plan.arena, "at": dict(plan.example)} if plan else {},
        "torch": [{"operator": op, "where": where, "why": why} for op, where, why in dict.fromkeys(made.torch)],
    }


def _lines(told: dict[str, Any]) -> list[str]:
    from memcomp.report import size_of

    lines = [f"wrote    {told['directory']}", f"targets  {', '.join(told['targets'])}"]
    lines += [f"input    {x}" for x in told["inputs"]] + [f"output   {x}" for x in told["outputs"]]
    lines += [f"state    {x}" for x in told["states"]] + [f"writes   {x}" for x in told["writes"]]
    lines += [f"size     {n}: {least} to {most or 'any'}" for n, (least, most) in told["sizes"].items()]
    if not told["steps"]:
        lines += [f"kernel   {k['name']}: {k['where']}" + (f" and {k['calls'] - 1} more" if k["calls"] > 1 else "")
                  for k in told["kernels"]]
    else:
        at = ", ".join(f"{n}={x}" for n, x in told["arena"]["at"].items())
        lines += [f"steps    {told['steps']}, {len(told['kernels'])} kernels",
                  f"weights  {told['weights']['tensors']}, {size_of(told['weights']['bytes'])}",
                  f"arena    {size_of(told['arena']['bytes'])}" + (f" at {at}" if at else "")]
    return [*lines, f"digest   {told['digest']}"]
