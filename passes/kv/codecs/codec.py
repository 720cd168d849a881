"""A codec: how a group of numbers is stored, as two cascades of Einsums.

A codec knows groups, not tokens or channels: `X[R, G]` is R groups of G elements.  Which axis of a cache is cut into
groups is said by whoever uses it.  So one definition serves keys grouped along tokens and values grouped along
channels, `interpret` is its meaning bit for bit, and every backend reads and writes it with no code of its own.

Arithmetic that a format does in f32 is one operation a statement into an f32 tensor, and says so: `as_f32(x / 127.0)`.
float64 holds the exact result closely enough that rounding it gives what f32 would (53 >= 2 * 24 + 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Call, Expr, call, rebuild
from memcomp.ir.interpret import interpret
from memcomp.ir.ops import ROUNDED
from memcomp.ir.target import BYTES
from memcomp.ir.text import parse

Array = npt.NDArray[Any]
NUMPY: dict[str, type[Any]] = {"u8": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
                               "f16": np.float16, "f32": np.float32, "bf16": np.float32}


@dataclass(frozen=True, slots=True)
class Plane:
    """What is stored for each group: `per` elements of `dtype`, an array [R, per]."""

    name: str
    dtype: str
    per: int

    @property
    def bytes(self) -> int:
        """Of one group."""
        return self.per * BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Table:
    """A static input of both cascades, shared by all groups.  values: row-major; None where they must be given."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...] | None = None

    def array(self) -> Array:
        """Raises InputError where the codec has no values of its own."""
        if self.values is None:
            raise InputError(f"the table {self.name!r} must be given", f"shape {self.shape}, {self.dtype}")
        return np.array(self.values, NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Codec:
    """family, params: its name and parameters, as the text says them; group: G.

    planes: in storage order.  encode: X[R, G] (and tables) -> planes; decode: planes (and tables) -> X[R, G] in one
    statement; drafts: decodings that read fewer planes.
    """

    family: str
    params: tuple[tuple[str, str], ...]
    group: int
    planes: tuple[Plane, ...]
    tables: tuple[Table, ...]
    encode: Cascade
    decode: Cascade
    drafts: tuple[Cascade, ...] = ()

    @property
    def text(self) -> str:
        return self.family + ("{" + ", ".join(f"{k}={v}" for k, v in self.params) + "}" if self.params else "")

    @property
    def value(self) -> Expr:
        """What an element is, over the variables r and g."""
        return self.decode.einsums[0].body

    @property
    def group_bytes(self) -> int:
        return sum(p.bytes for p in self.planes)

    @property
    def bits(self) -> Fraction:
        """Stored for one value; tables are not counted."""
        return Fraction(8 * self.group_bytes, self.group)

    def plane(self, name: str) -> Plane:
        return next(p for p in self.planes if p.name == name)


def rank_of(plane: str) -> str:
    """The rank of a plane's elements in one group."""
    return f"{plane}W"


def make(family: str, params: Mapping[str, object], group: int, planes: tuple[Plane, ...], value: str, encode: str, *,
         ranks: Mapping[str, int] | None = None, temps: str = "", tables: tuple[Table, ...] = (),
         drafts: tuple[str, ...] = ()) -> Codec:
    """The codec of the text of its value and of the statements that encode it.

    ranks: those that statements use beyond R, G and the planes' own; temps: "C: i32, Y: f32", each of rank [R, G]
    unless it names its own, as in "D[R]: f32".
    """
    known = {"G": group} | {rank_of(p.name): p.per for p in planes}
    shapes = {t.name: [f"{t.name}{k}" for k in range(len(t.shape))] for t in tables}
    known |= {r: n for t in tables for r, n in zip(shapes[t.name], t.shape, strict=True)}

    def declared(role: str) -> str:
        return "".join(f"{role} {p.name}[R, {rank_of(p.name)}]: {p.dtype}\n" for p in planes)

    fixed = "".join(f"in {t.name}[{', '.join(shapes[t.name])}]: {t.dtype}\n" for t in tables)

    def cascade(extents: Mapping[str, int], body: str) -> Cascade:
        text = "".join(f"rank {r} = {n}\n" for r, n in extents.items())
        return parse(f"program codec\nrank R\n{text}{fixed}{body}").cascade

    def reading(value: str) -> Cascade:
        return cascade(known, f"{declared('in')}out X[R, G]: f32\nX[r, g] = {value}\n")

    held = "".join("temp " + (t if "[" in t else t.replace(":", "[R, G]:", 1)) + "\n"
                   for t in (x.strip() for x in temps.split(";")) if t)
    writing = cascade(known | dict(ranks or {}), f"in X[R, G]: f32\n{declared('out')}{held}{encode}")
    writing = replace(writing, einsums=tuple(_held(writing, e) for e in writing.einsums))
    said = tuple((k, str(v).lower() if isinstance(v, bool) else str(v)) for k, v in params.items())
    return Codec(family, said, group, planes, tables, writing, reading(value), tuple(map(reading, drafts)))


def _held(c: Cascade, e: Einsum) -> Einsum:
    """A statement that says itself what its tensor holds: the arithmetic of an f32 tensor rounded to f32, a plane of a
    shorter format rounded to that.  Kernels keep to it, whatever the algebra or the machine would make of the rest."""
    dtype = c.tensor(e.names[0]).dtype
    if e.reduce is not None or dtype not in ROUNDED.values():
        return e
    op = next(o for o, d in ROUNDED.items() if d == dtype)
    if dtype != "f32":
        return replace(e, body=call(op, e.body))

    def outermost(n: Expr) -> Expr:
        if isinstance(n, Call) and n.op in ("add", "sub", "mul", "div"):
            return call(op, n)
        return rebuild(n, tuple(map(outermost, n.args))) if isinstance(n, Call) else n

    return replace(e, body=outermost(e.body))


def encode(codec: Codec, x: Array, tables: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """The planes of x[R, G], each in the numpy dtype of its plane (bf16: f32 that holds bf16)."""
    given = {"X": np.asarray(x, np.float32), **_static(codec, tables)}
    got = interpret(codec.encode, given, rounded=True)
    return {p.name: got[p.name].astype(NUMPY[p.dtype]) for p in codec.planes}


def decode(codec: Codec, planes: Mapping[str, Array], tables: Mapping[str, Array] | None = None, *,
           draft: int | None = None) -> npt.NDArray[np.float32]:
    """x[R, G] of the planes; draft: by that decoding of `codec.drafts`."""
    cascade = codec.decode if draft is None else codec.drafts[draft]
    got = interpret(cascade, {**planes, **_static(codec, tables)}, rounded=True)
    return got["X"].astype(np.float32)


def _static(codec: Codec, tables: Mapping[str, Array] | None) -> dict[str, Array]:
    return {t.name: np.asarray((tables or {})[t.name]) if t.name in (tables or {}) else t.array()
            for t in codec.tables}


def to_bytes(codec: Codec, planes: Mapping[str, Array]) -> npt.NDArray[np.uint8]:
    """Groups as bytes [R, group_bytes]: the planes of a group one after another, little-endian."""
    parts = []
    for p in codec.planes:
        x = np.ascontiguousarray(planes[p.name])
        if p.dtype == "bf16":
            x = (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        parts.append(x.view(np.uint8).reshape(len(x), p.bytes))
    return np.concatenate(parts, 1)


def from_bytes(codec: Codec, data: npt.NDArray[np.uint8]) -> dict[str, Array]:
    """The inverse of `to_bytes`."""
    out: dict[str, Array] = {}
    at = 0
    for p in codec.planes:
        x = np.ascontiguousarray(data[:, at:at + p.bytes])
        at += p.bytes
        out[p.name] = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if p.dtype == "bf16" else \
            x.view(NUMPY[p.dtype])
    return out
