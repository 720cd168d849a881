"""The chains of reductions in cases/chains, and inputs for them.

Their long rank is M: the forms of attention, norms, losses and what must be refused (derivation.md section 7).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memcomp.ir.program import Program
from memcomp.ir.text import parse

FOLDER = Path(__file__).parent / "cases" / "chains"
NAMES = sorted(p.stem for p in FOLDER.glob("*.mc"))
SHAPES = ((3, 10), (7, 4), (2, 1), (3, 0), (6, 25))  # P, M: M is below, at and above tiles, and empty


def load(name: str) -> Program:
    return parse((FOLDER / f"{name}.mc").read_text())


def arrays(program: Program, p: int, m: int, kind: str, seed: int = 1) -> dict[str, Any]:
    """Inputs: plain; big (scores up to 1e4 and more); masked (row 0: no point by mask, -inf where scores are added)."""
    rng = np.random.default_rng(seed)
    sizes = {"P": p, "M": m, "N": m, "MG": -(-m // 4), "E": 3, "F": 2}
    out: dict[str, Any] = {}
    for t in program.cascade.inputs():
        shape = tuple(sizes[r] for r in t.ranks)
        if t.dtype == "bool":
            x: Any = rng.random(shape) < 0.5
            x[:1] = False
        elif t.dtype == "i64":
            x = rng.integers(0, max(1, m), shape) if t.name != "len" else rng.integers(0, m + 1, shape)
        elif t.dtype == "i8":
            x = rng.integers(-8, 8, shape)
        else:
            x = rng.standard_normal(shape) * (100.0 if kind == "big" else 1.0)
            if kind == "masked" and t.name in ("BI", "X") and len(shape) == 2:
                x[:1] = -np.inf
        out[t.name] = x
    return out
