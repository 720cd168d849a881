"""Kinds of expressions: bool, int or real.  Conditions are bool, indices and extents are int.

A bool may stand where a number may (it is 0 or 1 there); nothing becomes an integer or a bool by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from memcomp.ir.errors import MemcompError, nearest
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var
from memcomp.ir.ops import OPS
from memcomp.ir.show import SPELLING, show_expr

Kind: TypeAlias = Literal["bool", "int", "real"]
_INTEGERS = ("i64", "i32", "i16", "i8", "u8")
_BOOL_ARGS = ("and", "or", "not")
_INT_ARGS = ("floordiv", "mod", "ceildiv", "shr", "shl", "bitand", "bitor")


class KindError(MemcompError):
    """An expression of the wrong kind, or an operator at a number where it has no value; `where` is its text.
    `verify` adds the statement."""


def kind_of_dtype(dtype: str) -> Kind:
    return "bool" if dtype == "bool" else "int" if dtype in _INTEGERS else "real"


def kind_of(e: Expr, dtype: Callable[[str], str]) -> Kind:
    """The kind of `e`, whose tensors have the given dtypes; KindError names the part that is wrong."""
    if isinstance(e, Const):
        return "bool" if isinstance(e.value, bool) else "int" if isinstance(e.value, int) else "real"
    if isinstance(e, (Var, Size)):
        return "int"
    if isinstance(e, Access):
        return kind_of_dtype(dtype(e.tensor))
    return _kind_of_call(e, dtype)


def _kind_of_call(e: Call, dtype: Callable[[str], str]) -> Kind:
    row = OPS.get(e.op)
    if row is None:
        raise KindError(f"unknown operator {e.op!r}", f"{e.op}(", nearest(e.op, OPS))
    if row.arity >= 0 and len(e.args) != row.arity:
        raise KindError(f"{e.op!r} takes {row.arity} argument{'s' * (row.arity != 1)}, found {len(e.args)}",
                        f"{e.op}(", f"write {e.op}({', '.join('xyz'[:row.arity])})")
    kinds = [kind_of(a, dtype) for a in e.args]
    spelling = SPELLING.get(e.op, e.op)
    for a, k in zip(e.args, kinds, strict=True):
        condition = e.op in _BOOL_ARGS or (e.op == "where" and a is e.args[0])
        if condition and k != "bool":
            raise KindError(f"{spelling!r} needs a condition, and {show_expr(a)!r} is {_A[k]}", show_expr(a),
                            "compare it: x != 0")
        if e.op in _INT_ARGS and k == "real":
            raise KindError(f"{spelling!r} needs integers, and {show_expr(a)!r} is real", show_expr(a),
                            "convert it: int(x), or int(floor(x / y)) for a quotient")
    _check_number(e, spelling)
    if row.result != "same":
        return row.result
    rest = kinds[1:] if e.op == "where" else kinds
    if "real" in rest:
        return "real"
    return "bool" if e.op == "where" and set(rest) == {"bool"} else "int"


def _check_number(e: Call, spelling: str) -> None:
    """What machines and numpy do with these differs."""
    n = e.args[1].value if len(e.args) == 2 and isinstance(e.args[1], Const) else 1
    if e.op in ("floordiv", "mod", "ceildiv") and n == 0:
        raise KindError(f"{spelling!r} by 0 has no value", show_expr(e), "divide by another number")
    if e.op in ("shl", "shr") and not 0 <= n < 64:
        raise KindError(f"{spelling!r} by {n} has no value", show_expr(e), "an integer has 64 bits: shift by 0 to 63")


_A: dict[Kind, str] = {"bool": "a condition", "int": "an integer", "real": "real"}
