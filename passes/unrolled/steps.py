"""Steps of an unrolled loop: the statements that only one piece of a collected tensor needs, with their numbers apart.

Two steps are alike when they differ in nothing but integers: in indices, in guards, and in extents of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, children, rebuild, walk
from memcomp.ir.ops import COMPARISONS
from memcomp.ir.simplify import linear

HOLE = Var("#")
"""Stands where an integer was; no rank variable is called so."""
_INTEGERS = ("i64", "i32", "i16", "i8", "u8")


@dataclass(frozen=True, slots=True)
class Form:
    """A statement without its integers: variables are v0, v1 ... as in `space`, temporaries are `aliases`."""

    outs: tuple[Access, ...]
    body: Expr
    over: tuple[str, ...]
    monoid: str
    guards: tuple[Expr, ...]
    stored: Any  # dtype and empty value of what it writes, and the ranks without a number

    def parts(self) -> Iterator[Expr]:
        yield from self.outs
        yield self.body
        yield from self.guards


@dataclass(frozen=True, slots=True)
class Step:
    """statements: positions in the cascade, the one that writes the piece last.  at: the integers of its output index;
    numbers: all others; extents: of the variables of each statement in turn, where they are numbers.
    place, shape: where the piece begins, and the extents of its variables."""

    statements: tuple[int, ...]
    forms: tuple[Form, ...]
    spaces: tuple[tuple[str, ...], ...]
    at: tuple[int, ...]
    numbers: tuple[int, ...]
    extents: tuple[int, ...]
    place: tuple[int, ...]
    shape: tuple[int, ...]


def steps(c: Cascade) -> dict[str, list[Step]]:
    """Per tensor that several statements write, its steps in the order of the program."""
    writers: dict[str, list[int]] = {}
    for k, s in enumerate(c.einsums):
        for n in s.names:
            writers.setdefault(n, []).append(k)
    ordered = {r.var for r in c.ranks if r.iterative}
    if ordered or all(len(w) == 1 for w in writers.values()):
        return {}
    roots = {k for n, w in writers.items() if len(w) > 1 for k in w if len(c.einsums[k].outs) == 1}
    own: dict[int, list[int]] = {k: [] for k in roots}
    for k, owner in _owners(c, roots, writers).items():
        own[owner].append(k)
    reader = _Forms(c)
    out: dict[str, list[Step]] = {}
    for root in sorted(roots):
        name = c.einsums[root].out.tensor
        if any(name in c.einsums[k].reads() for k in own[root]):
            continue  # a step that reads what another one collects runs after it
        out.setdefault(name, []).append(reader.step(tuple(sorted(own[root]))))
    return out


def _owners(c: Cascade, roots: set[int], writers: dict[str, list[int]]) -> dict[int, int]:
    """Statement -> the piece for which alone it is computed."""
    users: dict[str, set[int]] = {}
    owner: dict[int, int] = {}
    kept = {t.name for t in c.tensors if t.role != "temp"}
    for k in reversed(range(len(c.einsums))):
        s = c.einsums[k]
        if k in roots:
            owner[k] = k
        elif not any(n.removesuffix("'") in kept or len(writers[n]) > 1 for n in s.names):
            found = {owner.get(u, -1) for n in s.names for u in users.get(n, ())}
            if len(found) == 1 and -1 not in found:
                owner[k] = found.pop()
        for n in s.reads():
            users.setdefault(n, set()).add(k)
    return owner


class _Forms:
    """Takes statements of one cascade apart."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.extents = {r.name: r.extent for r in c.ranks}
        self.tensors = {t.name: t for t in c.tensors}
        self.integers = frozenset(t.name for t in c.tensors if t.dtype in _INTEGERS)

    def step(self, statements: tuple[int, ...]) -> Step:
        names = aliases(self.c, statements)
        forms: list[Form] = []
        spaces: list[tuple[str, ...]] = []
        at: list[int] = []
        numbers: list[int] = []
        extents: list[int] = []
        for k in statements:
            s = self.c.einsums[k]
            at = []
            form, space = self.form(s, names, at, numbers, extents)
            forms.append(form)
            spaces.append(space)
            if k != statements[-1]:
                numbers += at
        root = self.c.einsums[statements[-1]]
        place = tuple((self._linear(i) or {}).get(None, 0) for i in root.out.index)
        piece = (self.extents[v.upper()] for v in root.space() if not root.reduce or v not in root.reduce.over)
        shape = tuple(int(x.value) for x in piece if isinstance(x, Const))
        return Step(statements, tuple(forms), tuple(spaces), tuple(at), tuple(numbers), tuple(extents), place, shape)

    def _linear(self, e: Expr) -> dict[Expr | None, int] | None:
        return linear(e, integers=self.integers)

    def form(self, s: Einsum, names: dict[str, str], at: list[int], numbers: list[int],
             extents: list[int]) -> tuple[Form, tuple[str, ...]]:
        space = s.space()
        local = {v: f"v{k}" for k, v in enumerate(space)}
        look = _Look(self, local, names)
        outs = tuple(Access(names.get(o.tensor, o.tensor), tuple(look.integer(i, at) for i in o.index)) for o in s.outs)
        body = look.any(s.body, numbers)
        guards = tuple(look.any(g, numbers) for g in s.guards())
        symbols = []
        for v in space:
            x = self.extents[v.upper()]
            if isinstance(x, Const):
                extents.append(int(x.value))
            else:
                symbols.append((local[v], v))
        t = [self.tensors.get(n) for n in s.names]
        stored = tuple((x.dtype, x.empty) if x else None for x in t), tuple(symbols)
        over = tuple(local[v] for v in s.reduce.over) if s.reduce else ()
        return Form(outs, body, over, s.reduce.monoid if s.reduce else "", guards, stored), space


