"""What a side does before its codec, as Einsums around the reader's.

Bases, projections and latent vectors are affine, key = stored A + o, so they go out of the loop over tokens: A into the
query and behind the sum of values, o into one number a query.  A and o are read off by probing the interpreter with
unit vectors; nothing here knows a word that stands for them.  Where keys are rotated by position after that, or
heads are mixed, the tile is rebuilt instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.cascade import Cascade, Einsum, Rank, Reduce, Tensor
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, transform
from memcomp.ir.program import Program
from memcomp.passes.kv.account import Part, headed
from memcomp.passes.kv.store import Cache, Held

Array = npt.NDArray[Any]
KEYS = ("k", "c", "r", "x")  # streams whose channels, one behind the other, are keys


@dataclass(frozen=True, slots=True)
class Fold:
    """key = stored A + o, or value: A[h, stored, model], o[h, model]; where heads are mixed A[h, stored head, ...]."""

    a: Array
    o: Array

    @property
    def same(self) -> bool:
        """Is what is stored the key itself?"""
        one = np.eye(self.a.shape[-1])
        return self.a.ndim == 3 and self.a.shape[1:] == one.shape and not self.o.any() and bool((self.a == one).all())


@dataclass(frozen=True, slots=True)
class Corrected:
    """A stream with something added: stem of its names, variable of its channels, tokens of a chunk, channels, and the
    words with their ranks."""

    stem: str
    channel: str
    chunk: int
    width: int
    words: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Extra:
    """What a region needs beside the reader: folds of keys and of values; its keys rebuilt (turned), out of all heads
    (mixed) and rotated (rope); counts of what was merged; values out of the first stream of keys (one); corrections."""

    name: str
    keys: bool
    values: bool
    turned: bool
    mixed: bool
    rope: bool
    merged: bool
    one: bool
    corrected: tuple[Corrected, ...]

    @property
    def plain(self) -> bool:
        return not (self.keys or self.values or self.turned or self.merged or self.corrected)


def folded(cache: Cache, part: Part, r: Held, wide: Mapping[str, int]) -> tuple[Fold, Fold]:
    """What keys and values are of what is stored, by unit vectors.  wide: stored channels of each stream."""
    keys = [s for s in KEYS if s in wide]
    mixed = any(b.rank == "h" for b in r.sides[keys[0]].side.basis)
    return (_probed(cache, part, r, wide, keys, 0, mixed),
            _probed(cache, part, r, wide, ["v" if "v" in wide else keys[0]], 1, False))


def _probed(cache: Cache, part: Part, r: Held, wide: Mapping[str, int], names: list[str], which: int,
            mixed: bool) -> Fold:
    """The fold of keys (0) or values (1), by unit vectors in the streams that are named."""
    many = sum(wide[n] for n in names)
    units = np.vstack([np.zeros(many), np.eye(many)])
    found = []
    for of in range(len(part.heads) if mixed else 1):
        x, first = {}, 0
        for name, side in r.sides.items():
            heads = len(part.heads) if headed(name) else 1
            mine = np.zeros((1, heads, many + 1, wide[name]))
            if name in names:
                mine[:, of if mixed else slice(None)] = units[:, first:first + wide[name]]
                first += wide[name]
            x[name] = side.undone(mine)
        found.append(cache.rebuilt(x, np.zeros((1, 1, many + 1), int))[which][0])
    y = np.stack(found, 1) if mixed else found[0]
    return Fold(y[..., 1:, :] - y[..., :1, :], found[0][:, 0])


def around(p: Program, extras: tuple[Extra, ...], by: str, model: int, values: int) -> Program:
    """The reader's program with what its regions need beside it.  by: the variable of a fold's head; model, values: the
    model's channels of keys and of values."""
    if all(x.plain for x in extras):
        return p
    c, size = p.cascade, {r.name: r for r in p.cascade.ranks}
    query = next(t for t in c.tensors if t.name == "Q")
    head = by.upper()
    ranks = [replace(r, extent=Const(values)) if r.name == "F" else r for r in c.ranks]
    ranks += [replace(size["F"], name="FS"), Rank("D", Const(model))]  # FS: values as stored; F: as the model has them
    ranks += [Rank("JJ", Size("J"))] if any(x.mixed for x in extras) else []
    tensors = [replace(t, ranks=(*t.ranks[:-1], "D")) if t is query else t for t in c.tensors]
    tensors += [Tensor("ROPE", ("D",), "f32", "in")] if any(x.rope for x in extras) else []
    for x in extras:
        mine, more = _declared(x, head)
        tensors, ranks = tensors + mine, ranks + more
    at = tuple(Var(r.lower()) for r in query.ranks[:-1])
    work = [_Region(x, at, by, model) for x in extras]
    einsums = [e for w in work for e in w.asked()]
    for e in c.einsums:
        of = max((w for w in work if e.out.tensor.startswith(w.x)), key=lambda w: len(w.x), default=None)
        einsums += [e] if of is None else of.changed(e)
    return replace(p, cascade=Cascade(tuple(ranks), tuple(tensors), tuple(einsums)))


