"""Ranks of a cascade: ranges, free names, and the surgery of `canonicalize` (ranks of one point go, h//k is split)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import count

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor
from memcomp.ir.expr import (
    Access,
    Call,
    Const,
    Expr,
    Size,
    Var,
    children,
    rebuild,
    variables,
    walk,
)
from memcomp.ir.ops import MONOIDS
from memcomp.ir.simplify import Ranges, simplify


def ranges(c: Cascade) -> Ranges:
    """Variable -> half-open range of its rank, for the simplifier."""
    out: dict[str, tuple[Expr | int | None, Expr | int | None]] = {}
    for r in c.ranks:
        if isinstance(r.extent, Const):
            out[r.var] = (0, int(r.extent.value))
        elif r.extent is None or isinstance(r.extent, Knob):
            out[r.var] = (0, Size(r.name))
        else:
            out[r.var] = (0, r.extent)
    return out


def exprs(s: Einsum) -> Iterator[Expr]:
    """Body, guard conjuncts and output indices."""
    yield s.body
    yield from s.guards()
    for o in s.outs:
        yield from o.index


def rewritten(s: Einsum, f: Callable[[Expr], Expr]) -> Einsum:
    """The statement with `f` applied to body, guard and outputs (tensor of the output included)."""
    outs = tuple(f(o) for o in s.outs)
    return Einsum(outs, f(s.body), s.reduce, None if s.guard is None else f(s.guard))  # type: ignore[arg-type]


def dimensions(c: Cascade, var: str) -> dict[str, set[int]]:
    """Dimensions of temporaries that run over exactly this variable, in every statement that writes them."""
    out: dict[str, set[int]] = {}
    for name in dict.fromkeys(n for s in c.einsums for n in s.names):
        if c.temporary(name):
            writes = [o for s in c.einsums for o in s.outs if o.tensor == name]
            at = set.intersection(*({k for k, i in enumerate(o.index) if i == Var(var)} for o in writes))
            if at:
                out[name] = at
    return out


def indexed(s: Einsum) -> bool:
    """Does the statement return indices of what it reduces (which depend on how the ranks are cut)?"""
    return s.reduce is not None and MONOIDS[s.reduce.monoid].outs > 1


def drop_unit(c: Cascade) -> Cascade:
    """Ranks of extent 1 leave the iteration spaces; temporaries lose their dimension, others are read at 0."""
    for r in c.ranks:
        users = [s for s in c.einsums if r.var in s.space()]
        if r.extent != Const(1) or r.iterative or not users or any(indexed(s) for s in users):
            continue
        c = _dropped(c, r)
    return c


def _dropped(c: Cascade, r: Rank) -> Cascade:
    dims = dimensions(c, r.var)

    def apply(e: Expr) -> Expr:
        if e == Var(r.var):
            return Const(0)
        kids = tuple(apply(i) for i in children(e))
        if isinstance(e, Access):
            return Access(e.tensor, tuple(i for k, i in enumerate(kids) if k not in dims.get(e.tensor, ())))
        return rebuild(e, kids) if kids else e

    statements = []
    for s in c.einsums:
        new = rewritten(s, apply)
        if s.reduce is not None and r.var in s.reduce.over:
            over = tuple(v for v in s.reduce.over if v != r.var)
            if over:
                new = replace(new, reduce=replace(s.reduce, over=over))
            else:
                identity = Const(MONOIDS[s.reduce.monoid].identity)
                body = new.body if new.guard is None else Call("where", (new.guard, new.body, identity))
                new = replace(new, body=body, reduce=None, guard=None)
        statements.append(new)
    tensors = tuple(replace(t, ranks=tuple(x for k, x in enumerate(t.ranks) if k not in dims.get(t.name, ())))
                    for t in c.tensors)
    return pruned(replace(c, tensors=tensors, einsums=tuple(statements)), {r.name})


def pruned(c: Cascade, names: set[str]) -> Cascade:
    """Without those of the ranks that nothing mentions any more."""
    used = {x for t in c.tensors for x in t.ranks}
    for s in c.einsums:
        used |= {v.upper() for v in s.space()}
        used |= {n.rank for e in exprs(s) for n in walk(e) if isinstance(n, Size)}
    for r in c.ranks:
        if r.extent is not None and not isinstance(r.extent, Knob):
            used |= {n.rank for n in walk(r.extent) if isinstance(n, Size)}
            used |= {v.upper() for v in variables(r.extent)}
    return replace(c, ranks=tuple(r for r in c.ranks if r.name not in names or r.name in used))


def split(c: Cascade) -> Cascade:
    """A rank H read as h//k, k dividing its extent, becomes J and G with h = j*k + g."""
    for r in c.ranks:
        k = _divisor(c, r)
        if k is not None:
            return split_by(c, r, k)
    return c


