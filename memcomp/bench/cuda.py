"""The machine that GPU kernels are timed on: clock, graphs, what it reaches; and this one in its place to rehearse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from memcomp.bench.measure import Times, by_clock, take_turns
from memcomp.ir.errors import OptionError
from memcomp.ir.target import target, targets

LEAST = 1e-3       # seconds of what is timed at once: far above the resolution of events
MOST = 100         # calls for that, of each buffer
SIDE = 8192        # of the matrices whose product is the machine's rate
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the machine reaches.  operation: seconds of one operation of torch.mm on bf16 (a multiply-add is two);
    byte: seconds of a byte read or written by a copy.  launch: seconds of a kernel that does next to nothing."""

    operation: Times
    byte: Times
    launch: Times


@dataclass(frozen=True, slots=True)
class Loop:
    """run: makes so many `calls`; why: the reason for which they are no CUDA graph, "" where they are."""

    run: Call
    calls: int
    why: str = ""


class Machine(Protocol):
    """place: torch's name of the device.  options: how memcomp compiles for it, besides the target."""

    place: str
    options: dict[str, Any]

    def facts(self) -> dict[str, Any]: ...
    def clock(self, call: Call) -> float: ...
    def loop(self, calls: Sequence[Call]) -> Loop: ...
    def held(self, call: Call) -> int: ...
    def wait(self) -> None: ...
    def peaks(self) -> Peaks: ...


class Gpu:
    """torch's current CUDA device.  OptionError where there is none."""

    place = "cuda"
    options: dict[str, Any] = {}

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise OptionError("torch finds no GPU here", hint="--interpret rehearses on this machine")

    def facts(self) -> dict[str, Any]:
        """Bytes of memory and of L2, multiprocessors, compute capability (90 for 9.0)."""
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {"name": found.name, "capability": 10 * found.major + found.minor, "memory": found.total_memory,
                "processors": found.multi_processor_count, "l2": found.L2_cache_size, "cuda": torch.version.cuda}

    def clock(self, call: Call) -> float:
        """Seconds between two events around a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def loop(self, calls: Sequence[Call]) -> Loop:
        """The calls one after another, again and again for about `LEAST` seconds, as one CUDA graph."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        once = self.clock(lambda: [call() for call in calls])
        times = max(1, min(MOST, math.ceil(LEAST / max(once, 1e-6))))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(times):
                    for call in calls:
                        call()
        except Exception as error:  # any that a call makes: it is then timed launch by launch, and the result says so
            torch.cuda.synchronize()
            return Loop(lambda: [call() for _ in range(times) for call in calls], times * len(calls),
                        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        return Loop(graph.replay, times * len(calls))

    def held(self, call: Call) -> int:
        """Bytes that a call takes at its worst moment, besides its inputs and what it returns."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        kept = sum(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return max(0, torch.cuda.max_memory_allocated() - before - kept)

    def wait(self) -> None:
        """Until all is done.  Raises where the device is lost: an address that is none spoils the whole process."""
        torch.cuda.synchronize()

    def peaks(self) -> Peaks:
        """By a product of matrices of `SIDE` rows and columns, and by a copy of a GiB (or what the memory allows)."""
        size = min(1 << 30, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // 16)
        return _peaks(self, SIDE, size)


class Rehearsal:
    """The same on this machine's processor: everything runs, nothing that is measured says anything of a GPU."""

    place = "cpu"
    options: dict[str, Any] = {"interpret": True}

    def facts(self) -> dict[str, Any]:
        return {"name": "rehearsal", "capability": 90, "memory": 0, "processors": 0, "l2": 6000, "cuda": ""}

    def clock(self, call: Call) -> float:
        return by_clock(call)

    def loop(self, calls: Sequence[Call]) -> Loop:
        return Loop(lambda: [call() for call in calls], len(calls), "no GPU")

    def held(self, call: Call) -> int:
        call()
        return 0

    def wait(self) -> None:
        pass

    def peaks(self) -> Peaks:
        return _peaks(self, 64, 1 << 16)


def _peaks(machine: Machine, side: int, size: int) -> Peaks:
    a, b = torch.randn(2, side, side, device=machine.place).to(torch.bfloat16).unbind()
    source = torch.ones(size // 4, dtype=torch.int32, device=machine.place)
    there = torch.empty_like(source)
    one = torch.ones(1, device=machine.place)
    loops = [machine.loop([f]) for f in (lambda: torch.mm(a, b), lambda: there.copy_(source), lambda: one.add_(1))]
    times = take_turns({str(n): x.run for n, x in enumerate(loops)}, clock=machine.clock)
    product, copy, launch = (times[str(n)].each(x.calls) for n, x in enumerate(loops))
    return Peaks(product.each(2.0 * side**3), copy.each(2.0 * size), launch)


def copies(size: int, l2: int) -> int:
    """How many sets of inputs of `size` bytes are more than the second-level cache holds: twice as much, at most 32."""
    return max(1, min(32, math.ceil(2 * l2 / max(size, 1))))


def target_of(facts: dict[str, Any]) -> str:
    """The machine of `memcomp targets` that a device is: of its compute capability, the one nearest in memory.
    OptionError where there is none: what a block may hold, and which instructions there are, differ from each to the
    next.
    """
    known = [t for t in map(target, targets()) if t.has("cuda") and t.capability == facts["capability"]]
    if not known:
        raise OptionError(f"no target has compute capability {facts['capability'] / 10}",
                          f"the device is {facts['name']}", "--target names the machine to compile for")
    return min(known, key=lambda t: abs(t.memory.bytes - facts["memory"])).name
