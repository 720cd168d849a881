"""What the cost model's choice costs, and what tuning finds: regret over the CPU cases of `memcomp bench`.

    python benchmarks/tuning.py [--only WORD ...] [--seconds S] [--again]

A case is tuned in mode `full`, within S seconds and not its ten minutes.  What `quick` would have tried in its own time
is among that: those of its candidates that were done when its time for them was over; its race is run anew.  Then the
choices of all modes take turns in one process.  results/tuning.json is written after each case, and a case that is
there is not measured again without --again, so a run that was stopped goes on; docs/tuning.md gets the table.

Where the cost model's choice is slower than the fastest by no more than half of the spread, a mode takes it: `raw` is
the choice without this rule.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import machine, terminal

from memcomp.backend import region_sizes
from memcomp.cache import Choice
from memcomp.capture.find import find_regions
from memcomp.config import Config
from memcomp.ir.program import Program
from memcomp.models.bench import Case, cases
from memcomp.tune.search import MODES, Timed, Tuner, ranked, winners
from memcomp.tune.tasks import Given
from memcomp.workers import OK, Job

RESULTS, DOCS = Path(__file__).parent / "results" / "tuning.json", Path(__file__).parent.parent / "docs" / "tuning.md"
HEADING = "\n## Regret\n"
RACE = 2.0  # seconds of quick's race, and of the last one
WAYS = ("off", "quick", "quick raw", "full", "full raw")
BARS = {"quick": 1.10, "off": 1.30}  # on the median, against the best


def program(case: Case) -> tuple[Program, Mapping[str, int]]:
    """The first region of a case, with the extents of its symbolic ranks; nothing is compiled."""
    found: list[tuple[Program, Mapping[str, int]]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        regions, _ = find_regions(gm, case.options.get("chains", "gain"))
        found.extend((r.program, region_sizes(r)) for r in regions)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(case.fn, backend=backend, dynamic=False)(*case.inputs())
    return found[0]


def raced(tuner: Tuner, given: Given, choices: Sequence[Choice]) -> dict[Choice, Timed]:
    answer = tuner.ask(Job("race", (given, tuple(choices), RACE)))
    if answer.state != OK:
        raise RuntimeError(answer.why)
    return {c: (m, s, answer.told["rounds"])
            for c, m, s in zip(choices, answer.told["medians"], answer.told["spreads"], strict=True)}


def measured(tuner: Tuner, read: Program, sizes: Mapping[str, int], seconds: float) -> dict[str, Any]:
    """What each way to choose takes, and how the search for it went."""
    when: list[float] = []
    found = tuner.search(read, Config(tune="off"), sizes, mode="full", seconds=seconds,
                         watch=lambda state: when.append(time.monotonic()))
    search, quick = found.search, MODES["quick"]
    in_time = sum(t - search.begin <= quick.seconds * (1 - quick.share) for t in when)
    likely, model = set(ranked(search.tunable, quick.slower)), search.tunable.modelled
    tried = [search.trials[c] for c in list(search.trials)[:in_time] if c in likely]
    fit = sorted((t for t in tried if t.state == OK), key=lambda t: t.seconds)[:quick.finalists]
    given = Given(str(read), (("tune", "off"), ("cache", "off")), tuple(sizes.items()))
    quickly = raced(tuner, given, list(dict.fromkeys((*(t.choice for t in fit), model))))
    chosen = {"off": model, "quick": winners(quickly, model)[0], "quick raw": min(quickly, key=lambda c: quickly[c][0]),
              "full": found.order[0], "full raw": min(found.timed, key=lambda c: found.timed[c][0])}
    last = raced(tuner, given, list(dict.fromkeys(chosen.values())))
    best = min(t[0] for t in last.values())
    return {"seconds": {w: last[c][0] for w, c in chosen.items()},
            "spread": {w: last[c][1] for w, c in chosen.items()},
            "regret": {w: last[c][0] / best for w, c in chosen.items()},
            "choice": {w: str(c) for w, c in chosen.items()},
            "mappings": len(search.tunable.space), "tried": len(search.trials), "tried by quick": len(tried),
            "rejected": len(search.rejected)}


def section(saved: Mapping[str, Any]) -> str:
    """The table, what of it is asked for, and how it was made."""
    m, done = saved["machine"], saved["cases"]
    features = ", ".join(f for f in m["features"] if f.startswith(("avx", "amx")))
    whole = sum(x["tried"] >= x["mappings"] for x in done.values())
    lines = [
        f"Written by `python benchmarks/tuning.py` from `benchmarks/results/tuning.json`: {len(done)} CPU cases of",
        f"`memcomp bench`, {saved['seconds']:g} s of `full` each (not its ten minutes; {whole} of the cases had every",
        f"mapping tried); {m['cores']} cores, {features}. Times over that of the case's fastest choice, raced in turn",
        "in one process; `raw`: without the rule that the cost model's choice wins where the measurement cannot tell.",
        "", "| way to choose | median | worst | cases that are surely slower than `off` |", "|---|---|---|---|"]
    for way in WAYS:
        regrets = [x["regret"][way] for x in done.values()]
        worse = [n for n, x in done.items() if surely_worse(x, way)]
        figures = f"{statistics.median(regrets):.3f} | {max(regrets):.3f}"
        lines.append(f"| {way} | {figures} | {', '.join(worse) or 'none'} |")
    lines += ["", "| case | ms | mappings, tried, by quick | off | quick | quick raw | full | full raw |",
              "|---|---|---|---|---|---|---|---|"]
    for name, x in done.items():
        counts = ", ".join(str(x[k]) for k in ("mappings", "tried", "tried by quick"))
        least = min(x["seconds"].values())
        spread = x["spread"][min(WAYS, key=lambda w: x["seconds"][w])]
        lines.append(f"| {name} | {least * 1e3:.3g} ± {spread:.0%} | {counts} | "
                     + " | ".join(f"{x['regret'][w]:.2f}" for w in WAYS) + " |")
    return "\n".join(lines) + "\n"


def surely_worse(x: Mapping[str, Any], way: str) -> bool:
    """Is it slower than the cost model's choice by more than the measurement wanders?"""
    return bool(x["seconds"][way] > x["seconds"]["off"] * (1 + max(x["spread"][way], x["spread"]["off"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--seconds", type=float, default=14.0, help="of a case's search (default 14)")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.again or saved.get("seconds") != args.seconds:  # other budgets are not to be compared
        saved = {"machine": machine(), "seconds": args.seconds, "cases": {}}
    console = terminal()
    with Tuner() as tuner, torch.inference_mode():
        for case in cases():
            if case.name in saved["cases"] or args.only and not any(w in case.name for w in args.only):
                continue
            begin = time.monotonic()
            row = saved["cases"][case.name] = measured(tuner, *program(case), args.seconds)
            RESULTS.write_text(json.dumps(saved, indent=1) + "\n")
            console.print(f"{case.name}: " + ", ".join(f"{w} {row['regret'][w]:.2f}" for w in WAYS)
                          + f" ({time.monotonic() - begin:.0f} s)")
    if not args.only:
        DOCS.write_text(DOCS.read_text().partition(HEADING)[0] + HEADING + "\n" + section(saved))
    late = {w: statistics.median(x["regret"][w] for x in saved["cases"].values()) for w in BARS}
    for way, median in late.items():
        console.print(f"{way}: {median:.3f} of the best on the median, at most {BARS[way]:.2f} asked")
    worse = [n for n, x in saved["cases"].items() if surely_worse(x, "quick")]
    console.print(f"quick is surely slower than off in {len(worse)} cases: {', '.join(worse) or 'none'}")
    return int(any(late[w] > bar for w, bar in BARS.items()) or bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
