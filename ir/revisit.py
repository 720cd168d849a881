"""What must live between passes, and what it costs to keep it, to move it or to make it again.

A tensor that is read in several passes over a rank needs its whole fiber there (FuseMax section 3): *buffer* holds it
near, *spill* reads it from memory in every pass, *recompute* makes it anew from what is still there.  A loop can run
outside the passes over every rank for which no statement waits (queries, heads); the rest of a fiber is live at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.counts import Sizes, operations, tensor_of, width
from memcomp.ir.program import Program
from memcomp.ir.target import Target
from memcomp.ir.traversal import Traversal, traversals


@dataclass(frozen=True, slots=True)
class Way:
    """What one of the three ways costs beyond a single pass.  bytes: moved to and from memory; flops and special:
    operations done again; level: where the data lies meanwhile, "" where it lies nowhere; seconds: on the target, the
    largest of its parts, inf where the data does not fit."""

    bytes: float
    flops: float
    special: float
    level: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Revisit:
    """A tensor read in several passes over a rank.

    reads:     those passes.  footprint: bytes live at once for each of `tasks` independent ones.
    recompute: None for an argument, which can only be read again.
    """

    tensor: str
    rank: str
    reads: tuple[int, ...]
    footprint: float
    tasks: float
    buffer: Way
    spill: Way
    recompute: Way | None

    @property
    def best(self) -> str:
        """The name of the cheapest way in seconds; of equals the first."""
        ways = {"buffer": self.buffer, "spill": self.spill}
        if self.recompute is not None:
            ways["recompute"] = self.recompute
        return min(ways, key=lambda w: ways[w].seconds)


@dataclass(frozen=True, slots=True)
class Live:
    """What must be kept of a tensor along a rank at the least: elements of one fiber, and bytes of all that is live
    with it for one task."""

    tensor: str
    rank: str
    elements: int
    footprint: float


def live(program: Program, sizes: Mapping[str, int], found: tuple[Traversal, ...] | None = None) -> tuple[Live, ...]:
    """The live footprint of every fiber at these extents: one element where all reads are in one pass, else all."""
    n = Sizes(program.cascade, sizes)
    found = traversals(program) if found is None else found
    waits = _waiting(found)
    return tuple(Live(t.tensor, t.rank, n(t.rank) if t.live == "fiber" else 1, _footprint(program.cascade, n, t, waits))
                 for t in found)


def revisits(program: Program, sizes: Mapping[str, int], target: Target,
             found: tuple[Traversal, ...] | None = None) -> tuple[Revisit, ...]:
    """Every tensor that is read in more than one pass over a whole fiber, with the cost of the three ways.

    sizes: extents of the symbolic ranks; found: the traversals of the program where they are known.
    """
    c, n = program.cascade, Sizes(program.cascade, sizes)
    found = traversals(program) if found is None else found
    waits, walked = _waiting(found), {(t.tensor, t.rank) for t in found}
    out = []
    for t in found:
        if t.live != "fiber" or t.rank != t.of:
            continue
        footprint = _footprint(c, n, t, waits)
        total = float(n.elements(tensor_of(c, t.tensor)) * width(c, t.tensor))
        temporary = c.temporary(t.tensor)
        again = len(t.reads) - 1
        recompute = None
        if temporary:
            flops, special, read = (again * x for x in _made_again(c, n, t.tensor, t.rank, walked))
            recompute = _way(target, read, flops, special, "")
        level = next((x for x in target.levels[:-1] if x.bytes >= footprint), None)
        near = Way(0.0, 0.0, 0.0, level.name, again * total / level.bandwidth) if level else \
            Way(0.0, 0.0, 0.0, "", math.inf)
        moved = total * (len(t.reads) + 1 if temporary else again)  # a temporary is written too
        spill = _way(target, moved, 0.0, 0.0, target.memory.name)
        out.append(Revisit(t.tensor, t.rank, t.reads, footprint, total / footprint if footprint else 0.0, near, spill,
                           recompute))
    return tuple(out)


def _way(target: Target, moved: float, flops: float, special: float, level: str) -> Way:
    seconds = max(moved / target.memory.bandwidth, flops / target.peak("f32"), special / target.special)
    return Way(moved, flops, special, level, seconds)


def _waiting(found: tuple[Traversal, ...]) -> dict[str, list[str]]:
    """Tensor -> its ranks (whole ones) for which some statement waits."""
    out: dict[str, list[str]] = {}
    for t in found:
        if t.waits and t.rank == t.of:
            out.setdefault(t.tensor, []).append(t.rank)
    return out


def _footprint(c: Cascade, n: Sizes, t: Traversal, waits: Mapping[str, list[str]]) -> float:
    """Bytes of the tensor that one task must hold: what is live along the rank, times the other ranks that are waited
    for."""
    along = n(t.rank) if t.live == "fiber" else 1
    others = (n(r) for r in waits.get(t.tensor, ()) if r not in (t.rank, t.of))
    return float(along * math.prod(others) * width(c, t.tensor))


def _made_again(c: Cascade, n: Sizes, tensor: str, rank: str, walked: set[tuple[str, str]]
                ) -> tuple[float, float, float]:
    """Operations (plain, special) and bytes of arguments to make the tensor once more; what lacks the rank is kept."""
    flops = special = moved = 0.0
    todo, seen = [tensor], {tensor}
    while todo:
        name = todo.pop()
        if not c.temporary(name):
            moved += n.elements(tensor_of(c, name)) * width(c, name)
            continue
        for e in c.writers(name):
            plain, hard = operations(e.body)
            points = n.live(e)
            flops += (plain + (e.reduce is not None)) * points
            special += hard * points
            fresh = {x for x in _reads(e, rank, walked) if x not in seen}
            seen |= fresh
            todo += sorted(fresh)
    return flops, special, moved


def _reads(e: Einsum, rank: str, walked: set[tuple[str, str]]) -> set[str]:
    return {x for x in e.reads() if (x, rank) in walked}
