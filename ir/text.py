"""The one language for input, dump, cache key, test case and bug report; `parse(show(p)) == p`.

The digest is the identity of a kernel: programs that differ only in names share it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor
from memcomp.ir.expr import Access, Expr, Size, Var, transform, variables, walk
from memcomp.ir.parse import parse
from memcomp.ir.program import Group, Mapping, Phase, Program
from memcomp.ir.register import definitions
from memcomp.ir.show import show, show_einsum, show_expr

__all__ = ["canonical", "digest", "parse", "show", "show_einsum", "show_expr"]


def digest(program: Program) -> str:
    """sha256 (hex) over the text of `canonical(program)` and the registered operators that it uses."""
    text = "\n".join((show(canonical(program)), *definitions(program)))
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(program: Program) -> Program:
    """The program with ranks, variables, tensors, knobs and groups renamed in order of appearance.

    The program's name, its proofs and comments are dropped.  The target and the order of declarations stay: they
    decide what is emitted and how it is called.  The bound of a rank stays where a kernel may depend on it: on a
    ragged rank, and on a rank that statements iterate and the mapping neither cuts nor runs as space or loop (such a
    rank is a dimension of a tile, and its bound the capacity).  Elsewhere the extent is only a run-time number.
    """
    return _Renaming(program).program()


class _Renaming:
    """Old names to new ones, filled in the order the text mentions them."""

    def __init__(self, program: Program) -> None:
        self.old = program
        self.ranks: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.knobs: dict[str, str] = {}

    def rank(self, name: str) -> str:
        return self.ranks.setdefault(name, f"R{len(self.ranks)}_")  # so that no other rank is called like its parts

    def tensor(self, name: str) -> str:
        prime = "'" if name.endswith("'") else ""
        stem = name.removesuffix("'")
        return self.tensors.setdefault(stem, f"T{len(self.tensors)}") + prime

    def var(self, name: str) -> str:
        return self.rank(name.upper()).lower()

    def expr(self, e: Expr) -> Expr:
        def f(n: Expr) -> Expr:
            if isinstance(n, Var):
                return Var(self.var(n.name))
            if isinstance(n, Size):
                return Size(self.rank(n.rank))
            return Access(self.tensor(n.tensor), n.index) if isinstance(n, Access) else n

        return transform(e, f)

    def knob(self, e: Expr | Knob) -> Expr | Knob:
        if isinstance(e, Knob):
            return Knob(self.knobs.setdefault(e.name, f"k{len(self.knobs)}"), e.choices)
        return self.expr(e)

    def access(self, a: Access) -> Access:
        return Access(self.tensor(a.tensor), tuple(self.expr(i) for i in a.index))

    def einsum(self, s: Einsum) -> Einsum:
        return Einsum(
            tuple(self.access(o) for o in s.outs), self.expr(s.body),
            replace(s.reduce, over=tuple(self.var(v) for v in s.reduce.over)) if s.reduce else None,
            None if s.guard is None else self.expr(s.guard),
        )

    def group(self, g: Group, number: int, parts: dict[str, str]) -> Group:
        def rank(name: str) -> str:
            return parts[name] if name in parts and name not in self.ranks else self.rank(name)

        return Group(
            f"g{number}", tuple(self.tensor(t) for t in g.tensors),
            tuple((self.rank(r), self.knob(size)) for r, size in g.partition),
            tuple(rank(r) for r in g.space), tuple(rank(r) for r in g.loop_order),
            None if g.lane is None else rank(g.lane), tuple((self.tensor(t), level) for t, level in g.keep),
            tuple(Phase(tuple((self.tensor(t), unit) for t, unit in x.bind), x.drain) for x in g.phases),
        )

    def program(self) -> Program:
        p, bounded = self.old, _bounded(self.old)
        for r in p.cascade.ranks:
            self.rank(r.name)
        for t in p.cascade.tensors:
            self.tensor(t.name)
        ranks = tuple(
            Rank(self.rank(r.name), None if r.extent is None else self.knob(r.extent),
                 r.bound if r.name in bounded else None, r.iterative)
            for r in p.cascade.ranks
        )
        tensors = tuple(
            Tensor(self.tensor(t.name), tuple(self.rank(r) for r in t.ranks), t.dtype, t.role, t.empty)
            for t in p.cascade.tensors
        )
        einsums = tuple(self.einsum(s) for s in p.cascade.einsums)
        # a mapping names the parts of a cut rank P as P1 (tiles) and P0 (points of a tile)
        groups = tuple(
            self.group(g, i, {r + part: self.rank(r) + part for r, _ in g.partition for part in "01"})
            for i, g in enumerate(p.mapping.groups)
        )
        return replace(p, name="canonical", cascade=Cascade(ranks, tensors, einsums), mapping=Mapping(groups),
                       proofs=())


def _bounded(p: Program) -> set[str]:
    """Ranks whose bound is part of the identity (see `canonical`)."""
    iterated = {v.upper() for s in p.cascade.einsums for v in s.space()}
    ragged = {
        r.name for r in p.cascade.ranks
        if r.extent is not None and not isinstance(r.extent, Knob)
        and (variables(r.extent) or any(isinstance(n, Access) for n in walk(r.extent)))
    }
    run: set[str] = set()
    for g in p.mapping.groups:
        run |= {r for r, _ in g.partition} | set(g.space) | set(g.loop_order)
    return ragged | (iterated - run)
