"""Extents of ranks at run time: solved from shapes, given, derived, or ragged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from memcomp.ir.cascade import Cascade, Knob
from memcomp.ir.errors import InputError, VerifyError, nearest
from memcomp.ir.evaluate import Array, Block
from memcomp.ir.expr import Const, Expr, Size, Var, reads, substitute, variables, walk


class Extents:
    """One number per rank; ragged ranks have an expression and a largest value."""

    def __init__(self, cascade: Cascade, shapes: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]],
                 sizes: Mapping[str, int], tensor: Callable[[str], Array], extra: Callable[[str, int], int]) -> None:
        self.cascade, self.tensor, self.extra = cascade, tensor, extra
        self.ranks = {r.name: r for r in cascade.ranks}
        self.known: dict[str, int] = {}
        self.width: dict[str, int] = {}  # storage of ragged ranks, as the inputs show it
        self._given(sizes)
        self._solve(shapes)
        for r in cascade.ranks:
            n = self.known.get(r.name)
            if n is not None and r.bound is not None and n > r.bound:
                raise InputError(f"rank {r.name} is {n}, more than its bound {r.bound}", f"rank {r.name} <= {r.bound}")

    def _given(self, sizes: Mapping[str, int]) -> None:
        knobs = {r.extent.name: r for r in self.cascade.ranks if isinstance(r.extent, Knob)}
        for name, n in sizes.items():
            rank = knobs.get(name) or self.ranks.get(name)
            if rank is None:
                raise InputError(f"no rank or knob is named {name!r}", hint=nearest(name, [*self.ranks, *knobs]))
            if n < 0:
                raise InputError(f"the extent of rank {rank.name} is {n}", hint="extents are 0 or more")
            self._set(rank.name, int(n), f"sizes[{name!r}]")

    def _set(self, rank: str, n: int, source: str) -> None:
        x = self.ranks[rank].extent
        old = x.value if isinstance(x, Const) else self.known.get(rank)
        if old is not None and old != n:
            raise InputError(f"rank {rank} is {old}, and {source} makes it {n}", source)
        if isinstance(x, Knob) and n not in x.choices:
            raise InputError(f"knob {x.name} cannot be {n}", hint=f"choices: {', '.join(map(str, x.choices))}")
        self.known[rank] = n

    def _solve(self, shapes: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]) -> None:
        derived: list[tuple[str, int, str]] = []
        for name, (ranks, shape) in shapes.items():
            for d, (r, n) in enumerate(zip(ranks, shape, strict=True)):
                if r not in self.ranks:
                    raise VerifyError(f"tensor {name!r} has an unknown rank {r!r}", hint=nearest(r, self.ranks))
                extent = self.ranks[r].extent
                n -= self.extra(name, d)
                source = f"dimension {d} of {name!r}, shape {shape},"
                if self.ragged(r) is not None:
                    self.width[r] = max(self.width.get(r, 0), n)
                elif extent is None or isinstance(extent, (Const, Knob)):
                    self._set(r, n, source)
                else:
                    derived.append((r, n, source))
        for known in self.cascade.ranks:
            if isinstance(known.extent, Const):
                self.known[known.name] = int(known.extent.value)
            elif isinstance(known.extent, Knob):
                self.known.setdefault(known.name, known.extent.choices[0])
        for rank, n, source in derived:
            if (want := self.number(rank)) != n:
                raise InputError(f"rank {rank} is {want}, and {source} makes it {n}", source)

    def ragged(self, rank: str) -> Expr | None:
        """The extent expression of a rank whose extent depends on the point."""
        r = self.ranks.get(rank)
        if r is None:
            raise VerifyError(f"no rank is named {rank!r}", hint=nearest(rank, self.ranks))
        x = r.extent
        if x is None or isinstance(x, (Knob, Const)):
            return None
        deep = [x, *(e for n in walk(x) if isinstance(n, Size) and (e := self.ragged(n.rank)) is not None)]
        return x if any(variables(e) or reads(e) for e in deep) else None

    def number(self, rank: str) -> int:
        """The extent of a rank that is one number."""
        if rank not in self.known:
            r = self.ranks.get(rank)
            if r is None:
                raise VerifyError(f"no rank is named {rank!r}", hint=nearest(rank, self.ranks))
            if r.extent is None:
                raise InputError(f"the extent of rank {rank} is not known: no input has it",
                                 hint=f"give sizes={{{rank!r}: ...}}")
            assert not isinstance(r.extent, Knob)
            n = Block({}, {}, self.tensor, self.size).evaluate(r.extent)
            if r.bound is not None and n > r.bound:
                raise InputError(f"rank {rank} is {n}, more than its bound {r.bound}")
            self.known[rank] = max(int(n), 0)
        return self.known[rank]

    def size(self, rank: str) -> Expr | int:
        """What `Size(rank)` stands for at a point."""
        x = self.ragged(rank)
        return self.number(rank) if x is None else x

    def limit(self, rank: str, fixed: Mapping[str, int]) -> int:
        """The largest extent of a rank where the `fixed` variables have these values."""
        x = self.ragged(rank)
        if x is None:
            return self.number(rank)
        for _ in range(len(self.ranks)):  # a size may itself be ragged
            inner: dict[Expr, Expr] = {n: e for n in walk(x) if isinstance(n, Size)
                                       and (e := self.ragged(n.rank)) is not None}
            if not inner:
                break
            x = substitute(x, inner)
        axes = {v: (0, self.limit(v.upper(), fixed)) for v in sorted(variables(x) - fixed.keys())}
        block = Block(axes, fixed, self.tensor, self.size)
        live = None
        for v in axes:
            inner_x = self.ragged(v.upper())
            if inner_x is not None:
                cond = block.evaluate(Var(v)) < block.evaluate(inner_x, live)
                live = cond if live is None else live & cond
        n = block.evaluate(x, live)
        if live is not None:
            n = n[live] if n.shape == live.shape else (n * live).ravel()
        if math.prod([hi - lo for lo, hi in axes.values()]):
            most = int(n.max(initial=0))
            bound = self.ranks[rank].bound
            if bound is not None and most > bound:
                raise InputError(f"rank {rank} reaches {most}, more than its bound {bound}")
            return most
        return 0

    def stored(self, rank: str, dim: int, tensor: str) -> int:
        """Elements that a tensor made here holds in one dimension; a ragged rank is as wide as in the inputs, else as
        its largest extent."""
        if self.ragged(rank) is None:
            n = self.number(rank)
        else:
            n = self.known.get(rank, self.width.get(rank, -1))
            if n < 0:
                n = self.limit(rank, {})
        return n + self.extra(tensor, dim)
