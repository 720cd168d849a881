"""The keys and values of one layer as a specification stores them: torch buffers of fixed size, written in place.

    storage = Storage(parse("kivi{bits=4}"), batch=1, heads=3, width=64, tokens=2048)
    storage.append(k, v)                           # [batch, heads, new tokens, width], rotated as the model does
    k, v = storage.read()                          # [batch, heads, tokens, width]; what lies behind `length` is no key

A cell is written once.  Which tokens are encoded by a call follows from the length, a tensor, so that no call is
compiled twice; nothing is allocated but results.  `read` is index arithmetic over the stored planes: compiled with
memcomp, attention reads the codes and never a decoded key.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memcomp.dtypes import DTYPES
from memcomp.ir.errors import InputError, Refusal
from memcomp.ir.expr import Call, Const, Expr, Var
from memcomp.kv.spell import Speller, run
from memcomp.passes.kv.account import Shape, codec_of, owner
from memcomp.passes.kv.reader import Stored
from memcomp.passes.kv.rules import verify
from memcomp.passes.kv.slots import Cut, KVSpec, Map, Region
from memcomp.passes.kv.status import lacks

STREAMS = ("k", "v")


class Storage(nn.Module):
    """One layer: the one numbered `layer` of `layers`.  dtype: of what is read; tables: what a codec must be given.

    Raises Refusal where the specification is illegal, or says what has no form here.
    """

    length: Tensor

    def __init__(self, spec: KVSpec, *, batch: int, heads: int, width: int, tokens: int, layer: int = 0,
                 layers: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 tables: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        shape = Shape(layers=layers, batch=batch, heads=heads, tokens=tokens, head=width)
        regions = regions_of(spec, shape, layer)
        self.spec, self.tokens, self.dtype = spec, tokens, dtype
        self.shape = (batch, heads, width)
        self.first = min(tokens, next((r.tokens.count for r in regions if r.tokens.word == "first"), 0))
        newest = next((r for r in regions if r.tokens.word == "last"), None)
        self.every = spec.update.every if newest is not None else 1
        self.newest = newest.tokens.count if newest is not None else 0
        ring = self.newest + self.every - 1 if newest is not None else 0
        sizes = {"first": self.first, "last": min(ring, tokens), "rest": self._left(tokens)}
        self.ring = sizes["last"]
        self.held: dict[tuple[str, str], Stored] = {}
        self.sizes: dict[str, int] = {}
        for r in regions:
            for side in r.sides:
                stored = Stored(codec_of(side.encode, width), width, side.encode.along)
                if stored.span > 1 and r.tokens.word != "rest":
                    raise Refusal(f"region {r.name} holds tokens that are encoded together", str(spec).strip(),
                                  "groups along n only in the region of the rest")
                if r.tokens.word == "rest" and stored.span > 1 and newest is None:
                    raise Refusal("groups along n need a region that holds the newest tokens until a group is whole",
                                  str(spec).strip(), "region newest: last 0")
                self._hold(r.tokens.word, side.stream, stored, sizes[r.tokens.word], device, tables or {})
        self.register_buffer("length", torch.zeros((), dtype=torch.int64, device=device))

    def _left(self, tokens: int) -> int:
        """Tokens that the region of the rest holds of so many."""
        return max(0, tokens - self.first - self.newest) // self.every * self.every

    def _hold(self, region: str, stream: str, stored: Stored, tokens: int, device: torch.device | str,
              tables: Mapping[str, Tensor]) -> None:
        batch, heads, width = self.shape
        self.held[region, stream] = stored
        self.sizes[region] = tokens
        for p in stored.codec.planes:
            extents = (tokens, width // stored.codec.group * p.per) if stored.along == "e" else (
                tokens // stored.span * p.per, width)
            self.register_buffer(_name(region, stream, p.name),
                                 torch.zeros(batch, heads, *extents, dtype=DTYPES[p.dtype], device=device))
        for t in stored.codec.tables:
            name = _name(region, stream, t.name)
            if t.values is None and f"{stream}.{t.name}" not in tables:
                raise InputError(f"the table {f'{stream}.{t.name}'!r} must be given", f"shape {t.shape}, {t.dtype}")
            value = tables[f"{stream}.{t.name}"] if t.values is None else torch.from_numpy(t.array())
            if tuple(value.shape) != t.shape:
                raise InputError(f"the table {f'{stream}.{t.name}'!r} has shape {tuple(value.shape)}, not {t.shape}")
            self.register_buffer(name, value.to(device=device, dtype=DTYPES[t.dtype]))

    @property
    def bytes(self) -> int:
        """Of the planes."""
        return sum(self._plane(*key, p.name).nbytes for key, s in self.held.items() for p in s.codec.planes)

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()

    # -- writing ------------------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write new tokens, [batch, heads, n, width] each.  Raises InputError for more than `tokens` in all; in a graph
        and on other devices than the CPU, where the length is data, torch asserts it."""
        n = k.shape[2]
        if tuple(k.shape) != (*self.shape[:2], n, self.shape[2]) or k.shape != v.shape:
            raise InputError(f"keys of shape {tuple(k.shape)} and values of {tuple(v.shape)}",
                             hint=f"this storage takes {(*self.shape[:2], 'n', self.shape[2])}")
        if not n:
            return
        seen = not torch.compiler.is_compiling() and self.length.device.type == "cpu"
        if (most := n + (int(self.length) if seen else 0)) > self.tokens:
            raise InputError(f"{most} tokens for a storage of {self.tokens}", hint="more tokens, or reset()")
        before, after = self.length.clone(), self.length + n
        torch._assert_async(after <= self.tokens, f"more tokens than a storage of {self.tokens} holds")
        for stream, x in (("k", k), ("v", v)):
            planes = self._encoded("last", stream, x) if "last" in self.sizes else {}
            self._flush(stream, x, planes, before, after)
            if self.first:
                at = torch.arange(self.first, device=x.device)
                new = self._encoded("first", stream, x.index_select(2, (at - before).clamp(0, n - 1)))
                self._put("first", stream, new, at, (at >= before) & (at < after))
            if self.ring:
                count = min(n, self.ring)
                at = (torch.arange(count, device=x.device) + (after - count)) % self.ring
                self._put("last", stream, {p: t[:, :, n - count:] for p, t in planes.items()}, at)
        self.length.copy_(after)

    def _flushed(self, length: Tensor) -> Tensor:
        """Tokens that have left the newest region for the rest."""
        return (length - (self.first + self.newest)).clamp(min=0) // self.every * self.every

    def _flush(self, stream: str, x: Tensor, planes: Mapping[str, Tensor], before: Tensor, after: Tensor) -> None:
        """Encode the groups that this call completes: as many are looked at as it might."""
        size, n = self.sizes["rest"], x.shape[2]
        groups = min(-(-n // self.every) + (self.every > 1 and n > 1), size // self.every)
        if not groups:
            return
        tokens = groups * self.every
        gone = self._flushed(before)
        token = gone.clamp(max=size - tokens) + torch.arange(tokens, device=x.device)
        mine = (token >= gone) & (token < self._flushed(after))
        at = token + self.first
        if planes:  # what leaves the newest region is what it held
            rows = torch.where(at >= before, at - before + self.ring, at % max(self.ring, 1))
            rows = rows.clamp(max=self.ring + n - 1)
            held = {p: torch.cat([self._plane("last", stream, p), t], 2).index_select(2, rows)
                    for p, t in planes.items()}
            new = self._decoded("last", stream, Var("m"), tokens, held)
        else:
            new = x.index_select(2, (at - before).clamp(0, n - 1))
        self._put("rest", stream, self._encoded("rest", stream, new), token, mine)

    def _encoded(self, region: str, stream: str, x: Tensor) -> dict[str, Tensor]:
        """The planes of tokens x[b, h, n, e], as the region stores them; of whole groups."""
        s = self.held[region, stream]
        b, h, n, e = x.shape
        span = s.span
        groups = x.reshape(b, h, n // span, span, e).transpose(3, 4) if span > 1 else x
        tables = {t.name: self._plane(region, stream, t.name) for t in s.codec.tables}
        made = run(s.codec.encode, {"X": groups.float().reshape(-1, s.codec.group), **tables})
        if span == 1:
            return {p.name: made[p.name].reshape(b, h, n, -1) for p in s.codec.planes}
        return {p.name: made[p.name].reshape(b, h, n // span, e, p.per).transpose(3, 4).reshape(b, h, -1, e)
                for p in s.codec.planes}

    def _put(self, region: str, stream: str, planes: Mapping[str, Tensor], at: Tensor,
             mine: Tensor | None = None) -> None:
        """Write the planes of tokens at these places, of those that are `mine` (all where it is None)."""
        s = self.held[region, stream]
        at, mine = at[::s.span] // s.span, None if mine is None else mine[::s.span]
        for p in s.codec.planes:
            held, new, rows, live = self._plane(region, stream, p.name), planes[p.name], at, mine
            if s.span > 1:
                rows = (at[:, None] * p.per + torch.arange(p.per, device=at.device)).reshape(-1)
                live = None if mine is None else mine.repeat_interleave(p.per)
            if live is not None:
                new = torch.where(live[:, None], new, held.index_select(2, rows))
            held.index_copy_(2, rows, new)

    def _plane(self, region: str, stream: str, name: str) -> Tensor:
        return self.get_buffer(_name(region, stream, name))

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [batch, heads, tokens, width], each at its position; decoded in f32, as kernels do."""
        token: Expr = Var("m")
        at = torch.arange(self.tokens, device=self.length.device)[:, None]
        out = []
        for stream in STREAMS:
            found: Tensor | None = None
            if self.ring:
                found = self._decoded("last", stream, Call("mod", (token, Const(self.ring))), self.tokens)
            left = self.first + self._flushed(self.length)
            if size := self.sizes["rest"]:
                place = token if not self.first else Call("max", (Call("sub", (token, Const(self.first))), Const(0)))
                place = place if self.first + size >= self.tokens else Call("min", (place, Const(size - 1)))
                rest = self._decoded("rest", stream, place, self.tokens)
                found = rest if found is None else torch.where(at < left, rest, found)
            if self.first:
                sinks = self._decoded("first", stream, Call("min", (token, Const(self.first - 1))), self.tokens)
                found = sinks if found is None else torch.where(at < self.first, sinks, found)
            assert found is not None
            out.append(found.to(self.dtype))
        return out[0], out[1]

    def _decoded(self, region: str, stream: str, place: Expr, tokens: int,
                 planes: Mapping[str, Tensor] | None = None) -> Tensor:
        """x[batch, heads, m, width] of a region (or of its planes elsewhere), token m being that at `place`."""
        s = self.held[region, stream]
        b, h, e = self.shape
        held = {t.name: self._plane(region, stream, t.name) for t in s.codec.tables}
        held |= planes or {p.name: self._plane(region, stream, p.name) for p in s.codec.planes}
        value = s.value("", (Var("b"), Var("j")), place, Var("e"))
        axes = {"b": (0, b), "j": (1, h), "m": (2, tokens), "e": (3, e)}
        x: Tensor = Speller(held, torch.float32, self.length.device).value(value, axes)
        return x.expand(b, h, tokens, e)


def _name(region: str, stream: str, plane: str) -> str:
    return f"{region}_{stream}_{plane}"


def regions_of(spec: KVSpec, shape: Shape, layer: int) -> tuple[Region, ...]:
    """The regions of all heads of a layer.  Refusal where the specification is illegal, or has no form here."""
    def refuse(what: str) -> Refusal:
        return Refusal(f"kv {spec.name} has no form as torch buffers: {what}",
                       hint="memcomp kv show says what it is of")

    for name in ("batch", "heads", "tokens", "head"):
        if type(n := getattr(shape, name)) is not int or n < 1:
            raise InputError(f"a storage of {name}={n!r}", hint="a whole number, at least 1")
    verify(spec, shape)
    if any(s.word != "layers" for s in spec.shares):
        raise refuse("heads or sequences share storage")
    if missing := lacks(spec, shape):
        raise refuse(missing[0])
    if (of := owner(spec.shares, "layers", layer)) != layer:
        raise refuse(f"layer {layer} reads the storage of layer {of}")
    if spec.cuts != (Cut("k"), Cut("v")):
        raise refuse("it keeps other streams than rotated keys and values")
    if spec.map != Map() or spec.places:
        raise refuse("its map or its places")
    found = {spec.at(layer, head, shape.layers, shape.heads) for head in range(shape.heads)}
    if len(found) > 1:
        raise refuse("heads of one layer have regions of their own")
    (regions,) = found
    for r in regions:
        if r.tokens.word not in ("first", "last", "rest"):
            raise refuse(f"region {r.name} takes {r.tokens.word}")
        if not r.sides:
            raise refuse(f"region {r.name} keeps nothing, which the model's mask does not know")
        if r.select or r.merge or any(s.basis or s.project or s.residue for s in r.sides):
            raise refuse(f"region {r.name} does more than encode")
    return regions
