"""What the scripts of this folder share: a console, a file of results, a command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memcomp.bench.measure import Ratio, Times, machine, ratio, take_turns

__all__ = ["RESULTS", "Ratio", "Times", "machine", "ratio", "record", "table_of", "take_turns", "terminal"]
RESULTS = Path(__file__).parent / "results"


def terminal() -> Console:
    """A console wide enough for the tables where the output is a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def record(script: str, results: list[dict[str, Any]]) -> Path:
    """Write results/<script>.json beside this file, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{Path(script).stem}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    part.replace(path)
    return path


def table_of(doc: str, script: str, cases: Mapping[str, Callable[[int], dict[str, Any]]], columns: Sequence[str],
             rows: Callable[[dict[str, Any]], Iterable[Sequence[str]]]) -> tuple[Console, list[dict[str, Any]]]:
    """The command line that benchmarks share, `[--rounds N] [--only WORD]`: a table and, where every case was measured,
    a file of results.  cases: name -> result, from the rounds; rows: the lines of a result in the table."""
    import torch

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    args = parser.parse_args()
    console, table = terminal(), Table(*columns)
    results: list[dict[str, Any]] = []
    with torch.inference_mode(), console.status("measuring"):
        for name, measure in cases.items():
            if args.only not in name:
                continue
            results.append(measure(args.rounds))
            for row in rows(results[-1]):
                table.add_row(*row)
            if not console.is_terminal:
                console.print(f"measured: {name}")
    console.print(table)
    if not args.only:
        console.print(f"written: {record(script, results)}")
    return console, results
