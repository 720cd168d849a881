"""Numpy text of a tile program: one function per kernel, tiles as arrays of exactly their counts."""

from __future__ import annotations

import math

from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, variables, walk
from memcomp.ir.ops import MONOIDS, OPS, ROUNDED
from memcomp.ir.places import LEAST
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.tile import (
    NOWHERE,
    Best,
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    Tile,
    TileKernel,
    TileProgram,
    When,
    expressions,
    statements,
)

_INFIX = {o.name: o.infix for o in OPS.values() if o.infix and o.name not in ("and", "or")}
_FUNCTION = {
    "max": "np.maximum",
    "min": "np.minimum",
    "exp": "np.exp",
    "exp2": "np.exp2",
    "log": "np.log",
    "log2": "np.log2",
    "sqrt": "np.sqrt",
    "square": "np.square",
    "abs": "np.abs",
    "tanh": "np.tanh",
    "sin": "np.sin",
    "cos": "np.cos",
    "floor": "np.floor",
    "round": "np.round",
    "where": "np.where",
    "pow": "np.power",
}
_FOLD = {"sum": "np.sum", "prod": "np.prod", "max": "np.max", "min": "np.min", "and": "np.all", "or": "np.any"}
_JOIN = {
    "sum": "{} + {}",
    "prod": "{} * {}",
    "max": "np.maximum({}, {})",
    "min": "np.minimum({}, {})",
    "and": "{} & {}",
    "or": "{} | {}",
}
_DTYPE = {"f32": "np.float32", "f64": "np.float64", "i64": "np.int64", "bool": "np.bool_"}

_BF16 = """
def from_bf16(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x):  # round to nearest even; a NaN stays one
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
"""

_BEST = """
def best(k, *parts):  # of all pairs the k first: the greatest value, of equal ones the lower place, a NaN before all
    values, places = (np.concatenate(x, -1) for x in zip(*parts))
    nan = values != values
    falling = -values if values.dtype.kind == "f" else ~values  # -x is no integer where x is the least one
    first = np.lexsort((places, np.where(nan, 0, falling), ~nan), -1)[..., :k]
    return (np.take_along_axis(x, first, -1) for x in (values, places))
"""


def emit_source(tp: TileProgram, entry: str) -> str:
    """The whole module; `entry` is the function that runs the kernels in order."""
    for p in tp.params:
        if p.dtype in ("e4m3", "e5m2"):
            raise Refusal(
                f"{p.name} is stored as {p.dtype}",
                tp.name,
                "the python backend reads f64, f32, f16, bf16, integers and bool",
            )
    args = ", ".join([p.name for p in tp.params] + list(tp.sizes))
    lines = ["import numpy as np"]
    calls = _calls(tp)
    if unknown := sorted(c for c in calls if c not in _INFIX and c not in _FUNCTION and c not in _SPECIAL):
        lines += ["from memcomp.ir.ops import OPS", "", *(f"op_{n} = OPS[{n!r}].numpy" for n in unknown)]
    if "as_bf16" in calls or any(p.dtype == "bf16" for p in tp.params):
        lines += ["", *_BF16.splitlines()]
    if any(isinstance(s, Best) for k in tp.kernels for s in statements(k.body)):
        lines += ["", *_BEST.splitlines()]
    for n, k in enumerate(tp.kernels):
        lines += ["", "", f"def kernel_{n}({args}):  # {k.name}", *_Writer(tp, k).kernel()]
    lines += ["", "", f"def {entry}({args}):", "    with np.errstate(all='ignore'):"]
    lines += [f"        kernel_{n}({args})" for n in range(len(tp.kernels))] or ["        pass"]
    return "\n".join(lines) + "\n"


_SPECIAL = {"and", "or", "not", "neg", "relu", "recip", "rsqrt", "ceildiv", "real", "int", *ROUNDED}


def _calls(tp: TileProgram) -> set[str]:
    found: set[str] = set()

    def visit(body: tuple[Statement, ...]) -> None:
        for s in body:
            parts = [getattr(s, n, None) for n in ("source", "target", "mask", "cond", "lo", "hi")]
            if isinstance(s, (Map, Fold, Best)):
                parts += expressions(s)
            for e in parts:
                if e is not None and not isinstance(e, str):
                    found.update(n.op for n in walk(e) if isinstance(n, Call))
            if isinstance(s, (Loop, When)):
                visit(s.body)
            if isinstance(s, When):
                visit(s.orelse)

    for k in tp.kernels:
        visit(k.body)
    return found


