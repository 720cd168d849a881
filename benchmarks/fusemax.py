"""FuseMax's evaluation by the cost model: every row of its table, its headline means, its two figures.

    python benchmarks/fusemax.py

Each configuration is a program of `benchmarks/fusemax/` (cascade, mapping, bindings) on a machine of `ir/targets`, and
goes the way of `memcomp cost`.  Only the traffic of FLAT is taken from the table: the outcome of FLAT's own search.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from memcomp.config import config
from memcomp.ir.cost import Cost, cost
from memcomp.ir.program import Program
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.pipeline import map_program

HERE = Path(__file__).parent
FOLDER = HERE / "fusemax"
BATCH = 64
# model -> width D, head size E = F, heads H, width S of the feed-forward block
MODELS = {"BERT": (768, 64, 12, 3072), "TrXL": (1024, 64, 16, 4096), "T5": (512, 64, 8, 2048),
          "XLM": (2048, 128, 16, 8192)}
CONFIGS = {"unfused": "unfused", "FLAT": "flat", "+Cascade": "cascade", "+Architecture": "architecture",
           "+Binding": "binding"}  # as the table calls it -> its program
COLOURS = ("#8a8f98", "#c98a2b", "#4f9d69", "#3f7fbf", "#a04fa0")
BAR, GAP = 9, 8


@dataclass(frozen=True)
class Row:
    """One row of the table, and the same by the model."""

    model: str
    length: int
    config: str
    latency: float
    published_latency: float
    traffic: float
    published_traffic: float
    array: float
    published_array: float
    vector: float
    published_vector: float
    linear: float
    published_linear: float


@lru_cache
def program(name: str) -> Program:
    return parse((FOLDER / f"{name}.mc").read_text(encoding="utf-8"))


def spend(name: str, sizes: dict[str, int], moved: float | None = None) -> Cost:
    """What `memcomp cost NAME.mc --target T --size ... [--traffic ...]` computes, T being the program's own machine."""
    p = program(name)
    return cost(map_program(p, config=config({"target": p.target}), sizes=sizes), sizes, target(p.target), moved)


@lru_cache
def rows() -> tuple[Row, ...]:
    """The whole table."""
    out = []
    with (FOLDER / "attention.csv").open(newline="") as file:
        for r in csv.DictReader(file):
            d, e, h, s = MODELS[r["model"]]
            n = int(r["seq_len"][:-1]) << {"K": 10, "M": 20}[r["seq_len"][-1]]
            moved = float(r["traffic_bytes"])
            got = spend(CONFIGS[r["config"]], {"B": BATCH, "H": h, "P": n, "M": n, "E": e, "F": e},
                        moved if r["config"] == "FLAT" else None)
            busy = {u.name: u.utilisation for u in got.units}
            linear = spend("linear", {"B": BATCH, "P": n, "D": d, "S": s})
            out.append(Row(r["model"], n, r["config"], got.seconds, float(r["latency_s"]), got.traffic, moved,
                           busy["array"], float(r["util_2d"]), busy["vector"], float(r["util_1d"]),
                           linear.seconds, float(r["linear_latency_s"])))
    return tuple(out)


