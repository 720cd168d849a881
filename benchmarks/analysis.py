"""How long the analysis and the rewrites take: a cascade of 200 Einsums, and all layers of SmolLM2.

    python benchmarks/analysis.py

Measured: passes of the program as read, every rewrite of the pipeline with its verification, passes of what came out.
Nothing is remembered from one round to the next: each program is parsed anew, and the caches of memcomp are emptied
before it.  The layers of SmolLM2-135M are what capture reads out of its 30 attention layers; the kernel cache, which
would do the work once, is not used.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any

from measure import record, terminal

from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.traversal import traversals
from memcomp.ir.verify import verify
from memcomp.stations import rewrite

BARS = {"cascade": 0.5, "layers": 2.0}  # seconds
ROUNDS = 5

ATTENTION = """S{i}[h, p, m] = sum{{e}} X{i}[h, p, e] * K{i}[h, m, e]
W{i}[h, p, m] = S{i}[h, p, m] * 0.125
GM{i}[h, p] = max{{m}} W{i}[h, p, m] where m <= p
SN{i}[h, p, m] = exp(W{i}[h, p, m] - GM{i}[h, p]) where m <= p
SD{i}[h, p] = sum{{m}} SN{i}[h, p, m] where m <= p
A{i}[h, p, m] = SN{i}[h, p, m] / SD{i}[h, p] where m <= p
X{j}[h, p, e] = sum{{m}} A{i}[h, p, m] * V{i}[h, m, e] where m <= p
"""
STATISTICS = """Y{i}[p, m] = X[p, m] * {j}.5
GM{i}[p] = max{{m}} Y{i}[p, m]
SN{i}[p, m] = exp(Y{i}[p, m] - GM{i}[p])
SD{i}[p] = sum{{m}} SN{i}[p, m]
"""


def cascades() -> dict[str, str]:
    """Programs of about 200 Einsums: a deep one and a wide one."""
    deep, wide = 29, 50
    head = "program analysis on cpu\nrank H = 8\nrank P = 1024\nrank M = 1024\nrank E = 64\n"
    keys = "".join(f"in K{i}[H, M, E]: f32\nin V{i}[H, M, E]: f32\n" for i in range(deep))
    outs = "".join(f"out SD{i}[P]: f32\n" for i in range(wide))
    return {
        "29 attentions, one after the other":
            f"{head}in X0[H, P, E]: f32\n{keys}out X{deep}[H, P, E]: f32\n" + _body(ATTENTION, deep),
        "50 statistics of one tensor": f"{head}in X[P, M]: f32\n{outs}" + _body(STATISTICS, wide),
    }


def _body(text: str, count: int) -> str:
    return "".join(text.format(i=i, j=i + 1) for i in range(count))


def layers() -> list[str]:
    """The texts of the programs that capture reads out of a model with the attention layers of SmolLM2-135M."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from memcomp.capture.find import find_regions

    shape = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                        intermediate_size=64, vocab_size=256)  # the rest is not looked at
    found: list[Program] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(r.program for r in find_regions(gm)[0])
        return gm.forward

    with torch.inference_mode():
        torch.compile(LlamaForCausalLM(shape).eval(), backend=backend)(torch.zeros((1, 128), dtype=torch.long))
    return [str(p) for p in found]


def forget() -> None:
    """Empty every cache of memcomp's functions."""
    for name, module in list(sys.modules.items()):
        if name.startswith("memcomp"):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def once(text: str) -> dict[str, float]:
    """Seconds of each part: of the wall, and of the processor in all."""
    program = parse(text)
    forget()
    begin, busy = time.perf_counter(), time.process_time()
    traversals(program)
    read = time.perf_counter()
    verify(program)
    made = rewrite(program, observe=lambda *_: None)
    rewritten = time.perf_counter()
    traversals(made)
    end = time.perf_counter()
    return {"analysed": read - begin, "rewritten": rewritten - read, "analysed again": end - rewritten,
            "all": end - begin, "processor": time.process_time() - busy,
            "einsums": len(program.cascade.einsums), "einsums after": len(made.cascade.einsums)}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {k: statistics.median(r[k] for r in runs) for k in runs[0]} | {"least": min(r["all"] for r in runs)}


def said(row: dict[str, float], bar: str) -> str:
    return (f"{row['all']:.3f} s (least {row['least']:.3f} s, processor {row['processor']:.3f} s; "
            f"at most {BARS[bar]:g} s)")


def main() -> int:
    console, results, late = terminal(), [], 0
    once(cascades()["50 statistics of one tensor"])  # imports
    for name, text in cascades().items():
        row = medians([once(text) for _ in range(ROUNDS)])
        late |= row["all"] > BARS["cascade"]
        results.append({"name": name, "bar": BARS["cascade"], **row})
        console.print(f"{name}: {row['einsums']:.0f} Einsums analysed and rewritten in {said(row, 'cascade')}")
    texts = layers()
    rounds = [[once(t) for t in texts] for _ in range(3)]
    row = medians([{k: sum(r[k] for r in run) for k in run[0]} for run in rounds])
    late |= row["all"] > BARS["layers"] or len(texts) != 30
    results.append({"name": "SmolLM2-135M", "layers": len(texts), "bar": BARS["layers"], **row})
    console.print(f"SmolLM2-135M: {len(texts)} layers in {said(row, 'layers')}")
    console.print(f"written: {record(__file__, results)}")
    return int(late)


if __name__ == "__main__":
    raise SystemExit(main())
