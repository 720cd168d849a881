"""SmolLM2's perplexity and logits on 2,048 tokens: memcomp beside eager, in fp32 and bf16, judged by float64.

    python benchmarks/perplexity.py
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from measure import record, terminal
from rich.table import Table

import memcomp
from memcomp import smollm
from memcomp.demo import prompt
from memcomp.oracle import measure, tolerance

TOKENS, BAR = 2048, 1e-3


def main() -> int:
    console, results = terminal(), []
    lm = smollm.load(progress=console.print)
    ids = prompt(lm, TOKENS)
    with torch.no_grad():
        with console.status("float64"):
            exact = logits(copy.deepcopy(lm.model).double(), ids)
        table = Table("dtype", "who", "perplexity", "rms error", "max error")
        table.add_row("f64", "eager", f"{perplexity(exact, ids):.6f}", "", "")
        ok = True
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            model = copy.deepcopy(lm.model).to(dtype)
            with console.status(f"{name}: eager"):
                eager = logits(model, ids)
            memcomp.reset()
            with console.status(f"{name}: memcomp"):
                own = logits(torch.compile(model, backend="memcomp"), ids)
            stats = memcomp.stats()
            torch._dynamo.reset()
            errors = {who: measure(x.numpy(), exact.numpy()) for who, x in (("eager", eager), ("memcomp", own))}
            perplexities = {"eager": perplexity(eager, ids), "memcomp": perplexity(own, ids)}
            bound = tolerance([name], name, elements=exact.numel(), length=None, torch_error=errors["eager"])
            for who, error in errors.items():
                table.add_row(name, who, f"{perplexities[who]:.6f}", f"{error.rms:.3e}", f"{error.max:.3e}")
            ok &= bound.admits(errors["memcomp"]) and not stats["fallbacks"]
            results.append({"dtype": name, "perplexity": perplexities, "stats": stats,
                            "errors": {who: asdict(e) for who, e in errors.items()}})
    console.print(table)
    single, half = results
    apart = abs(single["perplexity"]["memcomp"] / single["perplexity"]["eager"] - 1)
    worse = half["errors"]["memcomp"]["rms"] / half["errors"]["eager"]["rms"]
    console.print(f"f32: perplexities {apart:.1e} apart, at most {BAR:g} allowed; "
                  f"bf16: {worse:.2f} times eager's error, at most 1 allowed")
    ok &= apart <= BAR and worse <= 1
    console.print(f"written: {record(__file__, results)}")
    return 0 if ok else 1


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Teacher-forced logits (tokens, vocabulary) as float64."""
    out: torch.Tensor = model(ids, use_cache=False).logits[0].double()
    return out


def perplexity(x: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(x[:-1], ids[0, 1:]).exp())


if __name__ == "__main__":
    raise SystemExit(main())
