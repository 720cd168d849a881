"""What rewrites made of a program is held to the program itself when it is compiled: both are interpreted in float64.

Proofs say why a form means the same; this looks whether it does, where that is cheap: each program once, with extents
of a few points (of a rank that is walked in tiles, one tile and a part of another).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memcomp.ir.cascade import Einsum, Tensor, extent_of
from memcomp.ir.counts import Sizes
from memcomp.ir.errors import InputError, Refusal
from memcomp.ir.expr import Access, Call, Expr, Size, children, reads, walk
from memcomp.ir.interpret import interpret
from memcomp.ir.kinds import kind_of, kind_of_dtype
from memcomp.ir.ops import COMPARISONS, ROUNDED
from memcomp.ir.program import Program
from memcomp.ir.show import show_expr

FEW = 3  # points of a rank that no tile cuts
POINTS = 1 << 19  # of all statements of a form together: some tens of milliseconds
FAR = 1e-6  # apart, relative to the largest element or to 1 (a form may cancel to 0): a wrong law moves more
KINDS = ("plain", "large, with ties")
CHOOSING = frozenset({"max", "min", "argmax", "argmin", "topk"})
PRODUCTS, SUMS = frozenset({"mul", "div", "square"}), frozenset({"add", "sub"})


def recheck(before: Program, after: Program) -> bool:
    """Do both give the same on random data?  False where nothing was looked at, because it would take long or the data
    that were drawn mean nothing to the program (an index past the end).

    after: `before` rewritten, its knobs closed.  Elements that `before` has not finite are not compared: a safe form
    may have them.  Raises Refusal where the results differ.
    """
    sizes = _small(before, after)
    for kind in KINDS:
        try:
            if max(_points(before, sizes), _points(after, sizes)) > POINTS:
                return False
            data = _data(before, sizes, kind)
            want = interpret(before, data, _symbols(before, sizes))
        except InputError:
            return False
        got = interpret(after, data, _symbols(after, sizes))
        for t in before.cascade.outputs():
            real = kind_of_dtype(t.dtype) == "real"
            if kind != KINDS[0] and not real:
                continue  # places of what ties are free
            for name in {t.name, t.name + "'"} & want.keys():
                if not _near(got[name], want[name], real):
                    raise Refusal(f"the rewritten program gives another {name} than the program that was read",
                                  before.name, f"on {kind} data with {sizes}; this is a fault of memcomp's rewrites")
    return True


def _near(got: Any, want: Any, real: bool) -> bool:
    if got.shape != want.shape:
        return False
    if not real:
        return bool(np.array_equal(got, want))
    finite = np.isfinite(want)
    if not finite.any():
        return True
    return bool((np.abs(got[finite] - want[finite]) <= FAR * max(1.0, np.abs(want[finite]).max())).all())


def _small(before: Program, after: Program) -> dict[str, int]:
    """Extents of the symbolic ranks of `before`."""
    tiles: dict[str, int] = {}
    for r in after.cascade.ranks:
        x = r.extent
        if isinstance(x, Call) and x.op == "ceildiv" and isinstance(x.args[0], Size):
            size = x.args[1]
            n = extent_of(after.cascade, size.rank) if isinstance(size, Size) else getattr(size, "value", None)
            if isinstance(n, int):
                tiles[x.args[0].rank] = n + FEW
    return {r.name: min(tiles.get(r.name, FEW), r.bound or tiles.get(r.name, FEW))
            for r in before.cascade.ranks if r.extent is None}


def _symbols(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    """Extents that no input of the program may show."""
    return {r.name: sizes[r.name] for r in program.cascade.ranks if r.extent is None and r.name in sizes}


def _points(program: Program, sizes: Mapping[str, int]) -> int:
    n = Sizes(program.cascade, sizes)
    return sum(n.points(e.space()) for e in program.cascade.einsums)


def _data(program: Program, sizes: Mapping[str, int], kind: str) -> dict[str, Any]:
    """Inputs: reals standard normal or large and rounded; integers below the smallest extent, so that they may index
    any rank."""
    n, random = Sizes(program.cascade, sizes), np.random.default_rng(0)
    least = min((n(r.name) for r in program.cascade.ranks), default=1)

    def one(t: Tensor) -> Any:
        shape = tuple(n(r) for r in t.ranks)
        if kind_of_dtype(t.dtype) == "real":
            x = random.standard_normal(shape)
            return x if kind == KINDS[0] else np.round(30.0 * x)
        return random.integers(0, 2 if t.dtype == "bool" else max(1, least), shape)

    return {t.name: one(t) for t in program.cascade.inputs()}


def steady(closed: Program) -> None:
    """Refusal where numbers that are made again are compared with the best of themselves (`p >= max(p)`) and rounding
    decides: a product and a sum after it are one operation on some machines, in some places of a kernel."""
    c = closed.cascade
    makers = {o.tensor: e for e in c.einsums for o in e.outs}
    places = {o.tensor for e in c.einsums for o in e.outs[1:]}

    def dtype(name: str) -> str:
        t = c.declared(name)
        return t.dtype if t is not None else "i64" if name in places else "f32"

    def behind(e: Expr) -> dict[str, Einsum]:
        """The statements that a value comes from, by the tensors that they write."""
        found: dict[str, Einsum] = {}
        left = list(reads(e))
        while left:
            name = left.pop()
            if name in makers and name not in found and dtype(name) != "i64":
                found[name] = makers[name]
                left += reads(makers[name].body)
        return found

    for x in {n for e in c.einsums for part in (e.body, *e.guards()) for n in walk(part)
              if isinstance(n, Call) and n.op in COMPARISONS and all(kind_of(a, dtype) == "real" for a in n.args)}:
        for best, other in (x.args, x.args[::-1]):
            chosen = {n for n, e in behind(best).items() if e.reduce is not None and e.reduce.monoid in CHOOSING}
            made = behind(other)
            if not chosen or not made or isinstance(other, Access):
                continue
            used = {o for e in (other, *(e.body for e in made.values() if e.reduce is None)) for o in _fusible(e)}
            if used & PRODUCTS and used & SUMS:
                raise Refusal(f"{show_expr(other)} is made anew to be compared with the best of such numbers, "
                              f"{', '.join(sorted(chosen))}, and may be rounded otherwise", closed.name,
                              "compare before numbers are added and multiplied, where their order is the same")


def _fusible(e: Expr) -> frozenset[str]:
    """The operators of a value, without those of integers and those that are rounded one by one: nothing is fused with
    them."""
    if isinstance(e, Access) or isinstance(e, Call) and e.op == "real":
        return frozenset()
    below = frozenset[str]().union(*map(_fusible, children(e)))
    if isinstance(e, Call) and e.op in ROUNDED and not (below & PRODUCTS and below & SUMS):
        return frozenset()
    return below | {e.op} if isinstance(e, Call) else below
