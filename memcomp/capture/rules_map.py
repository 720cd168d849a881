"""Point-by-point operators, conversions and choices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memcomp.capture.masks import make
from memcomp.capture.reader import Reader, meta, real, whole
from memcomp.capture.table import Rule
from memcomp.capture.value import ZERO, Index, Value, coarse, constant, pointwise
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Call, Const, Expr, reads

Operand = Any


def dtype_of(node: fx.Node) -> torch.dtype:
    t = meta(node)
    if not isinstance(t, torch.Tensor):
        raise Refusal(f"{node} is not one tensor", where=str(node))
    return t.dtype


def operands(r: Reader, node: fx.Node, *xs: Operand) -> list[Value]:
    """Operands in the arithmetic that torch uses for them: real if any is, integers if any is, else truth values."""
    values = [r.value(x, torch.float32 if isinstance(x, float) else torch.bool if isinstance(x, bool) else torch.int64)
              for x in xs]
    if any(v.is_real for v in values):
        return [real(v) for v in values]
    if any(v.dtype != torch.bool for v in values):
        return [whole(v) for v in values]
    return values


def apply(op: str, dtype: torch.dtype, *values: Value) -> Value:
    if dtype == torch.bool:
        op = {"max": "or", "min": "and"}.get(op, op)
    out = pointwise(lambda *es: make(op, *es), dtype, *values)
    return wrapped(out) if op in GROWING else out


GROWING = ("add", "sub", "mul", "neg", "abs", "square")
NARROW = (torch.int8, torch.uint8, torch.int16)


def wrapped(v: Value) -> Value:
    """Integers of fewer than 32 bits as torch keeps them; wider ones are taken not to overflow."""
    if v.dtype not in NARROW:
        return v
    held = torch.iinfo(v.dtype)
    low, count = Const(held.min), Const(held.max - held.min + 1)
    return pointwise(lambda e: make("add", make("mod", make("sub", e, low), count), low), v.dtype, v)


def _binary(op: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, a: Operand, b: Operand, *, alpha: Any = 1,
             rounding_mode: str | None = None) -> Value:
        if rounding_mode == "floor":
            return _floor_divide(r, node, a, b)
        if rounding_mode is not None:
            raise Refusal(f"rounding mode {rounding_mode}")
        x, y = operands(r, node, a, b)
        if x.dtype == torch.bool and op in ("add", "mul"):
            return apply("or" if op == "add" else "and", torch.bool, x, y)
        if op == "div" and not x.is_real:
            x, y = real(x), real(y)
        if alpha != 1:
            x, y = operands(r, node, x, apply("mul", y.dtype, y, constant(alpha, y.dtype)))
        return apply(op, dtype_of(node), x, y)

    return read


def _compare(op: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, a: Operand, b: Operand) -> Value:
        x, y = operands(r, node, a, b)
        if x.dtype == torch.bool and op in ("eq", "ne"):
            def f(p: Expr, q: Expr) -> Expr:
                for c, e in ((p, q), (q, p)):
                    if isinstance(c, Const):
                        return e if bool(c.value) == (op == "eq") else make("not", e)
                return Call(op, (p, q))

            return pointwise(f, torch.bool, x, y)
        if x.dtype == torch.bool:
            x, y = whole(x), whole(y)
        return pointwise(lambda p, q: _masked(r, op, p, q) or make(op, p, q), torch.bool, x, y)

    return read


def _masked(r: Reader, op: str, p: Expr, q: Expr) -> Expr | None:
    """`s == -inf` where s is finite but for a mask: the mask."""
    if op not in ("eq", "ne") or q != Const(-math.inf):
        return None
    parts = r.parts(p)
    if parts.guard is None or parts.outside != q or not r.tame(parts.inside, True) or r.reads_real_input(parts.inside):
        return None
    return parts.guard if op == "ne" else make("not", parts.guard)


def _logic(op: str, bits: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, a: Operand, b: Operand) -> Value:
        if dtype_of(node) == torch.bool:
            return apply(op, torch.bool, *(truth(r.value(x, torch.bool)) for x in (a, b)))
        if not bits:
            raise Refusal(f"{op} of integers")
        return apply(bits, dtype_of(node), *operands(r, node, a, b))

    return read


def _shift_right(r: Reader, node: fx.Node, a: Operand, b: Operand) -> Value:
    dtype = dtype_of(node)
    x, by = operands(r, node, a, b)
    places = r.probe(by)
    if not all(r.proves(Call(op, (places, Const(n)))) for op, n in (("ge", 0), ("lt", 8 * dtype.itemsize))):
        raise Refusal("a shift by what may be no number of the operand's bits")
    return apply("shr", dtype, x, by)


def truth(v: Value) -> Value:
    """The value as truth values."""
    if v.dtype == torch.bool:
        return v
    zero = Const(0.0 if v.is_real else 0)
    return Value(v.dims, torch.bool, lambda ix: make("ne", v.at(ix), zero))


def _not(r: Reader, node: fx.Node, a: Operand) -> Value:
    if dtype_of(node) != torch.bool:
        raise Refusal("bitwise not of integers")
    return apply("not", torch.bool, truth(r.value(a, torch.bool)))


def _unary(op: str) -> Callable[..., Value]:
    keep = op in ("neg", "abs", "square", "relu")

    def read(r: Reader, node: fx.Node, a: Operand, **kw: Any) -> Value:
        x = r.value(a, torch.float32)
        return apply(op, dtype_of(node), x if keep and x.dtype != torch.bool else real(x))

    return read


def _rsub(r: Reader, node: fx.Node, a: Operand, b: Operand, alpha: Any = 1) -> Value:
    x, y = operands(r, node, a, b)
    if alpha != 1:
        raise Refusal("rsub with alpha")
    return apply("sub", dtype_of(node), y, x)


def _floor_divide(r: Reader, node: fx.Node, a: Operand, b: Operand) -> Value:
    x, y = operands(r, node, a, b)
    if x.is_real:
        _power_of_two(b)
        return apply("floor", x.dtype, apply("div", x.dtype, x, y))
    _check_divisor(y)
    return apply("floordiv", torch.int64, x, y)


def _check_divisor(y: Value) -> None:
    if reads(y.at((ZERO,) * len(y.factors))):
        raise Refusal("an integer divided by data, for which torch raises an error where it is 0")


def _power_of_two(divisor: Operand) -> None:
    """Refused: what is rounded before the floor may be a whole step off."""
    if not isinstance(divisor, (int, float)) or abs(math.frexp(divisor)[0]) != 0.5:
        raise Refusal("a real number's remainder or whole quotient, which is exact only by a power of two")


def _remainder(r: Reader, node: fx.Node, a: Operand, b: Operand) -> Value:
    x, y = operands(r, node, a, b)
    if x.is_real:
        _power_of_two(b)
        times = apply("floor", x.dtype, apply("div", x.dtype, x, y))
        return apply("sub", dtype_of(node), x, apply("mul", x.dtype, y, times))
    _check_divisor(y)
    return apply("mod", torch.int64, x, y)


def _pow(r: Reader, node: fx.Node, a: Operand, b: Operand) -> Value:
    if isinstance(b, (int, float)) and isinstance(a, Value):
        known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "recip"}.get(b)
        if b == 1:
            return a
        if known and (known == "square" or a.is_real):
            return apply(known, a.dtype, a)
    x, y = operands(r, node, a, b)
    if not x.is_real:
        raise Refusal("power of integers")
    return apply("pow", x.dtype, x, y)


def _clamp(r: Reader, node: fx.Node, x: Value, min: Operand = None, max: Operand = None) -> Value:
    out = x
    for op, bound in (("max", min), ("min", max)):
        if bound is not None:
            out = apply(op, dtype_of(node), *operands(r, node, out, bound))
    return out


def _where(r: Reader, node: fx.Node, c: Value, a: Operand, b: Operand) -> Value:
    x, y = operands(r, node, a, b)
    if dtype_of(node).is_floating_point:
        x, y = real(x), real(y)
    return apply("where", dtype_of(node), truth(c), x, y)


def _masked_fill(r: Reader, node: fx.Node, x: Value, mask: Value, value: Operand) -> Value:
    fill = real(r.value(value, x.dtype)) if x.is_real else r.value(value, x.dtype)
    return apply("where", x.dtype, truth(mask), fill, x)


def convert(x: Value, dtype: torch.dtype) -> Value:
    """To another dtype.  Rounding to a narrower real format is left out: the result is the more exact one."""
    if dtype == torch.bool:
        return truth(x)
    if dtype.is_floating_point:
        y = real(x)
        return replace(y, dtype=dtype)
    if dtype.is_complex:
        raise Refusal("complex numbers")
    if x.is_real:
        return wrapped(Value(x.dims, dtype, lambda ix: make("int", x.at(ix))))
    out = replace(whole(x), dtype=dtype)
    return out if x.dtype in (dtype, torch.bool) else wrapped(out)


def _convert(r: Reader, node: fx.Node, x: Operand, *_: Any, **__: Any) -> Value:
    return convert(r.value(x, torch.float32), dtype_of(node))


def _triangle(lower: bool) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, x: Value, diagonal: Any = 0) -> Value:
        n = len(x.dims)
        w = coarse(coarse(x, n - 2), n - 1)
        zero = Const(False if w.dtype == torch.bool else 0.0 if w.is_real else 0)

        def at(ix: Index) -> Expr:
            row = make("add", ix[-2], Const(diagonal) if isinstance(diagonal, int) else diagonal)
            return make("where", Call("le" if lower else "ge", (ix[-1], row)), w.at(ix), zero)

        return Value(w.dims, w.dtype, at)

    return read


def _silu(r: Reader, node: fx.Node, x: Value, inplace: bool = False) -> Value:
    return apply("mul", x.dtype, x, apply("sigmoid", x.dtype, x))


def _minmax(op: str) -> Callable[..., Value]:
    def read(r: Reader, node: fx.Node, a: Value, b: Value) -> Value:
        return apply(op, dtype_of(node), *operands(r, node, a, b))

    return read


def _composed(f: Callable[[Expr], Expr]) -> Callable[..., Value]:
    """A function of one real number in terms of the table's."""
    def read(r: Reader, node: fx.Node, x: Operand) -> Value:
        return pointwise(f, dtype_of(node), real(r.value(x, torch.float32)))

    return read


