"""Pictures for the page that explains: a cascade as a graph, the rounds that guards leave, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from memcomp.ir.cascade import Cascade
from memcomp.ir.show import show_einsum, show_tensor
from memcomp.rounds import Rounds

ROW, HIGH, APART = 64, 36, 18  # distance of layers, height of a node, space between nodes
TALL, WIDE = 32, 64  # tiles shown at most, down and across
COLOURS = 6  # passes that the page has a colour for


# -- the cascade -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edge:
    start: str
    end: str
    carried: bool  # read in the next round of an iterative rank


def cascade(c: Cascade, passes: Mapping[str, int], anchor: str) -> str:
    """Tensors as nodes, coloured by the pass in which they are made, inputs above what reads them first.

    passes: tensor -> pass, 0 for none.  anchor: what the ids of the statements start with; each node links to its own.
    """
    said: dict[str, list[str]] = {}
    for t in c.tensors:
        if t.role in ("in", "state"):
            said[t.name] = [show_tensor(t)]
    inputs, last = set(said), {n: k for k, e in enumerate(c.einsums) for n in e.names}
    edges: dict[_Edge, None] = {}
    for k, e in enumerate(c.einsums):
        for name in e.names:
            said.setdefault(name, []).append(show_einsum(e))
            for source in sorted(e.reads()):
                if source != name:
                    edges[_Edge(source, name, last.get(source, -1) >= k)] = None
    ahead = [e for e in edges if not e.carried and e.start in said]
    depth = _depths(list(said), ahead, inputs)
    wide = {n: max(70.0, 8.6 * len(n) + 30) for n in said}
    paths, layers = _layers(depth, ahead, wide)
    at = _places(layers, paths, wide)
    width = max((at[n] + wide[n] / 2 for n in at), default=0) + 34
    height = (max(depth.values(), default=0) + 1) * ROW
    out = [f'<svg class="graph" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" role="img" '
           f'aria-label="the tensors of the cascade and what reads what">']
    level = {n: y for y, layer in enumerate(layers) for n in layer}
    for path in paths:
        points = [(at[n], level[n] * ROW + (HIGH if n in said and k == 0 else 0 if n in said else HIGH / 2))
                  for k, n in enumerate(path)]
        out.append(f'<path class="edge" d="{_curve(points)}"/>')
    for edge in edges:
        if edge.carried and edge.start in said:
            x1, x2 = at[edge.start] + wide[edge.start] / 2, at[edge.end] + wide[edge.end] / 2
            y1, y2 = (level[n] * ROW + HIGH / 2 for n in (edge.start, edge.end))
            side = max(x1, x2) + 26
            out.append(f'<path class="edge carried" d="M{x1:.1f} {y1:.1f}C{side:.1f} {y1:.1f} {side:.1f} {y2:.1f} '
                       f'{x2:.1f} {y2:.1f}"/>')
    for n, lines in said.items():
        x, y, number = at[n] - wide[n] / 2, level[n] * ROW, passes.get(n, 0)
        kind = "in" if n in inputs else f"p{min(number, COLOURS)}"
        note = "input" if n in inputs else f"pass {number}" if number else "no pass"
        out.append(f'<a href="#{anchor}-{escape(n)}"><g class="node {kind}">'
                   f"<title>{escape(chr(10).join(lines))}</title>"
                   f'<rect x="{x:.1f}" y="{y}" width="{wide[n]:.1f}" height="{HIGH}" rx="{2 if n in inputs else 9}"/>'
                   f'<text x="{at[n]:.1f}" y="{y + 16}">{escape(n)}</text>'
                   f'<text class="note" x="{at[n]:.1f}" y="{y + 30}">{note}</text></g></a>')
    return "".join([*out, "</svg>"])


def _depths(names: Sequence[str], edges: Sequence[_Edge], inputs: set[str]) -> dict[str, int]:
    """The layer of each node: below all that it reads."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((e.start, e.end) for e in edges)
    depth = {n: d for d, layer in enumerate(networkx.topological_generations(graph)) for n in layer}
    for n in inputs:  # an input stands right above what reads it first
        depth[n] = min((depth[e.end] for e in edges if e.start == n), default=1) - 1
    return depth


