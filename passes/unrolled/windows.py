"""Pieces and windows of steps on ranks that all steps share: a window that slides, and pieces that fill a dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, extent_of
from memcomp.ir.expr import Access, Call, Expr, Var, call, substitute, variables, walk
from memcomp.ir.simplify import linear, simplify
from memcomp.passes._ranks import rewritten
from memcomp.passes.unrolled.fit import fit, value
from memcomp.passes.unrolled.steps import Step


@dataclass(frozen=True, slots=True)
class Draft:
    """One step over a rank of steps, in the making.

    limits: variable -> conditions that keep it inside; lengths: variable -> its extent at each step; private: the
    temporaries of the step.
    """

    statements: tuple[Einsum, ...]
    ranks: Mapping[str, Rank]
    limits: Mapping[str, list[Expr]]
    lengths: Mapping[str, tuple[int, ...]]
    private: frozenset[str]


def fresh(hint: str, taken: set[str]) -> str:
    """`hint` or, where that is taken, another short name; taken from now on."""
    letters = "IJKLMNPXYZUWCDGRSTVABEFHOQ"
    pool = (hint, *letters, *(a + b for a in letters for b in letters), *(f"{hint}_{k}" for k in range(len(taken) + 1)))
    name: str = next(x for x in pool if x not in taken)
    taken.add(name)
    return name


def own_rank(c: Cascade, d: Draft, tensor: str, dim: int, taken: set[str]) -> Rank:
    """The rank of a dimension of a tensor; a new one like it where statements use that."""
    rank = c.rank(c.tensor(tensor).ranks[dim])
    used = any(rank.var in s.space() for s in d.statements)
    return replace(rank, name=fresh(rank.name, taken)) if used else rank


def slid(c: Cascade, d: Draft, i: Var, taken: set[str]) -> Draft:
    """Windows of a tensor that overlap become guards on the tensor's own rank, so that steps share what they read."""
    for v, lengths in d.lengths.items():
        if (w := _window(d, v, i, lengths)) is None:
            continue
        f, lo, hi, tensor, dim = w
        rank = own_rank(c, d, tensor, dim, taken)
        inside: list[Expr] = [call("le", lo, Var(rank.var)), call("lt", Var(rank.var), hi)]
        limits = {u: es for u, es in d.limits.items() if u != v} | {rank.var: inside}
        d = replace(d, statements=tuple(_moved(s, d.private, Var(v), Var(rank.var), f) for s in d.statements),
                    ranks={**d.ranks, rank.name: rank}, limits=limits)
    return d


def joined(c: Cascade, run: Sequence[Step], d: Draft, i: Var, taken: set[str]) -> tuple[Draft, str]:
    """Pieces of which the last is short, on the dimension that they fill: a point x there is in step x // length.

    Returns the name of that rank too; "" where all pieces are equal.
    """
    moving = [k for k, x in enumerate(zip(*(s.shape for s in run), strict=True)) if len(set(x)) > 1]
    if not moving:
        return d, ""
    dim = next(k for k, x in enumerate(zip(*(s.place for s in run), strict=True)) if len(set(x)) > 1)
    lengths = tuple(s.shape[moving[0]] for s in run)
    last = d.statements[-1]
    p = next(v for v in last.space() if d.lengths.get(v) == lengths)
    rank = own_rank(c, d, last.out.tensor, dim, taken)
    x = Var(rank.var)
    at: Mapping[Expr, Expr] = {i: call("floordiv", x, lengths[0])}
    limits = {v: [substitute(e, at) for e in es] for v, es in d.limits.items() if v != p}
    statements = tuple(_flat(s, d.private, i, Var(p), lengths[0], x) for s in d.statements)
    return replace(d, statements=statements, ranks={**d.ranks, rank.name: rank}, limits=limits), rank.name


