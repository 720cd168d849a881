"""Every program that comes with memcomp as machine code for GPUs that are not there.

    python benchmarks/gpu_offline.py [--target h100 ...] [--backend gluon ...] [--only WORD] [--jobs 2] [--again]

maps, emits and compiles the operators that `memcomp bench --device cuda` times, tests/cases, the workloads of models/
and the families of models/families for each machine, and writes benchmarks/results/gpu_offline.json as it goes.  What
is recorded is not looked at again without `--again`, and then compiled only where its text or the compiler is another
one.  Of each launch: warps, stages, tiles, registers, stack, shared memory, instructions, how wide it reads memory, and
how many rows its largest product has.  Nothing here runs on a GPU, and no time is measured.

Gluon writes for h100 only, CUDA C++ what has no products for tensor cores; what they refuse stands with the reason.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import memcomp
from memcomp.codegen.binary import Binary
from memcomp.codegen.launches import Layout
from memcomp.codegen.lower import lower
from memcomp.codegen.triton.layout import layout
from memcomp.config import Config
from memcomp.inputs import workloads
from memcomp.ir.errors import MemcompError, Refusal
from memcomp.ir.program import Mapping, Program, close, knobs
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot, Kernel, TileKernel, statements
from memcomp.models.bench import Case, cases
from memcomp.models.families import families
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from memcomp.pipeline import map_program

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu_offline.json"
TARGETS = ("a100", "rtx4090", "h100", "b200")
BACKENDS = ("triton", "gluon", "cuda")
COMPILERS = {"triton": ("triton",), "gluon": ("triton",), "cuda": ("nvidia-cuda-nvrtc", "cuda-core")}
USED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "USETMAXREG", "STL")
TASKS = 60  # of a process: what compilers keep in memory goes with it
ROWS, LENGTH = 512, 1024  # of a family: enough for tiles of any size
Found = dict[str, dict[str, Any]]
Task = tuple[str, str, str, dict[str, Any]]


def operators() -> tuple[Case, ...]:
    return cases("cuda")


def names() -> Iterator[str]:
    """"operator x" as `memcomp bench` lists it, "case x": tests/cases/x.mc, "model x": models/x.py, "family x"."""
    yield from (f"operator {op.name}" for op in operators())
    yield from (f"case {f.stem}" for f in sorted((ROOT / "tests" / "cases").glob("*.mc")))
    yield from (f"model {place.rpartition('.')[2].partition(':')[0]}" for place, _ in workloads())
    yield from (f"family {f.name}" for f in families())


def key(machine: str, backend: str) -> str:
    """Of a result: the machine, and the backend where it is not the machine's own."""
    return machine if backend == target(machine).backend else f"{machine} {backend}"


def programs(name: str, machine: str, backend: str = "triton") -> list[Program]:
    """The closed programs of a name for a machine.  Raises MemcompError where there are none."""
    kind, _, word = name.partition(" ")
    if kind == "case":
        read = replace(parse((ROOT / "tests" / "cases" / f"{word}.mc").read_text()), mapping=Mapping(), target=machine)
        admits = import_module(f"memcomp.codegen.{backend}").admits
        try:
            closed = map_program(read, config=Config(target=machine, backend=backend))
            admits(lower(closed), target(machine))
            return [closed]
        except Refusal as refused:
            return [_as_written(read, refused, admits)]
    options: dict[str, Any] = {}
    if kind == "operator":
        op = next(op for op in operators() if op.name == word)
        with torch.device("meta"):
            fn, inputs = op.fn, op.inputs()
    elif kind == "model":
        fn, inputs = import_module(f"memcomp.models.{word}").build()
    else:
        family = next(f for f in families() if f.name == word)
        fn, inputs, options = family.fn, family.inputs(ROWS, LENGTH, torch.bfloat16), {"chains": "all"}
    torch._dynamo.reset()
    with torch.inference_mode():
        told = memcomp.explain(fn, *inputs, target=machine, backend=backend, **options)
    if not told.regions:
        raise Refusal("; ".join(dict.fromkeys(r.why for r in told.refusals)) or "nothing is compiled")
    return [r.program for r in told.regions]


def _as_written(read: Program, refused: Refusal, admits: Any) -> Program:
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


