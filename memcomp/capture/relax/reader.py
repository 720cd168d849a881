"""Relax bindings -> a graph of torch operators: one node or more for each, with TVM's variable kept beside it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.dlpack import from_dlpack

from memcomp.capture.extent import extent, same
from memcomp.capture.region import Refused
from memcomp.capture.relax.graph import Graph, value
from memcomp.capture.relax.table import ROWS, dtype
from memcomp.ir.errors import Refusal

IN_PLACE = ("call_tir_inplace", "call_inplace_packed")


@dataclass(frozen=True)
class Block:
    """Bindings as a graph.

    tensors: TVM's expression of a node that is one whole value of TVM's; sizes: of one that is a size.
    at: the binding that a node was made for.  writes: bindings that write where one of their arguments lies.
    left: operators that have no row, or not with these arguments.
    """

    gm: fx.GraphModule
    tensors: Mapping[fx.Node, Any]
    sizes: Mapping[fx.Node, Any]
    at: Mapping[fx.Node, int]
    writes: frozenset[int]
    left: tuple[Refused, ...]


def functions(module: Any) -> Iterator[tuple[Any, Any]]:
    """(name, function) of the Relax functions of an IRModule that are its own, not another compiler's."""
    from tvm import relax

    for name, function in module.functions.items():
        if isinstance(function, relax.Function) and not {"Codegen", "Composite"} & set((function.attrs or {}).keys()):
            yield name, function


def read(function: Any, bindings: Sequence[Any], outputs: Iterable[Any], sizes: Mapping[str, int]) -> Block:
    """The graph of `bindings`, which are pure and stand in this order in `function`.

    outputs: what is used behind them; sizes: what symbolic sizes are taken for where ways of computing are compared, by
    name.
    """
    reading = _Reading(function, sizes)
    for var in _free(bindings, outputs):
        reading.introduce(var)
    for k, binding in enumerate(bindings):
        reading.bind(k, binding)
    return reading.done(outputs)


def _free(bindings: Sequence[Any], outputs: Iterable[Any]) -> list[Any]:
    """Variables that are used and bound elsewhere, in the order of their use."""
    from tvm import relax

    bound = {b.var for b in bindings}
    found: dict[Any, None] = {}

    def visit(x: Any) -> None:
        if isinstance(x, relax.Var):
            if x not in bound and not _is_size(x.ty):
                found[x] = None
        elif isinstance(x, relax.Tuple):
            for field in x.fields:
                visit(field)
        elif isinstance(x, relax.TupleGetItem):
            visit(x.tuple_value)
        elif isinstance(x, relax.Call):
            for a in x.args:
                visit(a)

    for x in (*(b.value for b in bindings), *outputs):
        visit(x)
    return list(found)


def outside(*_: Any) -> Any:
    """Stands in a graph for what only TVM computes."""
    raise Refusal("an operator of TVM's that has no row was asked to run")


