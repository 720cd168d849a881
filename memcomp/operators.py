"""Your own scalar operator: one function of torch, what is known about it, and no edit of the core."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from memcomp.ir.errors import OptionError, Refusal
from memcomp.ir.expr import Access, Expr, Var, transform, walk
from memcomp.ir.ops import PARAMETERS, Op, Order
from memcomp.ir.register import register as add_row
from memcomp.ir.simplify import simplify

INF = math.inf
_POINTS = (-300.0, -4.0, -1.5, -0.5, -1e-3, 0.0, 1e-3, 0.5, 1.0, 2.5, 300.0)


def register(fn: Callable[..., torch.Tensor] | None = None, /, *, name: str = "",
             monotone: Order | Sequence[Order] = (), strict: bool = False, range: tuple[float, float] = (-INF, INF),
             positive: bool = False, degree: float | None = None, hom: tuple[str, str] | None = None,
             domain: Literal["real", "nonneg", "pos"] = "real", limits: Sequence[tuple[float, float]] = ()) -> Any:
    """Make a function of 1 to 3 tensors, computed point by point, one operator with laws of its own.

        @memcomp.register(monotone="inc", degree=1.0)
        def leaky(x):
            return torch.where(x < 0, 0.1 * x, x)

    The function is returned and called as before; torch.compile keeps it in the graph as one operator, through which
    memcomp moves reductions by the stated laws (docs/derivation.md, "Your own operator").  Its body is read once, as an
    expression of known operators: that is its meaning on every backend.

    name:     in programs and proofs; the function's own name where "".
    monotone: "inc" or "dec", per argument where there are several; strict: strictly so.
    range:    bounds of the result; positive: it is > 0.
    degree:   f(c x) = c**degree f(x) for c > 0.
    hom:      (a, b) of "add" and "mul": f(x a y) = f(x) b f(y).
    domain:   where the laws hold: "real", "nonneg" (x >= 0) or "pos" (x > 0).
    limits:   ((x, f(x)), ...) at infinities that may be relied on.
    Raises OptionError where the function cannot be read as an expression, where a stated law is contradicted by a pair
    of numbers (which the message names), and where the name is taken by another operator.
    """
    if fn is None:
        return lambda f: register(f, name=name, monotone=monotone, strict=strict, range=range, positive=positive,
                                  degree=degree, hom=hom, domain=domain, limits=limits)
    from memcomp.capture.table import Rule, own

    name = name or getattr(fn, "__name__", "")
    given = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given):
        raise OptionError(f"{name!r} must take its tensors one by one", hint="def f(x): or def f(x, y):")
    arity = len(given)
    ways = (monotone,) if isinstance(monotone, str) else tuple(monotone)
    row = add_row(Op(name, arity, fn, hom=hom, degree=degree, monotone=ways, strict=strict, range=range,
                     positive=positive, domain=domain, limits=tuple(limits), definition=definition(fn, name, arity)))
    in_graph = torch.compiler.allow_in_graph(fn)  # type: ignore[no-untyped-call]

    def read(r: Any, node: Any, *xs: Any) -> Any:
        from memcomp.capture.reader import real
        from memcomp.capture.rules_map import apply, dtype_of

        if len(xs) != arity:
            raise Refusal(f"{row.name} is called with {len(xs)} arguments, and was registered with {arity}")
        return apply(row.name, dtype_of(node), *(real(r.value(x, torch.float32)) for x in xs))

    own(in_graph, Rule("map", read))
    return in_graph


def definition(fn: Callable[..., Any], name: str, arity: int) -> Expr:
    """The body of a function of torch as an expression over `ir.ops.PARAMETERS`.

    Raises OptionError where it is not computed point by point by operators that memcomp reads.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    from memcomp.capture.reader import Reader
    from memcomp.capture.value import Value

    if not 1 <= arity <= len(PARAMETERS):
        raise OptionError(f"{name!r} takes {arity} arguments", hint=f"1 to {len(PARAMETERS)} are possible")
    points = [torch.tensor(_POINTS[k:] + _POINTS[:k], dtype=torch.float64) for k in (0, 3, 5)[:arity]]
    try:
        gm = make_fx(fn, tracing_mode="fake")(*points)
        out = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        reader = Reader(gm, [n for n in gm.graph.nodes if n.op == "call_function"])
        value = reader.read(out)
    except Refusal as why:
        raise OptionError(f"{name!r} cannot be read: {why.what}", why.where, why.hint) from why
    except Exception as why:  # whatever the user's own code raises under torch's tracer
        raise OptionError(f"{name!r} cannot be traced", str(why).partition("\n")[0]) from why
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    index = (Var("i"),)
    read = value.at(index) if isinstance(value, Value) and len(value.factors) == 1 else None
    table = {reader.leaves[n]: Var(p) for n, p in zip(inputs, PARAMETERS, strict=False) if n in reader.leaves}
    if read is None or reader.statements or any(isinstance(n, Access) and (n.index != index or n.tensor not in table)
                                                for n in walk(read)):
        raise OptionError(f"{name!r} is not computed point by point from its arguments alone")
    e = transform(simplify(read), lambda n: table[n.tensor] if isinstance(n, Access) else n)
    _agree(fn, e, name, points)
    return e


def _agree(fn: Callable[..., Any], e: Expr, name: str, points: list[torch.Tensor]) -> None:
    """The expression gives what torch gives."""
    from memcomp.ir.register import meaning

    want = fn(*points)
    got = torch.as_tensor(meaning(e, name)(*(p.numpy() for p in points)), dtype=torch.float64)
    if not torch.allclose(got.expand(want.shape), want.double(), rtol=1e-9, atol=1e-12, equal_nan=True):
        raise OptionError(f"{name!r} was read as another function than torch computes")


__all__ = ["definition", "register"]
