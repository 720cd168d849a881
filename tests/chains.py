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


KINDS = ("plain", "big", "masked", "tiles", "outlier", "ties", "drift", "offset")


def arrays(program: Program, p: int, m: int, kind: str, seed: int = 1) -> dict[str, Any]:
    """Inputs.

    plain, big (scores up to 1e4 and more), masked (row 0: no point by mask, -inf where scores are added), tiles (the
    same for points 4 to 8 of every row), outlier (point 1 is 1e4 times the rest), ties (few distinct values), drift
    (0 to 100 along M), offset (a mean of 1e3).
    """
    rng = np.random.default_rng(seed)
    sizes = {"P": p, "M": m, "N": m, "MG": -(-m // 4), "E": 3, "F": 2}
    out: dict[str, Any] = {}
    for t in program.cascade.inputs():
        shape = tuple(sizes[r] for r in t.ranks)
        long = t.ranks.index("M") if "M" in t.ranks else None
        some = tuple(slice(4, 8) if d == long else slice(None) for d in range(len(shape)))
        if t.dtype == "bool":
            x: Any = rng.random(shape) < 0.5
            x[:1] = False
            if kind == "tiles" and long is not None:
                x[some] = False
        elif t.dtype == "i64":
            x = rng.integers(0, max(1, m), shape) if t.name != "len" else rng.integers(0, m + 1, shape)
        elif t.dtype == "i8":
            x = rng.integers(-8, 8, shape)
        else:
            x = rng.standard_normal(shape) * (100.0 if kind == "big" else 1.0)
            if t.name in ("BI", "X") and len(shape) == 2:
                if kind == "masked":
                    x[:1] = -np.inf
                elif kind == "tiles" and long is not None:
                    x[some] = -np.inf
            if kind == "ties":
                x = np.round(x)
            elif kind == "offset":
                x = x + 1e3
            elif long is not None and kind == "outlier":
                x[tuple(slice(1, 2) if d == long else slice(None) for d in range(len(shape)))] *= 1e4
            elif long is not None and kind == "drift":
                x = x + np.linspace(0, 100, m).reshape([-1 if d == long else 1 for d in range(len(shape))])
        out[t.name] = x
    return out


# derivation.md section 7: passes over M before and after, where they are not 3 -> 1
COUNTS = {
    "no_max": (2, 1), "sigmoid": (1, 1), "relu_squared": (2, 1), "variance": (2, 1), "skew": (2, 1),
    "rmsnorm_matmul": (2, 1),
    "normalised_short": (2, 1), "lse_matmul": (2, 1), "rwkv": (2, 1), "weighted_variance": (4, 1),
    "constants": (2, 1), "other_monoids": (2, 1), "shifted": (2, 1), "standardised": (5, 2),
    "probabilities": (3, 2), "layernorm": (3, 2), "quantised": (2, 2), "sparse_threshold": (2, 2),
    "relu_centred": (2, 2),
    "exp_product": (2, 2), "mixed_reciprocal": (2, 2), "median_deviation": (2, 2),
}
# what is refused: the reduction, the value it waits for, the operator without a law
REFUSED = {
    "quantised": [("Y", "AM", "round")],
    "sparse_threshold": [("O", "GM", "relu")],
    "relu_centred": [("O", "T", "relu")],
    "exp_product": [("Y", "T", "exp")],
    "mixed_reciprocal": [("Y", "G", "div")],
    "median_deviation": [("SV", "", "topk"), ("Y", "SV", "abs")],
    "standardised": [("SD", "R", "exp"), ("O", "R", "exp")],
}
