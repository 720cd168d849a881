"""Expressions and Einsums of a codec as torch operators, of any shapes, in eager and compiled graphs alike.

What is spelled here is plain index arithmetic: captured again, it is the same expression (`memcomp.capture`), and a
kernel reads codes where torch would have written numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memcomp.dtypes import DTYPES
from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, variables
from memcomp.ir.ops import ROUNDED

Value = Any  # a tensor over the axes, or a number
Axes = Mapping[str, tuple[int, int]]  # variable -> (position, extent)


def _whole(x: Value) -> Value:
    """Truth values count as 0 and 1 in arithmetic."""
    return x.to(torch.int32) if isinstance(x, Tensor) and x.dtype == torch.bool else x


def _where(c: Value, a: Value, b: Value) -> Value:
    if not isinstance(c, Tensor):
        return a if c else b
    return torch.where(c, a, b)


def _pair(tensors: Callable[[Any, Any], Tensor], numbers: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Value]:
    """A function of two of which torch asks for tensors."""
    def made(a: Value, b: Value) -> Value:
        a, b = _whole(a), _whole(b)
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return numbers(a, b)
        x, y = (v if isinstance(v, Tensor) else torch.tensor(v) for v in (a, b))
        return tensors(x, y)

    return made


_TORCH: dict[str, Callable[..., Value]] = {
    "add": lambda a, b: _whole(a) + _whole(b), "sub": lambda a, b: _whole(a) - _whole(b),
    "mul": lambda a, b: _whole(a) * _whole(b), "div": lambda a, b: a / b, "neg": lambda a: -a,
    "max": _pair(torch.maximum, max), "min": _pair(torch.minimum, min),
    "square": lambda a: a * a, "abs": lambda a: abs(a), "recip": lambda a: 1.0 / a,
    "sqrt": torch.sqrt, "exp2": torch.exp2, "log2": torch.log2, "exp": torch.exp, "log": torch.log,
    "floor": torch.floor, "round": torch.round, "where": _where,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "not": lambda a: ~a,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "ceildiv": lambda a, b: -(-a // b),
    "shr": lambda a, b: a >> b, "shl": lambda a, b: a << b, "bitand": lambda a, b: a & b, "bitor": lambda a, b: a | b,
}


def _first(best: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The best of the last dim and its place, the lowest of equals."""
    return best, (x == best[..., None]).int().argmax(-1)


_MONOIDS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "sum": lambda x: (x.sum(-1),), "max": lambda x: (x.amax(-1),), "min": lambda x: (x.amin(-1),),
    "argmax": lambda x: _first(x.amax(-1), x), "argmin": lambda x: _first(x.amin(-1), x),
}


