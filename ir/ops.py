"""Scalar operators with their laws, and primitive monoids.  Nothing composite is listed here.

A law is a fact that rewrites may use; `ir.laws` names each one (`exp.hom`), and a rewrite says which ones it used.
Users add operators with `ir.register`, which tests what is stated.  Laws follow `docs/derivation.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from memcomp.ir.errors import OptionError, nearest
from memcomp.ir.expr import Expr
from memcomp.ir.rounding import round_to

Order = Literal["inc", "dec", "sign", ""]
INF = math.inf


@dataclass(frozen=True, slots=True)
class Op:
    """A scalar function of `arity` arguments (-1: any number >= 1) and what is known about it.

    numpy:     its meaning on float64 (or integer / bool) arrays.
    infix:     its spelling between operands in the text form, "" for a function call.
    result:    "real", "int", "bool" or "same" (as the arguments).
    definition: the same meaning in terms of other rows, over the variables `PARAMETERS`; None where the row is known
               to every backend.

    The laws; those with a domain hold where the arguments are real, >= 0 ("nonneg") or > 0 ("pos"):
    hom:       (a, b): f(x a y) = f(x) b f(y) in the first argument, e.g. exp: ("add", "mul").
    degree:    positive homogeneity: f(c x, c y) = c**degree f(x, y) for c > 0.
    linear:    groups of arguments in which f is jointly linear, e.g. mul: in each of the two.
    monotone:  per argument "inc", "dec", "sign" (as the sign of the other argument) or "" (none known).
    strict:    the monotone arguments are strictly so.
    range:     bounds of the result over the whole domain.
    positive:  the result is > 0 over the whole domain.
    limits:    ((x, f(x)), ...) values at infinities that rewrites may rely on.
    """

    name: str
    arity: int
    numpy: Callable[..., Any] = field(compare=False, repr=False)
    infix: str = ""
    result: Literal["real", "int", "bool", "same"] = "real"
    hom: tuple[str, str] | None = None
    degree: float | None = None
    linear: tuple[tuple[int, ...], ...] = ()
    monotone: tuple[Order, ...] = ()
    strict: bool = False
    range: tuple[float, float] = (-INF, INF)
    positive: bool = False
    domain: Literal["real", "nonneg", "pos"] = "real"
    limits: tuple[tuple[float, float], ...] = ()
    definition: Expr | None = None


PARAMETERS = ("x", "y", "z")


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[np.float64])(x) if np.size(x) else np.asarray(x, np.float64)


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64)))


def _xlogx(x: Any) -> Any:
    x = np.asarray(x, np.float64)
    return np.where(x == 0, 0.0, x * np.log(np.where(x == 0, 1.0, x)))


def _div(a: Any, b: Any) -> Any:
    return np.true_divide(a, b)


def _ceildiv(a: Any, b: Any) -> Any:
    return -(-np.asarray(a) // np.asarray(b))


def _nearest(dtype: str) -> Callable[[Any], Any]:
    """The nearest number of a format.  No algebra goes through it: what is rounded stays so in every kernel."""
    return lambda x: round_to(np.asarray(x, np.float64), dtype)


def _logical(f: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def g(*args: Any) -> Any:
        out = np.asarray(args[0], bool)
        for a in args[1:]:
            out = f(out, np.asarray(a, bool))
        return out

    return g


_ROWS = (
    # arithmetic
    Op("add", 2, np.add, "+", "same", linear=((0, 1),)),
    Op("sub", 2, np.subtract, "-", "same", linear=((0, 1),)),
    Op("mul", 2, np.multiply, "*", "same", linear=((0,), (1,)), monotone=("sign", "sign")),
    Op("div", 2, _div, "/", "real", linear=((0,),), monotone=("sign", "")),
    Op("neg", 1, np.negative, "", "same", linear=((0,),)),
    Op("max", 2, np.maximum, "", "same", degree=1.0, monotone=("inc", "inc")),
    Op("min", 2, np.minimum, "", "same", degree=1.0, monotone=("inc", "inc")),
    Op("pow", 2, np.power, "", "real", hom=("mul", "mul"), domain="nonneg"),
    Op("square", 1, np.square, "", "same", hom=("mul", "mul"), range=(0.0, INF)),
    Op("abs", 1, np.abs, "", "same", hom=("mul", "mul"), degree=1.0, range=(0.0, INF)),
    Op("relu", 1, lambda x: np.maximum(x, 0), "", "same", degree=1.0, monotone=("inc",), range=(0.0, INF)),
    Op("recip", 1, lambda x: _div(1.0, x), hom=("mul", "mul")),
    Op("sqrt", 1, np.sqrt, degree=0.5, monotone=("inc",), strict=True, range=(0.0, INF), domain="nonneg"),
    Op("rsqrt", 1, lambda x: _div(1.0, np.sqrt(x)), degree=-0.5, monotone=("dec",), strict=True, range=(0.0, INF),
       positive=True, domain="pos"),
    # transcendental
    Op("exp", 1, np.exp, hom=("add", "mul"), monotone=("inc",), strict=True, range=(0.0, INF), positive=True,
       limits=((-INF, 0.0),)),
    Op("exp2", 1, np.exp2, hom=("add", "mul"), monotone=("inc",), strict=True, range=(0.0, INF), positive=True,
       limits=((-INF, 0.0),)),
    Op("log", 1, np.log, hom=("mul", "add"), monotone=("inc",), strict=True, domain="pos"),
    Op("log2", 1, np.log2, hom=("mul", "add"), monotone=("inc",), strict=True, domain="pos"),
    Op("xlogx", 1, _xlogx, domain="nonneg"),
    Op("log1p", 1, np.log1p, monotone=("inc",), strict=True, domain="nonneg"),
    Op("expm1", 1, np.expm1, monotone=("inc",), range=(-1.0, INF)),
    Op("tanh", 1, np.tanh, monotone=("inc",), range=(-1.0, 1.0)),
    Op("sigmoid", 1, _sigmoid, monotone=("inc",), range=(0.0, 1.0), positive=True),
    Op("erf", 1, _erf, monotone=("inc",), range=(-1.0, 1.0)),
    Op("sin", 1, np.sin, range=(-1.0, 1.0)),
    Op("cos", 1, np.cos, range=(-1.0, 1.0)),
    Op("floor", 1, np.floor, monotone=("inc",)),
    Op("round", 1, np.round, monotone=("inc",)),
    # choice and truth
    Op("where", 3, np.where, "", "same", linear=((1, 2),)),
    Op("lt", 2, np.less, "<", "bool"),
    Op("le", 2, np.less_equal, "<=", "bool"),
    Op("gt", 2, np.greater, ">", "bool"),
    Op("ge", 2, np.greater_equal, ">=", "bool"),
    Op("eq", 2, np.equal, "==", "bool"),
    Op("ne", 2, np.not_equal, "!=", "bool"),
    Op("and", 2, _logical(np.logical_and), "and", "bool"),
    Op("or", 2, _logical(np.logical_or), "or", "bool"),
    Op("not", 1, lambda x: np.logical_not(np.asarray(x, bool)), "", "bool"),
    # integers and bits (indices, unpacking)
    Op("floordiv", 2, np.floor_divide, "//", "int"),
    Op("mod", 2, np.mod, "%", "int"),
    Op("ceildiv", 2, _ceildiv, "", "int"),
    Op("shr", 2, np.right_shift, ">>", "int"),
    Op("shl", 2, np.left_shift, "<<", "int"),
    Op("bitand", 2, np.bitwise_and, "&", "int"),
    Op("bitor", 2, np.bitwise_or, "|", "int"),
    # what a top-k reduces (`ir.places`): a value and its place; both, and the list that they are joined to
    Op("at", 2, lambda x, place: x, "", "same"),
    Op("onto", 3, lambda x, values, places: x, "", "same"),
    # conversions: to a stored format and back (the rounding is the meaning)
    Op("int", 1, lambda x: np.trunc(np.asarray(x, np.float64)).astype(np.int64), "", "int", monotone=("inc",)),
    Op("real", 1, lambda x: np.asarray(x).astype(np.float64), "", "real", monotone=("inc",), strict=True),
    Op("as_f32", 1, _nearest("f32"), monotone=("inc",)),
    Op("as_f16", 1, _nearest("f16"), monotone=("inc",)),
    Op("as_bf16", 1, _nearest("bf16"), monotone=("inc",)),
)
OPS: dict[str, Op] = {row.name: row for row in _ROWS}
ROUNDED = {"as_f32": "f32", "as_f16": "f16", "as_bf16": "bf16"}  # operator -> the format whose nearest number it gives
COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})


@dataclass(frozen=True, slots=True)
class Monoid:
    """A primitive reduction: `combine` over arrays, its identity, and the operator that joins two results.

    outs: 1, or 2 for (value, index).  `join` names the scalar op of the monoid where it has one.
    """

    name: str
    identity: float
    join: str = ""
    outs: int = 1


MONOIDS: dict[str, Monoid] = {
    m.name: m
    for m in (
        Monoid("sum", 0.0, "add"),
        Monoid("prod", 1.0, "mul"),
        Monoid("max", -INF, "max"),
        Monoid("min", INF, "min"),
        Monoid("and", 1.0, "and"),
        Monoid("or", 0.0, "or"),
        Monoid("argmax", -INF, outs=2),
        Monoid("argmin", INF, outs=2),
        Monoid("topk", -INF, outs=2),
    )
}


def op(name: str) -> Op:
    """The row of an operator; an unknown name is an error that lists what is known."""
    if name not in OPS:
        raise OptionError(f"unknown operator {name!r}", hint=nearest(name, OPS))
    return OPS[name]

