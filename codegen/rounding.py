"""Which contractions may round a computed operand to bf16, or to f16.

Rounding an operand costs at most half a unit of bf16 (2**-9) of the sum of absolute terms, which is what rounding a
bf16 result costs anyway.  That argument holds where the contraction's result goes to bf16 outputs only, and only
through operations that are linear in it: sums, products with other values, the numerator of a quotient, choices.  A
score that an exponential reads, or a product that ends in a finer output, stays in f32.

For f16 the unit is 2**-11, so f16 outputs serve as well as bf16 ones; but it holds nothing above 65,504 and has fewer
digits below 2**-14.  Weights that are exponentials of what is left when its maximum is taken off are at most 1, and
what is lost of the small ones is 2**-25 beside the one that is 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from memcomp.ir.expr import Access, Call, Const, Expr, walk
from memcomp.ir.tile import (
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    TileProgram,
    When,
    expressions,
    statements,
)
from memcomp.ir.tile import made as wrote

_BAD = "", ""  # what must not be reached
Node = tuple[str, str]  # (kernel, tile) or ("", param)


def narrow(tp: TileProgram) -> set[tuple[str, str, str]]:
    """(kernel, tile, format): contractions into the tile may round a computed operand to the format, where the other
    one is stored in it."""
    found = {(*node, "bf16") for node in rounds(tp)}
    if any(p.dtype == "f16" for p in tp.params):
        wide = rounds(tp, ("bf16", "f16"))
        found |= {(k.name, t, "f16") for k in tp.kernels for t in peaked(k) if (k.name, t) in wide}
    return found


def peaked(k: TileKernel) -> set[str]:
    """Tiles of contractions whose computed operands are, each time, exponentials of numbers less their own maximum."""
    made = {s.tile for s in statements(k.body) if isinstance(s, (Map, Fold, Dot))}
    fine: dict[str, bool] = {}
    _follow(k.body, _Peaks(), made, fine)
    return {t for t, always in fine.items() if always}


@dataclass(slots=True)
class _Peaks:
    """What is known between two statements.  most: a tile that is nowhere less than another one, by name; weights:
    tiles of such exponentials."""

    most: set[tuple[str, str]] = field(default_factory=set)
    weights: set[str] = field(default_factory=set)

    def forget(self, tiles: Collection[str]) -> None:
        self.most = {(m, t) for m, t in self.most if m not in tiles and t not in tiles}
        self.weights -= set(tiles)

    def above(self, e: Expr) -> set[str]:
        """The tiles that a value is nowhere less than.  Where a maximum is -inf all that it is of are, and 0 serves."""
        if isinstance(e, Call) and e.op == "where" and e.args[1] == Const(0.0) and isinstance(e.args[2], Access) \
                and e.args[0] == Call("eq", (e.args[2], Const(-math.inf))):
            return self.above(e.args[2])
        return {t for m, t in self.most if m == e.tensor} if isinstance(e, Access) else set()

    def weighs(self, e: Expr) -> bool:
        if isinstance(e, Access):
            return e.tensor in self.weights
        if not isinstance(e, Call):
            return e == Const(0.0)
        if e.op == "where":
            return all(map(self.weighs, e.args[1:]))
        x = e.args[0]
        return e.op in ("exp", "exp2") and isinstance(x, Call) and x.op == "sub" and isinstance(x.args[0], Access) \
            and x.args[0].tensor in self.above(x.args[1])


def _follow(body: tuple[Statement, ...], known: _Peaks, made: set[str], fine: dict[str, bool]) -> None:
    for s in body:
        if isinstance(s, When):
            other = _Peaks(set(known.most), set(known.weights))
            _follow(s.body, known, made, fine)
            _follow(s.orelse, other, made, fine)
            known.most &= other.most
            known.weights &= other.weights
        elif isinstance(s, Loop):
            written = {t for x in statements(s.body) for t in wrote(x)}
            known.forget(written)
            _follow(s.body, known, made, fine)
            known.forget(written)
        else:
            if isinstance(s, Dot):
                fine[s.tile] = fine.get(s.tile, True) and {s.a.tensor, s.b.tensor} & made <= known.weights
            above = known.above(s.body) if isinstance(s, Map) else {s.body.tensor} if (
                isinstance(s, Fold) and s.monoid == "max" and isinstance(s.body, Access)) else set()
            weighs = isinstance(s, Map) and known.weighs(s.body)
            known.forget(wrote(s))
            known.most |= {(t, x) for t in wrote(s) for x in above - {t}}
            known.weights |= {*wrote(s)} if weighs else set()


def rounds(tp: TileProgram, formats: tuple[str, ...] = ("bf16",)) -> set[Node]:
    """(kernel, tile) of every tile whose value reaches outputs of these formats only, linearly."""
    edges: dict[Node, set[Node]] = {}
    for source, target in _edges(tp, formats):
        edges.setdefault(target, set()).add(source)
    bad, new = {_BAD}, [_BAD]
    while new:
        for source in edges.get(new.pop(), set()) - bad:
            bad.add(source)
            new.append(source)
    return {(k.name, t.name) for k in tp.kernels for t in k.tiles} - bad


def _edges(tp: TileProgram, formats: tuple[str, ...]) -> Iterator[tuple[Node, Node]]:
    """(value, what is made of it); `_BAD` for a use that is not linear or an output of another format."""
    for k in tp.kernels:
        tiles = {t.name for t in k.tiles}
        for s in statements(k.body):
            if isinstance(s, Store):
                p = tp.param(s.target.tensor)
                yield (k.name, s.tile), ("", p.name)
                if p.role != "work" and p.dtype not in formats:
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
