"""The interpreter of cache specifications: bytes as they are counted, one way of writing, one meaning of reading."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from memcomp.ir.errors import InputError, Refusal
from memcomp.passes.kv.account import Shape, account, owner
from memcomp.passes.kv.rules import broken
from memcomp.passes.kv.slots import KVSpec
from memcomp.passes.kv.status import correctness, lacks
from memcomp.passes.kv.store import Cache
from memcomp.passes.kv.systems import systems
from memcomp.passes.kv.text import parse
from tests.kv_specs import SHAPE, likely, streams, tables

SOON = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
COUNTED = ("positions", "page table")  # counted, and held by whoever serves sequences


def made(spec: KVSpec, shape: Shape, layer: int = 0) -> Cache:
    return Cache(spec, shape, layer, tables(spec, shape), 10000.0)


def queries(spec: KVSpec, shape: Shape, many: int) -> Any:
    e = shape.head + (spec.cut("r").width if "r" in spec.streams else 0)
    return np.random.default_rng(9).standard_normal((shape.batch, 2 * shape.heads, many, e))


def written(spec: KVSpec, shape: Shape, cuts: list[int], layer: int = 0) -> Cache:
    """A cache whose tokens came in pieces, the first being the prompt."""
    cache, x = made(spec, shape, layer), streams(spec, shape)
    q = queries(spec, shape, shape.tokens)
    for start, stop in zip([0, *cuts], [*cuts, shape.tokens], strict=True):
        cache.append({n: a[:, :, start:stop] for n, a in x.items()}, q[:, :, :stop] if start == 0 else None)
    return cache


def dense(q: Any, k: Any, v: Any, live: Any, count: Any) -> Any:
    """Attention of one head at once over all that is live."""
    s = np.einsum("bme,bne->bmn", q, k) / np.sqrt(q.shape[-1]) + np.log(count)
    w = np.exp(np.where(live, s, -np.inf) - np.where(live, s, -np.inf).max(-1, keepdims=True))
    return np.einsum("bmn,bnf->bmf", w / w.sum(-1, keepdims=True), v)


def legal(spec: KVSpec) -> bool:
    return not next(broken(spec, SHAPE), None) and not lacks(spec, SHAPE)


@SOON
@given(likely())
def test_bytes_that_are_counted_are_the_buffers_sizes(spec: KVSpec) -> None:
    assume(legal(spec))
    cache = written(spec, SHAPE, [])
    counted = sum(r.bytes for r in account(spec, SHAPE) if r.layer == 0 and r.plane not in COUNTED)
    assert counted == sum(a.nbytes for a in cache.buffers().values())


@SOON
@given(likely(), st.integers(1, 39))
def test_token_by_token_is_as_at_once(spec: KVSpec, prompt: int) -> None:
    assume(legal(spec) and not any(r.select for r in spec.regions))  # a choice depends on when it was made
    whole, pieces = (written(spec, SHAPE, cuts).buffers() for cuts in ([], list(range(prompt, SHAPE.tokens))))
    assert whole.keys() == pieces.keys()
    for name, a in whole.items():
        if name[1] != "body" or spec.regions[-1].merge is None:  # means that grow round as they go
            np.testing.assert_array_equal(a, pieces[name], str(name))


@SOON
@given(likely())
def test_regions_are_joined_exactly(spec: KVSpec) -> None:
    assume(legal(spec) and not any(r.select for r in spec.regions))
    cache, q = written(spec, SHAPE, [20]), queries(spec, SHAPE, 1)
    out = cache.attend(q)
    for head in range(SHAPE.heads):
        mine = owner(spec.shares, "heads", head)
        found = []
        for part, held, k, v, at in cache.read():
            i = part.heads.index(mine) if spec.streams[0] == "k" and mine in part.heads else (
                head if spec.streams[0] != "k" else -1)
            if i >= 0:
                found.append((k[:, i], v[:, i], np.broadcast_to(held.count, at[:, 0].shape)))
        k, v, count = (np.concatenate([f[i] for f in found], 1) for i in range(3))
        want = dense(q[:, 2 * head], k, v, True, count[:, None])
        np.testing.assert_allclose(out[:, 2 * head], want, 1e-9, 1e-9)


@SOON
@given(likely())
def test_buffers_hold_all_that_is_read(spec: KVSpec) -> None:
    assume(legal(spec))
    for _, regions in written(spec, SHAPE, []).held:
        for held in regions:
            for side in held.sides.values():
                cells = side.cells
                back = cells.filled(cells.buffers(), len(cells))
                np.testing.assert_array_equal(back.data, cells.data)


@SOON
@given(likely())
def test_what_is_exact_is_exact(spec: KVSpec) -> None:
    """With numbers of 32 bits the class `exact` is attention over the model's own keys and values, to rounding."""
    f32 = tuple(replace(r, sides=tuple(replace(s, encode=replace(s.encode, word="f32", given=(), along="e"), residue=())
                                       for s in r.sides)) for r in spec.regions)
    spec = replace(spec, regions=f32, shares=())
    assume(legal(spec) and correctness(spec) == "exact")
    cache, q = written(spec, SHAPE, [25]), queries(spec, SHAPE, 3)
    plain = Cache(parse("kv whole\nregion all: rest\n  k, v: f32"), SHAPE)
    x = streams(spec, SHAPE)
    k, v = cache.rebuilt(x, np.broadcast_to(np.arange(SHAPE.tokens), (SHAPE.batch, SHAPE.heads, SHAPE.tokens)))
    if k.shape[-1] != SHAPE.head:
        plain = Cache(plain.spec, replace(SHAPE, head=k.shape[-1]))
        v = np.concatenate([v, np.zeros((*v.shape[:3], k.shape[-1] - v.shape[-1]))], -1)
    plain.append({"k": k, "v": v})
    got = cache.attend(q)
    np.testing.assert_allclose(got, plain.attend(q)[..., :got.shape[-1]], 2e-5, 2e-5)


