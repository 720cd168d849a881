"""What a statement does where guards keep some points of a tile out: nothing special on tiles where they hold
everywhere, and on others a product stays one: an operand is 0 at such points, or what is added to a sum is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from memcomp.codegen.lower_limits import TRUE
from memcomp.codegen.lower_ops import Op
from memcomp.codegen.lower_start import Starts
from memcomp.ir.expr import Access, Const, Expr, Var, call, conjunction, reads, substitute, variables, walk
from memcomp.ir.tile import Dot, Map, Statement, Tile, When


class Masked(Starts):
    """Statements of one kernel at points that may not count."""

    def guarded(
        self, tests: tuple[Expr, ...], plain: tuple[Statement, ...],
        masked: Callable[[tuple[Expr, ...]], tuple[Statement, ...]],
    ) -> tuple[Statement, ...]:
        """`plain` on tiles where the tests hold everywhere, else `masked` by those that may fail: what holds of data is
        asked of a tile at once, before the rest is asked of its points."""
        by_data = tuple(t for t in tests if reads(t))
        rest = tuple(t for t in tests if t not in by_data)
        known = self.full(by_data) if by_data and rest else None
        if (full := self.full(tests)) == TRUE:
            return plain
        out = masked(tests)
        if known is not None:
            out = (When(known, masked(rest), out, spare=True),)
        return out if full is None else (When(full, plain, out, spare=True),)

    def kept_out(self, product: tuple[Statement, ...], tests: tuple[Expr, ...]) -> tuple[Statement, ...] | None:
        """A sum of products without the points where a test fails: an operand with all dims of the test is 0 there, and
        of sums that a test leaves out as a whole nothing is added.  None where a test is of other dims."""
        dot, *rest = product
        if not isinstance(dot, Dot):
            return None
        operands, out = [dot.a, dot.b], list[Statement]()
        late = tuple(t for t in tests if dot.accumulate and not variables(t) & set(dot.over))
        masks: tuple[list[Expr], ...] = ([], [])
        for t in (t for t in tests if t not in late):
            whole = [m for m, x in zip(masks, operands, strict=True) if variables(t) & set(self.g.dims) <= variables(x)]
            if not whole:
                return None
            whole[0].append(t)
        for n, (m, x) in enumerate(zip(masks, tuple(operands), strict=True)):
            if m:
                operands[n] = self._beside(x, "live")
                out.append(Map(operands[n].tensor, call("where", every(tuple(m)), x, self._zero(x))))
        if not late:
            return (*out, replace(dot, a=operands[0], b=operands[1]), *rest)
        own = Access(dot.tile, tuple(Var(d) for d in self._tile(dot.tile).dims))
        part = self._beside(own, "part")
        return (*out, replace(dot, tile=part.tensor, a=operands[0], b=operands[1], accumulate=False),
                Map(dot.tile, call("add", own, call("where", every(late), part, self._zero(own)))))

    def _beside(self, a: Access, what: str) -> Access:
        """A tile like that of `a`, for what is made of it."""
        key, like = f"{what} {a.tensor}", self._tile(a.tensor)
        if key not in self.tiles:
            self.tiles[key] = replace(like, name=self.fresh(f"{a.tensor}_{what}"))
        return Access(self.tiles[key].name, a.index)

    def _zero(self, a: Access) -> Const:
        return Const(0 if self.dtype_of(a) == "i64" else 0.0)

    def _tile(self, name: str) -> Tile:
        return next(t for t in self.tiles.values() if t.name == name)

    def pinned(self, o: Op, name: str, body: Expr, tests: tuple[Expr, ...]) -> tuple[Statement, ...]:
        """The sum of what is the same at all points of a dim, where a test names one of them: that, if it is there."""
        if o.monoid != "sum" or len(o.over) != 1 or variables(body) & set(o.over):
            return ()
        (d,) = o.over
        at, test = next(((x, t) for t in tests if (x := self.named(t, d)) is not None), (None, None))
        if at is None:
            return ()
        own = Access(name, tuple(Var(x) for x in o.dims))
        others = [t for t in tests if t is not test]
        if any(isinstance(n, Access) and d in variables(n) for t in others for n in walk(t)):
            return ()  # a tile is read at its own points
        rest = tuple(substitute(t, {Var(d): at}) for t in others)
        there = every((call("ge", at, 0), call("lt", at, self.g.dims[d].count), *rest))
        value = call("where", there, body, self._zero(own))
        return (Map(name, call("add", own, value) if o.accumulate else value),)

    def dtype_of(self, a: Access) -> str:
        return self._tile(a.tensor).dtype


def every(tests: tuple[Expr, ...]) -> Expr:
    """All of one test and more hold."""
    out = conjunction(tests)
    assert out is not None
    return out
