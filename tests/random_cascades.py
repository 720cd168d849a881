"""Random chains of reductions drawn from the operator table, and the forms they must equal.

`cascade(seed)`: 2 to 4 chained reductions over M whose bodies mix what is carried with what was reduced.  Every row of
the law table has a shape in which it is needed, so that a false row shows.  `difference(program, seed)` compares the
chain with its streamed forms (tile sizes that divide nothing, splits, random merge trees) in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from memcomp.ir import ops
from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, Tensor
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, transform, walk
from memcomp.ir.interpret import interpret
from memcomp.ir.places import MARKS
from memcomp.ir.program import Program, knobs
from memcomp.passes.reduce_passes import reduce_passes

P, M = Var("p"), Var("m")
X, Y, C = Access("X", (P, M)), Access("Y", (M,)), Access("C", (P,))
GIVEN = (Tensor("X", ("P", "M"), role="in"), Tensor("Y", ("M",), role="in"), Tensor("C", ("P",), role="in"))
UNARY = tuple(n for n, o in ops.OPS.items() if o.arity == 1 and o.result in ("real", "same"))
BINARY = tuple(n for n, o in ops.OPS.items()
               if o.arity == 2 and o.result in ("real", "same") and n not in ("pow", *MARKS))
GUARDS: tuple[Expr | None, ...] = (None, None, None, call("le", M, P), call("lt", Y, Const(0.7)))
TILES = (3, 5, 2)
INF = float("inf")


class Dice(Random):
    """Random choices that prefer one operator where they can."""

    focus = ""

    def op(self, names: Sequence[str]) -> str:
        return self.focus if self.focus in names and self.random() < 0.7 else self.choice(names)


def inside(rng: Dice, op: str, e: Expr) -> Expr:
    """An argument of the operator in its domain, made of `e`."""
    domain = ops.OPS[op].domain if op not in ("recip", "div") else "pos"
    if domain == "pos":
        return rng.choice((call("exp", e), call("add", call("square", e), 0.25), call("add", call("abs", e), 0.5)))
    return rng.choice((call("abs", e), call("square", e))) if domain == "nonneg" else e


def expression(rng: Dice, depth: int, leaves: Sequence[Expr], conditions: Sequence[Expr]) -> Expr:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(leaves)

    def more() -> Expr:
        return expression(rng, depth - 1, leaves, conditions)

    kind = rng.random()
    if kind < 0.35:
        op = rng.op(UNARY)
        return Call(op, (inside(rng, op, more()),))
    if kind < 0.85:
        op = rng.op(BINARY)
        second = more()
        return Call(op, (more(), inside(rng, op, second) if op == "div" else second))
    if kind < 0.9:
        return call("pow", more(), rng.choice((2, 3)))
    return call("where", rng.choice(conditions), more(), rng.choice((Const(0.0), more())))


def _signed(rng: Dice, e: Expr) -> Expr:
    """A value whose sign may be proved: any operator of it, at times turned or moved."""
    op = rng.op(UNARY)
    f = Call(op, (inside(rng, op, e),))
    return rng.choice((f, f, f, call("neg", f), f * 0.5, f - 0.5, call("abs", f) + 0.25, call("max", f, 0.5)))


def _through(rng: Dice, x: Expr, g: Expr) -> Expr:
    """f of a carried value that a reduced one scales or moves; under roots and logarithms the product is positive
    although its factors may not be."""
    op = rng.op((*UNARY, "relu", "abs", "sqrt", "rsqrt", "log", "log2"))
    if op != "recip" and ops.OPS[op].domain == "real":
        s = _signed(rng, g)
        inner = rng.choice((x * s, x * s, call("div", x, call("abs", g) + 0.5), x - g, g - x, x * s * -0.5))
    else:
        u, v = (rng.choice((call("exp", e * 0.5), call("abs", e) + 0.5, call("square", e) + 0.25)) for e in (x, g))
        inner = rng.choice((u * v, u * v, call("div", u, v), u + v, call("min", x, -0.5) * call("min", g, -0.5)))
    return Call(op, (inner,))


_FORMS: tuple[Callable[[Dice, Expr, Expr], Expr], ...] = (
    _through, _through, _through,
    lambda rng, x, g: x * _signed(rng, g),
    lambda rng, x, g: call("div", x, call("abs", g) + 0.5),
    lambda rng, x, g: call("div", x, call("add", rng.choice((1.25, -1.25)), call(rng.op(("tanh", "sin")), g))),
    lambda rng, x, g: call(rng.op(("exp", "exp2")), x - g),
    lambda rng, x, g: call(rng.op(("exp", "exp2")), x - g) * Y,
    lambda rng, x, g: call(rng.op(("exp", "exp2")), call("where", call("lt", M, 4), x, -INF) - g),
    lambda rng, x, g: call("square", rng.choice((x - g, x * g))),
    lambda rng, x, g: call("pow", *rng.choice((((call("abs", x) + 0.5) * call("exp", g * 0.5), 1.5),
                                               (call("min", x, -0.5) * call("min", g, -0.5), 0.5)))),
    lambda rng, x, g: call("pow", rng.choice((x - g, x * g)), rng.choice((2, 3))),
    lambda rng, x, g: call("recip", (call("abs", x) + 0.5) * (call("square", g) + 0.25)),
    lambda rng, x, g: call("where", rng.choice((call("gt", g, 0.0), call("lt", M, 4))), x * g, Y),
    lambda rng, x, g: call(rng.op(("max", "min")), x * (h := _signed(rng, g)), rng.choice((Y * h, Const(0.0)))),
    lambda rng, x, g: call(rng.op(("max", "min")), x, g),
    lambda rng, x, g: call("neg", x - g) * Y,
    lambda rng, x, g: call("log", call("exp", x) + call("where", call("lt", M, 4), call("exp", x), 0.0)) * g,
    lambda rng, x, g: call("real", call("int", x * 3.0 - g)),
)


def cascade(seed: int, focus: str = "") -> Program:
    """The chain of a seed; one operator stands in most places of it where `focus` names one."""
    rng = Dice(seed)
    rng.focus = focus
    statements: list[Einsum] = []
    reduced: list[Expr] = []
    carried: list[Expr] = []
    for k in range(rng.randint(2, 4)):
        guard = rng.choice(GUARDS)
        leaves = [X, X, Y, C, Const(0.5), Const(2.0), *carried, *reduced, *reduced]
        conditions = [call("lt", M, 4), call("gt", C, 0.0), *(call("gt", g, 0.0) for g in reduced)]
        if rng.random() < 0.4:
            out = Access(f"T{k}", (P, M))
            statements.append(Einsum((out,), expression(rng, rng.randint(1, 2), leaves, conditions), None, guard))
            carried.append(out)
        monoid = rng.choice(("sum", "sum", "sum", "sum", "max", "max", "min", "min", "prod"))
        if rng.random() < (0.9 if focus else 0.65):
            for _ in range(8 if focus else 1):
                x = rng.choice([X, X, Y, call("abs", X), *carried])
                body = rng.choice(_FORMS)(rng, x, rng.choice(reduced or [C]))
                if any(isinstance(n, Call) and n.op == focus for n in walk(body)):
                    break
        else:
            body = expression(rng, rng.randint(1, 3), leaves, conditions)
        out = Access(f"G{k}", (P,))
        if monoid in ("max", "min") and rng.random() < 0.4:
            statements.append(Einsum((out, Access(f"I{k}", (P,))), body, Reduce("arg" + monoid, ("m",)), guard))
        else:
            statements.append(Einsum((out,), body, Reduce(monoid, ("m",)), guard))
        reduced.append(out)
    outs = tuple(Tensor(n, ("P",), "f64" if n[0] == "G" else "i64", "out") for s in statements for n in s.names
                 if n[0] != "T")
    return Program("random", Cascade((Rank("P"), Rank("M")), (*GIVEN, *outs), tuple(statements)))


def arrays(seed: int, p: int, m: int, scale: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"X": rng.standard_normal((p, m)) * scale, "Y": rng.standard_normal(m), "C": rng.standard_normal(p)}


# -- comparing --------------------------------------------------------------------------------------------------------

class Overflow(Exception):
    """An exponential of the chain left the range where the algebra speaks of numbers."""


@contextmanager
def watched() -> Iterator[None]:
    def watch(f: Any) -> Any:
        def g(x: Any) -> Any:
            y = f(x)
            if np.any(np.abs(y) > 1e100):
                raise Overflow
            return y

        return g

    kept = {n: ops.OPS[n] for n in ("exp", "exp2")}
    ops.OPS.update({n: replace(row, numpy=watch(row.numpy)) for n, row in kept.items()})
    try:
        yield
    finally:
        ops.OPS.update(kept)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a chain gives, and how far it moves when its inputs move by a rounding."""

    program: Program
    inputs: dict[str, Any]
    values: dict[str, Any]

    @staticmethod
    def of(program: Program, inputs: dict[str, Any]) -> Reference | None:
        """None where the chain overflows as it is written."""
        try:
            with watched():
                return Reference(program, inputs, interpret(program, inputs))
        except Overflow:
            return None

    def against(self, got: dict[str, Any]) -> str:
        """What differs by more than the chain itself moves; "" where nothing does.

        A row counts up to its first reduction that is not finite: beyond it NaN and inf are traded.
        """
        live = np.ones(self.inputs["C"].shape, bool)
        for name, w in self.values.items():
            live &= np.isfinite(w) & (np.abs(w) < 1e100)
            slack = 1e-7 * np.maximum(1e-3, np.abs(w))
            wrong = live & ~(np.abs(got[name] - w) <= slack)
            if name[0] == "I" and wrong.any():  # of values that are equal to rounding any place will do
                top = self.values["G" + name[1:]]
                rows = np.arange(len(top))
                at = self._body("G" + name[1:])[rows, np.clip(got[name].astype(int), 0, self.inputs["X"].shape[1] - 1)]
                wrong &= ~(np.abs(at - top) <= 1e-7 * np.maximum(1e-3, np.abs(top)))
            if wrong.any():
                moved = [interpret(self.program, moved_by_a_rounding(self.inputs, k)) for k in (1, 2)]
                slack += 1e3 * np.maximum(*(np.abs(w - y[name]) for y in moved))
                wrong &= np.isfinite(slack) & ~(np.abs(got[name] - w) <= slack)
                if wrong.any():
                    return f"{name}: {w[wrong]} became {got[name][wrong]}"
                live &= np.abs(got[name] - w) <= 1e-7 * np.maximum(1e-3, np.abs(w))  # what follows stands on it
        return ""


    def _body(self, name: str) -> Any:
        """What the reduction that gives `name` chooses from, at every point."""
        c = self.program.cascade
        (s,) = c.writers(name)
        every = Einsum((Access("B", (P, M)),), s.body, None, s.guard)
        more = replace(c, tensors=(*c.tensors, Tensor("B", ("P", "M"), "f64", "out", float("nan"))),
                       einsums=(*c.einsums, every))
        return interpret(more, self.inputs)["B"]