def _layers(depth: Mapping[str, int], edges: Sequence[_Edge],
            wide: dict[str, float]) -> tuple[list[list[str]], list[list[str]]]:
    """Each edge as a path that has a node in every layer it crosses, and the layers, ordered to cross little."""
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for n, d in depth.items():
        layers[d].append(n)
    paths = []
    for k, e in enumerate(edges):
        path = [e.start]
        for d in range(depth[e.start] + 1, depth[e.end]):
            path.append(f"{k}/{d}")  # no tensor is called so
            layers[d].append(path[-1])
            wide[path[-1]] = 4.0
        paths.append([*path, e.end])
    near = _neighbours(paths)
    for sweep in range(8):
        place = {n: k / max(1, len(layer) - 1) for layer in layers for k, n in enumerate(layer)}
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            for n in layer:
                place[n] = fmean(place[m] for m in near[n]) if near.get(n) else place[n]
            layer.sort(key=lambda n: place[n])
            place.update({n: k / max(1, len(layer) - 1) for k, n in enumerate(layer)})
    return paths, layers


def _neighbours(paths: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    near: dict[str, list[str]] = {}
    for path in paths:
        for a, b in zip(path, path[1:], strict=False):
            near.setdefault(a, []).append(b)
            near.setdefault(b, []).append(a)
    return near


def _places(layers: Sequence[Sequence[str]], paths: Sequence[Sequence[str]],
            wide: Mapping[str, float]) -> dict[str, float]:
    """Horizontal centres: near the neighbours' mean, in order and apart."""
    near = _neighbours(paths)
    at: dict[str, float] = {}
    for layer in layers:
        x = 0.0
        for n in layer:
            at[n] = x + wide[n] / 2
            x += wide[n] + APART
    for _ in range(12):
        for layer in layers:
            want = [fmean(at[m] for m in near[n]) if near.get(n) else at[n] for n in layer]
            x, shift = -1e9, []
            for n, w in zip(layer, want, strict=True):
                at[n] = max(w, x + wide[n] / 2)
                x = at[n] + wide[n] / 2 + APART
                shift.append(at[n] - w)
            for n in layer:
                at[n] -= fmean(shift)
    left = min((at[n] - wide[n] / 2 for n in at), default=0.0)
    return {n: x - left + 4 for n, x in at.items()}


def _curve(points: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = points
    out = f"M{x:.1f} {y:.1f}"
    for nx, ny in rest:
        middle = (y + ny) / 2
        out += f"C{x:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {ny:.1f}"
        x, y = nx, ny
    return out


# -- the rounds --------------------------------------------------------------------------------------------------------


def rounds(told: Rounds) -> str:
    """The rounds of a loop, a row for each task that was looked at, as far as they fit; "" where data decide."""
    table, down, across = told.table, told.task, told.var
    columns = max((len(row) for row in table), default=0)
    if not columns:
        return ""
    ys = [k * len(table) // min(TALL, len(table)) for k in range(min(TALL, len(table)))]
    xs = [k * columns // min(WIDE, columns) for k in range(min(WIDE, columns))]
    cell = 12
    out = [f'<svg class="tiles" viewBox="0 0 {len(xs) * cell + 40} {len(ys) * cell + 20}" '
           f'width="{len(xs) * cell + 40}" height="{len(ys) * cell + 20}" role="img" aria-label="rounds by task">'
           f'<text x="40" y="12">{escape(across)} →</text>',
           f'<text x="2" y="32">{escape(down)} ↓</text>' * bool(down)]
    for j, y in enumerate(ys):
        for i, x in enumerate(xs):
            kind = ("rest", "full", "part")[table[y][x] if x < len(table[y]) else 0]
            out.append(f'<rect class="{kind}" x="{40 + i * cell}" y="{18 + j * cell}" width="{cell - 1}" '
                       f'height="{cell - 1}"/>')
    return "".join([*out, "</svg>"])
