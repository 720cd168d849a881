"""A graph of torch operators, written node by node: each with the fake tensor or the size that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from memcomp.ir.errors import Refusal

MOST = 1 << 48  # elements; a size without a bound is less


class Graph:
    """Calls of torch operators; sizes may be symbols, of which nothing is known but the range given.

    hints: what sizes are taken for where ways of computing are compared; others get numbers that no two share, so that
    torch takes no two of them for equal.
    """

    def __init__(self, hints: Mapping[str, int], ranges: Mapping[str, tuple[int, int | None]]) -> None:
        self.hints, self.ranges = hints, ranges
        self.env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self.fake = FakeTensorMode(shape_env=self.env)
        self.root, self.graph = torch.nn.Module(), fx.Graph()
        self.used = set(hints.values())
        self.literals: dict[fx.Node, bool | int | float] = {}
        self.name = ""  # of the nodes made next
        self.wanted: Callable[[], torch.Tensor]  # what TVM says that they give

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call.  Raises Refusal where torch does not take these arguments."""
        values = fx.map_arg((args, kwargs), value)
        try:
            with self.fake:
                made = target(*values[0], **values[1])
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise Refusal(f"torch does not take it: {str(error).partition(chr(10))[0]}") from error
        if self.env.replacements:
            raise Refusal(f"sizes that TVM does not know to be equal: {self.env.replacements}")
        return self._node("call_function", target, made, args, kwargs)

    def symbol(self, name: str) -> torch.SymInt:
        """A size that is known when the kernel runs."""
        least, most = self.ranges.get(name, (0, None))
        hint = self.hints.get(name, 0)
        if not hint:
            hint = sympy.nextprime(1000) if most is None or most > 1000 else most
            while hint in self.used:
                hint = sympy.nextprime(hint) if most is None or most > 1000 else hint - 1
        hint = max(int(hint), least)
        self.used.add(hint)
        where = ConstantSource(name)
        found = self.env.create_symbol(hint, where, DimDynamic.DYNAMIC)
        made = self.env.create_symintnode(found, hint=hint, source=where)
        assert isinstance(made, torch.SymInt)
        self.env.constrain_symbol_range(found, least, MOST if most is None else most)
        return made

    def given(self, made: torch.Tensor) -> fx.Node:
        """An input of the graph, which Python can call by its name."""
        node = self._node("placeholder", self.name, made)
        node.target = node.name
        return node

    def first(self, size: torch.SymInt) -> fx.Node:
        """A size as an input of the graph, before all others."""
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            return self._node("placeholder", "size", size)

    def empty(self, shape: tuple[Any, ...], dtype: torch.dtype, weight: bool = False) -> torch.Tensor:
        """Raises Refusal where a size would be negative at the sizes that are looked at."""
        with self.fake:
            try:
                made = torch.empty(fx.map_arg(shape, value), dtype=dtype)
            except RuntimeError as error:
                raise Refusal(f"a shape that cannot be: {str(error).partition(chr(10))[0]}",
                              hint="FuseRegions(sizes=...) says which sizes to look at") from error
            return torch.nn.Parameter(made, requires_grad=False) if weight else made

    def held(self, data: torch.Tensor) -> fx.Node:
        """A tensor that is known: a weight, or without dimensions a number that the user wrote."""
        if not data.ndim:
            node = self(torch.full, (), data.item(), dtype=data.dtype)
            self.literals[node] = data.item()
            return node
        name = f"weight{len(list(self.root.parameters()))}"
        setattr(self.root, name, torch.nn.Parameter(data, requires_grad=False))
        return self._node("get_attr", name, self.empty(tuple(data.shape), data.dtype, True))

    def plain(self, x: Any) -> Any:
        """The number that a node holds which the user wrote; anything else as it is."""
        return self.literals.get(x, x) if isinstance(x, fx.Node) else x

    def other(self, target: Any, made: Any, *args: Any) -> fx.Node:
        """A node that gives `made`, by what torch does not know."""
        return self._node("call_function", target, made, args)

    def _node(self, op: str, target: Any, made: Any, args: tuple[Any, ...] = (),
              kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, dict(kwargs or {}), self.name or None)
        node.meta["example_value"] = made
        return node


def value(node: fx.Node) -> Any:
    """What a node gives: a fake tensor, several, a size; None where nothing is known of it."""
    return node.meta["example_value"]
