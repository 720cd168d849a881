"""Encoded tokens of one stream in one region, and the bytes they are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.passes.kv.account import Layout, padded
from memcomp.passes.kv.codecs import decode, encode, from_bytes, to_bytes

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def _empty(batch: int, heads: int, made: Layout) -> Bytes:
    return np.zeros((batch, heads, 0, made.groups, made.codec.group_bytes), np.uint8)


@dataclass(slots=True)
class Cells:
    """Slots of groups: data[b, h, slot, group, byte]; a slot is one token, or the tokens of one group along n.

    A slot is written once and never changed.
    """

    made: Layout
    tables: Mapping[str, Array]
    data: Bytes

    @classmethod
    def of(cls, made: Layout, tables: Mapping[str, Array], batch: int, heads: int) -> Cells:
        return cls(made, tables, _empty(batch, heads, made))

    def __len__(self) -> int:
        """Tokens."""
        return int(self.data.shape[2]) * self.made.span

    def append(self, x: Array) -> Cells:
        """Encode x[b, h, token, channel], whose tokens are whole groups; returns what was added."""
        new = self._encoded(x)
        self.data = np.concatenate([self.data, new], 2)
        return Cells(self.made, self.tables, new)

    def _encoded(self, x: Array) -> Bytes:
        b, h, n, e = x.shape
        g, span = self.made.codec.group, self.made.span
        groups = x.reshape(b, h, n // span, span, e).swapaxes(3, 4) if span > 1 else x
        planes = encode(self.made.codec, np.ascontiguousarray(groups).reshape(-1, g), self.tables)
        return to_bytes(self.made.codec, planes).reshape(b, h, n // span, self.made.groups, -1)

    def read(self) -> Array:
        """x[b, h, token, channel], float64."""
        b, h, slots, groups, size = self.data.shape
        g, span = self.made.codec.group, self.made.span
        across = groups if span > 1 else groups * g
        if not slots:
            return np.zeros((b, h, 0, across))
        x = decode(self.made.codec, from_bytes(self.made.codec, self.data.reshape(-1, size)), self.tables)
        if span > 1:
            return x.reshape(b, h, slots, across, span).swapaxes(3, 4).reshape(b, h, slots * span, across).astype(float)
        return x.reshape(b, h, slots, across).astype(float)

    def drop(self, tokens: int) -> None:
        """The oldest tokens go; they are whole slots."""
        self.data = self.data[:, :, tokens // self.made.span:]

    def cut(self, tokens: int) -> None:
        """Only the oldest tokens stay; they are whole slots."""
        self.data = self.data[:, :, :tokens // self.made.span]

    def keep(self, index: Array) -> None:
        """Only the tokens index[b, h, i] stay, in this order; they are whole slots."""
        at = index[:, :, ::self.made.span] // self.made.span
        self.data = np.take_along_axis(self.data, at[..., None, None], 2)

    def buffers(self) -> dict[str, Bytes]:
        """Buffer -> its bytes as they lie in memory: the order, pages and places of scales that the map says."""
        made, m = self.made, self.made.map
        b, h, used, groups, _ = self.data.shape
        whole = np.zeros((b, h, made.slots(len(self)), *self.data.shape[3:]), np.uint8)
        whole[:, :, :used] = self.data
        ends = np.cumsum([0, *(p.bytes for p in made.codec.planes)])
        planes = [whole[..., i:j].reshape(*whole.shape[:3], groups * (j - i)) for i, j in pairwise(ends)]
        size = groups * made.codec.group_bytes
        if m.scales == "side":
            found = {p.name: _wide(x, padded(x.shape[-1], m.align))
                     for p, x in zip(made.codec.planes, planes, strict=True)}
        elif m.scales == "inline":
            found = {"all": _wide(whole.reshape(*whole.shape[:3], size), made.slot)}
        else:
            pages = [x.reshape(b, h, x.shape[2] // made.page, made.page * x.shape[-1]) for x in planes]
            found = {"all": _wide(np.concatenate(pages, -1), padded(made.page * made.slot, m.align))}
        order = ["bhn".index(c) for c in m.order]
        return {name: np.ascontiguousarray(x.transpose(*order, 3)) for name, x in found.items()}

    def filled(self, buffers: Mapping[str, Bytes], tokens: int) -> Cells:
        """Cells that hold what lies in buffers: the inverse of `buffers`."""
        made, m = self.made, self.made.map
        back = {name: x.transpose(*np.argsort(["bhn".index(c) for c in m.order]), 3) for name, x in buffers.items()}
        sizes = [made.row(i) for i in range(len(made.codec.planes))]
        if m.scales == "inline":
            x = back["all"][..., :sum(sizes)]
            return self._of(x.reshape(*x.shape[:3], made.groups, made.codec.group_bytes), tokens)
        if m.scales == "side":
            planes = [back[p.name][..., :n] for p, n in zip(made.codec.planes, sizes, strict=True)]
        else:
            x = back["all"]
            ends = np.cumsum([0, *(made.page * n for n in sizes)])
            planes = [x[..., i:j].reshape(*x.shape[:2], x.shape[2] * made.page, n)
                      for (i, j), n in zip(pairwise(ends), sizes, strict=True)]
        data = np.concatenate([x.reshape(*x.shape[:3], made.groups, p.bytes)
                               for x, p in zip(planes, made.codec.planes, strict=True)], -1)
        return self._of(data, tokens)

    def _of(self, data: Bytes, tokens: int) -> Cells:
        return Cells(self.made, self.tables, np.ascontiguousarray(data[:, :, :tokens // self.made.span]))


def _wide(x: Bytes, to: int) -> Bytes:
    """Rows of `to` bytes: what is behind the data is 0."""
    return np.concatenate([x, np.zeros((*x.shape[:-1], to - x.shape[-1]), np.uint8)], -1)
