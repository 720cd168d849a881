"""Expressions: what an Einsum computes at one point, and where it reads.

One type serves values, indices, guards and extents, so an index may gather (`pages[indptr[b] + n // 16]`)
and a guard may look at data (`m <= pos[p]`).  All nodes are frozen values; equality is by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, Union


class _Sugar:
    """Infix building for code that writes expressions; comparisons are `.lt()` etc. since == is structural.

    The slots are what a node knows of itself once it was asked: trees share parts, and rewrites ask again and again.
    """

    __slots__ = ("_hash", "_reads", "_symbols", "_variables")
    _hash: int
    _reads: frozenset[str]
    _symbols: frozenset[str]
    _variables: frozenset[str]

    def __add__(self, other: Like) -> Call:
        return call("add", self, other)

    def __radd__(self, other: Like) -> Call:
        return call("add", other, self)

    def __sub__(self, other: Like) -> Call:
        return call("sub", self, other)

    def __rsub__(self, other: Like) -> Call:
        return call("sub", other, self)

    def __mul__(self, other: Like) -> Call:
        return call("mul", self, other)

    def __rmul__(self, other: Like) -> Call:
        return call("mul", other, self)

    def __truediv__(self, other: Like) -> Call:
        return call("div", self, other)

    def __floordiv__(self, other: Like) -> Call:
        return call("floordiv", self, other)

    def __mod__(self, other: Like) -> Call:
        return call("mod", self, other)

    def __neg__(self) -> Call:
        return call("neg", self)


@dataclass(frozen=True, slots=True, eq=False)
class Const(_Sugar):
    """A number or truth value.  `True`, `1` and `1.0` are three different constants; NaN equals itself."""

    value: bool | int | float

    def _key(self) -> tuple[str, str]:
        return type(self.value).__name__, repr(self.value)

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Const and hash(self) == hash(other) and self._key() == other._key())

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            return keep(self, "_hash", hash(self._key()))


@dataclass(frozen=True, slots=True, eq=False)
class Var(_Sugar):
    """A rank variable (lower case); its rank is the same name in upper case; an integer."""

    name: str

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Var and self.name == other.name)

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Size(_Sugar):
    """The extent of a rank (upper case); an integer."""

    rank: str

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Size and self.rank == other.rank)

    def __hash__(self) -> int:
        return hash(self.rank)


@dataclass(frozen=True, slots=True, eq=False)
class Access(_Sugar):
    """One element of a tensor; `index` has one integer expression per rank of the tensor."""

    tensor: str
    index: tuple[Expr, ...]

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Access and hash(self) == hash(other) and self.tensor == other.tensor
                                 and self.index == other.index)

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            return keep(self, "_hash", hash((self.tensor, self.index)))


@dataclass(frozen=True, slots=True, eq=False)
class Call(_Sugar):
    """A row of `ir.ops` applied to arguments."""

    op: str
    args: tuple[Expr, ...]

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Call and hash(self) == hash(other) and self.op == other.op
                                 and self.args == other.args)

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            return keep(self, "_hash", hash((self.op, self.args)))


_NOTHING: frozenset[str] = frozenset()
_T = TypeVar("_T")


def keep(node: object, slot: str, value: _T) -> _T:
    """Note in a frozen node what it says of itself."""
    object.__setattr__(node, slot, value)
    return value


Expr: TypeAlias = Union[Const, Var, Size, Access, Call]
Like: TypeAlias = Union[Const, Var, Size, Access, Call, bool, int, float, _Sugar]


def lift(x: Like) -> Expr:
    """A Python number becomes a `Const`; an expression stays."""
    return Const(x) if isinstance(x, (bool, int, float)) else x  # type: ignore[return-value]


def call(op: str, *args: Like) -> Call:
    return Call(op, tuple(lift(a) for a in args))


def children(e: Expr) -> tuple[Expr, ...]:
    if isinstance(e, Access):
        return e.index
    if isinstance(e, Call):
        return e.args
    return ()


def rebuild(e: Expr, kids: tuple[Expr, ...]) -> Expr:
    if isinstance(e, Access):
        return e if kids == e.index else Access(e.tensor, kids)
    if isinstance(e, Call):
        return e if kids == e.args else Call(e.op, kids)
    return e


def walk(e: Expr) -> Iterator[Expr]:
    """All nodes, parents first, left to right."""
    todo = [e]
    while todo:
        n = todo.pop()
        yield n
        if type(n) is Call:
            todo += n.args[::-1]
        elif type(n) is Access:
            todo += n.index[::-1]


def depth(e: Expr) -> int:
    """Nodes on the longest way from the root to a leaf.  Not recursive: asked of expressions that may be too deep."""
    level, count = {id(e): e}, 0
    while level:
        level, count = {id(k): k for n in level.values() for k in children(n)}, count + 1
    return count


def transform(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Apply `f` to every node, children first."""
    kids = children(e)
    return f(rebuild(e, tuple(transform(k, f) for k in kids)) if kids else e)


def substitute(e: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace whole nodes (outermost match first, replacements are not searched again)."""
    if e in table:
        return table[e]
    kids = children(e)
    return rebuild(e, tuple(substitute(k, table) for k in kids)) if kids else e


def variables(e: Expr) -> frozenset[str]:
    """Names of the rank variables in `e`."""
    if type(e) is Var:
        return frozenset((e.name,))
    try:
        return e._variables
    except AttributeError:
        return keep(e, "_variables", _NOTHING.union(*map(variables, children(e))))


def reads(e: Expr) -> frozenset[str]:
    """Names of the tensors read in `e`, index gathers included."""
    try:
        return e._reads
    except AttributeError:
        own = (e.tensor,) if type(e) is Access else ()
        return keep(e, "_reads", _NOTHING.union(own, *map(reads, children(e))))


def symbols(e: Expr) -> frozenset[str]:
    """Names of the rank variables and of the sizes (upper case) in `e`."""
    if type(e) is Var:
        return frozenset((e.name,))
    if type(e) is Size:
        return frozenset((e.rank,))
    try:
        return e._symbols
    except AttributeError:
        return keep(e, "_symbols", _NOTHING.union(*map(symbols, children(e))))


def conjuncts(guard: Expr | None) -> tuple[Expr, ...]:
    """The guard as a list of conditions that must all hold."""
    if guard is None:
        return ()
    if isinstance(guard, Call) and guard.op == "and":
        return tuple(c for a in guard.args for c in conjuncts(a))
    return (guard,)


def conjunction(parts: tuple[Expr, ...] | list[Expr]) -> Expr | None:
    """The inverse of `conjuncts`: left-nested `and`, duplicates dropped, None when there is nothing to say."""
    out: Expr | None = None
    for p in dict.fromkeys(parts):
        out = p if out is None else Call("and", (out, p))
    return out
