"""What capture hands on: regions that memcomp computes, and candidates it left alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from memcomp.ir.program import Program


@dataclass(frozen=True)
class Region:
    """A part of an fx graph and the program that means the same.

    name:      unique in its graph.
    program:   as read; its in-tensors have exactly the torch shapes of `inputs`.
    inputs:    tensor nodes in the order of `program.cascade.inputs()`; all stand before `anchor` in the graph.
    sizes:     run-time integers that no input shape gives: (rank symbol, SymInt node or number).
    outputs:   replaced nodes in the order of `program.cascade.outputs()`.
    nodes:     all nodes that the region computes (dead after the replacement unless used elsewhere).
    source:    module path and file:line of the user's code.
    out_order: per output its dims from slowest to fastest in memory, () = row-major.
    anchor:    the replacement goes directly before this node; no user of an output stands before it.
    optional:  the group that was read where smaller ones could be instead, for `find_regions` to take apart.
    """

    name: str
    program: Program
    inputs: tuple[fx.Node, ...]
    sizes: tuple[tuple[str, fx.Node | int], ...]
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    source: str
    out_order: tuple[tuple[int, ...], ...]
    anchor: fx.Node
    optional: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Refused:
    """A candidate that stays with torch: where (module path, file:line) and why.
    chain: no attention, where nothing was promised."""

    where: str
    why: str
    chain: bool = False
