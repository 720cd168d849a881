"""Alike steps as one: integers become functions of the step, lengths become guards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, Tensor, extent_of
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, conjunction, substitute, transform
from memcomp.ir.simplify import NOTHING, Ranges, simplify
from memcomp.passes._ranks import ranges, rewritten
from memcomp.passes.unrolled.fit import affine, fit
from memcomp.passes.unrolled.steps import Step, aliases, columns, filled
from memcomp.passes.unrolled.windows import Draft, fresh, joined, slid


@dataclass(frozen=True, slots=True)
class Rolled:
    """The statements that stand for all steps, the rank that they run over, new ranks, and declared temporaries."""

    over: str
    ranks: tuple[Rank, ...]
    tensors: tuple[Tensor, ...]
    statements: tuple[Einsum, ...]


def follow(family: Sequence[Step]) -> bool:
    """Are all integers of the steps functions of the step, and those that say where pieces lie affine ones?"""
    i = Var("i")
    at, numbers, extents = columns(family)
    return all(affine(x, i) is not None for x in set(at)) and all(fit(x, i) is not None for x in {*numbers, *extents})


def roll(c: Cascade, run: Sequence[Step], taken: set[str]) -> Rolled:
    """One step over a new rank for steps that `follow`.  taken: names of ranks, to which the new ones are added."""
    first, n = run[0], len(run)
    step = Rank(fresh("I", taken), Const(n))
    i = Var(step.var)
    at, numbers, extents = columns(run)
    slopes = sorted({abs(x[1] - x[0]) for x in at} - {0})
    found = {x: fit(x, i, slopes) for x in {*numbers, *extents}} | {x: affine(x, i) for x in at}
    holes = {x: e for x, e in found.items() if e is not None}
    names = {alias: name for name, alias in aliases(c, first.statements).items()}
    wide: dict[tuple[str, tuple[int, ...]], Rank] = {}
    lengths: dict[str, tuple[int, ...]] = {}
    sizes, rest, written = iter(extents), iter(numbers), iter(at)
    statements: list[Einsum] = []
    for form, space in zip(first.forms, first.spaces, strict=True):
        table: dict[Expr, Expr] = {}
        for k, v in enumerate(space):
            own = v
            if extent_of(c, v.upper()) is not None:
                seq = next(sizes)
                if len(set(seq)) > 1:
                    if (v, seq) not in wide:
                        wide[v, seq] = Rank(fresh(v.upper(), taken), Const(max(seq)))
                    own = wide[v, seq].var
                lengths[own] = seq
            table[Var(f"v{k}")] = Var(own)

        def put(e: Expr, seqs: Iterator[tuple[int, ...]], table: dict[Expr, Expr] = table) -> Expr:
            return _indices(substitute(_named(filled(e, (holes[x] for x in seqs)), names, i), table))

        body = put(form.body, rest)
        guards = [put(g, rest) for g in form.guards]
        last = form is first.forms[-1]
        outs = tuple(o for o in (put(o, written if last else rest) for o in form.outs) if isinstance(o, Access))
        over = Reduce(form.monoid, tuple(str(table[Var(v)].name) for v in form.over)) if form.monoid else None  # type: ignore[union-attr]
        statements.append(Einsum(outs, body, over, conjunction(guards)))
    limits: dict[str, list[Expr]] = {
        v: [call("lt", Var(v), holes[x])] for v, x in lengths.items() if len(set(x)) > 1}
    draft = Draft(tuple(statements), {r.name: r for r in (*c.ranks, step, *wide.values())}, limits, lengths,
                  frozenset(names.values()))
    draft = slid(c, draft, i, taken)
    draft, over_rank = joined(c, run, draft, i, taken)
    known = ranges(Cascade(tuple(draft.ranks.values())))
    done = tuple(_tidy(s, draft.limits, known) for s in draft.statements)
    return Rolled(over_rank or step.name, _mentioned(draft.ranks, c, done), _declared(c, done, step.name), done)


def _indices(e: Expr, known: Ranges = NOTHING) -> Expr:
    return transform(e, lambda x: Access(x.tensor, tuple(simplify(k, known, index=True) for k in x.index))
                     if isinstance(x, Access) else x)


def _named(e: Expr, names: dict[str, str], i: Var) -> Expr:
    """Temporaries of a step under the names of the first one's, with the rank of steps in front."""
    return transform(e, lambda x: Access(names[x.tensor], (i, *x.index))
                     if isinstance(x, Access) and x.tensor in names else x)


def _tidy(s: Einsum, limits: Mapping[str, list[Expr]], known: Ranges) -> Einsum:
    """Simple indices; guards that keep each variable within its limits."""
    space = s.space()
    guards = [simplify(g, known) for v in space for x in limits.get(v, ()) for g in _apart(x)]
    new = rewritten(s, lambda e: _indices(e, known))
    new = replace(new, body=simplify(new.body, known))
    kept = [g for g in (*(simplify(g, known) for g in new.guards()), *guards) if g != Const(True)]
    return replace(new, guard=conjunction(kept))


def _apart(x: Expr) -> Iterator[Expr]:
    """`max(a, b) <= n` as two conditions, and `n < min(a, b)`: each is then affine."""
    assert isinstance(x, Call)
    for at, op in ((0, "max"), (1, "min")):
        side = x.args[at]
        if isinstance(side, Call) and side.op == op:
            for a in side.args:
                yield from _apart(Call(x.op, tuple(a if k == at else b for k, b in enumerate(x.args))))
            return
    yield x


def _mentioned(ranks: Mapping[str, Rank], c: Cascade, statements: tuple[Einsum, ...]) -> tuple[Rank, ...]:
    """The new ranks that are in use."""
    used = {v.upper() for s in statements for v in s.space()}
    old = {r.name for r in c.ranks}
    return tuple(r for r in ranks.values() if r.name in used and r.name not in old)


def _declared(c: Cascade, statements: tuple[Einsum, ...], step: str) -> tuple[Tensor, ...]:
    """Declarations of the temporaries, which gain the rank of steps."""
    out = []
    for o in (o for s in statements[:-1] for o in s.outs):
        if (t := c.declared(o.tensor)) is not None:
            more = () if len(o.index) == len(t.ranks) else (step,)
            own = (x.name.upper() if isinstance(x, Var) else r
                   for x, r in zip(o.index[len(more):], t.ranks, strict=True))
            out.append(replace(t, ranks=(*more, *own)))
    return tuple(out)
