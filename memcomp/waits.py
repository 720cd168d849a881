"""Why a program takes several kernels: what one of them reads that other tasks, or a pass before, have to make."""

from __future__ import annotations

from memcomp.ir.program import Group, Program


def waits(program: Program) -> tuple[str, ...]:
    """One line for each tensor that a kernel of a mapped program reads and another one writes."""
    home = {t: g for g in program.mapping.groups for t in g.tensors}
    out: dict[tuple[str, str], str] = {}
    for e in program.cascade.einsums:
        mine = home[e.names[0]]
        for a in e.accesses():
            made = home.get(a.tensor)
            if made is None or made == mine:
                continue
            ranks = _parallel(made)
            every = [r for r in ranks if r not in _parallel(mine)]
            if every:
                why = f"of every {', '.join(every)}, and {made.name} has a task for each"
            else:
                why = f"as {made.name} leaves it"
            out.setdefault((mine.name, a.tensor), f"{mine.name}: {e.names[0]} needs {a.tensor} {why}")
    return tuple(out.values())


def _parallel(g: Group) -> tuple[str, ...]:
    """Ranks that a kernel runs in parallel, whole or in tiles."""
    cut = {f"{r}1": r for r, _ in g.partition}
    return tuple(cut.get(r, r) for r in g.space)
