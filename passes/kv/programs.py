"""The program that reads a cache: from a specification alone, with the arrays that a cache of it holds.

`reader` writes attention over stored numbers, `linear` what a side does before its codec; both without a word for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.errors import Refusal
from memcomp.ir.program import Program
from memcomp.passes.kv.account import Part, channels, codec_of, headed, owner, stored
from memcomp.passes.kv.codecs import from_bytes
from memcomp.passes.kv.linear import KEYS, Corrected, Extra, Fold, around, folded
from memcomp.passes.kv.reader import Attention, Piece, Stored, reader
from memcomp.passes.kv.side import Written
from memcomp.passes.kv.store import Cache, Held

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Read:
    """The program that reads one part of a layer's cache: Q[B, J, G, (P,) D] -> O[B, J, G, (P,) F].

    queries: for each J, the query heads that read it, as many as G; tables: inputs beside queries and stored planes.
    """

    program: Program
    cache: Cache
    part: Part
    queries: tuple[tuple[int, ...], ...]
    tables: Mapping[str, Array]
    pieces: tuple[Piece, ...]
    regions: tuple[Held, ...]

    def inputs(self, q: Array) -> dict[str, Array]:
        """What the program is given, for queries q[b, query heads, m, e] over what the cache holds now.

        Raises Refusal where queries are older than tokens that their region does not hide from them.
        """
        first = self.cache.tokens - q.shape[2]
        for piece, held in zip(self.pieces, self.regions, strict=True):
            n = len(held)
            fits = (held.positions == np.arange(self.cache.tokens - n, self.cache.tokens)) if piece.causal else (
                held.positions <= first)
            if not fits.all():
                raise Refusal(f"{q.shape[2]} queries, and the newest region does not hold all tokens from theirs on",
                              f"region {held.region.name}", "fewer queries, or a region of more of the newest tokens")
        rows = np.stack([q[:, list(heads)] for heads in self.queries], 1)
        found: dict[str, Array] = {**self.tables, "Q": rows if "P" in _ranks(self.program) else rows[..., 0, :]}
        for piece, held in zip(self.pieces, self.regions, strict=True):
            for name, side in held.sides.items():
                stem = f"{piece.name}{_stem(name, held)}"
                found |= _planes(side, stem, piece.page) | _residues(side, stem)
            batch, n = found["Q"].shape[0], len(held)
            span = max(s.cells.made.span for s in held.sides.values())
            room = max(1, -(-n // span)) * span
            room = batch * max(1, -(-n // piece.page)) * piece.page if piece.page else room
            for name, x, empty in (("POS", held.positions, 0), ("COUNT", held.count, 1)):
                if f"{piece.name}{name}" in {t.name for t in self.program.cascade.tensors}:
                    wide = [(0, 0)] * (x.ndim - 1) + [(0, room - n)]
                    found[f"{piece.name}{name}"] = np.pad(x, wide, constant_values=empty)
            found[f"{piece.name}LEN"] = np.full(batch, n)
            if piece.page:
                pages = max(1, -(-n // piece.page))
                found[f"{piece.name}INDPTR"] = np.arange(batch + 1) * pages
                found[f"{piece.name}PAGES"] = np.arange(batch * pages).astype(np.int32)
        return found

    def put(self, out: Array, o: Array) -> None:
        """Write the program's result o into out[b, query heads, m, f]."""
        for j, heads in enumerate(self.queries):
            out[:, list(heads)] = o[:, j] if o.ndim == 5 else o[:, j][:, :, None]


def _ranks(p: Program) -> set[str]:
    return {r.name for r in p.cascade.ranks}


def _stem(stream: str, held: Held) -> str:
    if stream == "v":
        return "V"
    at = [s for s in KEYS if s in held.sides].index(stream)
    return f"K{at or ''}"


def reads(cache: Cache, group: int, queries: int = 1) -> tuple[Read, ...]:
    """A program for each part of the cache's layer.  group: query heads of a key head; queries: newest tokens that ask.

    Raises Refusal where the reader lacks what the specification does.
    """
    return tuple(_read(cache, part, [r for r in regions if r.sides], group, queries) for part, regions in cache.held)


