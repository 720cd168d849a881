"""Reading nodes into statements: leaves become in-tensors, reductions become Einsums, the rest stays pointful."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.extent import Extent, expression, extent, real_expression, same, size_name
from memcomp.capture.masks import Reading, Written, lowest, make
from memcomp.capture.pieces import each
from memcomp.capture.value import Factor, Value, constant, plain, pointwise
from memcomp.capture.writes import mutates
from memcomp.ir.cascade import Einsum, Reduce
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, conjunction, conjuncts, reads, variables, walk
from memcomp.ir.simplify import linear

DTYPE = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}
Read: TypeAlias = "Value | tuple[Value, ...]"
CHEAP = frozenset((
    "add", "sub", "mul", "div", "neg", "max", "min", "where", "real", "int", "abs", "square", "relu", "floor",
    "floordiv", "mod", "ceildiv", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "bitand", "bitor", "shr"))
"""What may be computed again at every point rather than stored once."""
FEW = 8  # times the largest result: what many rows read is stored, or each tile of rows would compute it again
SMALL = 64  # a map joins the region where the region's largest tensor is so many times larger


def meta(node: fx.Node) -> Any:
    """The example value that Dynamo or export stored: FakeTensor, SymInt, number, tuple or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def elements(node: fx.Node) -> int:
    """How many elements a tensor has, symbols at the number they had when the graph was traced (0: no tensor)."""
    t = meta(node)
    if not isinstance(t, torch.Tensor):
        return 0
    return math.prod(s if isinstance(s, int) else int(s.node.hint or 0) for s in t.shape)


def stored(node: fx.Node) -> int:
    """Bytes of a tensor, symbols as above."""
    t = meta(node)
    return elements(node) * t.element_size() if isinstance(t, torch.Tensor) else 0


def shape_of(t: torch.Tensor) -> tuple[Extent, ...]:
    return tuple(extent(s) for s in t.shape)


