"""What the resource model says of kernels before they are compiled, beside what their machine code says of itself.

    python benchmarks/gpu_resources.py [--only WORD]     compile and record; needs Triton, no GPU
    python benchmarks/gpu_resources.py --fit             numbers of the estimate of registers that fit the record best
    python benchmarks/gpu_resources.py --again           predict anew, compile only what is not recorded

Attention in bf16, prefill and decode, head sizes 64 to 256, and variants of it, on four targets.  Tile sizes and
settings are set by hand, so that small ones, large ones and some that spill are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from memcomp.codegen.lower import lower
from memcomp.codegen.triton.resources import SPILLED, Setting, held, need
from memcomp.ir.cascade import Knob
from memcomp.ir.errors import Refusal
from memcomp.ir.parse import parse
from memcomp.ir.program import Program, close, knobs
from memcomp.ir.target import target
from memcomp.ir.tile import TileProgram
from memcomp.stations import rewrite

RECORD = Path(__file__).parent / "results" / "gpu_resources.json"
TEXT = """program attention
rank H = {heads}
rank J = 8
rank P
rank M{keys}
rank E = {dim}
rank F = {dim}
in Q[H, P, E]: {dtype}
in K[J, M, E]: {dtype}
in V[J, M, F]: {dtype}
{inputs}out O[H, P, F]: {dtype}
S[h, p, m] = sum{{e}} Q[h, p, e] * K[h//{group}, m, e]{where}
W[h, p, m] = {score}{where}
GM[h, p] = max{{m}} W[h, p, m]{where}
SN[h, p, m] = exp(W[h, p, m] - GM[h, p]){where}
SD[h, p] = sum{{m}} SN[h, p, m]{where}
A[h, p, m] = SN[h, p, m] / SD[h, p]{where}
O[h, p, f] = sum{{m}} A[h, p, m] * V[h//{group}, m, f]{where}
"""
MOST = 330.0   # registers: how far beyond what there is a kernel is does not matter
USUAL = {"keys": "", "dtype": "bf16", "inputs": "", "where": "", "score": "S[h, p, m] * 0.125"}
VARIANTS: dict[str, dict[str, str]] = {
    "causal": {"where": " where m <= p + M - P"},
    "window": {"where": " where m <= p + M - P and p + M - P < m + 256"},
    "causal slope": {"where": " where m <= p + M - P", "inputs": "in Z[H]: f32\n",
                     "score": "S[h, p, m] * 0.125 + Z[h] * (m - p)"},
    "tanh": {"score": "tanh(S[h, p, m] * 0.0125) * 30.0"},
    "slope": {"inputs": "in Z[H]: f32\n", "score": "S[h, p, m] * 0.125 + Z[h] * (m - p)"},
    "bias": {"inputs": "in Z[H, P, M]: bf16\n", "score": "S[h, p, m] * 0.125 + Z[h, p, m]"},
    "scaled keys": {"inputs": "in Z[J, M]: f32\n", "score": "S[h, p, m] * Z[h, m]"},
    "documents": {"inputs": "in Z[P]: i32\n", "keys": " = P", "where": " where Z[p] == Z[m]"},
    "f32": {"dtype": "f32"},
}
# (variant, head size, how many settings): what takes most registers
MORE = (("f32", 16, 3), ("f32", 32, 3), ("f32", 128, 3),
        *((variant, 128, 1) for variant in ("causal", "tanh", "slope", "window", "causal slope")))
TARGETS = ("a100", "rtx4090", "h100", "b200")
DIMS = (64, 96, 128, 192, 256)
# by capability below 90 or not: query rows, keys of a step, warps, stages
PREFILL = {False: ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 16, 4, 2)),
           True: ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 4, 2))}
# queries of one key, keys of a step, warps, stages
DECODE = ((4, 64, 4, 3), (16, 128, 4, 2))


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel, the first launch of a program, with tiles and setting."""

    name: str
    target: str
    program: Program
    sizes: tuple[tuple[str, int], ...]
    setting: Setting

    @property
    def tiles(self) -> TileProgram:
        return tiles(self.program, self.target, dict(self.sizes))


def attention(dim: int, group: int = 1, decode: bool = False, variant: str = "") -> Program:
    """Attention over 8 key heads; decode: one query row for each of their heads."""
    text = TEXT.format(heads=8 * group, dim=dim, group=group, **USUAL | VARIANTS.get(variant, {}))
    if decode:
        text = text.replace("rank P\n", "").replace(", P", "").replace(", p", "")
    return parse(text)


def tiles(program: Program, target_name: str, sizes: dict[str, int]) -> TileProgram:
    """The tile program with these tile sizes, whether a search would try them or not."""
    mapped = rewrite(replace(program, target=target_name), observe=lambda *_: None)

    def only(k: Any) -> Any:
        return replace(k, choices=(sizes.get(k.name, k.choices[0]),)) if isinstance(k, Knob) else k

    ranks = tuple(replace(r, extent=only(r.extent)) for r in mapped.cascade.ranks)
    groups = tuple(replace(g, partition=tuple((n, only(x)) for n, x in g.partition)) for g in mapped.mapping.groups)
    mapped = replace(mapped, cascade=replace(mapped.cascade, ranks=ranks),
                     mapping=replace(mapped.mapping, groups=groups))
    return lower(close(mapped, {k.name: k.choices[0] for k in knobs(mapped)}))


def cases() -> Iterator[Case]:
    for name in TARGETS:
        settings = PREFILL[target(name).capability >= 90]
        for dim in DIMS:
            for rows, keys, warps, stages in settings:
                yield Case(f"prefill {dim}, {rows} x {keys}", name, attention(dim), (("p0", rows), ("m0", keys)),
                           Setting(warps, stages))
            for group, keys, warps, stages in DECODE:
                yield Case(f"decode {dim}, {group} x {keys}", name, attention(dim, group, decode=True), (("m0", keys),),
                           Setting(warps, stages))
        for variant in VARIANTS:
            for rows, keys, warps, stages in settings[1:3]:
                yield Case(f"{variant} 64, {rows} x {keys}", name, attention(64, variant=variant),
                           (("p0", rows), ("m0", keys)), Setting(warps, stages))
        for variant, dim, few in MORE:
            for rows, keys, warps, stages in settings[:few]:
                yield Case(f"{variant} {dim}, {rows} x {keys}", name, attention(dim, variant=variant),
                           (("p0", rows), ("m0", keys)), Setting(warps, stages))


def predicted(c: Case) -> dict[str, Any]:
    tp, machine = c.tiles, target(c.target)
    return {"predicted": asdict(need(tp, tp.kernels[0], machine, c.setting)),
            "held": held(tp, tp.kernels[0], machine, c.setting)}


def measured(c: Case) -> dict[str, Any]:
    """Compile one."""
    from memcomp.codegen.triton.arguments import arguments
    from memcomp.codegen.triton.emit import emit, function_names
    from memcomp.codegen.triton.offline import compile_text

    tp, machine = c.tiles, target(c.target)
    k = tp.kernels[0]
    given = arguments(tp, k, tuple(len(p.shape) - 1 for p in tp.params))
    made = compile_text(emit(tp, machine).source, function_names(tp)[0], given.signature, {}, given.aligned,
                        machine.capability, c.setting.warps, c.setting.stages)
    return {"case": c.name, "target": c.target, **asdict(c.setting), **predicted(c), "version": made.version,
            "actual": {"shared": made.shared, "tensor_memory": made.tensor_memory, "spills": made.spills,
                       "registers": made.resources.registers, "stack": made.resources.stack}}


def taken(r: dict[str, Any]) -> float:
    """Registers that a compiled kernel would have liked: those on the stack as well."""
    return float(r["actual"]["registers"] + r["actual"]["stack"] / 4)


def form(r: dict[str, Any]) -> str:
    """How tensor cores are fed, as `resources` calls it."""
    name = r["target"]
    return "mma" if target(name).capability < 90 or "decode" in r["case"] else "wgmma" if name == "h100" else "tcgen05"


def ordered(results: list[dict[str, Any]], guess: Callable[[dict[str, Any]], float]) -> tuple[int, int]:
    """(pairs that `guess` orders as the compiler does, pairs): of the same target, registers a tenth apart."""
    right = every = 0
    for a, b in combinations(results, 2):
        x, y = taken(a), taken(b)
        if a["target"] == b["target"] and abs(x - y) > max(x, y) / 10:
            every += 1
            right += (guess(a) < guess(b)) == (x < y)
    return right, every


def fit(results: list[dict[str, Any]]) -> None:
    """Least squares for each way of feeding tensor cores, and the estimate that tells those that spill best.

    Kernels that tensor cores feed themselves differ too little in their rows to tell what one costs.
    """
    import numpy as np

    for word in SPILLED:
        own = [r for r in results if form(r) == word]
        counted = np.array([[1.0, *r["held"].values()] for r in own])
        wanted = np.minimum([taken(r) for r in own], MOST)
        weights = np.zeros(counted.shape[1])
        some = np.array([True, *(word == "mma" or kind != "rows" for kind in own[0]["held"])])
        full = np.array([r["actual"]["registers"] >= 255 for r in own])
        aim = wanted.copy()
        for _ in range(60):   # a kernel that has all registers may have wanted more: it is no fault to say so
            kinds = some.copy()
            while True:       # what would count for less than nothing is left out
                weights[:] = 0
                weights[kinds] = np.linalg.lstsq(counted[:, kinds], aim, rcond=None)[0]
                if (weights >= 0).all():
                    break
                kinds &= weights >= 0
            aim = np.where(full, np.maximum(wanted, counted @ weights), wanted)
        guess = counted @ weights
        spilled = np.array([r["actual"]["spills"] > 0 for r in own])
        limit = min(sorted(guess), key=lambda t: int(np.sum((guess > t) != spilled)))
        wrong = int(np.sum((guess > limit) != spilled))
        print(word, [round(float(w), 2) for w in weights], f"limit {limit:.0f}, wrong {wrong} of {len(own)}")


def summary(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A line for each target."""
    for name in TARGETS:
        own = [r for r in results if r["target"] == name]
        more = [r["predicted"]["shared"] - r["actual"]["shared"] for r in own]
        right, every = ordered(own, lambda r: float(r["predicted"]["registers"]))
        spilled = [r for r in own if r["actual"]["spills"]]
        said = [r for r in own if r["predicted"]["spills"]]
        yield (name, str(len(own)), str(more.count(0)), f"{min(more, default=0):,} to {max(more, default=0):,}",
               f"{right / max(every, 1):.1%} of {every}", str(len(spilled)),
               str(len([r for r in spilled if r in said])), str(len([r for r in said if r not in spilled])))


def main() -> None:
    from measure import record, terminal
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose target and name hold this word")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    known = json.loads(RECORD.read_text())["results"] if args.fit or args.again else []
    if args.fit:
        fit(known)
        return
    console, results = terminal(), []
    recorded = {(r["target"], r["case"]): r for r in known}
    for c in cases():
        if args.only in f"{c.target} {c.name}":
            found = recorded.get((c.target, c.name))
            try:
                results.append(found | predicted(c) if found else measured(c))
            except Refusal as refused:
                console.print(f"{c.target} {c.name}: {refused}")
                continue
            p, a = results[-1]["predicted"], results[-1]["actual"]
            console.print(f"{c.target} {c.name}: shared {p['shared']} {a['shared']}, registers {p['registers']:.0f} "
                          f"{a['registers']}, stack {a['stack']}, spills {a['spills']}")
    table = Table("target", "kernels", "shared equal", "bytes too many", "pairs in order", "spill", "foretold",
                  "in vain")
    for row in summary(results):
        table.add_row(*row)
    console.print(table)
    if not args.only:
        console.print(f"written: {record(__file__, results)}")


if __name__ == "__main__":
    main()
