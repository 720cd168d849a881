"""What depends on two dims by their difference only: distances of queries and keys and all that is made of them.

Over a tile of n x m points such a value takes n + m - 1 different values.  They are computed once into a buffer along
the diagonal, from which every row of the tile is a vector of neighbours:

    value(a, b) = diagonal[a - b + m - 1]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memcomp.codegen.tvm.express import Expressions, linear
from memcomp.codegen.tvm.writer import TILE_ELEMENT, Point, Writer
from memcomp.ir.expr import Access, Call, Expr, call, children, variables, walk
from memcomp.ir.ops import COMPARISONS
from memcomp.ir.tile import Fold, Map

FEWEST = 4  # points of the other dim, below which the diagonal is no shorter than the tile
_LOGIC = {"and", "or", "not", "where"}


def by_difference(w: Writer, e: Expr, a: str, b: str) -> bool:
    """Is the value of `e` the same wherever a - b is?"""
    if not variables(e) & {a, b}:
        return True
    one, other = linear(e, a), linear(e, b)
    if one is not None and other is not None:
        rest = linear(one[1], b)
        return one[0] + other[0] == 0 and rest is not None and not variables(rest[1]) & {a, b}
    if isinstance(e, Access):
        return e.tensor not in w.tiles and all(by_difference(w, i, a, b) for i in e.index)
    return isinstance(e, Call) and all(by_difference(w, x, a, b) for x in e.args)


def _dear(e: Expr, a: str) -> bool:
    """Does it take more than a comparison of lane numbers?"""
    for n in walk(e):
        if isinstance(n, Call) and a in variables(n) and n.op not in _LOGIC and linear(n, a) is None:
            got = linear(call("sub", *n.args), a) if n.op in COMPARISONS else None
            if got is None or got[0] not in (1, -1):
                return True
    return False


def _largest(w: Writer, e: Expr, a: str, b: str, loops: set[str], written: set[str]) -> Iterator[Expr]:
    """The largest parts of an expression that are worth a diagonal over a and b."""
    if not isinstance(e, Call) or not {a, b} <= variables(e):
        return
    reads = {n.tensor for n in walk(e) if isinstance(n, Access)}
    free = variables(e) & loops == {a, b} and not reads & written and reads <= set(w.tiles)
    if free and by_difference(w, e, a, b) and _dear(e, a):
        yield e
        return
    for x in children(e):
        yield from _largest(w, x, a, b, loops, written)


def prepare(w: Writer, work: Iterable[tuple[Map | Fold, str]], point: Point) -> set[Expr]:
    """Write the diagonals that these statements use, each with its vector dim; `Expressions` then reads them.

    Returns what was written, to be taken out of `w.diagonals` after the statements.
    """
    work, made = list(work), set[Expr]()
    written = {s.tile for s, _ in work}
    loops = {d for s, _ in work for d in (*w.tiles[s.tile].dims, *(s.over if isinstance(s, Fold) else ()))}
    for s, a in work:
        for b in sorted(loops - {a}) if a else ():
            if w.dims[b].capacity < FEWEST:
                continue
            for e in _largest(w, s.body, a, b, loops, written):
                if e not in w.diagonals:
                    _fill(w, e, a, b, point)
                    made.add(e)
    return made


def _fill(w: Writer, e: Expr, a: str, b: str, point: Point) -> None:
    name, lanes = w.names.fresh("diagonal"), w.vector(a)
    j = w.names.fresh("j")
    with w.block(f"for {j} in T.serial(T.truncdiv({w.count(a)} + {w.count(b)} + {lanes - 2}, {lanes})):"):
        here = Point(point.scalars | {b: f"({w.count(b)} - 1)"}, a, lanes, f"({j} * {lanes})", point.held)
        v = Expressions(w, here).value(e)
        text = f"cast('int32', {v.text})" if v.kind == "bool" else v.text
        w.line(f"{name}[at({lanes}, {j} * {lanes})] = splat({text}, {lanes})")
    w.buffers[name] = ((length(w, a, b),), TILE_ELEMENT[v.kind])
    w.diagonals[e] = (name, a, b, v.kind)


def length(w: Writer, a: str, b: str) -> int:
    """Elements of a diagonal, with room for whole vectors."""
    return -(-(w.padded(a) + w.dims[b].capacity + w.isa.lanes) // w.isa.lanes) * w.isa.lanes


