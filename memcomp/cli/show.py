"""`memcomp show`: the programs that are read out of an input."""

from __future__ import annotations

import argparse

from memcomp.cli import given, options, out
from memcomp.cli.parser import Commands


def add(commands: Commands) -> None:
    p = commands.add("show", show, "Print the programs that are read out of the input.", (
        "memcomp show memcomp.models.mha:build",
        "memcomp show model.py:attention --input 'q=f32[1,8,P,64]' --input 'k=f32[1,8,M,64]' --input 'v=f32[1,8,M,64]'",
        "memcomp show config.json --arg num_hidden_layers=2"))
    options.given(p)
    options.output(p)
    options.as_json(p)
    options.target(p)


def show(args: argparse.Namespace) -> int:
    return out.programs(args, given.programs(args))
