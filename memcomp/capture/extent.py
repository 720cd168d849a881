"""Extents while reading: Python ints, or sympy expressions of torch's shape symbols."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import sympy
import torch

from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Call, Const, Expr, Size, call

Extent: TypeAlias = "int | sympy.Expr"


def extent(x: int | torch.SymInt) -> Extent:
    """The extent of a torch dimension; a SymInt gives its sympy expression."""
    return x if isinstance(x, int) else _exact(x.node.expr)


@lru_cache(maxsize=4096)
def _exact(e: sympy.Expr) -> Extent:
    """With the floor divisions gone that leave no remainder for any size: torch keeps `s**2//s`."""
    if not e.args or not any(type(x).__name__ in _FLOOR for x in sympy.preorder_traversal(e)):
        return tidy(e)
    args = [_exact(a) for a in e.args]
    if type(e).__name__ in _FLOOR and (q := quotient(args[0], args[1])) is not None:
        return q
    return tidy(sympy.expand(e.func(*args)))


_FLOOR = ("FloorDiv", "CleanDiv")


def tidy(e: sympy.Expr) -> Extent:
    return int(e) if e.is_Integer else e


def product(*xs: Extent) -> Extent:
    out: Extent = 1
    for x in xs:
        out = out * x
    return out if isinstance(out, int) else tidy(sympy.expand(out))


def same(a: Extent, b: Extent) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or bool(sympy.expand(a - b) == 0)


def quotient(a: Extent, b: Extent) -> Extent | None:
    """a / b where that is an integer for all sizes, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if b == 1:
        return a
    q = sympy.cancel(sympy.sympify(a) / b)
    if q.is_Integer:
        return int(q)
    if not q.is_polynomial(*q.free_symbols) or not q.free_symbols:
        return None
    ok = all(c.is_Integer for c in sympy.Poly(q, *q.free_symbols).coeffs())
    return tidy(sympy.expand(q)) if ok else None


def size_name(symbol: sympy.Symbol) -> str:
    """The name a shape symbol has in expressions until the program's ranks are known."""
    return f"{str(symbol).upper()}__"


_NAMED = {"FloorDiv": "floordiv", "CleanDiv": "floordiv", "CeilDiv": "ceildiv", "Mod": "mod", "PythonMod": "mod",
          "Max": "max", "Min": "min"}


def expression(e: Extent) -> Expr:
    """The extent as an index expression over `Size(size_name(symbol))`."""
    if isinstance(e, int) or e.is_Integer:
        return Const(int(e))
    if e.is_Symbol:
        return Size(size_name(e))
    if e.is_Add or e.is_Mul:
        parts = [expression(a) for a in e.args]
        out = parts[0]
        for p in parts[1:]:
            out = Call("add" if e.is_Add else "mul", (out, p))
        return out
    if e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        base = expression(e.base)
        out = base
        for _ in range(int(e.exp) - 1):
            out = Call("mul", (out, base))
        return out
    name = _NAMED.get(type(e).__name__)
    if name is None:
        raise Refusal(f"the size {e} has no index expression",
                      hint=f"{type(e).__name__} is not an integer operator here")
    args = [expression(a) for a in e.args]
    out = args[0]
    for a in args[1:]:
        out = call(name, out, a)
    return out


_REAL = {"OpaqueUnaryFn_sqrt": "sqrt", "OpaqueUnaryFn_exp": "exp", "OpaqueUnaryFn_log": "log", "FloatTrueDiv": "div",
         "IntTrueDiv": "div", "FloatPow": "pow"}


def real_expression(e: sympy.Expr, symbol: Callable[[sympy.Symbol], Expr]) -> Expr:
    """A run-time float as an expression; `symbol` gives the symbols that are floats themselves."""
    if e.is_Number:
        return Const(float(e))
    if e.is_Symbol:
        return call("real", expression(e)) if e.is_integer else symbol(e)
    name = type(e).__name__
    if name == "ToFloat":
        return call("real", expression(e.args[0]))
    args = [call("real", expression(a)) if a.is_integer and not a.is_Number else real_expression(a, symbol)
            for a in e.args]
    if e.is_Add or e.is_Mul:
        out = args[0]
        for a in args[1:]:
            out = call("add" if e.is_Add else "mul", out, a)
        return out
    if e.is_Pow:
        known = {-1.0: "recip", 0.5: "sqrt", -0.5: "rsqrt", 2.0: "square"}
        power = args[1].value if isinstance(args[1], Const) else None
        return call(known[power], args[0]) if power in known else call("pow", *args)
    if name not in _REAL:
        raise Refusal(f"the run-time number {e} has no expression", hint=f"{name} has no rule")
    return call(_REAL[name], *args)
