"""Emitted Gluon, run by the model of Gluon: numbers are those of the program, and every line that orders is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.gluon import emit, interpreted
from memcomp.codegen.gluon.model.values import BF16, rounded
from memcomp.codegen.lower import lower
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program, close, knobs
from memcomp.ir.text import parse
from memcomp.ir.tile import Kernel
from memcomp.stations import rewrite
from tests.mapped import arguments

MASS = """GM[h, p] = max{{m}} W[h, p, m]{where}
SN[h, p, m] = exp(W[h, p, m] - GM[h, p]){where}
SD[h, p] = sum{{m}} SN[h, p, m]{where}
NV[h, p, f] = sum{{m}} SN[h, p, m] * V[h//{group}, m, f]{where}
"""
LAST = "O[h, p, f] = NV[h, p, f] / SD[h, p]\n"


def text(guard: str = "", score: str = "S[h, p, m] * 0.125", last: str = MASS + LAST, group: int = 1, dim: int = 64,
         columns: int = 0, more: str = "") -> str:
    where = f" where {guard}" if guard else ""
    return f"""program attention
rank J
rank H = J*{group}
rank P
rank M
rank E = {dim}
rank F = {columns or dim}
in Q[H, P, E]: bf16
in K[J, M, E]: bf16
in V[J, M, F]: bf16
{more}out O[H, P, F]: bf16
S[h, p, m] = sum{{e}} Q[h, p, e] * K[h//{group}, m, e]{where}
W[h, p, m] = {score}{where}
{last.format(where=where, group=group)}"""


CAUSAL = "m <= p + M - P"
VARIANTS = {
    "plain": text(),
    "causal": text(CAUSAL),
    "grouped": text(CAUSAL, group=3),
    "capped": text(CAUSAL, "20.0 * tanh(S[h, p, m] * 0.00625)"),
    "sloped": text(CAUSAL, "S[h, p, m] * 0.125 - A[h] * (p - m)", more="in A[H]: f32\n"),
    "window": text("m <= p and m > p - 70"),
    "prefix": text("m <= p or m < 50"),
    "first and window": text("m <= p and (m > p - 70 or m < 4)"),   # two loops, and a gap between
    "documents": text("X[m] == Z[p] and m <= p", more="in X[M]: i64\nin Z[P]: i64\n"),
    "sigmoid": text(last="SG[h, p, m] = 1.0 / (1.0 + exp(-W[h, p, m]))\n"
                         "O[h, p, f] = sum{{m}} SG[h, p, m] * V[h//{group}, m, f]\n"),
    "one more": text(last=MASS + "O[h, p, f] = NV[h, p, f] / (exp(-GM[h, p]) + SD[h, p])\n"),
    "wide": text(CAUSAL, dim=128),
    "wider": text(dim=256),
    "narrow values": text(CAUSAL, dim=128, columns=64),
}
SIZES = ((1, 129, 200), (2, 40, 128))   # heads, rows, keys


def program(name: str) -> Program:
    return parse(VARIANTS.get(name) or PAIRS[name])


GUARDS = ("", CAUSAL, "m <= p and m > p - 70", "m <= p or m < 50", "X[m] == Z[p] and m <= p", "X[m] == Z[p] or m > p",
          "m <= p and m % 3 != 1")
SCORES = ("S[h, p, m] * 0.125", "20.0 * tanh(S[h, p, m] * 0.00625)", "S[h, p, m] * 0.125 - A[h] * (p - m)",
          "S[h, p, m] * 0.125 + B[h, p, m]")
GIVEN = ("X[M]: i64", "Z[P]: i64", "A[H]: f32", "B[H, P, M]: f32")
PAIRS = {f"{g} / {s}": text(g, s, group=2, dim=32, more="".join(f"in {x}\n" for x in GIVEN if x[:2] in g + s))
         for g in GUARDS for s in SCORES}


@lru_cache(maxsize=32)
def kernel(name: str) -> Kernel:
    p = rewrite(replace(program(name), target="h100"), observe=lambda *_: None)
    keys = 64 if "wider" in name else 128
    closed = close(p, {k.name: next((n for n in (keys if k.name[0] == "m" else 128,) if n in k.choices), k.choices[-1])
                       for k in knobs(p)})
    return emit(lower(closed), "h100")


def given(name: str, heads: int, rows: int, keys: int) -> dict[str, Any]:
    rng, out = np.random.default_rng(rows * 1000 + keys), {}
    for t in program(name).cascade.inputs():
        sizes = {"J": heads, "H": heads * (3 if name == "grouped" else 2 if name in PAIRS else 1), "P": rows, "M": keys}
        shape = tuple(sizes.get(r) or program(name).cascade.rank(r).extent.value if r in "EF" else sizes[r]
                      for r in t.ranks)
        if t.dtype == "i64":   # documents one behind another, as long as they come
            out[t.name] = np.arange(shape[0]) * 4 // max(rows, keys, 1)
        else:
            x = rng.normal(size=shape)
            out[t.name] = rounded(x, BF16, None).data.astype(np.float64) if t.dtype == "bf16" else np.abs(x) * 0.05
    return out


def run(made: Kernel, arrays: dict[str, Any], seed: int = 0) -> np.ndarray:
    args, sizes = arguments(made.program, arrays, {"H": arrays["Q"].shape[0]})
    interpreted(made, seed)(*args, *sizes)
    return next(x.double().numpy() for p, x in zip(made.program.params, args, strict=True) if p.role == "out")


def right(name: str, arrays: dict[str, Any], got: np.ndarray) -> bool:
    """Weights and results are rounded to bf16, by at most 2**-8 of each, and nothing else is; errors average out."""
    want = interpret(program(name), arrays)["O"]
    terms = interpret(program(name), arrays | {"V": np.abs(arrays["V"])})["O"]
    counts = np.isfinite(want)   # a row without keys is none
    if not np.array_equal(counts, np.isfinite(got)):
        return False
    off, terms = np.abs(got - want)[counts], terms[counts]
    mean = np.square(off).sum() <= 2.0 ** -18 * np.square(terms).sum() or off.size < 1000
    return bool((off <= 2.0 ** -7 * 1.01 * terms).all() and mean)


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_are_those_of_the_program(name: str) -> None:
    for heads, rows, keys in SIZES if name not in ("wide", "wider", "narrow values") else SIZES[:1]:
        arrays = given(name, heads, rows, keys)
        got = run(kernel(name), arrays)
        assert right(name, arrays, got), (heads, rows, keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_any_guard_with_any_score(name: str) -> None:
    for heads, rows, keys in ((1, 129, 300), (1, 200, 200), (1, 300, 129)):
        arrays = given(name, heads, rows, keys)
        assert right(name, arrays, run(kernel(name), arrays, seed=keys)), (rows, keys)


@pytest.mark.parametrize("rows, keys", [(5, 0), (0, 5), (0, 0), (1, 1), (200, 70)])
@pytest.mark.parametrize("name", ["plain", "causal", "sigmoid"])
def test_few_rows_and_keys(name: str, rows: int, keys: int) -> None:
    arrays = given(name, 1, rows, keys)
    assert right(name, arrays, run(kernel(name), arrays))


def test_the_order_of_groups_changes_no_bit() -> None:
    arrays = given("causal", 1, 129, 300)
    first, *others = (run(kernel("causal"), arrays, seed) for seed in range(4))
    assert right("causal", arrays, first) and all(np.array_equal(first, x) for x in others)


def mutations(line: str) -> Iterator[str]:
    """A line that orders, gone or wrong."""
    if re.match(r"\s+(mbarrier\.(wait|arrive|expect)|fence_async_shared)\(", line):
        yield ""
    if "mbarrier.wait(" in line:
        yield line[:-len(" ^ 1)")] + ")" if line.endswith(" ^ 1)") else line[:-1] + " ^ 1)"
    if "mbarrier.init(" in line:
        yield re.sub(r"count=(\d)", lambda m: f"count={3 - int(m[1])}", line)
    if "warpgroup_mma_wait(" in line:
        yield re.sub(r"wait\((\d)", lambda m: f"wait({int(m[1]) + 1}", line)


def test_every_line_that_orders_is_needed() -> None:
    made, arrays = kernel("causal"), given("causal", 1, 128, 600)
    lines = made.source.splitlines()
    assert right("causal", arrays, run(made, arrays))

    def caught(n: int, new: str) -> bool:
        try:
            run(replace(made, source="\n".join([*lines[:n], new, *lines[n + 1:]]) + "\n"), arrays)
        except Refusal as refused:
            assert "the model of Gluon" in str(refused), lines[n]
            return True
        return False

    first = [n for n, line in enumerate(lines) if line not in lines[:n]]   # one loop is like another
    tried = [(n, new) for n in first for new in mutations(lines[n])]
    missed = [f"{lines[n].strip()} -> {new.strip()}" for n, new in tried if not caught(n, new)]
    assert len(tried) > 20 and not missed, missed


def test_tensors_may_lie_in_any_order() -> None:
    """Rows before heads, keys next to one another; what does not begin at a multiple of 16 bytes cannot be fetched."""
    made, arrays = kernel("causal"), given("causal", 2, 129, 200)
    args, sizes = arguments(made.program, arrays, {"H": 2})
    for params in ({"Q": (1, 0, 2)}, {"K": (0, 2, 1)}, {"O": (2, 0, 1)}):
        moved = [_stored(x, params.get(p.name, (0, 1, 2))) for p, x in zip(made.program.params, args, strict=True)]
        interpreted(made)(*moved, *sizes)
        assert right("causal", arrays, moved[-1].double().numpy()), params
    odd = [x.new_empty((2, 200, 70))[..., :64] if p.name == "V" else x
           for p, x in zip(made.program.params, args, strict=True)]
    with pytest.raises(Refusal, match="not all of 16"):
        interpreted(made)(*odd, *sizes)


def _stored(x: Any, order: tuple[int, ...]) -> Any:
    """The same numbers with dims in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(n) for n in range(x.ndim)])
