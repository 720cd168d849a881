"""What encodes new tokens and writes them where they belong, as one program: append, prefill and flush of whole groups.

    X{stem}[B, J, T, E]   new tokens of a stream; along tokens the whole groups of T are written
    AT[B]                 the place of the first one; along tokens a multiple of the group
    state {stem}{plane}   what is stored, as `reader` reads it

The statements are those of the codec's encoding, once a group: nothing here knows any codec, and what is written is
never read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from memcomp.ir.cascade import Einsum
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Var, transform
from memcomp.ir.program import Program
from memcomp.ir.show import show_einsum, show_rank
from memcomp.ir.simplify import simplify
from memcomp.ir.text import parse
from memcomp.passes.kv.reader import Stored, counted, declare


def writer(streams: Mapping[str, Stored], *, page: int = 0, dtype: str = "f32", name: str = "write") -> Program:
    """The program that appends tokens to every stream, by the beginning of its names.

    page: tokens of a page, found at `PAGES[INDPTR[b] + n // page]`; 0: one array for each sequence.
    dtype: of the new tokens.  Raises Refusal where streams do not take the same numbers of tokens.
    """
    rows, most = counted(list(streams.values()), "MG"), max(s.span for s in streams.values())
    if page % most:
        raise Refusal(f"pages of {page} tokens are no whole groups of {most}")
    ranks: dict[str, str] = {"B": "", "J": ""}
    ranks |= {"T": ""} | ({"C": f"T // {most}"} if most > 1 else {})
    tensors, body = ["in AT[B]: i64"], list[str]()
    if page:
        ranks |= {"N": "", "I": "", "BI": "B + 1"}
        tensors += ["in INDPTR[BI]: i64", "in PAGES[I]: i32"]
    else:
        ranks |= {"M": ""} if rows is None else {rows.rank: "", "M": f"{rows.groups} * {rows.tokens}"}
    for stem, s in streams.items():
        ranks[f"{stem}E"] = str(s.width)
        tensors.append(f"in X{stem}[B, J, T, {stem}E]: {dtype}")
        declare("state", stem, s, str(page) if page else "M", rows, "N, J" if page else "B, J", ranks, tensors)
        _encode(stem, s, most, ranks, tensors, body)
        body += [_put(stem, s, p.name, p.per, page, most) for p in s.codec.planes]
    said = "\n".join(f"rank {r}" + (f" = {x}" if x else "") for r, x in ranks.items())
    return parse(f"program {name}\n{said}\n" + "\n".join((*tensors, *body)) + "\n")


def _lead(stem: str, s: Stored, most: int) -> list[str]:
    """Ranks of the groups of the new tokens of a stream, behind B and J."""
    if s.along == "e":
        return ["T", *([f"{stem}EG"] if s.width > s.codec.group else [])]
    return [f"{stem}TG" if s.span < most else "C" if most > 1 else "T", f"{stem}E"]


def _encode(stem: str, s: Stored, most: int, ranks: dict[str, str], tensors: list[str], body: list[str]) -> None:
    """The codec's encoding over all groups; its tensors are called stem + "_" + name.  Ranks of extent 1 go."""
    c, lead = s.codec.encode, _lead(stem, s, most)
    if f"{stem}EG" in lead:
        ranks[f"{stem}EG"] = str(s.width // s.codec.group)
    if f"{stem}TG" in lead:
        ranks[f"{stem}TG"] = f"T // {s.span}"
    tables = {t.name for t in s.codec.tables}
    shared = {r for t in c.tensors if t.name in tables for r in t.ranks}
    alone = {r.name for r in c.ranks if r.extent == Const(1) and r.name not in shared}
    ranks |= {f"{stem}_{r.name}": show_rank(r).partition(" = ")[2]
              for r in c.ranks if r.name not in {"R", *shared, *alone}}
    at: tuple[Expr, ...] = tuple(Var(x.lower()) for x in ("B", "J", *lead))

    def rank(r: str) -> str:
        return stem + r if r in shared else f"{stem}_{r}"

    def kept(t: str) -> list[str]:
        return [r for r in c.tensor(t).ranks[1:] if r not in alone]

    def moved(n: Expr) -> Expr:
        if isinstance(n, Var):
            return Const(0) if n.name.upper() in alone else n if n.name == "r" else Var(rank(n.name.upper()).lower())
        if not isinstance(n, Access):
            return n
        if n.tensor in tables:
            return Access(stem + n.tensor, n.index)
        if n.tensor != "X":
            rest = [i for i, r in zip(n.index[1:], c.tensor(n.tensor).ranks[1:], strict=True) if r not in alone]
            return Access(f"{stem}_{n.tensor}", (*at, *map(simplify, rest)))
        group = at[2] if s.along == "n" else at[3] if len(at) > 3 else Const(0)
        place = simplify(Call("add", (Call("mul", (group, Const(s.codec.group))), n.index[1])))
        return Access(f"X{stem}", (*at[:2], *((at[2], place) if s.along == "e" else (place, at[3]))))

    for t in c.tensors:
        if t.role != "in":
            own = ", ".join(["B", "J", *lead, *map(rank, kept(t.name))])
            tensors.append(f"temp {stem}_{t.name}[{own}]: {t.dtype}")
    for e in c.einsums:
        outs = tuple(x for o in e.outs if isinstance(x := transform(o, moved), Access))
        over = e.reduce and replace(e.reduce, over=tuple(rank(v.upper()).lower() for v in e.reduce.over
                                                         if v.upper() not in alone))
        if over is not None and not over.over:
            raise Refusal(f"groups of one element: {s.codec.text}", hint="a group of at least 2")
        body.append(show_einsum(replace(e, outs=outs, body=transform(e.body, moved), reduce=over)))


def _put(stem: str, s: Stored, plane: str, per: int, page: int, most: int) -> str:
    """The statement that stores the new elements of a plane."""
    lead = _lead(stem, s, most)
    at = [Var(x.lower()) for x in ("B", "J", *lead)]
    own = [Var(f"{stem}_{plane}W".lower())] if per > 1 else []
    token: Expr = simplify(Call("add", (Access("AT", (Var("b"),)), Call("mul", (at[2], Const(s.span))))))
    first: Expr = Var("b")
    if page:
        first = Access("PAGES", (Call("add", (Access("INDPTR", (Var("b"),)), Call("floordiv", (token, Const(page))))),))
        token = Call("mod", (token, Const(page)))

    def placed(group: Expr) -> Expr:
        return simplify(Call("add", (Call("mul", (group, Const(per))), own[0] if own else Const(0))))

    row, column = (token, placed(at[3] if len(at) > 3 else Const(0))) if s.along == "e" else (
        placed(Call("floordiv", (token, Const(s.span)))), at[3])
    target = Access(f"{stem}{plane}'", (first, Var("j"), simplify(row), column))
    return show_einsum(Einsum((target,), Access(f"{stem}_{plane}", (*at, *own))))
