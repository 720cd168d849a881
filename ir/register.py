"""Operators that users add to the table: a name, a definition in known operators, and laws that are tested.

Rewrites see the operator and its laws; kernels see the definition.  The definition and the laws are part of a program's
digest, so two operators of one name never share a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from memcomp.ir.cascade import Knob
from memcomp.ir.errors import OptionError, nearest
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, substitute, transform, walk
from memcomp.ir.laws import counterexample, value
from memcomp.ir.ops import OPS, PARAMETERS, Op
from memcomp.ir.parse import RESERVED
from memcomp.ir.program import Program
from memcomp.ir.show import show_expr


def register(row: Op) -> Op:
    """Add a scalar function with its laws to the table; returns the row that the table holds.

    `row.definition` gives its meaning over `PARAMETERS`; `row.numpy` is then made from it.  A row without a definition
    is interpreted and derived with, but no kernel can be written for it.
    Raises OptionError for a bad or known name, a definition that is none, and a stated law that numbers contradict (the
    message holds them).  The same row may be registered again.
    """
    if not row.name.isidentifier() or row.name != row.name.lower() or row.name in RESERVED or row.name == "ceil":
        raise OptionError(f"{row.name!r} cannot name an operator", hint="a lower-case identifier, no word of the text")
    if not 1 <= row.arity <= len(PARAMETERS):
        raise OptionError(f"{row.name!r} takes {row.arity} arguments", hint=f"1 to {len(PARAMETERS)} are possible")
    if len(row.monotone) > row.arity or any(k >= row.arity or k < 0 for g in row.linear for k in g):
        raise OptionError(f"{row.name!r} states a law for an argument that it does not have")
    words = {"monotone": (row.monotone, ("inc", "dec", "sign", "")), "hom": (row.hom or (), ("add", "mul")),
             "domain": ((row.domain,), ("real", "nonneg", "pos"))}
    for kind, (said, known_words) in words.items():
        if not set(said) <= set(known_words):
            raise OptionError(f"{row.name!r} states the law {kind} = {said}", hint=f"known: {', '.join(known_words)}")
    if row.definition is not None:
        row = replace(row, numpy=meaning(row.definition, row.name))
    known = OPS.get(row.name)
    if known is not None:
        if known == row and (row.definition is not None or known.numpy is row.numpy):
            return known
        what = "is an operator of the table" if known.definition is None else \
            f"is already registered as {show_expr(known.definition)}"
        raise OptionError(f"{row.name!r} {what}", hint="choose another name")
    if row.domain != "real" and any(not math.isnan(y := value(row, x, *[1.0] * (row.arity - 1))) for x in (-3.0, -0.5)):
        raise OptionError(f"{row.name!r} has the value {y:g} outside the domain stated for it, x > 0 or x >= 0",
                          hint="a domain is where a function is defined; its laws hold everywhere there")
    if (found := counterexample(row)) is not None:
        raise OptionError(f"{row.name!r} breaks a law stated for it: {found[0].says}", found[1],
                          "state only what holds for every argument")
    OPS[row.name] = row
    return row


def meaning(definition: Expr, name: str) -> Callable[..., Any]:
    """The numpy function of a definition.  Raises OptionError where it is not made of known operators."""
    for n in walk(definition):
        if isinstance(n, Call) and n.op not in OPS:
            raise OptionError(f"the definition of {name!r} uses the unknown operator {n.op!r}",
                              hint=nearest(n.op, OPS))
        if isinstance(n, (Access, Size)) or isinstance(n, Var) and n.name not in PARAMETERS:
            raise OptionError(f"the definition of {name!r} reads {show_expr(n)}",
                              hint=f"it may use numbers and {', '.join(PARAMETERS)}")

    def evaluate(e: Expr, args: dict[str, Any]) -> Any:
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Var):
            return args[e.name]
        assert isinstance(e, Call)
        return OPS[e.op].numpy(*(evaluate(a, args) for a in e.args))

    return lambda *args: evaluate(definition, dict(zip(PARAMETERS, args, strict=False)))


def unfolded(e: Expr) -> Expr:
    """The expression with registered operators replaced by their definitions."""

    def f(n: Expr) -> Expr:
        row = OPS.get(n.op) if isinstance(n, Call) else None
        if row is None or row.definition is None:
            return n
        assert isinstance(n, Call)
        table: dict[Expr, Expr] = {Var(p): a for p, a in zip(PARAMETERS, n.args, strict=False)}
        return unfolded(substitute(row.definition, table))

    return transform(e, f)


def expanded(program: Program) -> Program:
    """The program without registered operators: what kernels are written from."""
    if not definitions(program):
        return program

    def of(e: Any) -> Any:
        return e if e is None else unfolded(e)

    einsums = tuple(replace(s, body=of(s.body), guard=of(s.guard)) for s in program.cascade.einsums)
    return replace(program, cascade=replace(program.cascade, einsums=einsums))


def definitions(program: Program) -> tuple[str, ...]:
    """One line for every registered operator that the program uses: its definition and its laws."""
    found: dict[str, Op] = {}
    todo = [c.op for e in _expressions(program) for c in walk(e) if isinstance(c, Call)]
    while todo:
        row = OPS.get(name := todo.pop())
        if row is not None and row.definition is not None and name not in found:
            found[name] = row
            todo += [n.op for n in walk(row.definition) if isinstance(n, Call)]
    return tuple(f"op {n} = {show_expr(row.definition)}: {row}" if row.definition is not None else ""
                 for n, row in sorted(found.items()))


def _expressions(p: Program) -> Iterator[Expr]:
    for s in p.cascade.einsums:
        yield s.body
        yield from s.guards()
    for r in p.cascade.ranks:
        if r.extent is not None and not isinstance(r.extent, Knob):
            yield r.extent
