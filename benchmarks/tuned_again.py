"""The first call of layers that were tuned before, beside that of the same layers as the cost model maps them.

    python benchmarks/tuned_again.py [--rounds N]

The layers are tuned once, into a folder of their own; then fresh processes compile and call each of them in turn with
that cache, which they may only read, and without any.  Says how many measurements were made then.
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

CASES = ("prefill f32 (1, 8, 1024, 64) causal", "variant bf16 window (1, 8, 2048, 64)",
         "decode bf16 group 4 dim 128 keys 2048", "layer f32 RMSNorm + linear (2048, 576) -> 1536")
BAR = 1.5


def child(tune: str) -> None:
    """Print {case: seconds of its first call} and how many candidates were measured."""
    import torch

    from memcomp import pipeline
    from memcomp.models.bench import cases
    from memcomp.tune.search import Tuner

    search, asked = Tuner.search, [0]

    def counted(self: Tuner, *a: Any, **k: Any) -> Any:
        found = search(self, *a, **k)
        asked[0] += len(found.search.trials)
        return found

    Tuner.search = counted  # type: ignore[method-assign]
    known, seconds = {c.name: c for c in cases()}, {}
    torch.compile(torch.sin, backend="memcomp")(torch.ones(3))  # imports
    with torch.inference_mode():
        for name in CASES:
            case = known[name]
            args = case.inputs()
            torch._dynamo.reset()
            pipeline.forget()
            begin = time.perf_counter()
            torch.compile(case.fn, backend="memcomp", dynamic=False, options={
                "tune": tune, "rest": "eager", "strict": True, **case.options})(*args)
            seconds[name] = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "measured": asked[0]}))


def run(tune: str, folder: str, cache: str) -> dict[str, Any]:
    environment = {**os.environ, "MEMCOMP_CACHE": cache, "MEMCOMP_CACHE_DIR": folder}
    done = subprocess.run([sys.executable, __file__, "--child", tune], env=environment, check=True,
                          stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    console, runs = terminal(), {"cached": [], "off": []}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as folder:
        first = run("quick", folder, "on")
        console.print(f"tuned: {first['measured']} candidates measured")
        for _ in range(args.rounds):
            for tune in runs:
                runs[tune].append(run(tune, folder, "read"))
    again = sum(r["measured"] for r in runs["cached"])
    rows = []
    for name in CASES:
        off, cached = (statistics.median(r["seconds"][name] for r in runs[t]) for t in ("off", "cached"))
        rows.append({"case": name, "off": off, "cached": cached, "ratio": cached / off})
        console.print(f"{name}: first call {cached:.2f} s with the cache, {off:.2f} s by the cost model, "
                      f"{cached / off:.2f}x, at most {BAR}x")
    console.print(f"{again} candidates measured again, none asked; written: {record(__file__, rows)}")
    return int(again > 0 or first["measured"] == 0 or any(r["ratio"] > BAR for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
