"""All cases of `memcomp bench` on this CPU, into results/ and docs/cpu.md; exit code 1 where a bar is surely missed.

    python benchmarks/cpu.py [--rounds N] [--target avx2] [--only WORD ...]

--target avx2 holds memcomp and torch to AVX2 (ATEN_CPU_CAPABILITY).  --only measures these cases again and keeps the
others as they were recorded.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

RESULTS, DOCS = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "cpu.md"
FILES = {"cpu": RESULTS / "cpu.json", "avx2": RESULTS / "cpu_avx2.json"}
HEAD = """# Kernels on a CPU, beside their rivals

Written by `python benchmarks/cpu.py` (and `--target avx2`) from `benchmarks/results/`. One process a table; within a
case all rivals and a probe of the machine take turns on the same random data, on torch's threads; medians, and ± the
distance of the quartiles over the median. A ratio is the other's time over memcomp's; there is none ("-") where medians
and minima disagree. `of probe`: of torch.mm with as many operations, or of a loop that reads as many bytes; in brackets
that of memcomp's kernels alone, launched as that loop is and not through torch.compile. Errors are relative to float64
in the 2-norm: memcomp's / the best of the others. `holds`: bytes at the worst moment besides inputs and outputs.
"""


def page(saved: dict[str, dict[str, Any]]) -> str:
    lines = [HEAD]
    for target, found in saved.items():
        m = found["machine"]
        features = ", ".join(f for f in m["features"] if f.startswith(("avx", "amx")))
        lines += [f"## {'Held to AVX2' if target == 'avx2' else 'All instructions'}", "",
                  f"{m['cores']} cores, {m['threads']} threads, {features}; torch {m['versions']['torch']}.",
                  "", "| case | ms | GFLOP/s | GB/s | of probe | faster than (asked) | error | holds |",
                  "|---|---|---|---|---|---|---|---|"]
        lines += [row(r) for r in found["results"]]
        missed = [f"* {r['case']}: {x}" for r in found["results"] for x in r["missed"]]
        bars = sum(len(r["bars"]) for r in found["results"])
        lines += ["", f"{len(missed)} of {bars} bars are surely missed" + (":" if missed else "."), "", *missed, ""]
    return "\n".join(lines)


def row(r: dict[str, Any]) -> str:
    own = r["times"]["memcomp"]
    probe = next((n for n in r["ratios"] if n == "read" or n.startswith("products (")), "")
    asked = {n: bar for who, bar in r["bars"].items() for n in who.split(" / ")}
    ratios = [(f"{n} {q['value']:.2f}x" if q["sure"] else f"{n} -") + (f" ({asked[n]:.2f}x)" if n in asked else "")
              for n, q in r["ratios"].items() if n != probe or n in asked]
    others = [e for n, e in r["errors"].items() if n != "memcomp"]
    share = f"{r['ratios'][probe]['value']:.0%}" if probe else ""
    if alone := r.get("alone"):
        share += f" ({alone['value']:.0%})" if alone["sure"] else " (-)"
    errors = " / ".join(f"{e:.1e}" for e in (r["errors"]["memcomp"], *sorted(others)[:1]))
    cells = [r["case"], f"{own['median'] * 1e3:.3f} ± {own['spread']:.0%}",
             *(f"{r[k] / own['median'] / 1e9:.1f}" for k in ("flops", "bytes")),
             share, ", ".join(ratios), errors, f"{r['held']['memcomp'] / 1024:.0f} KiB"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--target", choices=FILES, default="cpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself on stderr
    if args.target == "avx2":
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    from memcomp.bench import Result, run, written  # torch reads the environment when it is imported

    file, found = FILES[args.target], list[Result]()

    def done(result: Result) -> None:
        found.append(result)
        print("\n".join(result.lines()), flush=True)

    run(args.only, args.rounds, done, args.target)
    now = json.loads(written(found))
    if args.only and file.exists():
        again = {r["case"]: r for r in now["results"]}
        kept = json.loads(file.read_text())["results"]
        now["results"] = [again.pop(r["case"], r) for r in kept] + list(again.values())
    file.write_text(json.dumps(now, indent=1) + "\n")
    DOCS.write_text(page({t: json.loads(f.read_text()) for t, f in FILES.items() if f.exists()}))
    return 1 if any(r["missed"] for r in now["results"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
