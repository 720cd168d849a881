"""All cases of `memcomp bench` on this CPU, into results/cpu.json; exit code 1 where a bar is surely missed.

    python benchmarks/cpu.py [--rounds N]
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself on stderr

import argparse

from measure import RESULTS

from memcomp.bench import Result, run, written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    found: list[Result] = []

    def done(result: Result) -> None:
        found.append(result)
        print("\n".join(result.lines()), flush=True)

    run(rounds=args.rounds, done=done)
    (RESULTS / "cpu.json").write_text(written(found))
    missed = [f"{r.case}: {m}" for r in found for m in r.missed()]
    print(f"{len(missed)} of {sum(len(r.bars) for r in found)} bars missed")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
