"""Random programs for hypothesis.

`programs()`: well formed, with small extents; `arrays(program, seed)`: inputs that fit.  They hold maps, reductions of
every monoid, guards, gathers, grouped heads (`h//2`), top-k, and loops with a carried value.
`texts()`: anything the text form can say, meaningful or not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from memcomp.ir.cascade import DTYPES, Cascade, Einsum, Knob, Rank, Reduce, Tensor
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.parse import RESERVED
from memcomp.ir.program import Group, Mapping, Program

RANKS = (Rank("B"), Rank("M", None, 64), Rank("P"), Rank("H", Const(4)), Rank("J", Const(2)), Rank("E", Const(3)),
         Rank("K", Const(2)), Rank("T", None, None, True))
_UNARY = ("neg", "tanh", "sigmoid", "square", "abs", "relu", "sin")
_BINARY = ("add", "sub", "mul", "max", "min")


class _Builder:
    """Statements one after the other; `ranks` of every tensor that may be read."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.ranks: dict[str, tuple[str, ...]] = {}
        self.tops: dict[str, str] = {}  # a tensor and its greatest values: exp(x - top) is safe
        self.tensors: list[Tensor] = []
        self.einsums: list[Einsum] = []

    def one(self, items: Any) -> Any:
        return self.draw(st.sampled_from(list(items)))

    def some(self, items: Any, least: int = 0, most: int = 3) -> tuple[Any, ...]:
        return tuple(self.draw(st.lists(st.sampled_from(list(items)), min_size=least, max_size=most, unique=True)))

    def access(self, name: str, space: tuple[str, ...]) -> Access | None:
        """A read of a tensor whose indices come from the space; a rank outside it is read by constant or gather."""
        index: list[Expr] = []
        for r in self.ranks[name]:
            if r == "J" and "H" in space and "J" not in space:
                index.append(Var("h") // 2)
            elif r in space:
                index.append(Var(r.lower()))
            elif r == "M" and "P" in space and self.draw(st.booleans()):
                index.append(Access("at", (Var("p"),)))
            elif r in ("H", "J", "E", "K"):
                index.append(Const(self.draw(st.integers(0, 1))))
            else:
                return None
        return Access(name, tuple(index))

    def body(self, space: tuple[str, ...], depth: int) -> Expr:
        if depth == 0 or self.draw(st.integers(0, 3)) == 0:
            reads = [a for n in self.ranks if (a := self.access(n, space)) is not None]
            if not reads or self.draw(st.integers(0, 9)) == 0:
                return Const(self.draw(st.sampled_from([0.5, -1.5, 2.0])))
            return self.one(reads)  # type: ignore[no-any-return]
        tops = [(x, g) for x, g in self.tops.items() if set(self.ranks[x]) <= set(space)]
        kind = self.draw(st.integers(0, 5))
        if kind == 0 and tops:
            x, g = self.one(tops)
            read = [Access(n, tuple(Var(r.lower()) for r in self.ranks[n])) for n in (x, g)]
            return call("exp", read[0] - read[1])
        if kind == 1:
            return call(self.one(_UNARY), self.body(space, depth - 1))
        if kind == 2:
            return call("where", call(self.one(("lt", "ge")), self.body(space, 0), self.body(space, 0)),
                        self.body(space, depth - 1), Const(0.25))
        return call(self.one(_BINARY), self.body(space, depth - 1), self.body(space, depth - 1))

    def guard(self, space: tuple[str, ...]) -> Expr | None:
        choices: list[Expr | None] = [None, None]
        if "M" in space:
            choices.append(call("lt", Var("m"), 3))
        if {"M", "P"} <= set(space):
            choices += [call("le", Var("m"), Var("p")), call("le", Var("m"), Access("at", (Var("p"),))),
                        call("and", call("le", Var("m"), Var("p")), call("lt", Var("p") - Var("m"), 2))]
        return self.one(choices)  # type: ignore[no-any-return]

    def statement(self, number: int) -> None:
        space = self.some(("B", "M", "P", "H", "J", "E"), 1, 3)
        over = self.some(space, 0, len(space))
        out = tuple(r for r in space if r not in over)
        body, guard = self.body(space, 2), self.guard(space)
        name, index = f"X{number}", tuple(Var(r.lower()) for r in out)
        reduced = tuple(r.lower() for r in over)
        if not over:
            self.put(name, out, Einsum((Access(name, index),), body, None, guard))
            return
        monoid = self.one(("sum", "sum", "max", "max", "min", "prod", "argmax", "topk"))
        if monoid in ("argmax", "topk"):
            more = ("K",) if monoid == "topk" else ()
            at = (*index, *(Var(r.lower()) for r in more))
            outs = (Access(name, at), Access(f"I{number}", at))
            self.put(name, (*out, *more), Einsum(outs, body, Reduce(monoid, reduced), None))
            return
        held = self.one(("", "", "bf16")) if monoid == "sum" else ""
        # an extremum over nothing is infinite: guards stay with the sums
        self.put(name, out, Einsum((Access(name, index),), body, Reduce(monoid, reduced, held),
                                   guard if monoid in ("sum", "prod") else None))
        if monoid == "max" and isinstance(body, Access) and len(set(body.index)) == len(body.index) and \
                all(isinstance(i, Var) for i in body.index) and set(out) <= set(self.ranks[body.tensor]):
            self.tops[body.tensor] = name

    def loop(self, number: int) -> None:
        """X[t + 1] = a X[t] + f(inputs at t), read at the end."""
        more = self.some(("B", "E"), 0, 2)
        name, rest = f"X{number}", tuple(Var(r.lower()) for r in more)
        step = (*(Access(name, (Var("t") + n, *rest)) for n in (0, 1)),)
        self.einsums.append(Einsum((Access(name, (Const(0), *rest)),), Const(self.one((0.0, 1.0)))))
        self.einsums.append(Einsum((step[1],), step[0] * 0.5 + Access("seq", (Var("t"),)) * self.body(more, 1)))
        self.put(f"Y{number}", more, Einsum((Access(f"Y{number}", rest),), Access(name, (Size("T"), *rest))))

    def put(self, name: str, ranks: tuple[str, ...], s: Einsum) -> None:
        self.einsums.append(s)
        self.ranks[name] = ranks


@st.composite
def programs(draw: st.DrawFn, *, most: int = 5, loops: bool = True) -> Program:
    """A well-formed program of up to `most` steps whose last one or two results are outputs."""
    b = _Builder(draw)
    for name, ranks in {"A": ("P", "E"), "C": ("M", "J", "E"), "D": ("B", "M", "H")}.items():
        dtype = b.one(("f32", "f64", "bf16"))
        b.tensors.append(Tensor(name, ranks, dtype, "in"))
        b.ranks[name] = ranks
    b.tensors += [Tensor("at", ("P",), "i64", "in"), Tensor("seq", ("T",), "f32", "in")]
    for n in range(draw(st.integers(1, most))):
        if loops and draw(st.integers(0, 4)) == 0:
            b.loop(n)
        else:
            b.statement(n)
    results = [n for n in b.ranks if n not in ("A", "C", "D")]
    for n in results[-draw(st.integers(1, min(2, len(results)))):]:
        b.tensors.append(Tensor(n, b.ranks[n], "f32", "out"))
    return Program("random", Cascade(RANKS, tuple(b.tensors), tuple(b.einsums)), target=b.one(("", "cpu")))


def arrays(program: Program, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of one of `programs()`: run-time extents of 1 to 5, gathers within the rank they index."""
    rng = np.random.default_rng(seed)
    sizes = {r.name: int(r.extent.value) if isinstance(r.extent, Const) else int(rng.integers(1, 6))
             for r in program.cascade.ranks}
    out: dict[str, np.ndarray[Any, Any]] = {}
    for t in program.cascade.inputs():
        shape = tuple(sizes[r] for r in t.ranks)
        out[t.name] = rng.integers(0, sizes["M"], shape) if t.dtype == "i64" else rng.normal(size=shape)
    return out


# -- text -------------------------------------------------------------------------------------------------------------

_LOWER = st.from_regex(r"[a-z][a-z0-9_]{0,3}", fullmatch=True).filter(lambda s: s not in RESERVED)
_UPPER = _LOWER.map(str.upper)
_TENSOR = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,3}'?", fullmatch=True)
_INTEGERS = st.integers(-(2**63), 2**63 - 1)
_CONST = st.one_of(st.booleans(), _INTEGERS, st.floats(), st.sampled_from([0.0, -0.0, 1e300, -1.5])).map(Const)


def _calls(e: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def one(op: str) -> st.SearchStrategy[Expr]:
        return st.tuples(*[e] * OPS[op].arity).map(lambda args: Call(op, args))

    return st.one_of(st.sampled_from(sorted(OPS)).flatmap(one),
                     st.tuples(_TENSOR, st.lists(e, max_size=3)).map(lambda x: Access(x[0], tuple(x[1]))))


EXPRESSIONS: st.SearchStrategy[Expr] = st.recursive(
    st.one_of(_CONST, _LOWER.map(Var), _UPPER.map(Size)), _calls, max_leaves=8)
_KNOBS = st.builds(Knob, _LOWER, st.lists(st.integers(1, 512), min_size=1, max_size=3).map(tuple))
_ACCESS = st.builds(Access, _TENSOR, st.lists(EXPRESSIONS, max_size=3).map(tuple))


def _tuples(s: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[Any]:
    return st.lists(s, max_size=most).map(tuple)


def _either(s: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | s


_LINES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Cs")), max_size=20).map(str.strip)
_WORDS = st.from_regex(r"[A-Za-z0-9_./-]{1,8}", fullmatch=True)


def texts() -> st.SearchStrategy[Program]:
    """Any program that can be written down."""
    ranks = st.builds(Rank, _UPPER, _either(st.one_of(EXPRESSIONS, _KNOBS)), _either(st.integers(1, 9999)),
                      st.booleans())
    tensors = st.builds(Tensor, _TENSOR, _tuples(_UPPER), st.sampled_from(DTYPES),
                        st.sampled_from(["in", "out", "state", "temp"]), st.floats(allow_nan=False))
    einsums = st.builds(Einsum, st.lists(_ACCESS, min_size=1, max_size=2).map(tuple), EXPRESSIONS,
                        _either(st.builds(Reduce, st.sampled_from(sorted(MONOIDS)), _tuples(_LOWER))),
                        _either(EXPRESSIONS))
    groups = st.builds(Group, _LOWER, _tuples(_TENSOR), _tuples(st.tuples(_UPPER, _KNOBS | EXPRESSIONS)),
                       _tuples(_UPPER), _tuples(_UPPER), _either(_UPPER), _tuples(st.tuples(_TENSOR, _LOWER)))
    return st.builds(Program, _WORDS, st.builds(Cascade, _tuples(ranks), _tuples(tensors), _tuples(einsums)),
                     st.builds(Mapping, _tuples(groups, 2)), st.just("") | _WORDS, _tuples(_LINES, 2))
