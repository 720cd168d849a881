"""Expressions as CUDA C++ text, at one point of a tile: of the registers that a thread holds, one number.

Every text has a type, so that no constant makes f32 arithmetic one of f64: "bool", "int" (32 bits), "i64", "f32",
"f64".  Indices and sizes are of 32 bits; data of 64 unless its least and greatest value show that 32 hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from memcomp.codegen.bounds import natural
from memcomp.codegen.cuda.spread import Spread
from memcomp.codegen.names import Names
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, reads
from memcomp.ir.ops import ROUNDED
from memcomp.ir.target import INTEGERS

CTYPES = {"bool": "bool", "int": "int", "i64": "long long", "f32": "float", "f64": "double"}
WIDTHS = ("bool", "int", "i64", "f32", "f64")   # of two arguments the later one is that of the result
_INT = INTEGERS["i32"]
_REAL = {"neg": "-{0}", "square": "{0} * {0}", "abs": "fabs({0})", "exp": "exp({0})", "exp2": "exp2({0})",
         "log": "log({0})", "log2": "log2({0})", "sin": "sin({0})", "cos": "cos({0})", "erf": "erf({0})",
         "tanh": "tanh({0})", "expm1": "expm1({0})", "log1p": "log1p({0})", "floor": "floor({0})",
         "round": "rint({0})", "sqrt": "sqrt({0})", "sigmoid": "sigmoid({0})", "xlogx": "xlogx({0})",
         "relu": "highest({0}, {zero})", "recip": "{one} / {0}", "rsqrt": "{one} / sqrt({0})",
         "div": "{0} / {1}", "pow": "pow({0}, {1})", "max": "highest({0}, {1})", "min": "lowest({0}, {1})",
         "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}",
         "as_f32": "{0}", "as_f16": "from_f16(to_f16({0}))", "as_bf16": "from_bf16(to_bf16({0}))"}
_WHOLE = {"neg": "-{0}", "square": "{0} * {0}", "abs": "({0} < 0 ? -{0} : {0})", "relu": "most({0}, {zero})",
          "max": "most({0}, {1})", "min": "least({0}, {1})", "add": "{0} + {1}", "sub": "{0} - {1}",
          "mul": "{0} * {1}", "shr": "{0} >> {1}", "shl": "{0} << {1}", "bitand": "{0} & {1}", "bitor": "{0} | {1}",
          "floordiv": "floordiv({0}, {1})", "mod": "mod({0}, {1})", "ceildiv": "-floordiv(-{0}, {1})"}
_PLAIN = {"floordiv": "{0} / {1}", "mod": "{0} % {1}", "ceildiv": "({0} + {1} - 1) / {1}"}   # of natural numbers
_TESTS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_TRUTH = {"and": "{0} & {1}", "or": "{0} | {1}"}
_REALS = ("div", "recip", "rsqrt", "sqrt", "exp", "exp2", "log", "log2", "sin", "cos", "erf", "tanh", "expm1", "log1p",
          "floor", "round", "sigmoid", "xlogx", "pow")   # real whatever they are given
Point: TypeAlias = Mapping[str, str]   # by dim the register that holds it
Span: TypeAlias = "tuple[int, int] | None"


@dataclass(slots=True)
class Scope:
    """What text may name.

    spreads: of dims; tiles: their type; spans: the least and greatest value of tiles of integers; params: dtypes;
    held: text of a tile's number at a point; element: of a param's; real: the type of reals that rest on no data.
    """

    names: Names
    spreads: Mapping[str, Spread]
    tiles: dict[str, str]
    params: Mapping[str, str]
    spans: dict[str, Span] = field(default_factory=dict)
    held: Callable[[str, Point], str] = field(default=lambda t, p: "")
    element: Callable[[Access, Point], str] = field(default=lambda a, p: "")
    real: str = "f32"

    # -- types -------------------------------------------------------------------------------------------------------

    def type(self, e: Expr) -> str:
        """"" for a real constant, which takes the type of what it meets."""
        if isinstance(e, Const):
            if isinstance(e.value, (bool, int)):
                return "bool" if isinstance(e.value, bool) else self._fits((e.value, e.value))
            return ""
        if isinstance(e, (Var, Size)):
            return "int"
        if isinstance(e, Access):
            if e.tensor in self.tiles:
                return self.tiles[e.tensor]
            dtype = self.params[e.tensor]
            return dtype if dtype in ("bool", "i64", "f64") else "int" if dtype[0] in "iu" else "f32"
        if e.op in ("and", "or", "not", *_TESTS):
            return "bool"
        if e.op == "int":
            return "i64"
        if e.op in ROUNDED:
            return "f32"
        if e.op == "real":
            got = self.type(e.args[0])
            return got if got in ("f32", "f64") else self.real
        got = self.joined(e.args[1:] if e.op == "where" else e.args)
        if e.op in _REALS and got not in ("f32", "f64", ""):
            return self.real
        if got not in ("int", "i64", "bool"):
            return got
        if e.op == "where":
            return got
        return self._fits(self.span(e)) if reads(e) else got if got != "bool" else "int"

    def joined(self, args: tuple[Expr, ...]) -> str:
        """The type that all of them take; "" where all are real constants."""
        types = {self.type(a) for a in args}
        known = types - {""}
        if not known:
            return ""
        widest = max(known, key=WIDTHS.index)
        return self.real if "" in types and widest not in ("f32", "f64") else widest

    def _fits(self, s: Span) -> str:
        return "int" if s is not None and _INT[0] <= s[0] and s[1] <= _INT[1] else "i64"

    def span(self, e: Expr) -> Span:
        """The least and the greatest value of an integer; None: not known, or more than 64 bits hold."""
        if isinstance(e, Const):
            return (int(e.value), int(e.value)) if math.isfinite(e.value) else None
        if isinstance(e, Var):
            return (0, self.spreads[e.name].capacity - 1 if e.name in self.spreads else _INT[1])
        if isinstance(e, Size):
            return (0, _INT[1])
        if isinstance(e, Access):
            return self.spans.get(e.tensor) if e.tensor in self.tiles else INTEGERS.get(self.params[e.tensor])
        spans = [self.span(a) for a in (e.args[1:] if e.op == "where" else e.args)]
        known = [s for s in spans if s is not None]
        if e.op == "bitand" and (limits := [s[1] for s in known if s[0] >= 0]):
            return 0, min(limits)
        if e.op == "mod" and spans[1] is not None and spans[1][0] > 0:
            return 0, spans[1][1] - 1
        if len(known) < len(spans):
            return None
        return self._ends(e.op, known)

    def _ends(self, op: str, s: list[tuple[int, int]]) -> Span:
        if op == "add":
            return s[0][0] + s[1][0], s[0][1] + s[1][1]
        if op == "sub":
            return s[0][0] - s[1][1], s[0][1] - s[1][0]
        if op == "neg":
            return -s[0][1], -s[0][0]
        if op in ("mul", "square"):
            ends = [x * y for x in s[0] for y in s[-1]]
            return min(ends), max(ends)
        if op in ("max", "min", "where"):
            join = max if op == "max" else min
            return join(a[0] for a in s) if op != "where" else min(a[0] for a in s), \
                join(a[1] for a in s) if op == "min" else max(a[1] for a in s)
        if op == "shr" and 0 <= s[1][0] and s[1][1] < 32:
            return min(s[0][0], 0), max(s[0][1], 0)
        if op == "floordiv" and s[1][0] > 0:
            return min(s[0][0], 0), max(s[0][1], 0)
        return None

    # -- text --------------------------------------------------------------------------------------------------------

    def local(self, dim: str, at: Point) -> str:
        """The local index of a dim at a register."""
        s, register = self.spreads[dim], at[dim]
        if s.registers == s.vector:
            offset = register
        elif register == "0":
            offset = "0"
        elif s.vector == 1:
            offset = f"{register} * {s.step}" if s.step > 1 else register
        else:
            offset = f"{register} / {s.vector} * {s.step} + {register} % {s.vector}"
        if not s.bits:
            return f"({offset})" if " " in offset else offset
        return self.names[f"{dim}_at"] if offset == "0" else f"({self.names[f'{dim}_at']} + {offset})"

    def scalar(self, e: Expr) -> str:
        return self.text(e, {})

    def whole(self, e: Expr) -> str:
        """A count or an end of a loop, of 32 bits."""
        text = self.text(e, {})
        return text if self.type(e) == "int" else f"(int)({text})"

    def cast(self, e: Expr, want: str, at: Point) -> str:
        """The expression as a number of type `want`."""
        got = self.type(e)
        if isinstance(e, Const):
            return number(e.value, want)
        text = self.text(e, at, want if want in ("f32", "f64") else "")
        if got in (want, ""):
            return text
        return f"({text} != 0)" if want == "bool" else f"({CTYPES[want]}){self._atom(text)}"

    def _atom(self, text: str) -> str:
        return text if text[0] == "(" or text.replace("_", "").isalnum() else f"({text})"

    def text(self, e: Expr, at: Point, real: str = "") -> str:
        """Text in the expression's own type; one of real constants alone in `real`.  Refusal for an operator that has
        no form."""
        if isinstance(e, Const):
            return number(e.value, self.type(e) or real or self.real)
        if isinstance(e, Size):
            return self.names[e.rank]
        if isinstance(e, Var):
            return self.local(e.name, at) if e.name in self.spreads else self.names[e.name]
        if isinstance(e, Access):
            return self.held(e.tensor, at) if e.tensor in self.tiles else self.element(e, at)
        return f"({self.call(e, at, real or self.real)})"

    def call(self, e: Call, at: Point, real: str) -> str:
        if e.op == "where":
            kind = self.joined(e.args[1:]) or real
            test, a, b = self.cast(e.args[0], "bool", at), *(self.cast(x, kind, at) for x in e.args[1:])
            return f"{test} ? {a} : {b}"
        if e.op == "not":
            return f"!{self.cast(e.args[0], 'bool', at)}"
        if e.op in _TRUTH:
            return f" {'&' if e.op == 'and' else '|'} ".join(self.cast(a, "bool", at) for a in e.args)
        if e.op in _TESTS:
            kind = self.joined(e.args) or real
            return f" {_TESTS[e.op]} ".join(self.cast(a, kind, at) for a in e.args)
        if e.op in ("int", "real"):
            return self.cast(e.args[0], self.type(e), at)
        kind = self.type(e) or real
        if kind in ("f32", "f64"):
            return self._real(e, kind, at)
        # arguments may be wider than the result, whose low bits they decide; a quotient needs them whole
        wide = "i64" if "i64" in (kind, self.joined(e.args)) else "int"
        args = [self.cast(a, wide, at) for a in e.args]
        if e.op in _PLAIN and all(natural(a) for a in e.args):
            return _PLAIN[e.op].format(*args)
        if e.op not in _WHOLE:
            raise Refusal(f"the operator {e.op} has no form in CUDA C++ for integers")
        text = _WHOLE[e.op].format(*args, zero="0LL" if wide == "i64" else "0")
        return text if wide == kind else f"({CTYPES[kind]})({text})"

    def _real(self, e: Call, kind: str, at: Point) -> str:
        if e.op == "as_f32" and isinstance(x := e.args[0], Call) and x.op in ("add", "sub", "mul", "div") \
                and self.joined(x.args) in ("f32", ""):
            return f"{x.op}_f32({', '.join(self.cast(a, kind, at) for a in x.args)})"
        args = [self.cast(a, kind, at) for a in e.args]
        if e.op == "pow" and isinstance(e.args[1], Const) and e.args[1].value in (1, 2, 3, 4):
            return " * ".join([args[0]] * int(e.args[1].value))
        if e.op not in _REAL:
            raise Refusal(f"the operator {e.op} has no form in CUDA C++", hint="known: the operators of `ir.ops`")
        return _REAL[e.op].format(*args, zero=number(0.0, kind), one=number(1.0, kind))


def number(x: bool | int | float, kind: str) -> str:
    """A constant of a type."""
    text = _number(x, kind)
    return f"({text})" if text[0] == "-" else text


def _number(x: bool | int | float, kind: str) -> str:
    if kind == "bool":
        return "true" if x else "false"
    if kind == "int":
        return str(int(x)) if x > _INT[0] else f"({int(x) + 1} - 1)"
    if kind == "i64":
        return f"{int(x)}LL" if x > INTEGERS["i64"][0] else f"({int(x) + 1}LL - 1)"
    if isinstance(x, int):
        x = float(x)
    if not math.isfinite(x):
        return ("-" if x < 0 else "") + ("NOT_A_NUMBER" if math.isnan(x) else "INFINITE") + ("32" if kind == "f32" else
                                                                                            "64")
    return repr(x) + ("f" if kind == "f32" else "")
