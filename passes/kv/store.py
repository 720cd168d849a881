"""What a specification means: a cache of one layer in numpy, written token by token and read in float64.

    cache = Cache(spec, shape, tables=..., theta=10000.0)
    cache.append({"k": k, "v": v})              # [batch, heads, tokens, channels]; before rotary embedding if so cut
    cache.attend(q)                             # [batch, query heads, queries, channels], rotated
    cache.rollback(2)

The regions of a layer share out its tokens: the first ones, the newest ones until their group is whole, and what leaves
these goes to blocks, to chosen ones and to the rest.  Each region attends alone; partial results are joined exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.errors import InputError, Refusal
from memcomp.passes.kv.account import Part, Shape, channels, headed, layout, owner, parts
from memcomp.passes.kv.cells import Cells
from memcomp.passes.kv.choose import chosen, score
from memcomp.passes.kv.rules import verify
from memcomp.passes.kv.side import Tables, Written, rotate, table
from memcomp.passes.kv.slots import KVSpec, Region
from memcomp.passes.kv.status import lacks

Array = npt.NDArray[Any]
Streams = Mapping[str, Array]
TAKEN_BACK = "rule rollback: update group{rollback=N}, with N tokens in the newest region"
ONE_HEAD = {"scale": 1, "offset": 1, "direction": 1, "orthogonal": 2, "project": 2, "keys": 2, "values": 2}


@dataclass(slots=True)
class Held:
    """A region of some heads: its streams, the position of every token, what it is worth, how many it stands for."""

    region: Region
    sides: dict[str, Written]
    positions: Array  # [b, h, n]
    worth: Array  # [b, h, n]
    seen: int = 0  # tokens that came here
    count: Array = field(default_factory=lambda: np.ones(0))  # [n]

    def __len__(self) -> int:
        return int(self.positions.shape[2])

    def append(self, x: Streams, positions: Array, worth: Array) -> None:
        """Write tokens; positions and worth are [b, h, n]."""
        n = positions.shape[2]
        self.seen += n
        if not n:
            return
        self.positions = np.concatenate([self.positions, positions], 2)
        self.worth = np.concatenate([self.worth, worth], 2)
        self.count = np.concatenate([self.count, np.ones(n)])
        for name, side in self.sides.items():
            side.append(x[name])

    def keep(self, index: Array) -> None:
        """Only the tokens index[b, h, i] stay."""
        self.positions, self.worth = (np.take_along_axis(a, index, 2) for a in (self.positions, self.worth))
        self.count = self.count[:index.shape[2]]
        for side in self.sides.values():
            side.cells.keep(index if headed(side.side.stream) else index[:, :1])

    def merge(self, x: Streams, positions: Array, group: int) -> None:
        """Write the means of `group` neighbours; group 0: all that ever came become one."""
        n = positions.shape[2]
        self.seen += n
        if not n:
            return
        if group:
            means = {name: a.reshape(*a.shape[:2], -1, group, a.shape[-1]).mean(3) for name, a in x.items()}
            self.append(means, positions[:, :, group - 1::group], np.zeros(positions[:, :, ::group].shape))
            self.seen -= n // group
            self.count[-(n // group):] = group
            return
        before = float(self.count.sum())
        for name, side in self.sides.items():
            total = x[name].sum(2, keepdims=True) + (side.read() * before).sum(2, keepdims=True)
            side.cells.cut(0)
            side.append(total / (before + n))
        self.positions, self.worth = positions[:, :, -1:], np.zeros(positions[:, :, -1:].shape)
        self.count = np.array([before + n])

    def stays(self, start: int) -> int:
        """Tokens that stay when those at positions from `start` on go.  Refusal: they are no whole slots."""
        stay = int((self.positions < start).sum(2).max()) if self.positions.size else 0
        if stay == len(self):
            return stay
        span = max(s.cells.made.span for s in self.sides.values())
        if self.region.select or self.region.merge or stay % span or any(s.residues for s in self.sides.values()):
            raise Refusal("tokens cannot be taken back any more", f"region {self.region.name}", TAKEN_BACK)
        return stay

    def cut(self, stay: int) -> None:
        """Only the oldest tokens stay."""
        self.seen -= len(self) - stay
        self.positions, self.worth, self.count = (self.positions[:, :, :stay], self.worth[:, :, :stay],
                                                  self.count[:stay])
        for side in self.sides.values():
            side.cells.cut(stay)


@dataclass(slots=True)
class Cache:
    """One layer's cache.  Raises Refusal where the specification is illegal, or the interpreter lacks a part of it.

    tables: what calibration or the model gives (`memcomp.passes.kv.side`); theta: of the rotary embedding, None: none.
    """

    spec: KVSpec
    shape: Shape
    layer: int = 0
    tables: Tables = field(default_factory=dict)
    theta: float | None = None
    tokens: int = 0
    held: list[tuple[Part, list[Held]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        verify(self.spec, self.shape)
        if missing := lacks(self.spec, self.shape):
            raise Refusal(f"kv {self.spec.name} does not run here", missing[0])
        if owner(self.spec.shares, "layers", self.layer) != self.layer:
            raise Refusal(f"layer {self.layer} owns no storage",
                          hint=f"it reads that of layer {owner(self.spec.shares, 'layers', self.layer)}")
        for part in parts(self.spec, self.shape):
            if part.layer == self.layer:
                self.held.append((part, [self._region(part, r) for r in part.regions]))

    def _region(self, part: Part, r: Region) -> Held:
        heads, batch = len(part.heads), self.shape.batch
        mine = self._tables(part)
        sides = {}
        for s in r.sides:
            made = layout(self.spec, s, self.shape)
            own = {t.name: mine[f"{s.stream}.{t.name}"] for t in made.codec.tables
                   if t.values is None and f"{s.stream}.{t.name}" in mine}
            cells = Cells.of(made, own, batch, heads if headed(s.stream) else 1)
            sides[s.stream] = Written(s, cells, mine, self.spec.update.every)
        none = np.zeros((batch, heads, 0))
        return Held(r, sides, none.astype(np.int64), none)

    def _tables(self, part: Part) -> Tables:
        """Tables of these heads."""
        return {name: np.asarray(t)[list(part.heads)] if np.ndim(t) == ONE_HEAD.get(name.partition(".")[2], 99) + 1
                and name[0] in "kv" else t for name, t in self.tables.items()}

    # -- writing ------------------------------------------------------------------------------------------------------

    def append(self, x: Streams, queries: Array | None = None) -> None:
        """Write tokens of every stream, [b, h, n, e] each (h = 1 for one without heads); the first call is the prompt.

        queries: the prompt's, rotated, [b, query heads, n, e]: what chooses by attention needs them.
        """
        if sorted(x) != sorted(self.spec.streams):
            raise InputError(f"given are the streams {', '.join(sorted(x))}",
                             hint=f"the specification keeps {', '.join(self.spec.streams)}")
        n = next(iter(x.values())).shape[2]
        for name, a in x.items():
            s = self.shape
            wanted = (s.batch, s.heads if headed(name) else 1, n, channels(self.spec, name, s))
            if a.shape != wanted:
                raise InputError(f"{name} has shape {a.shape}", hint=f"this cache takes {wanted}")
        at = np.arange(self.tokens, self.tokens + n)
        for part, regions in self.held:
            mine = {name: np.asarray(a, float)[:, list(part.heads)] if headed(name) else np.asarray(a, float)
                    for name, a in x.items()}
            q = None
            if queries is not None:
                q = np.asarray(queries, float)
                if any(map(headed, x)):
                    q = self._by_head(q)[:, list(part.heads)].reshape(q.shape[0], -1, *q.shape[2:])
            positions = np.broadcast_to(at, (self.shape.batch, len(part.heads), n))
            self._shared_out(regions, mine, positions, self._worth(regions, mine, positions, q))
        self.tokens += n

    def _by_head(self, q: Array) -> Array:
        """Queries by the key head that they read: [b, h, r, m, e]."""
        return q.reshape(q.shape[0], self.shape.heads, -1, *q.shape[2:])

    def _shared_out(self, regions: list[Held], x: Streams, at: Array, worth: Array) -> None:
        for r in regions:
            t, n = r.region.tokens, at.shape[2]
            if t.word == "rest":
                self._rest(r, x, at, worth)
                return
            if t.word == "last":
                x, at, worth = self._through(r, x, at, worth)
                continue
            take = np.zeros(at.shape, bool)
            if t.word == "first":
                take[:, :, :max(0, t.count - len(r))] = True
            elif t.word == "blocks":
                take = at // t.count % t.stride == 0
            elif t.select is not None and self.tokens == 0 and n:
                np.put_along_axis(take, chosen(t.select, worth, n), True, 2)
            mine, left = _places(take), _places(~take)
            if r.sides:
                r.append(_gather(x, mine), np.take_along_axis(at, mine, 2), np.take_along_axis(worth, mine, 2))
            x, at, worth = _gather(x, left), np.take_along_axis(at, left, 2), np.take_along_axis(worth, left, 2)

    def _through(self, r: Held, x: Streams, at: Array, worth: Array) -> tuple[Streams, Array, Array]:
        """Tokens enter the newest region; the oldest of it leave in whole groups, as it holds them."""
        r.append(x, at, worth)
        every = self.spec.update.every
        out = max(0, len(r) - r.region.tokens.count) // every * every
        left = {name: side.read()[:, :, :out] for name, side in r.sides.items()}
        gone, worth = r.positions[:, :, :out], r.worth[:, :, :out]
        r.positions, r.worth, r.count = r.positions[:, :, out:], r.worth[:, :, out:], r.count[out:]
        for side in r.sides.values():
            side.cells.drop(out)
        return left, gone, worth

    def _rest(self, r: Held, x: Streams, at: Array, worth: Array) -> None:
        select = r.region.select
        if not r.sides:
            return
        if r.region.merge is not None:
            r.merge(x, at, r.region.merge.group)
            return
        if select is not None and select.when == "prefill" and self.tokens == 0 and at.shape[2]:
            index = chosen(select, worth, at.shape[2])
            x, at, worth = _gather(x, index), np.take_along_axis(at, index, 2), np.take_along_axis(worth, index, 2)
        r.append(x, at, worth)
        if select is not None and select.when in ("token", "write"):
            r.keep(chosen(select, r.worth, r.seen))

    def _worth(self, regions: list[Held], x: Streams, at: Array, q: Array | None) -> Array:
        """What new tokens are worth to the part's one selection; 0 where only later queries can tell."""
        select = next((s for r in regions if (s := r.region.select or r.region.tokens.select)), None)
        if select is None:
            return np.zeros(at.shape)
        if self.tokens == 0 and select.word in ("attention", "strip") and q is None:
            raise InputError(f"{select.word} chooses by the prompt's queries", hint="append(streams, queries)")
        k, v = self.rebuilt(x, at)
        worth = score(select, k, v, q if self.tokens == 0 else None, at, 1 / sqrt(k.shape[-1]), self.tables)
        return worth if worth.shape == at.shape else worth.sum(1, keepdims=True)  # one storage for all heads

    # -- reading ------------------------------------------------------------------------------------------------------

    def rebuilt(self, x: Streams, at: Array) -> tuple[Array, Array]:
        """Keys, rotated, and values of what is kept, [b, h, n, e] each."""
        if "k" in x:
            k, v = x["k"], x["v"]
            before = self.spec.cut("k").rope == "before"
        else:
            name = "x" if "x" in x else "c"
            k, v = (x[name] @ table(self.tables, name, what) for what in ("keys", "values"))
            before = name == "x"
        if before and self.theta is not None:
            k = rotate(k, at, self.theta)
        if "r" in x:
            k = np.concatenate([k, np.broadcast_to(x["r"], (*k.shape[:3], x["r"].shape[-1]))], -1)
        return k, v

    def read(self) -> list[tuple[Part, Held, Array, Array, Array]]:
        """(heads, region, keys, values, positions) of every region that holds tokens."""
        found = []
        for part, regions in self.held:
            for r in regions:
                if len(r):
                    k, v = self.rebuilt({n: s.read() for n, s in r.sides.items()}, r.positions)
                    found.append((part, r, k, v, r.positions))
        return found

    def attend(self, q: Array, scale: float | None = None) -> Array:
        """Attention of the newest m queries q[b, query heads, m, e] over all tokens, causal: [b, query heads, m, f]."""
        if q.ndim != 4 or q.shape[0] != self.shape.batch or q.shape[1] % self.shape.heads or not q.shape[2]:
            raise InputError(f"queries of shape {q.shape}", hint=f"batch {self.shape.batch}, a multiple of "
                             f"{self.shape.heads} heads, queries, channels")
        if q.shape[2] > self.tokens > 0:
            raise InputError(f"{q.shape[2]} queries of {self.tokens} tokens")
        groups = self._by_head(np.asarray(q, float))
        m = groups.shape[3]
        asked = np.arange(self.tokens - m, self.tokens)
        factor = 1 / sqrt(q.shape[-1]) if scale is None else scale
        partial: dict[int, list[tuple[Array, Array, Array]]] = {h: [] for h in range(self.shape.heads)}
        scored: list[tuple[Held, int, int, Array]] = []
        for part, r, k, v, at in self.read():
            for head in range(self.shape.heads):
                mine = owner(self.spec.shares, "heads", head)
                i = head if k.shape[1] == self.shape.heads and not headed(self.spec.streams[0]) else (
                    part.heads.index(mine) if mine in part.heads else -1)
                if i < 0:
                    continue
                j = min(i, at.shape[1] - 1)
                s = np.einsum("brme,bne->brmn", groups[:, head], k[:, i]) * factor + np.log(r.count)
                live = at[:, j, None, None, :] <= asked[:, None]
                if r.region.select is not None and r.region.select.mode == "recall":
                    live = live & self._recalled(r, groups[:, head], k[:, i], j)[:, None, None]
                s = np.where(live, s, -np.inf)
                top = np.maximum(s.max(-1), -1e300)
                w = np.exp(s - top[..., None])
                partial[head].append((top, w.sum(-1), np.einsum("brmn,bnf->brmf", w, v[:, i])))
                scored.append((r, j, head, s))
        out = []
        ends = {}
        for head, found in partial.items():
            if not found:
                raise InputError(f"head {head} holds no tokens", hint="append first")
            top = np.max([t for t, _, _ in found], 0)
            total = sum(np.exp(t - top) * n for t, n, _ in found)
            ends[head] = (top, total)
            with np.errstate(invalid="ignore"):
                out.append(sum(np.exp(t - top)[..., None] * o for t, _, o in found) / np.asarray(total)[..., None])
        for r, j, head, s in scored:
            if self._summed:
                top, total = ends[head]
                r.worth[:, j] += (np.exp(s - top[..., None]) / np.asarray(total)[..., None]).sum((1, 2))
        return np.stack(out, 1).reshape(*q.shape[:3], -1)

    @property
    def _summed(self) -> bool:
        """Does a region choose by what queries gave its tokens?"""
        return any(r.select is not None and r.select.word == "attention" for r in self.spec.regions)

    def _recalled(self, r: Held, q: Array, k: Array, head: int) -> Array:
        """Which tokens these queries read: live[b, n]."""
        select = r.region.select
        assert select is not None
        worth = np.einsum("brme,bne->bn", q, k) if select.word == "pages" else r.worth[:, head]
        index = chosen(select, worth[:, None], len(r))[:, 0]
        live = np.zeros(worth.shape, bool)
        np.put_along_axis(live, index, True, 1)
        live[:, len(r) // select.unit * select.unit:] = True  # a page that is still open is read
        return live

    def rollback(self, tokens: int) -> None:
        """Take the newest tokens back.  Raises Refusal where one of them is encoded with older ones."""
        if tokens > self.tokens:
            raise Refusal(f"{tokens} tokens cannot be taken back of {self.tokens}")
        found: list[tuple[Held, int]] = []
        for _, regions in self.held:
            mine = [(r, r.stays(self.tokens - tokens)) for r in regions]
            if sum(len(r) - stay for r, stay in mine) != tokens:
                raise Refusal("tokens cannot be taken back any more", "some of them are dropped", TAKEN_BACK)
            found += mine
        for r, stay in found:
            r.cut(stay)
        self.tokens -= tokens

    def buffers(self) -> dict[tuple[int, str, str, str], Array]:
        """(part, region, stream, plane) -> the array in memory: their sizes are what `account` says of this layer."""
        return {(i, r.region.name, name, plane): a for i, (_, regions) in enumerate(self.held) for r in regions
                for name, side in r.sides.items() for plane, a in side.buffers().items()}


def _places(take: Array) -> Array:
    """Where take[b, h, n] is true, as many places for each (b, h): index[b, h, i]."""
    n = int(take.sum(2).max()) if take.size else 0
    return np.argsort(~take, axis=2, kind="stable")[..., :n]


def _gather(x: Streams, index: Array) -> Streams:
    """x[b, h, index[b, h, i], e] of every stream; one without heads has the first head's."""
    return {name: np.take_along_axis(a, (index if headed(name) else index[:, :1])[..., None], 2)
            for name, a in x.items()}
