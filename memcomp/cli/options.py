"""Options that several commands share; each function adds one, or one group, to a command's parser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memcomp.inputs import FORMS


def given(p: argparse.ArgumentParser) -> None:
    """What is to be read."""
    p.add_argument("input", help=FORMS)


def output(p: argparse.ArgumentParser) -> None:
    """Where the result goes; `out.write` obeys it."""
    p.add_argument("-o", "--output", type=Path, help="write here instead of stdout")


def as_json(p: argparse.ArgumentParser) -> None:
    """`args.json`."""
    p.add_argument("--json", action="store_true", help="print JSON")


def target(p: argparse.ArgumentParser) -> None:
    """`args.target`, to be read through `machine`."""
    p.add_argument("--target", default="cpu", help="a name of `memcomp targets`")


def backend(p: argparse.ArgumentParser) -> None:
    """`args.backend`, to be read through `machine`."""
    p.add_argument("--backend", default="", help="who writes the kernels; default: the target's own")


def sizes(p: argparse.ArgumentParser) -> None:
    """`args.size`, to be read through `extents`."""
    p.add_argument("--size", metavar="RANK=N", action="append", default=[], help="extent of a symbolic rank")


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Options of a compilation that the command line names; what it does not name the environment may."""
    named = {"target": args.target, "backend": getattr(args, "backend", "")}
    return {name: value for name, value in named.items() if value}


def extents(args: argparse.Namespace) -> dict[str, int]:
    """What --size says.  Raises OptionError."""
    return dict(_assignment(s) for s in args.size)


def _assignment(text: str) -> tuple[str, int]:
    from memcomp.ir.errors import OptionError

    name, _, value = text.partition("=")
    if not name or not (value.isascii() and value.isdigit() and len(value) < 19):
        raise OptionError(f"--size {text!r} is not RANK=N", hint="e.g. --size M=4096")
    return name, int(value)