SMALL = {"budget": 16, "window": 8, "sinks": 4, "residual": 32, "prompt": 16, "first": 32, "middle": 24, "last": 16,
         "wide": 24, "narrow": 16, "low": 24, "high": 16, "meta": 8, "block": 4, "stride": 3, "commit": 64,
         "reserve": 64, "group": 32}


@pytest.mark.parametrize("name", systems())
def test_a_named_system_runs_or_says_why(name: str) -> None:
    row = systems()[name]
    small = {n: min(SMALL.get(n, v), v) for n, v in row.parameters if isinstance(v, int) and not isinstance(v, bool)}
    if name == "cq":
        small["bits"] = 4  # codebooks of 16 vectors: the search for the nearest is most of the time
    ranks = {n for n in ("wide", "narrow") if "project" in str(row.lines) or "trained{" in str(row.lines)}
    spec = row.spec(**{n: v for n, v in small.items() if n not in ranks})
    assert not list(broken(spec)), list(broken(spec))
    if why := lacks(spec):
        assert all(": " in w for w in why)
        with pytest.raises(Refusal, match="does not run here"):
            Cache(spec, Shape(tokens=8))
        return
    shape = Shape(tokens=70)
    layer = owner(spec.shares, "layers", 31)  # one of the last: whatever layers are kept wide
    cache = written(spec, shape, [66, 69], layer)
    assert np.isfinite(cache.attend(queries(spec, shape, 1))).all()
    whole = written(spec, shape, [], layer)
    counted = sum(r.bytes for r in account(spec, shape) if r.layer == layer and r.plane not in COUNTED)
    assert counted == sum(a.nbytes for a in whole.buffers().values())


