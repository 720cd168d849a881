"""A loop in up to three parts, so that the steps without tails and with one side of a branch have neither.

Conditions on the loop variable that are linear in it hold up to some step or from some step on (`bounds.half`): that a
dim's tile is full, and those of branches.  Between the first and the last step that breaks one of them all hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from memcomp.codegen.bounds import first_step, half, last_step
from memcomp.ir.expr import Call, Const, Expr, call, variables
from memcomp.ir.simplify import proves
from memcomp.ir.tile import Dot, Loop, Statement, TileKernel, When, made, statements


@dataclass(frozen=True, slots=True)
class Part:
    """Steps up to `end` (None: the loop's end).  full: dims whose tiles are full in all of them; edge: the few steps
    before or after those of the plain part."""

    end: Expr | None
    body: tuple[Statement, ...]
    full: frozenset[str] = frozenset()
    edge: bool = False


def parts(k: TileKernel, s: Loop) -> list[Part]:
    """The parts of a loop in order, the middle one plain; one where nothing is gained.

    A loop with products has no branches that only spare masks: Triton would fetch nothing ahead.
    """
    integers, dims = fixed(k, s), {d.name for d in k.dims}
    held: set[Expr] = set()
    full: set[str] = set()
    starts: list[Expr] = []
    ends: list[Expr] = []

    def splits(tests: Iterable[Expr]) -> bool:
        """Note the steps where all tests hold, if each says so."""
        found = [edge(test, s.var, integers, dims) for test in tests]
        known = [x for x in found if x is not None]
        if len(known) < len(found):
            return False
        for last, at in known:
            (ends if last else starts).append(at)
        return bool(known)

    for d in k.dims:
        if s.var in variables(d.count) and splits(_tests(_full(d.count, d.capacity))):
            full.add(d.name)
    for w in _branches(s.body):
        if splits(_tests(_plain(w))):
            held.add(w.cond)
    whole = not product(s)   # branches that spare masks stay where nothing is fetched ahead
    general = _taken(s.body, held, plain=False, whole=whole)
    if not starts and not ends:
        return [Part(None, general)]
    plainly = _taken(s.body, held, plain=True, whole=whole)
    first, last = (not starts or proves(call("le", _joined("max", starts), s.lo)),
                   not ends or proves(call("ge", _joined("min", ends), s.hi)))
    out = [Part(None if last else _joined("min", ends), plainly, frozenset(full))]
    if not first:
        out.insert(0, Part(_joined("max", starts), general, edge=True))
    if not last:
        out.append(Part(None, general, edge=True))
    return out


def fixed(k: TileKernel, s: Loop) -> set[str]:
    """Tiles of integers that are the same in all steps of a loop."""
    return {t.name for t in k.tiles if t.dtype == "i64"} - {t for x in statements(s.body) for t in made(x)}


def product(s: Loop) -> bool:
    """Does a loop hold a contraction?"""
    return any(isinstance(x, Dot) for x in statements(s.body))


def edge(test: Expr, var: str, integers: set[str], dims: set[str]) -> tuple[bool, Expr] | None:
    """Where a condition holds: (True, the step up to which) or (False, the step from which); None: not known."""
    if isinstance(test, Call) and test.op in ("and", "or"):
        edges = [edge(a, var, integers, dims) for a in test.args]
        known = [e for e in edges if e is not None]
        if len(known) < len(edges) or len({last for last, _ in known}) > 1:
            return None
        last = known[0][0]
        return last, _joined("min" if last == (test.op == "and") else "max", [at for _, at in known])
    h = half(test, var, integers)
    if h is None or variables(h.rest) & dims:
        return None
    at = last_step(h.step, h.rest) if h.step > 0 else first_step(h.step, h.rest)
    return None if at is None else (h.step > 0, at)


def _joined(op: str, items: list[Expr]) -> Expr:
    out, *rest = dict.fromkeys(items)
    for e in rest:
        out = call(op, out, e)
    return out


def _full(e: Expr, capacity: int) -> Expr:
    """The condition under which a count is the capacity: every part of a minimum is at least that much, or one of a
    maximum."""
    if isinstance(e, Const):
        return Const(e.value >= capacity)
    if not isinstance(e, Call) or e.op not in ("min", "max"):
        return call("ge", e, capacity)
    every = e.op == "min"
    parts = [p for a in e.args if (p := _full(a, capacity)) != Const(every)]
    if not parts or Const(not every) in parts:
        return Const(every if not parts else not every)
    return Call("and" if every else "or", tuple(parts)) if len(parts) > 1 else parts[0]


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


def _taken(body: tuple[Statement, ...], held: set[Expr], plain: bool, whole: bool) -> tuple[Statement, ...]:
    """The statements where the conditions `held` hold; not plain: where they may not, without branches on them that
    only spare work.  whole: other branches that do so stay."""
    out: list[Statement] = []
    for s in body:
        if isinstance(s, When) and s.cond in held and plain:
            out += _taken(s.body if _plain(s) == s.cond else (), held, plain, whole)
        elif isinstance(s, When) and s.spare and (s.cond in held or not whole):
            out += _taken(s.last, held, plain, whole)
        elif isinstance(s, When):
            out.append(replace(s, body=_taken(s.body, held, plain, whole), orelse=_taken(s.orelse, held, plain, whole)))
        elif isinstance(s, Loop):
            out.append(replace(s, body=_taken(s.body, held, plain, whole)))
        else:
            out.append(s)
    return tuple(out)
