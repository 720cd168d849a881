"""What the command line names, read: a program, a function with its inputs, or the programs of its regions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from memcomp.inputs import Function, read, used
from memcomp.ir.errors import InputError
from memcomp.ir.program import Program


def whole(args: argparse.Namespace) -> Program | Function:
    """The input as it is.  Raises InputError."""
    return read(args.input)


def programs(args: argparse.Namespace) -> list[Program]:
    """The program given, or those of the regions of the function given, each distinct one once."""
    return [p for p, _ in regions(args)]


def regions(args: argparse.Namespace) -> list[tuple[Program, Mapping[str, int]]]:
    """As `programs`, with the extents of symbolic ranks as far as they are known."""
    found = whole(args)
    if isinstance(found, Program):
        return [(found, {})]
    from memcomp.cli.options import machine
    from memcomp.config import config
    from memcomp.report import explain

    config(machine(args))
    with used(found):  # what is read is the same for every machine, and not every one can be compiled for here
        explained = explain(found.fn, *found.inputs, target="cpu")
    for r in explained.refusals:
        print(f"left to torch: {r.where}: {r.why}", file=sys.stderr)
    if not explained.regions:
        raise InputError(f"nothing in {args.input} is an attention or memory layer that memcomp can express",
                         hint="`memcomp explain` says what was left to torch and why")
    return list({r.read.digest: (r.read, r.known) for r in explained.regions}.values())
