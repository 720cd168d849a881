"""`memcomp show`: the programs that are read out of an input."""

from __future__ import annotations

import argparse

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands


def add(commands: Commands) -> None:
    p = commands.add("show", show, "Print the programs that are read out of the input.")
    options.given(p)
    options.output(p)
    options.as_json(p)
    options.target(p)


def show(args: argparse.Namespace) -> int:
    return out.programs(args, given.programs(args))