def binaries(kernel: Kernel) -> list[tuple[dict[str, Any], Binary]]:
    """Machine code of each launch for tensors laid out as usual, with what it is launched with."""
    tp, machine = kernel.program, target(kernel.isa)
    usual = Layout(tuple(len(p.shape) - 1 for p in tp.params))
    if kernel.backend == "cuda":
        from memcomp.codegen.cuda import launches as started
        from memcomp.codegen.cuda.compile import compile_text as compile_cuda

        given = started(tp, kernel.isa, usual, kernel.runs)
        made = compile_cuda(kernel.source, given, machine.capability)
        return [({"name": x.function, "num_warps": x.block // 32}, b) for x, b in zip(given, made, strict=True)]
    from memcomp.codegen.triton.emit import function_names
    from memcomp.codegen.triton.offline import compile_text, module

    settings, found = module(kernel.source).SETTINGS, function_names(tp)
    if kernel.backend == "gluon":
        from memcomp.codegen.gluon.build import binaries as compile_gluon

        return [({"name": n, **settings[n]}, b) for n, b in zip(found, compile_gluon(kernel), strict=True)]
    from memcomp.codegen.triton.arguments import arguments

    out = []
    for k, name in zip(tp.kernels, found, strict=True):
        asked, how = arguments(tp, k, usual.units), settings[name]
        out.append(({"name": name, **how}, compile_text(kernel.source, name, asked.signature, {}, asked.aligned,
                                                        machine.capability, how["num_warps"], how["num_stages"])))
    return out


def launches(kernel: Kernel) -> list[dict[str, Any]]:
    """What became of each launch.  MemcompError where one does not compile."""
    made, parts = binaries(kernel), kernel.program.kernels
    of = [(k,) for k in parts] if len(made) == len(parts) else [parts] * len(made)  # a launch may do all in turn
    return [{**how, "tiles": {d.name: d.capacity for k in ks for d in k.dims}, "shared": b.shared,
             **asdict(b.resources), "spills": b.spills, "instructions": b.instructions(*USED), "loads": wide(b.sass),
             "rows": max(map(rows, ks))} for ks, (how, b) in zip(of, made, strict=True)]


def text(program: Program, machine: str, backend: str) -> Kernel:
    made: Kernel = import_module(f"memcomp.codegen.{backend}").emit(lower(program), target(machine))
    return made


def compiled(name: str, machine: str, backend: str = "triton", before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What became of a name for a machine; `before` is what was recorded of it."""
    try:
        kernels = [text(p, machine, backend) for p in programs(name, machine, backend)]
        asked = repr((_compilers(backend), machine, [k.source for k in kernels]))
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        if before is not None and before.get("digest") == digest:
            return before
        return {"digest": digest, "launches": [x for k in kernels for x in launches(k)]}
    except MemcompError as error:
        return {"refused": str(error).splitlines()[0]}


def _compilers(backend: str) -> list[str]:
    def there(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    return [there(p) for p in COMPILERS[backend]]


def _task(task: Task) -> tuple[Task, dict[str, Any]]:
    return task, compiled(*task)


def recorded() -> Found:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(found: Found) -> None:
    """One line a name, machine and backend, in order."""
    order = {n: i for i, n in enumerate(names())}
    every = [key(m, b) for b in BACKENDS for m in TARGETS]
    parts = []
    for name in sorted((n for n in found if n in order), key=order.__getitem__):
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(found[name][k])}" for k in every if k in found[name])
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def line(name: str, where: str, told: dict[str, Any]) -> str:
    if "refused" in told:
        return f"{name:36} {where:8} REFUSED: {told['refused']}"
    return "\n".join(
        f"{name:36} {where:8} {x['name']:16} {x['num_warps']} warps, {x['shared']:>7} B, "
        f"{x['registers']:>3} registers, {x['spills']} spills, {x['rows']} rows, "
        f"{', '.join(f'{i} {n}' for i, n in x['instructions'].items() if n)}; loads {x['loads']}"
        for x in told["launches"])


def taken(backend: str, machine: str) -> bool:
    return backend != "gluon" or target(machine).capability == 90


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--target", nargs="*", default=TARGETS, choices=TARGETS)
    args.add_argument("--backend", nargs="*", default=BACKENDS, choices=BACKENDS)
    args.add_argument("--only", default="", help="names that hold this word")
    args.add_argument("--jobs", type=int, default=1)
    args.add_argument("--again", action="store_true", help="what is recorded too")
    chosen = args.parse_args()
    found = recorded()
    tasks: list[Task] = [(n, m, b, found.get(n, {}).get(key(m, b), {})) for b in chosen.backend for m in chosen.target
                         for n in names() if taken(b, m) and chosen.only in n]
    tasks = [t for t in tasks if chosen.again or not t[3]]
    done, batch = 0, TASKS * chosen.jobs
    for begun in range(0, len(tasks), batch):  # a pool whose workers end by themselves waits for them for ever (3.11)
        with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
            for made in as_completed([pool.submit(_task, t) for t in tasks[begun:begun + batch]]):
                (name, machine, backend, _), told = made.result()
                done += 1
                found.setdefault(name, {})[key(machine, backend)] = told
                record(found)
                print(f"[{done}/{len(tasks)}] {line(name, key(machine, backend), told)}", flush=True)


if __name__ == "__main__":
    main()
