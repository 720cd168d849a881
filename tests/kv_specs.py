"""Random cache specifications: legal ones by far, and illegal ones; and what a cache needs to run on them."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import numpy as np
from hypothesis import strategies as st

from memcomp.passes.kv.account import Shape
from memcomp.passes.kv.slots import (
    Basis,
    Cut,
    Encode,
    KVSpec,
    Map,
    Merge,
    Place,
    Project,
    Region,
    Residue,
    Select,
    Share,
    Side,
    Span,
    Tokens,
    Update,
)
from memcomp.passes.kv.status import needed
from memcomp.passes.kv.words import CHOICES, WHERE, WORDS

CODECS = [Encode("f32"), Encode("f16"), Encode("bf16"), Encode("int", (("bits", 4), ("group", 8))),
          Encode("int", (("bits", 2), ("group", 8)), "n"),
          Encode("int", (("bits", 8), ("group", "row"), ("mode", "sym"))),
          Encode("int", (("bits", 3), ("group", 16), ("mode", "zero"))), Encode("mx", (("group", 16),), "n"),
          Encode("fp8", (("group", 8), ("scale", "f16"))), Encode("nvfp4", (("group", 16), ("tensor", False))),
          Encode("planes", (("group", 16),), "n"), Encode("lut", (("group", 8),)),
          Encode("vq", (("bits", 4), ("width", 2), ("group", 16)))]
SHAPE = Shape(layers=4, batch=2, heads=4, tokens=40, head=16, width=24)
NUMBERS = {bool: st.booleans(), float: st.sampled_from([0.125, 0.25, 0.5, 1e-05]), tuple: st.sampled_from(
    [(), (0, 0), (0, 1, 0, 1)])}


@st.composite
def slot(draw: Any, kind: type[Any], some: float = 0.4, **fixed: Any) -> Any:
    """A value of a slot: a word of the table, and values for some of the fields that it takes."""
    word = draw(st.sampled_from(sorted(WORDS[kind])))
    given = dict(fixed)
    for f in fields(kind):
        if f.name in WORDS[kind][word].takes and f.name not in given and (
                f.default is MISSING or draw(st.floats(0, 1)) < some):
            default = 8 if f.default is MISSING else f.default
            if isinstance(default, str):
                choices = WHERE[kind] if f.name == "where" else CHOICES[f.name]
                given[f.name] = draw(st.sampled_from(choices))
            else:
                given[f.name] = draw(NUMBERS.get(type(default), st.sampled_from([1, 2, 4, 8, 16])))
    return kind(word, **given)


def maybe(draw: Any, made: Any, chance: float) -> Any:
    return draw(made) if draw(st.floats(0, 1)) < chance else None


@st.composite
def side(draw: Any, stream: str) -> Side:
    return Side(stream, draw(st.sampled_from(CODECS)), tuple(draw(st.lists(slot(Basis), max_size=2))),
                maybe(draw, slot(Project), 0.2), tuple(draw(st.lists(slot(Residue), max_size=1))))


POINTS = st.none() | st.lists(st.integers(-4, 3) | st.builds(Span, *[st.none() | st.integers(-4, 4)] * 2,
                                                              st.none() | st.integers(1, 3)), min_size=1, max_size=2
                              ).map(tuple)


@st.composite
def anything(draw: Any) -> KVSpec:
    """A specification that is well formed, and hardly ever legal."""
    cuts = tuple(draw(st.lists(slot(Cut), min_size=1, max_size=3)))
    regions = tuple(
        Region(f"r{i}", draw(st.one_of(
            st.builds(Tokens, st.sampled_from(["first", "last"]), st.integers(0, 9)), st.just(Tokens("rest")),
            st.builds(lambda a, b: Tokens("blocks", a, b), st.integers(0, 9), st.integers(0, 9)),
            st.builds(lambda s: Tokens("chosen", select=s), slot(Select)))),
            tuple(draw(side(c.word)) for c in cuts) if draw(st.booleans()) else (), draw(POINTS), draw(POINTS),
            maybe(draw, slot(Select), 0.3), maybe(draw, slot(Merge), 0.2))
        for i in range(draw(st.integers(0, 3))))
    return KVSpec("any", cuts, regions, tuple(draw(st.lists(slot(Share), max_size=2))), draw(slot(Map)),
                  tuple(draw(st.lists(slot(Place, stream="k"), max_size=1))), draw(slot(Update)))


@st.composite
def likely(draw: Any) -> KVSpec:
    """A specification that is legal more often than not, for `SHAPE`."""
    every = draw(st.sampled_from([1, 1, 8, 16]))
    window = draw(st.sampled_from([0, 3, 8]))
    rope = draw(st.sampled_from(["after", "after", "before"]))
    cuts = draw(st.sampled_from([(Cut("k", rope=rope), Cut("v"))] * 3 + [(Cut("x"),), (Cut("c", width=16),
                                                                                     Cut("r", width=8))]))
    wide = [c for c in CODECS[:3]]

    def written(codecs: list[Encode], rich: bool) -> tuple[Side, ...]:
        made = []
        for c in cuts:
            bases = [Basis("hadamard", size=8), Basis("offset"), Basis("scale"), Basis("hadamard", rank="h")]
            basis = tuple(draw(st.lists(st.sampled_from(bases[:3 if c.word not in "kv" else 4]), max_size=2)))
            codec = draw(st.sampled_from([x for x in codecs if x.along == "e" or rich and every % 16 == 0]))
            residue: tuple[Residue, ...] = ()
            if rich and codec.word not in ("f16", "bf16", "f32") and draw(st.booleans()):
                residue = tuple(draw(st.sampled_from([(Residue("outliers", share=0.05),), (
                    Residue("outliers", share=0.02), Residue("lowrank", rank=2))][:1 + (every > 2)])))
            project = Project("offline", 16, "tile") if draw(st.integers(0, 4)) == 0 and c.word == "v" else None
            made.append(Side(c.word, codec, basis if c.word != "r" else (), project, residue))
        return tuple(made)

    regions = []
    if draw(st.booleans()):
        regions.append(Region("sinks", Tokens("first", draw(st.sampled_from([1, 4]))), written(CODECS, False)))
    if every > 1 or draw(st.booleans()):
        regions.append(Region("recent", Tokens("last", window), tuple(Side(c.word, draw(st.sampled_from(wide)))
                                                                      for c in cuts)))
    if draw(st.integers(0, 3)) == 0:
        regions.append(Region("strided", Tokens("blocks", 2, 3), written(CODECS, False)))
    ending = draw(st.sampled_from(["keep", "keep", "keep", "drop", "select", "recall", "merge"]))
    select = merge = None
    if ending == "select":
        select = Select(draw(st.sampled_from(["norm", "attention", "strip"])), budget=8, window=4, when=draw(
            st.sampled_from(["prefill", "token"])))
        select = Select(select.word, budget=8, window=4 if select.word == "strip" else 0, when=select.when)
    if ending == "recall":
        select = Select("pages", budget=8, unit=4, when="read", mode="recall")
    if ending == "merge":
        merge = Merge("mean", every if every > 1 else 1)
    last = () if ending == "drop" and regions else written(CODECS, select is None and merge is None)
    if draw(st.integers(0, 3)) == 0 and all(c.word in "kv" for c in cuts):
        regions.insert(0, Region("whole", Tokens("rest"), written(wide, False), layers=(Span(None, None, 2),),
                                 heads=draw(st.sampled_from([None, (0,), (-1, 1)]))))
    regions.append(Region("body", Tokens("rest"), last, select=select, merge=merge))
    shares = draw(st.sampled_from([(), (), (Share("heads", group=2),), (Share("layers", group=2),)]))
    size = draw(st.sampled_from([1, 16]))
    made = Map("dense" if size == 1 else "pages", size, draw(st.sampled_from(CHOICES["order"])), draw(st.sampled_from(
        CHOICES["scales"])), draw(st.sampled_from([1, 4, 16])), True, draw(st.booleans()))
    return KVSpec("likely", cuts, tuple(regions), shares, made, (), Update("group" if every > 1 else "token", every))


def tables(spec: KVSpec, shape: Shape, seed: int = 0) -> dict[str, Any]:
    """Every table that a specification needs, at random."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, size in needed(spec, shape).items():
        what = name.partition(".")[2]
        if what == "permute":
            half = rng.permutation(size[0] // 2)  # whole rotary pairs
            found[name] = np.concatenate([half, half + size[0] // 2])
        elif what == "project" and size[0] > 64:
            found[name] = rng.standard_normal(size) / np.sqrt(size[0])  # nearly orthonormal, and soon made
        elif what in ("orthogonal", "project"):
            found[name] = np.linalg.qr(rng.standard_normal(size))[0]
        elif what == "scale":
            found[name] = np.tile(rng.uniform(0.5, 2, size[0] // 2), 2)
        else:
            found[name] = rng.standard_normal(size)
    return found


def streams(spec: KVSpec, shape: Shape, seed: int = 0) -> dict[str, Any]:
    """Values of every stream, [b, h, n, e]."""
    from memcomp.passes.kv.account import channels, headed

    rng = np.random.default_rng(seed)
    return {c: rng.standard_normal((shape.batch, shape.heads if headed(c) else 1, shape.tokens, channels(
        spec, c, shape))) for c in spec.streams}