def _trunc(x: Expr) -> Expr:
    return make("where", make("lt", x, Const(0.0)), make("neg", make("floor", make("neg", x))), make("floor", x))


def _sinh(x: Expr) -> Expr:
    e = make("expm1", make("abs", x))  # without cancellation near 0
    half = make("mul", Const(0.5), make("add", e, make("div", e, make("add", e, Const(1.0)))))
    return make("where", make("lt", x, Const(0.0)), make("neg", half), half)


def _cosh(x: Expr) -> Expr:
    return make("mul", Const(0.5), make("add", make("exp", x), make("exp", make("neg", x))))


def _sign(x: Expr) -> Expr:
    below = make("where", make("lt", x, Const(0.0)), Const(-1.0), Const(0.0))
    return make("where", make("gt", x, Const(0.0)), Const(1.0), below)


COMPOSED: dict[str, Callable[[Expr], Expr]] = {
    "ceil": lambda x: make("neg", make("floor", make("neg", x))), "trunc": _trunc, "sinh": _sinh, "cosh": _cosh,
    "round": lambda x: make("round", x), "sign": _sign, "sgn": _sign,
    "tan": lambda x: make("div", make("sin", x), make("cos", x)),
    "log10": lambda x: make("mul", make("log", x), Const(1.0 / math.log(10.0))),
    "atanh": lambda x: make("mul", Const(0.5), make("sub", make("log1p", x), make("log1p", make("neg", x)))),
}


