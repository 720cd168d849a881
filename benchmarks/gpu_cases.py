"""Every program that comes with memcomp as machine code for GPUs that are not there.

`python benchmarks/gpu_cases.py [--target h100 ...] [--only WORD] [--jobs 2] [--again]` maps, emits and compiles
tests/cases, the workloads of models/ and the families of models/families for each machine, and writes
benchmarks/results/gpu_cases.json as it goes.  What is recorded is not looked at again without `--again`, and then
compiled only where its text or Triton is another one.  Of each launch: warps, stages, registers, stack, shared memory,
instructions, how wide it reads memory, and how many rows its largest product has.  Nothing here runs on a GPU, and no
time is measured.  The operators that are timed are those of `gpu_offline.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import triton

from memcomp.codegen.lower import lower
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.emit import admits, emit, function_names
from memcomp.codegen.triton.layout import layout
from memcomp.codegen.triton.offline import compile_text, module
from memcomp.config import Config
from memcomp.inputs import workloads
from memcomp.ir.errors import MemcompError, Refusal
from memcomp.ir.program import Mapping, Program, close, knobs
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot, TileKernel, statements
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from memcomp.pipeline import map_program

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu_cases.json"
TARGETS = ("a100", "rtx4090", "h100", "b200")
USED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "LDGSTS", "STL")
TASKS = 60  # of a process: what compilers keep in memory goes with it
ROWS, LENGTH = 512, 1024  # of a family: enough for tiles of any size
Found = dict[str, dict[str, Any]]


def names() -> Iterator[str]:
    """"case x" for tests/cases/x.mc, "model x" for models/x.py, "family x"."""
    yield from (f"case {f.stem}" for f in sorted((ROOT / "tests" / "cases").glob("*.mc")))
    yield from (f"model {place.rpartition('.')[2].partition(':')[0]}" for place, _ in workloads())
    from memcomp.models.families import families

    yield from (f"family {f.name}" for f in families())


def programs(name: str, machine: str) -> list[Program]:
    """The closed programs of a case, workload or family for a machine.  Raises MemcompError where there are none."""
    kind, _, word = name.partition(" ")
    if kind == "case":
        read = replace(parse((ROOT / "tests" / "cases" / f"{word}.mc").read_text()), mapping=Mapping(), target=machine)
        try:
            closed = map_program(read, config=Config(target=machine))
            admits(lower(closed), target(machine))
            return [closed]
        except Refusal as refused:
            return [_as_written(read, refused)]
    import torch

    import memcomp
    from memcomp.models.families import families

    if kind == "model":
        fn, inputs = import_module(f"memcomp.models.{word}").build()
        options: dict[str, Any] = {}
    else:
        family = next(f for f in families() if f.name == word)
        fn, inputs, options = family.fn, family.inputs(ROWS, LENGTH, torch.bfloat16), {"chains": "all"}
    torch._dynamo.reset()
    with torch.inference_mode():
        told = memcomp.explain(fn, *inputs, target=machine, **options)
    if not told.regions:
        raise Refusal("; ".join(dict.fromkeys(r.why for r in told.refusals)) or "nothing is compiled")
    return [r.program for r in told.regions]


def _as_written(read: Program, refused: Refusal) -> Program:
    """A program that is no region as capture reads them (a size that must stay a number is a symbol for `generalize`):
    fused and mapped, no more, with the first choice of every knob that fits well, else that fits best."""
    program = partition(fuse(read))
    fitting: list[tuple[float, int, Program]] = []
    for n in range(max((len(k.choices) for k in knobs(program)), default=1)):
        closed = close(program, {k.name: k.choices[min(n, len(k.choices) - 1)] for k in knobs(program)})
        try:
            fitting.append((admits(lower(closed), target(read.target)), n, closed))
        except Refusal:
            continue
        if not fitting[-1][0]:
            break
    if not fitting:
        raise refused
    return min(fitting, key=lambda x: x[:2])[2]


def wide(sass: str) -> dict[str, int]:
    """Loads from memory, those that go straight to shared memory too, by the bits that a thread asks for."""
    found: Counter[str] = Counter()
    for word in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(LDG(?:STS)?\.[A-Z0-9_.]+)", sass, re.MULTILINE):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", word)
        found[bits[1] if bits else "32"] += 1
    return dict(sorted(found.items(), key=lambda x: int(x[0])))


def rows(k: TileKernel) -> int:
    """Of the largest product of matrices in a kernel; 0 where there is none."""
    places = layout(k)
    made = (places.matrices(k, s) for s in statements(k.body) if isinstance(s, Dot))
    return max((x.left.size for x in made if x is not None), default=0)


def launches(program: Program, machine: str, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each launch of a closed program; `known`: of launches, by the digest of what was compiled.
    MemcompError where one has no text or does not compile."""
    made, tiles = target(machine), lower(program)
    source = emit(tiles, made, aligned=True).source
    settings, found = module(source).SETTINGS, []
    for k, name in zip(tiles.kernels, function_names(tiles), strict=True):
        given, how = arguments(tiles, k, tuple(len(p.shape) - 1 for p in tiles.params)), settings[name]
        asked = (triton.__version__, source, name, given.signature, given.aligned, how, made.capability)
        digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        if digest in known:
            found.append(known[digest])
            continue
        b = compile_text(source, name, given.signature, {}, given.aligned, made.capability, how["num_warps"],
                         how["num_stages"])
        sass = b.sass
        found.append({"name": name, **how, "tiles": {d.name: d.capacity for d in k.dims}, "shared": b.shared,
                      **asdict(b.resources), "spills": b.spills, "instructions": b.instructions(*USED),
                      "loads": wide(sass), "rows": rows(k), "digest": digest, "text": source.partition(
                          f"def {name}(")[2].partition("@triton.jit")[0].count("tl.dot(")})
    return found


