"""FuseMax by the cost model: its published table, its headline means, its cascades' meaning, the cycles by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import fusemax
from memcomp.__main__ import main
from memcomp.ir.arrays import operators, schedule
from memcomp.ir.cascade import Einsum
from memcomp.ir.cost import cost
from memcomp.ir.errors import OptionError, Refusal, VerifyError
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Group, Phase, Program, close, knobs
from memcomp.ir.target import Array, target
from memcomp.ir.text import parse, show
from memcomp.ir.traversal import passes
from memcomp.ir.verify import verify

FOLDER = Path(fusemax.__file__).parent / "fusemax"
PROGRAMS = sorted(f.stem for f in FOLDER.glob("*.mc"))
ATTENTION = [n for n in PROGRAMS if n != "linear"]
EXACT, DIGITS = 1e-9, 5e-6  # the table gives utilisation with six decimals


def test_every_row_of_the_table() -> None:
    """FuseMax's configurations and FLAT exactly (FLAT with its own traffic), the unfused one to half a percent."""
    found = fusemax.rows()
    assert len(found) == 120 and {r.config for r in found} == set(fusemax.CONFIGS)
    for name, off in fusemax.worst(found).items():
        near = 5e-3 if name == "unfused" else EXACT
        assert off["latency"] < near and off["traffic"] < near and off["linear"] < EXACT, name
        assert max(off["array"], off["vector"]) < max(near, DIGITS), name


def test_headline_means() -> None:
    """As the paper rounds them."""
    found = {name: round(x, 1) for name, x in fusemax.means(fusemax.rows()).items()}
    assert found == {"attention over FLAT": 6.7, "end to end over FLAT": 5.3, "attention over unfused": 10.1,
                     "end to end over unfused": 7.6}


def test_the_recorded_results_are_those_of_today() -> None:
    recorded = json.loads((FOLDER.parent / "results" / "fusemax.json").read_text())["results"]
    assert recorded[0]["means"] == pytest.approx(fusemax.means(fusemax.rows()), rel=1e-12)
    assert len(recorded) == 121