class _Writer:
    """Text of one kernel."""

    def __init__(self, tp: TileProgram, k: TileKernel) -> None:
        self.tp, self.k = tp, k
        self.tiles = {t.name: t for t in k.tiles}
        self.dims = {d.name: d for d in k.dims}
        self.out: list[str] = []

    def kernel(self) -> list[str]:
        pad = "    "
        for v, n in self.k.grid:
            self.out.append(f"{pad}for {v} in range({self.scalar(n)}):")
            pad += "    "
        loops = {s.var for s in self.k.body if isinstance(s, Loop)}
        self.counts(pad, [d for d in self.dims if not variables(self.dims[d].count) & loops])
        self.body(self.k.body, pad)
        return self.out

    def counts(self, pad: str, names: list[str]) -> None:
        for d in names:
            if not isinstance(self.dims[d].count, Const):
                self.out.append(f"{pad}n_{d} = int({self.scalar(self.dims[d].count)})")

    def count(self, d: str) -> str:
        c = self.dims[d].count
        return str(c.value) if isinstance(c, Const) else f"n_{d}"

    def body(self, body: tuple[Statement, ...], pad: str) -> None:
        for s in body:
            if isinstance(s, Loop):
                self.out.append(f"{pad}for {s.var} in range({self.scalar(s.lo)}, {self.scalar(s.hi)}):")
                self.counts(pad + "    ", [d for d in self.dims if s.var in variables(self.dims[d].count)])
                self.body(s.body, pad + "    ")
            elif isinstance(s, When):
                self.out.append(f"{pad}if {self.scalar(s.cond)}:")
                self.body(s.body, pad + "    ") if s.body else self.out.append(f"{pad}    pass")
                if s.orelse:
                    self.out.append(f"{pad}else:")
                    self.body(s.orelse, pad + "    ")
            elif isinstance(s, Store):
                self.store(s, pad)
            elif isinstance(s, Best):
                self.best(s, pad)
            else:
                self.out.append(f"{pad}{s.tile} = {self.result(s, self.tiles[s.tile])}")

    def result(self, s: Load | Map | Fold | Dot, t: Tile) -> str:
        if isinstance(s, Load):
            return self.load(s, t)
        if isinstance(s, Map):
            return self.full(self.text(s.body, t.dims), s.body, t.dims, t)
        if isinstance(s, Dot):
            letters = {d: chr(ord("a") + i) for i, d in enumerate(self.dims)}

            def sub(a: Access) -> str:
                return "".join(letters[v.name] for v in a.index if isinstance(v, Var))

            spec = f"{sub(s.a)},{sub(s.b)}->{''.join(letters[d] for d in t.dims)}"
            got = f"np.einsum({spec!r}, {s.a.tensor}, {s.b.tensor})"
            return f"{t.name} + {got}" if s.accumulate else got
        dims = self.fold_order(s, t)
        x = self.full(self.text(s.body, dims), s.body, dims, t)
        axes = tuple(k for k, d in enumerate(dims) if d in s.over)
        got = x
        if axes:
            initial = "" if s.monoid in ("and", "or") else f", initial={self.identity(s.monoid, t.dtype)}"
            got = f"{_FOLD[s.monoid]}({x}, axis={axes[0] if len(axes) == 1 else axes}{initial})"
        return _JOIN[s.monoid].format(t.name, got) if s.accumulate else got

    def best(self, s: Best, pad: str) -> None:
        t = self.tiles[s.tile]
        k, last = self.count(s.order), t.dims.index(s.order)
        front = tuple(d for d in t.dims if d != s.order)
        outer, inner = "".join(f"{self.count(d)}, " for d in front), " * ".join(map(self.count, s.over))
        parts = []
        for e, name in ((s.body, s.tile), (s.at, s.place)):
            x = self.full(self.text(e, (*front, *s.over)), e, (*front, *s.over), self.tiles[name])
            parts.append(f"{x}.reshape({outer}{inner})")
        if s.accumulate:
            old = [f"np.moveaxis({n}, {last}, -1)" for n in (s.tile, s.place)]
        else:
            least = str(LEAST) if t.dtype == "i64" else "-np.inf"
            old = [f"np.full(({outer}{k}), {x}, {_DTYPE[d]})" if front else f"np.full({k}, {x}, {_DTYPE[d]})"
                   for x, d in ((least, t.dtype), (NOWHERE, "i64"))]
        got = f"best({k}, ({', '.join(old)}), ({', '.join(parts)}))"
        moved = got if last == len(t.dims) - 1 else f"(np.moveaxis(x, -1, {last}) for x in {got})"
        self.out.append(f"{pad}{s.tile}, {s.place} = {moved}")

    def fold_order(self, s: Fold, t: Tile) -> tuple[str, ...]:
        """Order of the reduced array's axes: that of a tile which has them all, so that nothing is transposed."""
        want = (*t.dims, *s.over)
        for n in walk(s.body):
            if isinstance(n, Access) and set(own := tuple(i.name for i in n.index if isinstance(i, Var))) == set(want):
                if tuple(d for d in own if d not in s.over) == t.dims:
                    return own
        return want

    def identity(self, monoid: str, dtype: str) -> str:
        x = MONOIDS[monoid].identity
        if dtype == "i64":
            return str(int(x)) if math.isfinite(x) else f"np.iinfo(np.int64).{'max' if x > 0 else 'min'}"
        return _number(x)

    def full(self, text: str, e: Expr, dims: tuple[str, ...], t: Tile) -> str:
        """An array of the tile's dtype and of all its points, whatever the body is broadcast over."""
        shape = "(" + "".join(f"{self.count(d)}, " for d in dims) + ")"
        kind = _DTYPE[t.dtype]
        if isinstance(e, Const):
            return f"np.full({shape}, {text}, {kind})"
        if not set(dims) <= variables(e):
            return f"np.array(np.broadcast_to({text}, {shape}), {kind})"
        return text if self.kind(e) == t.dtype else f"np.asarray({text}, {kind})"

    def kind(self, e: Expr) -> str:
        """The dtype numpy gives a body: that of its tiles; "weak" for constants, "" where it may be another."""
        if isinstance(e, Const):
            return "weak"
        if isinstance(e, Access) and e.tensor in self.tiles:
            return self.tiles[e.tensor].dtype
        if not isinstance(e, Call) or (e.op not in _INFIX and e.op not in _FUNCTION and e.op not in _SPECIAL):
            return ""
        if OPS[e.op].result in ("bool", "int"):
            return OPS[e.op].result if OPS[e.op].result == "bool" else ""
        kinds = {self.kind(a) for a in (e.args[1:] if e.op == "where" else e.args)} - {"weak"}
        return kinds.pop() if len(kinds) == 1 else ""

    # -- memory ------------------------------------------------------------------------------------------------------

    def load(self, s: Load, t: Tile) -> str:
        param = self.tp.param(s.source.tensor)
        got = self.element(s.source, t.dims)
        if param.dtype == "bf16":
            got = f"from_bf16({got})"
        spelled = f"np.array({got}, {_DTYPE[t.dtype]})"
        if set(t.dims) - variables(s.source):
            return f"np.array(np.broadcast_to({spelled}, ({''.join(self.count(d) + ', ' for d in t.dims)})))"
        return spelled

    def element(self, a: Access, dims: tuple[str, ...]) -> str:
        """Elements of a param over `dims`: slices where every index walks at most one dim of its own, else a gather."""
        own = [[v for v in dims if v in variables(i)] for i in a.index]
        order = [v[0] for v in own if v]
        parts = [self.slice(i, v) for i, v in zip(a.index, own, strict=True)]
        if all(len(v) <= 1 for v in own) and len(set(order)) == len(order) and None not in parts:
            got = f"{a.tensor}[{', '.join(p for p in parts if p is not None) or '()'}]"
            want = [d for d in dims if d in order]
            if want != order:
                got += f".transpose({', '.join(str(order.index(d)) for d in want)})"
            return got if len(want) == len(dims) or not want else f"{got}[{self.axes(dims, tuple(want))}]"
        return f"{a.tensor}[{', '.join(self.text(i, dims) for i in a.index)}]"

    def slice(self, i: Expr, own: list[str]) -> str | None:
        if not own:
            return self.text(i, ())
        d = own[0]
        terms = linear(i)
        if terms is None or any(t is not None and d in variables(t) and t != Var(d) for t in terms):
            return None
        start = simplify(call("sub", i, call("mul", Var(d), terms[Var(d)])))
        step = terms[Var(d)]
        if step < 1:
            return None
        n = self.count(d)
        if start == Const(0) and step == 1:
            return f":{n}"
        lo = self.text(start, ())
        return f"{lo}:{lo} + {n}" if step == 1 else f"{lo}:{lo} + {n}*{step}:{step}"

    def store(self, s: Store, pad: str) -> None:
        t, param = self.tiles[s.tile], self.tp.param(s.target.tensor)
        value = s.tile
        if param.dtype == "bf16":
            value = f"to_bf16({value})"
        if s.mask is not None:
            shape = "(" + "".join(f"{self.count(d)}, " for d in t.dims) + ")"
            index = [f"np.broadcast_to({self.text(i, t.dims)}, {shape})[keep]" for i in s.target.index]
            self.out.append(f"{pad}keep = np.broadcast_to({self.text(s.mask, t.dims)}, {shape})")
            self.out.append(f"{pad}{s.target.tensor}[{', '.join(index) or '()'}] = {value}[keep]")
            return
        own = [[v for v in t.dims if v in variables(i)] for i in s.target.index]
        order = [v[0] for v in own if v]
        parts = [self.slice(i, v) for i, v in zip(s.target.index, own, strict=True)]
        if all(len(v) <= 1 for v in own) and sorted(order) == sorted(t.dims) and None not in parts:
            if tuple(order) != t.dims:
                value += f".transpose({', '.join(str(t.dims.index(d)) for d in order)})"
            where = ", ".join(p for p in parts if p is not None) or "()"
        else:
            where = ", ".join(self.text(i, t.dims) for i in s.target.index)
        self.out.append(f"{pad}{s.target.tensor}[{where}] = {value}")

    # -- expressions -------------------------------------------------------------------------------------------------

    def scalar(self, e: Expr) -> str:
        return self.text(e, (), scalar=True)

    def axes(self, dims: tuple[str, ...], own: tuple[str, ...]) -> str:
        return ", ".join(":" if d in own else "None" for d in dims)

    def text(self, e: Expr, dims: tuple[str, ...], scalar: bool = False) -> str:
        """numpy text of an expression over `dims`, broadcastable to their shape."""
        if isinstance(e, Const):
            return _number(e.value)
        if isinstance(e, Size):
            return e.rank
        if isinstance(e, Var):
            if e.name not in dims:
                return e.name
            got = f"np.arange({self.count(e.name)})"
            return (
                got
                if dims[-1] == e.name
                else f"{got}[{', '.join(':' if d == e.name else 'None' for d in dims[dims.index(e.name) :])}]"
            )
        if isinstance(e, Access):
            if e.tensor not in self.tiles:
                return self.element(e, dims)
            own = tuple(v.name for v in e.index if isinstance(v, Var))
            want = tuple(d for d in dims if d in own)
            got = e.tensor if want == own else f"{e.tensor}.transpose({', '.join(str(own.index(d)) for d in want)})"
            first = dims.index(want[0]) if want else 0
            return got if not want or want == dims[first:] else f"{got}[{self.axes(dims[first:], want)}]"
        args = [self.text(a, dims, scalar) for a in e.args]
        return _call(e.op, args, scalar)