def moved_by_a_rounding(x: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: v * (1 + 1e-12 * rng.standard_normal(v.shape)) for k, v in x.items()}


def difference(program: Program, seed: int) -> tuple[Program | None, str, bool]:
    """The streamed form (None where nothing was derived), what differs from the chain, if anything, and whether merge
    trees were compared, too."""
    rng = Random(seed)
    frame, shares = rng.choice(("first", "running")), rng.choice((2, 3, 5))
    streamed = reduce_passes(program, tile=TILES, frame=frame)
    if streamed.cascade == program.cascade:
        return None, "", False
    split = reduce_passes(program, tile=TILES, frame=frame, splits=shares)
    parts = Parts.of(split)
    return streamed, _first(_differences(program, streamed, split, parts, seed, rng)), parts is not None


def tiled(program: Program, size: int) -> dict[str, int]:
    """The tile size, where a loop is left (chains of constants need none)."""
    return {"m0": size} if knobs(program) else {}


def _first(found: Iterator[tuple[str, str]]) -> str:
    with np.errstate(all="ignore"):
        return next((f"{form}: {why}" for form, why in found if why), "")


def _differences(program: Program, streamed: Program, split: Program, parts: Parts | None, seed: int,
                 rng: Random) -> Iterator[tuple[str, str]]:
    for p, m in ((3, 7), (2, 4)):  # no tile divides the rank, the last one holds it whole
        inputs = arrays(seed, p, m, rng.choice((1.0, 1.0, 30.0)))
        ref = Reference.of(program, inputs)
        if ref is None:
            continue
        for tile in (3, 5) if m > 4 else (5,):
            yield f"tile {tile} of {m}", ref.against(interpret(streamed, inputs, tiled(streamed, tile)))
        if parts is None:
            yield f"shares of {m}", ref.against(interpret(split, inputs, tiled(split, 2)))
        elif m > 4:
            yield f"a merge tree of {m}", ref.against(parts.merged(inputs, rng))


