"""What threads hold of a reduction: each its part, until somebody reads the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memcomp.codegen.cuda.express import Point, number
from memcomp.ir.expr import Access, Call, Const, Expr, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.target import INTEGERS

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer

_JOIN = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "and": "And", "or": "Or"}
AGAIN = ("max", "min", "and", "or")   # joining a number to itself changes nothing
_SIGNS = {"sum": "+", "prod": "*", "and": "&", "or": "|", "add": "+", "sub": "-"}


@dataclass(frozen=True, slots=True)
class Partial:
    """Of a reduction each thread has a part: those that differ in these bits of their numbers join theirs.

    tiles: of lists of the best, the two tiles that are one list, and the dim that counts it."""

    monoid: str
    mask: int
    tiles: tuple[str, str, str] = ("", "", "")


class Sums:
    """The tiles of a kernel that threads hold in parts, at the line that is written next."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        self.pending: dict[str, Partial] = {}

    def reads(self, *read: Expr | None) -> list[str]:
        return [n.tensor for e in read if e is not None for n in walk(e)
                if isinstance(n, Access) and n.tensor in self.w.scope.tiles]

    def settle(self, *read: Expr | None) -> None:
        """Join the tiles that these expressions read."""
        for t in dict.fromkeys(self.reads(*read)):
            if t in self.pending:
                self.join(t)

    def join(self, tile: str) -> None:
        part = self.pending.pop(tile, None)
        w = self.w
        if part is None:
            return  # with the other tile of a list
        if part.monoid == "best":
            for t in part.tiles[:2]:
                self.pending.pop(t, None)
            w.bests.join(part)
            return
        w.line(f"combine<{_JOIN[part.monoid]}, {part.mask}, {w.block.warps}>({w.names[tile]}, {w.rooms}, {w.turn});")

    def divide(self, tile: str, part: Partial) -> None:
        """Leave what a tile holds to one of the threads that hold it."""
        if part.monoid == "best":
            if self.pending.get(tile) != part:
                self.w.bests.empty(part, f"{self.w.thread} & {part.mask}")
                self.pending |= dict.fromkeys(part.tiles[:2], part)
            return
        if part.monoid not in AGAIN:
            name, zero = self.w.names[tile], identity(part.monoid, self.w.scope.tiles[tile])
            self.w.unrolled("i", self.w.block.registers(self.w.k.tile(tile).dims),
                            f"{name}[i] = {self.w.thread} & {part.mask} ? {zero} : {name}[i];")
        self.pending[tile] = part

    def linear(self, e: Expr) -> bool:
        """Is an expression a sum of terms with one pending tile at most, each as it is or scaled?"""
        if not set(self.reads(e)) & set(self.pending) or isinstance(e, Access):
            return True
        if not isinstance(e, Call):
            return False
        if e.op in ("add", "sub", "neg"):
            return all(self.linear(a) for a in e.args)
        waits = [a for a in e.args if set(self.reads(a)) & set(self.pending)]
        if e.op == "mul":
            return len(waits) == 1 and self.linear(waits[0])
        return e.op == "where" and e.args[0] not in waits and all(self.linear(a) for a in e.args[1:])

    def partial(self, e: Expr, kind: str, at: Point, part: Partial) -> str:
        """The thread's part of an expression that is `linear`: what is whole counts in one thread."""
        if not set(self.reads(e)) & set(self.pending):
            if e in (Const(0), Const(0.0)):
                return number(0.0, kind)
            return f"({self.w.thread} & {part.mask} ? {number(0.0, kind)} : {self.w.scope.cast(e, kind, at)})"
        if isinstance(e, Access):
            return self.w.scope.cast(e, kind, at)
        assert isinstance(e, Call)
        if e.op == "neg":
            return f"(-{self.partial(e.args[0], kind, at, part)})"
        if e.op == "where":
            a, b = (self.partial(x, kind, at, part) for x in e.args[1:])
            return f"({self.w.scope.cast(e.args[0], 'bool', at)} ? {a} : {b})"
        if e.op == "mul":
            texts = [self.partial(a, kind, at, part) if set(self.reads(a)) & set(self.pending)
                     else self.w.scope.cast(a, kind, at) for a in e.args]
            return f"({' * '.join(texts)})"
        return f"({f' {_SIGNS[e.op]} '.join(self.partial(a, kind, at, part) for a in e.args)})"


def identity(monoid: str, kind: str) -> str:
    x = MONOIDS[monoid].identity
    if kind == "i64" and math.isinf(x):
        return number(INTEGERS["i64"][x > 0], "i64")
    return number(bool(x) if kind == "bool" else int(x) if kind == "i64" else float(x), kind)


def joined(monoid: str, kind: str, a: str, b: str) -> str:
    if monoid in ("max", "min"):
        word = {"max": ("highest", "most"), "min": ("lowest", "least")}[monoid][kind == "i64"]
        return f"{word}({a}, {b})"
    return f"{a} {_SIGNS[monoid]} {b}"
