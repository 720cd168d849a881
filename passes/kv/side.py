"""What is done to a stream before its codec, and undone behind it: BAS, PROJ, RES; and the rotary embedding.

Tables are what calibration or the model gives, by name: `k.scale`, `v.project`, ...; a table of one head has the shape
that is said here, one of all heads has the heads in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.errors import InputError, nearest
from memcomp.passes.kv.cells import Cells
from memcomp.passes.kv.slots import Basis, Side

Array = npt.NDArray[Any]
Tables = Mapping[str, Array]


def table(tables: Tables, stream: str, name: str) -> Array:
    """A table of a stream.  Raises InputError."""
    key = f"{stream}.{name}"
    if key not in tables:
        raise InputError(f"the table {key!r} must be given", hint=nearest(key, tables) if tables else "none is given")
    return np.asarray(tables[key])


def hadamard(size: int) -> Array:
    """The orthonormal Walsh-Hadamard matrix of a power of two."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return np.asarray(h / np.sqrt(size))


def rotate(x: Array, positions: Array, theta: float) -> Array:
    """The rotary embedding of x[..., token, channel] at positions[..., token]: channels e and e + E/2 are a pair."""
    half = x.shape[-1] // 2
    angle = positions[..., None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def based(x: Array, b: Basis, stream: str, tables: Tables, *, back: bool = False) -> Array:
    """x[b, h, n, e] in the basis, or back out of it."""
    if b.rank == "h":
        return based(x.swapaxes(1, 3), Basis(b.word, "e", b.size), stream, tables, back=back).swapaxes(1, 3)
    if b.word in ("scale", "offset"):
        t = table(tables, stream, b.word)
        t = t[:, None] if t.ndim == 2 else t
        return (x / t if back else x * t) if b.word == "scale" else (x + t if back else x - t)
    if b.word == "permute":
        order = table(tables, stream, b.word)
        return x[..., np.argsort(order) if back else order]
    size = b.size or x.shape[-1]
    m = hadamard(size) if b.word == "hadamard" else table(tables, stream, b.word)
    return (x.reshape(*x.shape[:-1], -1, size) @ (m.swapaxes(-1, -2) if back else m)).reshape(x.shape)


@dataclass(slots=True)
class Written:
    """A stream in a region: its cells, and what is added to them, a chunk of tokens each.

    chunk: tokens that are encoded together.
    """

    side: Side
    cells: Cells
    tables: Tables
    chunk: int
    residues: list[dict[str, Array]] = field(default_factory=list)
    back: Array | None = None  # the projection's inverse, once it was asked for

    def append(self, x: Array) -> None:
        """Write x[b, h, n, e], whole chunks where something is added to the codec."""
        x = np.asarray(x, np.float64)
        for b in self.side.basis:
            x = based(x, b, self.side.stream, self.tables)
        if self.side.project:
            x = x @ self._projection(self.side.project.rank)
        if not self.side.residue:
            self.cells.append(x)
            return
        for at in range(0, x.shape[2], self.chunk):
            self._chunk(x[:, :, at:at + self.chunk])

    def _projection(self, rank: int) -> Array:
        """The first columns of the table: regions may keep more or fewer of them."""
        return table(self.tables, self.side.stream, "project")[..., :rank]

    def _chunk(self, x: Array) -> None:
        flat = x.reshape(*x.shape[:2], -1)
        kept: dict[str, Array] = {}
        bulk = x
        for r in self.side.residue:
            if r.word == "outliers":  # the codec does not see them: their places hold 0
                many = ceil(r.share * flat.shape[-1])
                at = np.sort(np.argsort(-np.abs(flat), axis=-1, kind="stable")[..., :many], -1)
                kept["outlier places"] = at.astype(np.uint16 if flat.shape[-1] <= 65536 else np.uint32)
                held = flat.copy()
                np.put_along_axis(held, at, 0.0, -1)
                bulk = held.reshape(x.shape)
        error = x - self.cells.append(bulk).read()
        if "outlier places" in kept:
            at = kept["outlier places"].astype(np.int64)
            kept["outlier values"] = np.take_along_axis(error.reshape(flat.shape), at, -1).astype(np.float16)
            error = error - _sparse(kept, x.shape)
        for r in self.side.residue:
            if r.word == "lowrank":
                u, s, vt = np.linalg.svd(error, full_matrices=False)
                root = np.sqrt(s[..., :r.rank])
                kept["left"] = (u[..., :r.rank] * root[..., None, :]).astype(np.float16)
                kept["right"] = (root[..., None] * vt[..., :r.rank, :]).astype(np.float16)
        self.residues.append(kept)

    def read(self) -> Array:
        """x[b, h, n, e], float64: codec, what is added, projection and basis undone."""
        x = self.cells.read()
        for i, kept in enumerate(self.residues):
            at = slice(i * self.chunk, (i + 1) * self.chunk)
            part = x[:, :, at]
            if "outlier places" in kept:
                part = part + _sparse(kept, part.shape)
            if "left" in kept:
                part = part + kept["left"].astype(float) @ kept["right"].astype(float)
            x[:, :, at] = part
        return self.undone(x)

    def undone(self, x: Array) -> Array:
        """What is stored, decoded, back in the model's channels: projection and basis undone."""
        if self.side.project:
            if self.back is None:
                p = self._projection(self.side.project.rank)
                try:
                    self.back = np.linalg.solve(p.swapaxes(-1, -2) @ p, p.swapaxes(-1, -2))
                except np.linalg.LinAlgError as error:
                    raise InputError(f"the columns of the table '{self.side.stream}.project' are not independent",
                                     f"the first {self.side.project.rank} of them") from error
            x = x @ self.back
        for b in reversed(self.side.basis):
            x = based(x, b, self.side.stream, self.tables, back=True)
        return x

    def buffers(self) -> dict[str, Array]:
        """Buffer -> its array, as `account` counts them."""
        found: dict[str, Array] = dict(self.cells.buffers())
        for name in {n for kept in self.residues for n in kept}:
            found[name] = np.stack([kept[name] for kept in self.residues])
        return found


def _sparse(kept: dict[str, Array], shape: tuple[int, ...]) -> Array:
    """Outliers as a dense correction."""
    out = np.zeros((*shape[:2], shape[2] * shape[3]))
    np.put_along_axis(out, kept["outlier places"].astype(np.int64), kept["outlier values"].astype(float), -1)
    return out.reshape(shape)
