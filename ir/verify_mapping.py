"""The mapping of a program: groups that cover the statements in an order that can run, over known ranks."""

from __future__ import annotations

from memcomp.ir import flow
from memcomp.ir.cascade import Cascade, Knob
from memcomp.ir.errors import nearest
from memcomp.ir.expr import Const
from memcomp.ir.program import Group, Program
from memcomp.ir.show import show_einsum, show_group
from memcomp.ir.verify_declared import check_knob, fail


def check_mapping(p: Program) -> None:
    groups, c = p.mapping.groups, p.cascade
    if not groups:
        return
    written = {n for s in c.einsums for n in s.names}
    home: dict[str, int] = {}
    names: set[str] = set()
    choices = {r.extent.name: r.extent.choices for r in c.ranks if isinstance(r.extent, Knob)}
    for at, g in enumerate(groups):
        head = show_group(g)[0]
        if g.name in names:
            fail(f"group {g.name!r} is declared twice", head, g.name, "give each group its own name")
        names.add(g.name)
        for t in g.tensors:
            if t not in written:
                fail(f"group {g.name!r} holds {t!r}, which no statement writes", head, t, nearest(t, written))
            if t in home:
                fail(f"{t!r} is in group {groups[home[t]].name!r} and in group {g.name!r}", head, t,
                     "a tensor is computed in one group")
            home[t] = at
        _check_parts(g, c, written, choices)
    for s in c.einsums:
        for n in s.names:
            if n not in home:
                fail(f"no group holds {n!r}", show_einsum(s), n, f"groups: {', '.join(g.name for g in groups)}")
        if len({home[n] for n in s.names}) > 1:
            fail("the results of one statement are in different groups", show_einsum(s), "", "put them in one group")
    _check_order(p, home)


def _check_order(p: Program, home: dict[str, int]) -> None:
    """A group reads only what it or an earlier group writes, and an iterative run that feeds itself is one group."""
    groups, c = p.mapping.groups, p.cascade
    last = {n: i for i, s in enumerate(c.einsums) for n in s.names}
    for i, s in enumerate(c.einsums):
        mine = home[s.names[0]]
        for n in sorted(s.reads() & home.keys()):
            if home[n] > mine:
                fail(f"group {groups[mine].name!r} reads {n!r}, which the later group {groups[home[n]].name!r} writes",
                     show_einsum(s), n, "order the groups so that a tensor is written before it is read")
            if last[n] > i and home[n] != mine:
                fail(f"{n!r} is carried around a loop through groups {groups[home[n]].name!r} and "
                     f"{groups[mine].name!r}", show_einsum(s), n, "put the whole loop in one group")


def _check_parts(g: Group, c: Cascade, written: set[str], choices: dict[str, tuple[int, ...]]) -> None:
    lines = {text.split()[0]: text.strip() for text in show_group(g)[1:]}
    ranks = {r.name for r in c.ranks}
    parts: set[str] = set()
    for text, (rank, size) in zip(show_group(g)[1:], g.partition, strict=False):
        text = text.strip()
        if rank not in ranks:
            fail(f"unknown rank {rank!r} in group {g.name!r}", text, rank, nearest(rank, ranks))
        if rank + "0" in parts:
            fail(f"rank {rank!r} is cut twice in group {g.name!r}", text, rank, "cut it once")
        clash = {rank + "0", rank + "1"} & ranks
        if clash:
            fail(f"cutting {rank!r} makes {rank}1 and {rank}0, and there is a rank {min(clash)!r}", text, rank,
                 "rename that rank")
        parts |= {rank + "0", rank + "1"}
        if isinstance(size, Knob):
            check_knob(size, text, choices)
        elif not isinstance(size, Const) or isinstance(size.value, bool) or not isinstance(size.value, int) \
                or size.value < 1:
            fail(f"the size of a tile of {rank!r} is not a positive integer", text, rank,
                 "write partition P: 64, or partition P: ?p0 in 32|64")
    known = ranks | parts
    for head, used in (("space", g.space), ("loop-order", g.loop_order), ("lane", (g.lane,) if g.lane else ())):
        for rank in used:
            if rank not in known:
                fail(f"unknown rank {rank!r} in group {g.name!r}", lines[head], rank, nearest(rank, known))
        if len(set(used)) < len(used):
            fail(f"a rank stands twice in {head!r}", lines[head], "", "name each rank once")
    for rank in g.space:
        if rank in g.loop_order:
            fail(f"rank {rank!r} is both in space and in loop-order", lines["space"], rank, "choose one")
        if rank in ranks and c.rank(rank).iterative and _carried(rank, g, c):
            fail(f"iterative rank {rank!r} cannot run in parallel", lines["space"], rank, f"write loop-order {rank}")
    declared = written | {t.name for t in c.tensors}
    for tensor, level in g.keep:
        if tensor not in declared:
            fail(f"unknown tensor {tensor!r} in group {g.name!r}", f"keep {tensor} @ {level}", tensor,
                 nearest(tensor, declared))
    bound: set[str] = set()
    for text, phase in zip(show_group(g)[-len(g.phases):] if g.phases else (), g.phases, strict=True):
        for tensor, _ in phase.bind:
            if tensor not in g.tensors:
                fail(f"group {g.name!r} does not compute {tensor!r}", text.strip(), tensor, nearest(tensor, g.tensors))
            if not phase.drain and tensor in bound:
                fail(f"{tensor!r} stands in two phases of group {g.name!r}", text.strip(), tensor,
                     "a statement runs once a round")
            if phase.drain and tensor not in bound:
                fail(f"{tensor!r} drains before it runs", text.strip(), tensor, "write its phase first")
            bound.add(tensor)
    if g.phases and (missing := [t for t in g.tensors if t not in bound]):
        fail(f"{missing[0]!r} stands in no phase of group {g.name!r}", show_group(g)[0], missing[0],
             "bind every tensor of the group to a unit, or none")


def _carried(rank: str, g: Group, c: Cascade) -> bool:
    """Does a statement of the group run in order over this iterative rank?"""
    return any(v == rank.lower() for s, path in zip(c.einsums, flow.loops(c), strict=True)
               if s.out.tensor in g.tensors for v, _ in path)