RULES: dict[str, Rule] = {
    **{n: Rule("map", _composed(f)) for n, f in COMPOSED.items()},
    **{n: Rule("map", _binary(n)) for n in ("add", "sub", "mul", "div")},
    **{n: Rule("map", _compare(n)) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{n: Rule("map", _unary(o)) for n, o in (
        ("neg", "neg"), ("exp", "exp"), ("exp2", "exp2"), ("log", "log"), ("log2", "log2"), ("log1p", "log1p"),
        ("expm1", "expm1"), ("sqrt", "sqrt"), ("rsqrt", "rsqrt"), ("reciprocal", "recip"),
        ("tanh", "tanh"), ("sigmoid", "sigmoid"), ("erf", "erf"),
        ("sin", "sin"), ("cos", "cos"), ("abs", "abs"), ("relu", "relu"), ("square", "square"), ("floor", "floor"))},
    "bitwise_and": Rule("map", _logic("and", "bitand")), "bitwise_or": Rule("map", _logic("or", "bitor")),
    "bitwise_right_shift": Rule("map", _shift_right),
    "bitwise_xor": Rule("map", lambda r, node, a, b: _compare("ne")(r, node, a, b) if dtype_of(node) == torch.bool
                        else _refuse("exclusive or of integers")),
    "bitwise_not": Rule("map", _not), "logical_not": Rule("map", _not),
    "rsub": Rule("map", _rsub), "floor_divide": Rule("map", _floor_divide), "remainder": Rule("map", _remainder),
    "pow": Rule("map", _pow), "clamp": Rule("map", _clamp),
    "clamp_min": Rule("map", lambda r, node, x, min: _clamp(r, node, x, min, None)),
    "clamp_max": Rule("map", lambda r, node, x, max: _clamp(r, node, x, None, max)),
    "maximum": Rule("map", _minmax("max")), "minimum": Rule("map", _minmax("min")),
    "where": Rule("map", _where), "masked_fill": Rule("map", _masked_fill), "convert": Rule("map", _convert),
    "tril": Rule("map", _triangle(True)), "triu": Rule("map", _triangle(False)), "silu": Rule("map", _silu),
}


def _refuse(why: str) -> Value:
    raise Refusal(why)


__all__ = ["NARROW", "RULES", "apply", "convert", "dtype_of", "operands", "truth"]
