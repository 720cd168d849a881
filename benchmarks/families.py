"""Families of layers beside torch's compilers: kernels a call, passes over the long rank, traffic over compulsory.

    python benchmarks/families.py [--only WORD] [--rows N] [--length N]

Writes docs/families.md and results/families.json.  What Inductor and FlexAttention do is counted in the code they
generate: kernels that are called, loops over the long rank (a library's product is one), bytes by Inductor's own count.
memcomp's kernels are launches (what is left to torch is counted too), its passes and bytes those of the form that runs.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import RESULTS, machine

import memcomp
from memcomp.backend import install
from memcomp.config import config
from memcomp.models.families import Family, families
from memcomp.pipeline import fixed
from memcomp.report import describe

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
LIBRARY = re.compile(r"(?:extern_kernels\.|aten\.|torch\.ops\.(?!inductor)\w+\.)\w+")
KERNEL = re.compile(r"^\s+(?:cpp_fused\w*|\w+_kernel\w*|cpp_\w+)\(", re.M)


@dataclass(frozen=True)
class Cost:
    """kernels: a call; passes: over the long rank; traffic: bytes over compulsory bytes.  None: not known."""

    kernels: int | None
    passes: int | None
    traffic: float | None

    def __str__(self) -> str:
        shown = ("-" if x is None else f"{x:.3g}" for x in (self.kernels, self.passes, self.traffic))
        return " / ".join(shown)


def compulsory(args: tuple[torch.Tensor, ...], out: Any) -> int:
    """Bytes of every argument read once and every result written once."""
    outs = torch.utils._pytree.tree_leaves(out)
    return sum(t.numel() * t.element_size() for t in (*args, *outs))


def inductor(fn: Callable[..., Any], args: tuple[torch.Tensor, ...], length: int) -> Cost:
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import fresh_cache, run_and_get_code

    moved: list[int] = []
    codegen = GraphLowering.codegen

    def counted(graph: GraphLowering) -> Any:
        text = codegen(graph)
        moved.append(int(graph.count_bytes()[0]))
        return text

    torch._dynamo.reset()
    with fresh_cache(), patch.object(GraphLowering, "codegen", counted):
        out, sources = run_and_get_code(torch.compile(fn, dynamic=False), *args)
    text = "\n".join(line for line in "\n".join(sources).splitlines() if not line.lstrip().startswith("#"))
    begin = text.rindex("def call(")
    call = text[begin: text.index("\n        return ", begin)]
    called = [m.group() for m in LIBRARY.finditer(call) if not m.group().endswith(("empty_strided", "set_"))]
    kernels = len(KERNEL.findall(call)) + len(called)
    loops = len(re.findall(rf"for\s*\([^;]*;[^;]*<\s*static_cast<int64_t>\({length}L\)", text))
    loops += len(re.findall(r"cpp_fused_flex_attention\w*\(", call))  # its template is the streaming form
    return Cost(kernels, loops + len(called), sum(moved) / compulsory(args, out))


def own(family: Family, args: tuple[torch.Tensor, ...], length: int) -> Cost:
    torch._dynamo.reset()
    memcomp.reset()
    seen: list[tuple[int, float]] = []
    left = 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal left
        installed, _ = install(gm, config({"rest": "eager"}))
        gm.graph.eliminate_dead_code()
        left += sum(n.op.startswith("call_") and "getitem" not in n.name and "memcomp" not in str(n.target)
                    for n in gm.graph.nodes)
        for i in installed:
            r = describe(i.region.source, i.region.program, i.compiled, memcomp.backend.region_sizes(i.region))
            sizes, names = {**fixed(r.program), **r.sizes}, {t.name for t in r.program.cascade.inputs()}
            most = max((n for (t, x), n in r.passes.after.items() if t in names and sizes.get(x) == length), default=0)
            seen.append((most, r.traffic.bytes))
        return gm.forward

    out = torch.compile(family.fn, backend=backend, dynamic=False)(*args)
    kernels = memcomp.stats()["launches"] + left
    whole = sum(b for _, b in seen) / compulsory(args, out) if seen and not left else None
    return Cost(kernels, sum(n for n, _ in seen) if seen and not left else None, whole)


def row(family: Family, rows: int, length: int) -> dict[str, Any]:
    args = family.inputs(rows, length, torch.float32)
    costs: dict[str, Cost | None] = {}
    for who, fn in (("Inductor", family.fn), ("FlexAttention", family.flex and family.flex(*args))):
        try:
            costs[who] = inductor(fn, args, length) if fn is not None else None
        except Exception as why:  # what a peer cannot compile is a result
            costs[who] = None
            print(f"{family.name}: {who}: {type(why).__name__}: {str(why).splitlines()[0][:100]}")
    if (flexed := costs["FlexAttention"]) is not None:
        costs["FlexAttention"] = replace(flexed, traffic=None)  # Inductor does not count what a template reads
    costs["memcomp"] = own(family, args, length)
    return {"family": family.name, "why": family.why, **{k: asdict(c) if c else None for k, c in costs.items()}}


def page(results: list[dict[str, Any]], rows: int, length: int) -> str:
    lines = [
        "# Families of layers", "",
        f"Written by `python benchmarks/families.py` at {rows} rows and {length} elements of the long rank, fp32, CPU.",
        "Each cell: kernels a call / passes over the long rank / bytes moved over compulsory bytes (every argument",
        "read once, every result written once).  The peers are counted in the code that they generate; a dash is what",
        "is not counted, or what they cannot compile or have no form of.  Bytes are those between kernels and memory",
        "by each compiler's own count.", "",
        "| family | Inductor | FlexAttention | memcomp | more than one pass because |", "|---|---|---|---|---|"]
    for r in results:
        cells = [str(Cost(**r[who])) if r[who] else "-" for who in ("Inductor", "FlexAttention", "memcomp")]
        lines.append(f"| {r['family']} | {' | '.join(cells)} | {r['why']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families whose name holds this word")
    parser.add_argument("--rows", type=int, default=33)
    parser.add_argument("--length", type=int, default=1021)
    args = parser.parse_args()
    results = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in families():
            if args.only in family.name:
                results.append(row(family, args.rows, args.length))
                print(json.dumps(results[-1]), flush=True)
    if not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "families.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
        DOCS.write_text(page(results, args.rows, args.length))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
