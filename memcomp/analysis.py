"""The analysis of one form of a program: its passes and why, what lives between them, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from memcomp.ir.program import Program
from memcomp.ir.revisit import Live, Revisit, live, revisits
from memcomp.ir.target import Target
from memcomp.ir.traversal import Taxon, Traversal, classify, traversals


@dataclass(frozen=True, slots=True)
class Analysis:
    """traversals: of every fiber, with the chain that forces its passes; taxon: the class of the program along the rank
    that it walks most, None where it walks none; live: what must be kept of each fiber at the least; revisits: tensors
    read in several passes, and what keeping, moving and recomputing them costs."""

    traversals: tuple[Traversal, ...]
    taxon: Taxon | None
    live: tuple[Live, ...]
    revisits: tuple[Revisit, ...]

    @property
    def passes(self) -> dict[tuple[str, str], int]:
        """(tensor, rank) -> number of passes."""
        return {(t.tensor, t.rank): t.passes for t in self.traversals}

    def why(self) -> list[Traversal]:
        """For each reason that something is passed several times the fiber with the longest chain.  A chain that ends
        as another one does is no reason of its own."""
        found = sorted((t for t in self.traversals if t.passes > 1 and t.rank == t.of),
                       key=lambda t: (-t.passes, -sum(map(len, t.chain))))
        out: list[Traversal] = []
        for t in found:
            if not any(t.rank == o.rank and t.witness == o.witness[-len(t.witness):] for o in out):
                out.append(t)
        return out

    def lines(self, size_of: Callable[[float], str]) -> Iterator[str]:
        """What a table of passes does not say, a line each.  size_of: bytes -> text."""
        for t in self.why():
            yield f"{t.passes} passes over {t.rank}: {chain_text(t)}"
        for r in self.revisits:
            yield f"{r.tensor} is read in passes {', '.join(map(str, r.reads))} over {r.rank}: {way_text(r, size_of)}"

    def json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "class": None if self.taxon is None else {"rank": self.taxon.rank, "passes": self.taxon.passes,
                                                      "walks": list(self.taxon.walks)},
            "fibers": [{"tensor": t.tensor, "rank": t.rank, "of": t.of, "passes": t.passes, "reads": list(t.reads),
                        "chain": [list(g) for g in t.chain], "live": x.elements, "footprint": x.footprint}
                       for t, x in zip(self.traversals, self.live, strict=True)],
            "revisits": [{**asdict(r), "best": r.best, "reads": list(r.reads)} for r in self.revisits],
        }


def analyse(program: Program, sizes: Mapping[str, int], target: Target) -> Analysis:
    """sizes: extents of the symbolic ranks of `program`."""
    found = traversals(program)
    return Analysis(found, classify(program), live(program, sizes, found), revisits(program, sizes, target, found))


def chain_text(t: Traversal) -> str:
    """K, QK, GM | SN, SD | A: a bar where another pass begins."""
    return " | ".join(", ".join(g) for g in t.chain)


def way_text(r: Revisit, size_of: Callable[[float], str]) -> str:
    """The three ways in a line, the cheapest first."""
    keep = f"keep {size_of(r.footprint)} a task" + (f" in {r.buffer.level}" if r.buffer.level else ", more than fits")
    ways = {"buffer": keep, "spill": f"move {size_of(r.spill.bytes)}"}
    if r.recompute is not None:
        again = r.recompute
        ways["recompute"] = f"compute again {again.flops + again.special:.3g} operations, {size_of(again.bytes)} read"
    first = ways.pop(r.best)
    return f"{first}; or {', or '.join(ways.values())}"
