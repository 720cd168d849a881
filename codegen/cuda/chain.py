"""Several kernels in one launch: blocks that are all there at one time walk the tasks of each kernel, and meet between.

A small kernel takes less time than its launch.  Blocks that wait for one another must all run, so the launch is a
cooperative one, of no more blocks than the device holds (`Launch.together`); what passes from kernel to kernel stays in
global memory, which for so little is the second level cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from memcomp.codegen.cuda.memory import declared
from memcomp.codegen.cuda.spread import FILE, MOST, SPARE
from memcomp.codegen.launches import Argument, Launch, distinct, value
from memcomp.ir.expr import call
from memcomp.ir.target import Target

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer

ROUNDS = 2      # of tasks that blocks may take in turns: beyond, the hardware hands them out better
BLOCKS = 16     # that a processor holds at least, whatever they take
SYSTEM = 1024   # bytes of shared memory that a block takes besides its own

WORDS = r'''
// What all blocks of a launch have written before, each reads after.  The counter is the driver's, one for each
// cooperative launch, where cooperative groups have theirs (cooperative_groups/details/driver_abi.h).  Bit 31 flips
// when the last block has come, and the rest is 0 again: nobody sets it back.
#ifndef ON_HOST
INLINE unsigned *counter() {
  unsigned high, low;
  asm("mov.u32 %0, %%envreg1;" : "=r"(high));
  asm("mov.u32 %0, %%envreg2;" : "=r"(low));
  return (unsigned *)((unsigned long long)high << 32 | low) + 1;
}
INLINE unsigned arrive(unsigned *at, unsigned n) {
  unsigned before;
  asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(n) : "memory");
  return before;
}
INLINE unsigned look(unsigned *at) {
  unsigned now;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
  return now;
}
#endif
INLINE void all_meet() {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned *at = counter();
    const unsigned before = arrive(at, blockIdx.x ? 1 : 0x80000000u - (gridDim.x - 1));
    while (((before ^ look(at)) & 0x80000000u) == 0) {}
  }
  __syncthreads();
}
'''


@dataclass(frozen=True, slots=True)
class Within:
    """The launch that a kernel is a part of.  args: of all its kernels; threads: of a block."""

    args: tuple[Argument, ...]
    threads: int

    @staticmethod
    def of(ws: Sequence[Writer]) -> Within:
        return Within(distinct(a for w in ws for a in w.args), max(w.threads for w in ws))


@dataclass(frozen=True, slots=True)
class Chain:
    """Text and launch of several kernels, each written for a launch of all."""

    text: str
    launch: Launch

    @staticmethod
    def of(name: str, ws: Sequence[Writer]) -> Chain:
        within = ws[0].within
        assert within is not None
        lines = [f"  SHARED({ws[0].rooms}, {most});"] if (most := max(w.room for w in ws)) else []
        for n, w in enumerate(ws):
            lines += ["  all_meet();"] * bool(n)
            lines += [f"  {{   // {w.k.name}", *w.lines, "  }"]
        kinds = declared(ws[0].params, [w.k for w in ws])
        args = ws[0].declaration(within.args, kinds)
        text = (f'extern "C" __global__ void __launch_bounds__({within.threads}, 1) {name}({args}) {{\n'
                + "\n".join(lines) + "\n}\n")
        grid = reduce(lambda a, b: call("max", a, b), (w.launch.grid[0] for w in ws))
        return Chain(text, Launch(name, (grid,), within.threads, max(w.steps.shared for w in ws), within.args,
                                  together=True))


def options(ws: Sequence[Writer], machine: Target) -> dict[str, tuple[int, ...]]:
    """How many kernels each launch does, by words: "" one each, then some in a row in one launch, the most first, as
    far as a block has the registers and the shared memory."""
    return {"": ()} | {words: runs for words, runs, _ in _chains(ws, machine)}


def preferred(ws: Sequence[Writer], machine: Target, sizes: Mapping[str, int]) -> str:
    """Of `options`, what saves most launches of kernels with few tasks: all in a round or two of the blocks that are
    there at one time, and in no more rounds than in launches of their own.  Which blocks these are is an estimate, and
    nothing was measured."""
    for words, _, some in _chains(ws, machine):
        held = _held(some, machine)
        if all(0 < _rounds(w, held, sizes) <= min(ROUNDS, _rounds(w, _held([w], machine), sizes)) for w in some):
            return words
    return ""


def _chains(ws: Sequence[Writer], machine: Target) -> Iterator[tuple[str, tuple[int, ...], Sequence[Writer]]]:
    for many in range(len(ws), 1, -1):
        for first in range(len(ws) - many + 1):
            some = ws[first:first + many]
            if _fit(some, machine):
                runs = (*(1,) * first, many, *(1,) * (len(ws) - first - many))
                yield f"kernels {first} to {first + many - 1} in one launch", runs, some


def _fit(ws: Sequence[Writer], machine: Target) -> bool:
    most = min(MOST, FILE // max(w.threads for w in ws))
    return max(w.pressure for w in ws) <= most - SPARE and _shared(ws) <= machine.level("smem").bytes


def _shared(ws: Sequence[Writer]) -> int:
    return max(w.room for w in ws) + max(w.steps.shared for w in ws)


def _held(ws: Sequence[Writer], machine: Target) -> int:
    """Blocks that a machine holds at one time, by estimate."""
    threads = max(w.threads for w in ws)
    registers = min(MOST, FILE // threads, 8 * math.ceil((max(w.pressure for w in ws) + SPARE) / 8))
    each = min(BLOCKS, FILE // (threads * registers), (machine.level("smem").bytes + SYSTEM) // (_shared(ws) + SYSTEM))
    return machine.threads * max(1, each)


def _rounds(w: Writer, held: int, sizes: Mapping[str, int]) -> float:
    """In which so many blocks do all tasks of a kernel; infinity where sizes do not tell."""
    try:
        return math.ceil(value(w.launch.grid[0], sizes) / held)
    except LookupError:
        return math.inf
