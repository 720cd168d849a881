"""`memcomp tune`: the parsing of its options; `memcomp.tune.command` does it."""

from __future__ import annotations

import argparse

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands


def add(commands: Commands) -> None:
    p = commands.add("tune", run, "Measure which way to map each program is fastest, and keep it in the cache.", (
        "memcomp tune memcomp.models.mha:build", "memcomp tune program.mc --size M=4096 --mode full"))
    options.given(p, sizes="extent of an open rank or input to measure at; default: a program's bound, or 1024")
    options.output(p)
    options.as_json(p)
    options.target(p)
    options.backend(p)
    p.add_argument("--mode", choices=("quick", "full"), default="quick", help="20 s a program, or ten minutes")
    p.add_argument("--seconds", type=float, help="for each program, instead of the mode's")
    p.add_argument("--workers", type=int, default=0, help="processes that try candidates; default: one a core")
    p.add_argument("--ray", metavar="ADDRESS", default="",
                   help="try candidates on the devices of a Ray cluster: host:port, auto, or local for this machine")
    p.add_argument("--again", action="store_true", help="also what the cache knows")


def run(args: argparse.Namespace) -> int:
    from memcomp.config import config
    from memcomp.tune.command import told, tune

    settings = config({**options.machine(args), "tune": args.mode})
    rows = tune(given.sourced(args), settings, seconds=args.seconds, workers=args.workers, again=args.again,
                ray=args.ray)
    return out.write(args, told(rows, args.json))