def _divisor(c: Cascade, r: Rank) -> int | None:
    """The constant k of an index h//k, where it divides the extent and h%k is not read: elements are then shared by
    groups of k.  (h//k together with h%k is unpacking, and a group inside a contraction is a scale: both stay, but
    where another reduction made the group's value or walks the same dimension, or a temporary is unpacked: then
    statements can share ranks.)"""
    users = [s for s in c.einsums if r.var in s.space()]
    if r.iterative or r.extent is None or isinstance(r.extent, Knob) or any(indexed(s) for s in users):
        return None
    if any(r.var in variables(x.extent) for x in c.ranks if x.extent is not None and not isinstance(x.extent, Knob)):
        return None
    parts = [(s, n) for s in users for e in exprs(s) for n in _parts(e, r.var)]
    if not parts:
        return None
    summed = [s for s in users if s.reduce is not None and r.var in s.reduce.over]
    again = users == summed and any(
        _parts(i, r.var) and (_reduced(c, n.tensor) or _walked(c, n.tensor, d, i))
        for s in summed for e in exprs(s) for n in walk(e) if isinstance(n, Access) for d, i in enumerate(n.index))
    again = again or any(_unpacked(c, n, r.var) for s in users for n in s.accesses())
    if not again and any(n.op == "mod" or s in summed for s, n in parts):
        return None
    found = {k.value for _, n in parts if isinstance(k := n.args[1], Const) and type(k.value) is int and k.value > 1}
    fits = [k for k in sorted(found) if simplify(Call("mod", (r.extent, Const(k)))) == Const(0)]
    return fits[-1 if again else 0] if fits else None


def _parts(e: Expr, var: str) -> list[Call]:
    """`h//k` and `h%k` in an expression."""
    return [n for n in walk(e) if isinstance(n, Call) and n.op in ("floordiv", "mod") and n.args[0] == Var(var)]


def _unpacked(c: Cascade, a: Access, var: str) -> bool:
    """Is a temporary read at `h//k` and `h%k`: are its own two ranks those of h?"""
    parts = [i for i in a.index if isinstance(i, Call) and i.op in ("floordiv", "mod") and i.args[0] == Var(var)]
    return c.temporary(a.tensor) and len({i.op for i in parts}) == 2 and len({i.args[1] for i in parts}) == 1


def _walked(c: Cascade, tensor: str, d: int, part: Expr) -> bool:
    """Is the part `h%k` of a variable what a reduction runs over in the same dimension elsewhere?"""
    return isinstance(part, Call) and part.op == "mod" and any(
        isinstance(i, Var) and i.name in s.reduce.over and c.rank(i.name.upper()).extent == part.args[1]
        for s in c.einsums if s.reduce is not None
        for i in (a.index[d] for a in s.accesses() if a.tensor == tensor))


def _reduced(c: Cascade, tensor: str) -> bool:
    """Is the tensor a temporary made by reductions or from what they made?"""
    todo, seen = [tensor], set[str]()
    while todo:
        for s in c.writers(todo.pop()):
            if s.reduce is not None:
                return True
            todo += s.reads() - seen
            seen |= s.reads()
    return False


