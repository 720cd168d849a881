"""The page that explains: one well-formed document that fetches nothing and holds all that `explain` knows."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from torch import Tensor

from memcomp import drawing
from memcomp.__main__ import main
from memcomp.ir.program import Program
from memcomp.ir.show import show_einsum
from memcomp.ir.text import parse
from memcomp.ir.traversal import passes, stages
from memcomp.passes import PIPELINE
from memcomp.report import Explanation, explain
from memcomp.rounds import rounds

CASES = Path(__file__).parent / "cases"
NAMES = ["causal_gqa", "attention_3pass", "cascade_1", "layer_norm", "append", "chains/ragged"]


def load(name: str) -> Program:
    return parse((CASES / f"{name}.mc").read_text())


def tree(html: str) -> Element:
    assert html.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(html.partition("\n")[2])


def words(e: Element) -> str:
    return "".join(e.itertext())


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_it_all_and_fetches_nothing(name: str) -> None:
    read = load(name)
    found = explain(read)
    html = found.html()
    root, text = tree(html), words(tree(html))
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids)), "an id stands for one place"
    links = [v for e in root.iter() for k, v in e.items() if k.rpartition("}")[2] in ("href", "src", "data", "action")]
    assert links and {v[1:] for v in links} <= set(ids) and all(v.startswith("#") for v in links)
    assert not {e.tag for e in root.iter()} & {"script", "link", "img", "iframe", "object", "form"}
    assert not re.search(r"https?:|@import|url\(|javascript:", html)
    (region,) = found.regions
    assert region.source in text and region.kernels[0].source in text
    for e in region.program.cascade.einsums:
        assert show_einsum(e) in text
    for line in (*region.program.proofs, *PIPELINE):
        assert line in text
    for n in set(region.passes.before.values()):
        assert f"pass {n}" in text


def boxes(svg: str) -> dict[str, tuple[float, float, float, float, str]]:
    """Tensor -> left, top, right, bottom, class of its node."""
    out = {}
    for g in ElementTree.fromstring(svg).iter("g"):
        rect, name = g.find("rect"), g.find("text")
        assert rect is not None and name is not None and name.text
        x, y, w, h = (float(rect.get(k, "nan")) for k in ("x", "y", "width", "height"))
        out[name.text] = x, y, x + w, y + h, g.get("class", "")
    return out


@pytest.mark.parametrize("name", sorted(f.stem for f in CASES.glob("*.mc")))
def test_graphs_show_every_tensor_once_and_apart(name: str) -> None:
    """Nodes do not touch, lie in the picture, and have the colour of their pass."""
    c = load(name).cascade
    counted = passes(c)
    rank = max(counted, key=lambda k: counted[k], default=("", ""))[1]
    made = stages(c, rank)
    svg = drawing.cascade(c, made, "g")
    found = boxes(svg)
    inputs = {t.name for t in c.tensors if t.role in ("in", "state")}
    assert found.keys() == inputs | {n for e in c.einsums for n in e.names}
    wide, tall = (float(ElementTree.fromstring(svg).get(k, "0")) for k in ("width", "height"))
    for n, (x1, y1, x2, y2, kind) in found.items():
        assert 0 <= x1 < x2 <= wide and 0 <= y1 < y2 <= tall
        assert kind == ("node in" if n in inputs else f"node p{made[n]}")
    for (a, b), (d, e) in combinations([(v[0:2], v[2:4]) for v in found.values()], 2):
        assert b[0] < d[0] or e[0] < a[0] or b[1] < d[1] or e[1] < a[1], "nodes overlap"


@pytest.mark.parametrize("p, m", [(70, 90), (128, 400), (200, 200), (5, 1000)])
def test_rounds_are_those_that_the_guard_leaves(p: int, m: int) -> None:
    """Counted tile by tile: a round runs if some pair of its tile lives, and needs no mask if all do."""
    from memcomp.config import config
    from memcomp.pipeline import compile_program

    compiled = compile_program(load("causal_gqa"), config=config({"target": "cpu"}), sizes={"P": p, "M": m, "B": 2})
    (kernel,) = compiled.tiles.kernels
    dims = {d.name: d.capacity for d in kernel.dims}
    tall, wide = dims["p0"], dims["m0"]
    sizes = {"B": 2, "J": 2, "P": p, "M": m}
    (found,) = rounds(kernel, sizes, {"m1": -(-m // wide)})
    run = masked = 0
    for a in range(0, p, tall):
        for b in range(0, m, wide):
            live = [y <= x + m - p for x in range(a, min(a + tall, p)) for y in range(b, min(b + wide, m))]
            run += any(live)
            masked += any(live) and not all(live)
    assert found.total == -(-p // tall) * -(-m // wide) and found.run == run
    assert masked <= found.masked <= run, "a tile may be masked without need, never the other way round"
    assert found.exact
    ElementTree.fromstring(drawing.rounds(found))
    near = rounds(kernel, {**sizes, "P": 300 * p, "M": 300 * m}, {})[0]
    assert not near.exact and near.run <= near.total and len(near.table) <= 1024


class Two(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(attend(q, k, v).sort(-1).values, k, v).sort(-1).values + attend(q, k, v, is_causal=True)


def test_a_function_with_several_regions() -> None:
    found = explain(Two(), *(torch.randn(1, 2, 40, 16) for _ in range(3)))
    text = words(tree(found.html()))
    assert len(found.regions) > 1
    for r in found.regions:
        assert r.source in text and all(show_einsum(e) in text for e in r.program.cascade.einsums)
    again = Explanation((*found.regions, replace(found.regions[0], source="the same")))
    text = words(tree(again.html()))
    assert re.search(r"and \d+ more like it", text) and "the same" in text, "equal regions are told once"


def test_nothing_found_is_a_page_too() -> None:
    assert "No regions" in words(tree(Explanation(()).html()))
    refused = explain(lambda x: x + 1, torch.ones(3))
    for r in refused.refusals:
        assert str(r) in words(tree(refused.html()))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("option", ["--html", "-o"])
def test_the_command_line_writes_it(capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str) -> None:
    program, target = str(CASES / "cascade_1.mc"), tmp_path / "x.html"
    assert run(capsys, "explain", program, option, str(target)) == (0, "", "")
    assert "cascade_1" in unescape(words(tree(target.read_text(encoding="utf-8"))))
    assert [f.name for f in tmp_path.iterdir()] == ["x.html"]


@pytest.mark.parametrize("argv, said", [
    (["--html", "no/such/folder/x.html"], "cannot write no/such/folder/x.html"),
    (["-o", "no/such/folder/x.html"], "cannot write no/such/folder/x.html"),
    (["--html", "x.html", "--json"], "cannot be JSON and a page"),
    (["--html", "x.html", "-o", "y"], "both name the file"),
])
def test_wrong_uses_are_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               argv: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "explain", str(CASES / "cascade_1.mc"), *argv)
    assert code == 2 and out == "" and err.startswith("error: ") and said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
