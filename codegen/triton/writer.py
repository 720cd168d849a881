"""One launch as Triton text: its grid, the points that count, its statements in their order, and its loops.

A loop whose tiles are full, or whose branches go one way, from some step on or up to some step is written as up to
three loops (`parts`), so that the long one has no masks.
"""

from __future__ import annotations

import re
from dataclasses import replace

from memcomp.codegen.order import TASK, numbered, tasks
from memcomp.codegen.triton.best import best
from memcomp.codegen.triton.express import dims_of
from memcomp.codegen.triton.layout import Axis
from memcomp.codegen.triton.parts import Part, parts
from memcomp.codegen.triton.values import Values
from memcomp.ir.expr import Access, Expr, variables, walk
from memcomp.ir.tile import Best, Dot, Fold, Load, Loop, Map, Statement, Store, When, statements


class Writer(Values):
    """Text of one launch."""

    # -- the function ------------------------------------------------------------------------------------------------

    def kernel(self, name: str) -> str:
        for a in self.layout.axes:
            self._axis(a)
        self._grid()
        inside = {s.var for s in statements(self.k.body) if isinstance(s, Loop)}
        self._counts([a for a in self.layout.axes if not self._changes(a, inside)])
        self.body(self.k.body)
        args = ", ".join(self.names[a.name] for a in self.given.args)
        text = "\n".join(self.lines)
        self.lines = [line for line in self.lines if not self._idle(line, text)]
        return f"@triton.jit\ndef {name}({args}):\n" + ("\n".join(self.lines) or "    pass")

    def _idle(self, line: str, text: str) -> bool:
        """Is the line the definition of an index that nothing reads?"""
        found = re.match(r"\s+([in]_\w+) = tl\.(arange|full)", line)
        return bool(found) and len(re.findall(rf"\b{found[1] if found else ''}\b", text)) == 1

    def _grid(self) -> None:
        """What the program instance works on: a task, or in turns tasks as far apart as there are instances."""
        if self.setting.programs and self.k.grid:
            total = self.scope.scalar(tasks(self.k))
            # the copies of a task's loops are not to be made ahead of the task
            steps = f"tl.range(tl.program_id(0), {total}, tl.num_programs(0), num_stages=1)"
            self.line(f"for {self.names[TASK]} in {steps}:")
            self.depth = self.top = 2
        elif self.k.grid:
            self.line(f"{self.names[TASK]} = tl.program_id(0)")
        for name, e in numbered(self.k, self.order):
            self.line(f"{self.names[name]} = {self.scope.scalar(e)}")

    def _axis(self, a: Axis) -> None:
        name = self.names[f"i_{a.name}"]
        self.line(f"{name} = {self.points(a)}")
        step = 1
        for d in reversed(a.dims if len(a.dims) > 1 else ()):
            size = self.k.dim(d).capacity
            at = name if step == 1 else f"{name} // {step}"
            self.line(f"{self.names[f'i_{a.name}__{d}']} = ({at}) % {size}")
            step *= size

    def points(self, a: Axis) -> str:
        """The numbers of an axis' points."""
        return f"tl.arange(0, {a.size})"

    def _changes(self, a: Axis, names: set[str]) -> bool:
        return any(variables(self.k.dim(d).count) & names for d in a.dims)

    def _counts(self, axes: list[Axis]) -> None:
        """The points of each axis that count, where they are not all."""
        for a in axes:
            if a.name in self.full:
                continue
            tests = [f"{self.names[f'i_{a.name}']} < {a.points}"] if a.points < a.size and len(a.dims) > 1 else []
            for d in a.dims:
                dim = self.k.dim(d)
                if not self._filled(dim) or (len(a.dims) == 1 and a.points < a.size):
                    tests.append(f"{self.scope.local(d, (a,))} < {self.scope.scalar(dim.count)}")
            test = " & ".join(f"({t})" if len(tests) > 1 else t for t in tests)
            self.line(f"{self.names[f'live_{a.name}']} = {test}")

    # -- statements --------------------------------------------------------------------------------------------------

    def body(self, body: tuple[Statement, ...]) -> None:
        for n, s in enumerate(body):
            if self.depth == self.top:
                self.memory.describe(s)
            if isinstance(s, Loop):
                self.loop(s)
            elif isinstance(s, When):
                self.when(s)
            elif isinstance(s, Store):
                self.memory.store(s)
            elif isinstance(s, Load):
                self.memory.load(s)
                own = dims_of(s.source, self.scope.dims)
                self.dead.set(s.tile, {a: 0.0 for a in self.scope.tiles[s.tile] if own & set(a.dims)}.get)
            elif isinstance(s, Map):
                self.map(s, body[n + 1:])
            elif isinstance(s, Fold):
                self.fold(s)
            elif isinstance(s, Best):
                best(self, s)
            else:
                self.dot(s)

    def when(self, s: When) -> None:
        self.line(f"if {self.scope.scalar(s.cond)}:")
        before = dict(self.dead.held)
        self._block(s.body)
        after, self.dead.held = self.dead.held, before
        if s.orelse:
            self.line("else:")
            self._block(s.orelse)
        self.dead.held = dict(self.dead.held.items() & after.items())

    def _block(self, body: tuple[Statement, ...]) -> None:
        self.depth += 1
        self.body(body)
        if not body:
            self.line("pass")
        self.depth -= 1

    def loop(self, s: Loop) -> None:
        lo, hi = self.end(s.lo), self.end(s.hi)
        changing = [a for a in self.layout.axes if self._changes(a, {s.var})]
        pieces = parts(self.k, s)
        if self.specialises(s.body):   # Triton takes one loop, so every step has masks
            pieces = [replace(next((p for p in pieces if p.edge), pieces[0]), end=None, edge=False)]
        ends = [lo]
        for p in pieces:
            end = hi
            if p.end is not None:
                end = self.names.fresh("end")
                self.line(f"{end} = tl.minimum(tl.maximum({self.end(p.end)}, {ends[-1]}), {hi})")
            ends.append(end)
        for p, start, end in zip(pieces, ends, ends[1:], strict=False):
            self._part(s, p, start, end, changing)

    def specialises(self, body: tuple[Statement, ...]) -> bool:
        """Do some warps fetch what others compute with?  Where tensor cores do the work and descriptors bring it."""
        return self.setting.specialised and self.boxed and any(
            isinstance(x, Dot) and self.multiplied(x) for x in statements(body))

    def end(self, e: Expr) -> str:
        """An end of a loop.  Steps are counted in 32 bits, as sizes are; data have 64."""
        text = self.scope.scalar(e)
        if not any(isinstance(n, Access) for n in walk(e)):
            return text
        return f"tl.cast({self.scope.word('least')}({self.scope.word('most')}({text}, 0), {2**31 - 1}), tl.int32)"

    def _part(self, s: Loop, p: Part, lo: str, hi: str, changing: list[Axis]) -> None:
        before = set(self.full)
        self.full |= {a.name for a in changing if a.points == a.size and set(a.dims) <= p.full}
        self._loop(s.var, lo, hi, p.body, changing, p.edge)
        self.full = before

    def _loop(self, var: str, lo: str, hi: str, body: tuple[Statement, ...], changing: list[Axis],
              edge: bool) -> None:
        self.line(f"for {self.names[var]} in {self.steps(lo, hi, body, edge)}:")
        self.depth += 1
        self.dead.forget(body, changing)
        self._counts(changing)
        self.body(body)
        if not body:
            self.line("pass")
        self.depth -= 1

    def steps(self, lo: str, hi: str, body: tuple[Statement, ...], edge: bool) -> str:
        """What a loop runs over.  Triton fetches ahead by itself only what feeds tensor cores; elsewhere it is told.

        The addresses of two loops that fetch ahead are more than there are registers: without descriptors the few steps
        at the edges of a loop with products wait instead.
        """
        inner = list(statements(body))
        if self.specialises(body):
            return f"tl.range({lo}, {hi}, warp_specialize=True)"
        if edge and not self.boxed and any(isinstance(s, Dot) for s in inner):
            return f"tl.range({lo}, {hi}, num_stages=1)"
        if self.setting.stages > 1 and any(isinstance(s, Load) for s in inner) and not any(
                isinstance(s, (Loop, When)) or (isinstance(s, Dot) and self.multiplied(s)) for s in inner):
            return f"tl.range({lo}, {hi}, num_stages={self.setting.stages})"
        return f"range({lo}, {hi})"