def _read(cache: Cache, part: Part, regions: list[Held], group: int, queries: int) -> Read:
    spec, shape = cache.spec, cache.shape
    common = not headed(spec.streams[0])
    for r in regions:
        _possible(cache, r)
    newest = next((r for r in regions if r.region.tokens.word == "last"), regions[-1])
    page = spec.map.size if spec.map.word == "pages" else 0
    pieces = tuple(Piece(f"R{i}", tuple(_stored(cache, r, s) for s in KEYS if s in r.sides),
                         _stored(cache, r, "v") if "v" in r.sides else None,
                         causal=r is newest and queries > 1, page=page)
                   for i, r in enumerate(regions))
    owners = (tuple(range(shape.heads)),) if common else tuple(
        tuple(h for h in range(shape.heads) if owner(spec.shares, "heads", h) == mine) for mine in part.heads)
    asking = tuple(tuple(h * group + g for h in heads for g in range(group)) for heads in owners)
    if len({len(a) for a in asking}) > 1:
        raise Refusal("key heads of one part are read by different numbers of heads", f"kv {spec.name}")
    folds = [folded(cache, part, r, {n: _stored(cache, r, n).width for n in r.sides}) for r in regions]
    model = folds[0][0].a.shape[-1]
    program = reader(Attention(len(asking[0]), 1 / sqrt(model), queries), pieces, spec.name)
    tables: dict[str, Array] = {}
    extras = []
    for piece, r, (k, v) in zip(pieces, regions, folds, strict=True):
        if common:  # one storage: the query head says which key head's fold it takes
            k, v = (Fold(np.repeat(f.a, group, 0), np.repeat(f.o, group, 0)) for f in (k, v))
        extra = _extra(cache, piece, r, k, v)
        tables |= {f"{piece.name}K{t}": a for t, a in (("FOLD", k.a), ("OFFSET", k.o)) if extra.turned or not k.same}
        tables |= {f"{piece.name}V{t}": a for t, a in (("FOLD", v.a), ("OFFSET", v.o)) if not v.same}
        extras.append(extra)
    if any(x.rope for x in extras) and cache.theta is not None:
        half = model // 2
        tables["ROPE"] = cache.theta ** (-(np.arange(model) % half) / half)
    made = around(program, tuple(extras), "g" if common else "j", model, folds[0][1].a.shape[-1])
    for piece, r in zip(pieces, regions, strict=True):
        for name, side in r.sides.items():
            for t in side.cells.made.codec.tables:
                tables[f"{piece.name}{_stem(name, r)}{t.name}"] = side.cells.tables[t.name] \
                    if t.name in side.cells.tables else t.array()
    return Read(made, cache, part, asking, tables, pieces, tuple(regions))


def _possible(cache: Cache, r: Held) -> None:
    """Raises Refusal for what the reader lacks."""
    if any(b.rank == "h" for n, s in r.sides.items() for b in s.side.basis if n != "k"):
        raise Refusal("the reader does not mix the heads of values", f"region {r.region.name}")
    if r.region.select is not None and r.region.select.mode == "recall":
        raise Refusal("the reader does not choose tokens yet", f"region {r.region.name}")


def _extra(cache: Cache, piece: Piece, r: Held, k: Fold, v: Fold) -> Extra:
    """What the program of a region has beside the reader's statements."""
    before = "x" in r.sides or any(c.rope == "before" for c in cache.spec.cuts)
    corrected = []
    for name, side in r.sides.items():
        if side.side.residue:
            stem = f"{piece.name}{_stem(name, r)}"
            channel = "fs" if name == "v" else "e" if len(piece.keys) == 1 else f"{stem}e".lower()  # as `reader` says
            corrected.append(Corrected(stem, channel, side.chunk, _stored(cache, r, name).width,
                                       {x.word: x.rank for x in side.side.residue}))
    rope = before and cache.theta is not None
    return Extra(piece.name, not k.same, not v.same, rope or k.a.ndim == 4, k.a.ndim == 4, rope,
                 r.region.merge is not None, "v" not in r.sides, tuple(corrected))


def _stored(cache: Cache, r: Held, stream: str) -> Stored:
    side = r.sides[stream].side
    across = stored(side, channels(cache.spec, stream, cache.shape))
    return Stored(codec_of(side.encode, across), across, side.encode.along)


def _planes(side: Written, stem: str, page: int) -> dict[str, Array]:
    """The planes of a side as the reader has them: whole pages, or at least one slot."""
    cells, made = side.cells, side.cells.made
    b, h, slots, groups, size = cells.data.shape
    per = max(1, page // made.span)
    room = max(1, -(-slots // per)) * per
    data = np.concatenate([cells.data, np.zeros((b, h, room - slots, groups, size), np.uint8)], 2)
    found = {}
    for name, x in from_bytes(made.codec, data.reshape(-1, size)).items():
        y = x.reshape(b, h, room, groups, -1)
        y = y.swapaxes(3, 4).reshape(b, h, -1, groups) if made.span > 1 else y.reshape(b, h, room, -1)
        if page:
            pages, wide = room // per, y.shape[-1]
            y = y.reshape(b, h, pages, -1, wide).swapaxes(1, 2).reshape(b * pages, h, -1, wide)
        found[stem + name] = y
    return found


def _residues(side: Written, stem: str) -> dict[str, Array]:
    """What is added to a side, by chunks: [b, h, chunk, ...]."""
    if not side.side.residue:
        return {}
    names = {"outlier places": "PLACES", "outlier values": "VALUES", "left": "LEFT", "right": "RIGHT"}
    b, h, _, _, _ = side.cells.data.shape
    wide = side.cells.read().shape[-1]
    found = {}
    for r in side.side.residue:
        many = ceil(r.share * side.chunk * wide)
        shapes = {"outlier places": (many,), "outlier values": (many,)} if r.word == "outliers" else {
            "left": (side.chunk, r.rank), "right": (r.rank, wide)}
        for name, shape in shapes.items():
            chunks = [x[name] for x in side.residues] or [np.zeros((b, h, *shape))]
            found[stem + names[name]] = np.stack(chunks, 2).astype(np.int64 if name == "outlier places" else float)
    return found
