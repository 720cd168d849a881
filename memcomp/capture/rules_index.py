"""Sources of indices and constants, reads where another tensor says, and scans that fold to index arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memcomp.capture.extent import expression, same
from memcomp.capture.masks import make
from memcomp.capture.pieces import cat
from memcomp.capture.reader import Reader, whole
from memcomp.capture.rules_map import dtype_of
from memcomp.capture.rules_view import insert_unit, out_shape, select, slice_dim
from memcomp.capture.table import Rule
from memcomp.capture.value import ZERO, Index, Value, coarse, constant, plain, pointwise, reshape, shift, wrap
from memcomp.ir.cascade import Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Call, Const, Expr, Size, Var, conjunction, lift


def _arange(r: Reader, node: fx.Node, *args: Any, **kw: Any) -> Value:
    given = dict(zip(("end",) if len(args) == 1 else ("start", "end", "step"), args, strict=False))
    given.update({k: v for k, v in kw.items() if k in ("start", "end", "step")})
    start, step = given.get("start", 0), given.get("step", 1)
    dtype = dtype_of(node)
    if any(isinstance(x, (float, Value)) for x in (start, step)):
        raise Refusal("arange with real steps")
    a, s = lift(start), lift(step)

    def at(ix: Index) -> Expr:
        i = ix[0] if s == Const(1) else make("mul", ix[0], s)
        i = i if a == ZERO else make("add", i, a)
        return make("real", i) if dtype.is_floating_point else i

    return plain(out_shape(node), dtype, at)


def _fill(x: bool | int | float) -> Any:
    return lambda r, node, *args, **kw: constant(x, dtype_of(node), out_shape(node))


def _full(r: Reader, node: fx.Node, size: Any, fill_value: Any, **_: Any) -> Value:
    """full, full_like and new_full: the number is the last positional argument but for keywords."""
    return _numbers(node, fill_value)


def _filled(r: Reader, node: fx.Node, x: Value, value: Any) -> Value:
    return _numbers(node, value)


def _new_full(r: Reader, node: fx.Node, x: Value, size: Any, fill_value: Any, **_: Any) -> Value:
    return _numbers(node, fill_value)


def _numbers(node: fx.Node, x: Any) -> Value:
    if isinstance(x, (bool, int, float)):
        return constant(x, dtype_of(node), out_shape(node))
    if isinstance(x, Value) and not x.dims:
        return Value(plain(out_shape(node), x.dtype, lambda _: ZERO).dims, x.dtype, lambda _: x.at(()))
    raise Refusal("full with a run-time number")


def _tensor(r: Reader, node: fx.Node, data: Any, **_: Any) -> Value:
    if isinstance(data, (bool, int, float)):
        return constant(data, dtype_of(node), out_shape(node))
    raise Refusal("a tensor literal")


def _eye(r: Reader, node: fx.Node, *_: Any, **__: Any) -> Value:
    dtype = dtype_of(node)
    one, zero = constant(1, dtype).at(()), constant(0, dtype).at(())
    return plain(out_shape(node), dtype, lambda ix: make("where", Call("eq", ix), one, zero))


def _getitem(r: Reader, node: fx.Node, x: Value | tuple[Value, ...], index: Any) -> Any:
    if isinstance(x, tuple):
        return x[index]
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [i for i in items if not isinstance(i, Value)]:
        k = next(k for k, i in enumerate(items) if i is Ellipsis)
        taken = sum(1 for i in items if i is not None and i is not Ellipsis)
        items[k:k + 1] = [slice(None)] * (len(x.dims) - taken)
    shape = out_shape(node)
    advanced: list[Value | None] = []
    dim = 0
    tensors = any(isinstance(i, Value) for i in items)
    for i in items:
        if i is None:
            x = insert_unit(x, dim)
            advanced.append(None)
            dim += 1
        elif isinstance(i, slice):
            if i != slice(None):
                length = shape[dim] if not tensors else _slice_length(x, dim, i)
                x = slice_dim(r, x, dim, i.start, i.step, length)
            advanced.append(None)
            dim += 1
        elif isinstance(i, Value):
            if i.dtype == torch.bool:
                raise Refusal("indexing by a mask")
            advanced.append(i)
            dim += 1
        elif isinstance(i, bool) or not isinstance(i, (int, Const, Size, Call)):
            raise Refusal(f"indexing by a {type(i).__name__}")
        else:
            x = select(r, x, dim, i)
    return gather(r, x, advanced) if tensors else x


def _slice_length(x: Value, dim: int, i: slice) -> Any:
    n = x.shape[dim]
    if isinstance(n, int) and all(b is None or isinstance(b, int) for b in (i.start, i.stop, i.step)):
        return len(range(n)[i])
    raise Refusal("a slice of run-time length beside index tensors")


def gather(r: Reader, x: Value, by: list[Value | None]) -> Value:
    """Advanced indexing: dimensions with an index tensor are read where it says, the others stay."""
    by = by + [None] * (len(x.dims) - len(by))
    places = [k for k, b in enumerate(by) if b is not None]
    adjacent = places == list(range(places[0], places[-1] + 1))
    tables = [b for b in by if b is not None]
    base = x
    for k in places:
        base = coarse(base, k)
    joint = pointwise(lambda *_: ZERO, torch.int64, *tables)
    read = [pointwise(lambda *es, k=k: es[k], torch.int64, *tables) for k in range(len(tables))]
    lead = places[0] if adjacent else 0
    rest = [d for k, d in enumerate(base.dims) if k not in places]
    dims = (*rest[:lead], *joint.dims, *rest[lead:])
    width = len(joint.factors)
    before = sum(len(d) for d in rest[:lead])

    def at(ix: Index) -> Expr:
        own, others = ix[before:before + width], list(ix[:before] + ix[before + width:])
        out: list[Expr] = []
        for k, d in enumerate(base.dims):
            if k in places:
                out.append(_from_end(r, read[places.index(k)].at(own), x.shape[k]))
            else:
                out += others[:len(d)]
                del others[:len(d)]
        return base.at(tuple(out))

    return Value(dims, x.dtype, at)


def _from_end(r: Reader, i: Expr, n: Any) -> Expr:
    """torch counts negative indices from the end."""
    j = r.simplify(i)
    if r.proves(Call("le", (ZERO, j))):
        return j
    return make("where", Call("lt", (j, ZERO)), Call("add", (j, expression(n))), j)


def _index(r: Reader, node: fx.Node, x: Value, indices: tuple[Value | None, ...]) -> Value:
    if any(i is not None and i.dtype == torch.bool for i in indices):
        raise Refusal("indexing by a mask")
    return gather(r, x, list(indices))


def _index_select(r: Reader, node: fx.Node, x: Value, dim: int, index: Value) -> Value:
    d = wrap(dim, len(x.dims))
    return gather(r, x, [None] * d + [index])


def _embedding(r: Reader, node: fx.Node, x: Value, indices: Value, padding_idx: Any = None, max_norm: Any = None,
               *_: Any, **__: Any) -> Value:
    if max_norm is not None and not isinstance(max_norm, bool):  # scale_grad_by_freq stands there in the operator
        raise Refusal("a table whose rows are scaled when they are read")
    return gather(r, x, [indices])


def _gather(r: Reader, node: fx.Node, x: Value, dim: int, index: Value, **_: Any) -> Value:
    d = wrap(dim, len(x.dims))
    w = x
    for k in range(len(x.dims)):
        w = coarse(w, k)
        index = coarse(index, k)
    if r.computed(w):
        return _gathered(r, w, d, index)

    def at(ix: Index) -> Expr:
        return w.at((*ix[:d], index.at(ix), *ix[d + 1:]))

    return Value(index.dims, x.dtype, at)


def element(r: Reader, x: Value, dim: int, index: Value) -> Value:
    """x at one place of `dim` per row; no element where the index is outside of it (0 then)."""
    column = reshape(index, (*index.shape[:dim], 1, *index.shape[dim:]))
    for k in range(len(x.dims)):
        x, column = coarse(x, k), coarse(column, k)
    return reshape(_gathered(r, x, dim, column), index.shape)


def _gathered(r: Reader, x: Value, dim: int, index: Value) -> Value:
    """x where `index` says, along a dimension whose elements are computed and need not be stored: the sum of the one
    element that is there.  One factor per dimension; `index` is as long as x or shorter in all others."""
    rows = [f if k == dim or not same(f.extent, g.extent) else g
            for k, (f, g) in enumerate(zip(index.factors, x.factors, strict=True))]
    used: set[str] = set()
    along = r.axes([x.factors[dim]], ["M"], used)[0]
    axes = r.axes(rows, ("B", "H", "P", "K")[-len(rows):] if len(rows) <= 4 else "X" * len(rows), used)
    ix, m = [Var(str(f.rank).lower()) for f in axes], Var(str(along.rank).lower())
    body = r.simplify(x.at((*ix[:dim], m, *ix[dim + 1:])))
    guards: list[Expr] = [Call("eq", (m, r.simplify(index.at(tuple(ix)))))]
    p = r.parts(body)
    if p.guard is not None and p.outside is not None and p.outside.value == 0:
        body, guards = p.inside, [*guards, p.guard]
    name = r.write("C", axes, body, reduce=Reduce("sum", (m.name,)), guard=conjunction(guards), finite=r.tame(body),
                   dtype="" if x.is_real else "i64")
    return r.view(replace(index, dtype=x.dtype, pieces=None), axes, name)


def _cumsum(r: Reader, node: fx.Node, x: Value, dim: int, **_: Any) -> Value:
    """The running sum of something that is the same number everywhere."""
    d = wrap(dim, len(x.dims))
    w = whole(x)
    for k in range(len(w.dims)):
        w = coarse(w, k)
    e = r.probe(w)
    if not isinstance(e, Const) or w.is_real:
        raise Refusal("a running sum that does not fold")
    return plain(w.shape, dtype_of(node), lambda ix: make("mul", Const(e.value), make("add", ix[d], Const(1))))


def _diff(r: Reader, node: fx.Node, x: Value, n: int = 1, dim: int = -1, prepend: Value | None = None,
          append: Value | None = None) -> Value:
    if n != 1:
        raise Refusal("differences of higher order")
    d = wrap(dim, len(x.dims))
    v = cat(r, [p for p in (prepend, x, append) if p is not None], d)
    length = out_shape(node)[d]
    later = shift(v, d, length, lambda i: make("add", i, Const(1)))
    return pointwise(lambda a, b: r.simplify(make("sub", a, b)), x.dtype, later, shift(v, d, length, lambda i: i))


RULES: dict[str, Rule] = {
    "arange": Rule("source", _arange),
    **{n: Rule("source", _fill(1)) for n in ("ones", "ones_like", "new_ones")},
    **{n: Rule("source", _fill(0)) for n in ("zeros", "zeros_like", "new_zeros")},
    "full": Rule("source", _full), "full_like": Rule("source", _full), "new_full": Rule("source", _new_full),
    "fill": Rule("source", _filled),
    "scalar_tensor": Rule("source", _tensor), "tensor": Rule("source", _tensor), "eye": Rule("source", _eye),
    "getitem": Rule("view", _getitem), "index": Rule("index", _index),
    "embedding": Rule("index", _embedding), "index_select": Rule("index", _index_select),
    "gather": Rule("index", _gather), "cumsum": Rule("scan", _cumsum), "diff": Rule("scan", _diff),
}
