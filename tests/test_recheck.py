"""What is compiled was compared with what was read: wrong rewrites do not get as far as a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memcomp
from memcomp.config import config
from memcomp.forms import closed_form
from memcomp.ir.errors import MemcompError, Refusal
from memcomp.ir.expr import Call, Const
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.passes import PIPELINE
from memcomp.passes.reduce_passes import reduce_passes
from memcomp.pipeline import compile_program
from memcomp.recheck import recheck
from memcomp.stations import GENERAL, rewrite

CASES = sorted(f for f in (Path(__file__).parent / "cases").rglob("*.mc") if f.parent.name != "bad")


def forms(file: Path) -> tuple[Program, Program]:
    """The general form of a program, and what is compiled."""
    read = replace(parse(file.read_text()), target="cpu")

    def see(station: str, value: object) -> None:
        pass

    general = rewrite(read, observe=see, names=PIPELINE[:GENERAL])
    return general, closed_form(general, PIPELINE[GENERAL:], read, {}, config({}), see).program


def scaled(program: Program) -> Iterator[tuple[str, Program]]:
    """The program with the terms of one of its sums a thousandth larger."""
    c = program.cascade
    for k, e in enumerate(c.einsums):
        if e.reduce is not None and e.reduce.monoid == "sum":
            wrong = replace(e, body=Call("mul", (e.body, Const(1.001))))
            yield e.names[0], replace(program, cascade=replace(c, einsums=(*c.einsums[:k], wrong, *c.einsums[k + 1:])))


@pytest.mark.parametrize("file", CASES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_what_is_compiled_means_what_was_read(file: Path) -> None:
    try:
        before, after = forms(file)
    except MemcompError:
        return  # refused before there is anything to compile
    assert recheck(before, after)


# forms without a running mean: any reference would do there, and sums of what is measured from it are nearly 0
@pytest.mark.parametrize("name", ["entropy", "cross_entropy", "rmsnorm_matmul", "attention_lse", "two_temperatures"])
def test_every_wrong_sum_is_refused(name: str) -> None:
    before, after = forms(next(f for f in CASES if f.stem == name))
    wrong = dict(scaled(after))
    assert wrong
    for what, program in wrong.items():
        with pytest.raises(Refusal, match="gives another"):
            assert not recheck(before, program), what


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def test_a_wrong_rewrite_leaves_the_region_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: Program, *, weighted: bool = True) -> Program:
        return list(scaled(reduce_passes(program, weighted=weighted)))[-1][1]

    monkeypatch.setattr("memcomp.passes.reduce_passes.reduce_passes", wrong)
    memcomp.reset()
    q, k, v = torch.randn(3, 2, 40, 16).unbind()
    with pytest.warns(UserWarning, match="gives another"):
        got = torch.compile(attention, backend="memcomp", options={"rest": "eager"})(q, k, v)
    assert torch.equal(got, attention(q, k, v)) and memcomp.stats()["launches"] == 0
    memcomp.reset()
    torch._dynamo.reset()


def test_what_would_take_long_is_not_looked_at() -> None:
    text = "program p on cpu\nrank N\nrank A = 4096\nrank B = 4096\nin X[N, A]: f32\nin W[A, B]: f32\n" \
           "out Y[N, B]: f32\nY[n, b] = sum{a} X[n, a] * W[a, b]\n"
    p = parse(text)
    assert not recheck(p, p)
    assert compile_program(p, config=config({}))