def flattens(c: Cascade, run: Sequence[Step]) -> bool:
    """Are the pieces of a run equal, or all but a shorter last one along the dimension that they fill, so that a point
    there says its step?"""
    if len({s.shape for s in run}) == 1:
        return True
    first, last = run[0], run[-1]
    moving = [k for k, x in enumerate(zip(first.shape, last.shape, strict=True)) if x[0] != x[1]]
    root = c.einsums[first.statements[-1]]
    at = [k for k, x in enumerate(zip(first.place, last.place, strict=True)) if x[0] != x[1]]
    if len(moving) != 1 or len(at) != 1 or len({s.shape for s in run[:-1]}) > 1:
        return False
    (k,), (dim,) = moving, at
    var = [v for v in root.space() if extent_of(c, v.upper()) is not None][k]
    inside = all(var in c.einsums[s].space() and not _reduced(c.einsums[s], var) for s in first.statements)
    extent = extent_of(c, c.tensor(root.out.tensor).ranks[dim])
    return (inside and linear(root.out.index[dim]) in ({Var(var): 1}, {Var(var): 1, None: 0})
            and last.place[dim] == first.shape[k] * (len(run) - 1) and last.place[dim] + last.shape[k] == extent)


def _reduced(s: Einsum, v: str) -> bool:
    return s.reduce is not None and v in s.reduce.over


def _flat(s: Einsum, private: frozenset[str], i: Var, p: Var, stride: int, x: Var) -> Einsum:
    """The statement at the points x = i*stride + p of all steps together."""
    def index(e: Expr) -> Expr:
        return substitute(simplify(substitute(e, {p: x - i * stride}), index=True), {i: call("floordiv", x, stride)})

    def move(e: Expr) -> Expr:
        if isinstance(e, Access) and e.tensor in private:
            return Access(e.tensor, tuple(x if k == p else index(k) for k in e.index[1:]))
        if isinstance(e, Access):
            return Access(e.tensor, tuple(index(k) for k in e.index))
        if isinstance(e, Call):
            return Call(e.op, tuple(move(a) for a in e.args))
        return index(e) if isinstance(e, Var) else e

    return rewritten(s, move)


def _window(d: Draft, v: str, i: Var, lengths: tuple[int, ...]) -> tuple[Expr, Expr, Expr, str, int] | None:
    """Where `v` runs over windows of a tensor that overlap: offset, first and end, the tensor and its dimension."""
    m, found = Var(v), None
    for s in d.statements:
        if v not in s.space():
            continue
        if s.reduce is not None and len(s.outs) > 1 and v in s.reduce.over:
            return None  # an index into a window is no index into the whole
        for a in _accesses(s):
            for dim, x in enumerate(a.index):
                if v not in variables(x) or a.tensor in d.private and x == m:
                    continue
                terms = None if a.tensor in d.private or a in s.outs else linear(x)
                if terms is None or terms.get(m) != 1:
                    return None
                f = simplify(x - m, index=True)
                if not variables(f) <= {i.name} or found is not None and f != found[0]:
                    return None
                found = found or (f, a.tensor, dim)
    if found is None or i.name not in variables(found[0]):
        return None
    f, tensor, dim = found
    start = [value(f, i, k) for k in range(len(lengths))]
    end = [a + n for a, n in zip(start, lengths, strict=True)]
    lo, hi = fit(start, i), fit(end, i)
    if lo is None or hi is None or all(a >= b for a, b in zip(start[1:], end, strict=False)):
        return None
    return f, lo, hi, tensor, dim


def _accesses(s: Einsum) -> Iterator[Access]:
    for e in (*s.outs, s.body, *s.guards()):
        yield from (n for n in walk(e) if isinstance(n, Access))


def _moved(s: Einsum, private: frozenset[str], m: Var, n: Var, f: Expr) -> Einsum:
    """The statement with `n - f` for `m`; temporaries over m are over n."""
    if m.name not in s.space():
        return s

    def move(e: Expr) -> Expr:
        if e == m:
            return n - f
        if isinstance(e, Access) and e.tensor in private:
            return Access(e.tensor, tuple(n if x == m else move(x) for x in e.index))
        if isinstance(e, Access):
            return Access(e.tensor, tuple(simplify(move(x), index=True) for x in e.index))
        return Call(e.op, tuple(move(x) for x in e.args)) if isinstance(e, Call) else e

    over = s.reduce and Reduce(s.reduce.monoid, tuple(n.name if v == m.name else v for v in s.reduce.over))
    return replace(rewritten(s, move), reduce=over)
