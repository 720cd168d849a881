"""Products of 8-bit integers with 32-bit sums beside torch._int_mm: equal, and how fast.

    python benchmarks/int8.py [--rounds N] [--only WORD]

Weights lie [out, in], as a linear layer has them, or [in, out].  Each case is a program of one contraction, mapped by
cost; the rivals take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import ratio, table_of, take_turns

from memcomp.config import Config
from memcomp.ir.text import parse
from memcomp.pipeline import compile_program, forget

SHAPES = ((1024, 1024, 64), (2048, 1536, 576), (1024, 1024, 1024), (32, 4096, 1024))
CASES = {f"{m} x {k}, {how}": (m, n, k, how) for m, n, k in SHAPES for how in (f"[{n}, {k}]", f"[{k}, {n}]")}
PROGRAM = """
program product
rank M
rank N
rank K = {k}
in X[M, K]: i8
in Y[{ranks}]: i8
out Z[M, N]: i32
Z[m, n] = sum{{k}} X[m, k] * Y[{index}]
"""


def measure(name: str, rounds: int) -> dict[str, Any]:
    m, n, k, how = CASES[name]
    wide = how == f"[{n}, {k}]"
    text = PROGRAM.format(k=k, ranks="N, K" if wide else "K, N", index="n, k" if wide else "k, n")
    sizes = {"M": m, "N": n, "K": k}
    forget()  # each shape is mapped for itself
    made = compile_program(parse(text), config=Config(), sizes=sizes)
    torch.manual_seed(0)
    x, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (n, k) if wide else (k, n)))
    other, out = w.mT if wide else w, torch.empty(m, n, dtype=torch.int32)
    arguments = [x, w, out, *(sizes[s] for s in made.tiles.sizes)]
    calls: dict[str, Callable[[], object]] = {
        "memcomp": lambda: made.entry(*arguments), "torch._int_mm": lambda: torch._int_mm(x, other)}
    times = take_turns(calls, rounds)
    equal = torch.equal(out, torch._int_mm(x, other))
    return {"case": name, "equal": equal, "rows": [
        {"who": who, "median": t.median, "spread": t.spread, "rate": 2 * m * n * k / t.median,
         "ratio": str(ratio(t, times["memcomp"]))} for who, t in times.items()]}


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for at, r in enumerate(result["rows"]):
        yield ("" if at else result["case"], r["who"], f"{r['median'] * 1e3:.3f} ± {r['spread']:.0%}",
               f"{r['rate'] / 1e9:.0f}", "" if at else "yes" if result["equal"] else "NO", r["ratio"])


def main() -> int:
    columns = ("case", "who", "median ms", "Gop/s", "equal", "time over memcomp's")
    _, results = table_of(__doc__ or "", __file__, {n: partial(measure, n) for n in CASES}, columns, rows)
    return 0 if all(r["equal"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
