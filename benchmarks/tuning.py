"""What the cost model's choice costs, and what tuning finds: regret of `off` and `quick` against the best of `full`.

`python benchmarks/tuning.py [--only WORD ...] [--full SECONDS]` tunes programs of the bench cases in both modes, then
races the three choices in turn in one process, prints a table and writes benchmarks/results/tuning.json, each case as
soon as it is done; a case that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import memcomp
from memcomp.cache import Choice
from memcomp.config import Config
from memcomp.ir.program import Program
from memcomp.models.bench import cases
from memcomp.tune.search import Tuner
from memcomp.tune.tasks import Given
from memcomp.workers import OK, Job

RESULTS = Path(__file__).parent / "results" / "tuning.json"
RACE = 4.0  # seconds


def measured(tuner: Tuner, program: Program, sizes: Mapping[str, int], full: float) -> dict[str, Any]:
    """Medians of the three choices, raced, and what the searches did."""
    config = Config(tune="off")
    found = {"full": tuner.tune(program, config, sizes, mode="full", seconds=full),
             "quick": tuner.tune(program, config, sizes, mode="quick")}
    from memcomp.pipeline import tunable

    choices: dict[str, Choice] = {"off": tunable(program, config=config, sizes=sizes).modelled,
                                  **{mode: e.choice for mode, e in found.items()}}
    raced = list(dict.fromkeys(choices.values()))
    given = Given(str(program), (("tune", "off"), ("cache", "off")), tuple(sizes.items()))
    answer = tuner.ask(Job("race", (given, tuple(raced), RACE)))
    if answer.state != OK:
        return {"failed": answer.why}
    times = dict(zip(raced, answer.told["medians"], strict=True))
    spreads = dict(zip(raced, answer.told["spreads"], strict=True))
    best = min(times.values())
    return {"seconds": {m: times[c] for m, c in choices.items()}, "spread": {m: spreads[c] for m, c in choices.items()},
            "regret": {m: times[c] / best for m, c in choices.items()},
            "tried": {m: e.measured.how for m, e in found.items()}, "rejected": len(found["full"].rejected)}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--only", nargs="*", default=[])
    args.add_argument("--full", type=float, default=120.0, help="seconds of the full search of a program")
    chosen = args.parse_args()
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with Tuner() as tuner, torch.inference_mode():
        for case in cases():
            if case.name in done or chosen.only and not any(w in case.name for w in chosen.only):
                continue
            for region in memcomp.explain(case.fn, *case.inputs(), tune="off").regions[:1]:
                done[case.name] = measured(tuner, region.read, region.known, chosen.full)
                print(case.name, *(f"{m} {x:.2f}" for m, x in done[case.name].get("regret", {}).items()), flush=True)
                RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    for mode in ("off", "quick", "full"):
        if regrets := [x["regret"][mode] for x in done.values() if "regret" in x]:
            print(f"{mode}: median {statistics.median(regrets):.3f}, worst {max(regrets):.3f} of {len(regrets)}")


if __name__ == "__main__":
    main()