def _declared(x: Extra, head: str) -> tuple[list[Tensor], list[Rank]]:
    """The inputs of a region's extras, and their ranks."""
    n, m = x.name, f"{x.name}M"
    keys = (head, "JJ", "E", "D") if x.mixed else (head, "E", "D")
    found = [(f"{n}KFOLD", keys, x.keys or x.turned), (f"{n}KOFFSET", (head, "D"), x.keys or x.turned),
             (f"{n}VFOLD", (head, "FS", "F"), x.values), (f"{n}VOFFSET", (head, "F"), x.values)]
    tensors = [Tensor(name, ranks, "f32", "in") for name, ranks, there in found if there]
    tensors += [Tensor(f"{n}POS", ("B", "J", m), "i64", "in")] if x.rope else []
    tensors += [Tensor(f"{n}COUNT", (m,), "f32", "in")] if x.merged else []
    ranks: list[Rank] = []
    for c in x.corrected:
        s, many = c.stem, f"{c.stem}CHUNKS"
        ranks.append(Rank(many))
        if "outliers" in c.words:
            ranks.append(Rank(f"{s}OUT"))
            tensors += [Tensor(f"{s}PLACES", ("B", "J", many, f"{s}OUT"), "i64", "in"),
                        Tensor(f"{s}VALUES", ("B", "J", many, f"{s}OUT"), "f16", "in")]
        if "lowrank" in c.words:
            ranks += [Rank(f"{s}CHUNK", Const(c.chunk)), Rank(f"{s}RANK", Const(c.words["lowrank"]))]
            tensors += [Tensor(f"{s}LEFT", ("B", "J", many, f"{s}CHUNK", f"{s}RANK"), "f16", "in"),
                        Tensor(f"{s}RIGHT", ("B", "J", many, f"{s}RANK", c.channel.upper()), "f16", "in")]
    return tensors, ranks


