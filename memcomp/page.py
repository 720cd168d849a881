"""explain as one page of HTML: all inline, no script, nothing fetched; light and dark; read with the keyboard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from importlib.resources import files

from memcomp import drawing
from memcomp.config import config
from memcomp.ir.cost import Cost, cost
from memcomp.ir.program import Program
from memcomp.ir.show import show_einsum
from memcomp.ir.target import target
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.ir.traversal import passes, stages, traversals
from memcomp.pipeline import compile_program
from memcomp.report import Explanation, RegionReport, by_kernel, size_of


@dataclass(frozen=True)
class _Story:
    """What the stations made of a region: each program in turn, then the tiles and the kernel's text."""

    programs: tuple[tuple[str, Program], ...]
    tiles: TileProgram
    kernel: Kernel
    spent: Cost
    rank: str  # over which the form that was read takes most passes

    @property
    def read(self) -> Program:
        return dict(self.programs)["canonicalize"]

    @property
    def run(self) -> Program:
        return self.programs[-1][1]


def page(found: Explanation) -> str:
    """The whole explanation as one HTML document."""
    groups = by_kernel(found.regions)
    parts = [_region(k, same) for k, same in enumerate(groups)]
    links = "".join(f'<li><a href="#r{k}">{escape(same[0].source)}</a></li>' for k, same in enumerate(groups))
    if not groups:
        parts = ["<p>No regions: nothing here is an attention or memory layer that memcomp can express.</p>"]
    if found.refusals:
        rows = "".join(f"<li>{escape(str(r))}</li>" for r in found.refusals)
        parts.append(f'<section id="left"><h2>Left to torch</h2><ul>{rows}</ul></section>')
        links += '<li><a href="#left">left to torch</a></li>'
    style = (files("memcomp") / "page.css").read_text(encoding="utf-8")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f"<title>memcomp explains</title><style>{style}</style></head><body>"
            '<a class="skip" href="#main">to the content</a><header><h1>What memcomp makes of this</h1>'
            f'<nav aria-label="regions"><ul>{links}</ul></nav></header>'
            f'<main id="main">{"".join(parts)}</main></body></html>\n')


def _tell(r: RegionReport) -> _Story:
    """The way of the region through the stations once more, watched; nothing is built."""
    seen: list[tuple[str, object]] = []
    options = {"target": r.program.target, "backend": r.kernels[0].backend}
    compile_program(r.read, config=config(options), observe=lambda s, v: seen.append((s, v)), sizes=r.known)
    programs = tuple((s, v) for s, v in seen if isinstance(v, Program))
    tiles = next(v for _, v in seen if isinstance(v, TileProgram))
    kernel = next(v for _, v in seen if isinstance(v, Kernel))
    before = passes(dict(programs)["canonicalize"])
    most = max(before.values(), default=0)
    rank = next((rank for (_, rank), n in before.items() if n == most), "")
    return _Story(programs, tiles, kernel, cost(programs[-1][1], r.sizes, target(r.program.target)), rank)


def _region(k: int, same: Sequence[RegionReport]) -> str:
    r = same[0]
    t = _tell(r)
    more = "".join(f"<li>{escape(x.source)}</li>" for x in same[1:])
    at = ", ".join(f"{n} = {x}" for n, x in sorted(r.sizes.items()))
    return "".join([
        f'<section id="r{k}"><h2>{escape(r.source)}</h2>',
        f"<p>and {len(same) - 1} more like it, with the same kernel</p><ul>{more}</ul>" if more else "",
        _facts(t), f"<p>Figures are for {escape(at)}.</p>" if at else "",
        _graphs(k, t), _derivation(t), _skipping(r), _traffic(t), _wide(r), _kernels(t, k), "</section>"])


def _facts(t: _Story) -> str:
    after = max((n for (_, rank), n in passes(t.run).items() if rank == t.rank), default=0)
    before = max((n for (_, rank), n in passes(t.read).items() if rank == t.rank), default=0)
    ratio = t.spent.traffic / t.spent.compulsory if t.spent.compulsory else 1.0
    facts = [(f"passes over {t.rank}", f"{before} → {after}" if before != after else str(after)),
             ("kernels launched", str(t.kernel.launches)),
             ("traffic over compulsory", f"{ratio:.2f}×"), ("time by the model", _time(t.spent.seconds)),
             *((f"{u.name} busy", f"{u.utilisation:.1%}") for u in t.spent.units)]
    return '<dl class="facts">' + "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>"
                                          for a, b in facts) + "</dl>"


def _graphs(k: int, t: _Story) -> str:
    out = [f"<h3>The cascade, coloured by the pass over {escape(t.rank)} in which a tensor is made</h3>",
           '<p class="legend">', '<span class="key in">input</span><span class="key p0">no pass</span>',
           *(f'<span class="key p{n}">pass {n}</span>' for n in range(1, drawing.COLOURS + 1)
             if n in {*stages(t.read, t.rank).values(), *stages(t.run, t.rank).values()}),
           '<span class="dash">carried to the next round</span></p><div class="pair">']
    for name, said, p in (("read", "As read", t.read), ("run", "As run", t.run)):
        anchor = f"r{k}-{name}"
        lines, held = [], set[str]()
        for e in p.cascade.einsums:
            ids = "".join(f'<a id="{anchor}-{escape(n)}"></a>' for n in e.names if n not in held)
            held |= set(e.names)
            lines.append(f"{ids}{escape(show_einsum(e))}")
        inputs = "".join(f'<a id="{anchor}-{escape(x.name)}"></a>' for x in p.cascade.inputs() if x.name not in held)
        out.append(f'<figure><figcaption>{said}</figcaption><div class="scroll" tabindex="0">'
                   f"{drawing.cascade(p.cascade, stages(p, t.rank), anchor)}</div>"
                   f"<details open=\"open\"><summary>statements</summary><pre tabindex=\"0\">{inputs}"
                   + "\n".join(lines) + "</pre></details></figure>")
    return "".join([*out, "</div>", _chains(t)])


