"""One form for equal programs: no dead statements, copies, repetitions or ranks of one point; simple indices."""

from __future__ import annotations

from dataclasses import replace

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Const, Expr, Var, children, conjunction, conjuncts, rebuild, substitute, walk
from memcomp.ir.program import Program
from memcomp.ir.simplify import simplify
from memcomp.passes._join import apart, join
from memcomp.passes._ranks import drop_unit, indexed, ranges, rewritten, split

_INTEGERS = ("i64", "i32", "i16", "i8", "u8", "bool")


def canonicalize(program: Program) -> Program:
    """The same meaning in normal form; applying it again changes nothing.

    Unneeded statements, copies and repetitions go; ranks of one point become index 0; a rank read in groups `h//k`
    becomes two, and two ranks that are summed over one dimension of a tensor become one, so that readers of one element
    share a rank; indices and guards are simplified.

    before:
        program p
        rank H = 6
        rank J = 2
        rank P = 1
        rank M
        in Q[H, P]: f32
        in K[J, M]: f32
        out GM[H, P]: f32
        S[h, p, m] = Q[h, p] * K[h//3, m]
        T[h, p, m] = S[h, p, m]
        D[h, p] = sum{m} T[h, p, m] where m >= 0
        GM[h, p] = max{m} T[h, p, m] where m >= 0
    after:
        program p
        rank H = 6
        rank J = 2
        rank G = 3
        rank P = 1
        rank M
        in Q[H, P]: f32
        in K[J, M]: f32
        out GM[H, P]: f32
        S[j, g, m] = Q[j*3 + g, 0] * K[j, m]
        GM[j*3 + g, 0] = max{m} S[j, g, m]
    """
    old = program.cascade
    while True:
        new = old
        for step in (_live, _simplified, drop_unit, split, join, apart, _without_copies, _without_repetitions):
            new = step(new)
        if new == old:
            break
        old = new
    return program if old == program.cascade else replace(program, cascade=old)


def _live(c: Cascade) -> Cascade:
    """Statements that an output or new state needs; declarations of temporaries that are written."""
    need = {t.name for t in c.outputs()} | {t.name + "'" for t in c.outputs()}
    by: dict[str, list[Einsum]] = {}
    for s in c.einsums:
        for n in s.names:
            by.setdefault(n, []).append(s)
    todo = list(need)
    while todo:
        for s in by.get(todo.pop(), ()):
            fresh = s.reads() - need
            need |= fresh
            todo += fresh
    kept = tuple(s for s in c.einsums if need & set(s.names))
    written = {n for s in kept for n in s.names}
    tensors = tuple(t for t in c.tensors if t.role != "temp" or t.name in written)
    if len(kept) == len(c.einsums) and len(tensors) == len(c.tensors):
        return c
    return replace(c, tensors=tensors, einsums=kept)


def _simplified(c: Cascade) -> Cascade:
    known = ranges(c)
    integers = {t.name for t in c.tensors if t.dtype in _INTEGERS}

    def f(e: Expr) -> Expr:
        return simplify(e, known, integers=integers)

    statements = []
    for s in c.einsums:
        body = f(s.body)
        conds = [f(g) for g in s.guards()]
        left = [x for g in conds for x in conjuncts(g) if x != Const(True)]
        outs = tuple(Access(o.tensor, tuple(simplify(i, known, index=True) for i in o.index)) for o in s.outs)
        statements.append(Einsum(outs, body, s.reduce, conjunction(left)))
    return c if tuple(statements) == c.einsums else replace(c, einsums=tuple(statements))


def _without_copies(c: Cascade) -> Cascade:
    """Readers of `X[i, j] = Y[j, i]` read Y."""
    for s in c.einsums:
        y = s.body
        if s.reduce or s.guard is not None or len(s.outs) != 1 or not isinstance(y, Access):
            continue
        x = s.out
        plain = all(isinstance(i, Var) for i in x.index) and len(set(x.index)) == len(x.index)
        gathers = any(isinstance(n, Access) for i in y.index for n in walk(i))
        if plain and not gathers and _copyable(c, x.tensor, y.tensor):
            return _without_copies(_reading(c, s, x, y))
    return c


def _copyable(c: Cascade, x: str, y: str) -> bool:
    """Is x a temporary written once that holds exactly what y holds?"""
    tx, ty = c.declared(x), c.declared(y.removesuffix("'"))
    if not c.temporary(x) or len(c.writers(x)) != 1 or (ty is not None and ty.role == "state"):
        return False
    if any(r.iterative for r in c.ranks):
        return False
    have = "f32" if tx is None else tx.dtype
    held = "f32" if ty is None else ty.dtype
    return have == held or (have in ("f32", "f64") and held in ("f32", "f16", "bf16", "e4m3", "e5m2"))


def _reading(c: Cascade, s: Einsum, x: Access, y: Access) -> Cascade:
    """Without the statement that writes x; readers of x read y."""
    rest = tuple(rewritten(t, lambda e: _inlined(e, x, y)) for t in c.einsums if t is not s)
    return replace(c, tensors=tuple(t for t in c.tensors if t.name != x.tensor), einsums=rest)


def _inlined(e: Expr, x: Access, y: Access) -> Expr:
    kids = tuple(_inlined(k, x, y) for k in children(e))
    if isinstance(e, Access) and e.tensor == x.tensor:
        return substitute(y, dict(zip(x.index, kids, strict=True)))
    return rebuild(e, kids) if kids else e


def _without_repetitions(c: Cascade) -> Cascade:
    """A temporary that repeats an earlier statement is read as that one."""
    if any(r.iterative for r in c.ranks):
        return c
    seen: dict[object, Einsum] = {}
    for s in c.einsums:
        if len(s.outs) != 1 or indexed(s) or len(c.writers(s.names[0])) != 1:
            continue
        key = (s.out.index, s.body, s.reduce, s.guard, _stored(c, s.names[0]))
        first = seen.setdefault(key, s)
        if first is s or not c.temporary(s.names[0]) or not all(isinstance(i, Var) for i in s.out.index):
            continue
        return _without_repetitions(_reading(c, s, s.out, first.out))
    return c


def _stored(c: Cascade, name: str) -> tuple[str, float]:
    t = c.declared(name)
    return ("f32", 0.0) if t is None else (t.dtype, t.empty)

