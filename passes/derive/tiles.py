"""Tiles: a stream variable cut into steps and points, and the carried statements written for one tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memcomp.ir.cascade import Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, children, conjunction, reads, rebuild, variables, walk
from memcomp.passes.derive.terms import product


@dataclass(frozen=True, slots=True)
class Cut:
    """A stream variable v cut as v = ((m2*)M1 + m1)*M0 + m0; outer is the parallel split or None."""

    carried: str
    outer: str | None
    step: str
    inner: str
    extent: Expr

    @property
    def index(self) -> Expr:
        at: Expr = Var(self.step)
        if self.outer is not None:
            at = Call("add", (Call("mul", (Var(self.outer), Size(self.step.upper()))), at))
        return Call("add", (Call("mul", (at, Size(self.inner.upper()))), Var(self.inner)))

    @property
    def tail(self) -> Expr:
        return Call("lt", (self.index, self.extent))

    @property
    def point(self) -> tuple[Expr, ...]:
        """Index of a tile tensor where the uncut one had v."""
        return (*self.lead, Var(self.step), Var(self.inner))

    @property
    def lead(self) -> tuple[Expr, ...]:
        return () if self.outer is None else (Var(self.outer),)


@dataclass(slots=True)
class Tiles:
    """Writes the carried part of one stage.

    tiled:   carried tensors to cut -> their statement.  named: inlined map body -> its tensor.
    symbols: stand-ins for tiles made elsewhere -> (the tile, its ranks).
    wanted:  tile tensor -> the name it would like back.
    """

    cut: Cut
    tiled: Mapping[str, Einsum]
    named: Mapping[Expr, str]
    fresh: Callable[[str], str]
    symbols: dict[str, tuple[Access, set[str]]] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    init: list[Einsum] = field(default_factory=list)
    body: list[Einsum] = field(default_factory=list)
    merge: list[Einsum] = field(default_factory=list)
    _cut: dict[str, str] = field(default_factory=dict)
    _maps: dict[tuple[Expr, tuple[Expr, ...]], Access] = field(default_factory=dict)

    def tile(self, e: Expr) -> Expr:
        """The expression at a point of the tile; cut tensors it reads are written first."""
        if e == Var(self.cut.carried):
            return self.cut.index
        if isinstance(e, Access) and e.tensor in self.symbols:
            return self.symbols[e.tensor][0]
        if isinstance(e, Access) and e.tensor in self.tiled:
            return self._cut_access(e)
        kids = children(e)
        return rebuild(e, tuple(self.tile(k) for k in kids)) if kids else e

    def _cut_access(self, e: Access) -> Access:
        index: list[Expr] = []
        for i in e.index:
            index += self.cut.point if i == Var(self.cut.carried) else [self.tile(i)]
        return Access(self._cut_tensor(e.tensor), tuple(index))

    def _cut_tensor(self, name: str) -> str:
        """The tile version of a carried statement."""
        if name not in self._cut:
            s = self.tiled[name]
            self._cut[name] = mine = self.fresh(name)
            self.wanted[mine] = name
            target = self._cut_access(Access(name, s.out.index))
            body = self.tile(s.body)
            self.body.append(Einsum((target,), body, s.reduce, self.guarded(s.guards())))
        return self._cut[name]

    def guarded(self, conds: tuple[Expr, ...]) -> Expr | None:
        return conjunction([self.cut.tail, *(self.tile(c) for c in conds)])

    def _map(self, e: Expr, hint: str, guard: tuple[Expr, ...], space: tuple[str, ...]) -> Access:
        """A named tile map over the variables of `e` (in the order of `space`)."""
        key = (e, guard)
        if key not in self._maps:
            body = self.tile(e)
            where = self.guarded(guard)
            used = variables(body) | (variables(where) if where is not None else set())
            index: list[Expr] = []
            for v in space:
                if v == self.cut.carried:
                    index += self.cut.point
                elif v in used:
                    index.append(Var(v))
            out = Access(self.fresh(hint), tuple(index))
            self.body.append(Einsum((out,), body, None, where))
            self._maps[key] = out
        return self._maps[key]

    def operand(self, e: Expr, hint: str, space: tuple[str, ...], guard: tuple[Expr, ...]) -> Expr:
        """An element to reduce where `guard` holds: an access or constant as it is, else through a named map."""
        if isinstance(e, (Access, Const)):
            return self.tile(e)
        if e in self.named and self.named[e] in self.tiled:
            s = self.tiled[self.named[e]]
            return self._cut_access(Access(self.named[e], s.out.index))
        return self._map(e, hint, guard if self._shielded(e) else (), space)

    def _shielded(self, e: Expr) -> bool:
        """Does it read where only a guard may allow it (`X[m - 1]`, `X[pages[m]]`)?"""
        v = Var(self.cut.carried)
        indices = [i for n in walk(e) if isinstance(n, Access) and not n.tensor.startswith("$") for i in n.index]
        return any(i != v and (self.cut.carried in variables(i) and not _part(i, v) or reads(i)) for i in indices)

    def ranks(self, e: Expr) -> set[str]:
        """Variables that the value of a factor depends on."""
        if isinstance(e, Access) and e.tensor in self.symbols:
            return self.symbols[e.tensor][1]
        return set(variables(e))

    def pair(self, factors: list[tuple[Expr, float]], hint: str, space: tuple[str, ...],
             guard: tuple[Expr, ...]) -> Expr:
        """The summand as an element, or a product of two elements (a dot); the rest is hoisted into maps."""
        if not factors:
            return Const(1.0)
        groups: list[list[tuple[Expr, float]]] = []
        ranks: list[set[str]] = []
        for e, p in sorted(factors, key=lambda f: -len(self.ranks(f[0]))):
            mine = self.ranks(e)
            fits = [i for i, r in enumerate(ranks) if mine <= r]
            if fits:
                groups[min(fits, key=lambda i: len(ranks[i]))].append((e, p))
            else:
                groups.append([(e, p)])
                ranks.append(mine)
        while len(groups) > 2:
            groups[1] += groups.pop()
        if len(groups) == 1 and len(groups[0]) == 1 and groups[0][0][1] == 2:
            groups = [[(groups[0][0][0], 1)]] * 2
        sides = [self.operand(g[0][0] if len(g) == 1 and g[0][1] == 1 else product(g), hint, space, guard)
                 for g in groups]
        return sides[0] if len(sides) == 1 else Call("mul", (sides[0], sides[1]))


def _part(i: Expr, v: Var) -> bool:
    """v cut by a constant: never outside the tensor when v is not."""
    return isinstance(i, Call) and i.op in ("floordiv", "mod") and i.args[0] == v and isinstance(i.args[1], Const)