class Speller:
    """real: the float dtype that arithmetic is done in; tensors: by name, integers and truth values as they are."""

    def __init__(self, tensors: Mapping[str, Tensor], real: torch.dtype, device: torch.device) -> None:
        self.tensors, self.real, self.device = dict(tensors), real, device

    def value(self, e: Expr, axes: Axes) -> Value:
        """The expression over the axes: a tensor that broadcasts to their extents, or a number.

        Raises Refusal for an operator that has no form here.
        """
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Var):
            at, extent = axes[e.name]
            return self._axis(torch.arange(extent, device=self.device), at, len(axes))
        if isinstance(e, Access):
            return self._read(e, axes)
        if not isinstance(e, Call):
            raise Refusal(f"{type(e).__name__} has no form in torch")
        args = [self.value(a, axes) for a in e.args]
        if e.op in ROUNDED:
            return args[0].to(DTYPES[ROUNDED[e.op]]).to(self.real) if isinstance(args[0], Tensor) else args[0]
        if e.op == "real":
            return args[0].to(self.real) if isinstance(args[0], Tensor) else float(args[0])
        if e.op == "int":
            return torch.trunc(args[0]).to(torch.int64) if isinstance(args[0], Tensor) else int(args[0])
        if e.op not in _TORCH:
            raise Refusal(f"the operator {e.op} has no form in torch")
        return _TORCH[e.op](*args)

    def _axis(self, x: Tensor, at: int, count: int) -> Tensor:
        return x.view(*(1,) * at, -1, *(1,) * (count - at - 1))

    def _read(self, e: Access, axes: Axes) -> Tensor:
        """Elements of a tensor: dims that one variable walks are picked one by one, places that are data at once."""
        t = self.tensors[e.tensor]
        t = t.to(self.real) if t.is_floating_point() else t if t.dtype in (torch.int64, torch.int32, torch.bool) \
            else t.to(torch.int32)
        walks = [variables(i) for i in e.index]
        if any(_gathers(i) for i in e.index) or any(len(w) > 1 for w in walks) or \
                len({v for w in walks for v in w}) < sum(map(len, walks)):
            places = [self.value(i, axes) for i in e.index]
            return t[tuple(p if isinstance(p, Tensor) else torch.tensor(p, device=self.device) for p in places)]
        left: list[str] = []
        for i, walk in zip(e.index, walks, strict=True):
            dim = len(left)
            if not walk:
                t = t.select(dim, int(self.value(i, {})))
                continue
            (v,) = walk
            extent = axes[v][1]
            if not (isinstance(i, Var) and t.shape[dim] == extent):
                t = t.index_select(dim, self.value(i, {v: (0, extent)}))
            left.append(v)
        order = sorted(range(len(left)), key=lambda k: axes[left[k]][0])
        t = t.permute(order)
        taken = {axes[v][0] for v in left}
        for at in range(len(axes)):
            if at not in taken:
                t = t.unsqueeze(at)
        return t

    def statement(self, s: Einsum, extents: Mapping[str, int]) -> None:
        """Compute a statement and keep its tensors.  extents: of variables.  Raises Refusal for guards."""
        if s.guard is not None:
            raise Refusal("a guard has no form in torch")
        outs = [i.name for i in s.out.index if isinstance(i, Var)]
        if len(outs) != len(s.out.index):
            raise Refusal("an output's index is no variable")
        over = list(s.reduce.over) if s.reduce else []
        axes = {v: (k, extents[v]) for k, v in enumerate((*outs, *over))}
        x = self.value(s.body, axes)
        shape = [extents[v] for v in (*outs, *over)]
        x = (x if isinstance(x, Tensor) else torch.tensor(x, device=self.device)).expand(shape)
        if s.reduce is None:
            found: Sequence[Tensor] = (x,)
        else:
            flat = x.reshape(*shape[:len(outs)], -1)
            if s.reduce.monoid not in _MONOIDS:
                raise Refusal(f"the reduction {s.reduce.monoid} has no form in torch")
            found = _MONOIDS[s.reduce.monoid](flat)
        for name, y in zip(s.names, found, strict=True):
            self.tensors[name] = y


def _gathers(e: Expr) -> bool:
    return isinstance(e, Access) or isinstance(e, Call) and any(map(_gathers, e.args))


def run(c: Cascade, tensors: Mapping[str, Tensor], real: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a cascade writes, in the dtypes that it says, for inputs by name; extents follow from their shapes.

    In float64, as `ir.interpret` computes it.  Raises Refusal for what has no form in torch.
    """
    extents = {r.name.lower(): int(r.extent.value) for r in c.ranks if isinstance(r.extent, Const)}
    for t in c.tensors:
        if t.role == "in":
            extents |= {r.lower(): n for r, n in zip(t.ranks, tensors[t.name].shape, strict=True)}
    speller = Speller(tensors, real, next(iter(tensors.values())).device)
    for s in c.einsums:
        speller.statement(s, extents)
        for name in s.names:
            dtype = DTYPES[c.tensor(name).dtype]
            x = speller.tensors[name].to(dtype)
            speller.tensors[name] = x
    return {t.name: speller.tensors[t.name] for t in c.tensors if t.role == "out"}
