"""How many: extents at given sizes, points that guards leave, operations of an expression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from memcomp.ir.cascade import Cascade, Einsum, Knob, Tensor
from memcomp.ir.errors import InputError
from memcomp.ir.evaluate import Block
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, children, reads, substitute, symbols, variables
from memcomp.ir.target import BYTES

ARITHMETIC = frozenset({"add", "sub", "mul", "max", "min", "square", "relu", "floor", "round"})
FREE = frozenset({"neg", "abs", "where", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "real", "int",
                  "floordiv", "mod", "ceildiv", "shr", "shl", "bitand", "bitor", "at", "onto"})
SAMPLES = 1 << 15  # points at which a guard is asked


class Sizes:
    """Extents of all ranks of a cascade.  A ragged rank counts with its bound, a knob with its first choice, unless
    `sizes` says otherwise."""

    def __init__(self, cascade: Cascade, sizes: Mapping[str, int]) -> None:
        self.cascade, self.given = cascade, dict(sizes)
        self.known: dict[str, int] = {}

    def __call__(self, rank: str) -> int:
        if rank not in self.known:
            self.known[rank] = self._find(rank)
        return self.known[rank]

    def _find(self, rank: str) -> int:
        if rank in self.given:
            return self.given[rank]
        r = self.cascade.rank(rank)
        x = r.extent
        if isinstance(x, Knob):
            return self.given.get(x.name, x.choices[0])
        if x is not None and not reads(x):
            most: dict[Expr, Expr] = {Var(v): Const(self(v.upper()) - 1) for v in variables(x)}
            return max(int(self.number(substitute(x, most))), 0)
        if r.bound is not None:
            return r.bound
        raise InputError(f"the extent of rank {rank} is not known", hint=f"give sizes={{{rank!r}: ...}}")

    def number(self, x: Expr) -> int:
        """An expression over sizes as a number."""
        return int(Block({}, {}, _no_data, self).evaluate(x))

    def points(self, names: tuple[str, ...] | set[str]) -> int:
        return math.prod(self(v.upper()) for v in names)

    def elements(self, t: Tensor) -> int:
        return math.prod(self(r) for r in t.ranks)

    def live(self, e: Einsum) -> float:
        """Points of a statement that its guard lets take part.  Affine guards are counted, exactly on small spaces and
        at evenly spread points on large ones; guards that look at data are taken to hold."""
        total = float(self.points(e.space()))
        conds = [c for c in e.guards() if not reads(c)]
        while conds:  # guards that share variables are counted together
            group = [conds.pop(0)]
            names = variables(group[0])
            grew = True
            while grew:
                more = [c for c in conds if variables(c) & names]
                grew = bool(more)
                for c in more:
                    conds.remove(c)
                    group.append(c)
                    names |= variables(c)
            ranks = sorted(frozenset[str]().union(*map(symbols, group)) - names)
            total *= _share(tuple(group), tuple((r, self(r)) for r in ranks),
                            tuple((v, self(v.upper())) for v in sorted(names)))
        return total


def _no_data(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    raise InputError(f"the cost depends on the values of {name!r}", hint="give the extent in sizes")


@lru_cache(maxsize=4096)
def _share(conds: tuple[Expr, ...], sizes: tuple[tuple[str, int], ...], axes: tuple[tuple[str, int], ...]) -> float:
    known: dict[Expr, Expr] = {Size(r): Const(n) for r, n in sizes}
    return fraction(tuple(substitute(c, known) for c in conds), axes)


@lru_cache(maxsize=4096)
def fraction(conds: tuple[Expr, ...], axes: tuple[tuple[str, int], ...]) -> float:
    """The share of a box where all conditions hold."""
    total = math.prod(n for _, n in axes)
    if total == 0:
        return 0.0
    if total <= SAMPLES:
        block = Block({v: (0, n) for v, n in axes}, {}, _no_data, lambda r: 0)
        return _holds(block, conds) / total
    # an additive sequence (Roberts, R_d): evenly spread in every dimension, so narrow bands are met too
    d = len(axes)
    phi = 2.0
    for _ in range(60):
        phi = (1.0 + phi) ** (1.0 / (d + 1))
    steps = np.arange(1, SAMPLES + 1)
    at = {v: ((steps * phi ** -(k + 1) % 1.0) * n).astype(np.int64) for k, (v, n) in enumerate(axes)}
    points: dict[Expr, Expr] = {Var(v): Access(v, (Var("sample"),)) for v, _ in axes}
    block = Block({"sample": (0, SAMPLES)}, {}, at.__getitem__, lambda r: 0)
    return _holds(block, tuple(substitute(c, points) for c in conds)) / SAMPLES


def _holds(block: Block, conds: tuple[Expr, ...]) -> int:
    hold = np.ones(block.shape, bool)
    for c in conds:
        hold &= block.evaluate(c).astype(bool)
    return int(hold.sum())


@lru_cache(maxsize=4096)
def operations(e: Expr) -> tuple[int, int]:
    """(additions, multiplications, comparisons for max; transcendental functions and divisions) at one point.

    What does not depend on data (indices, guards, constants) costs nothing, nor do selection and sign changes.
    """
    if isinstance(e, Access) or not reads(e):
        return 0, 0
    plain = special = 0
    for k in children(e):
        a, b = operations(k)
        plain, special = plain + a, special + b
    assert isinstance(e, Call)
    if e.op in ARITHMETIC:
        plain += 1
    elif e.op not in FREE:
        special += 1
    return plain, special


def tensor_of(c: Cascade, name: str) -> Tensor:
    """The tensor with its ranks, also where its writer names them only by scatter."""
    t = c.declared(name.removesuffix("'"))
    return t if t is not None else c.tensor(name)


def width(c: Cascade, name: str) -> int:
    """Bytes of one element."""
    return BYTES[tensor_of(c, name).dtype]