def split_by(c: Cascade, r: Rank, k: int) -> Cascade:
    """The rank H as J and G with h = j*k + g; k divides its extent."""
    assert r.extent is not None and not isinstance(r.extent, Knob)
    many = simplify(Call("floordiv", (r.extent, Const(k))))
    outer = _known(c, r, Call("floordiv", (Var(r.var), Const(k))), many, "J", set())
    g = _known(c, r, Call("mod", (Var(r.var), Const(k))), Const(k), "G", {outer.name})
    inner = g.name
    dims = dimensions(c, r.var)
    dims = {n: at for n, at in dims.items() if _plainly_read(c, n, at, r.var)}
    pair = (Var(outer.var), Var(g.var))
    whole = Call("add", (Call("mul", (pair[0], Const(k))), pair[1]))

    def apply(e: Expr) -> Expr:
        if isinstance(e, Access) and e.tensor in dims:
            return Access(e.tensor, tuple(x for d, i in enumerate(e.index)
                                          for x in (pair if d in dims[e.tensor] else (apply(i),))))
        if e == Var(r.var):
            return whole
        kids = children(e)
        return rebuild(e, tuple(apply(x) for x in kids)) if kids else e

    statements = []
    for s in c.einsums:
        if r.var not in s.space():
            statements.append(s)
            continue
        new = rewritten(s, apply)
        if s.reduce is not None and r.var in s.reduce.over:
            over = tuple(x for v in s.reduce.over for x in ((outer.var, g.var) if v == r.var else (v,)))
            new = replace(new, reduce=replace(s.reduce, over=over))
        statements.append(new)
    declared = (*c.tensors, *_kept(c, r, dims))
    tensors = tuple(_split_dims(t, dims.get(t.name, set()), outer.name, inner) for t in declared)
    ranks = [x for x in c.ranks if x.name not in (outer.name, inner)]
    at = ranks.index(r)
    ranks[at + 1:at + 1] = [outer, g]
    out = pruned(Cascade(tuple(ranks), tensors, tuple(statements)), {r.name})
    known = ranges(out)
    return replace(out, einsums=tuple(rewritten(s, lambda e: simplify(e, known)) for s in out.einsums))


def _kept(c: Cascade, r: Rank, dims: dict[str, set[int]]) -> list[Tensor]:
    """Undeclared temporaries that keep the rank (read at a constant, say): their writers no longer show it."""
    written = dict.fromkeys(n for s in c.einsums if r.var in s.space() for n in s.names)
    return [c.tensor(n) for n in written if c.declared(n.removesuffix("'")) is None and n not in dims
            and r.name in c.tensor(n).ranks]


def _split_dims(t: Tensor, dims: set[int], outer: str, inner: str) -> Tensor:
    if not dims:
        return t
    return replace(t, ranks=tuple(x for d, n in enumerate(t.ranks) for x in ((outer, inner) if d in dims else (n,))))


def _plainly_read(c: Cascade, name: str, at: set[int], var: str) -> bool:
    return all(n.index[d] == Var(var) for s in c.einsums for e in exprs(s) for n in walk(e)
               if isinstance(n, Access) and n.tensor == name for d in at)


def _known(c: Cascade, r: Rank, part: Expr, extent: Expr, stem: str, taken: set[str]) -> Rank:
    """The rank of the dimension that a part of h (`h//k`, `h%k`) indexes, where it has that extent and h's statements
    do not use it; else a new one."""
    busy = {v for s in c.einsums if r.var in s.space() for v in s.space()}
    for s in c.einsums:
        for e in exprs(s):
            for n in walk(e):
                if not isinstance(n, Access) or part not in n.index:
                    continue
                for i, name in zip(n.index, _dims(c, n.tensor), strict=False):
                    have = c.rank(name)
                    if (i == part and have.name not in taken and have.var not in busy and have.extent == extent
                            and not have.iterative):
                        return have
    return Rank(fresh_rank(c, stem, taken), extent)


def _dims(c: Cascade, tensor: str) -> tuple[str, ...]:
    try:
        return c.tensor(tensor).ranks
    except KeyError:  # no single rank per dimension
        return ()


def fresh_rank(c: Cascade, stem: str, more: set[str]) -> str:
    """A free name for a rank, in `c` and beside `more`."""
    return unused(stem, {r.name for r in c.ranks} | more)


def unused(stem: str, taken: Collection[str]) -> str:
    """`stem`, or with the lowest number (from 2) that makes it a name which is not taken."""
    return stem if stem not in taken else next(name for n in count(2) if (name := f"{stem}{n}") not in taken)
