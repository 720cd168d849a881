"""Families of layers beside torch's compilers: kernels a call, passes over the long rank, traffic over compulsory.

    python benchmarks/families.py [--only WORD] [--again] [--rows N] [--length N]

Writes results/families.json family by family (one that is there already is not counted again, unless --again) and
docs/families.md from it.  What Inductor and FlexAttention do is counted in the code they generate, which is not built:
kernels that are called, loops over the long rank (a library's product is one), bytes by Inductor's own count.
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
from memcomp.models.families._refused import REFUSED, Refused
from memcomp.report import describe
from memcomp.sizes import fixed

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
SAVED = RESULTS / "families.json"
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


class Written(BaseException):
    """The code is there; it need not be built.  No `Exception`: torch puts those in others of its own."""


def compulsory(args: tuple[torch.Tensor, ...], out: Any) -> int:
    """Bytes of every argument read once and every result written once."""
    outs = torch.utils._pytree.tree_leaves(out)
    return sum(t.numel() * t.element_size() for t in (*args, *outs))


def inductor(fn: Callable[..., Any], args: tuple[torch.Tensor, ...], length: int, least: int) -> Cost:
    from torch._inductor.graph import GraphLowering

    seen: list[tuple[str, int]] = []
    codegen = GraphLowering.codegen

    def counted(graph: GraphLowering) -> Any:
        wrapper, _ = codegen(graph)
        seen.append((wrapper.value, int(graph.count_bytes()[0])))
        raise Written

    torch._dynamo.reset()
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with no_graphs, no_cache, patch.object(GraphLowering, "codegen", counted):
        try:
            torch.compile(fn, dynamic=False, fullgraph=True)(*args)
        except Written:
            pass
    ((source, moved),) = seen
    text = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))
    begin = text.rindex("def call(")
    call = text[begin: text.index("\n        return ", begin)]
    called = [m.group() for m in LIBRARY.finditer(call) if not m.group().endswith(("empty_strided", "set_"))]
    kernels = len(KERNEL.findall(call)) + len(called)
    loops = len(re.findall(rf"for\s*\([^;]*;[^;]*<\s*static_cast<int64_t>\({length}L\)", text))
    loops += text.count("int64_t kvSplitSize =")  # the loop of FlexAttention's template, which is the streaming form
    return Cost(kernels, loops + len(called), moved / least)


def own(family: Family, args: tuple[torch.Tensor, ...], length: int) -> Cost:
    torch._dynamo.reset()
    memcomp.reset()
    seen: list[tuple[int, float]] = []
    left = 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal left
        installed, _ = install(gm, config({"rest": "eager", "chains": "all"}))
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
    least = compulsory(args, family.fn(*args))
    costs: dict[str, Cost | None] = {}
    said = {}
    for who, fn in (("Inductor", family.fn), ("FlexAttention", family.flex and family.flex(*args))):
        try:
            costs[who] = inductor(fn, args, length, least) if fn is not None else None
        except Exception as why:  # what a peer cannot compile is a result
            costs[who] = None
            said[who] = f"{type(why).__name__}: {str(why).splitlines()[0][:200]}"
    if (flexed := costs["FlexAttention"]) is not None:
        costs["FlexAttention"] = replace(flexed, traffic=None)  # Inductor does not count what a template reads
    costs["memcomp"] = own(family, args, length)
    return {"family": family.name, "why": family.why, **{k: asdict(c) if c else None for k, c in costs.items()},
            **({"said": said} if said else {})}


def refusal(refused: Refused, rows: int, length: int) -> dict[str, Any]:
    """What is said of a layer that no law makes one pass, and how many kernels compute it all the same."""
    args = refused.inputs(rows, length, torch.float32)
    torch._dynamo.reset()
    memcomp.reset()
    e = memcomp.explain(refused.fn, *args)
    told = [*map(str, e.refusals), *(p for r in e.regions for p in r.program.proofs if p.startswith("refused"))]
    told = [re.sub(r"/\S*/(?=\w+\.py:)", "", x) for x in told]  # files by their names
    return {"family": refused.name, "says": told, "regions": len(e.regions)}


HEAD = """# Families of layers

Written by `python benchmarks/families.py` at {rows} rows and {length} elements of the long rank, fp32, CPU, torch
{torch}. Each cell: kernels a call / passes over the long rank / bytes moved over compulsory bytes (every
argument read once, every result written once). The peers are counted in the code that they generate, where a product by
a library is one kernel and one pass; a dash is what is not counted, or what they cannot compile or have no form of.
Bytes are those between kernels and memory by each compiler's own count: Inductor counts what a kernel reads once,
however often it passes over it; below 1 is where only some elements of an argument are asked for. memcomp is given
`chains="all"`; without it a normalised tensor that is itself written stays with torch. The functions are in
`models/families/`.
"""


def page(saved: dict[str, Any]) -> str:
    lines = [HEAD.format(rows=saved["rows"], length=saved["length"], torch=saved["machine"]["versions"]["torch"])]
    lines += ["| family | Inductor | FlexAttention | memcomp | more than one pass or kernel because |",
              "|---|---|---|---|---|"]
    for r in saved["results"]:
        cells = [str(Cost(**r[who])) if r[who] else "-" for who in ("Inductor", "FlexAttention", "memcomp")]
        lines.append(f"| {r['family']} | {' | '.join(cells)} | {r['why']} |")
    lines += ["", "## Refused", "",
              "No law of the table makes these one pass. They are computed all the same, by memcomp and torch.", "",
              "| function | regions | what is said |", "|---|---|---|"]
    for r in saved["refused"]:
        lines.append(f"| {r['family']} | {r['regions']} | {'<br>'.join(x.replace('|', '&#124;') for x in r['says'])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families whose name holds this word")
    parser.add_argument("--again", action="store_true", help="count those again that are in the results")
    parser.add_argument("--rows", type=int, default=257)
    parser.add_argument("--length", type=int, default=4099)
    args = parser.parse_args()
    shape = {"rows": args.rows, "length": args.length}
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    if {k: saved.get(k) for k in shape} != shape:
        saved = {"results": [], "refused": []}
    saved = {"machine": machine(), **shape, **{k: saved[k] for k in ("results", "refused")}}
    work = (("results", families(), row), ("refused", REFUSED, refusal))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, members, count in work:
            known = {r["family"]: r for r in saved[part]}
            for f in members:
                if args.only in f.name and (args.again or f.name not in known):
                    known[f.name] = count(f, args.rows, args.length)  # type: ignore[operator]
                    print(json.dumps(known[f.name]), flush=True)
                    saved[part] = [known[x.name] for x in members if x.name in known]
                    RESULTS.mkdir(exist_ok=True)
                    SAVED.write_text(json.dumps(saved, indent=1) + "\n")
    DOCS.write_text(page(saved))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
