"""An output that is put together from pieces: each piece is written to its own place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from memcomp.capture.extent import expression, product
from memcomp.capture.reader import DTYPE, Reader
from memcomp.capture.value import Value, join
from memcomp.ir.cascade import Einsum, Tensor
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, Var, call, substitute


def put_together(r: Reader, v: Value, name: str) -> Tensor:
    """Statements that write the pieces of `v` to slices of an out-tensor; the last statement of a piece writes there
    itself where nothing else reads its result."""
    dtype = DTYPE.get(v.dtype)
    if dtype is None:
        raise Refusal(f"an output of {v.dtype}", hint=f"known: {', '.join(DTYPE.values())}")
    writer = {n: k for k, s in enumerate(r.statements) for n in s.names}
    read = Counter(t for s in r.statements for t in s.reads())
    elements: list[tuple[Expr, tuple[Expr, ...]]] = []
    for piece, offset in _pieces(v, (Const(0),) * len(v.dims)):
        axes = r.axes(piece.factors, _hints(len(piece.factors)), set())
        ix = tuple(Var(str(f.rank).lower()) for f in axes)
        e = r.simplify(piece.at(ix))
        inner = (join([(i, f.extent) for i, f in zip(own, d, strict=True)])
                 for own, d in zip(piece.split(ix), piece.dims, strict=True))
        elements.append((e, tuple(r.simplify(call("add", i, start)) for i, start in zip(inner, offset, strict=True))))
        read.update([e.tensor] if isinstance(e, Access) else [])
    last = [writer[e.tensor] if isinstance(e, Access) and read[e.tensor] == 1 and _renames(r, writer, e) else None
            for e, _ in elements]
    r.names -= {n for k in last if k is not None for n in r.statements[k].names}
    name = r.fresh(name)
    for k, (e, index) in zip(last, elements, strict=True):
        if k is None or not isinstance(e, Access):
            r.statements.append(Einsum((Access(name, index),), e))
            continue
        s = r.statements[k]
        table: Mapping[Expr, Expr] = {o: i for o, i in zip(s.out.index, e.index, strict=True) if o != i}
        guard = None if s.guard is None else r.simplify(substitute(s.guard, table))
        r.statements[k] = Einsum((Access(name, index),), r.simplify(substitute(s.body, table)), s.reduce, guard)
    hints = _hints(len(v.dims))
    ranks = [r.rank(h, product(*(f.extent for f in d))) for h, d in zip(hints, v.dims, strict=True)]
    return Tensor(name, tuple(ranks), dtype, "out")


def _pieces(v: Value, offset: tuple[Expr, ...]) -> Iterator[tuple[Value, tuple[Expr, ...]]]:
    """The innermost pieces, and per dimension where each begins."""
    if v.pieces is None:
        yield v, offset
        return
    dim, at = v.pieces.dim, offset[v.pieces.dim]
    for piece in v.pieces.values:
        yield from _pieces(piece, (*offset[:dim], at, *offset[dim + 1:]))
        length = expression(piece.shape[dim])
        at = Const(at.value + length.value) if isinstance(at, Const) and isinstance(length, Const) else at + length


def _hints(n: int) -> list[str]:
    return [("B", "H", "P", "F")[k + max(0, 4 - n)] if k + max(0, 4 - n) < 4 else "X" for k in range(n)]


def _renames(r: Reader, writer: Mapping[str, int], e: Access) -> bool:
    """Is the element what its statement computes at its own variables, but for those of one point?"""
    if e.tensor not in writer or r.written[e.tensor].empty != 0:
        return False
    s = r.statements[writer[e.tensor]]
    return len(s.outs) == 1 and all(o == i or isinstance(o, Var) and i == Const(0) and r.ranges[o.name][1] == 1
                                    for o, i in zip(s.out.index, e.index, strict=True))
