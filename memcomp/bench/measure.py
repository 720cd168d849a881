"""Measuring rivals on a shared machine: turn by turn in one process, medians, and no claim where they do not settle."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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

    def each(self, count: float) -> Times:
        """Of one of the `count` things that a call does."""
        return Times(self.median / count, self.least / count, self.spread)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a peer; `sure`: medians and minima agree and both are steady."""

    value: float
    sure: bool

    def __str__(self) -> str:
        return f"{self.value:.2f}x" if self.sure else "not claimed: too unsteady"


def by_clock(call: Callable[[], object]) -> float:
    """Seconds of a call, by this machine's clock."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def take_turns(rivals: Mapping[str, Callable[[], object]], rounds: int = 31, warm: int = 3,
               clock: Callable[[Callable[[], object]], float] = by_clock) -> dict[str, Times]:
    """Each rival once a round, in turn, so that a busy machine is busy for all of them."""
    for _ in range(warm):
        for call in rivals.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            taken[name].append(clock(call))
    return {name: Times.of(seconds) for name, seconds in taken.items()}


def ratio(peer: Times, own: Times) -> Ratio:
    """peer / own: above 1 is faster than the peer."""
    medians, minima = peer.median / own.median, peer.least / own.least
    steady = max(peer.spread, own.spread) <= 2 * WIDE and abs(medians / minima - 1) <= WIDE
    return Ratio(medians, steady)


def machine() -> dict[str, Any]:
    """What a figure depends on: features and sizes, never a name."""
    import torch

    from memcomp.ir.detect import cpu

    facts = asdict(cpu())
    return {**facts, "architecture": platform.machine(), "threads": torch.get_num_threads(),
            "versions": versions("torch", "apache-tvm", "numpy")}


def versions(*packages: str) -> dict[str, str]:
    """Of memcomp, Python and these packages, those that are installed."""
    import memcomp

    found = {"memcomp": memcomp.__version__, "python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