class _Look:
    def __init__(self, forms: _Forms, local: dict[str, str], names: dict[str, str]) -> None:
        self.forms, self.local, self.names = forms, local, names

    def any(self, e: Expr, out: list[int]) -> Expr:
        """`e` with its integers put into `out`, in the order of their holes."""
        if isinstance(e, Access):
            return Access(self.names.get(e.tensor, e.tensor), tuple(self.integer(i, out) for i in e.index))
        if isinstance(e, Call) and (e.op == "real" or e.op in COMPARISONS and all(map(self._whole, e.args))):
            return Call(e.op, tuple(self.integer(a, out) for a in e.args))
        if isinstance(e, (Var, Size)):
            return self.integer(e, out)
        kids = children(e)
        return rebuild(e, tuple(self.any(k, out) for k in kids)) if kids else e

    def _whole(self, e: Expr) -> bool:
        return linear(e, integers=self.forms.integers) is not None

    def integer(self, e: Expr, out: list[int]) -> Expr:
        """An integer expression as a hole, and terms times a hole each."""
        if isinstance(e, Var):
            out += (0, 1)
            return _variable(self.local[e.name])
        terms = self._terms(e)
        if terms is None:
            return self.any(e, out)
        parts: list[tuple[Expr, list[int]]] = []
        for t, k in terms.items():
            if t is not None:
                inner: list[int] = []
                parts.append((self._term(t, inner), [*inner, k]))
        parts.sort(key=lambda p: repr(p[0]))
        total: Expr = HOLE
        out.append(terms.get(None, 0))
        for form, holes in parts:
            total = total + form * HOLE
            out += holes
        return total

    def _terms(self, e: Expr) -> dict[Expr | None, int] | None:
        if isinstance(e, Size) and isinstance(x := self.forms.extents[e.rank], Const):
            return {None: int(x.value)}
        if isinstance(e, Const):
            return {None: int(e.value)}
        table = {n: self.forms.extents[n.rank] for n in walk(e) if isinstance(n, Size)}
        if any(isinstance(x, Const) for x in table.values()):
            e = _sized(e, table)
        return linear(e, integers=self.forms.integers)

    def _term(self, t: Expr, out: list[int]) -> Expr:
        """One term of a sum: a variable, a size, or operators whose arguments are sums again."""
        if isinstance(t, Var):
            return Var(self.local[t.name])
        if isinstance(t, Size):
            return t
        if isinstance(t, Access):
            return self.any(t, out)
        kids = children(t)
        return rebuild(t, tuple(self._term(k, out) if _product(t) else self.integer(k, out) for k in kids))


@cache
def _variable(name: str) -> Expr:
    return HOLE + Var(name) * HOLE


def _product(t: Expr) -> bool:
    return isinstance(t, Call) and t.op == "mul"


def _sized(e: Expr, table: dict[Size, Any]) -> Expr:
    if isinstance(e, Size):
        x = table[e]
        return x if isinstance(x, Const) else e
    kids = children(e)
    return rebuild(e, tuple(_sized(k, table) for k in kids)) if kids else e


def aliases(c: Cascade, statements: Sequence[int]) -> dict[str, str]:
    """What the temporaries of a step are called in its forms."""
    return {n: f"#{k}.{j}" for k, at in enumerate(statements[:-1]) for j, n in enumerate(c.einsums[at].names)}


def filled(e: Expr, numbers: Iterator[Expr]) -> Expr:
    """`e` with its holes filled in order."""
    if e == HOLE:
        return next(numbers)
    kids = children(e)
    return rebuild(e, tuple(filled(k, numbers) for k in kids)) if kids else e


def differs(a: Step, b: Step, c: Cascade) -> str:
    """In what two steps differ other than in integers; "" where they do not."""
    from memcomp.ir.show import show_einsum

    def at(s: Step, k: int) -> str:
        return show_einsum(c.einsums[s.statements[k]])

    if len(a.forms) != len(b.forms):
        return f"it has {len(b.forms)} statements, the first has {len(a.forms)}"
    return next((f"`{at(b, k)}` against `{at(a, k)}`" for k, (x, y) in enumerate(zip(a.forms, b.forms, strict=True))
                 if x != y), "")


def columns(family: Sequence[Step]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The integers of alike steps, one sequence a place: of the output index, of the rest, of the extents."""
    first = family[0]
    return ([tuple(s.at[k] for s in family) for k in range(len(first.at))],
            [tuple(s.numbers[k] for s in family) for k in range(len(first.numbers))],
            [tuple(s.extents[k] for s in family) for k in range(len(first.extents))])
