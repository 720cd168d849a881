"""Expressions as Triton text: over the axes of a tile, broadcast where they lack one; or as one scalar."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from memcomp.codegen.bounds import natural, near, scaled, total
from memcomp.codegen.lower_fuse import kind
from memcomp.codegen.names import Names
from memcomp.codegen.triton.layout import Axis, Layout
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, variables, walk
from memcomp.ir.ops import OPS
from memcomp.ir.simplify import linear

# an operator -> text of its arguments
_FORMS: dict[str, str] = {
    "neg": "(-{0})", "square": "({0} * {0})", "abs": "tl.abs({0})", "exp": "tl.exp({0})", "exp2": "tl.exp2({0})",
    "log": "tl.log({0})", "log2": "tl.log2({0})", "erf": "tl.erf({0})",
    "sigmoid": "tl.sigmoid({0})", "floor": "tl.floor({0})", "where": "tl.where({0}, {1}, {2})", "not": "(({0}) == 0)",
    "and": "({0} & {1})", "or": "({0} | {1})", "recip": "(1.0 / {0})", "rsqrt": "(1.0 / tl.sqrt_rn({0}))",
    "sqrt": "tl.sqrt_rn({0})", "int": "tl.cast({0}, tl.int64)", "real": "tl.cast({0}, tl.float32)",
    "as_f32": "tl.cast({0}, tl.float32)", "as_f16": "tl.cast(tl.cast({0}, tl.float16), tl.float32)",
}
_COMPARED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}  # with the sides changed
_WORDS = {"tanh": "tanh", "expm1": "expm1", "log1p": "log1p", "xlogx": "xlogx", "round": "nearest",
          "as_bf16": "as_bf16"}
DTYPES = {"f32": "tl.float32", "f64": "tl.float64", "i64": "tl.int64", "bool": "tl.int1"}


@dataclass(slots=True)
class Scope:
    """What text may name: axes, tiles, sizes; and what it turns out to need.

    dtypes: of tiles and params; tiles: their axes; stored: those held in their param's format; dims: capacities;
    words: functions of `words` that the text calls; element: text of a param's elements over axes.
    """

    names: Names
    layout: Layout
    dtypes: dict[str, str]
    tiles: dict[str, tuple[Axis, ...]]
    stored: set[str]
    dims: dict[str, int]
    words: set[str] = field(default_factory=set)
    element: Callable[[Access, tuple[Axis, ...]], str] = field(default=lambda a, axes: "")

    def word(self, name: str) -> str:
        self.words.add(name)
        return name

    def local(self, dim: str, axes: tuple[Axis, ...]) -> str:
        """The local index of a dim over axes."""
        a = self.layout.axis(dim)
        name = f"i_{a.name}" if len(a.dims) == 1 else f"i_{a.name}__{dim}"
        return self.spread(self.names[name], (a,), axes)

    def spread(self, text: str, own: tuple[Axis, ...], axes: tuple[Axis, ...]) -> str:
        """A tensor over `own` axes, made to broadcast over `axes`."""
        if own == axes or not own:
            return text
        return f"{text}[{', '.join(':' if a in own else 'None' for a in axes)}]"

    def kind(self, e: Expr) -> str:
        return kind(e, self.dtypes)

    def double(self, e: Expr) -> bool:
        """Does the expression read f64?"""
        return any(isinstance(n, Access) and self.dtypes.get(n.tensor) == "f64" for n in walk(e))

    def scalar(self, e: Expr) -> str:
        return self.text(e, ())

    def text(self, e: Expr, axes: tuple[Axis, ...]) -> str:
        """Raises Refusal for an operator that Triton text has no form for."""
        if isinstance(e, Const):
            return number(e.value)
        if isinstance(e, Size):
            return self.names[e.rank]
        if isinstance(e, Var):
            return self.local(e.name, axes) if e.name in self.dims else self.names[e.name]
        if isinstance(e, Access):
            if e.tensor not in self.tiles:
                return self.element(e, axes)
            got = self.spread(self.names[e.tensor], self.tiles[e.tensor], axes)
            return f"{got}.to(tl.float32)" if e.tensor in self.stored else got
        return self.call(e, axes)

    def sided(self, e: Call) -> Call:
        """A comparison of indices with one dim, of the last axis, alone on one side: what changes from step to step is
        then added up once for a row, not for every point."""
        if e.op not in _COMPARED or any(self.kind(a) != "int" for a in e.args):
            return e
        terms = linear(Call("sub", e.args), integers=reads(e))
        alone = [v for v, c in (terms or {}).items() if isinstance(v, Var) and v.name in self.dims and c in (1, -1)]
        if terms is None or not alone:
            return e
        own = max(alone, key=lambda v: self.layout.axes.index(self.layout.axis(v.name)))
        sign = terms.pop(own)
        scalars, moving = ([scaled(t, -sign * c) for t, c in terms.items()
                            if (t is not None and bool(dims_of(t, self.dims))) == moves] for moves in (False, True))
        rest = total(scalars)
        for t in moving:
            rest = t if rest == Const(0) else call("add", rest, t)
        return Call(e.op if sign > 0 else _COMPARED[e.op], (own, near(rest)))

    def against(self, dim: str, e: Expr, axes: tuple[Axis, ...]) -> str:
        """What a dim is compared with.  Data have 64 bits, the points of a dim are few: one below and one above them
        stand for all that lie there."""
        if not reads(e):
            return self.text(e, axes)
        own = self.layout.of(dims_of(e, self.dims))
        return self.spread(f"{self.word('short')}({self.text(e, own)}, {self.dims[dim]})", own, axes)

    def parted(self, e: Call) -> Call:
        """A linear index over several axes as what the last axis gives, added to the rest: LLVM would keep a number for
        each point, made of those parts of rows and columns that do not change from step to step."""
        if e.op not in ("add", "sub") or self.kind(e) != "int" or any(isinstance(n, Access) for n in walk(e)):
            return e
        terms, axes = linear(e), self.layout.of(dims_of(e, self.dims))
        if terms is None or len(axes) < 2:
            return e
        last = {t: c for t, c in terms.items() if t is not None and dims_of(t, self.dims) & set(axes[-1].dims)}
        if any(len(self.layout.of(dims_of(t, self.dims))) > 1 for t in last):
            return e
        rest = total([scaled(t, c) for t, c in terms.items() if t not in last])
        sign = -1 if all(c < 0 for c in last.values()) else 1
        return Call("sub" if sign < 0 else "add", (rest, total([scaled(t, sign * c) for t, c in last.items()])))

    def call(self, e: Call, axes: tuple[Axis, ...]) -> str:
        e = self.parted(self.sided(e))
        if len(e.args) == 1 and e.op != "real" and OPS[e.op].result == "real" and self.kind(e.args[0]) != "real":
            e = Call(e.op, (Call("real", e.args),))
        args = [self.text(a, axes) for a in e.args]
        if e.op == "as_f32" and isinstance(x := e.args[0], Call) and x.op in ("add", "sub", "mul", "div") \
                and self.kind(x) == "real" and not self.double(x):
            return f"{self.word(f'{x.op}_f32')}({', '.join(self.text(a, axes) for a in x.args)})"
        if e.op in _COMPARED and isinstance(e.args[0], Var) and e.args[0].name in self.dims:
            args[1] = self.against(e.args[0].name, e.args[1], axes)
        real = any(self.kind(a) == "real" for a in e.args)
        if e.op in ("max", "min"):
            word = ("highest" if e.op == "max" else "lowest") if real else ("most" if e.op == "max" else "least")
            return f"{self.word(word)}({args[0]}, {args[1]})"
        if e.op == "relu":
            return f"{self.word('highest')}({args[0]}, 0.0)" if real else f"{self.word('most')}({args[0]}, 0)"
        if e.op in ("floordiv", "mod"):
            if all(natural(a) for a in e.args):
                return f"({args[0]} {'//' if e.op == 'floordiv' else '%'} {args[1]})"
            return f"{self.word(e.op)}({args[0]}, {args[1]})"
        if e.op == "ceildiv":
            if all(natural(a) for a in e.args):
                return f"tl.cdiv({args[0]}, {args[1]})"
            return f"(-{self.word('floordiv')}(-({args[0]}), {args[1]}))"
        if e.op == "pow":
            return self.power(e, args)
        if e.op in ("sqrt", "rsqrt") and self.double(e):  # sqrt_rn is of f32 alone
            root = f"tl.sqrt(tl.cast({args[0]}, tl.float64))"
            return root if e.op == "sqrt" else f"(1.0 / {root})"
        if e.op == "tanh" and self.double(e):
            return f"{self.word('tanh64')}({args[0]})"
        if e.op == "real" and "f64" in self.dtypes.values():  # an f32 holds no integer of more than 24 bits
            return f"tl.cast({args[0]}, tl.float64)"
        if e.op in ("sin", "cos"):
            return f"{self.word('sine')}({args[0]}, {int(e.op == 'cos')})"
        if e.op in _WORDS:
            return f"{self.word(_WORDS[e.op])}({', '.join(args)})"
        if e.op in _FORMS:
            return _FORMS[e.op].format(*args)
        infix = OPS[e.op].infix
        if infix:
            text = f"({args[0]} {infix} {args[1]})"
            # the interpreter of 3.9 spreads a single comparison of reals as reals
            alone = axes and real and self.kind(e) == "bool" and not dims_of(e, self.dims)
            return f"tl.where({text}, True, False)" if alone else text
        raise Refusal(f"the operator {e.op} has no form in Triton", hint="known: the operators of `ir.ops`")

    def power(self, e: Call, args: list[str]) -> str:
        exponent = e.args[1]
        if isinstance(exponent, Const) and float(exponent.value).is_integer() and 0 <= exponent.value <= 8:
            return "(" + " * ".join([args[0]] * int(exponent.value)) + ")" if exponent.value else "1.0"
        return f"tl.exp2({args[1]} * tl.log2({args[0]}))"  # of non-negative numbers: the operator's domain


def number(x: bool | int | float) -> str:
    if isinstance(x, bool):
        return str(x)
    if isinstance(x, float) and not math.isfinite(x):
        return 'float("nan")' if math.isnan(x) else 'float("inf")' if x > 0 else 'float("-inf")'
    return repr(x) if x >= 0 else f"({x!r})"


def dims_of(e: Expr, dims: dict[str, int]) -> frozenset[str]:
    """Dims that an expression depends on, through its indices too."""
    return variables(e) & set(dims)