def _chains(t: _Story) -> str:
    """Why the form that was read walks so often: the longest chains of dependences."""
    rows = [(x.tensor, x.passes, x.chain) for x in traversals(t.read, {t.rank}) if x.passes > 1]
    inputs = {x.name for x in t.read.cascade.inputs()}
    said = "".join(f"<li><b>{escape(name)}</b>, {n} passes: " + " <em>again</em> ".join(
        escape(" → ".join(group)) for group in chain) + "</li>" for name, n, chain in rows if name in inputs)
    return f"<p>Why the form that was read walks over {escape(t.rank)} more than once:</p><ul>{said}</ul>" * bool(said)


def _derivation(t: _Story) -> str:
    proofs = "".join(f"<li>{escape(x)}</li>" for x in t.run.proofs)
    out = ["<h3>The derivation</h3>", f"<ol>{proofs}</ol>" if proofs else "<p>No law was needed.</p>"]
    for (_, old), (station, new) in zip(t.programs, t.programs[1:], strict=False):
        if str(old) == str(new):
            out.append(f'<p class="same">{escape(station)}: nothing to do</p>')
            continue
        before, after = str(old).splitlines(), str(new).splitlines()
        left, right = [], []
        for tag, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            keep = tag == "equal"
            left += [escape(x) if keep else f"<del>{escape(x)}</del>" for x in before[a:b]]
            right += [escape(x) if keep else f"<ins>{escape(x)}</ins>" for x in after[c:d]]
        # the two columns are read one after the other, so neither needs the other's line breaks
        out.append(f"<details><summary>{escape(station)}</summary><div class=\"pair\">"
                   f'<figure><figcaption>before</figcaption><pre tabindex="0">{chr(10).join(left)}</pre></figure>'
                   f'<figure><figcaption>after</figcaption><pre tabindex="0">{chr(10).join(right)}</pre></figure>'
                   "</div></details>")
    return "".join(out)


def _skipping(r: RegionReport) -> str:
    out = ["<h3>Rounds that guards leave out</h3>"]
    for x in r.rounds:
        most = " No guard proves a whole tile empty." if x.total and x.run == x.total else ""
        out.append(f"<p>{escape(x.kernel)}: <code>{escape(x.loop)}</code></p><p>{escape(str(x))}.{most}</p>"
                   f'<div class="scroll" tabindex="0">{drawing.rounds(x)}</div>')
    if len(out) == 1:
        out.append("<p>No kernel has a loop of its own: there is nothing to shrink.</p>")
    else:
        out.append('<p class="legend"><span class="key full">full tile, no mask</span><span class="key part">with mask'
                   '</span><span class="key rest">left out</span></p>')
    return "".join(out)


def _traffic(t: _Story) -> str:
    most = max(t.spent.compulsory, *(x.traffic for x in t.spent.levels))
    rows = []
    for x in t.spent.levels:
        ratio = x.traffic / t.spent.compulsory if t.spent.compulsory else math.nan
        long, least = 260 * x.traffic / most, 260 * t.spent.compulsory / most
        rows.append(f'<tr><th scope="row">{escape(x.name)}</th><td>{size_of(x.traffic)}</td><td>{ratio:.2f}×</td>'
                    f"<td>{size_of(x.footprint)}</td><td><svg class=\"bar\" width=\"270\" height=\"16\" role=\"img\" "
                    f'aria-label="{ratio:.2f} times the compulsory traffic"><rect x="0" y="3" width="{long:.1f}" '
                    f'height="10"/><line x1="{least:.1f}" x2="{least:.1f}" y1="0" y2="16"/></svg></td></tr>')
    return ("<h3>Traffic against the compulsory bound</h3><p>Each input read once, each output written once: "
            f'{size_of(t.spent.compulsory)} (the line in the bars).</p><div class="scroll" tabindex="0"><table><thead>'
            "<tr>"
            '<th scope="col">level</th><th scope="col">comes in</th><th scope="col">over compulsory</th>'
            '<th scope="col">holds</th><th></th></tr></thead><tbody>' + "".join(rows) + "</tbody></table></div>")


def _wide(r: RegionReport) -> str:
    said = "".join(f"<li>{escape(x.line(size_of))}</li>" for x in r.wide)
    return f"<h3>Long rows of running states</h3><ul>{said}</ul>" if said else ""


def _kernels(t: _Story, k: int) -> str:
    texts: Mapping[str, str] = {"tile program": str(t.tiles), f"kernel {t.kernel.name} ({t.kernel.backend})":
                                t.kernel.source}
    return "<h3>The kernels</h3>" + "".join(
        f'<details id="r{k}-kernel{i}"><summary>{escape(name)}</summary>'
        f'<pre class="long" tabindex="0">{escape(text)}</pre></details>'
        for i, (name, text) in enumerate(texts.items()))


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