def _call(op: str, args: list[str], scalar: bool) -> str:
    if op in _INFIX:
        return f"({args[0]} {_INFIX[op]} {args[1]})"
    if op in ("and", "or"):
        return "(" + (f" {op} " if scalar else " & " if op == "and" else " | ").join(args) + ")"
    if op == "not":
        return f"(not {args[0]})" if scalar else f"np.logical_not({args[0]})"
    if scalar and op in ("max", "min"):
        return f"{op}({', '.join(args)})"
    special = {
        "neg": "(-{0})",
        "relu": "np.maximum({0}, 0)",
        "recip": "(1.0 / {0})",
        "rsqrt": "(1.0 / np.sqrt({0}))",
        "ceildiv": "(-(-{0} // {1}))",
        "real": "np.asarray({0}, np.float32)",
        "as_f32": "np.asarray({0}, np.float32)",
        "as_f16": "np.asarray(np.asarray({0}, np.float16), np.float32)",
        "as_bf16": "from_bf16(to_bf16({0}))",
        "int": "np.trunc({0}).astype(np.int64)",
    }
    if op in special:
        return special[op].format(*args)
    return f"{_FUNCTION.get(op, f'op_{op}')}({', '.join(args)})"


def _number(x: bool | int | float) -> str:
    if isinstance(x, float) and not math.isfinite(x):
        return "np.nan" if math.isnan(x) else "np.inf" if x > 0 else "-np.inf"
    return repr(x) if not isinstance(x, (int, float)) or x >= 0 or isinstance(x, bool) else f"({x!r})"