def test_groups_along_tokens_keep_channels_apart() -> None:
    shape = Shape(layers=1, heads=1, tokens=64, head=32)
    x = np.random.default_rng(0).standard_normal((1, 1, 64, 32))
    loud = x * np.where(np.arange(32) == 5, 100, 1)
    for along, apart in (("n", True), ("e", False)):
        spec = parse(f"kv a\nregion new: last 0\n  k, v: f32\nregion body: rest\n  k, v: int{{bits=4}} along {along}\n"
                     "update group{every=32}")
        read = []
        for a in (x, loud):
            cache = Cache(spec, shape)
            cache.append({"k": a, "v": a})
            read.append(cache.read()[-1][2])
        quiet = np.delete(read[0], 5, -1), np.delete(read[1], 5, -1)
        assert np.array_equal(*quiet) == apart


@pytest.mark.parametrize("text", ["kivi{bits=4, residual=16}", "plain", "quantspec{group=16, residual=16}"])
def test_tokens_that_are_taken_back_leave_nothing(text: str) -> None:
    spec = parse(text)
    shape = Shape(layers=4, heads=2, tokens=70, head=128)
    x = streams(spec, shape)
    other = streams(spec, shape, 5)
    cut = {n: a[:, :, :64] for n, a in x.items()}
    straight, twice = Cache(spec, shape), Cache(spec, shape)
    for cache in (straight, twice):
        cache.append(cut)
    twice.append({n: a[:, :, :6] for n, a in other.items()})
    twice.rollback(6)
    for cache in (straight, twice):
        cache.append({n: a[:, :, 64:] for n, a in x.items()})
    q = queries(spec, shape, 3)
    np.testing.assert_array_equal(straight.attend(q), twice.attend(q))


def test_what_cannot_be_taken_back_is_refused() -> None:
    shape = Shape(layers=1, heads=2, tokens=64, head=128)
    for text in ("kivi{residual=0}", "h2o{budget=8, window=4}", "streaming{sinks=1, window=4}"):
        cache = Cache(parse(text), shape)
        cache.append(streams(cache.spec, shape), queries(cache.spec, shape, 64))
        before = cache.attend(queries(cache.spec, shape, 1))
        with pytest.raises(Refusal, match="rule rollback"):
            cache.rollback(6)
        np.testing.assert_array_equal(cache.attend(queries(cache.spec, shape, 1)), before)


def test_heads_that_share_read_one_storage() -> None:
    shape = Shape(layers=4, heads=4, tokens=20, head=16)
    shared = Cache(parse("gqa{group=2}"), shape)
    x = streams(shared.spec, shape)
    same = {n: np.repeat(a[:, ::2], 2, 1) for n, a in x.items()}
    plain = Cache(parse("plain"), shape)
    shared.append(x)
    plain.append(same)
    q = queries(shared.spec, shape, 2)
    np.testing.assert_array_equal(shared.attend(q), plain.attend(q))
    assert 2 * sum(a.nbytes for a in shared.buffers().values()) == sum(a.nbytes for a in plain.buffers().values())
    with pytest.raises(Refusal, match="owns no storage\nhint: it reads that of layer 0"):
        Cache(parse("cla"), shape, layer=1)


