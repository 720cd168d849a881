"""A statement of a tile program as Triton text: what it computes, as one tensor over the axes of its tile.

Tiles are tensors over axes (`layout`); what runs past the counts of dims is masked where it is loaded, reduced,
contracted or stored, and nowhere else.  `writer` puts the statements in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from memcomp.codegen.names import Names
from memcomp.codegen.order import Order
from memcomp.codegen.triton.arguments import Arguments
from memcomp.codegen.triton.dead import Dead
from memcomp.codegen.triton.express import DTYPES, Scope, dims_of, number
from memcomp.codegen.triton.layout import Axis, layout
from memcomp.codegen.triton.memory import Memory
from memcomp.codegen.triton.resources import Setting
from memcomp.codegen.triton.straight import straight
from memcomp.codegen.triton.words import TAKEN
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, call, reads, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Dim, Dot, Fold, Load, Map, Statement, TileKernel, TileProgram, expressions, made, statements

SPANNED = 1 << 17  # bytes of what a reduction makes of smaller tiles, beyond which registers cannot hold it
STORED = ("bf16", "f16")  # formats that tensor cores multiply, and that f32 holds exactly
_FOLDS = {"sum": "tl.sum({}, {})", "prod": "tl.reduce({}, {}, times)", "and": "tl.reduce({}, {}, both)",
          "or": "tl.reduce({}, {}, either)"}
_ENDS = {"max": ("highest", "most"), "min": ("lowest", "least")}  # of reals, where a NaN stays one, and of integers
_JOINS = {"sum": "{} + {}", "prod": "{} * {}", "and": "{} & {}", "or": "{} | {}"}
_WORDS = ("times", "both", "either")


class Values:
    """Text of the statements of one launch."""

    def __init__(self, tp: TileProgram, k: TileKernel, given: Arguments, allowed: set[tuple[str, str, str]],
                 words: set[str], setting: Setting, how: Order, boxed: bool = False) -> None:
        self.setting, self.order = setting, how
        self.k, self.given, self.allowed = straight(k), given, allowed
        k = self.k
        self.params = {p.name: p for p in tp.params}
        for p in tp.params:
            if p.dtype in ("e4m3", "e5m2"):
                raise Refusal(f"{p.name} is stored as {p.dtype}", tp.name, "the triton backend reads f64, f32, f16, "
                              "bf16, integers and bool")
        self.layout = layout(k)
        names = Names(TAKEN)
        for a in given.args:
            names[a.name]
        writers: dict[str, list[Statement]] = {}
        for s in statements(k.body):
            for t in made(s):
                writers.setdefault(t, []).append(s)
        loaded = {t: self.params[first.source.tensor].dtype for t, (first, *more) in writers.items()
                  if isinstance(first, Load) and all(x == first for x in more)}
        self.stored = {t: dtype for t, dtype in loaded.items() if dtype in STORED}
        self.small = self._multiplied({t for t, dtype in loaded.items() if dtype == "i8" and k.tile(t).dtype == "i64"})
        dtypes = {p.name: p.dtype for p in tp.params} | {t.name: t.dtype for t in k.tiles}
        tiles = {t.name: self.layout.of(t.dims) for t in k.tiles}
        self.scope = Scope(names, self.layout, dtypes, tiles, set(self.stored), {d.name: d.capacity for d in k.dims},
                           words)
        self.names = names
        self.full: set[str] = {a.name for a in self.layout.axes if self._always_full(a)}
        self.dead = Dead(k, self.layout, {t for t, kind in dtypes.items() if kind in ("f32", "f64")})
        self.boxed = boxed and any(isinstance(s, Dot) and self.multiplied(s) for s in statements(k.body))
        self.memory = Memory(self)
        self.scope.element = self.memory.element
        self.lines: list[str] = []
        self.depth = self.top = 1

    def _multiplied(self, tiles: set[str]) -> set[str]:
        """Those of 8 bits that nothing reads but products of two of them on tensor cores: anything else would wrap."""
        found, before = set(tiles), set[str]()
        while found != before:
            before = set(found)
            for s in statements(self.k.body):
                both = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
                if not (isinstance(s, Dot) and both <= found and self.layout.matrices(self.k, s) is not None):
                    found -= both
        return found

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def assign(self, tile: str, text: str) -> None:
        self.line(f"{self.names[tile]} = {text}")

    def _always_full(self, a: Axis) -> bool:
        return a.points == a.size and all(self._filled(self.k.dim(d)) for d in a.dims)

    def _filled(self, d: Dim) -> bool:
        return d.count == Const(d.capacity)

    def live(self, axes: tuple[Axis, ...], want: tuple[Axis, ...] | None = None) -> list[str]:
        """Texts, broadcast over `axes`, of the conditions that points of the axes `want` (all) count."""
        return [self.scope.spread(self.names[f"live_{a.name}"], (a,), axes)
                for a in (axes if want is None else want) if a.name not in self.full]

    # -- statements --------------------------------------------------------------------------------------------------

    def map(self, s: Map, rest: tuple[Statement, ...]) -> None:
        """rest: what follows in the same block; one mask here may serve all of it."""
        axes = self.scope.tiles[s.tile]
        value, gone = self.dead.fill(s, rest, self.full) or (0.0, ())
        masked = tuple(a for a in gone if self.dead.at(s.body, a) != value)
        known = {a: self.dead.at(s.body, a) for a in axes} | dict.fromkeys(masked, value)
        self.assign(s.tile, self.filled(s.body, axes, self.scope.dtypes[s.tile], self.live(axes, masked),
                                        number(value)))
        self.dead.set(s.tile, known.get)

    def fold(self, s: Fold) -> None:
        axes, dtype = self.scope.tiles[s.tile], self.scope.dtypes[s.tile]
        gone = self.layout.of(s.over)
        every = tuple(a for a in self.layout.axes if a in axes or a in gone)
        points = math.prod(a.size for a in every)
        if points * BYTES[dtype] > SPANNED and not any(
                set(every) <= set(self.scope.tiles.get(t, ())) for t in reads(s.body)):
            raise Refusal(f"{s.tile} sums up {points:,} numbers that are made of smaller tiles, and is no product of "
                          "two matrices that tensor cores read", self.k.name,
                          "a smaller tile, or operands of f32 or bf16")
        masked = [a for a in gone if self.dead.at(s.body, a) != MONOIDS[s.monoid].identity]
        value = self.filled(s.body, every, dtype, self.live(every, tuple(masked)), self.identity(s.monoid, dtype))
        join = _JOINS.get(s.monoid, "")
        form = _FOLDS.get(s.monoid, "")
        if s.monoid in _ENDS:
            real, whole = _ENDS[s.monoid]
            join = f"{self.scope.word(real if dtype[0] == 'f' else whole)}({{}}, {{}})"
            form = f"{self.scope.word(real + '_over')}({{}}, {{}})" if dtype[0] == "f" else f"tl.{s.monoid}({{}}, {{}})"
        for word in set(_WORDS) & set(re.findall(r"\w+", form)):
            self.scope.word(word)
        for a in reversed(gone):
            value = form.format(value, every.index(a))
            if dtype == "bool":
                value = f"({value} != 0)"
        self.assign(s.tile, join.format(self.names[s.tile], value) if s.accumulate else value)

    def identity(self, monoid: str, dtype: str) -> str:
        x = MONOIDS[monoid].identity
        if dtype == "i64" and x in (float("inf"), float("-inf")):
            return str(2**63 - 1) if x > 0 else f"({-2**63})"
        return number(bool(x) if dtype == "bool" else int(x) if dtype == "i64" else float(x))

    # -- contractions ------------------------------------------------------------------------------------------------

    def dot(self, s: Dot) -> None:
        axes, dtype = self.scope.tiles[s.tile], self.scope.dtypes[s.tile]
        x, form = self.layout.matrices(self.k, s), self.form(s)
        if x is None or not self.multiplied(s):
            self.fold(Fold(s.tile, "sum", s.over, call("mul", s.a, s.b), s.accumulate))
            return
        first = self.operand(x.a, (*x.batch, x.left, x.over), x.over, form)
        second = self.operand(x.b, (*x.batch, x.over, x.right), x.over, form)
        exactly = ', input_precision="tf32x3"' if form == "f32" else ""
        made = (*x.batch, x.left, x.right)
        if s.accumulate and made == axes and dtype == "f32":
            self.assign(s.tile, f"tl.dot({first}, {second}, {self.names[s.tile]}{exactly})")
            return
        value = self.turned(f"tl.dot({first}, {second}{exactly})", made, axes)
        if form == "i8":
            value = f"{value}.to(tl.int64)"
        self.assign(s.tile, f"{self.names[s.tile]} + {value}" if s.accumulate else value)

    def multiplied(self, s: Dot) -> bool:
        """Is a contraction one of tensor cores?"""
        return self.layout.matrices(self.k, s) is not None and self.form(s) != ""

    def form(self, s: Dot) -> str:
        """The format that tensor cores read both operands in; "" where they cannot serve.

        A computed operand is rounded to what the other is stored as where `rounding` allows it.
        """
        operands = s.a, s.b
        held = [self.stored.get(x.tensor, "") for x in operands]
        if self.scope.dtypes[s.tile] == "i64":
            return "i8" if all(x.tensor in self.small for x in operands) else ""
        if self.scope.dtypes[s.tile] != "f32":
            return ""
        if held[0] and held[0] == held[1]:
            return held[0]
        if "" in held and (self.k.name, s.tile, word := max(held)) in self.allowed:
            return word
        return "f32" if all(self.scope.dtypes[x.tensor] in ("f32", *STORED) for x in operands) else ""

    def operand(self, a: Access, want: tuple[Axis, ...], over: Axis, form: str) -> str:
        """A tile as an operand: in the format, over `want` in this order, 0 where contracted points do not count."""
        own = self.scope.tiles[a.tensor]
        text = self.names[a.tensor]
        if a.tensor not in self.stored and a.tensor not in self.small:
            if self.dead.held.get((a.tensor, over.name)) != 0.0 and (conditions := self.live(own, (over,))):
                text = f"tl.where({' & '.join(conditions)}, {text}, 0.0)"
            if form == "bf16":
                text = f"{self.scope.word('to_bf16')}({text})"
            elif form == "f16":
                text = f"tl.cast({text}, tl.float16)"
        elif form == "f32":
            text = f"{text}.to(tl.float32)"
        return self.turned(text, own, want)

    def turned(self, text: str, own: tuple[Axis, ...], want: tuple[Axis, ...]) -> str:
        if own == want:
            return text
        order = [own.index(a) for a in want]
        return f"tl.trans({text}{''.join(f', {n}' for n in order)})"

    # -- tensors -----------------------------------------------------------------------------------------------------

    def filled(self, e: Expr, axes: tuple[Axis, ...], dtype: str, live: Collection[str] = (),
               other: str = "0.0") -> str:
        """The expression as a tensor over all of `axes`, of the tile's dtype; `other` where one of `live` fails."""
        text = self.scope.text(e, axes)
        if isinstance(e, Const):
            text = self.constant(axes, text, DTYPES[dtype])
            return f"tl.where({' & '.join(live)}, {text}, {other})" if live else text
        joined = isinstance(e, Call) and e.op == "where" and self.scope.text(e.args[2], axes) == other
        if live and joined:   # one choice for both conditions
            test, chosen = (self.scope.text(a, axes) for a in e.args[:2])  # type: ignore[union-attr]
            text = f"tl.where({' & '.join((*live, test))}, {chosen}, {other})"
        held = {"f32": "real", "i64": "int", "bool": "bool"}.get(dtype)
        got = self.exact(e)
        if self.scope.kind(e) != held or got != dtype:
            text = f"tl.cast({text}, {DTYPES[dtype]})"
        if live and not joined:
            text = f"tl.where({' & '.join(live)}, {text}, {other})"
        dims = dims_of(e, self.scope.dims)
        if any(not dims & set(a.dims) for a in axes):
            return self.widened(text, axes)
        return text

    def constant(self, axes: tuple[Axis, ...], text: str, dtype: str) -> str:
        return f"tl.full({self.shape(axes)}, {text}, {dtype})"

    def widened(self, text: str, axes: tuple[Axis, ...]) -> str:
        """A tensor over some of the axes as one over all."""
        return f"tl.broadcast_to({text}, {self.shape(axes)})"

    def exact(self, e: Expr) -> str:
        """The dtype that Triton surely gives an expression; "" where it may be another."""
        if isinstance(e, Access) and e.tensor in self.scope.tiles:
            return "f32" if e.tensor in self.stored else self.scope.dtypes[e.tensor]
        args = getattr(e, "args", ())
        kind = self.scope.kind(e)
        if kind != "real" or not args:
            return "bool" if kind == "bool" and args and e.op not in ("where",) else ""  # type: ignore[union-attr]
        found = {self.exact(a) for a in args if self.scope.kind(a) == "real" and not isinstance(a, Const)}
        return found.pop() if len(found) == 1 else ""

    def shape(self, axes: tuple[Axis, ...]) -> str:
        return f"[{', '.join(str(a.size) for a in axes)}]"
