"""How results are written: whole or not at all."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from memcomp.files import put
from memcomp.ir.program import Program


def write(args: argparse.Namespace, text: str) -> int:
    """To stdout, or to the file as a whole: a reader never sees half of it.  Returns 0."""
    if args.output is None:
        print(text)
        return 0
    put(args.output, text + "\n")
    return 0


def dumped(value: Any) -> str:
    """As JSON, which has no words for what is infinite or no number: null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _finite(part) for name, part in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(part) for part in x]
    return None if isinstance(x, float) and not isfinite(x) else x


def programs(args: argparse.Namespace, found: Sequence[Program]) -> int:
    """Programs as text, or as JSON."""
    if args.json:
        rows = [{"name": p.name, "digest": p.digest, "text": str(p)} for p in found]
        return write(args, dumped(rows))
    return write(args, "\n".join(str(p).rstrip() + "\n" for p in found).rstrip())


def table(args: argparse.Namespace, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> int:
    """Rows under their columns, or as JSON."""
    if args.json:
        print(dumped([dict(zip(columns, r, strict=True)) for r in rows]))
        return 0
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    made = Table(*columns, box=None, pad_edge=False)
    for r in rows:
        made.add_row(*r)
    if sys.stdout is not None and sys.stdout.isatty():  # None: it was closed
        Console().print(made)
        return 0
    text = StringIO()  # a line for each row, for grep and its like
    Console(file=text, width=10_000, color_system=None).print(made)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
    return 0
