"""How long one region takes to compile in a new process: from torch.compile's call of the backend to a callable.

    python benchmarks/compile_time.py [--rounds N]

Each measurement is a process of its own, nothing is kept on disk, `rest="eager"`, knobs closed by cost.  Imports of
torch and of tvm stand apart, and what Dynamo does is left out; imports of memcomp's own modules (from byte code, as
installed) count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.machinery import SourceFileLoader
from typing import Any

from rich.table import Table

BAR = 1.0  # seconds
STATIONS = {  # what is timed -> the functions, by module and name
    "capture": [("memcomp.capture.find", "find_regions")],
    "rewrites": [("memcomp.pipeline", "rewrite")],
    "tune": [("memcomp.pipeline", "modelled")],
    "lower": [("memcomp.codegen.lower", "lower")],
    "emit": [("memcomp.codegen.tvm", "emit")],
    "read text": [("memcomp.codegen.tvm.script", "read")],
    "TVM": [("memcomp.codegen.tvm.build", "machine_code")],
    "LLVM": [("tvm.tirx.build", "codegen_build"), ("memcomp.codegen.tvm.launcher", "install")],
    "recheck": [("memcomp.pipeline", "recheck")],
    "verify": [("memcomp.pipeline", "verify")],
}
ROWS = ("imports", *STATIONS, "other")


def cases() -> dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """name -> (function, inputs)"""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

    def attention(**options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        qkv = torch.randn(3, 1, 8, 1024, 64).unbind()
        return functools.partial(scaled_dot_product_attention, **options), qkv

    def decode() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        cache = torch.randn(2, 1, 8, 4096, 128).bfloat16()
        return (functools.partial(scaled_dot_product_attention, enable_gqa=True),
                (torch.randn(1, 32, 1, 128).bfloat16(), *cache.unbind()))

    def normed() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (lambda x, g, w: linear(rms_norm(x, (576,), g), w),
                (torch.randn(512, 576), torch.randn(576), torch.randn(1536, 576)))

    return {"fp32 prefill": attention, "fp32 prefill, causal": lambda: attention(is_causal=True),
            "bf16 decode, group 4": decode, "RMSNorm + linear, fp32": normed}


class Clock:
    """Seconds by station, without what another station spends inside."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.inside: list[float] = []
        self.running = True  # else nothing is counted

    def timed(self, station: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if not self.running:
                return call(*args, **options)
            self.inside.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                spent = time.perf_counter() - begin
                self.seconds[station] += spent - self.inside.pop()
                if self.inside:
                    self.inside[-1] += spent

        return run


def child(case: str) -> None:
    """Print {"total": s, "stations": {station: s}, "apart": {what: s}} of a compilation in this process."""
    clock, apart = Clock(), Clock()
    apart.timed("import torch", import_module)("torch")
    import torch

    apart.timed("import tvm", import_module)("tvm.script")
    function, inputs = cases()[case]()
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # Dynamo's own imports
    SourceFileLoader.exec_module = clock.timed("imports", SourceFileLoader.exec_module)  # type: ignore[method-assign]
    whole = Clock()

    def imports() -> Callable[..., Any]:
        for station, names in STATIONS.items():
            for module, name in names:
                found = import_module(module)
                setattr(found, name, clock.timed(station, getattr(found, name)))
        backend: Callable[..., Any] = import_module("memcomp.backend").memcomp
        return backend

    def compiled(gm: Any, examples: Any) -> Any:
        clock.running = True
        try:
            return whole.timed("total", backend)(gm, examples, options={"rest": "eager", "strict": True})
        finally:
            clock.running = False

    backend, clock.running = whole.timed("total", imports)(), False
    with torch.inference_mode():
        torch.compile(function, backend=compiled)(*inputs)
    total = whole.seconds["total"]
    clock.seconds["other"] = total - sum(clock.seconds.values())
    print(json.dumps({"total": total, "stations": clock.seconds, "apart": apart.seconds}))


def measured(case: str, compiled: str) -> dict[str, Any]:
    """A compilation in a new process, Python's byte code kept in the folder `compiled`."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, __file__, "--child", case], env=environment, check=True,
                          stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    from measure import Times, record, terminal

    console = terminal()
    taken: dict[str, list[dict[str, Any]]] = {case: [] for case in cases()}
    with tempfile.TemporaryDirectory() as compiled, console.status("compiling"):
        for case in taken:
            measured(case, compiled)  # writes byte code
        for _ in range(args.rounds):
            for case, runs in taken.items():
                runs.append(measured(case, compiled))
    results: list[dict[str, Any]] = []
    for case, runs in taken.items():
        split = {c: statistics.median(r["stations"].get(c, 0.0) for r in runs) for c in ROWS}
        apart = {c: statistics.median(r["apart"][c] for r in runs) for c in runs[0]["apart"]}
        results.append({"case": case, "total": asdict(Times.of([r["total"] for r in runs])), "stations": split,
                        "apart": apart})
    table = Table("ms", *taken)
    for station in ROWS:
        table.add_row(station, *(f"{r['stations'][station] * 1e3:.0f}" for r in results))
    table.add_row("total", *(f"{r['total']['median'] * 1e3:.0f}, spread {r['total']['spread']:.0%}" for r in results))
    for what in results[0]["apart"]:
        table.add_row(f"apart: {what}", *(f"{r['apart'][what] * 1e3:.0f}" for r in results))
    slowest = max(r["total"]["median"] for r in results)
    console.print(table)
    console.print(f"slowest: {slowest:.2f} s, at most {BAR:g} allowed")
    console.print(f"written: {record(__file__, results)}")
    return 1 if slowest > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
