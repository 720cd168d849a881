"""The program that a specification becomes means what the interpreter of the specification does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse as program
from memcomp.ir.text import show
from memcomp.ir.verify import verify
from memcomp.passes.kv.account import Shape
from memcomp.passes.kv.programs import reads
from memcomp.passes.kv.rules import broken
from memcomp.passes.kv.slots import KVSpec
from memcomp.passes.kv.status import lacks
from memcomp.passes.kv.store import Cache
from memcomp.passes.kv.text import parse
from tests.kv_specs import SHAPE, likely, streams, tables


def compared(spec: KVSpec, shape: Shape, group: int = 2, queries: int = 1) -> Any:
    """What the programs of a full cache give, beside the interpreter of the specification."""
    cache = Cache(spec, shape, 0, tables(spec, shape), 100.0)
    x = streams(spec, shape)
    e = shape.head + (spec.cut("r").width if "r" in spec.streams else 0)
    q = np.random.default_rng(3).standard_normal((shape.batch, group * shape.heads, shape.tokens, e))
    cache.append(x, q)
    asked = q[:, :, -queries:]
    want = cache.attend(asked)
    got = np.full(want.shape, np.nan)
    for read in reads(cache, group, queries):
        verify(read.program)
        assert program(show(read.program)) == read.program
        read.put(got, interpret(read.program, read.inputs(asked))["O"])
    return got, want


@pytest.mark.parametrize("many", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_specifications_are_read_as_they_mean(many: int) -> None:
    settings(max_examples=many, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)(
        given(likely())(read_as_meant))()


def read_as_meant(spec: KVSpec) -> None:
    if found := next(broken(spec, SHAPE), None):
        with pytest.raises(Refusal, match=f"hint: rule {found[0].name}: "):
            Cache(spec, SHAPE)
        return
    assume(not lacks(spec, SHAPE))
    try:
        got, want = compared(spec, SHAPE)
    except Refusal as refusal:  # what the reader lacks, or streams of different widths
        assert "reader" in refusal.what or "heads" in refusal.what or "different channels" in refusal.what or (
            "end together" in refusal.what), refusal
        assume(False)
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)


@pytest.mark.parametrize("text", [
    "plain", "kivi{residual=16}", "kivi{bits=4, residual=16}", "quantspec{group=16, residual=16}", "qserve{page=16}",
    "streaming{sinks=4, window=20}", "gqa{group=2}", "mla{latent=16, rope=8}", "eigen{rank=12}", "llama_cpp{k=q4_1}",
    "razor{window=20}", "paged", "pooled{window=8}", "xquant{group=32}",
    "gear{residual=16, group=16}", "kvquant{group=32}", "rotatekv{residual=16}", "cq{bits=4}", "accllm{window=16}",
    "snapkv{budget=8}",
    "l2_norm", "scissorhands",
    "cla", "mikv", "longgen{sinks=4, window=8, block=4, stride=2}", "h2o{budget=8, window=8}",
    "bfp_rearranged",
    "turboquant", "cskv{rank=32, window=32}"])
def test_named_systems_are_read_as_they_mean(text: str) -> None:
    shape = Shape(layers=6, batch=2, heads=4, tokens=70, head=32)
    got, want = compared(parse(text), shape)
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)


@pytest.mark.parametrize("text", ["plain", "kivi{residual=16}", "mla{latent=16, rope=8}", "paged"])
@pytest.mark.parametrize("queries", [2, 8])
def test_several_newest_tokens_ask_at_once(text: str, queries: int) -> None:
    got, want = compared(parse(text), Shape(layers=2, batch=2, heads=2, tokens=70, head=32), queries=queries)
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)


def test_queries_that_are_older_than_what_another_region_holds_are_refused() -> None:
    text = "kv a\nregion first: first 3\n  k, v: f32\nregion new: last 2\n  k, v: f32\nregion all: rest\n  k, v: f32"
    shape = Shape(layers=1, batch=1, heads=2, tokens=11, head=8)
    got, want = compared(parse(text), shape, queries=3)  # the first of them sees all but two
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)
    with pytest.raises(Refusal, match="4 queries, and the newest region does not hold all tokens from theirs on"):
        compared(parse(text), shape, queries=4)
