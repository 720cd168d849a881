"""Which Einsums run as one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from memcomp.ir import flow
from memcomp.ir.cascade import Cascade, Einsum, is_init
from memcomp.ir.expr import Size, Var
from memcomp.ir.program import Group, Mapping, Program
from memcomp.ir.simplify import simplify
from memcomp.passes._roles import accesses, carried, common, held, out_vars, shared, whole


def fuse(program: Program) -> Program:
    """Cut the cascade into mapping groups, each as long as one kernel can be.

    A loop over an iterative rank is one group with its initialisations, with what only it reads, and with everything
    after it that stays at the points of one task.  The rest are chains that share their points.  What must be complete
    before it is read at other points (a merge over shares, a second pass, a scattered state) starts a new group.

    before:
        program p
        rank B
        rank M
        in X[B, M]: f32
        out Y[B]: f32
        out Z[B]: f32
        S[b] = sum{m} X[b, m]
        Y[b] = sqrt(S[b])
        Z[b] = max{m} X[b, m] * S[b]
    after:
        program p
        rank B
        rank M
        in X[B, M]: f32
        out Y[B]: f32
        out Z[B]: f32
        S[b] = sum{m} X[b, m]
        Y[b] = sqrt(S[b])
        Z[b] = max{m} X[b, m] * S[b]
        group g0: S
        group g1: Y
        group g2: Z
    """
    if program.mapping.groups or not program.cascade.einsums:
        return program
    parts = _Fusion(program.cascade).parts()
    names = [tuple(dict.fromkeys(n for k in part for n in program.cascade.einsums[k].names)) for part in parts]
    groups = tuple(Group(f"g{i}", t) for i, t in enumerate(names))
    return replace(program, mapping=Mapping(groups))


class _Fusion:
    def __init__(self, c: Cascade) -> None:
        self.c, self.all = c, c.einsums
        self.carried = c.once(carried)
        self.loops = c.once(flow.loops)
        self.writers: dict[str, list[int]] = {}
        self.readers: dict[str, list[int]] = {}
        for k, e in enumerate(self.all):
            for n in e.names:
                self.writers.setdefault(n, []).append(k)
            for n in e.reads():
                self.readers.setdefault(n, []).append(k)
        self.group: dict[int, int] = {}
        self.parts_: list[list[int]] = []
        self.made: dict[int, set[str]] = {}  # tensors of a group
        self.shared: list[tuple[str, ...]] = []  # variables that every task of a group has its own values of

    def parts(self) -> list[list[int]]:
        for k, path in enumerate(self.loops):
            if path and k not in self.group:
                self._loop(path[0])
        for k in range(len(self.all)):
            if k not in self.group:
                self._chain(k)
        return self._ordered()

    def _put(self, k: int, g: int) -> None:
        for j in {j for n in self.all[k].names for j in self.writers[n]}:
            if j not in self.group:
                self.group[j] = g
                self.parts_[g].append(j)
                self.made.setdefault(g, set()).update(self.all[j].names)

    # -- a loop ------------------------------------------------------------------------------------------------------

    def _loop(self, loop: tuple[str, int]) -> None:
        run = []
        for k in range(loop[1], len(self.all)):  # a loop is a run of statements
            if self.loops[k][:1] != (loop,):
                break
            run.append(k)
        g = len(self.parts_)
        self.parts_.append([])
        own = shared(self.c, [self.all[k] for k in run], loop[0])
        self.shared.append(own)
        for k in run:
            self._put(k, g)
        floor, near, known = self._floor(), set[int](), 0
        while known < len(self.parts_[g]):
            near |= self._near(self.parts_[g][known:])
            known = len(self.parts_[g])
            any(self._joins(k, g, floor) for k in sorted(near) if k not in self.group)

    def _near(self, ks: Iterable[int]) -> set[int]:
        """Statements that feed one of these or follow it: only those can join a group."""
        out: set[int] = set()
        for k in ks:
            out.update(j for n in self.all[k].reads() for j in self.writers.get(n, ()))
            out.update(j for n in self.all[k].names for j in self.readers.get(n, ()))
        return out

    def _floor(self) -> list[int]:
        """For each statement the last place before it that no group and no loop spans: what it waits for is there or
        later, or before all that is later."""
        spans = [(min(part), max(part)) for part in self.parts_ if part]
        spans += [(path[0][1], k) for k, path in enumerate(self.loops) if path]
        inside = [0] * (len(self.all) + 1)
        for low, high in spans:
            inside[low + 1] += 1  # a cut at low is before the span
            inside[high + 1] -= 1
        out, at, depth = [], 0, 0
        for k in range(len(self.all)):
            depth += inside[k]
            at = k if depth == 0 else at
            out.append(at)
        return out

    def _joins(self, k: int, g: int, floor: list[int]) -> bool:
        """Take statement k into group g: before the loop where only the group reads it, or after it."""
        e, own = self.all[k], set(self.shared[g])
        private = set(e.space()) - own
        if (
            not all(held(self.c, v) for v in private)
            or set(e.reduce.over if e.reduce else ()) & own
        ):
            return False
        mine = self.made[g]
        users = list(dict.fromkeys(j for n in e.names for j in self.readers.get(n, ())))
        feeds = bool(users) and all(self.group.get(j) == g for j in users) and all(map(self.c.temporary, e.names))
        follows = bool(e.reads() & mine) and own <= set(out_vars(e))
        if not ((feeds and (own <= set(out_vars(e)) or e.reduce is None)) or follows):
            return False
        if any(self._reaches(g, w, floor) for n in e.reads() - mine for w in self.writers.get(n, ())):
            return False  # it waits for something that waits for this group
        if not self._aligned(e, g) or any(
            not self._aligned(self.all[j], g, set(e.names)) for j in users if self.group.get(j) == g
        ):
            return False
        self._put(k, g)
        return True

    def _reaches(self, g: int, k: int, floor: list[int]) -> bool:
        """Does statement k need a result of group g (through any statement)?"""
        first = floor[min(self.parts_[g])]
        seen, todo = set[int](), [k]
        while todo:
            at = todo.pop()
            if at in seen or at < first:
                continue
            seen.add(at)
            if self.group.get(at) == g:
                return True
            same = self.parts_[self.group[at]] if at in self.group else ()
            seen.update(same)
            for j in (at, *same):
                todo += [w for n in self.all[j].reads() for w in self.writers.get(n, ()) if w != j]
        return False

    def _aligned(self, e: Einsum, g: int, names: set[str] | None = None) -> bool:
        """Are the group's tensors (or `names`) read at the very points that the task has written?"""
        mine = names if names is not None else self.made[g]
        for a in accesses(e):
            state = a.tensor + "'" in mine  # the old value of a state that the group overwrites
            if a.tensor not in mine and not state:
                continue
            ws = [self.all[j] for j in self.writers[a.tensor + "'" * state] if not is_init(self.all[j])]
            outs = [o for w in ws for o in w.outs if o.tensor == a.tensor + "'" * state]
            if len({o.index for o in outs}) != 1:
                return False
            v, _, at = self.carried.get(a.tensor, ("", e, -1))
            for k, (got, want) in enumerate(zip(a.index, outs[0].index, strict=True)):
                got, want = simplify(got, index=True), simplify(want, index=True)
                if k == at and got in (Size(v.upper()), Var(v), want):
                    continue
                if got != want:
                    return False
        return True

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _chain(self, k: int) -> None:
        """Append statement k to the chain that feeds it, or start one."""
        e = self.all[k]
        if all(len(self.writers[n]) == 1 for n in e.names):
            feeding = {self.group[w] for n in e.reads() for w in self.writers.get(n, ()) if w in self.group}
            if not out_vars(e):  # numbers of one walk
                feeding |= {g for g, part in enumerate(self.parts_) if _numbers([*(self.all[j] for j in part), e])}
            floor = self._floor() if feeding else []
            for g in sorted(feeding, reverse=True):
                if any(self.loops[j] for j in self.parts_[g]):
                    continue
                members = [self.all[j] for j in self.parts_[g]]
                points = common([*members, e])
                spaces = [set(m.space()) - set(points) for m in (*members, e)]
                mine = self.made[g]
                if (
                    (points and all(whole(self.c, v) for s in spaces for v in s)
                     or _numbers([*members, e]) and not (e.reduce and e.reads() & mine))
                    and self._aligned(e, g)
                    and not any(self._reaches(g, w, floor) for n in e.reads() - mine for w in self.writers.get(n, ()))
                ):
                    self._put(k, g)
                    self.shared[g] = points
                    return
        self.parts_.append([])
        self.shared.append(out_vars(e))
        self._put(k, len(self.parts_) - 1)

    def _ordered(self) -> list[list[int]]:
        """Groups in an order that can run: writers first, and readers of a state before it is overwritten."""
        needs: dict[int, set[int]] = {g: set() for g in range(len(self.parts_))}
        for k, e in enumerate(self.all):
            for n in e.reads():
                needs[self.group[k]] |= {self.group[w] for w in self.writers.get(n, ())}
                for w in self.writers.get(n + "'", ()):
                    needs[self.group[w]].add(self.group[k])
        out: list[list[int]] = []
        left = sorted(needs, key=lambda g: min(self.parts_[g]))
        while left:
            done = next((g for g in left if not (needs[g] - {g}) & set(left)), left[0])
            left.remove(done)
            out.append(sorted(self.parts_[done]))
        return out


def _numbers(members: list[Einsum]) -> bool:
    """Are these single numbers, of one walk over the same ranks and what follows from it?"""
    walked = {frozenset(e.reduce.over) for e in members if e.reduce}
    return len(walked) <= 1 and not any(out_vars(e) for e in members)
