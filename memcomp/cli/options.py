"""Options that several commands share; each function adds one, or one group, to a command's parser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memcomp.inputs import FORMS
from memcomp.signature import Asked, asked


def given(p: argparse.ArgumentParser, *, sizes: str = "") -> None:
    """What is to be read: `args.input` and what is said of it, for `cli.given`.

    sizes: what --size is for, where the command has it.
    """
    group = p.add_argument_group("what is read")
    group.add_argument("input", metavar="INPUT", help=FORMS)
    group.add_argument("--input", dest="inputs", metavar="NAME=DTYPE[SHAPE]", action="append", default=[],
                       help="an input of the function, e.g. 'x=bf16[2,S,64]'; a name leaves that extent open")
    group.add_argument("--dynamic", metavar="NAME.DIM=MIN:MAX", action="append", default=[],
                       help="leave an extent open, by its number or name: x.1=16:4096")
    group.add_argument("--arg", dest="arguments", metavar="NAME=VALUE", action="append", default=[],
                       help="an argument of the factory, or a field of the config")
    if sizes:
        group.add_argument("--size", metavar="NAME=N", action="append", default=[], help=sizes)


def output(p: argparse.ArgumentParser) -> None:
    """Where the result goes; `out.write` obeys it."""
    p.add_argument("-o", "--output", metavar="FILE", type=Path, help="write here, whole or not at all, not to stdout")


def as_json(p: argparse.ArgumentParser) -> None:
    """`args.json`."""
    p.add_argument("--json", action="store_true", help="print JSON")


def target(p: argparse.ArgumentParser, *, several: bool = False) -> None:
    """`args.target`, to be read through `machine`, or where there may be several through `machines`."""
    text = "the machine, a name of `memcomp targets`; default: $MEMCOMP_TARGET, else cpu"
    if several:
        p.add_argument("--target", metavar="NAME", action="append", help=f"{text}; may be repeated")
    else:
        p.add_argument("--target", metavar="NAME", help=text)


def backend(p: argparse.ArgumentParser) -> None:
    """`args.backend`, to be read through `machine`."""
    p.add_argument("--backend", metavar="NAME", help="who writes the kernels; default: the target's own")


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Options of a compilation that the command line names; what it does not name the environment may."""
    named = {"target": args.target, "backend": getattr(args, "backend", None)}
    return {name: value for name, value in named.items() if value is not None}


def machines(args: argparse.Namespace) -> list[dict[str, Any]]:
    """As `machine`, for each target of a command that takes several, each once."""
    from memcomp.config import config

    rest = {} if args.backend is None else {"backend": args.backend}
    found = [{"target": name} | rest for name in dict.fromkeys(args.target or ())] or [rest]
    for one in found:
        config(one)  # a wrong one is said before the work for the others
    return found


def ask(args: argparse.Namespace) -> Asked:
    """What is said of inputs.  Raises OptionError."""
    return asked(args.inputs, args.dynamic, getattr(args, "size", ()), args.arguments)

