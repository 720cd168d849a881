"""`memcomp cost`: what a program takes on a machine, by the cost model."""

from __future__ import annotations

import argparse

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands
from memcomp.ir.errors import OptionError


def add(commands: Commands) -> None:
    p = commands.add("cost", run, "Operations, traffic and time by the cost model.", (
        "memcomp cost program.mc --size M=65536 --target h100", "memcomp cost memcomp.models.mla:build --json"))
    options.given(p, sizes="extent of an open rank or input; default: its bound, or 1024")
    options.output(p)
    options.as_json(p)
    options.target(p)
    p.add_argument("--traffic", metavar="BYTES",
                   help="bytes to and from memory, where they are known, instead of the model's")


def run(args: argparse.Namespace) -> int:
    from memcomp.config import config
    from memcomp.ir.cost import cost
    from memcomp.ir.target import target
    from memcomp.pipeline import map_program
    from memcomp.sizes import shape_sizes

    settings = config(options.machine(args))
    moved = None if args.traffic is None else _count(args.traffic)
    rows = []
    for p, known in given.regions(args):
        program = map_program(p, config=settings, sizes=known)
        sizes = shape_sizes(p, program, known)
        rows.append((program, sizes, cost(program, sizes, target(settings.target), moved)))
    if args.json:
        from dataclasses import asdict

        return out.write(args, out.dumped([{"name": p.name, "sizes": s, **asdict(c)} for p, s, c in rows]))
    return out.write(args, "\n\n".join(
        f"{p.name} at {given.at(s.items())}\n{c}" for p, s, c in rows))


def _count(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise OptionError(f"--traffic {text!r} is not a number of bytes", hint="e.g. 1.5e9")
    return value
