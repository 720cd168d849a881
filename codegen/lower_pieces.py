"""Statements made ready for tiles: sizes closed, ragged ranks as guards, reductions over a cut rank as a loop."""

from __future__ import annotations

from dataclasses import replace

from memcomp.codegen.lower_places import stream as joined
from memcomp.ir.cascade import Cascade, Einsum, Rank
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import (
    Access,
    Call,
    Const,
    Expr,
    Size,
    Var,
    call,
    conjunction,
    substitute,
    transform,
    variables,
    walk,
)
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import Group
from memcomp.ir.simplify import simplify


class Sizes:
    """Extents of ranks as expressions over run-time symbols only."""

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade

    def extent(self, rank: str) -> Expr:
        """The rank's extent; a ragged rank counts as its symbol (its raggedness is a guard, see `ragged_guard`)."""
        x = self.cascade.rank(rank).extent
        if x is None or (not isinstance(x, Const) and any(isinstance(n, Access) for n in walk(x))):  # type: ignore[arg-type]
            return Size(rank)
        return self.close(x)  # type: ignore[arg-type]

    def close(self, e: Expr) -> Expr:
        return transform(e, lambda n: self.extent(n.rank) if isinstance(n, Size) else n)

    def index(self, e: Expr) -> Expr:
        return simplify(self.close(e), index=True)

    def symbolic(self, rank: Rank) -> bool:
        return self.extent(rank.name) == Size(rank.name)


def ragged_guards(c: Cascade, e: Einsum) -> Einsum:
    """A ragged rank in the statement's space becomes the guard that stops it: `t < len[b]`."""
    more = []
    for v in e.space():
        x = c.rank(v.upper()).extent
        if isinstance(x, (Call, Access)) and any(isinstance(n, Access) for n in walk(x)):
            more.append(call("lt", Var(v), x))
    return replace(e, guard=conjunction([*e.guards(), *more])) if more else e


def normal(e: Einsum) -> Einsum:
    """Indices in normal form, so that equal ones are equal."""

    def f(n: Expr) -> Expr:
        return Access(n.tensor, tuple(simplify(i, index=True) for i in n.index)) if isinstance(n, Access) else n

    outs = tuple(Access(o.tensor, tuple(simplify(transform(i, f), index=True) for i in o.index)) for o in e.outs)
    return replace(e, outs=outs, body=transform(e.body, f), guard=None if e.guard is None else transform(e.guard, f))


def stream(
    e: Einsum, var: str, size: int, empty: tuple[Expr, ...] = (), identity: Expr | None = None
) -> tuple[list[Einsum], Rank, Rank]:
    """A reduction over a cut rank as an iterative cascade: initialise, reduce each tile, join, take the last.

    Right because the monoids of `ir.ops` that have a join, and lists of the best, are associative and commutative.
    Where the guard keeps a result out, the last statements hold the identity.  empty: what points of the results hold
    that nothing writes; identity: of the values, where it is not the monoid's.
    """
    assert e.reduce is not None
    monoid = MONOIDS[e.reduce.monoid]
    if not monoid.join and monoid.name != "topk":
        raise Refusal(
            f"{monoid.name} over rank {var.upper()} needs more than a tile",
            e.out.tensor,
            "only reductions with a joining operator can be cut into tiles",
        )
    outer, inner = f"{var}1", f"{var}0"
    point = call("add", call("mul", Var(outer), size), Var(inner))
    sub: dict[Expr, Expr] = {Var(var): point}
    length = Size(var.upper())
    rank1 = Rank(outer.upper(), call("ceildiv", length, size), None, True)
    rank0 = Rank(inner.upper(), Const(size))
    name, index = e.out.tensor, e.out.index
    run, part = f"{name}_run", f"{name}_part"
    over = tuple(inner if v == var else v for v in e.reduce.over)
    guard = conjunction([call("lt", point, length), *(substitute(g, sub) for g in e.guards())])
    plain = tuple(dict.fromkeys(v for i in index for v in sorted(variables(i))))
    at = tuple(Var(v) for v in plain)
    plain_index = all(isinstance(i, (Var, Const)) for i in index)  # each result has its own element, in its tensor
    mine = [] if plain_index else [g for g in e.guards() if not variables(g) & set(e.reduce.over)]
    if monoid.name == "topk":
        least = identity or Const(monoid.identity)
        return joined(e, sub, over, guard, rank1, (empty[0], empty[1]), least, mine), rank1, rank0
    return (
        [
            Einsum((Access(run, (*at, Const(0))),), Const(monoid.identity)),
            Einsum((Access(part, (*at, Var(outer))),), substitute(e.body, sub), replace(e.reduce, over=over), guard),
            Einsum(
                (Access(run, (*at, call("add", Var(outer), 1))),),
                Call(monoid.join, (Access(run, (*at, Var(outer))), Access(part, (*at, Var(outer))))),
            ),
            Einsum(e.outs, Access(run, (*at, Size(rank1.name))), None, conjunction(mine)),
        ],
        rank1,
        rank0,
    )


def kernels_of(c: Cascade, group: Group) -> list[tuple[Group, list[Einsum]]]:
    """The group's statements, one list per kernel: one, but for a tensor that several statements write piece by piece,
    each over points of its own; the mapping of such a group is read by each piece as far as it has the ranks."""
    members = [e for e in c.einsums if set(e.names) & set(group.tensors)]
    pieces: dict[str, set[tuple[Expr, ...]]] = {}
    for e in members:
        if not any(
            isinstance(i, Const) and c.rank(r).iterative for i, r in zip(e.out.index, _ranks(c, e), strict=False)
        ):
            pieces.setdefault(e.out.tensor, set()).add(normal(e).out.index)
    several = [n for n, at in pieces.items() if len(at) > 1]
    if not several:
        return [(group, members)]
    if len(pieces) > 1:
        raise Refusal(
            f"{several[0]} is written at several places in a kernel that computes more",
            f"group {group.name}",
            "put it into a group of its own",
        )
    out = []
    for k, e in enumerate(members):
        names = {v.upper() for v in e.space()}
        has = names | {f"{r}1" for r, _ in group.partition if r in names}
        out.append(
            (
                replace(
                    group,
                    name=f"{group.name}_{k}",
                    partition=tuple(x for x in group.partition if x[0] in names),
                    space=tuple(r for r in group.space if r in has),
                    loop_order=tuple(r for r in group.loop_order if r in has),
                ),
                [e],
            )
        )
    return out


def _ranks(c: Cascade, e: Einsum) -> tuple[str, ...]:
    try:
        return c.tensor(e.out.tensor).ranks
    except KeyError:
        return ()
