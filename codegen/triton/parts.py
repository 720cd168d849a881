"""A loop in up to three parts, so that the steps without tails and with one side of a branch have neither.

Conditions on the loop variable that are linear in it hold up to some step or from some step on (`bounds.half`): that a
dim's tile is full, and those of branches.  Between the first and the last step that breaks one of them all hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from memcomp.codegen.bounds import first_step, half, last_step
from memcomp.ir.expr import Call, Const, Expr, call, variables
from memcomp.ir.tile import Dim, Loop, Statement, TileKernel, When, statements


@dataclass(frozen=True, slots=True)
class Part:
    """Steps up to `end` (None: the loop's end).  full: dims whose tiles are full in all of them."""

    end: Expr | None
    body: tuple[Statement, ...]
    full: frozenset[str] = frozenset()


def parts(k: TileKernel, s: Loop) -> list[Part]:
    """The parts of a loop in order, the middle one plain; [] where nothing is gained."""
    integers = {t.name for t in k.tiles if t.dtype == "i64"}
    held: set[Expr] = set()
    full: set[str] = set()
    starts: list[Expr] = []
    ends: list[Expr] = []

    def splits(tests: Iterable[Expr]) -> bool:
        """Note the steps where all tests hold, if each says so."""
        found: list[tuple[bool, Expr]] = []
        for test in tests:
            h = half(test, s.var, integers)
            if h is None or variables(h.rest) & {d.name for d in k.dims}:
                return False
            if h.step > 0:
                found.append((True, _known(last_step(h.step, h.rest))))
            elif h.step < 0:
                found.append((False, _known(first_step(h.step, h.rest))))
            else:
                return False
        for last, at in found:
            (ends if last else starts).append(at)
        return bool(found)

    for d in k.dims:
        if s.var in variables(d.count) and splits(_full(d, s.var)):
            full.add(d.name)
    for w in _branches(s.body):
        if splits(_tests(_plain(w))):
            held.add(w.cond)
    if not starts and not ends:
        return []
    general = _taken(s.body, held, plain=False)
    out = [Part(_joined("min", ends) if ends else None, _taken(s.body, held, plain=True), frozenset(full))]
    if starts:
        out.insert(0, Part(_joined("max", starts), general))
    if ends:
        out.append(Part(None, general))
    return out


def _known(e: Expr | None) -> Expr:
    assert e is not None
    return e


def _joined(op: str, items: list[Expr]) -> Expr:
    out, *rest = dict.fromkeys(items)
    for e in rest:
        out = call(op, out, e)
    return out


def _full(d: Dim, var: str) -> Iterator[Expr]:
    """Conditions under which the count is the capacity: every part of a minimum is at least that much."""
    todo = [d.count]
    while todo:
        e = todo.pop()
        if isinstance(e, Call) and e.op == "min":
            todo += e.args
        elif isinstance(e, Const):
            if e.value < d.capacity:
                yield call("lt", e, 0)
        else:
            yield call("ge", e, d.capacity)


def _plain(w: When) -> Expr:
    """When the side without masks runs: a branch that has none skips its masked side."""
    if not w.orelse and isinstance(w.cond, Call) and w.cond.op == "not":
        return w.cond.args[0]
    return w.cond


def _tests(e: Expr) -> list[Expr]:
    """The conditions that a conjunction joins."""
    if isinstance(e, Call) and e.op == "and":
        return [x for a in e.args for x in _tests(a)]
    return [e]


def _branches(body: tuple[Statement, ...]) -> list[When]:
    return [s for s in statements(body) if isinstance(s, When)]


def _taken(body: tuple[Statement, ...], held: set[Expr], plain: bool) -> tuple[Statement, ...]:
    """The statements where the conditions `held` hold; not plain: where they may not, without branches that only spare
    work."""
    out: list[Statement] = []
    for s in body:
        if isinstance(s, When) and s.cond in held and plain:
            out += _taken(s.body if _plain(s) == s.cond else (), held, plain)
        elif isinstance(s, When) and s.cond in held and s.spare:
            out += _taken(s.last, held, plain)
        elif isinstance(s, When):
            out.append(replace(s, body=_taken(s.body, held, plain), orelse=_taken(s.orelse, held, plain)))
        elif isinstance(s, Loop):
            out.append(replace(s, body=_taken(s.body, held, plain)))
        else:
            out.append(s)
    return tuple(out)
