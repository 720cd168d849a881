"""Each row of the law table made false, and what notices.

A row that holds a content is given a wrong one; what only says yes is dropped.  `broken(name)` puts the false row in
place; `noticed(name, seeds)` asks the table's own check (`numbers`), random chains (`wrong`: other values, or a crash)
and how many chains are rewritten by fewer laws or not at all (`refused`: a law that was needed is gone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from memcomp.ir import ops
from memcomp.ir.expr import Call
from memcomp.ir.laws import counterexample, named
from memcomp.passes.derive.separate import Separator
from memcomp.passes.reduce_passes import reduce_passes
from tests.random_cascades import TILES, cascade, difference

INF = float("inf")
YES = ("strict", "positive")  # kinds of rows that only say yes
_FLIPS = {"inc": "dec", "dec": "inc", "sign": "inc", "": ""}
_RULES: dict[str, Any] = {  # what is linear is separated by a rule each; the false law is a false rule
    "add": lambda self, e: self.terms(e.args[0]),
    "sub": lambda self, e: self._on_add(Call("add", e.args)),
    "neg": lambda self, e: self.terms(e.args[0]),
    "mul": lambda self, e: self._on_add(Call("add", e.args)),
    "div": lambda self, e: self._on_mul(Call("mul", e.args)),
    "where": lambda self, e: self._on_add(Call("add", e.args[1:])),
}


def false_row(row: ops.Op, kind: str) -> ops.Op:
    """The operator's row with one law made wrong, or dropped where it only says yes."""
    match kind:
        case "hom":
            return replace(row, hom=("add", "add"))
        case "degree":
            assert row.degree is not None
            return replace(row, degree=row.degree + 1.0)
        case "linear":
            return replace(row, linear=((0,),) if len(row.linear[0]) > 1 else ((0, 1),)) if row.arity > 1 else row
        case "monotone":
            return replace(row, monotone=tuple(_FLIPS[m] for m in row.monotone))
        case "range":
            low, high = row.range
            return replace(row, range=(0.25, high) if low < 0 else (-INF, -0.25), positive=False)
        case "limits":
            return replace(row, limits=((-INF, 1.0),))
        case "domain":
            return replace(row, domain="real")
        case "strict":
            return replace(row, strict=False)
    return replace(row, positive=False)


_NONE: dict[str, Any] = {"hom": None, "degree": None, "linear": (), "monotone": (), "range": (-INF, INF), "limits": (),
                         "domain": "real", "strict": False, "positive": False}


@contextmanager
def broken(name: str, *, drop: bool = False) -> Iterator[None]:
    """The table with the row false, or without it."""
    op, kind = name.split(".")
    kept, rule = ops.OPS[op], getattr(Separator, f"_on_{op}", None)
    if drop:
        ops.OPS[op] = replace(kept, **{kind: _NONE[kind]})
        try:
            yield
        finally:
            ops.OPS[op] = kept
        return
    ops.OPS[op] = false_row(kept, kind)
    if kind == "linear":
        setattr(Separator, f"_on_{op}", _RULES[op])
    try:
        yield
    finally:
        ops.OPS[op] = kept
        if kind == "linear":
            setattr(Separator, f"_on_{op}", rule)


def noticed(name: str, seeds: Iterable[int], *, enough: int = 1) -> dict[str, int]:
    """How many chains use the row, and are wrong or refused with the false one, until `enough` are wrong."""
    op, kind = name.split(".")
    out = {"used": 0, "numbers": 0, "wrong": 0, "refused": 0}
    with broken(name):
        out["numbers"] = int(counterexample(ops.OPS[op]) is not None)
    for seed in seeds:
        program = cascade(seed, op)
        right = reduce_passes(program, tile=TILES)
        out["used"] += name in named(right.proofs)
        with broken(name):
            try:
                new = reduce_passes(program, tile=TILES)
                if new.cascade == right.cascade:
                    continue
                if new.cascade == program.cascade or len(new.proofs) < len(right.proofs):
                    out["refused"] += 1
                out["wrong"] += bool(difference(program, seed)[1])
            except Exception:
                out["wrong"] += 1
        if out["wrong"] >= enough or kind in YES and out["refused"] >= enough:
            break
    return out


__all__ = ["YES", "broken", "false_row", "noticed"]
