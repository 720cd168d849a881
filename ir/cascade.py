"""Cascades of Einsums: ranks, tensors, statements (EDGE; FuseMax section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from memcomp.ir.expr import Access, Const, Expr, Size, Var, conjuncts, reads, variables

DTYPES = ("f64", "f32", "f16", "bf16", "e4m3", "e5m2", "i64", "i32", "i16", "i8", "u8", "bool")
Role: TypeAlias = Literal["in", "out", "state", "temp"]


@dataclass(frozen=True, slots=True)
class Knob:
    """A value still to be chosen: `?name in 32|64|128`."""

    name: str
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rank:
    """A named dimension.

    extent: None = a run-time symbol; `Const` = fixed; another expression = derived (`ceil(M/M0)`) or ragged
            (`len[b]`: the extent depends on the point; iteration stops there); `Knob` = to be chosen.
    bound:  an upper limit of a symbol or ragged extent, or None.
    iterative: generative rank: statements that carry its variable run in order, once per value, and may read
            what the previous value wrote (`RM[m1+1, p] = max(RM[m1, p], LM[m1, p])`).
    """

    name: str
    extent: Expr | Knob | None = None
    bound: int | None = None
    iterative: bool = False

    @property
    def var(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A declared tensor; temporaries may stay undeclared (f32, empty 0, ranks read off their writer).

    dtype: one of `DTYPES`.  empty: the value of points never written.
    role `state`: survives calls; `X'` is its new value, which aliases the old one and is written by scatter.
    A tensor whose rank is iterative holds one element more than the rank's extent there when it is written at `r+1`.
    """

    name: str
    ranks: tuple[str, ...]
    dtype: str = "f32"
    role: Role = "temp"
    empty: float = 0.0


@dataclass(frozen=True, slots=True)
class Reduce:
    """Reduce with a primitive monoid of `ir.ops.MONOIDS` over rank variables.

    `topk` writes two outputs (value, index) whose last index is the variable of the order rank k;
    `argmax`/`argmin` write two outputs (value, index).  The index is row-major over `over`; ties take the lowest.
    """

    monoid: str
    over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Einsum:
    """`outs = reduce{over} body where guard`.

    The iteration space is the variables of `outs` and of `reduce.over`.  Points where the guard is false do not
    take part: a reduction gets its identity there, a plain statement leaves the point empty (not written).
    Several outs without a top-k/arg monoid: not allowed.
    """

    outs: tuple[Access, ...]
    body: Expr
    reduce: Reduce | None = None
    guard: Expr | None = None

    @property
    def out(self) -> Access:
        return self.outs[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(o.tensor for o in self.outs)

    def space(self) -> tuple[str, ...]:
        """Iteration variables: those of the outputs in order, then the reduced ones."""
        seen: dict[str, None] = {}
        for o in self.outs:
            for i in o.index:
                for v in _vars_in_order(i):
                    seen.setdefault(v)
        for v in self.reduce.over if self.reduce else ():
            seen.setdefault(v)
        return tuple(seen)

    def reads(self) -> set[str]:
        """Tensors read by body, guard or output index."""
        r = reads(self.body)
        if self.guard is not None:
            r |= reads(self.guard)
        for o in self.outs:
            for i in o.index:
                r |= reads(i)
        return r

    def guards(self) -> tuple[Expr, ...]:
        return conjuncts(self.guard)


def _vars_in_order(e: Expr) -> list[str]:
    from memcomp.ir.expr import walk

    return [n.name for n in walk(e) if isinstance(n, Var)]


@dataclass(frozen=True, slots=True)
class Cascade:
    """Ranks, declared tensors and statements in order; single assignment; written before read."""

    ranks: tuple[Rank, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    einsums: tuple[Einsum, ...] = ()

    def rank(self, name: str) -> Rank:
        for r in self.ranks:
            if r.name == name:
                return r
        raise KeyError(name)

    def declared(self, name: str) -> Tensor | None:
        for t in self.tensors:
            if t.name == name:
                return t
        return None

    def tensor(self, name: str) -> Tensor:
        """The declared tensor, or the temporary with the ranks its writer gives it."""
        t = self.declared(name)
        if t is not None:
            return t
        if name.endswith("'") and (t := self.declared(name[:-1])) is not None:
            return t
        for e in self.einsums:
            for at, o in enumerate(e.outs):
                if o.tensor == name and (ranks := written_ranks(o)) is not None:
                    return Tensor(name, ranks, "i64" if at else "f32")  # the second result is an index
        raise KeyError(name)

    def writers(self, name: str) -> tuple[Einsum, ...]:
        return tuple(e for e in self.einsums if name in e.names)

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role in ("in", "state"))

    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.role in ("out", "state"))


def written_ranks(out: Access) -> tuple[str, ...] | None:
    """Rank names of a temporary from one writer: `X[m1+1, p]` -> (M1, P); None where an index names no single rank."""
    ranks = []
    for i in out.index:
        if isinstance(i, Const):
            return None
        vs = variables(i)
        if len(vs) != 1:
            return None
        ranks.append(next(iter(vs)).upper())
    return tuple(ranks)


def is_init(e: Einsum) -> bool:
    """Does this statement initialise an iterative tensor (`RM[0, p] = -inf`)?"""
    return any(isinstance(i, Const) for i in e.out.index)


def extent_of(c: Cascade, rank: str) -> int | None:
    """The extent of a rank where it is a fixed number."""
    x = c.rank(rank).extent
    return x.value if isinstance(x, Const) and isinstance(x.value, int) else None


__all__ = [
    "DTYPES", "Access", "Cascade", "Einsum", "Expr", "Knob", "Rank", "Reduce", "Role", "Size", "Tensor",
    "extent_of", "is_init", "written_ranks",
]
