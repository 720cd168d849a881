"""argmax, argmin and top-k spelled with max, min and choices, which every backend knows."""

from __future__ import annotations

import math
from dataclasses import replace

from memcomp.ir.cascade import Cascade, Einsum, Reduce, Tensor, extent_of
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, substitute, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import Program
from memcomp.passes._ranks import unused


def spell_places(program: Program) -> Program:
    """Reductions with places become reductions with one result.

    The place is the least index among those that hold the value, so ties take the lowest; a NaN is the greatest value
    and the least.  Each of the k greatest is the greatest of what comes after the one before it.  Raises Refusal for a
    top-k whose k is no number.

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
    c = program.cascade
    if all(len(e.outs) == 1 for e in c.einsums):
        return program
    s = _Spelling(c)
    for e in c.einsums:
        if len(e.outs) == 2 and e.reduce is not None and MONOIDS[e.reduce.monoid].outs == 2:
            s.spell(e, e.reduce)
        else:
            s.done.append(e)
    s.align()
    return replace(program, cascade=replace(c, tensors=(*c.tensors, *s.tensors), einsums=tuple(s.done)))


class _Spelling:
    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.done: list[Einsum] = []
        self.tensors: list[Tensor] = []
        self.chosen: dict[Access, Access] = {}
        self.taken = {t.name for t in c.tensors} | {n for e in c.einsums for n in e.names}

    def spell(self, e: Einsum, reduce: Reduce) -> None:
        value, place = e.outs
        if self.c.declared(place.tensor.removesuffix("'")) is None:
            self.tensors.append(Tensor(place.tensor, _ranks(place), "i64", "temp", 0.0))
        least = reduce.monoid == "argmin"
        x = self._named(e, reduce, math.inf if least else -math.inf)
        if reduce.monoid != "topk":
            self._best(value, place, x, None, e, reduce)
            return
        order = value.index[-1]
        k = extent_of(self.c, order.name.upper()) if isinstance(order, Var) else None
        if k is None or not isinstance(order, Var):
            raise Refusal(f"{value.tensor} keeps a number of values that only the call knows", value.tensor)
        found: list[tuple[Access, Access]] = []
        for j in range(k):
            best, at = (self._temporary(f"{o.tensor}{j}_", o.index[:-1], d)
                        for o, d in zip(e.outs, (self._dtype(value.tensor), "i64"), strict=True))
            self._best(best, at, x, found[-1] if found else None, e, reduce)
            found.append((best, at))
        for o, several in zip(e.outs, zip(*found, strict=True), strict=True):
            body: Expr = several[-1]
            for j in reversed(range(k - 1)):
                body = Call("where", (Call("eq", (order, Const(j))), several[j], body))
            self.done.append(Einsum((o,), body))

    def _named(self, e: Einsum, reduce: Reduce, outside: float) -> Expr:
        """The reduced value, which is read several times, as a tensor of its own."""
        if isinstance(e.body, Access):
            return e.body
        order = e.out.index[-1] if reduce.monoid == "topk" else None
        vs = [v for v in e.space() if Var(v) != order]
        x = Access(self._fresh("X" + e.out.tensor), tuple(Var(v) for v in vs))
        self.tensors.append(Tensor(x.tensor, tuple(v.upper() for v in vs), "f32", "temp", outside))
        self.done.append(Einsum((x,), e.body, None, e.guard))
        return x

    def _best(self, value: Access, place: Access, x: Expr, before: tuple[Access, Access] | None, e: Einsum,
              reduce: Reduce) -> None:
        """The best of the points after `before`, and the first place that holds it."""
        index, last = self._index(reduce.over)
        monoid = "min" if reduce.monoid == "argmin" else "max"
        hit: Expr = call("or", call("eq", x, value), call("ne", x, x))
        body = x
        if before is not None:
            old, at = before
            later = call("gt", index, at)
            rest = call("or", call("or", call("lt", x, old), call("and", call("eq", x, old), later)),
                        call("and", call("ne", old, old), call("or", call("eq", x, x), later)))
            body, hit = call("where", rest, x, Const(MONOIDS[monoid].identity)), call("and", rest, hit)
        first = self._temporary("F" + place.tensor, place.index, "i64")
        self.done += [
            Einsum((value,), body, Reduce(monoid, reduce.over), e.guard),
            Einsum((first,), call("where", hit, index, last), Reduce("min", reduce.over), e.guard),
            Einsum((place,), call("min", first, last)),
        ]

    def align(self) -> None:
        """A list that is written in one order rank and read in another (the list before and after a step) is read by
        choosing, so that a task holds it once."""
        orders = {i.name for e in self.c.einsums if e.reduce is not None and e.reduce.monoid == "topk"
                  for i in e.out.index[-1:] if isinstance(i, Var)}
        last: dict[str, Var] = {}
        for e in self.done:
            if e.out.index and isinstance(e.out.index[-1], Var) and e.out.index[-1].name in orders:
                last[e.out.tensor] = e.out.index[-1]
        before, self.done = self.done, []
        for e in before:
            if (own := last.get(e.out.tensor)) is not None and e.out.index[-1] != own:
                table: dict[Expr, Expr] = {e.out.index[-1]: own}
                e = Einsum(tuple(Access(o.tensor, (*o.index[:-1], own)) for o in e.outs), substitute(e.body, table),
                           e.reduce, None if e.guard is None else substitute(e.guard, table))
            for a in dict.fromkeys(n for n in walk(e.body) if isinstance(n, Access) and n.tensor in last
                                   and n.index[-1] != last[n.tensor] and isinstance(n.index[-1], Var)):
                e = replace(e, body=substitute(e.body, {a: self._chosen(a, last[a.tensor])}))
            self.done.append(e)

    def _chosen(self, a: Access, own: Var) -> Access:
        if a in self.chosen:
            return self.chosen[a]
        dtype = self._dtype(a.tensor)
        monoid = "sum" if dtype == "i64" else "max"
        none = Const(0) if dtype == "i64" else Const(-math.inf)
        out = self._temporary(f"{a.tensor}_at", a.index, dtype)
        x = Call("where", (Call("eq", (own, a.index[-1])), Access(a.tensor, (*a.index[:-1], own)), none))
        self.done.append(Einsum((out,), x, Reduce(monoid, (own.name,))))
        self.chosen[a] = out
        return out

    def _index(self, over: tuple[str, ...]) -> tuple[Expr, Expr]:
        """The row-major index over the reduced variables, and the greatest it can be."""
        index: Expr = Var(over[0])
        size: Expr = Size(over[0].upper())
        for v in over[1:]:
            index = call("add", call("mul", index, Size(v.upper())), Var(v))
            size = call("mul", size, Size(v.upper()))
        return index, call("sub", size, Const(1))

    def _dtype(self, name: str) -> str:
        t = self.c.declared(name.removesuffix("'"))
        return "f32" if t is None else t.dtype

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
