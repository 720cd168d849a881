"""Programs made ready for `lower`, and inputs of any size for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from memcomp.codegen.lower import lower
from memcomp.codegen.lower_pieces import Sizes
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, Size, Var
from memcomp.ir.interpret import interpret
from memcomp.ir.ops import OPS
from memcomp.ir.program import Mapping, Program, close, knobs
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from memcomp.ir.tile_interpret import solve_sizes
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition

CASES = Path(__file__).parent / "cases"
ONEPASS = tuple(sorted(f.stem for f in CASES.glob("onepass_*.mc")))
CHAINS = (
    "attention_3pass",
    "attention_backward",
    "attention_lse",
    "causal_gqa",
    "cascade_2",
    "layer_norm",
    "softcap_window",
)


def load(name: str) -> Program:
    """The program of tests/cases without its mapping."""
    return replace(parse((CASES / f"{name}.mc").read_text()), mapping=Mapping())


def mapped(program: Program, choice: int = 0) -> Program:
    """Fused, partitioned, and every knob closed with its `choice`-th value (or its last)."""
    p = partition(fuse(program))
    return close(p, {k.name: k.choices[min(choice, len(k.choices) - 1)] for k in knobs(p)})


def symbols(program: Program) -> list[str]:
    return [r.name for r in program.cascade.ranks if r.extent is None]


def extent(e: Expr, sizes: dict[str, int]) -> int:
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Size):
        return sizes[e.rank]
    assert not isinstance(e, (Access, Var))
    return int(OPS[e.op].numpy(*(extent(a, sizes) for a in e.args)))


def inputs(program: Program, sizes: dict[str, int], rng: np.random.Generator, scale: float = 1.0) -> dict[str, Any]:
    """Normal values; truth values; integers that are positions: -1 (nothing) up to the last key."""
    closed = Sizes(program.cascade)
    out: dict[str, Any] = {}
    for t in program.cascade.inputs():
        shape = tuple(extent(closed.extent(r), sizes) for r in t.ranks)
        if t.dtype == "bool":
            out[t.name] = rng.random(shape) < 0.6
        elif t.dtype[0] in "iu":
            out[t.name] = rng.integers(-1, max(sizes.get("M", 1), 1), shape)
        else:
            out[t.name] = scale * rng.normal(size=shape)
    return out


def arguments(tp: TileProgram, arrays: dict[str, Any], sizes: dict[str, int]) -> tuple[list[Any], list[int]]:
    """Torch tensors for every param, and the sizes; what the kernel must write holds rubbish."""
    import torch

    from memcomp.binding import DTYPES

    known = solve_sizes(tp, {n: np.shape(a) for n, a in arrays.items()}, sizes)
    args = [torch.from_numpy(np.array(arrays[p.name])).to(DTYPES[p.dtype]) if p.name in arrays else
            torch.full(tuple(extent(n, known) for n in p.shape), 77).to(DTYPES[p.dtype]) for p in tp.params]
    return args, list(known.values())


def same(got: Any, want: Any, rtol: float, atol: float) -> bool:
    """Equal up to rounding, NaN and infinities in the same places."""
    return got.shape == want.shape and bool(np.allclose(got, want, rtol=rtol, atol=atol, equal_nan=True))


def stored_and_back(program: Program, values: dict[str, Any]) -> dict[str, Any]:
    """Inputs as the formats hold them in which they are stored."""
    import torch

    from memcomp.binding import DTYPES

    made = {n: torch.from_numpy(np.array(x)).to(DTYPES[program.cascade.tensor(n).dtype]) for n, x in values.items()}
    return {n: (x.double() if x.is_floating_point() else x).numpy() for n, x in made.items()}


def equal(program: Program, values: dict[str, Any], run: Callable[[TileProgram, dict[str, Any], dict[str, int]], Any],
          refuses: Callable[[TileProgram], Any] = lambda tp: None) -> bool:
    """Is what `run` gives for a program, with any mapping, what the program says?  Also where there are no tiles, or
    `refuses` raises a Refusal."""
    values = stored_and_back(program, values)
    sizes = {r: n for t in program.cascade.inputs() for r, n in zip(t.ranks, values[t.name].shape, strict=True)}
    sizes = {r: n for r, n in sizes.items() if program.cascade.rank(r).extent is None}
    try:
        p = mapped(program)
        tp = lower(p)
        refuses(tp)
    except Refusal:
        return True
    want, got = interpret(p, values, sizes), run(tp, values, sizes)
    bounds = {n: {"bf16": 2e-2, "f16": 4e-3}.get(program.cascade.tensor(n).dtype, 2e-3) for n in want}
    return all(same(got[n], want[n], bounds[n], bounds[n]) for n in want)


def far_data() -> tuple[Program, dict[str, Any], dict[str, int]]:
    """Sums over what lies before a place and at one; places from one end of 64 bits to the other; several tiles."""
    p = parse("program far\nrank P\nrank M\nin V[M]: f32\nin Z[P]: i64\nout A[P]: f32\nout B[P]: f32\n"
              "A[p] = sum{m} V[m] where m <= Z[p]\nB[p] = sum{m} V[m] where m + 3 == Z[p]\n")
    z = np.array([-2**63, -2**63 + 5, -2**62, -2**40, -2**32 + 3, -1, 0, 2, 5, 69, 70, 700, 2**31, 2**32, 2**32 + 5,
                  2**62, 2**63 - 1])
    a = {"V": np.random.default_rng(1).standard_normal(700), "Z": z}
    return p, a, {"P": len(z), "M": 700}