@dataclass(frozen=True, slots=True)
class Parts:
    """A split form cut in three: states of the shares, the merge of any number of states, the finalise map.

    states: tensor of the merged state -> tensor of one share's state.
    """

    shares: Program
    merge: Program
    final: Program
    states: dict[str, str]

    @staticmethod
    def of(split: Program) -> Parts | None:
        """None where nothing is merged, or a second stage waits for merged values."""
        c = split.cascade
        loop = {s.names[0]: s for s in c.einsums if {"m1", "m0"} & set(s.space()) or "m2" in s.space()
                and s.reduce is None and Const(0) in s.out.index}
        merges = [s for s in c.einsums if s.reduce is not None and s.reduce.over == ("m2",)]
        joined = {s.names[0] for s in merges}
        need = set(joined)
        for s in reversed(c.einsums):
            if s.names[0] in need and s.names[0] not in loop:
                need |= reads(s.body)
        after = [s for s in c.einsums if s.names[0] in need and s.names[0] not in loop]
        rest = [s for s in c.einsums if s not in after and s.names[0] not in loop]
        written = {s.names[0] for s in (*after, *rest)}
        ends = {n.tensor: n.index for s in after for n in walk(s.body)
                if isinstance(n, Access) and Size("M1") in n.index}
        states = {"G" + r[1:]: r for r in ends}
        if any(reads(s.body) & written for s in c.einsums if s.names[0] in loop) or not states \
                or not set(states) <= need:
            return None
        first = c.tensors[:len(GIVEN)]
        ranks = {r: tuple(i.name.upper() for i in index if isinstance(i, Var)) for r, index in ends.items()}
        copies = tuple(Einsum((Access("Z" + r, tuple(i for i in index if isinstance(i, Var))),), Access(r, index))
                       for r, index in ends.items())
        shares = Cascade(c.ranks, (*first, *(Tensor("Z" + r, ranks[r], "f64", "out") for r in ends)),
                         (*(s for s in c.einsums if s.names[0] in loop), *copies))

        def cut(e: Expr) -> Expr:
            return Access(e.tensor, tuple(i for i in e.index if i != Size("M1"))) if isinstance(e, Access) else e

        merge = Cascade((*(r for r in c.ranks if r.name in ("P", "M")), Rank("M2")),
                        (*first, *(Tensor(r, ranks[r], "f64", "in") for r in ends),
                         *(Tensor(g, ranks[r][1:], "f64", "out") for g, r in states.items())),
                        tuple(replace(s, body=transform(s.body, cut)) for s in after))
        final = Cascade(tuple(r for r in c.ranks if r.name in ("P", "M")),
                        (*first, *(Tensor(g, ranks[r][1:], "f64", "in") for g, r in states.items()),
                         *c.tensors[len(GIVEN):]), tuple(rest))
        return Parts(replace(split, cascade=shares), replace(split, cascade=merge), replace(split, cascade=final),
                     states)

    def merged(self, inputs: dict[str, Any], rng: Random) -> dict[str, Any]:
        """The result where the shares' states are merged two or three at a time, in any order; neighbours only where
        places are asked for, since ties take the lowest."""
        whole = interpret(self.shares, inputs, tiled(self.shares, 2))
        n = min(len(x) for x in whole.values())
        heap = [{r: whole["Z" + r][k] for r in self.states.values()} for k in range(n)]
        places = any(t.name[0] == "I" for t in self.final.cascade.outputs())
        while len(heap) > 1:
            if not places:
                rng.shuffle(heap)
            first, count = rng.randint(0, len(heap) - 2), rng.choice((2, 2, 3))
            some = heap[first:first + count]
            stacked = {r: np.stack([s[r] for s in some]) for r in self.states.values()}
            got = interpret(self.merge, {**inputs, **stacked})
            heap[first:first + count] = [{r: got[g] for g, r in self.states.items()}]
        return interpret(self.final, {**inputs, **{g: heap[0][r] for g, r in self.states.items()}})


__all__ = ["Parts", "Reference", "arrays", "cascade", "difference"]
