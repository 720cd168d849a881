"""Fewer passes over a long rank: chains of reductions become running states in a frame and a finalise map."""

from __future__ import annotations

import math

from memcomp.ir.cascade import Knob, extent_of
from memcomp.ir.errors import OptionError, nearest
from memcomp.ir.program import Program
from memcomp.ir.target import target
from memcomp.passes.derive.stream import Refused, refusals, streamed

__all__ = ["Refused", "reduce_passes", "refusals", "weighted_frames"]
FRAMES = ("first", "running")


def reduce_passes(program: Program, *, splits: int | Knob | None = None, tile: tuple[int, ...] | None = None,
                  frame: str = "running", weighted: bool = True, ranks: tuple[str, ...] | None = None) -> Program:
    """Derive the one-pass form over every long rank by separation, order lifting and gauges (docs/derivation.md).

    splits: cut the rank into so many parallel parts (or a knob), merged at the end; tile: choices of the tile size;
            None = 32, 64 or 128, fewer where a row of features is long (its tiles must fit a fast level).
    frame:  reference of polynomial states, "first" (mean of the first live tile) or "running" (mean so far).
    weighted: measure powers under an exponential weight from their weighted mean, whose frame has the indices of weight
            and value (elementwise work, one pass); False: they wait for another pass.
    ranks:  only these ranks; None = those over which some chain needs several passes or whose summands are temporaries,
            and which no output carries.
    A sum over `m < p` whose terms only change frame when p moves on becomes a scan over p (without splits).
    Where a law is missing the statements stay as they are and a proof line says which (`refusals`).
    Raises OptionError for an unknown frame or rank, or a share or tile size below 1.

    before:
        program tiny on cpu
        rank P
        rank M
        in S[P, M]: f32
        out D[P]: f32
        GM[p] = max{m} S[p, m]
        D[p] = sum{m} exp(S[p, m] - GM[p])
    after:
        program tiny on cpu
        rank P
        rank M
        rank M0 = ?m0 in 32|64|128
        rank M1 = ceil(M/M0) iter
        in S[P, M]: f32
        out D[P]: f32
        RGM[0, p] = -inf
        RD[0, p] = 0.0
        LGM[m1, p] = max{m0} S[p, m1*M0 + m0] where m1*M0 + m0 < M
        RGM[m1 + 1, p] = max(RGM[m1, p], LGM[m1, p])
        FGM[m1, p] = where(RGM[m1 + 1, p] == -inf, 0.0, RGM[m1 + 1, p])
        EGM[p, m1, m0] = exp(S[p, m1*M0 + m0] - FGM[m1, p]) where m1*M0 + m0 < M
        LD[m1, p] = sum{m0} EGM[p, m1, m0] where m1*M0 + m0 < M
        PGM[m1, p] = exp(RGM[m1, p] - FGM[m1, p])
        PD[m1, p] = RD[m1, p] * PGM[m1, p]
        RD[m1 + 1, p] = LD[m1, p] + PD[m1, p]
        D[p] = RD[M1, p]
    """
    if frame not in FRAMES:
        raise OptionError(f"unknown frame {frame!r}", hint=nearest(frame, FRAMES))
    known = {r.name for r in program.cascade.ranks}
    for name in ranks or ():
        if name not in known:
            raise OptionError(f"unknown rank {name!r}", hint=nearest(name, known))
    tile = _tiles(program) if tile is None else tile
    if not tile or min(tile) < 1 or (isinstance(splits, int) and splits < 1):
        raise OptionError("tile sizes and splits are at least 1", hint=f"given: tile={tile}, splits={splits}")
    return streamed(program, splits, tile, frame, weighted, ranks)


def weighted_frames(program: Program) -> bool:
    """Do the program's proofs name a frame at a weighted mean, so that `weighted=False` gives it another form?"""
    return any("weighted gauge" in p for p in program.proofs)


_MOST = 1 << 15  # elements of a tile of rows (128 KiB of f32), two of which are alive


def _tiles(program: Program) -> tuple[int, ...]:
    """Points of a tile: at most so many that a tile over them and the widest fixed rank has `_MOST` elements.  Ranks of
    every reduction are no features: they are cut themselves."""
    c = program.cascade
    spaces = [set(e.space()) for e in c.einsums if e.reduce]
    features = {v for s in spaces for v in s if any(v not in other for other in spaces)}
    widest = max((extent_of(c, v.upper()) or 1 for v in features if not c.rank(v.upper()).iterative), default=1)
    beside = max((math.prod(n for n in known if n) for e in c.einsums if e.reduce for known in [
        [extent_of(c, v.upper()) for v in e.reduce.over]] if None in known), default=1)  # walked with a long rank
    sizes = {max(-(-8 // beside), min(n, _MOST * n // 128 // widest) // beside) for n in (32, 64, 128)}
    if program.target and target(program.target).levels[0].addressed:  # registers that tiles fill as powers of two
        sizes = {max(-(-16 // beside), 1 << (n.bit_length() - 1)) for n in sizes}
    return tuple(sorted(sizes))