class Reader(Reading):
    """One region being read.

    core: nodes that must be read.  Every other node is read through when that costs no memory traffic (views, index
    arithmetic, masks) and is an in-tensor otherwise.  stop: nodes that must not be read through.
    sliced: slices are read through too, so that steps of a loop that take one each read one tensor.
    """

    def __init__(self, gm: fx.GraphModule, core: Iterable[fx.Node], stop: Iterable[fx.Node] = (), *,
                 sliced: bool = False) -> None:
        super().__init__()
        self.sliced = sliced
        self.whole = False  # what is read now makes an index
        self.gm, self.core, self.stop = gm, frozenset(core), frozenset(stop)
        self.memo: dict[fx.Node, Read] = {}
        self.leaves: dict[fx.Node, str] = {}
        self.leaf_of: dict[str, fx.Node] = {}
        self.small: set[str] = set()  # temporaries that are computed from small leaves only
        self.through: dict[fx.Node, None] = {}
        self.ranks: dict[str, Extent] = {}
        self.statements: list[Einsum] = []
        self.names: set[str] = set()
        self.counts: dict[str, int] = {}
        self.called: dict[tuple[str, Extent], str] = {}
        self.dtypes: dict[str, str] = {}
        self.probes: dict[tuple[int, Extent], str] = {}

    # -- nodes ----------------------------------------------------------------------------------------------------

    def read(self, node: fx.Node) -> Read:
        """The symbolic value of a node."""
        if node not in self.memo:
            self.memo[node] = self._core(node) if node in self.core else self._outer(node)
        return self.memo[node]

    def _core(self, node: fx.Node) -> Read:
        rule = table.rule(node)
        if rule is None:
            raise Refusal(f"{table.base_name(node)} has no rule", where=str(node))
        out = self.apply(rule, node)
        if isinstance(out, Value) and rule.kind == "map" and len(node.users) > 1 and not self._is_plain(out):
            return self.materialise(out)
        return out

    def _outer(self, node: fx.Node) -> Read:
        rule = table.rule(node) if node not in self.stop else None
        if rule is not None and rule.kind not in ("reduce", "contract"):
            before, t = self.whole, meta(node)
            self.whole = before or isinstance(t, torch.Tensor) and not t.is_floating_point()
            try:
                out = self.apply(rule, node)
                self.whole = before
                if self._may_read_through(out, node):
                    self.through[node] = None
                    return out
                if rule.kind == "map" and isinstance(out, Value) and self._joins(node, out):
                    self.through[node] = None
                    return self._stored(out)
            except Refusal:
                pass
            finally:
                self.whole = before
        return self.leaf(node)

    def _may_read_through(self, out: Read, node: fx.Node) -> bool:
        if not isinstance(out, Value):
            return all(self._may_read_through(v, node) for v in out)
        e = self.probe(out)
        nodes = list(walk(e))
        accesses = [n for n in nodes if isinstance(n, Access)]
        if len(nodes) > 400 or any(a.tensor not in self.leaf_of and a.tensor not in self.small for a in accesses):
            return False
        costly = any(isinstance(n, Call) and n.op not in CHEAP for n in nodes)
        real = [a for a in accesses if self._leaf_real(a.tensor)]
        if out.is_real and len(real) == 1:
            if all(_clean(i) or self.sliced and linear(i) is not None for i in real[0].index):
                return not costly
            return elements(self.leaf_of[real[0].tensor]) < elements(node)  # rows of a table smaller than they are
        if real and not costly and elements(node) >= FEW * self._results():
            # numbers made of fewer bytes than they take (codes and scales, rows and columns), for few results each
            leaves = {self.leaf_of[a.tensor] for a in accesses if a.tensor in self.leaf_of}
            return sum(map(stored, leaves)) < stored(node)
        return not real and len(accesses) <= 6 and not (costly and (accesses or out.is_real and not self.whole))

    def _results(self) -> int:
        """Elements of the largest result: what is much larger is read by few of them."""
        return max((elements(n) for n in self.core if any(u not in self.core for u in n.users)), default=0)

    def _joins(self, node: fx.Node, out: Value) -> bool:
        """Is it a costly map of small tensors that only the core reads: worth a statement, and no kernel of its own?"""
        def inside(n: fx.Node) -> bool:
            return all(u in self.core or (r := table.rule(u)) is not None and r.kind in ("view", "map") and inside(u)
                       for u in n.users)

        accesses = [n for n in walk(self.probe(out)) if isinstance(n, Access)]
        size = elements(node)
        known = all(a.tensor in {*self.leaf_of, *self.small} and all(map(_clean, a.index)) for a in accesses)
        return (out.is_real and known and any(self._leaf_real(a.tensor) for a in accesses) and not mutates(node)
                and 0 < size * SMALL <= max(map(elements, self.core), default=0) and inside(node))

    def _stored(self, out: Value) -> Value:
        before = len(self.statements)
        stored = self.materialise(out)
        self.small.update(n for s in self.statements[before:] for n in s.names)
        return stored

    def reads_real_input(self, e: Expr) -> bool:
        """Does `e` read an in-tensor of real numbers (which may be infinite)?"""
        return any(t in self.leaf_of and self._leaf_real(t) for t in reads(e))

    def _leaf_real(self, tensor: str) -> bool:
        return bool(meta(self.leaf_of[tensor]).dtype.is_floating_point) if tensor in self.leaf_of else True

    def probe(self, v: Value) -> Expr:
        """The element of `v` at free variables, one per factor, to look at."""
        index: list[Expr] = []
        for k, f in enumerate(v.factors):
            if same(f.extent, 1):
                index.append(Const(0))
                continue
            name = self.probes.setdefault((k, f.extent), f"probe{len(self.probes)}")
            if name not in self.ranges:
                self._range(name, f.extent)
            index.append(Var(name))
        return self.simplify(v.at(tuple(index)))

    def _range(self, variable: str, e: Extent) -> None:
        """Let `variable` run over 0..e, with what torch's guards know of the symbols in `e`."""
        self.ranges[variable] = (0, e if isinstance(e, int) else expression(e))
        for s in () if isinstance(e, int) else e.free_symbols:
            if size_name(s) not in self.ranges:
                self.ranges[size_name(s)] = symbol_range(self.gm, s)

    def leaf(self, node: fx.Node) -> Value:
        """An in-tensor of the region (a 0-dimensional constant of the graph is its number)."""
        t = meta(node)
        if node.op == "get_attr":
            held = table.attribute(self.gm, str(node.target))
            if isinstance(held, torch.Tensor):
                if _literal(str(node.target), held):
                    return constant(held.item(), held.dtype, shape_of(held))
                t = held if t is None else t
        if not isinstance(t, torch.Tensor):
            raise Refusal(f"{node} is not one tensor", where=str(node))
        if t.dtype not in DTYPE or t.layout != torch.strided:
            raise Refusal(f"{node} holds {t.dtype}, {t.layout}", where=str(node),
                          hint=f"known: {', '.join(DTYPE.values())}")
        name = self.fresh(str(node.name))
        self.leaves[node], self.leaf_of[name] = name, node
        if not t.dtype.is_floating_point and t.dtype != torch.bool:
            self.integers.add(name)
        return plain(shape_of(t), t.dtype, lambda ix: Access(name, ix))

    def apply(self, rule: table.Rule, node: fx.Node) -> Read:
        """Run a rule on the values of the node's arguments."""
        args, kwargs = table.normal(rule, node)
        read = {k: self.argument(a) for k, a in kwargs.items()}
        out: Read = rule.read(self, node, *(self.argument(a) for a in args), **read)
        m = meta(node)
        if isinstance(out, Value) and isinstance(m, torch.Tensor):
            if len(out.dims) != m.ndim or any(_differ(a, b) for a, b in zip(out.shape, shape_of(m), strict=True)):
                raise Refusal(f"{table.base_name(node)} was read with shape {out.shape}, torch says {tuple(m.shape)}",
                              where=str(node))
            out = replace(out, dtype=m.dtype)
        return out

    def argument(self, a: Any) -> Any:
        """A node's argument: values for tensors, expressions for run-time integers, Python data as it is."""
        if isinstance(a, fx.Node):
            m = meta(a)
            if isinstance(m, torch.SymInt):
                e = extent(m)
                return e if isinstance(e, int) else expression(e)
            if isinstance(m, torch.SymFloat):
                return self._symbolic_float(a)
            if m is None or isinstance(m, (torch.Tensor, tuple, list)):
                return self.read(a)
            return m
        if isinstance(a, (tuple, list)):
            return tuple(self.argument(x) for x in a)
        if isinstance(a, slice):
            return slice(self.argument(a.start), self.argument(a.stop), self.argument(a.step))
        if isinstance(a, torch.SymInt):
            e = extent(a)
            return e if isinstance(e, int) else expression(e)
        return a

    def _symbolic_float(self, node: fx.Node) -> Value:
        """A float that Dynamo keeps symbolic: the 0-dimensional tensors and the sizes it was computed from."""
        def symbol(s: sympy.Symbol) -> Expr:
            for n in self.gm.graph.nodes:
                m = meta(n)
                if table.base_name(n) == "item" and isinstance(m, torch.SymFloat) and m.node.expr == s:
                    read = self.read(n.args[0])
                    assert isinstance(read, Value)
                    return read.at(tuple(Const(0) for _ in read.factors))
            raise Refusal(f"the run-time number {s} comes from no tensor", where=str(node))

        e = real_expression(meta(node).node.expr, symbol)
        return Value((), torch.float32, lambda _: e)

    def value(self, x: Value | bool | int | float | Expr, dtype: torch.dtype) -> Value:
        """A rule's operand as a value."""
        if isinstance(x, Value):
            return x
        if isinstance(x, (bool, int, float)):
            return constant(x, dtype)
        e = x
        return plain((), torch.int64, lambda _: e)

    # -- statements -----------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        name, k = hint, self.counts.get(hint, 2)
        while name in self.names:
            name, k = f"{hint}{k}", k + 1
        self.names.add(name)
        self.counts[hint] = k
        return name

    def rank(self, hint: str, e: Extent) -> str:
        """A new rank of extent `e`, called `hint` where that is free."""
        pool = [hint, *(c for c in "XYZUWCDGILNRSTVK" if c != hint), *(a + b for a in string.ascii_uppercase
                                                                        for b in string.ascii_uppercase)]
        name = next(n for n in chain(pool, (f"{hint}_{k}" for k in count())) if n not in self.ranks)
        self.ranks[name] = e
        self._range(name.lower(), e)
        return name

    def axes(self, factors: Sequence[Factor], hints: Sequence[str], used: set[str]) -> list[Factor]:
        """The factors with a rank each: their own where this statement does not use it yet, else a new one."""
        out = []
        for f, hint in zip(factors, hints, strict=True):
            name = f.rank if f.rank is not None and f.rank not in used else None
            if name is None:
                shared = f.rank is None and hint in self.ranks and hint not in used and same(self.ranks[hint], f.extent)
                again = self.called.get((hint, f.extent)) if self.sliced and f.rank is None else None
                name = hint if shared else again if again and again not in used else self.rank(hint, f.extent)
                self.called[hint, f.extent] = name
            used.add(name)
            out.append(Factor(f.extent, name))
        return out

    def write(self, hint: str, axes: Sequence[Factor], body: Expr, *, reduce: Reduce | None = None,
              guard: Expr | None = None, empty: float = 0.0, finite: bool = True, positive: bool = False,
              dtype: str = "") -> str:
        """Append a statement that writes a new temporary with one rank per axis."""
        if reduce is not None and reduce.monoid == "sum" and dtype != "i64":
            body, guard = self._chosen(body, reduce.over, guard)
        name = self.fresh(hint)
        index = tuple(Var(str(f.rank).lower()) for f in axes)
        self.statements.append(Einsum((Access(name, index),), body, reduce, guard))
        self.written[name] = Written(tuple(v.name for v in index), None if reduce else guard, empty, finite, positive)
        if dtype:
            self.dtypes[name] = dtype
        return name

    def _chosen(self, body: Expr, over: Sequence[str], guard: Expr | None) -> tuple[Expr, Expr | None]:
        """Terms of a sum with their guard.  What the guard asks of computed values, for a whole row at once, is asked
        in the terms: a sum is linear in them, and the row's value may not be known before all terms were seen."""
        parts = conjuncts(guard) if guard is not None else ()
        late = [c for c in parts if reads(c) & set(self.written) and not variables(c) & set(over)]
        if not late:
            return body, guard
        asked = conjunction(late)
        assert asked is not None
        return Call("where", (asked, body, Const(0.0))), conjunction([c for c in parts if c not in late])

    def materialise(self, v: Value, hint: str = "T") -> Value:
        """A value as (a view of) a temporary; piece by piece, where it has pieces that read temporaries."""
        if v.pieces is not None:
            return each(v, lambda p: p if self._is_plain(p) else self.materialise(p, hint), self)
        axes = self.axes(v.factors, [_hint(k, len(v.factors)) for k in range(len(v.factors))], set())
        ix = tuple(Var(str(f.rank).lower()) for f in axes)
        e = self.simplify(v.at(ix))
        p = self.parts(e)
        kind = "" if v.is_real else DTYPE[v.dtype]
        if p.guard is None or p.outside is None or lowest(p.outside):
            name = self.write(hint, axes, self.absorbed(e), finite=self.tame(e), positive=self.positive(e), dtype=kind)
        else:
            name = self.write(hint, axes, p.inside, guard=p.guard, empty=float(p.outside.value),
                              finite=self.tame(p.inside), positive=self.positive(p.inside), dtype=kind)
        return self.view(v, axes, name)

    def view(self, like: Value, axes: Sequence[Factor], name: str) -> Value:
        """The temporary `name` in the shape of `like`."""
        dims, k = [], 0
        for d in like.dims:
            dims.append(tuple(axes[k:k + len(d)]))
            k += len(d)
        return Value(tuple(dims), like.dtype, lambda ix: Access(name, ix))

    def _is_plain(self, v: Value) -> bool:
        e = self.probe(v)
        return isinstance(e, (Access, Const)) or not any(t in self.written for t in reads(e))

    def computed(self, v: Value) -> bool:
        """Does `v` read a temporary (one more complex than an element of an in-tensor)?"""
        return any(t in self.written for t in reads(self.probe(v)))

    def select(self, hint: str, axes: Sequence[Factor], body: Expr, reduce: Reduce, guard: Expr | None,
               integer: bool) -> tuple[str, str]:
        """Append a reduction with two results, the values and where they were found."""
        names = self.fresh(hint + "V"), self.fresh(hint + "I")
        index = tuple(Var(str(f.rank).lower()) for f in axes)
        self.statements.append(Einsum(tuple(Access(n, index) for n in names), body, reduce, guard))
        for n in names:
            self.written[n] = Written(tuple(v.name for v in index), None, 0.0, self.tame(body), False)
        self.dtypes[names[1]] = "i64"
        if integer:
            self.dtypes[names[0]] = "i64"
        self.integers.add(names[1])
        return names

    def named(self, v: Value, hint: str) -> Value:
        """`v` itself where it is one element of one tensor, else materialised."""
        e = self.probe(v)
        return v if isinstance(e, Access) else self.materialise(v, hint)