@dataclass(frozen=True, slots=True)
class _Region:
    """The statements of a region.  at: the indices of a query; by: the head's variable; model: channels of a key."""

    extra: Extra
    at: tuple[Expr, ...]
    by: str
    model: int

    @property
    def x(self) -> str:
        return self.extra.name

    def asked(self) -> list[Einsum]:
        """The query as the region's stored keys take it, and what their offset adds to its scores."""
        at, x, d = self.at, self.x, Var("d")
        q = Access("Q", (*at, d))
        if self.extra.turned:
            return []
        if not self.extra.keys:
            return [Einsum((Access(f"{x}Q", (*at, Var("e"))),), Access("Q", (*at, Var("e"))))]
        a, o = Access(f"{x}KFOLD", (Var(self.by), Var("e"), d)), Access(f"{x}KOFFSET", (Var(self.by), d))
        return [Einsum((Access(f"{x}Q", (*at, Var("e"))),), Call("mul", (q, a)), Reduce("sum", ("d",))),
                Einsum((Access(f"{x}QOFFSET", at),), Call("mul", (q, o)), Reduce("sum", ("d",)))]

    def changed(self, e: Einsum) -> list[Einsum]:
        """A statement of the reader, and what comes behind it."""
        x, extra, name = self.x, self.extra, e.out.tensor
        for c in extra.corrected:
            if name == f"{c.stem}D":
                return [self._own(e), *self._corrections(c), *(self._turned() if c.stem == f"{x}K" else [])]
        if name == f"{x}KD" and extra.turned:
            return [e, *self._turned()]
        if name == f"{x}N":
            mine = self._own(e)
            return [replace(mine, outs=(Access(f"{x}NSTORED", mine.out.index),)), *self._summed()]
        if name == f"{x}S0" and extra.turned and e.reduce is not None:
            key = Access(f"{x}KTURNED", (*self._tile(), Var("d")))
            product = Call("mul", (Access("Q", (*self.at, Var("d"))), key))
            return [replace(e, body=product, reduce=Reduce("sum", ("d",)))]
        if name == f"{x}VD" and extra.one and any(c.stem == f"{x}K" for c in extra.corrected):
            return [replace(self._own(e), body=Access(f"{x}KDSUM", (*e.out.index[:-1], Var("fs"))))]
        mine = self._own(e)
        if name == f"{x}S" and extra.merged:
            mine = replace(mine, body=mine.body + call("log", Access(f"{x}COUNT", (Var(f"{x}M".lower()),))))
        return [mine]

    def _own(self, e: Einsum) -> Einsum:
        """A statement with the region's own query, corrected numbers, offset, and values as they are stored."""
        x, corrected = self.x, {f"{c.stem}D": f"{c.stem}DSUM" for c in self.extra.corrected}
        offset = e.out.tensor == f"{x}S" and self.extra.keys and not self.extra.turned

        def own(n: Expr) -> Expr:
            if n == Var("f"):
                return Var("fs")
            if not isinstance(n, Access):
                return n
            if n.tensor == "Q":
                return Access(f"{x}Q", n.index)
            if offset and n.tensor == f"{x}S0":
                return n + Access(f"{x}QOFFSET", self.at)
            return Access(corrected.get(n.tensor, n.tensor), n.index)

        outs = tuple(Access(o.tensor, tuple(transform(i, own) for i in o.index)) for o in e.outs)
        return replace(e, outs=outs, body=transform(e.body, own))

    def _tile(self) -> tuple[Expr, ...]:
        """The indices of a rebuilt key before its channel: of each query head where the fold is of query heads."""
        own = (Var("g"),) if self.by == "g" else ()
        return (Var("b"), Var("j"), *own, Var(f"{self.x}M".lower()))

    def _turned(self) -> list[Einsum]:
        """Keys in the model's channels, heads unmixed, rotated by their positions."""
        if not self.extra.turned:
            return []
        x, d, tile, m = self.x, Var("d"), self._tile(), Var(f"{self.x}M".lower())
        stem = f"{x}KDSUM" if any(c.stem == f"{x}K" for c in self.extra.corrected) else f"{x}KD"
        head: Expr = Var("jj") if self.extra.mixed else Var("j")
        fold = (Var(self.by), Var("jj"), Var("e"), d) if self.extra.mixed else (Var(self.by), Var("e"), d)
        over = ("jj", "e") if self.extra.mixed else ("e",)
        product = Call("mul", (Access(stem, (Var("b"), head, m, Var("e"))), Access(f"{x}KFOLD", fold)))
        whole = Access(f"{x}KMODEL", (*tile, d)) + Access(f"{x}KOFFSET", (Var(self.by), d))
        rebuilt = "KWHOLE" if self.extra.rope else "KTURNED"
        made = [Einsum((Access(f"{x}KMODEL", (*tile, d)),), product, Reduce("sum", over)),
                Einsum((Access(f"{x}{rebuilt}", (*tile, d)),), whole)]
        if not self.extra.rope:
            return made
        half = self.model // 2
        other = Access(f"{x}KWHOLE", (*tile, (d + Const(half)) % Const(self.model)))
        angle = call("real", Access(f"{x}POS", (Var("b"), Var("j"), m))) * Access("ROPE", (d,))
        sine = Call("where", (Call("lt", (d, Const(half))), -call("sin", angle), call("sin", angle)))
        turned = Access(f"{x}KWHOLE", (*tile, d)) * call("cos", angle) + other * sine
        return [*made, Einsum((Access(f"{x}KTURNED", (*tile, d)),), turned)]

    def _corrections(self, c: Corrected) -> list[Einsum]:
        """Decoded numbers with what is added to them: outliers by their places, low rank by a small product."""
        s, m, ch = c.stem, Var(f"{self.x}M".lower()), Var(c.channel)
        lead, place = (Var("b"), Var("j")), (Var("b"), Var("j"), m, ch)
        chunk, inside = m // Const(c.chunk), m % Const(c.chunk)
        total: Expr = Access(f"{s}D", place)
        there = call("lt", m, Access(f"{self.x}LEN", (Var("b"),)))  # behind the last token there are no chunks
        made = []
        if "outliers" in c.words:
            o = Var(f"{s}OUT".lower())
            hit = Call("eq", (Access(f"{s}PLACES", (*lead, chunk, o)), inside * Const(c.width) + ch))
            body = Call("where", (hit, Access(f"{s}VALUES", (*lead, chunk, o)), Const(0.0)))
            made.append(Einsum((Access(f"{s}DOUTLIERS", place),), body, Reduce("sum", (o.name,)), there))
            total = total + Access(f"{s}DOUTLIERS", place)
        if "lowrank" in c.words:
            r = Var(f"{s}RANK".lower())
            left, right = Access(f"{s}LEFT", (*lead, chunk, inside, r)), Access(f"{s}RIGHT", (*lead, chunk, r, ch))
            body = Call("mul", (left, right))
            made.append(Einsum((Access(f"{s}DLOWRANK", place),), body, Reduce("sum", (r.name,)), there))
            total = total + Access(f"{s}DLOWRANK", place)
        return [*made, Einsum((Access(f"{s}DSUM", place),), total)]

    def _summed(self) -> list[Einsum]:
        """The weighted sum of values, of the sum of what is stored."""
        at, x = self.at, self.x
        out = Access(f"{x}N", (*at, Var("f")))
        if not self.extra.values:
            return [Einsum((out,), Access(f"{x}NSTORED", (*at, Var("f"))))]
        a, o = Access(f"{x}VFOLD", (Var(self.by), Var("fs"), Var("f"))), Access(f"{x}VOFFSET", (Var(self.by), Var("f")))
        part = Access(f"{x}NFOLDED", (*at, Var("f")))
        stored = Call("mul", (Access(f"{x}NSTORED", (*at, Var("fs"))), a))
        return [Einsum((part,), stored, Reduce("sum", ("fs",))),
                Einsum((out,), part + Access(f"{x}D", at) * o)]
