"""Random cascades against what they are rewritten to: how many, how many wrong, and how often each law was used.

    python benchmarks/random_cascades.py [--count 20000] [--jobs 1] [--again]
    python benchmarks/random_cascades.py --break-rows

Chunks of 250 seeds; the table in results/random_cascades.json is written after each.  A run that was stopped goes on
where it was and tries again what failed.  A seed that fails is listed with its reason; `tests/random_cascades.py` makes
its program from the seed.

--break-rows makes each row of the law table false (or drops it, where it only says yes) and writes who noticed to
results/broken_laws.json: numbers (the table's own check), wrong (random chains with other values, or a crash), refused
(random chains rewritten by fewer laws); chains until the first wrong one, at most 300.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "random_cascades.json"
CHUNK = 250


def chunk(seeds: range) -> dict[str, Any]:
    from memcomp.ir.laws import named
    from tests.random_cascades import cascade, difference

    start = time.perf_counter()
    used: Counter[str] = Counter()
    fewer, trees, wrong = 0, 0, {}
    for seed in seeds:
        try:
            program, why, merged = difference(cascade(seed), seed)
        except Exception as error:  # a crash is a result
            program, why, merged = None, f"{type(error).__name__}: {error}", False
        if why:
            wrong[str(seed)] = why
        if program is not None:
            fewer += 1
            trees += merged
            used.update(named(program.proofs))
    return {"cascades": len(seeds), "rewritten": fewer, "merged in trees": trees, "wrong": wrong, "laws": used,
            "seconds": time.perf_counter() - start}


def break_rows() -> None:
    from memcomp.ir.laws import laws
    from tests.broken_laws import noticed

    found = {}
    for row in laws():
        found[row.name] = noticed(row.name, range(300))
        print(row.name, found[row.name], flush=True)
        (RESULT.parent / "broken_laws.json").write_text(json.dumps(found, indent=1) + "\n")
    unseen = [name for name, n in found.items() if not (n["numbers"] or n["wrong"] or n["refused"])]
    print(f"rows whose falsehood nobody noticed: {', '.join(unseen) or 'none'}")
    sys.exit(bool(unseen))


def main() -> None:
    from memcomp.ir.laws import laws

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=20000)
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--again", action="store_true", help="forget what was run before")
    p.add_argument("--break-rows", action="store_true")
    args = p.parse_args()
    if args.break_rows:
        break_rows()
    total: dict[str, Any] = {"cascades": 0, "rewritten": 0, "merged in trees": 0, "wrong": {}, "seconds": 0.0,
                             "laws": {}}
    if RESULT.exists() and not args.again:
        total = json.loads(RESULT.read_text())
    for seed in list(total["wrong"]):  # what failed is tried again, so that a mended fault leaves the record
        part = chunk(range(int(seed), int(seed) + 1))
        if not part["wrong"]:
            del total["wrong"][seed]
            total["rewritten"] += part["rewritten"]
            total["merged in trees"] += part["merged in trees"]
        RESULT.write_text(json.dumps(total, indent=1) + "\n")
    starts = range(total["cascades"], args.count, CHUNK)
    with ProcessPoolExecutor(args.jobs) as pool:
        for part in pool.map(chunk, (range(k, min(k + CHUNK, args.count)) for k in starts)):
            for key in ("cascades", "rewritten", "merged in trees", "seconds"):
                total[key] = round(total[key] + part[key], 1)
            total["wrong"] |= part["wrong"]
            total["laws"] = {x.name: total["laws"].get(x.name, 0) + part["laws"][x.name] for x in laws()}
            RESULT.write_text(json.dumps(total, indent=1) + "\n")
            print(*(f"{total[key]} {key}" for key in ("cascades", "rewritten")), f"{len(total['wrong'])} wrong",
                  sep=", ", flush=True)
    unused = [name for name, n in total["laws"].items() if not n]
    print(f"laws never used: {', '.join(unused) or 'none'}")
    sys.exit(bool(total["wrong"] or unused))


if __name__ == "__main__":
    main()
