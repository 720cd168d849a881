"""Temporaries that are only read at points of another rank are computed at those points."""

from __future__ import annotations

from dataclasses import replace

from memcomp.ir.cascade import Cascade, Einsum, Tensor, is_init
from memcomp.ir.expr import (
    Access,
    Const,
    Expr,
    Size,
    Var,
    call,
    children,
    conjunction,
    reads,
    rebuild,
    substitute,
    variables,
)
from memcomp.ir.program import Program
from memcomp.ir.simplify import proves, simplify
from memcomp.passes._roles import accesses, carried, closed


def specialize(program: Program) -> Program:
    """`T[h]` that is read at `x*2` and `x*2 + 1` only becomes two temporaries over `x`, each with its statement.

    Then all that is computed for one `x` is at the points of one task, and the statements fuse.  Only where it is no
    more work: the new points together are not more than the old ones.  Changes no result.

    before:
        program p
        rank H = 4
        rank X = 2
        rank M
        in Q[H]: f32
        in K[M]: f32
        out O[X, M]: f32
        S[h, m] = Q[h] * K[m]
        O[x, m] = S[x*2, m] - S[x*2 + 1, m]
    after:
        program p
        rank H = 4
        rank X = 2
        rank M
        in Q[H]: f32
        in K[M]: f32
        out O[X, M]: f32
        SA[x, m] = Q[x*2] * K[m]
        SB[x, m] = Q[x*2 + 1] * K[m]
        O[x, m] = SA[x, m] - SB[x, m]
    """
    c, found = program.cascade, True
    while found:
        found = False
        for e in reversed(c.einsums):
            done = _specialized(c, e)
            if done is not None:
                c, found = done, True
                break
    return program if c is program.cascade else replace(program, cascade=c)


def _specialized(c: Cascade, e: Einsum) -> Cascade | None:
    """The cascade with the temporary that `e` writes computed where it is read; None where that does not apply."""
    name, t = e.out.tensor, c.declared(e.out.tensor)
    alone = len(e.outs) == 1 and len(c.writers(name)) == 1 and not is_init(e) and name not in c.once(carried)
    if not alone or (t is not None and t.role != "temp") or not all(isinstance(i, Var) for i in e.out.index):
        return None
    users = [a for s in c.readers(name) for a in accesses(s) if a.tensor == name]
    for k, own in enumerate(e.out.index):
        assert isinstance(own, Var)
        points = list(dict.fromkeys(simplify(a.index[k], index=True) for a in users))
        if not points or own in points or any(not _new(i, e, k) for i in points):
            continue
        work: Expr = Const(0)
        for i in points:
            each: Expr = Const(1)
            for v in sorted(variables(i)):
                each = each * Size(v.upper())
            work = work + each
        if proves(closed(c, call("le", work, Size(own.name.upper())))):
            return _rewritten(c, e, k, points)
    return None


def _new(i: Expr, e: Einsum, k: int) -> bool:
    """May this index stand for the variable: free of data, and of variables that the statement has already?"""
    taken = set(e.space())
    return not reads(i) and not variables(i) & taken and i != e.out.index[k]


def _rewritten(c: Cascade, e: Einsum, k: int, points: list[Expr]) -> Cascade:
    names = _names(c, e.out.tensor, len(points))
    own = e.out.index[k]
    clones: list[Einsum] = []
    table: dict[Expr, str] = {}
    for name, i in zip(names, points, strict=True):
        at = tuple(Var(v) for v in sorted(variables(i)))
        index = (*e.out.index[:k], *at, *e.out.index[k + 1 :])
        sub = {own: i}
        guard = conjunction([substitute(g, sub) for g in e.guards()])
        clones.append(replace(e, outs=(Access(name, index),), body=substitute(e.body, sub), guard=guard))
        table[i] = name

    def read(x: Expr) -> Expr:
        if isinstance(x, Access):
            index = tuple(read(i) for i in x.index)
            if x.tensor == e.out.tensor:
                i = simplify(index[k], index=True)
                at = tuple(Var(v) for v in sorted(variables(i)))
                return Access(table[i], (*index[:k], *at, *index[k + 1 :]))
            return Access(x.tensor, index)
        return rebuild(x, tuple(read(y) for y in children(x)))

    out: list[Einsum] = []
    for s in c.einsums:
        if s is e:
            out += clones
            continue
        outs = tuple(Access(o.tensor, tuple(read(i) for i in o.index)) for o in s.outs)
        out.append(replace(s, outs=outs, body=read(s.body), guard=None if s.guard is None else read(s.guard)))
    return replace(c, einsums=tuple(out), tensors=_declared(c, e, k, clones))


def _declared(c: Cascade, e: Einsum, k: int, clones: list[Einsum]) -> tuple[Tensor, ...]:
    """A declared temporary hands its dtype and empty value on."""
    out: list[Tensor] = []
    for t in c.tensors:
        if t.name != e.out.tensor:
            out.append(t)
            continue
        for s in clones:
            more = len(s.out.index) - len(t.ranks) + 1
            ranks = (
                *t.ranks[:k],
                *(n.name.upper() for n in s.out.index[k : k + more] if isinstance(n, Var)),
                *t.ranks[k + 1 :],
            )
            out.append(replace(t, name=s.out.tensor, ranks=ranks))
    return tuple(out)


def _names(c: Cascade, stem: str, count: int) -> list[str]:
    taken = {t.name for t in c.tensors} | {n for e in c.einsums for n in e.names}
    out: list[str] = []
    for letter in (chr(ord("A") + i) for i in range(26)) if count <= 26 else (f"V{i}" for i in range(count)):
        name = stem + letter
        while name in taken:
            name += "_"
        out.append(name)
        taken.add(name)
        if len(out) == count:
            break
    return out
