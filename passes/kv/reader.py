"""Attention over stored keys and values as one program: every codec, grouped either way, in any number of regions.

Decoding is an expression, so it is written into the Einsums that read; nothing here knows any codec.  Each region
attends alone and the partial results are joined exactly.  Stored arrays, for E channels and groups of G:

    along "e": plane[B, J, M, E / G * per]        a group is channels of one token
    along "n": plane[B, J, ceil(M / G) * per, E]  a group is tokens of one channel

and with pages of L tokens plane[N, J, L, ..], read at `pages[indptr[b] + m // L]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, substitute, transform
from memcomp.ir.program import Program
from memcomp.ir.show import show_expr
from memcomp.ir.text import parse
from memcomp.passes.kv.codecs import Codec, Plane


@dataclass(frozen=True, slots=True)
class Rows:
    """How many tokens there are where no array counts them singly: `tokens` for `each` elements of a plane's rank."""

    rank: str
    tokens: int
    each: int

    @property
    def groups(self) -> str:
        """Text of the number of whole groups of `tokens`."""
        return self.rank if self.each == 1 else f"{self.rank} // {self.each}"


def counted(streams: Sequence[Stored], rank: str) -> Rows | None:
    """What counts the tokens of streams that are all in groups along them; None where some array has them one by one.

    Raises Refusal where their groups do not end together.
    """
    spans = sorted({s.span for s in streams})
    if any(spans[-1] % n for n in spans):
        raise Refusal(f"groups of {spans[0]} and of {spans[-1]} tokens do not end together")
    least = min(spans[-1] // s.span * p.per for s in streams for p in s.codec.planes)
    return None if spans[0] == 1 else Rows(rank, spans[-1], least)


@dataclass(frozen=True, slots=True)
class Stored:
    """A stream as a region holds it: `width` channels, in groups along the channels (e) or the tokens (n)."""

    codec: Codec
    width: int
    along: str = "e"

    def __post_init__(self) -> None:
        if self.along == "e" and self.width % self.codec.group:
            raise Refusal(f"{self.width} channels are no whole groups of {self.codec.group}", self.codec.text,
                          "a group that divides them, or groups along tokens")

    @property
    def span(self) -> int:
        """Tokens that are encoded together."""
        return self.codec.group if self.along == "n" else 1

    def extents(self, plane: Plane, tokens: str, rows: Rows | None) -> tuple[str, str]:
        """The last two extents of a stored plane.  tokens: their number or rank; rows: what counts them instead."""
        if self.along == "e":
            return tokens, str(self.width // self.codec.group * plane.per)
        if tokens.isdecimal():
            return str(int(tokens) // self.span * plane.per), str(self.width)
        if rows is not None:
            each = rows.tokens // self.span * plane.per
            return rows.rank if each == rows.each else f"{rows.groups} * {each}", str(self.width)
        groups = tokens if self.span == 1 else f"ceil({tokens}/{self.span})"
        return groups if plane.per == 1 else f"{groups} * {plane.per}", str(self.width)

    def value(self, prefix: str, lead: tuple[Expr, ...], token: Expr, channel: Expr, value: Expr | None = None) -> Expr:
        """The number at a token and a channel.

        prefix: of the names of its tensors; lead: the indices before the token's.  Indices of planes move by a whole
        group's elements from group to group, so a group's place and the place in it are one index.
        """
        at, other = (channel, token) if self.along == "e" else (token, channel)
        many = self.along == "n" or self.width > self.codec.group
        tables = {t.name for t in self.codec.tables}
        inside = Call("mod", (at, Const(self.codec.group))) if many and self.codec.group > 1 else \
            at if not many else Const(0)

        def moved(n: Expr) -> Expr:
            if not isinstance(n, Access):
                return n
            if n.tensor in tables:   # the planes in its index have been moved before
                return Access(prefix + n.tensor, tuple(substitute(i, {Var("g"): inside}) for i in n.index))
            i = n.index[1]
            if isinstance(i, Const) and many:
                group = at if self.codec.group == 1 else Call("floordiv", (at, Const(self.codec.group)))
                per = self.codec.plane(n.tensor).per
                i = group if per == 1 else Call("add", (Call("mul", (group, Const(per))), i))
            own = (other, substitute(i, {Var("g"): at}))
            return Access(prefix + n.tensor, (*lead, *(own if self.along == "e" else own[::-1])))

        return substitute(transform(self.codec.value if value is None else value, moved), {Var("g"): at})


@dataclass(frozen=True, slots=True)
class Piece:
    """A region.  name: begins the names of its tensors; keys: one or more streams whose channels follow one another.

    values: None where they are the first channels of the first stream of keys.  ragged: `LEN[B]` tokens are there, else
    all; causal: of the last tokens each query sees those up to its own; window: only so many newest tokens are seen.
    page: tokens of a page, 0 for none.
    """

    name: str
    keys: tuple[Stored, ...]
    values: Stored | None
    ragged: bool = True
    causal: bool = False
    window: int = 0
    page: int = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """group: query heads of a head of keys; queries: of a head, at once; scale: of scores; cap: 0, or the bound of
    cap tanh(s / cap); query, result: dtypes."""

    group: int
    scale: float
    queries: int = 1
    cap: float = 0.0
    query: str = "f32"
    result: str = "f32"


def reader(a: Attention, pieces: tuple[Piece, ...], name: str = "read") -> Program:
    """The program of attention over the pieces: Q[B, J, G, (P,) E] and what the pieces store -> O[B, J, G, (P,) F].

    Raises Refusal where pieces differ in their channels or a group does not fit a page.
    """
    wide = {(sum(k.width for k in p.keys), _values(p).width) for p in pieces}
    if len(wide) != 1:
        raise Refusal("regions of one cache have keys of different channels", str(sorted(wide)))
    (e, f), query = wide.pop(), ", p" if a.queries > 1 else ""
    ranks = {"B": "", "J": "", "G": str(a.group)} | ({"P": str(a.queries)} if query else {})
    ranks |= {"E": str(e), "F": str(f)}
    dims = f"B, J, G{query.upper()}"
    tensors, body = [f"in Q[{dims}, E]: {a.query}"], list[str]()
    for p in pieces:
        _piece(a, p, ranks, tensors, body, query)
    tensors.append(f"out O[{dims}, F]: {a.result}")
    at, names = f"b, j, g{query}", [p.name for p in pieces]
    if len(names) == 1:
        body.append(f"O[{at}, f] = {names[0]}N[{at}, f] / {names[0]}D[{at}]")
    else:
        top = f"{names[0]}G[{at}]"
        for n in names[1:]:
            top = f"max({top}, {n}G[{at}])"
        body.append(f"TOP[{at}] = {top}")
        body += [f"{n}C[{at}] = exp({n}G[{at}] - TOP[{at}])" for n in names]
        over, under = (" + ".join(f"{n}{t} * {n}C[{at}]" for n in names) for t in (f"N[{at}, f]", f"D[{at}]"))
        body.append(f"O[{at}, f] = ({over}) / ({under})")
    said = "\n".join(f"rank {r}" + (f" = {x}" if x else "") for r, x in ranks.items())
    return parse(f"program {name}\n{said}\n" + "\n".join((*tensors, *body)) + "\n")


def _values(p: Piece) -> Stored:
    return p.keys[0] if p.values is None else p.values


def _piece(a: Attention, p: Piece, ranks: dict[str, str], tensors: list[str], body: list[str], query: str) -> None:
    x, m = p.name, f"{p.name}M".lower()
    streams = {f"{x}K{k or ''}": s for k, s in enumerate(p.keys)} | ({} if p.values is None else {f"{x}V": p.values})
    token: Expr = Var(m)
    lead: tuple[Expr, ...] = (Var("b"), Var("j"))
    rows: Rows | None = None
    if p.page:
        if bad := [s for s in streams.values() if p.page % s.span]:
            raise Refusal(f"pages of {p.page} tokens are no whole groups of {bad[0].span}")
        ranks |= {f"{x}PP": "", f"{x}I": "", f"{x}B": "B + 1", f"{x}M": f"{x}I * {p.page}"}
        tensors += [f"in {x}LEN[B]: i64", f"in {x}INDPTR[{x}B]: i64", f"in {x}PAGES[{x}I]: i32"]
        page = Access(f"{x}PAGES", (Call("add", (Access(f"{x}INDPTR", (Var("b"),)),
                                                 Call("floordiv", (token, Const(p.page))))),))
        lead, token = (page, Var("j")), Call("mod", (token, Const(p.page)))
    else:
        rows = counted(list(streams.values()), f"{x}MG")
        ranks |= {f"{x}M": ""} if rows is None else {rows.rank: "", f"{x}M": f"{rows.groups} * {rows.tokens}"}
        if p.ragged:
            tensors.append(f"in {x}LEN[B]: i64")
    tokens, head = (str(p.page), f"{x}PP, J") if p.page else (f"{x}M", "B, J")
    for stem, s in streams.items():
        declare("in", stem, s, tokens, rows, head, ranks, tensors)
    seen = [f"{m} < {x}LEN[b]"] if p.ragged or p.page else []
    there = f" where {seen[0]}" if p.page else ""   # beyond its end a sequence has no pages
    seen += [f"{m} <= {_last(a, p, x, query)}"] if p.causal and query else []
    seen += [f"{m} > {_last(a, p, x, query)} - {p.window}"] if p.window else []
    guard = f" where {' and '.join(seen)}" if seen else ""
    at = f"b, j, g{query}"
    parts, first = [], 0
    for k, (stem, s) in enumerate(zip(streams, p.keys, strict=False)):
        e = "e" if len(p.keys) == 1 else f"{stem.lower()}e"
        ranks.setdefault(e.upper(), str(s.width))
        value = s.value(stem, lead, token, Var(e))
        body.append(f"{stem}D[b, j, {m}, {e}] = {show_expr(value)}{there}")
        place = e if not first else f"{first} + {e}"
        parts.append(f"{x}S{k}[{at}, {m}]")
        body.append(f"{x}S{k}[{at}, {m}] = sum{{{e}}} Q[{at}, {place}] * {stem}D[b, j, {m}, {e}]{guard}")
        first += s.width
    score = f"({' + '.join(parts)}) * {a.scale!r}"
    if a.cap:
        score = f"{a.cap!r} * tanh({score} / {a.cap!r})"
    values = f"{x}V" if p.values is not None else f"{x}K"
    value = _values(p).value(values, lead, token, Var("f"))
    body += [f"{x}S[{at}, {m}] = {score}{guard}",
             f"{x}VD[b, j, {m}, f] = {show_expr(value)}{there}",
             f"{x}G[{at}] = max{{{m}}} {x}S[{at}, {m}]{guard}",
             f"{x}W[{at}, {m}] = exp({x}S[{at}, {m}] - {x}G[{at}]){guard}",
             f"{x}D[{at}] = sum{{{m}}} {x}W[{at}, {m}]{guard}",
             f"{x}N[{at}, f] = sum{{{m}}} {x}W[{at}, {m}] * {x}VD[b, j, {m}, f]{guard}"]


def _last(a: Attention, p: Piece, x: str, query: str) -> str:
    """The newest token that a query sees."""
    end = f"{x}LEN[b]" if p.ragged or p.page else f"{x}M"
    return f"{end} - {a.queries} + p" if query else f"{end} - 1"


def declare(role: str, stem: str, s: Stored, tokens: str, rows: Rows | None, head: str,
            ranks: dict[str, str], tensors: list[str]) -> None:
    """Declare the planes of a stream, its tables and their ranks.  head: the ranks before those of tokens and channels;
    tokens, rows: as of `Stored.extents`."""
    for plane in s.codec.planes:
        extents = s.extents(plane, tokens, rows)
        own = []
        for extent, rank in ((extents[0], f"{stem}{plane.name}R"), (extents[1], f"{stem}{plane.name}W")):
            if extent.isidentifier():
                own.append(extent)
            else:
                ranks[rank] = extent
                own.append(rank)
        tensors.append(f"{role} {stem}{plane.name}[{head}, {', '.join(own)}]: {plane.dtype}")
    for t in s.codec.tables:
        shape = [f"{stem}{t.name}{k}" for k in range(len(t.shape))]
        ranks |= dict(zip(shape, map(str, t.shape), strict=True))
        tensors.append(f"in {stem}{t.name}[{', '.join(shape)}]: {t.dtype}")
