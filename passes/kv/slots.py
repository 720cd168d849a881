"""What a cache specification is: twelve slots, each a small frozen value.

A KV cache is a tensor of the attention cascade that is kept between calls.  Every published cache is a choice in the
same twelve slots, applied left to right when a token is written and right to left when it is read:

    CUT -> SHR -> PART{ SEL, MRG -> BAS -> PROJ -> RES -> ENC } -> MAP -> PLC      with UPD saying when

PART is the only combinator: each region has the inner slots once a stream, and regions are joined by the exact merge of
partial attention.  A slot's `word` says which of its kinds it is (`memcomp.passes.kv.words` is the list); a field that
the word does not take keeps its default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

Value: TypeAlias = "bool | int | float | str | tuple[int, ...]"


@dataclass(frozen=True, slots=True)
class Cut:
    """CUT: which tensor of the cascade is kept.  word: the stream, `k v x c r a s`."""

    word: str
    rope: str = "after"  # of k: kept after its rotary embedding, or before it, which the reader then applies
    width: int = 0  # channels of a token in a stream without heads (c, r); 0: what the model has


@dataclass(frozen=True, slots=True)
class Share:
    """SHR: which points have one storage.  word: `layers heads prefixes`."""

    word: str
    group: int = 1  # so many neighbours share one storage
    map: tuple[int, ...] = ()  # or: which one each point reads; a point that reads itself is a producer
    producer: str = "first"  # of a group
    trained: bool = True  # the model was trained so; if not, sharing changes what it says


@dataclass(frozen=True, slots=True)
class Select:
    """SEL: which points exist or are read, by a score.  word: the score."""

    word: str
    budget: int = 0  # points that stay, or
    share: float = 0.0  # their share of all
    unit: int = 1  # points that are judged as one (a page)
    window: int = 0  # newest queries that judge
    pool: int = 1  # width of the maximum that smooths the score
    weighted: bool = False  # the score times the size of the value
    when: str = "prefill"  # scored at each write, once behind prefill, at every token, or at every read
    mode: str = "drop"  # what is not chosen is gone, is kept but not read, or is computed anew


@dataclass(frozen=True, slots=True)
class Merge:
    """MRG: which points become one.  word: what makes a group."""

    word: str
    group: int = 2  # points that become one


@dataclass(frozen=True, slots=True)
class Basis:
    """BAS: an invertible change of basis.  word: `hadamard orthogonal permute scale offset`."""

    word: str
    rank: str = "e"  # over channels, or over heads (h) at a fixed channel
    size: int = 0  # of a block; 0: the whole rank
    where: str = "stored"  # applied to what is stored and undone by the reader, or folded into the model's weights
    pairs: bool = False  # treats the two channels of each rotary pair alike (one factor; moved together)


@dataclass(frozen=True, slots=True)
class Project:
    """PROJ: a linear map to fewer channels.  word: where its basis is from."""

    word: str
    rank: int
    where: str = "query"  # who undoes it: the model's weights, the query and the result, or the tile as it is read
    nested: bool = False  # any prefix of the channels is a basis too


@dataclass(frozen=True, slots=True)
class Residue:
    """RES: what is added to the decoded bulk.  word: `outliers lowrank predict`."""

    word: str
    share: float = 0.0  # of values that are kept apart
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Encode:
    """ENC: a codec of `memcomp.passes.kv.codecs`, its parameters as they are written, and the rank that groups cut."""

    word: str
    given: tuple[tuple[str, Value], ...] = ()
    along: str = "e"  # a group is channels of one token (e), or tokens of one channel (n)


@dataclass(frozen=True, slots=True)
class Side:
    """How one stream is written in one region: BAS -> PROJ -> RES -> ENC."""

    stream: str
    encode: Encode
    basis: tuple[Basis, ...] = ()
    project: Project | None = None
    residue: tuple[Residue, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """Points `start:stop:step` of a rank, as Python's slices; what is left out is None."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None


Points: TypeAlias = "tuple[int | Span, ...] | None"  # None: all


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which tokens a region takes, of those that no region before it takes.  word: `first last blocks chosen rest`."""

    word: str
    count: int = 0  # of first, last, and the tokens of a block
    stride: int = 1  # every so-manieth block
    select: Select | None = None  # of chosen


@dataclass(frozen=True, slots=True)
class Region:
    """PART: a piece of the domain.  For each layer and head the regions that have it share out the tokens in order.

    sides: one for each stream; none: the region keeps nothing.
    """

    name: str
    tokens: Tokens
    sides: tuple[Side, ...] = ()
    layers: Points = None
    heads: Points = None
    select: Select | None = None
    merge: Merge | None = None

    def side(self, stream: str) -> Side:
        return next(s for s in self.sides if s.stream == stream)


@dataclass(frozen=True, slots=True)
class Map:
    """MAP: bytes.  word: `dense`, `pages` (a table of them), `virtual` (contiguous addresses, committed by need)."""

    word: str = "dense"
    size: int = 1  # tokens of a page: storage grows by so many
    order: str = "bhn"  # ranks from the outermost to the innermost; channels come last
    scales: str = "side"  # each plane by itself, all planes of a row in one slot, or behind the codes of a page
    align: int = 1  # bytes: slots and pages (inline, trailing) or rows of a plane (side) are a multiple of it
    pad: bool = False  # fill up what is no multiple; otherwise it is refused
    positions: bool = False  # store the position of every token


@dataclass(frozen=True, slots=True)
class Place:
    """PLC: which memory holds a stream.  word: `device host flash remote`."""

    word: str
    stream: str
    ahead: int = 0  # steps that its data is asked for ahead


@dataclass(frozen=True, slots=True)
class Update:
    """UPD: when cells are written.  word: `token group prefill`."""

    word: str = "token"
    every: int = 1  # tokens that leave the newest region together
    rollback: int = 0  # tokens that can be taken back
    rewrite: bool = False  # cells are decoded and encoded again (refused)


@dataclass(frozen=True, slots=True)
class KVSpec:
    """A cache as a value.  The name is for people: it is not part of the digest."""

    name: str
    cuts: tuple[Cut, ...]
    regions: tuple[Region, ...]
    shares: tuple[Share, ...] = ()
    map: Map = field(default=Map())
    places: tuple[Place, ...] = ()
    update: Update = field(default=Update())

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(c.word for c in self.cuts)

    def cut(self, stream: str) -> Cut:
        return next(c for c in self.cuts if c.word == stream)

    def at(self, layer: int, head: int, layers: int, heads: int) -> tuple[Region, ...]:
        """The regions that share out the tokens of one (layer, head), in order, up to the one that takes the rest."""
        found: list[Region] = []
        for r in self.regions:
            if among(layer, r.layers, layers) and among(head, r.heads, heads):
                found.append(r)
                if r.tokens.word == "rest":
                    break
        return tuple(found)

    def __str__(self) -> str:
        from memcomp.passes.kv.text import show

        return show(self)

    @property
    def digest(self) -> str:
        """A hash of what the specification says, however it was written."""
        from memcomp.passes.kv.text import digest

        return digest(self)


def among(point: int, points: Points, extent: int) -> bool:
    """Is a point of a rank named?"""
    if points is None:
        return True
    for p in points:
        if isinstance(p, Span):
            if point in range(*slice(p.start, p.stop, p.step).indices(extent)):
                return True
        elif point == (p if p >= 0 else p + extent):
            return True
    return False
