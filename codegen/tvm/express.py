"""Scalar expressions of the IR as kernel text, over one point or over the lanes of a vector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from memcomp.codegen.bounds import near
from memcomp.codegen.tvm.writer import Point, Writer
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, variables, walk
from memcomp.ir.ops import OPS, ROUNDED

LEAST = 2.0**-64  # of a factor that products of numbers are joined to: none of them comes near the ends of f32
ELEMENT_OF = {"f32": "float32", "f64": "float64", "i64": "int64"}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_BITS = {"shr": ">>", "shl": "<<", "bitand": "&", "bitor": "|"}
_INTEGER = {"floordiv": "floordiv", "mod": "floormod", "ceildiv": "ceildiv"}
_REAL = {"exp", "exp2", "expm1", "log", "log1p", "log2", "xlogx", "tanh", "sigmoid", "erf", "sqrt", "rsqrt", "recip",
         "sin", "cos", "pow", "floor", "round"}


@dataclass(frozen=True, slots=True)
class Val:
    """Text of a value; kind: f32, f64, i64 or bool; vec: one value per lane; const: its number where it is one."""

    text: str
    kind: str
    vec: bool = False
    const: bool | int | float | None = None


class Expressions:
    """Evaluates expressions at a point; may write lines before the one that uses the value."""

    def __init__(self, w: Writer, point: Point) -> None:
        self.w, self.point = w, point
        self.repeated: Counter[Expr] = Counter()
        self.memo: dict[Expr, Val] = {}
        self.rough: frozenset[Expr] = frozenset()

    def value(self, e: Expr, kind: str = "", rough: frozenset[Expr] = frozenset()) -> Val:
        """The value of `e`, converted to `kind` where given; subexpressions that stand twice are computed once.

        rough: the calls that may be so (`memcomp.codegen.rough`).
        """
        self.rough = rough
        self.repeated = Counter(n for n in walk(e) if isinstance(n, Call))
        v = self._value(e)
        return convert(v, kind) if kind else v

    def index(self, e: Expr) -> str:
        """Text of an int64 scalar."""
        v = self.value(e, "i64")
        assert not v.vec
        return v.text

    def _value(self, e: Expr) -> Val:
        if isinstance(e, Const):
            return constant(e.value)
        if isinstance(e, Size):
            return Val(self.w.names[e.rank], "i64")
        if isinstance(e, Var):
            if e.name == self.point.lane:
                return Val(f"at({self.point.width}, {self.point.base})", "i64", self.point.width > 1)
            text = self.point.scalars[e.name]
            return constant(0) if text == "i64(0)" else Val(text, "i64")
        if e in self.memo:
            return self.memo[e]
        if e in self.w.diagonals and (v := self._diagonal(e)) is not None:
            return v
        if isinstance(e, Access):
            v = self.tile(e) if e.tensor in self.w.tiles else self.param(e)
            self.memo[e] = v
            return v
        v = self._call(e)
        if self.repeated[e] > 1 and not (v.kind == "bool" and v.vec):  # TVM cannot bind a vector of truth values
            name = self.w.names.fresh("x")
            self.w.let(name, v.text if v.kind == "bool" else f"reg({v.text})")
            v = Val(name, v.kind, v.vec)
            self.memo[e] = v
        return v

    # -- leaves ------------------------------------------------------------------------------------------------------

    def tile(self, e: Access) -> Val:
        p, t = self.point, self.w.tiles[e.tensor]
        if e.tensor in p.held:
            return Val(p.held[e.tensor], t.dtype, p.lane in t.dims and p.width > 1)
        own = tuple(i.name for i in e.index if isinstance(i, Var))
        if own != t.dims or len(own) != len(e.index):
            raise Refusal(f"tile {t.name} is read at other indices than its dims", self.w.kernel.name)
        if p.lane not in own:
            got = self.w.tile_at(e.tensor, p.scalars)
        elif own[-1] == p.lane:
            got = self.w.tile_at(e.tensor, p.scalars, f"at({p.width}, {p.base})")
        else:
            got = self._one_by_one(lambda one: self.w.tile_at(e.tensor, one.scalars), self.w.element(t))
        got = f"cast('int64', {got})" if e.tensor in self.w.narrow else got
        return _loaded(got, t.dtype, p.lane in own and p.width > 1)

    def param(self, e: Access) -> Val:
        """An element of a param, or one per lane."""
        from memcomp.codegen.tvm.access import gathered, scalar_element

        q, p = self.w.params[e.tensor], self.point
        kind = q.dtype if q.dtype in ("bool", "f64") else "i64" if q.dtype[0] in "iu" else "f32"
        if p.lane not in variables(e):
            return _loaded(scalar_element(self.w, e, p), kind, False)
        got = gathered(self.w, e, p, f"{self.w.count(p.lane)} - {p.base}")
        return _loaded(got, kind, p.width > 1)

    def _one_by_one(self, text: Callable[[Point], str], element: str) -> str:
        """A vector gathered lane by lane; lanes past the dim's count are not read."""
        p, w = self.point, self.w
        name, k = w.names.fresh("gather"), w.names.fresh("k")
        w.line(f"{name} = acc(splat(cast({element!r}, i64(0)), {p.width}))")
        with w.block(f"for {k} in T.serial(T.max(T.min({w.count(p.lane)} - {p.base}, {p.width}), 0)):"):
            one = Point(p.scalars | {p.lane: f"({p.base} + {k})"})
            w.line(f"{name}[{k}] = {text(one)}")
        return f"{name}[at({p.width})]"

    def _diagonal(self, e: Expr) -> Val | None:
        """What `diagonal` has computed; None where lanes would run against it."""
        p, (name, a, b, kind) = self.point, self.w.diagonals[e]
        if p.lane == b and p.width > 1:
            return None
        lanes, first = (p.width, p.base) if p.lane == a else (1, p.scalars[a])
        second = p.base if p.lane == b else p.scalars[b]
        return _loaded(f"{name}[at({lanes}, {first} + ({self.w.count(b)} - 1 - {second}))]", kind, lanes > 1)

    # -- operators ---------------------------------------------------------------------------------------------------

    def _call(self, e: Call) -> Val:
        if e.op in _COMPARE and (v := self._lane_compare(e)) is not None:
            return v
        if e.op in ROUNDED:
            return self._rounded(e)
        if (v := self._scaled(e)) is not None:
            return v
        return self._plain(e)

    def _rounded(self, e: Call) -> Val:
        """The nearest number of a format; one operation in it is done as it stands."""
        x = e.args[0]
        alone = isinstance(x, Call) and x.op in ("add", "sub", "mul", "div")
        v = convert(self._plain(x) if alone and isinstance(x, Call) else self._value(x), "f32")
        if v.const is not None:
            return Val(f"f32({number(float(OPS[e.op].numpy(v.const)))})", "f32", const=float(OPS[e.op].numpy(v.const)))
        return Val(f"{e.op}({v.text})", "f32", v.vec)

    def _plain(self, e: Call) -> Val:
        args = [self._value(a) for a in e.args]
        vec = any(a.vec for a in args)
        if e.op in ("and", "or"):
            text = truth(args[0]).text
            for a in args[1:]:
                text = f"{'land' if e.op == 'and' else 'lor'}({text}, {truth(a).text})"
            return Val(text, "bool", vec)
        if e.op == "not":
            return Val(f"lnot({truth(args[0]).text})", "bool", vec)
        if e.op == "where":
            kind = joined(args[1:])
            yes, no = convert(args[1], kind), convert(args[2], kind)
            if kind == "bool":
                c = truth(args[0]).text
                return Val(f"lor(land({c}, {yes.text}), land(lnot({c}), {no.text}))", kind, vec)
            return Val(f"select({truth(args[0]).text}, {yes.text}, {no.text})", kind, vec)
        if e.op == "int":
            return Val(f"cast('int64', {args[0].text})", "i64", vec)
        if e.op == "real":
            return convert(args[0], "f64" if args[0].kind == "f64" else "f32")
        kind = joined(args)
        if kind == "bool":
            kind = "i64"
        if (e.op in _REAL or e.op == "div") and kind == "i64":
            kind = "f32"
        args = [convert(a, kind) for a in args]
        texts = [a.text for a in args]
        if e.op in _COMPARE:
            return Val(compared(e.op, *texts), "bool", vec)
        if kind == "i64" and e.op in _ARITHMETIC:
            return _integers(e.op, args[0], args[1], vec)
        if e in self.rough and kind == "f32":
            return Val(f"rough_{e.op}({texts[0]})", kind, vec)
        return Val(self._operator(e.op, texts, kind), kind, vec)

    def _scaled(self, e: Call) -> Val | None:
        """A value that is multiplied and divided by several numbers, or divided by one, as one product in f32."""
        inner: Expr = e
        by, steps = 1.0, 0
        while isinstance(inner, Call) and (found := _factor(inner)) and (inner is e or self.repeated[inner] < 2):
            by, steps, inner = by * found[1], steps + (2 if inner.op == "div" else 1), found[0]
        if steps < 2 or not LEAST <= abs(by) <= 1 / LEAST:
            return None
        v = self._value(inner)
        return Val(f"({v.text} * f32({number(by)}))", "f32", v.vec) if v.kind == "f32" and v.const is None else None

    def _operator(self, op: str, x: list[str], kind: str) -> str:
        zero = f"{kind}({'0' if kind == 'i64' else '0.0'})"
        if op in _ARITHMETIC:
            return f"({x[0]} {_ARITHMETIC[op]} {x[1]})"
        if op == "div":
            return f"({x[0]} / {x[1]})"
        if op == "neg":
            return f"({zero} - {x[0]})" if kind == "i64" else f"({x[0]} * {kind}(-1.0))"
        if op == "abs":
            return f"absolute({x[0]})"
        if op in ("max", "min"):
            return f"{op}imum({x[0]}, {x[1]})"
        if op in ("square", "relu"):
            name = self.w.keep(x[0])
            return f"({name} * {name})" if op == "square" else f"select({name} < {zero}, {zero}, {name})"
        if op in _BITS and kind == "i64":
            return f"({x[0]} {_BITS[op]} {x[1]})"
        if op in _INTEGER and kind == "i64":
            return f"{_INTEGER[op]}({', '.join(x)})"
        if op in _REAL:
            return f"{op}({', '.join(x)})"
        raise Refusal(f"operator {op!r} on {kind} values", self.w.kernel.name, "the tvm backend has no form for it")

    def _lane_compare(self, e: Call) -> Val | None:
        """A comparison that is linear in the lane variable, as one of lane numbers with a scalar bound."""
        p = self.point
        if not p.lane or p.width == 1 or p.lane not in variables(e):
            return None
        got = linear(call("sub", *e.args), p.lane)
        if got is None or got[0] not in (1, -1):
            return None
        rest = self._value(near(got[1]))
        if rest.vec or rest.kind != "i64":
            return None
        # +-(base + l) + rest ? 0
        bound = f"-{rest.text} - {p.base}" if got[0] == 1 else f"{rest.text} - {p.base}"
        if p.base == "i64(0)":
            bound = bound.removesuffix(" - i64(0)")
        op = e.op if got[0] == 1 else {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(e.op, e.op)
        return Val(compared(op, f"lane({p.width})", f"clip({bound})"), "bool", True)


def _factor(e: Call) -> tuple[Expr, float] | None:
    """(x, c) with e = x * c."""
    for k, x in enumerate(e.args):
        if isinstance(x, Const) and isinstance(x.value, float) and x.value:
            if e.op == "mul":
                return e.args[1 - k], x.value
            if e.op == "div" and k == 1:
                return e.args[0], 1 / x.value
    return None


def _integers(op: str, a: Val, b: Val, vec: bool) -> Val:
    """a op b, with numbers added up and neutral ones left out."""
    if a.const is not None and b.const is not None:
        return constant(int(OPS[op].numpy(a.const, b.const)))
    neutral = 1 if op == "mul" else 0
    if b.const == neutral:
        return a
    if a.const == neutral and op != "sub":
        return b
    x, y = (str(v.const) if v.const is not None else v.text for v in (a, b))
    return Val(f"({x} {_ARITHMETIC[op]} {y})", "i64", vec)


def _loaded(text: str, dtype: str, vec: bool) -> Val:
    return Val(f"ne({text}, 0)" if dtype == "bool" else text, dtype, vec)


def compared(op: str, a: str, b: str) -> str:
    return f"{op}({a}, {b})" if op in ("eq", "ne") else f"({a} {_COMPARE[op]} {b})"


def constant(x: bool | int | float) -> Val:
    if isinstance(x, bool):
        return Val(f"T.bool({x})", "bool", const=x)
    if isinstance(x, int):
        return Val(f"i64({x})", "i64", const=x)
    return Val(f"f32({number(x)})", "f32", const=x)


def number(x: float) -> str:
    return "nan" if x != x else "inf" if x == float("inf") else "-inf" if x == -float("inf") else repr(float(x))


def joined(args: list[Val]) -> str:
    """The kind that holds all of them; number constants take the others' kind where they can."""
    kinds = {a.kind for a in args if a.const is None} or {a.kind for a in args}
    kinds |= {"f32" for a in args if isinstance(a.const, float) and not kinds & {"f32", "f64"}}
    return next((k for k in ("f64", "f32", "i64") if k in kinds), "bool")


def truth(v: Val) -> Val:
    return v if v.kind == "bool" else Val(f"ne({v.text}, {v.kind}(0))", "bool", v.vec)


def convert(v: Val, kind: str) -> Val:
    """The same value in another kind."""
    if v.kind == kind:
        return v
    if v.const is not None and kind != "bool":
        text = str(int(v.const)) if kind == "i64" else number(float(v.const))
        return Val(f"{kind}({text})", kind, const=v.const)
    if kind == "bool":
        return truth(v)
    if v.kind == "bool":
        return Val(f"select({v.text}, {kind}(1), {kind}(0))", kind, v.vec)
    return Val(f"cast({ELEMENT_OF[kind]!r}, {v.text})", kind, v.vec)


def linear(e: Expr, var: str) -> tuple[int, Expr] | None:
    """(c, rest) with e = c * var + rest and rest free of var, or None."""
    if var not in variables(e):
        return 0, e
    if isinstance(e, Var):
        return 1, Const(0)
    if not isinstance(e, Call):
        return None
    parts = [linear(a, var) for a in e.args]
    if e.op in ("add", "sub") and parts[0] is not None and parts[1] is not None:
        sign = 1 if e.op == "add" else -1
        return parts[0][0] + sign * parts[1][0], call(e.op, parts[0][1], parts[1][1])
    if e.op == "neg" and parts[0] is not None:
        return -parts[0][0], call("neg", parts[0][1])
    if e.op == "mul":
        for i, j in ((0, 1), (1, 0)):
            c, p = e.args[i], parts[j]
            if isinstance(c, Const) and isinstance(c.value, int) and p is not None:
                return c.value * p[0], call("mul", c, p[1])
    return None
