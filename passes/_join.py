"""Which ranks walk the same elements: told by the dimensions that statements index, never by names or extents alone.

A rank may serve parts of a program that have nothing to do with each other (the features under a norm and the outputs
of a square layer), and one dimension may be walked under two names.  What is joined is a *part* of a rank: the
statements and dimensions that hang together through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor
from memcomp.ir.expr import Access, Expr, Size, Var, substitute, transform, variables, walk
from memcomp.passes._ranks import exprs, fresh_rank, indexed, pruned, rewritten
from memcomp.passes._roles import product_operands

_HERE = Var("here")  # stands for a variable in an index


@dataclass(slots=True)
class _Part:
    """statements: positions of those that have the rank here.  dims: the tensors' dimensions that they index with it.
    walks: those that they read, and how they are indexed."""

    rank: Rank
    statements: set[int] = field(default_factory=set)
    dims: set[tuple[str, int]] = field(default_factory=set)
    walks: set[tuple[str, int, Expr]] = field(default_factory=set)
    reduced: bool = False  # some statement reduces over it
    chained: bool = False  # and not in a product alone
    made: bool = False  # some result has it


def join(c: Cascade) -> Cascade:
    """Two ranks of one extent, over which statements walk the same dimension of a tensor, become one there: what reads
    an element for one statement reads it for the other.  Both are reduced, or one is, and not in products alone (keys
    that are values too keep a rank for each)."""
    parts = [p for p in c.once(_parts) if not _tied(c, p.rank)]
    for x in parts:
        for y in parts:
            joins = y.reduced and not y.made or x.chained and y.made
            if (x.reduced and not x.made and joins and x.walks & y.walks and not x.statements & y.statements
                    and _equal(x.rank, y.rank)):
                return _joined(c, x, y)
    return c


def apart(c: Cascade) -> Cascade:
    """A rank that is summed away in one part of a program, and a dimension of results alone in another, becomes two:
    they share an extent and nothing else.  (What counts points walks nothing, and stays with the rank.)"""
    parts = c.once(_parts)
    for r in c.ranks:
        mine = sorted((p for p in parts if p.rank is r and p.dims and not _tied(c, r)), key=lambda p: min(p.statements))
        others = [p for p in mine if _role(c, p) != _role(c, mine[0])]
        if others:
            role, new = _role(c, others[0]), _like(c, r, "X")
            c = _added(c, new, r)
            for p in others:
                c = _renamed(c, p, new) if _role(c, p) == role else c
            return c
    return c


def _role(c: Cascade, p: _Part) -> tuple[bool, bool]:
    """Is it reduced, and is it a dimension of what is made?"""
    over = (c.einsums[k].reduce for k in p.statements)
    return any(r is not None and p.rank.var in r.over for r in over), p.made


def _tied(c: Cascade, r: Rank) -> bool:
    """Is it iterative, a choice, or does the extent of another rank depend on its points?"""
    return r.iterative or isinstance(r.extent, Knob) or any(
        r.var in variables(x.extent) for x in c.ranks if x.extent is not None and not isinstance(x.extent, Knob))


def _like(c: Cascade, r: Rank, stem: str) -> Rank:
    """A new rank of the same extent."""
    return Rank(fresh_rank(c, stem, set()), Size(r.name) if r.extent is None else r.extent, r.bound)


def _added(c: Cascade, new: Rank, after: Rank) -> Cascade:
    at = c.ranks.index(after) + 1
    return replace(c, ranks=(*c.ranks[:at], new, *c.ranks[at:]))


def _equal(a: Rank, b: Rank) -> bool:
    """Are they two ranks of one extent?"""
    if a is b:
        return False
    return a.extent is not None and a.extent == b.extent or a.extent == Size(b.name) or b.extent == Size(a.name)


# -- parts -------------------------------------------------------------------------------------------------------------


def _parts(c: Cascade) -> list[_Part]:
    """The parts of all ranks, in the order of the ranks."""
    found: dict[str, list[_Part]] = {r.var: [] for r in c.ranks}
    for k, s in enumerate(c.einsums):
        here = {v: _Part(c.rank(v.upper()), {k}) for v in s.space()}
        for a in (n for e in (*exprs(s), *s.outs) for n in walk(e) if isinstance(n, Access)):
            for d, i in enumerate(a.index):
                for v in variables(i) & here.keys():
                    tensor = a.tensor.removesuffix("'")
                    here[v].dims.add((tensor, d))
                    if a not in s.outs:
                        here[v].walks.add((a.tensor, d, substitute(i, {Var(v): _HERE})))
        made = {v for o in s.outs for i in o.index for v in variables(i)}
        for v, part in here.items():
            part.made = v in made
            part.reduced = s.reduce is not None and v in s.reduce.over and not indexed(s)
            part.chained = part.reduced and not product_operands(s)
            found[v] = _with(found[v], part)
    return [p for parts in found.values() for p in parts]


def _with(parts: list[_Part], new: _Part) -> list[_Part]:
    """The parts of a rank with a statement more: those that index a dimension that it indexes are one."""
    apart = [p for p in parts if not p.dims & new.dims]
    for p in parts:
        if p.dims & new.dims:
            new = _Part(p.rank, p.statements | new.statements, p.dims | new.dims, p.walks | new.walks,
                        p.reduced or new.reduced, p.chained or new.chained, p.made or new.made)
    return [*apart, new]


# -- one name ----------------------------------------------------------------------------------------------------------


def _joined(c: Cascade, x: _Part, y: _Part) -> Cascade:
    """The parts under one name: whole ranks become one where they never stand side by side, else what hangs together
    takes the other's name, or a new one where each stands beside the other's name."""
    first, other = (y.rank, x.rank) if x.rank.extent == Size(y.rank.name) else (x.rank, y.rank)
    names = [*({v.upper() for v in s.space()} for s in c.einsums), *(set(t.ranks) for t in c.tensors)]
    if not any({first.name, other.name} <= n for n in names):
        return _replaced(c, first, other)
    if _free(c, y, x.rank):
        return pruned(_renamed(c, y, x.rank), {y.rank.name})
    if _free(c, x, y.rank):
        return pruned(_renamed(c, x, y.rank), {x.rank.name})
    new = _like(c, first, first.name)
    c = _added(c, new, max(first, other, key=c.ranks.index))
    return pruned(_renamed(_renamed(c, x, new), y, new), {first.name, other.name})


def _free(c: Cascade, part: _Part, rank: Rank) -> bool:
    """Does the part stand nowhere beside this rank?"""
    return not any(rank.var in c.einsums[k].space() for k in part.statements) and not any(
        name == rank.name and (t.name, d) not in part.dims
        for t in c.tensors if any(n == t.name for n, _ in part.dims) for d, name in enumerate(t.ranks))


def _renamed(c: Cascade, part: _Part, rank: Rank) -> Cascade:
    """The part under the name of another rank of its extent."""
    table: dict[Expr, Expr] = {Var(part.rank.var): Var(rank.var)}
    statements = tuple(_under(s, table) if k in part.statements else s for k, s in enumerate(c.einsums))
    tensors = tuple(_named(t, part, rank) for t in c.tensors)
    return replace(c, tensors=tensors, einsums=statements)


def _named(t: Tensor, part: _Part, rank: Rank) -> Tensor:
    return replace(t, ranks=tuple(rank.name if name == part.rank.name and (t.name, d) in part.dims else name
                                  for d, name in enumerate(t.ranks)))


def _replaced(c: Cascade, first: Rank, other: Rank) -> Cascade:
    """`first` wherever `other` was."""
    table: dict[Expr, Expr] = {Var(other.var): Var(first.var), Size(other.name): Size(first.name)}
    statements = tuple(_under(s, table) for s in c.einsums)
    tensors = tuple(replace(t, ranks=tuple(first.name if x == other.name else x for x in t.ranks)) for t in c.tensors)
    ranks = tuple(r if r.extent is None or isinstance(r.extent, Knob) else replace(r, extent=_put(r.extent, table))
                  for r in c.ranks if r is not other)
    return replace(c, ranks=ranks, tensors=tensors, einsums=statements)


def _put(e: Expr, table: dict[Expr, Expr]) -> Expr:
    return transform(e, lambda n: table.get(n, n) if isinstance(n, (Var, Size)) else n)


def _under(s: Einsum, table: dict[Expr, Expr]) -> Einsum:
    """The statement with variables and sizes called as `table` says."""
    new = rewritten(s, lambda e: _put(e, table))
    if s.reduce is None:
        return new
    over = tuple(to.name if isinstance(to := table.get(Var(v)), Var) else v for v in s.reduce.over)
    return replace(new, reduce=replace(s.reduce, over=over))
