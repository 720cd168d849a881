"""Text of a group of warps that computes: 64 rows of a task, step for step."""

from __future__ import annotations

from dataclasses import dataclass

from memcomp.codegen.gluon.form import reads, wrote
from memcomp.codegen.gluon.group import Group
from memcomp.codegen.triton.layout import Axis
from memcomp.codegen.triton.parts import Part
from memcomp.ir.tile import Dot, Load, Loop, Statement

STAGES = 2   # slots of K, and of V


@dataclass(frozen=True, slots=True)
class Steps:
    """A loop in text.  ends: where its parts begin and end, one more than there are parts; skip: by how much its
    variable is more than the number of its steps from the first loop on; done: steps when it has ended."""

    loop: Loop
    parts: tuple[Part, ...]
    ends: tuple[str, ...]
    skip: str
    done: str

    def count(self, g: Group) -> str:
        """Write the number of a step, from the first loop on; its name."""
        var = g.names[self.loop.var]
        if self.skip == "0":
            return var
        n = g.names["step "]
        g.line(f"{n} = {var} - {self.skip}")
        return n


@dataclass(frozen=True, slots=True)
class Slots:
    """Text of the operands in shared memory as matrices, the last two by the number of their slot, and the names of
    their barriers."""

    query: str
    left: str
    right: str
    query_full: str
    left_full: str
    right_full: str
    right_free: str


class Rows(Group):
    """Both groups have this text; `half` says which rows are meant."""

    halves = True
    kind = "bfloat16"   # of both products' operands
    slots: Slots
    waits = ""          # the step whose second product of the step before is under way

    def loops(self, loops: list[Steps]) -> None:
        """The steps, and the product that the last of them leaves."""
        f, at, names = self.plan, self.slots, self.names
        keys = (f.rows, f.keys)
        self.weights, self.more = names[f"{f.first.tile} held"], names[f"{f.last.tile} more"]
        self.none = names["none "]
        self.line(f"{self.none} = {self.constant(keys, '0.0', 'tl.float32')}")
        self.line(f"{self.weights} = gl.full({self.shape(keys)}, 0.0, gl.{self.kind}, {self.fed()})")
        self.line(f"mbarrier.wait({at.query_full}.index(0), 0)")
        for s in loops:
            changing = [a for a in (f.rows, f.keys, f.columns) if self._changes(a, {s.loop.var})]
            for p, lo, hi in zip(s.parts, s.ends, s.ends[1:], strict=False):
                before = set(self.full)
                self.full |= {a.name for a in changing if a.points == a.size and set(a.dims) <= p.full}
                self.line(f"for {names[s.loop.var]} in range({lo}, {hi}):")
                self.depth += 1
                self.dead.forget(p.body, changing)
                self._step(s, p.body, changing)
                self.depth -= 1
                self.full = before
        total = names[f.last.tile]
        slot = at.right.format(f"{loops[-1].done} % {STAGES}")
        self.line(f"{self.more} = warpgroup_mma({self.weights}, {slot}, {total}, is_async=True)")
        self.line(f"{total} = warpgroup_mma_wait(0, [{self.more}])")

    def _step(self, s: Steps, body: tuple[Statement, ...], changing: list[Axis]) -> None:
        f, at, names = self.plan, self.slots, self.names
        score, total, number = names[f.first.tile], names[f.last.tile], s.count(self)
        body = tuple(x for x in body if x not in f.fetched)
        here = body.index(f.first)
        rest = [x for x in body[here + 1:] if x != f.last]
        loads = tuple(x for n, x in enumerate(rest) if isinstance(x, Load) and not reads((x,)) & wrote(body)
                      and x.tile not in reads(rest[:n]) | wrote(rest[:n]))
        sums = tuple(x for x in rest if wrote((x,)) == {f.last.tile})
        between = tuple(x for x in rest if x not in loads + sums)
        self._counts(changing)
        self.body(body[:here])
        made = names[f"{f.first.tile} more"]
        slot = f"{number} % {STAGES}"
        self.line(f"mbarrier.wait({at.left_full}.index({slot}), ({number} // {STAGES}) & 1)")
        self.line(f"{made} = warpgroup_mma({at.query}, {at.left.format(slot)}, {self.none}, use_acc=False, "
                  "is_async=True)")
        self.line(f"{self.more} = warpgroup_mma({self.weights}, {at.right.format(slot)}, {total}, is_async=True)")
        self.body(loads)
        self.line(f"{score} = warpgroup_mma_wait(1, [{made}])")
        self.waits = number
        self.body((*between, *sums, f.last))

    def assign(self, tile: str, text: str) -> None:
        if tile == self.plan.last.tile:
            self.settle()
        super().assign(tile, text)

    def settle(self) -> None:
        """The sums with the product of the step before, once a step."""
        if not (n := self.waits):
            return
        at, total = self.slots, self.names[self.plan.last.tile]
        self.waits = ""
        self.line(f"mbarrier.wait({at.right_full}.index(({n} + 1) % {STAGES}), (({n} + 1) // {STAGES}) & 1)")
        self.line(f"{total} = warpgroup_mma_wait(0, [{self.more}])")
        self.line(f"mbarrier.arrive({at.right_free}.index({n} % {STAGES}))")

    def dot(self, s: Dot) -> None:
        """The second product of a step: its left operand is kept for the next."""
        self.settle()
        f = self.plan
        x = self.layout.matrices(self.k, s)
        assert x is not None
        text = self.operand(x.a, (f.rows, f.keys), f.keys, self.form(s))
        self.line(f"{self.weights} = gl.convert_layout({text}, {self.fed()})")

    def fed(self) -> str:
        """The layout of the second product's left operand, which stays in registers."""
        return f"gl.DotOperandLayout(0, {self.places.of((self.plan.rows, self.plan.columns))}, 2)"

