"""What it costs to run a long rank of a running state whole, or in tiles that each make the other states anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from memcomp.ir.cascade import extent_of
from memcomp.ir.cost import cost, tile_bytes
from memcomp.ir.expr import Const
from memcomp.ir.program import Program
from memcomp.ir.target import Target
from memcomp.passes._roles import carried
from memcomp.passes.partition import tiles_of


@dataclass(frozen=True, slots=True)
class Way:
    """size: of a tile, of which there are `tiles`; held: bytes of the state's tile; again: operations made anew;
    moved: bytes to and from memory; seconds: all by the cost model."""

    size: int
    tiles: int
    held: float
    again: float
    moved: float
    seconds: float

    def text(self, state: str, size_of: Callable[[float], str]) -> str:
        where = "whole" if self.tiles == 1 else f"in {self.tiles} tiles of {self.size}"
        more = f"{self.again:.3g} operations made again, " if self.again else ""
        return (f"{where}, {size_of(self.held)} of {state} a task, {more}{size_of(self.moved)} moved, "
                f"{self.seconds * 1e3:.3g} ms by the model")


@dataclass(frozen=True, slots=True)
class Wide:
    """A rank of the running state `state`: the way that was taken, and the fastest other one."""

    rank: str
    state: str
    taken: Way
    other: Way

    def line(self, size_of: Callable[[float], str]) -> str:
        return f"{self.rank} {self.taken.text(self.state, size_of)}; or {self.other.text(self.state, size_of)}"


def wide(program: Program, sizes: Mapping[str, int], target: Target) -> tuple[Wide, ...]:
    """Every cut rank of a closed program whose tiles would make something, or make it, more than once."""
    out = []
    states = carried(program.cascade)
    for k, g in enumerate(program.mapping.groups):
        for at, (rank, size) in enumerate(g.partition):
            extent = extent_of(program.cascade, rank)
            if extent is None or not isinstance(size, Const) or not isinstance(size.value, int):
                continue
            held = {t: n for t, n in tile_bytes(program, g, sizes).items()
                    if t in states and rank in program.cascade.tensor(t).ranks}
            if not held:
                continue
            state = max(held, key=lambda t: held[t])
            ways = []
            for n in dict.fromkeys((min(size.value, extent), *tiles_of(extent, target.lanes))):
                parts = (*g.partition[:at], (rank, Const(n)), *g.partition[at + 1:])
                groups = list(program.mapping.groups)
                groups[k] = replace(g, partition=parts)
                other = replace(program, mapping=replace(program.mapping, groups=tuple(groups)))
                spent = cost(other, sizes, target)
                ways.append(Way(n, -(-extent // n), tile_bytes(other, groups[k], sizes)[state], spent.again,
                                spent.traffic, spent.seconds))
            if any(w.again for w in ways):
                out.append(Wide(rank, state, ways[0], min(ways[1:], key=lambda w: (w.seconds, w.again))))
    return tuple(out)
