"""`memcomp emit`: the kernels' source, and their machine code for a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands
from memcomp.ir.errors import OptionError

if TYPE_CHECKING:
    from memcomp.ir.tile import Kernel


def add(commands: Commands) -> None:
    p = commands.add("emit", run, "Print the kernels' source.", (
        "memcomp emit memcomp.models.mha:build", "memcomp emit program.mc --target h100 --backend cuda",
        "memcomp emit program.mc --target a100 --target h100 --cubin kernels"))
    options.given(p)
    options.output(p)
    options.as_json(p)
    options.target(p, several=True)
    options.backend(p)
    p.add_argument("--cubin", metavar="FOLDER", type=Path,
                   help="also write machine code for the target's GPU there, to be launched without a compiler")


def run(args: argparse.Namespace) -> int:
    from memcomp.backends import device_of
    from memcomp.config import config
    from memcomp.pipeline import compile_program

    machines = [config(one) for one in options.machines(args)]
    for settings in machines:
        if args.cubin is not None and device_of(settings) != "cuda":
            raise OptionError(f"--cubin writes code for GPUs, and {settings.target} is none", hint="e.g. --target h100")
    read = given.regions(args)
    rows: list[tuple[str, Kernel]] = []
    for settings in machines:
        kernels = (compile_program(p, config=settings, sizes=known).kernel for p, known in read)
        distinct = {k.source: k for k in kernels}.values()
        if args.cubin is not None:
            _save(args.cubin / settings.target if len(machines) > 1 else args.cubin, distinct)
        rows += [(settings.target, k) for k in distinct]
    if args.json:
        return out.write(args, json.dumps([{"name": k.name, "target": name, "backend": k.backend, "entry": k.entry,
                                            "source": k.source} for name, k in rows], indent=2))
    return out.write(args, "\n".join(k.source.rstrip() + "\n" for _, k in rows).rstrip())


def _save(folder: Path, kernels: Iterable[Kernel]) -> None:
    """A file for each kernel, of its name; numbered where several have the same."""
    from memcomp.artifact.files import ENDING, save, saved

    names: list[str] = []
    for k in kernels:
        names.append(k.name)
        number = f"_{names.count(k.name)}" if names.count(k.name) > 1 else ""
        place = folder / f"{k.name}{number}{ENDING}"
        save(saved(k), place)
        print(f"wrote {place}", file=sys.stderr)