class _Reading:
    def __init__(self, function: Any, sizes: Mapping[str, int]) -> None:
        attributes = function.attrs or {}
        least = {str(n): int(x) for n, x in dict(attributes.get("tir_var_lower_bound", {})).items()}
        most = {str(n): int(x) for n, x in dict(attributes.get("tir_var_upper_bound", {})).items()}
        self.g = Graph(sizes, {n: (least.get(n, 0), most.get(n)) for n in {*least, *most}})
        inputs = attributes.get("num_input")  # TVM's mark: what comes after these are weights
        self.weights = set() if inputs is None else set(list(function.params)[int(inputs):])
        self.values: dict[Any, Any] = {}
        self.symbols: dict[Any, torch.SymInt] = {}
        self.nodes: dict[Any, fx.Node] = {}
        self.tensors: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, Any] = {}
        self.at: dict[fx.Node, int] = {}
        self.writes: set[int] = set()
        self.left: dict[str, Refused] = {}

    # -- variables ------------------------------------------------------------------------------------------------

    def introduce(self, var: Any) -> None:
        """A variable that is bound elsewhere."""
        try:
            made = self.fake(var.ty, var in self.weights)
        except Refusal:
            return
        if isinstance(made, torch.Tensor):
            self.g.name = var.name
            self.keep(var, self.g.given(made))

    def keep(self, var: Any, made: Any) -> None:
        """`var` is what `made` gives; its dimensions show sizes."""
        self.values[var] = made
        if not isinstance(made, fx.Node):
            return
        self.tensors.setdefault(made, var)
        for dim, e in enumerate(_shape(var.ty)):
            if _is_var(e) and e not in self.nodes:
                self.symbol(e)
                self.nodes[e] = node = self.g(torch.ops.aten.sym_size.int, made, dim)
                self.sizes[node] = e

    def symbol(self, var: Any) -> torch.SymInt:
        if var not in self.symbols:
            self.symbols[var] = self.g.symbol(var.name)
        return self.symbols[var]

    def fake(self, ty: Any, weight: bool = False) -> Any:
        """A value of a type.  Raises Refusal for what is no tensor of known rank, nor several."""
        from tvm import relax

        if isinstance(ty, relax.TensorType) and ty.shape is not None and isinstance(ty.shape, relax.ShapeExpr):
            shape = tuple(_folded(e, self.symbol, _apply) for e in ty.shape.values)
            return self.g.empty(shape, dtype(ty.dtype), weight)
        if isinstance(ty, relax.TupleType):
            return tuple(self.fake(t) for t in ty.fields)
        raise Refusal(f"a value of type {ty}")

    # -- arguments ------------------------------------------------------------------------------------------------

    def size(self, e: Any) -> int | fx.Node:
        """A size as an argument: a number, or the node that gives it."""

        def leaf(var: Any) -> fx.Node:
            if var not in self.nodes:
                self.nodes[var] = node = self.g.first(self.symbol(var))
                self.sizes[node] = var
            return self.nodes[var]

        made: int | fx.Node = _folded(e, leaf, self.g)
        if isinstance(made, fx.Node):
            self.sizes.setdefault(made, e)
        return made

    def argument(self, x: Any) -> Any:
        from tvm import ir, relax, tirx

        if isinstance(x, relax.Var) and not _is_size(x.ty):
            if x not in self.values:
                raise Refusal(f"{x.name} is {x.ty}")
            return self.values[x]
        if isinstance(x, ir.GenericConst):
            return self.constant(x)
        if isinstance(x, relax.ShapeExpr):
            return tuple(self.size(e) for e in x.values)
        if isinstance(x, relax.Tuple):
            return tuple(self.argument(f) for f in x.fields)
        if isinstance(x, (tirx.FloatImm, ir.StringImm)):
            return x.value
        return self.size(x)

    def constant(self, x: Any) -> fx.Node:
        known = self.values.get(x)
        if known is None:
            known = self.values[x] = self.g.held(from_dlpack(x.value))
            self.tensors[known] = x
        assert isinstance(known, fx.Node)
        return known

    # -- bindings -------------------------------------------------------------------------------------------------

    def bind(self, k: int, binding: Any) -> None:
        from tvm import relax

        var, x, before = binding.var, binding.value, len(self.g.graph.nodes)
        self.g.name = var.name
        if isinstance(binding, relax.MatchCast):
            self.outside(var, x)
        else:
            self.g.wanted = lambda: self.fake(var.ty)
            try:
                made = self.expression(x)
                if not _agrees(made, var.ty, self):
                    raise Refusal(f"torch gives {_shown(made)}, TVM {var.ty}")
                self.keep(var, made)
            except Refusal as why:
                name = _name(x)
                self.left.setdefault(name, Refused(name, why.what))
                self.outside(var, x)
                if name in IN_PLACE:
                    self.writes.add(k)
        for node in list(self.g.graph.nodes)[before:]:
            self.at.setdefault(node, k)

    def expression(self, x: Any) -> Any:
        from tvm import ir, relax

        if isinstance(x, relax.TupleGetItem):
            whole = self.argument(x.tuple_value)
            if isinstance(whole, tuple):
                return whole[x.index]
            return ROWS["item"](self.g, None, whole, int(x.index))
        if not isinstance(x, relax.Call):
            return self.argument(x)
        row = ROWS.get(_name(x)) if isinstance(x.op, ir.Op) else None
        if row is None:
            raise Refusal("it has no row in memcomp's table of Relax operators")
        return row(self.g, x.attrs, *(self.argument(a) for a in x.args))

    def outside(self, var: Any, x: Any) -> None:
        """`var` is computed by TVM, from what `x` names."""
        try:
            made = self.fake(var.ty)
        except Refusal:
            return
        named = [self.values[v] for v in _free([], [x]) if isinstance(self.values.get(v), fx.Node)]
        self.keep(var, self.g.other(outside, made, *named))

    def done(self, outputs: Iterable[Any]) -> Block:
        self.g.graph.output(tuple(n for v in outputs for n in self.flat(self.values.get(v))))
        gm = fx.GraphModule(self.g.root, self.g.graph)
        return Block(gm, self.tensors, self.sizes, self.at, frozenset(self.writes), tuple(self.left.values()))

    def flat(self, x: Any) -> Iterator[fx.Node]:
        """The tensors of a value that may be several."""
        if isinstance(x, fx.Node) and isinstance(value(x), (tuple, list)):
            x = tuple(ROWS["item"](self.g, None, x, k) for k in range(len(value(x))))
        if isinstance(x, fx.Node):
            yield x
        for part in x if isinstance(x, tuple) else ():
            yield from self.flat(part)


