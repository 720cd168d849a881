"""Text of what the groups of warps have in common: tensors have layouts, and a group's rows are some of a task's."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from memcomp.codegen.gluon.form import HALF, Form
from memcomp.codegen.triton.express import Scope
from memcomp.codegen.triton.layout import Axis
from memcomp.codegen.triton.writer import Writer
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Call
from memcomp.ir.tile import Fold, Loop, Statement, statements

FLAT = "gl.BlockedLayout([1], [32], [4], [0])"


@dataclass(frozen=True, slots=True)
class Places:
    """Layouts of a group's tensors.  matrices: by the axis of a matrix' columns the layout of it, whose rows are
    `rows`; empty where a group has vectors only."""

    rows: Axis
    matrices: dict[Axis, str] = field(hash=False)

    def of(self, axes: tuple[Axis, ...]) -> str:
        """The layout of a tensor over axes."""
        if not self.matrices and len(axes) == 1:
            return FLAT
        if len(axes) == 2 and axes[0] == self.rows and axes[1] in self.matrices:
            return self.matrices[axes[1]]
        if axes == (self.rows,):
            return self.within(axes, (self.rows, next(iter(self.matrices))))
        if len(axes) == 1 and axes[0] in self.matrices:
            return self.within(axes, (self.rows, axes[0]))
        raise Refusal(f"a tensor over {' and '.join(a.name for a in axes)} is no matrix of a group of warps")

    def within(self, own: tuple[Axis, ...], axes: tuple[Axis, ...]) -> str:
        """The layout of a vector that is to be spread over a matrix."""
        if len(axes) != 2 or len(own) != 1:
            raise Refusal(f"{' and '.join(a.name for a in own)} spread over {' and '.join(a.name for a in axes)}")
        return f"gl.SliceLayout({1 - axes.index(own[0])}, {self.of(axes)})"


@dataclass(slots=True)
class Spread(Scope):
    """A scope whose tensors have layouts."""

    places: Places | None = None

    def spread(self, text: str, own: tuple[Axis, ...], axes: tuple[Axis, ...]) -> str:
        if own == axes or not own:
            return text
        assert self.places is not None
        want = self.places.within(own, axes)
        moved = text if self.places.of(own) == want else f"gl.convert_layout({text}, {want})"
        return Scope.spread(self, moved, own, axes)

    def call(self, e: Call, axes: tuple[Axis, ...]) -> str:
        if e.op == "sigmoid":
            return f"(1.0 / (1.0 + tl.exp(-{self.text(e.args[0], axes)})))"
        return Scope.call(self, e, axes)


class Group(Writer):
    """Text of one group of warps.  half: the group's rows are half of a task's, those of number `half`."""

    plan: Form
    places: Places
    halves = False

    def place(self, plan: Form, places: Places) -> None:
        """Give tensors layouts."""
        self.plan, self.places = plan, places
        s = self.scope
        self.scope = Spread(s.names, s.layout, s.dtypes, s.tiles, s.stored, s.dims, s.words, s.element, places)

    def points(self, a: Axis) -> str:
        if self.halves and a == self.plan.rows:
            return f"half * {HALF} + tl.arange(0, {HALF}, {self.places.of((a,))})"
        return f"tl.arange(0, {a.size}, {self.places.of((a,))})"

    def shape(self, axes: tuple[Axis, ...]) -> str:
        return f"[{', '.join(str(HALF if self.halves and a == self.plan.rows else a.size) for a in axes)}]"

    def constant(self, axes: tuple[Axis, ...], text: str, dtype: str) -> str:
        return f"tl.full({self.shape(axes)}, {text}, {dtype}, {self.places.of(axes)})" if axes else (
            f"tl.cast({text}, {dtype})")

    def widened(self, text: str, axes: tuple[Axis, ...]) -> str:
        return f"({text}).broadcast_to({self.shape(axes)})"

    def fold(self, s: Fold) -> None:
        if self.halves and set(s.over) & set(self.plan.rows.dims):
            raise Refusal(f"{s.tile} reduces over rows, which two groups of warps share", self.k.name,
                          "the triton backend takes it")
        super().fold(s)

    def steps(self, lo: str, hi: str, body: tuple[Statement, ...], edge: bool) -> str:
        return f"range({lo}, {hi})"

    def indices(self, axes: list[Axis]) -> None:
        """The points of axes, and which of them count outside of loops."""
        inside = {s.var for s in statements(self.k.body) if isinstance(s, Loop)}
        for a in axes:
            self._axis(a)
        self._counts([a for a in axes if not self._changes(a, inside)])

    def function(self, head: str) -> str:
        """The function, without the indices that nothing reads."""
        lines = self.lines
        while True:
            text = "\n".join(lines)
            kept = [x for x in lines if not ((found := re.match(r"\s+((?:i|live)_\w+) = ", x))
                                             and len(re.findall(rf"\b{found[1]}\b", text)) == 1)]
            if len(kept) == len(lines):
                return f"@gluon.jit\n{head}\n" + ("\n".join(lines) or "    pass")
            lines = kept