def worst(found: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Configuration -> column -> the largest relative difference from the table."""
    out: dict[str, dict[str, float]] = {}
    for r in found:
        mine = out.setdefault(r.config, {})
        for column in ("latency", "traffic", "array", "vector", "linear"):
            off = abs(getattr(r, column) / getattr(r, f"published_{column}") - 1)
            mine[column] = max(mine.get(column, 0.0), off)
    return out


def speedups(found: Iterable[Row], of: str, over: str, linear: bool) -> list[float]:
    """Time of `over` / time of `of`, for each model and length; linear: with the rest of the layer."""
    time = {(r.config, r.model, r.length): r.latency + (r.linear if linear else 0.0) for r in found}
    return [t / time[of, m, n] for (c, m, n), t in time.items() if c == over]


def means(found: Iterable[Row]) -> dict[str, float]:
    """The headline figures: arithmetic means of ratios, as the paper has them."""
    found = tuple(found)
    return {f"{what} over {over}": fmean(speedups(found, "+Binding", over, linear))
            for over in ("FLAT", "unfused") for what, linear in (("attention", False), ("end to end", True))}


def figure(title: str, bands: list[tuple[str, float, Callable[[Row], float]]], found: tuple[Row, ...]) -> str:
    """Bars by model, length and configuration, one band a measure, as SVG that follows a light or dark page."""
    lengths = sorted({r.length for r in found})
    group = BAR * len(CONFIGS) + GAP
    panel, tall = group * len(lengths) + 24, 150
    width, height = 56 + panel * len(MODELS), 66 + (tall + 46) * len(bands)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           f'font-size="11" role="img"><title>{title}</title><style>text{{fill:#222}}line{{stroke:#999}}'
           '@media(prefers-color-scheme:dark){text{fill:#ddd}line{stroke:#777}}</style>',
           f'<text x="8" y="18" font-size="14">{title}</text>']
    for k, (name, colour) in enumerate(zip(CONFIGS, COLOURS, strict=True)):
        out.append(f'<rect x="{56 + 120 * k}" y="28" width="10" height="10" fill="{colour}"/>'
                   f'<text x="{70 + 120 * k}" y="37">{name}</text>')
    for b, (label, most, value) in enumerate(bands):
        base = 52 + (tall + 46) * b + tall
        out.append(f'<text x="8" y="{base - tall}">{label}</text>')
        for part in range(5):
            y = base - (tall - 16) * part / 4
            out.append(f'<line x1="50" x2="{width - 8}" y1="{y:g}" y2="{y:g}" stroke-width="0.5"/>'
                       f'<text x="46" y="{y + 4:g}" text-anchor="end">{most * part / 4:.3g}</text>')
        for m, model in enumerate(MODELS):
            left = 56 + panel * m
            out.append(f'<text x="{left + panel / 2 - 12:g}" y="{base + 30}" text-anchor="middle">{model}</text>')
            for i, n in enumerate(lengths):
                said = f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K"
                at = left + group * i
                out.append(f'<text x="{at + (group - GAP) / 2:g}" y="{base + 14}" text-anchor="middle">{said}</text>')
                for k, name in enumerate(CONFIGS):
                    v = value(next(r for r in found if (r.model, r.length, r.config) == (model, n, name)))
                    high = (tall - 16) * v / most
                    out.append(f'<rect x="{at + BAR * k}" y="{base - high:.2f}" width="{BAR - 1}" height="{high:.2f}" '
                               f'fill="{COLOURS[k]}"><title>{model} {said} {name}: {v:.3g}</title></rect>')
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    from measure import RESULTS, record, terminal
    from rich.table import Table

    found = rows()
    slow = {(r.model, r.length): r for r in found if r.config == "unfused"}

    def faster(linear: bool) -> Callable[[Row], float]:
        def ratio(r: Row) -> float:
            base = slow[r.model, r.length]
            return (base.latency + linear * base.linear) / (r.latency + linear * r.linear)

        return ratio

    def top(value: Callable[[Row], float]) -> float:
        return float(math.ceil(max(map(value, found)) / 4) * 4)

    bands = [(f"{name}: times faster than unfused", top(faster(k)), faster(k))
             for name, k in (("attention", False), ("end to end", True))]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fusemax_speedup.svg").write_text(figure("Speed-up by the cost model", bands, found))
    (RESULTS / "fusemax_utilisation.svg").write_text(figure("Utilisation by the cost model", [
        ("256 x 256 array", 1.0, lambda r: r.array), ("256 x 1 vector", 1.0, lambda r: r.vector)], found))
    off, head = worst(found), means(found)
    table = Table("configuration", *next(iter(off.values())), title="largest relative difference from the table")
    for name, columns in off.items():
        table.add_row(name, *(f"{x:.2e}" for x in columns.values()))
    console = terminal()
    console.print(table)
    for name, value in head.items():
        console.print(f"FuseMax {name}: {value:.3f}x")
    record(__file__, [{"means": head, "worst": off}, *map(asdict, found)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
