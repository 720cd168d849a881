"""argmax and argmin spelled with max, min and choices, which every backend knows."""

from __future__ import annotations

import math
from dataclasses import replace

from memcomp.ir.cascade import Cascade, Einsum, Reduce, Tensor, extent_of
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, Var, call, walk
from memcomp.ir.places import declared, order_of, row_major
from memcomp.ir.program import Program
from memcomp.passes._ranks import unused


def spell_places(program: Program) -> Program:
    """Reductions with one value and its place become two reductions.

    The place is the least index among those that hold the value, so ties take the lowest; a NaN is the greatest value
    and the least.  A top-k stays as it is, its places integers.  Raises Refusal for one whose k is no number.

    before:
        program p
        rank B
        rank M
        in X[B, M]: f32
        out V[B]: f32
        out I[B]: i64
        V[b], I[b] = argmax{m} X[b, m]
    after:
        program p
        rank B
        rank M
        in X[B, M]: f32
        out V[B]: f32
        out I[B]: i64
        temp FI[B]: i64
        V[b] = max{m} X[b, m]
        FI[b] = min{m} where(X[b, m] == V[b] or X[b, m] != X[b, m], m, M - 1)
        I[b] = min(FI[b], M - 1)
    """
    c = declared(program.cascade)
    s = _Spelling(c)
    for e in c.einsums:
        if len(e.outs) == 1 or e.reduce is None:
            s.done.append(e)
        elif (order := order_of(e)) is None:
            s.spell(e, e.reduce)
        elif extent_of(c, order.upper()) is None:
            raise Refusal(f"{e.out.tensor} keeps a number of values that only the call knows", e.out.tensor)
        else:
            s.done.append(e)
    if c is program.cascade and s.done == [*c.einsums]:
        return program
    return replace(program, cascade=replace(c, tensors=(*c.tensors, *s.tensors), einsums=tuple(s.done)))


class _Spelling:
    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.done: list[Einsum] = []
        self.tensors: list[Tensor] = []
        self.taken = {t.name for t in c.tensors} | {n for e in c.einsums for n in e.names}

    def spell(self, e: Einsum, reduce: Reduce) -> None:
        value, place = e.outs
        if self.c.declared(place.tensor.removesuffix("'")) is None:
            self.tensors.append(Tensor(place.tensor, _ranks(place), "i64", "temp", 0.0))
        least = reduce.monoid == "argmin"
        x = self._named(e, reduce, math.inf if least else -math.inf)
        self._best(value, place, x, e, reduce)

    def _named(self, e: Einsum, reduce: Reduce, outside: float) -> Expr:
        """The reduced value, which is read several times, as a tensor of its own."""
        if isinstance(e.body, Access):
            return e.body
        vs = e.space()
        x = Access(self._fresh("X" + e.out.tensor), tuple(Var(v) for v in vs))
        self.tensors.append(Tensor(x.tensor, tuple(v.upper() for v in vs), "f32", "temp", outside))
        self.done.append(Einsum((x,), e.body, None, e.guard))
        return x

    def _best(self, value: Access, place: Access, x: Expr, e: Einsum, reduce: Reduce) -> None:
        """The best of the points, and the first place that holds it."""
        index, size = row_major(reduce.over)
        last = call("sub", size, Const(1))
        monoid = "min" if reduce.monoid == "argmin" else "max"
        hit: Expr = call("or", call("eq", x, value), call("ne", x, x))
        first = self._temporary("F" + place.tensor, place.index, "i64")
        self.done += [
            Einsum((value,), x, Reduce(monoid, reduce.over), e.guard),
            Einsum((first,), call("where", hit, index, last), Reduce("min", reduce.over), e.guard),
            Einsum((place,), call("min", first, last)),
        ]

    def _temporary(self, name: str, index: tuple[Expr, ...], dtype: str) -> Access:
        """A temporary over the variables of an index."""
        out = Access(self._fresh(name), tuple(dict.fromkeys(n for i in index for n in walk(i) if isinstance(n, Var))))
        self.tensors.append(Tensor(out.tensor, _ranks(out), dtype, "temp", 0.0))
        return out

    def _fresh(self, stem: str) -> str:
        name = unused(stem, self.taken)
        self.taken.add(name)
        return name


def _ranks(a: Access) -> tuple[str, ...]:
    return tuple(i.name.upper() for i in a.index if isinstance(i, Var))