def _agrees(made: Any, ty: Any, reading: _Reading) -> bool:
    """Is this what TVM says that it is?"""
    if isinstance(made, tuple):
        return True  # of variables that agree, or of sizes
    shown = value(made)
    if isinstance(shown, (tuple, list)):
        wanted = reading.fake(ty)
        return isinstance(wanted, tuple) and len(wanted) == len(shown) and all(map(_alike, shown, wanted))
    return _alike(shown, reading.fake(ty))


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.ndim == b.ndim \
        and all(same(extent(m), extent(n)) for m, n in zip(a.shape, b.shape, strict=True))


def _shown(made: Any) -> str:
    shown = value(made) if isinstance(made, fx.Node) else made
    return f"{tuple(shown.shape)} of {shown.dtype}" if isinstance(shown, torch.Tensor) else str(shown)


def _name(x: Any) -> str:
    """What is called, as TVM names it, without `relax.` for its own operators."""
    from tvm import ir, relax

    if not isinstance(x, relax.Call):
        return type(x).__name__
    if isinstance(x.op, ir.Op):
        return str(x.op.name).removeprefix("relax.")
    return str(getattr(x.op, "name_hint", None) or getattr(x.op, "global_symbol", None) or type(x.op).__name__)


def _shape(ty: Any) -> Sequence[Any]:
    from tvm import relax

    known = isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr)
    return list(ty.shape.values) if known else ()


def _is_size(ty: Any) -> bool:
    from tvm import ir

    return isinstance(ty, ir.PrimType)


def _is_var(e: Any) -> bool:
    from tvm import ir

    return isinstance(e, ir.Var)


def _apply(target: Any, a: Any, b: Any) -> Any:
    return target(a, b)


def _folded(e: Any, leaf: Callable[[Any], Any], apply: Callable[[Any, Any, Any], Any]) -> Any:
    """A size: numbers as they are, variables as `leaf` says, and `apply(operator, left, right)` around them."""
    from tvm import tirx

    operators: dict[Any, Any] = {
        tirx.Add: operator.add, tirx.Sub: operator.sub, tirx.Mul: operator.mul, tirx.FloorDiv: operator.floordiv,
        tirx.FloorMod: operator.mod, tirx.Max: torch.sym_max, tirx.Min: torch.sym_min}
    if isinstance(e, int):
        return e
    if isinstance(e, tirx.IntImm):
        return int(e.value)
    if _is_var(e):
        return leaf(e)
    if isinstance(e, tirx.Cast):
        return _folded(e.value, leaf, apply)
    target = operators.get(type(e))
    if target is None:
        raise Refusal(f"a size of the form {type(e).__name__}")
    a, b = _folded(e.a, leaf, apply), _folded(e.b, leaf, apply)
    return target(a, b) if isinstance(a, int) and isinstance(b, int) else apply(target, a, b)