def test_a_choice_by_attention_keeps_what_queries_look_at() -> None:
    shape = Shape(layers=1, heads=2, tokens=40, head=16)
    k = np.random.default_rng(0).standard_normal((1, 2, 40, 16)) * 0.1
    q = np.zeros((1, 2, 40, 16))
    q[..., 0], k[:, :, 7, 0], k[:, :, 23, 0] = 10, 9, 8
    s = np.where(np.tri(40, dtype=bool), np.einsum("bhme,bhne->bhmn", q, k) / 4, -np.inf)
    sums = (np.exp(s) / np.exp(s).sum(-1, keepdims=True)).sum(2)[0, 0, :36]
    for score, best in (("strip{budget=2, window=4}", [7, 23]),
                        ("attention{budget=2}", sorted(np.argsort(-sums)[:2].tolist()))):
        cache = Cache(parse(f"kv a\nregion new: last 4\n  k, v: f32\nregion body: rest\n  select {score}\n  k, v: f32"),
                      shape)
        cache.append({"k": k, "v": k}, q)
        assert cache.held[0][1][1].positions.tolist() == [[best] * 2]
    recall = Cache(parse("kv a\nregion body: rest\n  select pages{budget=4, unit=4, when=read, mode=recall}\n"
                         "  k, v: f32"), shape)
    recall.append({"k": k, "v": k})
    page = slice(4, 8)
    want = dense(q[:, 0, -1:], k[:, 0, page], k[:, 0, page], True, 1)
    np.testing.assert_allclose(recall.attend(q[:, :, -1:])[:, 0], want, 1e-6)


def test_dropped_tokens_become_one_that_counts() -> None:
    """A region whose tokens become one is attention over their mean key, as often as they were."""
    shape = Shape(layers=1, heads=1, tokens=30, head=16)
    cache = Cache(parse("kv a\nregion new: last 10\n  k, v: f32\nregion gone: rest\n  merge mean{group=0}\n"
                        "  k, v: f32"), shape)
    x = streams(cache.spec, shape)
    for i in range(30):
        cache.append({n: a[:, :, i:i + 1] for n, a in x.items()})
    k, v = (np.concatenate([a[:, 0, 20:], a[:, 0, :20].mean(1, keepdims=True)], 1) for a in (x["k"], x["v"]))
    q = queries(cache.spec, shape, 1)
    want = dense(q[:, 0], k, v, True, np.array([1.0] * 10 + [20]))
    np.testing.assert_allclose(cache.attend(q)[:, 0], want, 1e-5, 1e-6)


def test_wrong_inputs_are_named() -> None:
    cache = Cache(parse("plain"), Shape(layers=1, heads=1, head=16))
    with pytest.raises(InputError, match="given are the streams k\nhint: the specification keeps k, v"):
        cache.append({"k": np.zeros((1, 1, 1, 16))})
    with pytest.raises(InputError, match="head 0 holds no tokens"):
        cache.attend(np.zeros((1, 1, 1, 16)))
    with pytest.raises(Refusal, match="5 tokens cannot be taken back of 0"):
        cache.rollback(5)
    for k, v in (((1, 2, 3, 16), (1, 1, 3, 16)), ((1, 1, 3, 16), (1, 1, 2, 16)), ((1, 1, 3, 8), (1, 1, 3, 8))):
        with pytest.raises(InputError, match=r"[kv] has shape .*\nhint: this cache takes \(1, 1, 3, 16\)"):
            cache.append({"k": np.zeros(k), "v": np.zeros(v)})
    cache.append({"k": np.zeros((1, 1, 1, 16)), "v": np.zeros((1, 1, 1, 16))})
    for m, words in ((2, "2 queries of 1 tokens"), (0, "queries of shape")):
        with pytest.raises(InputError, match=words):
            cache.attend(np.zeros((1, 1, m, 16)))
    flat = Cache(parse("kv a\nregion all: rest\n  k, v: offline{rank=2} | f16"), cache.shape, 0,
                 {"k.project": np.ones((16, 2)), "v.project": np.eye(16)})
    flat.append({"k": np.zeros((1, 1, 1, 16)), "v": np.zeros((1, 1, 1, 16))})
    with pytest.raises(InputError, match="the columns of the table 'k.project' are not independent"):
        flat.attend(np.zeros((1, 1, 1, 16)))
    scaled = parse("kv a\nregion all: rest\n  k, v: scale | f16")
    with pytest.raises(InputError, match="the table 'k.scale' must be given"):
        Cache(scaled, cache.shape).append({"k": np.zeros((1, 1, 1, 16)), "v": np.zeros((1, 1, 1, 16))})
