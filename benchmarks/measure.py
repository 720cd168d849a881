"""Measuring rivals on a shared machine: turn by turn in one process, medians, and no claim where they do not settle."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
WIDE = 0.15  # the ratio of medians and the ratio of minima may differ by this much, the quartiles by twice it


@dataclass(frozen=True)
class Times:
    """Seconds a call over all rounds."""

    median: float
    least: float
    spread: float  # distance of the quartiles over the median

    @staticmethod
    def of(seconds: list[float]) -> Times:
        low, middle, high = statistics.quantiles(seconds, n=4)
        return Times(middle, min(seconds), (high - low) / middle)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a peer; `sure`: medians and minima agree and both are steady."""

    value: float
    sure: bool

    def __str__(self) -> str:
        return f"{self.value:.2f}x" if self.sure else "not claimed: too unsteady"


def take_turns(rivals: Mapping[str, Callable[[], object]], rounds: int = 31, warm: int = 3) -> dict[str, Times]:
    """Each rival once a round, in turn, so that a busy machine is busy for all of them."""
    for _ in range(warm):
        for call in rivals.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: Times.of(seconds) for name, seconds in taken.items()}


def ratio(peer: Times, own: Times) -> Ratio:
    """peer / own: above 1 is faster than the peer."""
    medians, minima = peer.median / own.median, peer.least / own.least
    steady = max(peer.spread, own.spread) <= 2 * WIDE and abs(medians / minima - 1) <= WIDE
    return Ratio(medians, steady)


def terminal() -> Console:
    """A console wide enough for the tables where the output is a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def machine() -> dict[str, Any]:
    """What a figure depends on: features and sizes, never a name."""
    import torch

    from memcomp.ir.detect import cpu

    facts = asdict(cpu())
    return {
        **facts, "architecture": platform.machine(), "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "apache-tvm", "numpy", "memcomp")} | {
            "python": platform.python_version()},
    }


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
