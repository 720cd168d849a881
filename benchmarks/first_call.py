"""The first call of SmolLM2, from capture to running: memcomp with Inductor beside Inductor alone.

    python benchmarks/first_call.py [--rounds N]

Each measurement is a fresh process with an empty compile cache: a prefill of 512 tokens and two decode steps.
Inductor takes two minutes, give or take half a minute on a shared machine; beside the difference of the two stands
therefore what memcomp spent itself, on capture, rewrites, lowering and building its kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from measure import record, terminal

BACKENDS, BAR = ("inductor", "memcomp"), 10.0  # seconds that memcomp may need more


def child(backend: str) -> None:
    """Print {"prefill": s, "decode": s} of the first call in this process."""
    import torch

    from memcomp import smollm
    from memcomp.demo import prompt

    lm = smollm.load()
    ids = prompt(lm)
    smollm.greedy(lm.model, lm.model.config, ids, 3)  # eager first: loading and page faults are not compiling
    own = [0.0]
    if backend == "memcomp":
        _time_own(own)
    begin = time.perf_counter()
    found = smollm.greedy(torch.compile(lm.model, dynamic=True, backend=backend), lm.model.config, ids, 3)
    out: dict[str, Any] = {"total": time.perf_counter() - begin, "prefill": found.prefill, "decode": found.decode}
    if backend == "memcomp":
        import memcomp

        out |= {"own": own[0], "stats": memcomp.stats()}
    print(json.dumps(out))


def _time_own(seconds: list[float]) -> None:
    """Add up in `seconds` what the backend takes before it hands the rest of a graph to Inductor."""
    from memcomp import backend

    install = backend.install

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        out = install(*args)
        seconds[0] += time.perf_counter() - begin
        return out

    backend.install = timed


def measured(backend: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cold:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold}
        done = subprocess.run([sys.executable, __file__, "--child", backend], env=environment, check=True,
                              stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"backend": backend, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    console, results = terminal(), []
    for _ in range(args.rounds):
        for backend in BACKENDS:
            with console.status(backend):
                results.append(measured(backend))
            console.print(f"{backend}: {results[-1]['total']:.1f} s (prefill {results[-1]['prefill']:.1f}, "
                          f"decode {results[-1]['decode']:.1f})")
    median = {b: statistics.median(r["total"] for r in results if r["backend"] == b) for b in BACKENDS}
    more = median["memcomp"] - median["inductor"]
    own = statistics.median(r["own"] for r in results if r["backend"] == "memcomp")
    console.print(f"memcomp needs {more:+.1f} s more than Inductor alone, at most {BAR:g} allowed; its own {own:.1f} s")
    console.print(f"written: {record(__file__, results)}")
    return 1 if more > BAR else 0


if __name__ == "__main__":
    raise SystemExit(main())
