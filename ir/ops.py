"""Scalar operators with their laws, and primitive monoids.  Nothing composite is listed here.

A law is a fact that rewrites may use; each rewrite says which one it used.  Users add rows with `register`.
Laws follow `docs/derivation.md`: homomorphism, homogeneity, monotonicity, range, growth, limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from memcomp.ir.errors import OptionError, nearest

Order = Literal["inc", "dec", ""]
INF = math.inf


@dataclass(frozen=True, slots=True)
class Op:
    """A scalar function of `arity` arguments (-1: any number >= 1) and what is known about it.

    numpy:     its meaning on float64 (or integer / bool) arrays.
    infix:     its spelling between operands in the text form, "" for a function call.
    result:    "real", "int", "bool" or "same" (as the arguments).
    hom:       (a, b): f(x a y) = f(x) b f(y), e.g. exp: ("add", "mul").
    degree:    positive homogeneity: f(c x) = c**degree f(x) for c >= 0, in its first argument.
    monotone:  per argument "inc", "dec" or "" (none known); non-strict unless `strict`.
    range:     bounds of the result over the whole domain.
    growth:    "exp" | "poly" | "bounded" | "log" | "" as the argument grows.
    domain:    arguments for which the laws hold: "real", "nonneg" or "pos".
    limits:    ((x, f(x)), ...) values at infinities that rewrites may rely on.
    linear:    linear in each argument taken jointly (add, sub, neg).
    """

    name: str
    arity: int
    numpy: Callable[..., Any]
    infix: str = ""
    result: Literal["real", "int", "bool", "same"] = "real"
    hom: tuple[str, str] | None = None
    degree: float | None = None
    monotone: tuple[Order, ...] = ()
    strict: bool = False
    range: tuple[float, float] = (-INF, INF)
    growth: Literal["exp", "poly", "bounded", "log", ""] = ""
    domain: Literal["real", "nonneg", "pos"] = "real"
    limits: tuple[tuple[float, float], ...] = ()
    linear: bool = False


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


def _logical(f: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def g(*args: Any) -> Any:
        out = np.asarray(args[0], bool)
        for a in args[1:]:
            out = f(out, np.asarray(a, bool))
        return out

    return g


_ROWS = (
    # arithmetic
    Op("add", 2, np.add, "+", "same", monotone=("inc", "inc"), strict=True, linear=True, growth="poly"),
    Op("sub", 2, np.subtract, "-", "same", monotone=("inc", "dec"), strict=True, linear=True, growth="poly"),
    Op("mul", 2, np.multiply, "*", "same", degree=1.0, hom=("mul", "mul"), growth="poly"),
    Op("div", 2, _div, "/", "real", degree=1.0, growth="poly"),
    Op("neg", 1, np.negative, "", "same", monotone=("dec",), strict=True, linear=True, growth="poly"),
    Op("max", 2, np.maximum, "", "same", degree=1.0, monotone=("inc", "inc"), growth="poly"),
    Op("min", 2, np.minimum, "", "same", degree=1.0, monotone=("inc", "inc"), growth="poly"),
    Op("pow", 2, np.power, "", "real", hom=("mul", "mul"), growth="poly"),
    Op("square", 1, np.square, "", "same", hom=("mul", "mul"), degree=2.0, range=(0.0, INF), growth="poly"),
    Op("abs", 1, np.abs, "", "same", hom=("mul", "mul"), degree=1.0, range=(0.0, INF), growth="poly"),
    Op("relu", 1, lambda x: np.maximum(x, 0), "", "same", degree=1.0, monotone=("inc",), range=(0.0, INF),
       growth="poly"),
    Op("recip", 1, lambda x: _div(1.0, x), hom=("mul", "mul"), degree=-1.0),
    Op("sqrt", 1, np.sqrt, hom=("mul", "mul"), degree=0.5, monotone=("inc",), strict=True, range=(0.0, INF),
       growth="poly", domain="nonneg"),
    Op("rsqrt", 1, lambda x: _div(1.0, np.sqrt(x)), hom=("mul", "mul"), degree=-0.5, monotone=("dec",), strict=True,
       range=(0.0, INF), domain="pos"),
    # transcendental
    Op("exp", 1, np.exp, hom=("add", "mul"), monotone=("inc",), strict=True, range=(0.0, INF), growth="exp",
       limits=((-INF, 0.0),)),
    Op("exp2", 1, np.exp2, hom=("add", "mul"), monotone=("inc",), strict=True, range=(0.0, INF), growth="exp",
       limits=((-INF, 0.0),)),
    Op("log", 1, np.log, hom=("mul", "add"), monotone=("inc",), strict=True, growth="log", domain="pos",
       limits=((0.0, -INF),)),
    Op("log2", 1, np.log2, hom=("mul", "add"), monotone=("inc",), strict=True, growth="log", domain="pos",
       limits=((0.0, -INF),)),
    Op("xlogx", 1, _xlogx, growth="poly", domain="nonneg", limits=((0.0, 0.0),)),
    Op("tanh", 1, np.tanh, monotone=("inc",), range=(-1.0, 1.0), growth="bounded"),
    Op("sigmoid", 1, _sigmoid, monotone=("inc",), range=(0.0, 1.0), growth="bounded"),
    Op("erf", 1, _erf, monotone=("inc",), range=(-1.0, 1.0), growth="bounded"),
    Op("sin", 1, np.sin, range=(-1.0, 1.0), growth="bounded"),
    Op("cos", 1, np.cos, range=(-1.0, 1.0), growth="bounded"),
    Op("floor", 1, np.floor, monotone=("inc",), growth="poly"),
    Op("round", 1, np.round, monotone=("inc",), growth="poly"),
    # choice and truth
    Op("where", 3, np.where, "", "same"),
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
    # conversions: to a stored format and back (the rounding is the meaning)
    Op("int", 1, lambda x: np.trunc(np.asarray(x, np.float64)).astype(np.int64), "", "int", monotone=("inc",)),
    Op("real", 1, lambda x: np.asarray(x).astype(np.float64), "", "real", monotone=("inc",), strict=True),
)
OPS: dict[str, Op] = {row.name: row for row in _ROWS}


@dataclass(frozen=True, slots=True)
class Monoid:
    """A primitive reduction: `combine` over arrays, its identity, and the operator that joins two results.

    outs: 1, or 2 for (value, index).  `join` names the scalar op of the monoid where it has one.
    """

    name: str
    identity: float
    join: str = ""
    outs: int = 1
    commutative: bool = True


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


def register(row: Op) -> Op:
    """Add a scalar function with its laws.  Registering another meaning under a known name is an error.

    The laws are the caller's promise: rewrites rely on them.
    """
    known = OPS.get(row.name)
    if known is not None and known != row:
        raise OptionError(f"operator {row.name!r} is already registered with other laws",
                          hint="choose another name, or registrations of the same row")
    if not row.name.isidentifier() or row.arity == 0 or row.arity < -1:
        raise OptionError(f"operator {row.name!r} needs an identifier and at least one argument")
    OPS[row.name] = row
    return row