def compiled(task: tuple[str, str, dict[str, Any]]) -> tuple[str, str, dict[str, Any]]:
    """(name, machine, what became of it), of these and what is recorded of them."""
    name, machine, before = task
    known = {x["digest"]: x for x in before.get("launches", ()) if "digest" in x}
    try:
        return name, machine, {"launches": [x for p in programs(name, machine) for x in launches(p, machine, known)]}
    except MemcompError as error:
        return name, machine, {"refused": str(error).splitlines()[0]}


def recorded() -> Found:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(found: Found) -> None:
    """One line a name and machine, in order."""
    order = {n: i for i, n in enumerate(names())}
    parts = []
    for name in sorted((n for n in found if n in order), key=order.__getitem__):
        lines = ",\n".join(f"  {json.dumps(m)}: {json.dumps(found[name][m])}" for m in TARGETS if m in found[name])
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def line(name: str, machine: str, told: dict[str, Any]) -> str:
    if "refused" in told:
        return f"{name:36} {machine:8} REFUSED: {told['refused']}"
    return "\n".join(
        f"{name:36} {machine:8} {x['name']:16} {x['num_warps']} warps, {x['num_stages']} stages, {x['shared']:>7} B, "
        f"{x['registers']:>3} registers, {x['spills']} spills, {x['rows']} rows, "
        f"{', '.join(f'{i} {n}' for i, n in x['instructions'].items() if n)}; loads {x['loads']}"
        for x in told["launches"])


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--target", nargs="*", default=TARGETS, choices=TARGETS)
    args.add_argument("--only", default="", help="names that hold this word")
    args.add_argument("--jobs", type=int, default=1)
    args.add_argument("--again", action="store_true", help="what is recorded too")
    chosen = args.parse_args()
    found = recorded()
    tasks = [(n, m, found.get(n, {}).get(m, {}))
             for kinds in (("case", "model"), ("family",)) for m in chosen.target for n in names()
             if n.startswith(kinds) and chosen.only in n and (chosen.again or m not in found.get(n, {}))]
    done, batch = 0, TASKS * chosen.jobs
    for begun in range(0, len(tasks), batch):  # a pool whose workers end by themselves waits for them for ever (3.11)
        with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
            for made in as_completed([pool.submit(compiled, t) for t in tasks[begun:begun + batch]]):
                name, machine, told = made.result()
                done += 1
                found.setdefault(name, {})[machine] = told
                record(found)
                print(f"[{done}/{len(tasks)}] {line(name, machine, told)}", flush=True)


if __name__ == "__main__":
    main()
