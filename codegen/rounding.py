"""Which contractions may round a computed operand to bf16.

Rounding an operand costs at most half a unit of bf16 (2**-9) of the sum of absolute terms, which is what rounding a
bf16 result costs anyway.  That argument holds where the contraction's result goes to bf16 outputs only, and only
through operations that are linear in it: sums, products with other values, the numerator of a quotient, choices.  A
score that an exponential reads, or a product that ends in a finer output, stays in f32.
"""

from __future__ import annotations

from collections.abc import Iterator

from memcomp.ir.expr import Access, Call, Expr, walk
from memcomp.ir.tile import Dot, Fold, Load, Map, Store, TileProgram, expressions, statements

_BAD = "", ""  # what must not be reached
Node = tuple[str, str]  # (kernel, tile) or ("", param)


def rounds(tp: TileProgram) -> set[Node]:
    """(kernel, tile) of every tile whose value reaches bf16 outputs only, linearly."""
    edges: dict[Node, set[Node]] = {}
    for source, target in _edges(tp):
        edges.setdefault(target, set()).add(source)
    bad, new = {_BAD}, [_BAD]
    while new:
        for source in edges.get(new.pop(), set()) - bad:
            bad.add(source)
            new.append(source)
    return {(k.name, t.name) for k in tp.kernels for t in k.tiles} - bad


def _edges(tp: TileProgram) -> Iterator[tuple[Node, Node]]:
    """(value, what is made of it); `_BAD` for a use that is not linear or an output finer than bf16."""
    for k in tp.kernels:
        tiles = {t.name for t in k.tiles}
        for s in statements(k.body):
            if isinstance(s, Store):
                p = tp.param(s.target.tensor)
                yield (k.name, s.tile), ("", p.name)
                if p.role != "work" and p.dtype != "bf16":
                    yield ("", p.name), _BAD
            linear: set[str] = set()
            if isinstance(s, Load):
                yield ("", s.source.tensor), (k.name, s.tile)
            elif isinstance(s, Map) or (isinstance(s, Fold) and s.monoid == "sum"):
                linear = linear_in(s.body) & tiles
            elif isinstance(s, Dot):
                linear = {s.a.tensor, s.b.tensor} & tiles
            if isinstance(s, (Map, Fold, Dot)):
                yield from (((k.name, t), (k.name, s.tile)) for t in sorted(linear))
            if isinstance(s, Fold) and s.monoid != "sum":
                yield (k.name, s.tile), _BAD
            read = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access) and n.tensor in tiles}
            yield from (((k.name, t), _BAD) for t in sorted(read - linear))


def linear_in(e: Expr) -> set[str]:
    """Tensors in which an expression is linear."""
    if isinstance(e, Access):
        return {e.tensor} - {n.tensor for i in e.index for n in walk(i) if isinstance(n, Access)}
    if not isinstance(e, Call):
        return set()
    inside = [linear_in(a) for a in e.args]
    if e.op in ("add", "sub", "neg"):
        carries = list(range(len(e.args)))
    elif e.op == "mul":
        carries = list(range(len(e.args)))
        inside = [x - set().union(*(_reads(b) for b in e.args if b is not a)) for x, a in
                  zip(inside, e.args, strict=True)]
    elif e.op == "div":
        carries = [0]
    elif e.op == "where":
        carries = [1, 2]
    else:
        return set()
    rest = set().union(*(_reads(a) - x for a, x in zip(e.args, inside, strict=True)),
                       *(_reads(a) for k, a in enumerate(e.args) if k not in carries))
    return set().union(*(inside[k] for k in carries)) - rest


def _reads(e: Expr) -> set[str]:
    return {n.tensor for n in walk(e) if isinstance(n, Access)}