def test_the_command_line_prints_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    row = next(r for r in fusemax.rows() if (r.model, r.length, r.config) == ("XLM", 1 << 18, "+Binding"))
    sizes = {"B": 64, "H": 16, "P": row.length, "M": row.length, "E": 128, "F": 128}
    given = [x for n, v in sizes.items() for x in ("--size", f"{n}={v}")]
    argv = ["cost", str(FOLDER / "binding.mc"), "--target", "fusemax", *given]
    assert main([*argv, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)[0]
    assert got["seconds"] == pytest.approx(row.published_latency, rel=EXACT)
    assert got["levels"][-1]["traffic"] == row.published_traffic
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "unit vector" in text and "busy 100.0%" in text and "phase 4 of g0" in text
    assert main([*argv, "--traffic", "some"]) == 2 and "--traffic 'some'" in capsys.readouterr().err


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_sound(name: str) -> None:
    p = fusemax.program(name)
    verify(p)
    assert parse(show(p)) == p
    assert p.digest == parse(show(p).replace("QK", "scores")).digest, "bindings are renamed with their tensors"


@pytest.mark.parametrize("name", ATTENTION)
def test_programs_mean_attention(name: str) -> None:
    p, rng = fusemax.program(name), np.random.default_rng(1)
    shape = {"B": 2, "H": 1, "P": 3, "M": 300, "E": 4, "F": 5}
    x = {t.name: rng.standard_normal([shape[r] for r in t.ranks]) for t in p.cascade.inputs()}
    p = replace(p, cascade=replace(p.cascade, tensors=tuple(replace(t, dtype="f64") for t in p.cascade.tensors)))
    s = np.exp(np.einsum("bhpe,bhme->bhpm", x["Q"], x["K"]))
    want = np.einsum("bhpm,bhmf->bhpf", s / s.sum(-1, keepdims=True), x["V"])
    np.testing.assert_allclose(interpret(p, x)["AV"], want, rtol=1e-12)
    counted = passes(p)
    assert max(counted["K", r] for r in ("M",)) == (1 if "M1" in {r.name for r in p.cascade.ranks} else 3)


# -- the counting ------------------------------------------------------------------------------------------------------


def statement(text: str) -> Einsum:
    head = "program t\nrank M\nrank P\nin x[P, M]: f32\nin y[P, M]: f32\nin g[P]: f32\nout z[P]: f32\n"
    return parse(head + text).cascade.einsums[0]


@pytest.mark.parametrize("text, needs", [
    ("z[p] = sum{m} x[p, m] * y[p, m]", {"mac": 1}),
    ("z[p] = sum{m} x[p, m]", {"add": 1}),
    ("z[p] = max{m} x[p, m] * y[p, m]", {"mac": 1, "max": 1}),
    ("z[p] = sum{m} exp(x[p, m] - g[p])", {"exp": 1, "add": 2}),
    ("z[p] = g[p] / 2.0", {"div": 1}),
    ("z[p] = where(g[p] > 0.0, -g[p], min(g[p], 1.0))", {"max": 1}),
    ("z[p] = 0.0", {}),
])
def test_operators_of_a_statement(text: str, needs: dict[str, int]) -> None:
    assert operators(statement(text)) == needs


def test_phases_overlap_units_and_add_up() -> None:
    machine = target("fusemax")
    a, b, c = (statement(f"z[p] = {body}") for body in ("sum{m} x[p, m] * y[p, m]", "max{m} x[p, m]", "g[p] + 1.0"))
    a, b, c = (replace(e, outs=(replace(e.out, tensor=n),)) for e, n in ((a, "A"), (b, "B"), (c, "C")))
    work = [(a, 65536.0 * 10), (b, 65536.0 * 3), (c, 256.0 * 20)]
    both = Group("g", ("A", "B", "C"), phases=(Phase((("A", "array"), ("B", "array"), ("C", "vector"))),))
    assert [p.cycles for p in schedule(both, work, machine)] == [20.0]
    apart = replace(both, phases=(*(Phase((x,)) for x in both.phases[0].bind), Phase((("B", "array"),), drain=True)))
    assert [p.cycles for p in schedule(apart, work, machine)] == [10.0, 3.0, 20.0, 3.0 * 256]
    alone = schedule(replace(both, phases=()), work, machine)
    assert sum(p.cycles for p in alone) == 10 + 3 + 20 / 256, "each where it is done first"


def test_pipelined_operators_overlap() -> None:
    e = statement("z[p] = exp(g[p] - 1.0)")
    unit = Array(4, 1, (("add", 1.0), ("exp", 3.0)))
    from memcomp.ir.arrays import cycles

    assert cycles(e, 8.0, unit) == 8.0 and cycles(e, 8.0, replace(unit, pipelined=True)) == 6.0
    assert cycles(statement("z[p] = g[p] * g[p]"), 8.0, unit) is None


def edited(name: str, old: str, new: str) -> Program:
    text = show(fusemax.program(name))
    assert old in text
    return parse(text.replace(old, new))


@pytest.mark.parametrize("old, new, error, said", [
    ("phase RM @ vector", "phase RM @ tensor", Refusal, "fusemax has no unit 'tensor'"),
    ("AV @ vector", "AV @ array", Refusal, "AV: the unit 'array' of fusemax has no div"),
    ("phase RM @ vector", "phase XX @ vector", VerifyError, "does not compute 'XX'"),
    ("phase RM @ vector", "phase QK @ vector", VerifyError, "'QK' stands in two phases"),
    ("phase RM @ vector", "drain RM @ vector", VerifyError, "'RM' drains before it runs"),
    ("  phase RM @ vector\n", "", VerifyError, "'RM' stands in no phase"),
])
def test_wrong_bindings_say_so(old: str, new: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        p = edited("binding", old, new)
        verify(p)
        cost(close(p, {"p0": 256}), {"B": 1, "H": 1, "P": 512, "M": 512, "E": 8, "F": 8}, target("fusemax"))


def test_a_program_without_bindings_runs_too() -> None:
    """The three-pass form, mapped by the pipeline and costed on every machine, also those that have no compiler yet."""
    p = parse((Path(__file__).parent / "cases" / "attention_3pass.mc").read_text())
    from memcomp.config import config
    from memcomp.pipeline import map_program

    for name in ("fusemax", "flat", "h100"):
        got = cost(map_program(p, config=config({"target": name})), {"P": 512, "M": 512}, target(name))
        assert got.seconds >= got.floor > 0 and bool(got.units) == (name != "h100")


def test_one_tile_of_each_tensor_is_held() -> None:
    """K and V come in once for each tile of queries, Q and the result once; twice the queries held halve that."""
    sizes, machine = {"B": 2, "H": 3, "P": 4096, "M": 2048, "E": 64, "F": 32}, target("fusemax")
    p = fusemax.program("binding")
    for size in knobs(p)[0].choices[:4]:
        got = cost(close(p, {"p0": size}), sizes, machine)
        rounds = 4096 // size
        assert got.traffic == 2 * 6 * (4096 * (64 + 32) + rounds * 2048 * (64 + 32))


def test_known_traffic_takes_the_place_of_the_models() -> None:
    sizes = {"B": 1, "H": 1, "P": 512, "M": 512, "E": 8, "F": 8}
    p, machine = close(fusemax.program("flat"), {"p0": 16}), target("flat")
    assert cost(p, sizes, machine, 1e12).seconds == 1e12 / machine.memory.bandwidth
    assert cost(p, sizes, machine, 1e12).traffic == 1e12
    with pytest.raises(OptionError):
        target("flat9")


def test_figures_show_every_row() -> None:
    drawn = fusemax.figure("t", [("a", 1.0, lambda r: r.array), ("b", 1.0, lambda r: r.vector)], fusemax.rows())
    bars = [x for x in ElementTree.fromstring(drawn).iter() if x.tag.endswith("rect") and len(x)]
    assert len(bars) == 2 * 120 and all(float(x.get("height", "-1")) >= 0 for x in bars)
