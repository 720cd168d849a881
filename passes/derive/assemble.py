"""The cascade of a streamed program: what is still needed, names given back, the ranks of the cut."""

from __future__ import annotations

from collections.abc import Mapping

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor, written_ranks
from memcomp.ir.expr import Access, Call, Const, Expr, Size, transform, variables, walk
from memcomp.passes.derive.tiles import Cut


def assembled(c: Cascade, statements: list[Einsum], wanted: Mapping[str, str],
              dtypes: Mapping[str, str]) -> Cascade:
    """`statements` that an output needs, with the declarations they need.

    wanted: tile tensor -> the name it takes back where the whole tensor is gone.  dtypes: of what holds no reals.
    """
    held = {mine: t.dtype for mine, want in wanted.items() if (t := c.declared(want)) is not None and t.dtype != "f32"}
    dtypes = {**held, **dtypes}
    kept = live(statements, roots(c))
    written = {n for s in kept for n in s.names}
    back = {want: mine for mine, want in reversed(list(wanted.items())) if mine in written and want not in written}
    kept = [_renamed(s, {mine: want for want, mine in back.items()}) for s in kept]
    written = {n for s in kept for n in s.names}
    ranks = {o.tensor: r for s in kept for o in s.outs if (r := written_ranks(o)) is not None}
    tensors = [t for t in c.tensors if t.role != "temp" or (t.name in written and t.name not in back)]
    tensors += [Tensor(t.name, ranks[t.name], t.dtype) for t in c.tensors if t.name in back and t.dtype != "f32"]
    known = {t.name for t in tensors}
    wide = any(t.dtype == "f64" for t in c.outputs())
    firsts = {s.names[0] for s in kept}
    for name, r in ranks.items():  # what is undeclared holds f32, or places where it is a second result
        dtype = dtypes.get(name, "f64" if wide and name in firsts else "")
        if dtype and name not in known:
            tensors.append(Tensor(name, r, dtype))
    return Cascade(c.ranks, tuple(tensors), tuple(kept))


def cut_ranks(c: Cascade, rank: str, cut: Cut, tile: tuple[int, ...], splits: int | Knob | None) -> tuple[Rank, ...]:
    """The parts of the rank: points of a tile, parallel shares where asked for, steps."""
    size, r = cut.inner.upper(), c.rank(rank)
    total: Expr = Const(r.bound) if ragged(r) and r.bound is not None else Size(rank)
    steps: Expr = Call("ceildiv", (total, Size(size)))
    out = [Rank(size, Knob(cut.inner, tile))]
    if cut.outer is not None and splits is not None:
        out.append(Rank(cut.outer.upper(), splits if isinstance(splits, Knob) else Const(splits)))
        steps = Call("ceildiv", (steps, Size(cut.outer.upper())))
    return (*out, Rank(cut.step.upper(), steps, iterative=True))


def ragged(r: Rank) -> bool:
    """Does the extent depend on the point?"""
    if r.extent is None or isinstance(r.extent, Knob):
        return False
    return bool(variables(r.extent)) or any(isinstance(n, Access) for n in walk(r.extent))


def roots(c: Cascade) -> set[str]:
    return {t.name for t in c.outputs()} | {t.name + "'" for t in c.outputs()}


def live(statements: list[Einsum], roots: set[str]) -> list[Einsum]:
    """Statements that the roots need."""
    need, todo = set(roots), list(roots)
    by: dict[str, list[Einsum]] = {}
    for s in statements:
        for n in s.names:
            by.setdefault(n, []).append(s)
    while todo:
        for s in by.get(todo.pop(), ()):
            for t in s.reads():
                if t not in need:
                    need.add(t)
                    todo.append(t)
    return [s for s in statements if any(n in need for n in s.names)]


def _renamed(s: Einsum, table: dict[str, str]) -> Einsum:
    def f(e: Expr) -> Expr:
        return Access(table[e.tensor], e.index) if isinstance(e, Access) and e.tensor in table else e

    def g(e: Expr) -> Expr:
        return transform(e, f)

    outs = tuple(g(o) for o in s.outs)
    return Einsum(outs, g(s.body), s.reduce, None if s.guard is None else g(s.guard))  # type: ignore[arg-type]
