"""Concatenation: pieces stay known, and an element of the whole is a choice between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memcomp.capture.extent import Extent, expression, product, same
from memcomp.capture.masks import Reading, make
from memcomp.capture.value import ZERO, Dim, Factor, Index, Pieces, Value, align, coarse
from memcomp.ir.expr import Const, Expr, call, reads


def cat(r: Reading, values: Sequence[Value], dim: int) -> Value:
    """The values one after the other along `dim`.

    A first integer piece of one element that the formula of the second gives too is merged with it.
    """
    some = [coarse(v, dim) for v in values if not any(same(e, 0) for e in v.shape)] or [coarse(values[0], dim)]
    if len(some) == 1:
        return some[0]
    columns = [align([v.dims[k] for v in some]) for k in range(len(some[0].dims)) if k != dim]
    starts: list[Extent] = [0]
    for v in some:
        starts.append(product(1, starts[-1] + v.shape[dim]))
    dims: list[Dim] = [d for d, _ in columns]
    dims.insert(dim, (Factor(starts[-1]),))
    place = sum(len(d) for d in dims[:dim])

    def read(k: int, ix: Index, i: Expr) -> Expr:
        """Element i of piece k."""
        out: list[Expr] = []
        at, column = 0, 0
        for n, d in enumerate(dims):
            if n == dim:
                out.append(i)
            else:
                out += columns[column][1][k](ix[at:at + len(d)])
                column += 1
            at += len(d)
        return some[k].at(tuple(out))

    def held(k: int, ix: Index, i: Expr) -> Expr:
        """Element i of piece k; where tensors are read, the index stays inside also where another piece is chosen."""
        e = read(k, ix, i)
        if not reads(e):
            return e
        if k > 0:
            i = call("max", i, ZERO)
        if k + 1 < len(some):
            i = call("min", i, call("sub", expression(some[k].shape[dim]), Const(1)))
        return read(k, ix, r.simplify(i))

    def at(ix: Index) -> Expr:
        i = ix[place]
        last = len(some) - 1
        out = held(last, ix, r.simplify(call("sub", i, expression(starts[last]))))
        if last == 1 and same(starts[1], 1) and not some[0].is_real and r.simplify(
                call("sub", read(1, ix, Const(-1)), read(0, ix, ZERO))) == ZERO:
            return read(1, ix, r.simplify(call("sub", i, 1)))
        for k in reversed(range(last)):
            here = held(k, ix, i if k == 0 else r.simplify(call("sub", i, expression(starts[k]))))
            out = make("where", call("lt", i, expression(starts[k + 1])), here, out)
        return out

    return Value(tuple(dims), some[0].dtype, at, Pieces(dim, tuple(some)) if some[0].is_real else None)


def each(v: Value, f: Callable[[Value], Value], r: Reading) -> Value:
    """`f` applied to every piece of `v`."""
    assert v.pieces is not None
    return cat(r, [f(p) for p in v.pieces.values], v.pieces.dim)
