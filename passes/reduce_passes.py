"""Fewer passes over a long rank: chains of reductions become running states in a frame and a finalise map."""

from __future__ import annotations

from memcomp.ir.program import Program
from memcomp.passes.derive.stream import Refused, refusals, streamed

__all__ = ["Refused", "reduce_passes", "refusals"]


def reduce_passes(program: Program, *, splits: int | None = None, tile: tuple[int, ...] = (32, 64, 128),
                  frame: str = "first", ranks: tuple[str, ...] | None = None) -> Program:
    """Derive the one-pass form over every long rank by separation, order lifting and gauges (docs/derivation.md).

    splits: cut the rank into so many parallel parts, merged at the end.  tile: choices of the tile-size knob.
    frame:  reference of polynomial states, "first" (mean of the first live tile) or "running" (mean so far).
    ranks:  only these ranks; None = those over which some chain needs several passes or whose summands are temporaries.
    Where a law is missing the statements stay as they are and a proof line says which (`refusals`).

    before:
        program tiny on cpu
        rank P
        rank M
        in S[P, M]: f32
        out D[P]: f32
        GM[p] = max{m} S[p, m]
        D[p] = sum{m} exp(S[p, m] - GM[p])
    after:
    """
    return streamed(program, splits, tile, frame, ranks)
