"""`memcomp opt`: the programs as they are rewritten, at any station."""

from __future__ import annotations

import argparse
import sys

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands
from memcomp.ir.errors import OptionError, nearest


def add(commands: Commands) -> None:
    p = commands.add("opt", opt, "Print the rewritten programs.", (
        "memcomp opt memcomp.models.mha:build", "memcomp opt program.mc --dump-after reduce_passes"))
    options.given(p)
    options.output(p)
    options.as_json(p)
    options.target(p)
    p.add_argument("--dump-after", metavar="STATION", action="append", default=[],
                   help="also print after this station (repeatable; `all`), to stderr")


def opt(args: argparse.Namespace) -> int:
    from memcomp.config import config
    from memcomp.pipeline import compile_program
    from memcomp.stations import STATIONS, text_of

    wanted = set(args.dump_after)
    if unknown := wanted - {*STATIONS, "all"}:
        raise OptionError(f"unknown station {min(unknown)!r}", hint=nearest(min(unknown), STATIONS))

    def observe(station: str, value: object) -> None:
        if wanted & {station, "all"}:
            print(f"# after {station}\n{text_of(value)}", file=sys.stderr)

    settings = config(options.machine(args))
    return out.programs(args, [compile_program(p, config=settings, sizes=known, observe=observe).program
                               for p, known in given.regions(args)])
