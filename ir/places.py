"""What a reduction with places reduces: pairs of a value and its place, and what the result starts from.

`topk{m} at(X[p, m], I[m])` gives each point the place `I[m]`, where a plain body has the row-major index over the
reduced variables; points of a row have places of their own.  `topk{m} onto(X[p, m], V[p, k], I[p, k])` joins the points
to a list that was found before.  Both stand outermost, `onto` around `at`.  A list holds the greatest values in falling
order, a NaN before all others; of equal values the lower place comes first, so joining is associative and commutative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.cascade import Cascade, Einsum, Tensor, written_ranks
from memcomp.ir.expr import Call, Const, Expr, Size, Var, call
from memcomp.ir.ops import Monoid

MARKS = ("at", "onto")
LEAST, GREATEST = -(2**63), 2**63 - 1  # of integers: a list of them that holds nothing has LEAST at `tile.NOWHERE`


def integer(x: float) -> int:
    """A number as integers hold it; an infinity is the last of them."""
    return int(x) if math.isfinite(x) else LEAST if x < 0 else GREATEST


def whole(monoid: Monoid) -> Const:
    """What a reduction of integers starts from."""
    return Const(integer(monoid.identity))


@dataclass(frozen=True, slots=True)
class Placed:
    """The body of a reduction with places.  place: None where it is the row-major index; old: values and places."""

    value: Expr
    place: Expr | None = None
    old: tuple[Expr, Expr] | None = None

    def body(self) -> Expr:
        out = self.value if self.place is None else Call("at", (self.value, self.place))
        return out if self.old is None else Call("onto", (out, *self.old))


def placed(body: Expr) -> Placed:
    """The parts of a body."""
    old, place = None, None
    if isinstance(body, Call) and body.op == "onto":
        body, *both = body.args
        old = (both[0], both[1])
    if isinstance(body, Call) and body.op == "at":
        body, place = body.args
    return Placed(body, place, old)


def row_major(over: tuple[str, ...]) -> tuple[Expr, Expr]:
    """The row-major index over reduced variables, and the number of places."""
    index: Expr = Var(over[0])
    size: Expr = Size(over[0].upper())
    for v in over[1:]:
        index = call("add", call("mul", index, Size(v.upper())), Var(v))
        size = call("mul", size, Size(v.upper()))
    return index, size


def explicit(e: Einsum) -> Einsum:
    """A top-k with its places written out; another statement as it is."""
    if e.reduce is None or e.reduce.monoid != "topk":
        return e
    given = placed(e.body)
    if given.place is None:
        given = replace(given, place=row_major(e.reduce.over)[0])
    return replace(e, body=given.body())


def order_of(e: Einsum) -> str | None:
    """The variable that counts the results of a top-k; None of another statement."""
    last = e.out.index[-1] if e.reduce is not None and e.reduce.monoid == "topk" and e.out.index else None
    return last.name if isinstance(last, Var) else None


def declared(c: Cascade) -> Cascade:
    """With the places of every top-k declared: they are integers."""
    known, more = {t.name for t in c.tensors}, dict[str, Tensor]()
    for e in c.einsums:
        if order_of(e) is not None and (name := e.names[1]).removesuffix("'") not in known:
            if (ranks := written_ranks(e.outs[1])) is not None:
                more[name] = Tensor(name, ranks, "i64")
    return replace(c, tensors=(*c.tensors, *more.values())) if more else c


def ordered(values: npt.NDArray[Any], places: npt.NDArray[Any], *, rising: bool = False
            ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Pairs sorted along the last axis: the greatest value first (the least, if rising), the lower place of equal ones,
    a NaN before all others."""
    nan = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    falling = -values if values.dtype.kind == "f" else ~values  # -x is no integer where x is the least one
    keys = np.where(nan, 0, values if rising else falling)
    first = np.lexsort((places, keys, ~nan), axis=-1)
    return np.take_along_axis(values, first, -1), np.take_along_axis(places, first, -1)
