"""Cascades of Einsums: ranks, tensors, statements (EDGE; FuseMax section 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from memcomp.ir.expr import Access, Const, Expr, Size, Var, conjuncts, keep, reads, variables, walk

DTYPES = ("f64", "f32", "f16", "bf16", "e4m3", "e5m2", "i64", "i32", "i16", "i8", "u8", "bool")
T = TypeVar("T")
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
    held: of a sum of products, the format in which the user's module holds each factor, rounded (dtype; "" = not said).
    The meaning is that of exact factors; a kernel may round one to this format, which costs no more than the module's.
    """

    monoid: str
    over: tuple[str, ...]
    held: str = ""


class _Statement:
    """What a statement knows of itself once it was asked."""

    __slots__ = ("_accesses", "_names", "_reads", "_space")
    _accesses: tuple[Access, ...]
    _names: tuple[str, ...]
    _reads: frozenset[str]
    _space: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Einsum(_Statement):
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
        try:
            return self._names
        except AttributeError:
            return keep(self, "_names", tuple(o.tensor for o in self.outs))

    def space(self) -> tuple[str, ...]:
        """Iteration variables: those of the outputs in order, then the reduced ones."""
        try:
            return self._space
        except AttributeError:
            seen = {n.name: None for o in self.outs for i in o.index for n in walk(i) if isinstance(n, Var)}
            seen |= dict.fromkeys(self.reduce.over if self.reduce else ())
            return keep(self, "_space", tuple(seen))

    def reads(self) -> frozenset[str]:
        """Tensors read by body, guard or output index."""
        try:
            return self._reads
        except AttributeError:
            return keep(self, "_reads", frozenset().union(*map(reads, self._parts())))

    def accesses(self) -> tuple[Access, ...]:
        """Every read in body, guard and output index, gathers included (not the outputs themselves)."""
        try:
            return self._accesses
        except AttributeError:
            return keep(self, "_accesses", tuple(n for x in self._parts() if reads(x)
                                                 for n in walk(x) if isinstance(n, Access)))

    def _parts(self) -> tuple[Expr, ...]:
        return (self.body, *((self.guard,) if self.guard is not None else ()), *(i for o in self.outs for i in o.index))

    def guards(self) -> tuple[Expr, ...]:
        return conjuncts(self.guard)


class _Tables:
    """Names looked up once they were asked for."""

    __slots__ = ("_declared", "_once", "_ranks", "_readers", "_temporaries", "_writers")
    _declared: dict[str, Tensor]
    _once: dict[object, Any]
    _ranks: dict[str, Rank]
    _readers: dict[str, tuple[Einsum, ...]]
    _temporaries: dict[str, Tensor]
    _writers: dict[str, tuple[Einsum, ...]]


@dataclass(frozen=True, slots=True)
class Cascade(_Tables):
    """Ranks, declared tensors and statements in order; single assignment; written before read."""

    ranks: tuple[Rank, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    einsums: tuple[Einsum, ...] = ()

    def rank(self, name: str) -> Rank:
        try:
            return self._ranks[name]
        except AttributeError:
            return keep(self, "_ranks", {r.name: r for r in reversed(self.ranks)})[name]

    def declared(self, name: str) -> Tensor | None:
        try:
            return self._declared.get(name)
        except AttributeError:
            return keep(self, "_declared", {t.name: t for t in reversed(self.tensors)}).get(name)

    def temporary(self, name: str) -> bool:
        """Is the tensor (or the new value `X'` of one) known inside the cascade only?"""
        t = self.declared(name.removesuffix("'"))
        return t is None or t.role == "temp"

    def tensor(self, name: str) -> Tensor:
        """The declared tensor, or the temporary with the ranks its writer gives it."""
        t = self.declared(name)
        if t is None and name.endswith("'"):
            t = self.declared(name[:-1])
        if t is not None:
            return t
        try:
            return self._temporaries[name]
        except AttributeError:
            found = {o.tensor: Tensor(o.tensor, ranks, "i64" if at else "f32")  # the second result is an index
                     for e in reversed(self.einsums) for at, o in reversed(list(enumerate(e.outs)))
                     if (ranks := written_ranks(o)) is not None}
            return keep(self, "_temporaries", found)[name]

    def writers(self, name: str) -> tuple[Einsum, ...]:
        try:
            return self._writers.get(name, ())
        except AttributeError:
            found: dict[str, list[Einsum]] = {}
            for e in self.einsums:
                for n in dict.fromkeys(e.names):
                    found.setdefault(n, []).append(e)
            return keep(self, "_writers", {n: tuple(es) for n, es in found.items()}).get(name, ())

    def readers(self, name: str) -> tuple[Einsum, ...]:
        """The statements that read a tensor, in order."""
        try:
            return self._readers.get(name, ())
        except AttributeError:
            found: dict[str, list[Einsum]] = {}
            for e in self.einsums:
                for n in e.reads():
                    found.setdefault(n, []).append(e)
            return keep(self, "_readers", {n: tuple(es) for n, es in found.items()}).get(name, ())

    def once(self, f: Callable[[Cascade], T]) -> T:
        """f(self), computed when it is first asked for."""
        try:
            known = self._once
        except AttributeError:
            known = keep(self, "_once", {})
        if f not in known:
            known[f] = f(self)
        return known[f]  # type: ignore[no-any-return]

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
