"""What makes a specification legal: rules, each with a name and a sentence.

A rule looks at a specification and at the shape of a model, and yields (place in the text, what is wrong there).
`verify` refuses with the rule's name.  The algebra behind the rules of rotary embeddings is checked in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeAlias

from memcomp.ir.errors import MemcompError, Refusal
from memcomp.passes.kv.account import Shape, channels, codec_of, headed, layout, owner, padded, stored
from memcomp.passes.kv.slots import KVSpec, Map, Region, Select, Share, Side, Span
from memcomp.passes.kv.text import show_side, show_tokens, show_word
from memcomp.passes.kv.words import FLOATS, WORDS

Fault: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Rule:
    """says: the rule as a sentence.  check: (specification, shape) -> faults."""

    name: str
    says: str
    check: Callable[[KVSpec, Shape], Iterator[Fault]]


def _sides(s: KVSpec) -> Iterator[tuple[Region, Side, str]]:
    for r in s.regions:
        for side in r.sides:
            yield r, side, f"region {r.name}, {side.stream}: {show_side(side)}"


def _head(r: Region) -> str:
    return f"region {r.name}: {show_tokens(r.tokens)}"


def _selections(s: KVSpec) -> Iterator[tuple[Region, Select, str]]:
    for r in s.regions:
        for select, word in ((r.select, "select"), (r.tokens.select, "chosen")):
            if select is not None:
                yield r, select, f"region {r.name}: {word} {show_word(select)}"


def _sources(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    names = set(s.streams)
    place = f"cut {', '.join(map(show_word, s.cuts))}"
    if len(names) < len(s.cuts):
        yield place, "a stream is cut twice"
    for what, given in (("keys", {"k", "x", "c", "a", "s"}), ("values", {"v", "x", "c", "s"})):
        if not names & given:
            yield place, f"nothing that is kept gives the {what}"
        elif len(names & given) > 1:
            yield place, f"the {what} come from {' and '.join(sorted(names & given))}"
    if "r" in names and "c" not in names:
        yield place, "a rotary part without a latent"


def _streams(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for r in s.regions:
        named = [side.stream for side in r.sides]
        if named and sorted(named) != sorted(s.streams):
            yield _head(r), f"it writes {', '.join(named)}, and what is kept is {', '.join(s.streams)}"
    for p in s.places:
        if p.stream not in s.streams:
            yield f"place {p.stream} {p.word}", f"no stream {p.stream!r} is kept"
    if len({p.stream for p in s.places}) < len(s.places):
        yield "place " + ", ".join(p.stream for p in s.places), "a stream is in two places"


def _fields(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    slots: list[Any] = [*s.cuts, *s.shares, s.map, *s.places, s.update]
    for _, side, _ in _sides(s):
        slots += [*side.basis, *((side.project,) if side.project else ()), *side.residue]
    slots += [x for _, x, _ in _selections(s)] + [r.merge for r in s.regions if r.merge]
    for x in slots:
        row = WORDS[type(x)].get(x.word)
        if row is None:
            yield x.word, f"{type(x).__name__} has no word {x.word!r}"
            continue
        for f in fields(x):
            v = getattr(x, f.name)
            if f.name not in ("word", "stream", *row.takes) and v != f.default:
                yield show_word(x), f"{x.word} takes no {f.name}"
            least = 1 if f.name in _SIZES or (f.name, type(x)) in (("group", Share), ("size", Map)) else 0
            if isinstance(v, int) and v < least:
                yield show_word(x), f"{f.name} is at least {least}"
    for r in s.regions:
        if any(isinstance(p, Span) and p.step == 0 for p in (*(r.layers or ()), *(r.heads or ()))):
            yield _head(r), "a step of 0 goes nowhere"
        if r.tokens.word in ("first", "blocks") and r.tokens.count < 1 or r.tokens.count < 0 or r.tokens.stride < 1:
            yield _head(r), "a count of tokens is positive"
    for share in s.shares:
        if share.map and share.group > 1:
            yield f"share {show_word(share)}", "it says a group and a map"
    if len({r.name for r in s.regions}) < len(s.regions):
        yield "regions " + ", ".join(r.name for r in s.regions), "two regions have one name"


_SIZES = ("unit", "pool", "every", "align")


def _cover(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    seen: set[tuple[Region, ...]] = set()
    for layer in range(shape.layers):
        for head in range(shape.heads):
            found = s.at(layer, head, shape.layers, shape.heads)
            if found in seen:
                continue
            seen.add(found)
            words = [r.tokens.word for r in found]
            place = f"layer {layer}, head {head}: " + ("; ".join(map(_head, found)) or "no region")
            if words[-1:] != ["rest"]:
                yield place, "no region takes the rest of the tokens"
            for word in ("first", "last"):
                if words.count(word) > 1:
                    yield place, f"two regions take the {word} tokens"
            order = ["first", "last", "blocks", "chosen", "rest"]
            if [order.index(w) for w in words] != sorted(order.index(w) for w in words):
                yield place, "the order is: first, last, blocks, chosen, rest"
            if found and not any(r.sides and (r.tokens.word, r.tokens.count) != ("last", 0) for r in found):
                yield place, "no region is sure to keep a token"
    for r in s.regions:
        if not any(r in found for found in seen):
            yield _head(r), "no layer and head reach this region"


def _codec(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for _, side, place in _sides(s):
        try:
            codec_of(side.encode, stored(side, channels(s, side.stream, shape)))
        except Refusal as e:
            if "is not built" not in e.what:
                yield place, e.what
        except MemcompError as e:
            yield place, e.what


def _fits(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for _, side, place in _sides(s):
        whole = channels(s, side.stream, shape)
        for b in side.basis:
            extent = whole if b.rank == "e" else shape.heads
            size = b.size or extent
            if extent % size:
                yield place, f"blocks of {size} do not divide {extent} {'channels' if b.rank == 'e' else 'heads'}"
            elif b.word == "hadamard" and size & (size - 1):
                yield place, f"a rotation of this kind has a power of two, and {size} is none"
        if side.project and not 0 < side.project.rank <= whole:
            yield place, f"a projection of {whole} channels to {side.project.rank}"
        made = _built(s, side, shape)
        across = stored(side, whole)
        if made is not None and side.encode.along == "e" and across % made.group:
            yield place, f"groups of {made.group} do not divide {across} channels"
    for x in s.shares:
        if any(not 0 <= p < len(x.map) for p in x.map):
            yield f"share {show_word(x)}", "a map names its own places"
        elif x.word != "prefixes":
            extent = shape.layers if x.word == "layers" else shape.heads
            if extent % (len(x.map) or x.group):
                yield f"share {show_word(x)}", f"{len(x.map) or x.group} does not divide {extent} {x.word}"


@lru_cache(maxsize=8)
def _cases(s: KVSpec, shape: Shape) -> tuple[tuple[Region, ...], ...]:
    """The region lists that there are, each once."""
    return tuple(dict.fromkeys(s.at(a, b, shape.layers, shape.heads) for a in range(shape.layers)
                               for b in range(shape.heads)))


def _built(s: KVSpec, side: Side, shape: Shape) -> Any:
    """The codec of a side, or None where it cannot be made (another rule says so)."""
    try:
        return codec_of(side.encode, stored(side, channels(s, side.stream, shape)))
    except MemcompError:
        return None


def _whole(s: KVSpec, shape: Shape, r: Region) -> bool:
    """Do tokens come to a region in whole groups, as they leave the newest one?"""
    return r.tokens.word == "rest" and not any(r in found and any(q.tokens.word in ("blocks", "chosen") for q in found)
                                               for found in _cases(s, shape))


def _open_group(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    waits = {region for region, side, _ in _sides(s) if side.encode.along == "n"}
    for r, side, place in _sides(s):
        made = _built(s, side, shape)
        if side.encode.along == "n":
            if not _whole(s, shape, r):
                yield place, "groups of tokens close only in a region that takes all the rest"
            elif made is not None and s.update.every % made.group:
                yield place, f"groups of {made.group} tokens, and {s.update.every} leave the newest region together"
    for r in s.regions:
        if r.merge is not None and r.merge.word == "mean" and r.merge.group and (
                s.update.every % r.merge.group or r.merge.group > 1 and not _whole(s, shape, r)):
            yield f"region {r.name}: merge {show_word(r.merge)}", (
                f"{r.merge.group} tokens become one, and {s.update.every} leave the newest region together")
    if s.update.every > 1 or waits:
        for layer in range(shape.layers):
            for head in range(shape.heads):
                found = s.at(layer, head, shape.layers, shape.heads)
                last = [r for r in found if r.tokens.word == "last"]
                if not last and (s.update.every > 1 or waits & set(found)):
                    yield f"layer {layer}, head {head}", "no region holds the newest tokens until their group is full"
                    return


def _select_before_groups(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for r, select, place in _selections(s):
        if select.when in ("write", "prefill") and select.mode == "drop" and select is r.select:
            continue  # chosen before it is encoded
        for side in r.sides:
            made = _built(s, side, shape)
            if side.encode.along == "n" and made is not None and select.unit % made.group:
                yield place, f"{select.unit} tokens are judged as one, and groups of {side.stream} hold {made.group}"
    if s.map.word != "dense":
        for _, side, place in _sides(s):
            made = _built(s, side, shape)
            if side.encode.along == "n" and made is not None and s.map.size % made.group:
                yield place, f"pages of {s.map.size} tokens, and groups of {made.group}"


def _write_once(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    if s.update.rewrite:
        yield f"update {show_word(s.update)}", "cells are decoded and encoded again"
    for r, side, place in _sides(s):
        if r.merge is not None and not r.merge.group and side.encode.word not in FLOATS:
            yield place, "a mean that grows is written again and again, so it cannot be encoded"
        if r.tokens.word == "last" and side.encode.word not in FLOATS and any(
                r in found and any(q.sides for q in found[found.index(r) + 1:]) for found in _cases(s, shape)):
            yield place, "what leaves the newest region was encoded there"


def _rollback(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    if not s.update.rollback:
        return
    place = f"update {show_word(s.update)}"
    for found in _cases(s, shape):
        window = sum(r.tokens.count for r in found if r.tokens.word == "last")
        if window < s.update.rollback and (s.update.every > 1 or any(r.select or r.merge or not r.sides
                                                                     for r in found)):
            yield place, f"the newest region is sure of {window} tokens only"


def _shared_storage(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for rank, extent in (("layers", shape.layers), ("heads", shape.heads)):
        for point in range(extent):
            at = owner(s.shares, rank, point)
            if owner(s.shares, rank, at) != at:
                yield f"share {rank}", f"{rank[:-1]} {point} reads {at}, which itself reads another"
                return
            for other in range(shape.heads if rank == "layers" else shape.layers):
                a, b = ((point, other), (at, other)) if rank == "layers" else ((other, point), (other, at))
                if s.at(*a, shape.layers, shape.heads) != s.at(*b, shape.layers, shape.heads):
                    yield f"share {rank}", f"{rank[:-1]} {point} reads the storage of {at}, and has regions of its own"
                    return


def _headless(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    common = [x for x in s.streams if not headed(x)]
    if common and any(x.word == "heads" for x in s.shares):
        yield "share heads", f"{common[0]} has no heads"
    for r in s.regions:
        if common and r.heads is not None:
            yield _head(r), f"it is of some heads, and {common[0]} has no heads"
    for _, side, place in _sides(s):
        if not headed(side.stream) and any(b.rank == "h" for b in side.basis):
            yield place, f"{side.stream} has no heads"


def _inline(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    if s.map.pad or s.map.align == 1:
        return
    for _, side, place in _sides(s):
        if _built(s, side, shape) is None:
            continue
        made = layout(s, side, shape)
        sizes = ([sum(made.row(i) for i in range(len(made.codec.planes)))] if s.map.scales == "inline" else
                 [made.page * made.slot] if s.map.scales == "trailing" else
                 [made.row(i) for i in range(len(made.codec.planes))])
        for n in sizes:
            if padded(n, s.map.align) != n:
                what = {"inline": "a slot", "trailing": "a page", "side": "a row"}[s.map.scales]
                yield place, f"{what} takes {n} bytes, which are no multiple of {s.map.align}"
                break


def _positions(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    if not shape.rope or s.map.positions or not any(c.rope == "before" or c.word == "x" for c in s.cuts):
        return
    for r, select, place in _selections(s):
        if r.sides and select.mode != "recall":
            yield place, "the reader rotates keys by their positions, which are lost where tokens are chosen"
    for r in s.regions:
        if r.sides and r.merge is not None:
            yield _head(r), "the reader rotates keys by their positions, and merged tokens have none"


def _absorbed(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for _, side, place in _sides(s):
        for b in side.basis:
            if b.where == "weights" and side.stream == "k" and shape.rope and b.rank == "e" and not b.pairs and (
                    b.word in ("hadamard", "orthogonal", "permute")):
                yield place, f"{b.word} in the weights stands before the rotary embedding, and does not commute with it"


def _pairs(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for _, side, place in _sides(s):
        for b in side.basis:
            if b.word == "scale" and b.where == "weights" and side.stream == "k" and shape.rope and (
                    b.rank == "e" and not b.pairs):
                yield place, "factors in the weights stand before the rotary embedding, and differ within a pair"


def _heads_apart(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for r, side, place in _sides(s):
        for b in side.basis:
            if b.rank == "h" and b.where == "weights":
                yield place, "heads attend apart, so what mixes them is undone by the reader"
            elif b.rank == "h" and b.word == "offset":
                yield place, "an offset is of channels"
            elif b.rank == "h" and (any(x.word == "heads" for x in s.shares) or any(
                    q.heads is not None for q in s.regions)):
                yield place, "heads are mixed, and some of them are stored apart"
            elif b.rank == "h" and any(x.select is not None for x in (r, r.tokens)):
                yield place, "heads are mixed, and each chooses its own tokens"


def _projected(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for _, side, place in _sides(s):
        p = side.project
        if p is None or side.stream != "k" or not shape.rope:
            continue
        if p.where == "weights":
            yield place, "weights stand before the rotary embedding"
        elif p.where == "query" and s.cut("k").rope == "before":
            yield place, "the reader rotates rebuilt keys, so the query cannot take the projection"


def _residue(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for r, side, place in _sides(s):
        if not side.residue:
            continue
        if side.encode.word in FLOATS:
            yield place, "a codec without error leaves nothing to add"
        if len({x.word for x in side.residue}) < len(side.residue):
            yield place, "a residue is said twice"
        if not _whole(s, shape, r) or r.select is not None or r.merge is not None:
            yield place, "what is added belongs to whole groups of tokens, in a region that takes all the rest"
        for x in side.residue:
            if x.word == "lowrank" and not 0 < x.rank < s.update.every:
                yield place, f"a rank of {x.rank} for {s.update.every} tokens"
            if x.word == "outliers" and not 0 < x.share <= 0.5:
                yield place, f"a share of {x.share}"


def _budget(s: KVSpec, shape: Shape) -> Iterator[Fault]:
    for r, select, place in _selections(s):
        if (select.budget > 0) == (select.share > 0) or not 0 <= select.share <= 1:
            yield place, "it keeps a number of tokens (budget) or a share of them, up to 1"
        if select.word == "strip" and not select.window:
            yield place, "a strip of the newest queries needs their number (window)"
        if (select.when == "read") != (select.mode == "recall"):
            yield place, "what is chosen at every read is recalled, and only that"
        if not r.sides and select is r.select:
            yield place, "the region drops all its tokens"
        if select.unit > 1 and select.mode != "recall" and s.update.every % select.unit:
            yield place, f"{select.unit} tokens are judged as one, and {s.update.every} come together"
    for found in _cases(s, shape):
        if sum((r.select is not None) + (r.tokens.select is not None) for r in found) > 1:
            yield "; ".join(map(_head, found)), "two selections for one head"


RULES = (
    Rule("fields", "a word takes the fields of its row in the table, and counts are positive", _fields),
    Rule("sources", "what is kept gives keys once and values once", _sources),
    Rule("streams", "a region writes each stream that is kept, or drops its tokens", _streams),
    Rule("cover", "for each layer and head the regions take every token once: first, last, blocks, chosen, rest",
         _cover),
    Rule("codec", "a codec is one that is known, with parameters that it takes", _codec),
    Rule("fits", "groups, blocks and shared neighbours divide the rank that they cut", _fits),
    Rule("open-group", "groups along n close as a whole: a `last` region holds their tokens until then, and what "
         "leaves it is whole groups", _open_group),
    Rule("select-before-groups", "tokens are chosen before groups along n are closed, or in units that are whole "
         "groups; a page is whole groups", _select_before_groups),
    Rule("write-once", "a cell that is encoded is never decoded and encoded again", _write_once),
    Rule("rollback", "tokens can be taken back only while they are in the newest region, or where nothing is grouped, "
         "chosen or dropped", _rollback),
    Rule("shared-storage", "the specification belongs to the storage: who reads another's storage has no regions of "
         "its own", _shared_storage),
    Rule("headless", "what all heads share cannot be cut by heads", _headless),
    Rule("inline-alignment", "a gathered row stays aligned: scales lie inline only where the slot is a multiple of "
         "`align`", _inline),
    Rule("rope-positions", "a cut before the rotary embedding needs the position of every token, stored or derivable",
         _positions),
    Rule("absorb-before-rope", "a rotation or permutation of channels of keys does not commute with the rotary "
         "embedding, so it cannot stand in the weights (whole pairs may move with their frequencies)", _absorbed),
    Rule("pair-scale", "a factor on a channel of keys commutes with the rotary embedding only where both channels of "
         "the pair have it", _pairs),
    Rule("heads-apart", "a basis across heads is undone before the score", _heads_apart),
    Rule("project-rope", "a projection of keys stands in the query behind the rotary embedding, or in the tile before "
         "it", _projected),
    Rule("residue", "what is added to the bulk belongs to whole groups of tokens and to a codec that loses something",
         _residue),
    Rule("budget", "a selection has one budget, and a mode that fits when it is made", _budget),
)


FIRST = ("fields", "sources", "streams", "cover")  # the others look at what these promise


def broken(spec: KVSpec, shape: Shape | None = None) -> Iterator[tuple[Rule, str, str]]:
    """Every rule that is broken, where, and how; rules behind a broken one that others build on are not asked."""
    at = Shape() if shape is None else shape
    for rule in RULES:
        found = list(rule.check(spec, at))
        yield from ((rule, place, what) for place, what in found)
        if found and rule.name in FIRST:
            return


def verify(spec: KVSpec, shape: Shape | None = None) -> KVSpec:
    """The specification itself, if it is legal for a model of this shape (`Shape()` if none is said).

    Raises Refusal: what is wrong, where it is written, and the rule by its name.
    """
    for rule, place, what in broken(spec, shape):
        raise Refusal(f"kv {spec.name}: {what}", place, f"rule {rule.name}: {rule.says}")
    return spec
