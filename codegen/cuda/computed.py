"""What a kernel computes of what it holds: element-wise, and reductions, of which each thread has a part (`sums`)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from memcomp.codegen.cuda.express import CTYPES, Point
from memcomp.codegen.cuda.inline import substituted
from memcomp.codegen.cuda.sums import AGAIN, Partial, identity, joined
from memcomp.ir.expr import Access, Call, Expr, variables
from memcomp.ir.tile import Fold, Map

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer


class Computed:
    """Maps and folds of one kernel."""

    def __init__(self, w: Writer) -> None:
        self.w = w

    def map(self, s: Map) -> None:
        if s.tile in self.w.inline:
            return
        w = self.w
        dims, kind = w.k.tile(s.tile).dims, w.scope.tiles[s.tile]
        w.scope.real = kind if kind == "f64" else "f32"
        parts = {w.sums.pending[t] for t in w.sums.reads(s.body) if t in w.sums.pending}
        lazy = bool(w.open) and len(parts) == 1 and w.sums.linear(s.body)
        part = next(iter(parts)) if lazy else None
        if part is None or part.monoid != "sum" or part.mask & w.block.mask(dims):
            part = None
            w.sums.settle(s.body)
        with w.points(dims) as at:
            text = w.scope.cast(s.body, kind, at) if part is None else w.sums.partial(s.body, kind, at, part)
            w.line(f"{w.place(s.tile, at)} = {text};")
        w.scope.real = "f32"
        w.sums.pending.pop(s.tile, None)
        if part is not None:
            w.sums.pending[s.tile] = part

    def fold(self, s: Fold) -> None:
        w, dims, kind = self.w, self.w.k.tile(s.tile).dims, self.w.scope.tiles[s.tile]
        w.scope.real = kind if kind == "f64" else "f32"
        fresh = {d for t in w.sums.reads(s.body) if t in w.inline for d in w.k.tile(t).dims}
        body = substituted(s.body, w.inline)
        w.sums.settle(body)
        part, own = Partial(s.monoid, w.block.mask(s.over)), w.sums.pending.get(s.tile)
        zero = identity(s.monoid, kind)
        once = ""   # the condition under which a thread adds what others hold as well
        if s.accumulate:
            again = s.monoid in AGAIN
            if own is not None and (own.monoid != s.monoid or not (again or own == part or not part.mask)):
                w.sums.join(s.tile)
                own = None
            if own is None and part.mask and not again:
                w.sums.divide(s.tile, part)
            if own is not None:
                once = f"{w.thread} & {own.mask}" if not part.mask and not again else ""
                part = Partial(s.monoid, own.mask | part.mask)
        plain = s.accumulate and not once
        # what is computed here serves all rows that it is multiplied with
        with w.points(tuple(sorted(dims, key=lambda d: d not in fresh)), names=not plain) as at:
            place = w.place(s.tile, at)
            total = place if plain else w.names["total"]
            if not plain:
                w.line(f"{CTYPES[kind]} {total} = {zero};")
            self.reduce(replace(s, body=body), at, total, kind, zero)
            if not plain:
                value = f"({once} ? {zero} : {total})" if once else total
                w.line(f"{place} = {joined(s.monoid, kind, place, value) if s.accumulate else value};")
        w.scope.real = "f32"
        w.sums.pending.pop(s.tile, None)
        if part.mask:
            w.sums.pending[s.tile] = part

    def reduce(self, s: Fold, at: Point, total: str, kind: str, zero: str) -> None:
        """What a thread has of a reduction at one point.

        Of a sum of products, the factors that neighbours share (a scale of 32 numbers) are multiplied once with the sum
        of these neighbours; or once with what else is alike for them.
        """
        w, found = self.w, self.factors(s, kind)
        over = next((d for d in reversed(s.over) if 0 < len(self.alike(found, d)) < len(found)), "")
        if over:
            shared = self.alike(found, over)
            rest = [f for f in found if f not in shared]
            run = math.gcd(w.block.dims[over].registers, *(self.run(f, over) for f in shared))
            part, outer_dims = w.names["part"], (*(d for d in s.over if d != over), over)
            with w.points(outer_dims, names=True, runs={over: ("", run)}) as outer:
                w.line(f"{CTYPES[kind]} {part} = {zero};")
                with w.points((over,), runs={over: (outer[over], run)}) as inner:
                    every = {**at, **outer, **inner}
                    w.line(f"{part} = {part} + {self.term(s, rest, kind, every, zero)};")
                # where none of them counts, nor does what they share, which may be infinite there
                counted = self.guarded(s, f"{self.product(shared, kind, {**at, **outer})} * {part}", outer, zero)
                w.line(f"{total} = {total} + {counted};")
            return
        if along := next((d for d in at if 1 < len(self.alike(found, d)) < len(found)), ""):
            shared = self.alike(found, along)   # first, so that their product is one for all neighbours
            found = shared + [f for f in found if f not in shared]
        with w.points(s.over) as inner:
            every = {**at, **inner}
            w.line(f"{total} = {joined(s.monoid, kind, total, self.term(s, found, kind, every, zero))};")

    def alike(self, found: list[Expr], dim: str) -> list[Expr]:
        """The factors that neighbours along a dim share."""
        return [f for f in found if self.w.block.dims[dim].registers > 1 and self.run(f, dim) != 1]

    def term(self, s: Fold, found: list[Expr], kind: str, at: Point, zero: str) -> str:
        return self.guarded(s, self.product(found, kind, at), at, zero)

    def guarded(self, s: Fold, value: str, at: Point, zero: str) -> str:
        tests = self.w.live(s.over, at)
        return f"({' && '.join(tests)} ? {value} : {zero})" if tests else value

    def product(self, found: list[Expr], kind: str, at: Point) -> str:
        texts = [self.w.scope.cast(f, kind, at) for f in found]
        return f"({' * '.join(texts)})" if len(texts) > 1 else texts[0]

    def factors(self, s: Fold, kind: str) -> list[Expr]:
        """Of the products that are summed up; the body alone of another reduction."""
        def split(e: Expr) -> list[Expr]:
            if isinstance(e, Call) and e.op == "mul" and self.w.scope.type(e) == kind:
                return [x for a in e.args for x in split(a)]
            return [e]

        return split(s.body) if s.monoid == "sum" else [s.body]

    def run(self, e: Expr, dim: str) -> int:
        """How many neighbours along a dim an expression is alike for; 0: for all."""
        if dim not in variables(e):
            return 0
        if isinstance(e, Access):
            row = self.w.rows.get(e.tensor)
            return row.share if row is not None and row.dim == dim else 1
        return math.gcd(*(self.run(a, dim) for a in e.args)) if isinstance(e, Call) else 1
