"""Reads kernel text: the few statements of TVMScript that `emit` writes, straight through TVM's builder.

TVM's own parser gives the same functions (a test compares them), but walks every expression node by node and compiles
each of them: a quarter of the time that a region took to compile.  Here Python evaluates an expression at once.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as builder_of


def read(text: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """The functions of a kernel's text by name, well formed.

    words: what the text may name besides `T`.  Raises SyntaxError or RecursionError where Python's limits are met,
    RuntimeError, with the line, where a statement makes no sense to TVM.
    """
    functions = {f.name: _Reader(words).function(f) for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
    tvm.s_tir.analysis.verify_well_formed(tvm.IRModule(functions))
    return functions


class _Reader:
    """Statements in order; names are bound as Python binds them."""

    def __init__(self, words: Mapping[str, Any]) -> None:
        self.names: dict[str, Any] = {**words, "T": T}

    def function(self, f: ast.FunctionDef) -> Any:
        options = {k.arg: self.value(k.value) for d in f.decorator_list if isinstance(d, ast.Call) for k in d.keywords}
        with IRBuilder() as builder:
            with builder_of.prim_func(is_private=False, s_tir=options.get("s_tir", False)):
                T.func_name(f.name)
                for a in f.args.args:
                    self.names[a.arg] = T.arg(a.arg, self.value(a.annotation)())
                if f.returns is not None:
                    T.func_ret(self.value(f.returns)().ty)
                self.body(f.body)
            return builder.get()

    def body(self, statements: Sequence[ast.stmt]) -> None:
        for s in statements:
            try:
                self.statement(s)
            except (RuntimeError, SyntaxError):
                raise
            except Exception as error:
                raise RuntimeError(f"line {s.lineno}: {type(error).__name__}: {error}") from error

    def value(self, node: ast.expr | None) -> Any:
        assert node is not None
        return eval(compile(ast.Expression(node), "<kernel>", "eval"), self.names)

    def name(self, name: str, value: Any) -> None:
        IRBuilder.name(name, value)
        self.names[name] = value

    def statement(self, s: ast.stmt) -> None:
        match s:
            case ast.AnnAssign(target=ast.Name(name), annotation=ast.Attribute(attr="let")):
                x = self.value(s.value)
                x = x if isinstance(x, tvm.ir.Expr) else tirx.const(x)
                self.name(name, T.let.as_var(rhs_dtype=x.ty))
                T.Bind(x, var=self.names[name])
            case ast.Assign(targets=[ast.Subscript(target, index)]):
                x, place = self.value(s.value), self.value(index)
                T.buffer_store(self.value(target), x, list(place) if isinstance(place, tuple) else place)
            case ast.Assign(targets=[ast.Name(name)]):
                x = self.value(s.value)
                if not isinstance(x, tvm.ir.Var):
                    raise TypeError(f"{name} is neither a size nor a buffer")
                self.name(name, x)
            case ast.For(target=ast.Name(name)):
                with self.value(s.iter) as variable:
                    self.name(name, variable)
                    self.body(s.body)
            case ast.If():
                self.branch(self.value(s.test), s)
            case ast.Assert():
                frame = T.Assert(self.value(s.test), self.value(s.msg))
                frame.add_callback(partial(frame.__exit__, None, None, None))  # it ends with what it is in
                frame.__enter__()
            case ast.Expr():
                x = self.value(s.value)
                if x is not None:
                    T.evaluate(x)
            case ast.Pass():
                pass
            case _:
                raise TypeError(f"no statement of kernel text: {ast.unparse(s).splitlines()[0]}")

    def branch(self, test: Any, s: ast.If) -> None:
        if isinstance(test, bool):
            self.body(s.body if test else s.orelse)
            return
        with T.If(test):
            with T.Then():
                self.body(s.body)
            if s.orelse:
                with T.Else():
                    self.body(s.orelse)
