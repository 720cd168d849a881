"""compile, explain, check, stats and reset: the names users build on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memcomp
from memcomp.ir.errors import OptionError
from memcomp.ir.target import target as machine
from memcomp.ir.target import targets
from memcomp.ir.text import parse
from memcomp.pipeline import map_program

pytestmark = pytest.mark.usefixtures("fresh")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return torch.softmax(scores, -1) @ v


def inputs(length: int = 70) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 2, length, 16) for _ in range(3))


def test_importing_the_ir_or_the_package_imports_no_torch() -> None:
    code = ("import sys, memcomp, memcomp.ir.text, memcomp.config, memcomp.pipeline; dir(memcomp); "
            "print([m for m in ('torch', 'tvm', 'triton', 'transformers') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".")
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    for name in memcomp.__all__:
        assert getattr(memcomp, name) is not None
    with pytest.raises(AttributeError):
        memcomp.nothing  # noqa: B018


def test_lengths_are_symbols_after_compile_with_examples() -> None:
    fast = memcomp.compile(attention, *inputs(), rest="eager", strict=True)
    graphs = memcomp.stats()["graphs"]
    for length in (8, 65, 130):
        case = inputs(length)
        assert torch.allclose(fast(*case), attention(*case), atol=1e-5)
    assert memcomp.stats()["graphs"] == graphs == 1


def test_a_fixed_shape_compiles_again_for_another() -> None:
    fast = memcomp.compile(attention, *inputs(), dynamic=False, rest="eager", strict=True)
    fast(*inputs(40))
    assert memcomp.stats()["graphs"] == 2 and memcomp.stats()["kernels"] == 1


def test_explain_counts_three_passes_before_and_one_after() -> None:
    found = memcomp.explain(attention, *inputs())
    (region,) = found.regions
    assert not found.refusals and "test_api" in region.source
    assert max(region.passes.before.values()) == 3
    shared = region.passes.before.keys() & region.passes.after.keys()
    assert shared and {region.passes.after[key] for key in shared} == {1}
    assert len(region.kernels) == 1 and region.kernels[0].source
    assert region.traffic.bytes >= region.traffic.compulsory > 0
    assert memcomp.ir.text.parse(str(region.program)) == region.program
    assert "passes" in str(found) and region.source in str(found)
    json.dumps(found.json())


def test_explain_leaves_no_trace() -> None:
    """However often a function is explained, at whatever sizes, it can be explained and compiled once more."""
    for n in range(2, torch._dynamo.config.recompile_limit + 4):
        assert len(memcomp.explain(attention, *inputs(n)).regions) == 1
    memcomp.reset()
    q, k, v = inputs()
    torch.testing.assert_close(memcomp.compile(attention)(q, k, v), attention(q, k, v), rtol=1e-4, atol=1e-5)
    assert memcomp.stats()["regions"] == 1 and memcomp.stats()["recompilations"] == 0


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


@pytest.mark.parametrize("made", [lambda: attention, Attention], ids=["function", "module"])
def test_what_is_compiled_already_is_explained_and_checked(made: Callable[[], Callable[..., Tensor]]) -> None:
    fn = made()
    fast = memcomp.compile(fn, rest="eager", strict=True)
    assert memcomp.explain(fast, *inputs()).json()["regions"] == memcomp.explain(fn, *inputs()).json()["regions"] != []
    memcomp.reset()
    assert memcomp.check(fast, *inputs()).ok and memcomp.stats()["launches"] == 1


def test_explain_says_when_there_is_nothing() -> None:
    found = memcomp.explain(lambda x: x + 1, torch.ones(3))
    assert found.regions == () and "no regions" in str(found)


def test_a_refusal_names_the_edge_the_operator_and_the_missing_law() -> None:
    def rounded(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.round(x * 127 / x.abs().amax(-1, keepdim=True)) @ w

    region, = memcomp.explain(rounded, torch.randn(5, 70), torch.randn(70, 3)).regions
    refused, = region.refusals
    assert "no law for round" in refused.why and "edge" in refused.why and "over" in refused.where
    assert refused.bound == "" and max(region.passes.after.values()) == 2


def test_check_admits_the_truth() -> None:
    report = memcomp.check(attention, *inputs(), rest="eager", strict=True)
    assert report.ok and 0 < report.max_error <= report.tolerance


def test_check_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from memcomp import runtime

    run = runtime.run

    def wrong(entry: runtime.Entry, tensors: list[Tensor], sizes: list[int]) -> list[Tensor]:
        return [o * (1 + 1e-4) for o in run(entry, tensors, sizes)]

    monkeypatch.setattr(runtime, "run", wrong)
    report = memcomp.check(attention, *inputs(), rest="eager", strict=True)
    assert not report.ok and report.max_error > report.tolerance and "WRONG" in str(report)


def test_check_takes_a_module_and_integer_outputs() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 8)

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(tokens)
            y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return y, y.argmax(-1)

    report = memcomp.check(Model().eval(), torch.randint(0, 11, (2, 9)), rest="eager", strict=True)
    assert report.ok and len(report.rows) == 2


def test_dump_prints_the_stations_asked_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for built in ("_READ", "_BUILT"):  # a kernel that is there is not made again
        monkeypatch.setattr(f"memcomp.pipeline.{built}", {})
    monkeypatch.setenv("MEMCOMP_DUMP", "capture,reduce_passes,tvm")
    memcomp.compile(attention, *inputs(), rest="eager", strict=True)
    seen = capfd.readouterr().err
    assert "# capture\nprogram" in seen and "# reduce_passes\nprogram" in seen and "# emit\n" in seen
    assert "# fuse" not in seen


@pytest.mark.parametrize("name,value", [("STRICT", "maybe"), ("REST", "none"), ("TARGET", "z80")])
def test_wrong_variables_are_errors(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MEMCOMP_{name}", value)
    with pytest.raises(memcomp.OptionError):
        memcomp.compile(attention)


@pytest.mark.parametrize("options", [
    *({name: 5} for name in ("target", "backend", "rest", "strict", "tune", "chains", "interpret", "cache", "cache_dir",
                             "rest_options", "dump")),
    *({name: None} for name in ("target", "backend", "cache_dir", "strict", "dump")),
    {"cache_dir": b"x"}, {"cache_dir": "a\0b"}, {"rest_options": {5: 1}}, {"rest_options": {5: 1, "a": 2}}, {5: 1},
    {"rest": ["inductor"]}, {"tune": torch.ones(3)}, {"backend": torch.ones(3)}, {"dump": ("capture", 5)},
    {"dump": {"capture": 1}}, {"target": ""}, {"strict": 1}, {"nothing": 1}, 5, [("strict", True)]])
def test_a_value_of_a_wrong_type_is_an_error_that_says_what_is_right(options: Any) -> None:
    from memcomp.config import config

    with pytest.raises(OptionError) as caught:
        config(options)
    assert caught.value.hint, caught.value


def test_options_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from memcomp.config import Config, config

    monkeypatch.delenv("MEMCOMP_CACHE")
    assert config({"cache_dir": Path("x"), "rest_options": {"b": 1, "a": 2}, "dump": "capture, fuse"}) == Config(
        cache_dir="x", rest_options=(("a", 2), ("b", 1)), dump=("capture", "fuse"))
    assert config({f.name: getattr(Config(), f.name) for f in fields(Config)} | {"rest_options": {}}) == Config()


@pytest.mark.parametrize("target", targets())
def test_a_backend_is_asked_for_kernels_of_machines_that_it_writes_for(target: str) -> None:
    """Of any backend and machine: either kernels come, or the options say why not and who writes them."""
    from memcomp.backends import backends, emit
    from memcomp.config import config
    from memcomp.stations import observers

    p, takes, told = parse("program p\nrank M\nin X[M]: f32\nout O[M]: f32\nO[m] = X[m] * 2.0\n"), set(), set()
    for name in backends():
        try:
            settings = config({"target": target, "backend": name, "tune": "off"})
        except OptionError as why:
            assert why.what == f"the backend {name} has no kernels for {target}" and why.where
            told.add(why.hint)
            continue
        takes.add(name)
        try:
            closed = map_program(replace(p, target=target), config=settings)
            assert emit(closed, config=settings, observe=observers(settings))[1].backend == name
        except memcomp.Refusal as why:
            assert name == "gluon", why  # which writes for products of two kinds alone
    assert machine(target).backend in takes, "its own"
    assert told == {f"for {target}: {', '.join(sorted(takes))}"}


def test_a_named_backend_writes_the_kernels() -> None:
    """Whatever the target's own is; a wrong name lists what is known."""
    q = torch.randn(1, 2, 24, 16)
    found = memcomp.explain(torch.nn.functional.scaled_dot_product_attention, q, q, q, backend="python")
    assert [k.backend for r in found.regions for k in r.kernels] == ["python"]
    assert "import numpy" in found.html()
    with pytest.raises(OptionError, match="backend='pyhton'"):
        memcomp.explain(torch.nn.functional.scaled_dot_product_attention, q, q, q, backend="pyhton")
