"""Unrolled loops become ranks: steps that differ in integers only are one step over a new rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from memcomp.ir.cascade import Cascade, Einsum, Tensor
from memcomp.ir.program import Program
from memcomp.passes._ranks import pruned
from memcomp.passes.unrolled.rolled import follow, roll
from memcomp.passes.unrolled.steps import Step, differs, steps
from memcomp.passes.unrolled.windows import flattens


def reroll(program: Program) -> Program:
    """Pieces of one tensor that are written by steps of one form become one statement over the steps.

    What differs between steps must be integers that are functions of the step, which is checked at every step: then
    indices become expressions, and lengths become guards.  A window that slides over a tensor becomes a guard on the
    tensor's own rank, so that steps share what they read.  Changes no result.

    before:
        program p
        rank N = 4
        rank A = 1
        rank B = 2
        rank D = 2
        rank F = 2
        in K[N]: f32
        out O[N]: f32
        SA[a] = exp(K[a])
        SB[b] = exp(K[b])
        SD[d] = exp(K[d + 1])
        SF[f] = exp(K[f + 2])
        O[0] = sum{a} SA[a]
        O[1] = sum{b} SB[b]
        O[2] = sum{d} SD[d]
        O[3] = sum{f} SF[f]
    after:
        program p
        rank N = 4
        rank I = 4
        in K[N]: f32
        out O[N]: f32
        SA[i, n] = exp(K[n]) where i <= n + 1 and n <= i
        O[i] = sum{n} SA[i, n] where i <= n + 1 and n <= i
        proof O: 4 steps of one form are rank I
    """
    c, proofs = program.cascade, list(program.proofs)
    while (done := _once(c)) is not None:
        c, more = done
        proofs += more
    return program if c is program.cascade else replace(program, cascade=c, proofs=tuple(proofs))


def unrolled(program: Program) -> str:
    """Why a program still has steps after `reroll`, by the first step that differs; "" where it has none."""
    c = program.cascade
    for name, found in steps(c).items():
        where = f"{len(found)} steps write {name}; step"
        for k, s in enumerate(found[1:], 1):
            if why := differs(found[0], s, c):
                return f"{where} {k} has another form than the first: {why}"
        return f"{where} {_length(found)} does not go on as those before it: its numbers lie on no line"
    return ""


def _once(c: Cascade) -> tuple[Cascade, tuple[str, ...]] | None:
    """All runs of alike steps replaced; None where there are none."""
    taken = {r.name for r in c.ranks}
    statements: dict[int, tuple[Einsum, ...]] = {k: (s,) for k, s in enumerate(c.einsums)}
    ranks, gone, spaces = list(c.ranks), set[str](), set[str]()
    tensors: dict[str, Tensor] = {}
    proofs: list[str] = []
    for name, found in steps(c).items():
        for run in _runs(c, found):
            rolled = roll(c, run, taken)
            for s in run:
                statements.update(dict.fromkeys(s.statements, ()))
                spaces |= {v.upper() for space in s.spaces for v in space}
                gone |= {n for k in s.statements[:-1] for n in c.einsums[k].names}
            statements[max(s.statements[-1] for s in run)] = rolled.statements
            ranks += rolled.ranks
            tensors |= {t.name: t for t in rolled.tensors}
            proofs.append(f"{name}: {len(run)} steps of one form are rank {rolled.over}")
    if not proofs:
        return None
    kept = tuple(tensors.get(t.name, t) for t in c.tensors if t.name in tensors or t.name not in gone)
    einsums = tuple(s for k in range(len(c.einsums)) for s in statements[k])
    return pruned(Cascade(tuple(ranks), kept, einsums), spaces), tuple(proofs)


def _runs(c: Cascade, family: Sequence[Step]) -> Iterator[Sequence[Step]]:
    """Steps next to each other whose integers follow; where pieces lie in two dimensions, within a row."""
    ordered = sorted(family, key=lambda s: s.place)
    moving = [k for k, x in enumerate(zip(*(s.place for s in ordered), strict=True)) if len(set(x)) > 1]
    for _, group in groupby(ordered, key=lambda s: tuple(s.place[k] for k in moving[:-1])):
        row = list(group)
        for _, alike in groupby(row, key=lambda s: s.forms):
            left = list(alike)
            while len(left) > 1:
                n = _length(left)
                if n > 1 and not flattens(c, left[:n]):
                    n = next(k for k, s in enumerate((*left[:n], None)) if s is None or s.shape != left[0].shape)
                # any two lengths follow: two steps are a loop only where they are equal work
                if n > 2 or n == 2 and left[0].extents == left[1].extents:
                    yield left[:n]
                else:
                    n = 1
                left = left[n:]


def _length(family: Sequence[Step]) -> int:
    """How many of the steps follow, from the first on; what is said of some steps is true of fewer."""
    good, bad, n = 1, len(family) + 1, len(family)
    while bad - good > 1:
        good, bad = (n, bad) if follow(family[:n]) else (good, n)
        n = (good + bad) // 2
    return good
