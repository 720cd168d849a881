"""How many bytes a cache takes, exactly: from the specification alone, for every plane of every region.

The numpy interpreter (`store`) holds buffers of these sizes; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Any

from memcomp.ir.errors import Refusal
from memcomp.passes.kv.codecs import FAMILIES, Codec, codec
from memcomp.passes.kv.slots import Encode, KVSpec, Map, Region, Share, Side, Tokens
from memcomp.passes.kv.words import UNBUILT, word


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model and its use say: extents, and whether keys have a rotary embedding.

    width: channels of a layer's input; 0: as many as all heads have together.
    """

    layers: int = 32
    batch: int = 1
    heads: int = 8
    tokens: int = 32768
    head: int = 128
    width: int = 0
    rope: bool = True

    @property
    def values(self) -> int:
        """Numbers in all keys and values of the model."""
        return 2 * self.layers * self.batch * self.heads * self.tokens * self.head


@dataclass(frozen=True, slots=True)
class Part:
    """Heads of one layer whose tokens are shared out by the same regions."""

    layer: int
    heads: tuple[int, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A buffer: of which layer, heads, region, stream and plane, for how many tokens, and its bytes."""

    layer: int
    heads: int
    region: str
    stream: str
    plane: str
    tokens: int
    bytes: int


def owner(shares: tuple[Share, ...], rank: str, point: int) -> int:
    """The layer (or head) whose storage a layer (or head) reads."""
    for s in shares:
        if s.word == rank:
            period = s.map or ((0 if s.producer == "first" else s.group - 1),) * s.group
            point = point // len(period) * len(period) + period[point % len(period)]
    return point


def headed(stream: str) -> bool:
    """Does a stream hold something of its own for each head?"""
    return stream in ("k", "v")


def channels(spec: KVSpec, stream: str, shape: Shape) -> int:
    """Channels of one token (and head) of a stream, as the model computes them."""
    cut = spec.cut(stream)
    return shape.head if headed(stream) else cut.width or shape.width or shape.heads * shape.head


def stored(side: Side, whole: int) -> int:
    """Channels that are encoded: those of the projection."""
    return side.project.rank if side.project else whole


@cache
def codec_of(encode: Encode, across: int) -> Codec:
    """The codec of a side that stores `across` channels.  Refusal: it is not built; OptionError: it does not fit."""
    if encode.word in UNBUILT and encode.word not in FAMILIES:
        raise Refusal(f"the codec {encode.word!r} is not built", UNBUILT[encode.word])
    return codec(encode.word, **{n: across if v == "row" else v for n, v in encode.given})


def parts(spec: KVSpec, shape: Shape) -> Iterator[Part]:
    """The storages there are: of layers and heads that own one, heads of the same regions together."""
    alike = any(headed(s) for s in spec.streams)
    for layer in range(shape.layers):
        if owner(spec.shares, "layers", layer) != layer:
            continue
        found: dict[tuple[Region, ...], list[int]] = {}
        for head in range(shape.heads if alike else 1):
            if owner(spec.shares, "heads", head) == head:
                found.setdefault(spec.at(layer, head, shape.layers, shape.heads), []).append(head)
        yield from (Part(layer, tuple(heads), regions) for regions, heads in found.items())


def kept(select_budget: int, share: float, unit: int, tokens: int) -> int:
    """How many of so many tokens a selection keeps: whole units, as many as the budget allows, and all if they fit."""
    budget = select_budget if select_budget else ceil(share * tokens)
    return tokens if tokens <= budget else budget // unit * unit


def taken(t: Tokens, start: int, stop: int) -> int:
    """How many of the tokens start:stop stand in blocks of `count` tokens of which every `stride`-th is taken."""
    def below(n: int) -> int:
        period = t.count * t.stride
        return n // period * t.count + min(n % period, t.count)

    return below(stop) - below(start)


def newest(window: int, every: int, tokens: int) -> int:
    """How many tokens the newest region holds: at least the window, and what is still no whole group."""
    return tokens if tokens < window else window + (tokens - window) % every


def counts(spec: KVSpec, regions: tuple[Region, ...], tokens: int) -> dict[str, int]:
    """Tokens that each region of one (layer, head) stores, behind so many tokens of which all were the prompt."""
    start, stop, left = 0, tokens, tokens
    found: dict[str, int] = {}
    for r in regions:
        t = r.tokens
        if t.word == "first":
            n = min(t.count, left)
            start += n
        elif t.word == "last":
            n = newest(t.count, spec.update.every, left)
            stop -= n
        elif t.word == "blocks":
            n = taken(t, start, stop)
        elif t.word == "chosen" and t.select is not None:
            n = kept(t.select.budget, t.select.share, t.select.unit, left)
        else:
            n = left
        left -= n
        if r.select is not None and r.select.mode != "recall":
            n = kept(r.select.budget, r.select.share, r.select.unit, n)
        if r.merge is not None:
            n = n // r.merge.group if r.merge.group else min(n, 1)
        found[r.name] = n
    return found


def padded(n: int, to: int) -> int:
    """The least multiple of `to` that n fits in."""
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the planes of one side lie, for one (sequence, head): slots of tokens, in pages.

    span: tokens of a slot: 1, or those of a group along n.  groups: groups of a slot.  page: slots of a page.
    """

    codec: Codec
    span: int
    groups: int
    page: int
    map: Map

    def row(self, plane: int) -> int:
        """Bytes of one plane in a slot."""
        p = self.codec.planes[plane]
        return self.groups * p.bytes

    @property
    def slot(self) -> int:
        """Bytes of all planes of a slot, one behind the other."""
        n = sum(self.row(i) for i in range(len(self.codec.planes)))
        return padded(n, self.map.align) if self.map.scales == "inline" else n

    def slots(self, tokens: int) -> int:
        """Slots of so many tokens: whole pages."""
        return padded(-(-tokens // self.span), self.page)

    def bytes(self, tokens: int) -> dict[str, int]:
        """Buffer -> its bytes."""
        slots, m = self.slots(tokens), self.map
        if m.scales == "inline":
            return {"all": slots * self.slot}
        if m.scales == "trailing":
            return {"all": slots // self.page * padded(self.page * self.slot, m.align)}
        return {p.name: slots * padded(self.row(i), m.align) for i, p in enumerate(self.codec.planes)}


def layout(spec: KVSpec, side: Side, shape: Shape) -> Layout:
    """The layout of a side."""
    across = stored(side, channels(spec, side.stream, shape))
    made = codec_of(side.encode, across)
    along = side.encode.along == "n"
    span = made.group if along else 1
    return Layout(made, span, across if along else across // made.group, max(1, spec.map.size // span), spec.map)


def residues(side: Side, every: int, across: int) -> dict[str, int]:
    """Buffer -> bytes of what is added to the bulk, for one chunk of `every` tokens of one (sequence, head)."""
    found: dict[str, int] = {}
    for r in side.residue:
        if r.word == "outliers":
            many = ceil(r.share * every * across)
            found |= {"outlier values": 2 * many, "outlier places": places(every * across) * many}
        elif r.word == "lowrank":
            found |= {"left": 2 * every * r.rank, "right": 2 * r.rank * across}
    return found


def places(points: int) -> int:
    """Bytes of a number that says which of so many points."""
    return 2 if points <= 65536 else 4


def account(spec: KVSpec, shape: Shape) -> tuple[Row, ...]:
    """Every buffer of a cache of this shape.  The specification must be legal.

    Raises Refusal where the number of bytes does not follow from the specification, or a codec is not built.
    """
    made: list[Any] = [*spec.cuts, *(x for r in spec.regions for x in (r.select, r.tokens.select, r.merge) if x)]
    for x in made:
        if not word(x).sized:
            raise Refusal(f"the bytes of {x.word} are not known", word(x).lacks)
    rows: list[Row] = []
    tables: dict[tuple[Region, ...], None] = {}
    for part in parts(spec, shape):
        many = counts(spec, part.regions, shape.tokens)
        for r in part.regions:
            n = many[r.name]
            for side in r.sides:
                if not headed(side.stream) and 0 not in part.heads:
                    continue  # one for all heads
                heads = len(part.heads) if headed(side.stream) else 1
                across = stored(side, channels(spec, side.stream, shape))
                chunks = n // spec.update.every
                found = layout(spec, side, shape).bytes(n) | {
                    name: chunks * b for name, b in residues(side, spec.update.every, across).items()}
                rows += [Row(part.layer, heads, r.name, side.stream, name, n, b * heads * shape.batch)
                         for name, b in found.items()]
            if r.sides and spec.map.positions:
                own = len(part.heads) if r.select is not None else 1
                rows.append(Row(part.layer, own, r.name, "", "positions", n, 4 * n * own * shape.batch))
        if spec.map.word == "pages" and part.regions not in tables:  # layers of the same regions read one table
            tables[part.regions] = None
            rows += [Row(part.layer, 0, r.name, "", "page table", many[r.name],
                         4 * shape.batch * -(-many[r.name] // spec.map.size)) for r in part.regions if r.sides]
    return tuple(rows)


def bits(spec: KVSpec, shape: Shape, rows: Iterable[Row] | None = None) -> Fraction:
    """Bits of memory for each number of the model's keys and values; rows: what `account` said."""
    return Fraction(8 * sum(r.bytes for r in (account(spec, shape) if rows is None else rows)), shape.values)