def _hint(k: int, n: int) -> str:
    return ("B", "H", "P", "M")[max(0, k + 4 - max(n, 4)) if n >= 4 else k + 4 - n if n <= 2 else (0, 2, 3)[k]]


def _clean(i: Expr) -> bool:
    """Does an index only pick: a variable, a constant, or the head that a group of heads shares?"""
    return isinstance(i, (Var, Const)) or isinstance(i, Call) and i.op == "floordiv" and isinstance(i.args[0], Var)


def _differ(a: Extent, b: Extent) -> bool:
    """Are two extents certainly not the same?  (torch's guards may equate what is spelled differently.)"""
    return not same(a, b) and (isinstance(a, int) and isinstance(b, int) or same(a, 1) or same(b, 1))


def _literal(path: str, held: torch.Tensor) -> bool:
    """Is this attribute a number that the user wrote (`torch.tensor(-1e9)`), as Dynamo and export name those?"""
    return held.numel() == 1 and path.rpartition(".")[2].startswith(("_tensor_constant", "lifted_tensor"))


def real(v: Value) -> Value:
    """The value as real numbers (a truth value is 1 or 0)."""
    if v.is_real:
        return v
    if v.dtype == torch.bool:
        return pointwise(lambda e: make("where", e, Const(1.0), Const(0.0)), torch.float32, v)
    return pointwise(lambda e: make("real", e), torch.float32, v)


def whole(v: Value) -> Value:
    """The value as integers (a truth value is 1 or 0)."""
    if v.dtype == torch.bool:
        return pointwise(lambda e: make("where", e, Const(1), Const(0)), torch.int64, v)
    return v


def symbol_range(gm: fx.GraphModule, symbol: sympy.Symbol) -> tuple[int, int | None]:
    """What torch's guards promise of a shape symbol: least value, and one more than the greatest (None: no limit)."""
    for node in gm.graph.nodes:
        m = meta(node)
        for s in (*m.shape,) if isinstance(m, torch.Tensor) else (m,):
            if isinstance(s, torch.SymInt) and symbol in s.node.expr.free_symbols:
                known = s.node.shape_env.bound_sympy(symbol)
                low = int(known.lower) if known.lower.is_Integer else 0
                return max(low, 0), int(known.upper) + 1 if known.upper.is_Integer else None
    return 0, None


__all__ = ["DTYPE", "Read", "Reader", "meta", "real", "shape_of", "symbol_range", "whole"]
