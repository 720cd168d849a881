"""What the resource model says of kernels before they are compiled, beside what their machine code says of itself.

    python benchmarks/gpu_resources.py [--only WORD] [--fit]

Needs Triton and no GPU.  Attention in bf16, prefill and decode, head sizes 64 to 256, on four targets: the tiles are
set by hand, so that small and large ones are there as well as those that would be chosen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from measure import record, terminal

from memcomp.codegen.lower import lower
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.emit import emit, function_names
from memcomp.codegen.triton.layout import layout
from memcomp.codegen.triton.offline import compile_text
from memcomp.codegen.triton.resources import Setting, _Reader, need
from memcomp.config import Config
from memcomp.ir.cascade import Knob
from memcomp.ir.parse import parse
from memcomp.ir.program import Program, knobs
from memcomp.ir.target import target
from memcomp.ir.tile import TileProgram
from memcomp.pipeline import forget, rewrite
from memcomp.tune import assign
from memcomp.ir.errors import Refusal

TEXT = """program attention
rank H = {heads}
rank J = 8
rank P
rank M
rank E = {dim}
rank F = {dim}
in Q[H, P, E]: bf16
in K[J, M, E]: bf16
in V[J, M, F]: bf16
out O[H, P, F]: bf16
S[h, p, m] = sum{{e}} Q[h, p, e] * K[h//{group}, m, e]{where}
W[h, p, m] = S[h, p, m] * 0.125{where}
GM[h, p] = max{{m}} W[h, p, m]{where}
SN[h, p, m] = exp(W[h, p, m] - GM[h, p]){where}
SD[h, p] = sum{{m}} SN[h, p, m]{where}
A[h, p, m] = SN[h, p, m] / SD[h, p]{where}
O[h, p, f] = sum{{m}} A[h, p, m] * V[h//{group}, m, f]{where}
"""
DIMS = (64, 96, 128, 192, 256)
TARGETS = ("a100", "rtx4090", "h100", "b200")
# query rows, keys of a step, warps, stages
PREFILL = {False: ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
           True: ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2))}
# queries of one key, keys of a step, warps, stages
DECODE = ((4, 64, 4, 3), (16, 128, 4, 2))


def attention(dim: int, group: int = 1, decode: bool = False, causal: bool = False) -> Program:
    text = TEXT.format(heads=8 * group, dim=dim, group=group, where=" where m <= p + M - P" if causal else "")
    if decode:
        text = text.replace("rank P\n", "").replace(", P", "").replace(", p", "")
    return parse(text)


def tiles(program: Program, target_name: str, sizes: dict[str, int]) -> TileProgram:
    """The tile program with these tile sizes, whether a search would try them or not."""
    forget()
    mapped = rewrite(replace(program, target=target_name), observe=lambda *_: None)

    def widened(k: Any) -> Any:
        return replace(k, choices=(*k.choices, sizes[k.name])) if isinstance(k, Knob) and k.name in sizes else k

    ranks = tuple(replace(r, extent=widened(r.extent)) for r in mapped.cascade.ranks)
    groups = tuple(replace(g, partition=tuple((n, widened(x)) for n, x in g.partition)) for g in mapped.mapping.groups)
    mapped = replace(mapped, cascade=replace(mapped.cascade, ranks=ranks),
                     mapping=replace(mapped.mapping, groups=groups))
    return lower(assign(mapped, {k.name: sizes.get(k.name, k.choices[0]) for k in knobs(mapped)}))


def cases() -> Iterator[tuple[str, str, Program, dict[str, int], Setting]]:
    """(name, target, program, tile sizes, setting)."""
    for name in TARGETS:
        hopper = target(name).capability >= 90
        for dim in DIMS:
            for rows, keys, warps, stages in PREFILL[hopper]:
                yield (f"prefill {dim}, {rows} x {keys}", name, attention(dim), {"p0": rows, "m0": keys},
                       Setting(warps, stages))
            for group, keys, warps, stages in DECODE:
                yield (f"decode {dim}, {group} x {keys}", name, attention(dim, group, decode=True), {"m0": keys},
                       Setting(warps, stages))


def measured(name: str, target_name: str, program: Program, sizes: dict[str, int], setting: Setting) -> dict[str, Any]:
    tp = tiles(program, target_name, sizes)
    k, function = tp.kernels[0], function_names(tp)[0]
    machine = target(target_name)
    said = need(tp, k, machine, setting)
    given = arguments(tp, k, tuple(len(p.shape) - 1 for p in tp.params))
    begun = time.perf_counter()
    made = compile_text(emit(tp, machine).source, function, given.signature, {}, given.aligned, machine.capability,
                        setting.warps, setting.stages)
    reader = _Reader(tp, k, layout(k), machine.capability, setting)
    return {"case": name, "target": target_name, **asdict(setting), "version": made.version,
            "predicted": asdict(said), "held": reader.held(next(reader.bodies(k.body))),
            "actual": {"shared": made.shared, "tensor_memory": made.tensor_memory, "spills": made.spills,
                       **asdict(made.resources)}, "seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose target and name hold this word")
    args = parser.parse_args()
    console, results = terminal(), []
    for name, target_name, program, sizes, setting in cases():
        if args.only not in f"{target_name} {name}":
            continue
        try:
            r = measured(name, target_name, program, sizes, setting)
        except Refusal as error:
            console.print(target_name, name, setting, str(error))
            continue
        results.append(r)
        p, a = r["predicted"], r["actual"]
        console.print(f"{target_name} {name} {setting.warps} warps {setting.stages} stages: shared {p['shared']} "
                      f"{a['shared']} registers {p['registers']:.0f} {a['registers']} stack {a['stack']} spills {a['spills']}")
    if not args.only:
        record("gpu_resources", results)


if __name__ == "__main__":
    main()
