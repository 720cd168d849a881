"""How results are written: whole or not at all."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from memcomp.files import put
from memcomp.ir.program import Program


def write(args: argparse.Namespace, text: str) -> int:
    """To stdout, or to the file as a whole: a reader never sees half of it.  Returns 0."""
    if args.output is None:
        print(text)
        return 0
    put(args.output, text + "\n")
    return 0


def programs(args: argparse.Namespace, found: Sequence[Program]) -> int:
    """Programs as text, or as JSON."""
    if args.json:
        rows = [{"name": p.name, "digest": p.digest, "text": str(p)} for p in found]
        return write(args, json.dumps(rows, indent=2))
    return write(args, "\n".join(str(p).rstrip() + "\n" for p in found).rstrip())


def table(args: argparse.Namespace, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> int:
    """Rows under their columns, or as JSON."""
    if args.json:
        print(json.dumps([dict(zip(columns, r, strict=True)) for r in rows], indent=2))
        return 0
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    made = Table(*columns, box=None, pad_edge=False)
    for r in rows:
        made.add_row(*r)
    if sys.stdout.isatty():
        Console().print(made)
        return 0
    text = StringIO()  # a line for each row, for grep and its like
    Console(file=text, width=10_000, color_system=None).print(made)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
    return 0
