"""Streaming a rank: stages of accepted reductions, their loops, and what is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, extent_of
from memcomp.ir.expr import Access, Call, Expr, Size, Var, conjunction, reads, variables, walk
from memcomp.ir.kinds import kind_of_dtype
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import order_of
from memcomp.ir.program import Program
from memcomp.passes import _ranks
from memcomp.passes.derive import places
from memcomp.passes.derive.assemble import assembled, cut_ranks, live, ragged, roots
from memcomp.passes.derive.closing import Closing
from memcomp.passes.derive.emit import Writer
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.finals import Finals
from memcomp.passes.derive.plan import Inliner, View, count, iterative, long, reduces, view
from memcomp.passes.derive.scan import scanned
from memcomp.passes.derive.serial import serial
from memcomp.passes.derive.sides import NoLaw
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import OrderState, State
from memcomp.passes.derive.terms import Gauge, Term
from memcomp.passes.derive.tiles import Cut

Value: TypeAlias = list[Term] | Expr | places.Places


@dataclass(frozen=True, slots=True)
class Refused:
    """A reduction that no law moves: where = "TENSOR over RANK", why = the operator and the missing law."""

    where: str
    why: str


_FITS = 256  # points of a fiber that a tile holds whole
AGAIN = 20_000  # nodes of bodies that are looked at once more, stage after stage, before what still waits is left
_LEFT = " (not tried again: too much waits on one another)"
_REFUSED = re.compile(r"refused (\S+ over \S+): (.*)")


def refusals(program: Program) -> tuple[Refused, ...]:
    """The refusals recorded in the program's proofs."""
    return tuple(Refused(m[1], m[2]) for p in program.proofs if (m := _REFUSED.fullmatch(p)))


def streamed(program: Program, splits: int | Knob | None, tile: tuple[int, ...], frame: str, weighted: bool,
             ranks: tuple[str, ...] | None) -> Program:
    done: set[str] = set()
    while True:
        names = [r for r in _candidates(program.cascade, ranks) if r not in done]
        if not names:
            return _with_serial(program)
        done.add(names[0])
        program = _Stream(program, names[0], splits, tile, frame, weighted).run()


def _with_serial(program: Program) -> Program:
    """Says which loops of the program have no law to merge their rounds by."""
    said = {r.where for r in refusals(program)}
    lines = tuple(f"refused {t} over {rank}: {why}" for t, rank, why in serial(program.cascade)
                  if f"{t} over {rank}" not in said)
    return replace(program, proofs=program.proofs + lines) if lines else program


def _candidates(c: Cascade, ranks: tuple[str, ...] | None) -> list[str]:
    """Ranks to stream: those whose fiber fits no tile first, then most passes first, then those of any length."""
    loops = iterative(c)
    written = {v for t in c.outputs() for s in (*c.writers(t.name), *c.writers(t.name + "'"))
               for o in s.outs for i in o.index for v in variables(i)}
    out: list[tuple[bool, int, bool, int, str]] = []
    orders = {v for s in c.einsums if (v := order_of(s)) is not None}
    listed = max((extent_of(c, v.upper()) or 0 for v in orders), default=0)
    for k, r in enumerate(c.ranks):
        mine = [s for s in c.einsums if r.var in s.space()]
        if r.var in loops or not any(reduces(s, r.var) for s in mine):
            continue
        fixed = extent_of(c, r.name)
        if r.name not in ranks if ranks is not None else fixed is not None and fixed <= listed:
            continue  # who holds a list of the best holds all of it
        looped = any(loops & set(s.space()) for s in mine)
        passes = count(c, _apart(c, loops, r.var) if looped else c.einsums, r.var)
        if looped and passes < 2:
            continue
        if ranks is None and r.var in written and passes < 3:  # one pass must read what another writes
            continue
        if passes >= 2 or any(_placed(s, r.var) or reduces(s, r.var) and _long(c, s, r.var) for s in mine):
            out.append((fixed is not None and fixed <= _FITS, -passes, fixed is not None, k, r.name))
    return [name for *_, name in sorted(out)]


def _apart(c: Cascade, loops: set[str], v: str) -> list[Einsum]:
    """The statements that need no loop; none where a loop reduces over v or waits for what does."""
    out, made, waits = [], set[str](), set[str]()
    for s in c.einsums:
        inside, late = bool(loops & set(s.space())), reduces(s, v) or bool(s.reads() & waits)
        if inside and late:
            return []
        if inside or s.reads() & made:
            made |= set(s.names)
        else:
            out.append(s)
        if late:
            waits |= set(s.names)
    return out


def _placed(s: Einsum, v: str) -> bool:
    """Does the statement find places along v?  On its own it walks v for the value and again for the place."""
    return reduces(s, v) and s.reduce is not None and MONOIDS[s.reduce.monoid].outs > 1


def _long(c: Cascade, s: Einsum, v: str) -> bool:
    """Does the reduction read a temporary along v (which would have to be stored whole)?"""
    given = {t.name for t in c.tensors if t.role in ("in", "state")}
    return any(isinstance(n, Access) and n.tensor not in given and any(v in variables(i) for i in n.index)
               for n in walk(s.body))


def _outer(s: Einsum, part: Einsum) -> tuple[str, ...]:
    """Variables that the reduction runs over and its part does not."""
    assert s.reduce is not None and part.reduce is not None
    return tuple(x for x in s.reduce.over if x not in part.reduce.over)


@dataclass(slots=True)
class _Stream:
    program: Program
    rank: str
    splits: int | Knob | None
    tile: tuple[int, ...]
    frame: str
    weighted: bool
    taken: set[str] = field(default_factory=set)
    proofs: list[str] = field(default_factory=list)
    wanted: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    ranks: list[Rank] = field(default_factory=list)
    ends: dict[str, Access] = field(default_factory=dict)
    parts: dict[str, Einsum] = field(default_factory=dict)  # accepted reduction -> what of it is finished at each point
    alone: set[str] = field(default_factory=set)  # reductions whose tasks are not those of the stage
    again: int = 0  # nodes of bodies that were refused before and looked at once more

    def run(self) -> Program:
        c = self.program.cascade
        v = self.rank.lower()
        extent = self._extent(c)
        if extent is None:
            where = next(s.names[0] for s in c.einsums if reduces(s, v))
            return self._refuse([f"refused {where} over {self.rank}: a ragged rank without a bound"])
        self.taken = {t.name for t in c.tensors} | {n for s in c.einsums for n in s.names}
        names = self._rank_names(c)
        cut = Cut(v, names[2] if self.splits else None, names[1], names[0], extent)
        facts, finals = Facts(c), Finals(Facts(c), lambda t: self.ends.get(t))
        finals.facts = facts
        prefix: list[Einsum] = []
        rest = list(c.einsums)
        stages = 0
        carried: dict[str, Einsum] = {}
        refused: dict[str, str] = {}
        extremes: list[tuple[Gauge, Access]] = []
        while True:
            look = view(c, rest, v)
            look = View(v, {**{t: "carried" for t in carried}, **look.sides}, {**carried, **look.writer})
            inline = Inliner(c, look)
            while True:
                stage = Stage(v, extent, facts, look.late, self._end(cut), lambda g: self.ends["$rho:" + g],
                              self._fresh, self.frame, cut.outer is not None)
                stage.finished, stage.weighted = list(extremes), self.weighted
                said = len(self.proofs)
                accepted, blocked = self._accept(rest, inline, stage, refused)
                if not (alone := self._alone(c, [rest[k] for k in accepted])):
                    break
                self.alone |= alone
                del self.proofs[said:]
            extremes += self._extremes(rest, inline, stage, accepted)
            refused = {**blocked, **refused}
            if not accepted:
                break
            stages += 1
            finished = self._finish(rest, inline, stage, finals, accepted)
            early = [k for k, s in enumerate(rest) if k not in accepted
                     and self._side(look, s) in ("neutral", "carried")]
            carried.update({n: rest[k] for k in early for n in rest[k].names if look.sides.get(n) == "carried"})
            prefix += [rest[k] for k in early]
            rest = [x for k, s in enumerate(rest) if k not in early for x in finished.get(k, [s])]
            moving = scanned(stage, extent, self._fresh, _ranks.fresh_rank(c, "T", {r.name for r in self.ranks}))
            if moving is None or cut.outer is not None:
                prefix += self._write(inline, stage, cut)
                continue
            prefix += moving.statements
            rest = [moving.read(s) for s in rest]
            self.ranks.append(moving.rank)
            self.proofs.append(f"{self.rank}: a scan, {moving.p.upper()} moves its frame")
        lines = [f"refused {t} over {self.rank}: {why}" for t, why in refused.items()]
        alive = live(prefix + rest, roots(c))
        late = {id(s) for s in rest}
        after = stages + count(c, [s for s in alive if id(s) in late], v)
        before = count(c, c.einsums, v)
        if stages == 0 or after > before or (after == before and after > 1):
            return self._refuse(lines)
        new = assembled(c, prefix + rest, self.wanted, self.dtypes)
        cuts = cut_ranks(c, self.rank, cut, self.tile, self.splits)
        if not any(cut.step in s.space() for s in new.einsums):  # scans alone
            cuts = ()
        new = replace(new, ranks=(*c.ranks, *cuts, *self.ranks))
        proofs = [*self.proofs, *lines, f"{self.rank}: {before} -> {after} passes"]
        return replace(self.program, cascade=new, proofs=(*self.program.proofs, *proofs))

    def _refuse(self, lines: list[str]) -> Program:
        said = {r.where for r in refusals(self.program)}
        new = tuple(x for x in lines if (m := _REFUSED.fullmatch(x)) is None or m[1] not in said)
        return replace(self.program, proofs=self.program.proofs + new) if new else self.program

    # -- names ----------------------------------------------------------------------------------------------------

    def _fresh(self, hint: str) -> str:
        name = _ranks.unused(hint.replace("'", ""), self.taken)
        self.taken.add(name)
        return name

    def _rank_names(self, c: Cascade) -> tuple[str, str, str]:
        have = {r.name for r in c.ranks}
        stem = self.rank if not self.rank[-1].isdigit() else self.rank + "_"
        while {stem + d for d in "012"} & have:
            stem += "T"
        return stem.lower() + "0", stem.lower() + "1", stem.lower() + "2"

    def _extent(self, c: Cascade) -> Expr | None:
        """What the stream variable stays below; None for a ragged rank without a bound."""
        r = c.rank(self.rank)
        if not ragged(r) or r.extent is None or isinstance(r.extent, Knob):
            return Size(self.rank)
        return r.extent if r.bound is not None else None

    def _end(self, cut: Cut) -> Callable[[State], Access]:
        def end(state: State) -> Access:
            if state.name not in self.ends:
                vs = tuple(Var(v) for v in state.vars)
                self.ends[state.name] = (Access(state.name, (Size(cut.step.upper()), *vs)) if cut.outer is None
                                         else Access(self._fresh("G" + state.name[1:]), vs))
                if isinstance(state, OrderState):
                    self.ends["$rho:" + state.name] = self.ends[state.name]
            return self.ends[state.name]

        return end

    # -- one stage ------------------------------------------------------------------------------------------------

    def _side(self, look: View, s: Einsum) -> str:
        return look.sides[s.names[0]]

    def _accept(self, rest: list[Einsum], inline: Inliner, stage: Stage,
                before: Mapping[str, str]) -> tuple[dict[int, Value], dict[str, str]]:
        """Position of a statement -> its value.  Order reductions first (they are the gauges of sums), then sums.

        before: what earlier stages refused; where that still waits it is not tried again."""
        look = inline.look
        accepted: dict[int, Value] = {}
        refused: dict[str, str] = {}
        todo = [(k, s) for k, s in enumerate(rest) if reduces(s, look.v)]
        for sums in (False, True):
            for k, s in todo:
                assert s.reduce is not None
                if (s.reduce.monoid == "sum") != sums:
                    continue
                name = s.names[0]
                if name in self.alone or name in before and inline.mixed(s):
                    continue
                if name in before and self.again > AGAIN:
                    refused[name] = before[name].removesuffix(_LEFT) + _LEFT
                    continue
                body, guard = inline.body(s)
                if name in before:
                    self.again += sum(1 for _ in walk(body))
                whole = self._whole(s)
                part = s if whole else self._part(look, s, body)
                try:
                    self._check(look, body, guard)
                    if sums and not whole:
                        terms, laws = stage.sum(part, body, guard)
                        accepted[k] = terms
                    elif MONOIDS[s.reduce.monoid].outs == 2:
                        found = places.accept(stage, s, body, guard)
                        accepted[k], laws = found, found.laws
                    else:
                        value, lifted = (stage.whole if whole else stage.order)(part, body, guard)
                        accepted[k], laws = value, lifted.laws
                    if part is not s:
                        self.parts[name] = part
                        each = ", ".join(_outer(s, part))
                        laws = (*laws, f"finished for each {each}, then joined by {s.reduce.monoid}")
                    self.proofs.append(f"{name}: one pass over {self.rank}" + (": " + "; ".join(laws) if laws else ""))
                except NoLaw as why:
                    waits = sorted(t for t in reads(why.expr) if look.late(t))
                    edge = f" (edge {', '.join(waits)} -> {name})" if waits else ""
                    refused[name] = f"{why}{edge}"
        return accepted, refused

    def _whole(self, s: Einsum) -> bool:
        """Is the result declared an integer, and one of numbers?"""
        if s.reduce is None or s.reduce.monoid not in ("sum", "prod", "max", "min"):
            return False
        t = self.program.cascade.declared(s.names[0].removesuffix("'"))
        return t is not None and kind_of_dtype(t.dtype) == "int"

    def _alone(self, c: Cascade, accepted: list[Einsum]) -> set[str]:
        """Reductions that lack a long variable which others of the stage have, and that are read where it is lacking:
        the tasks of the others would each make them, and none would have the whole result."""
        every = frozenset[str]().union(*(long(c, s) for s in accepted))
        out = set[str]()
        for s in accepted:
            lacking, todo, seen = every - long(c, s), list(s.names), set[str]()
            while lacking and todo:
                t = todo.pop()
                if t not in seen:
                    seen.add(t)
                    if not c.temporary(t):
                        out.add(s.names[0])
                    todo += [n for r in c.readers(t) if not lacking <= long(c, r) for n in r.names]
        return out

    def _part(self, look: View, s: Einsum, body: Expr) -> Einsum:
        """The reduction without those of its other variables that late values depend on: each point of them is finished
        on its own, and what they give is joined at the end.  `s` itself where there is no such variable."""
        assert s.reduce is not None
        outer = {x for n in walk(body) if isinstance(n, Access) and look.late(n.tensor) for x in variables(n)}
        over = tuple(x for x in s.reduce.over if x == look.v or x not in outer)
        if over == s.reduce.over or len(s.outs) > 1:
            return s
        index = dict.fromkeys(x for x in s.space() if x not in over)
        part = Access(self._fresh(s.names[0] + "P"), tuple(Var(x) for x in index))
        return replace(s, outs=(part,), reduce=replace(s.reduce, over=over))

    def _join(self, s: Einsum, part: Einsum) -> Einsum:
        """The whole reduction from its finished parts."""
        assert s.reduce is not None
        mine = [c for c in s.guards() if not variables(c) & set(s.reduce.over)]
        return replace(s, body=part.out, reduce=replace(s.reduce, over=_outer(s, part)), guard=conjunction(mine))

    def _extremes(self, rest: list[Einsum], inline: Inliner, stage: Stage,
                  accepted: dict[int, Value]) -> list[tuple[Gauge, Access]]:
        """What is a greatest or least value of what: later stages measure from it."""
        out = []
        for k in accepted:
            s = self.parts.get(rest[k].names[0], rest[k])
            if s.reduce is not None and s.reduce.monoid in ("max", "min"):
                body, guard = inline.body(s)
                out.append((stage.gauge(s.names[0], s.reduce.monoid, body, guard, s.reduce.over), s.out))
        return out

    def _check(self, look: View, body: Expr, guard: tuple[Expr, ...]) -> None:
        for e in guard:
            if any(look.late(t) for t in reads(e)):
                op = e.op if isinstance(e, Call) else "where"
                raise NoLaw(op, e, "a guard that needs a reduced value")
        for t in reads(body):
            if look.sides.get(t) == "mixed":
                raise NoLaw("reduce", body, f"{t} reduces another rank over a reduced value")

    def _finish(self, rest: list[Einsum], inline: Inliner, stage: Stage, finals: Finals,
                accepted: dict[int, Value]) -> dict[int, list[Einsum]]:
        """Finalise statements of accepted reductions, and of what is computed from them, by position."""
        look = inline.look
        close = Closing(stage, finals, self.ends)
        out: dict[int, list[Einsum]] = {}
        for k, s in enumerate(rest):
            if k in accepted:
                value, guard = accepted[k], inline.guard(s)
                part = self.parts.get(s.names[0], s)
                if isinstance(value, places.Places):
                    out[k] = places.close(close, s, value, guard)
                    self.dtypes[s.names[1]] = "i64"
                else:
                    done = close.sum(part, value, guard) if isinstance(value, list) else close.order(part, value, guard)
                    out[k] = [done] if part is s else [done, self._join(s, part)]
            elif self._side(look, s) == "late" and not reduces(s, look.v) and len(s.outs) == 1:
                if s.reduce is None:
                    where = conjunction([finals.expr(g) for g in s.guards()])
                    out[k] = [replace(s, body=finals.expr(s.body), guard=where)]
                    if len(self.program.cascade.writers(s.names[0])) == 1:
                        finals.learn(s, s.body, finals.term(s.body))
                elif s.reduce.monoid == "sum":  # any other reduction reads its operands by name
                    out[k] = close.shared(s, self._fresh)
        return out

    def _write(self, inline: Inliner, stage: Stage, cut: Cut) -> list[Einsum]:
        look = inline.look
        tiled = {t: s for t, s in look.writer.items() if look.sides[t] == "carried"}
        bodies = {t: inline.expr(s.out, ()) for t, s in tiled.items() if s.reduce is None and s.guard is None}
        named = {e: t for t, e in bodies.items() if variables(e) == set(tiled[t].space())}
        w = Writer(cut, tiled, named, self._fresh, stage=stage)
        spaces = {n: s.space() for s in self.program.cascade.einsums for n in s.names}
        every = tuple(dict.fromkeys(v for sp in spaces.values() for v in sp))
        for o in stage.orders:
            w.order(o, self._space(o, spaces, every))
        counts = [s for s in stage.sums if not (s.a or s.ds or s.es or s.bounded)]
        means = [g for g in stage.gauges if stage.gauges[g].kind in ("first", "running")]
        for g in stage.gauges:
            if g not in means and stage.gauges[g].kind != "weighted":
                w.gauge(g, every)
        for state in counts:
            w.sum(state, every)
        for g in means:
            w.gauge(g, every)
        for state in stage.sums:
            if state not in counts:
                w.sum(state, self._space(state, spaces, every))
        c = self.program.cascade
        for chosen in stage.places:
            places.write(w, chosen, self._space(chosen, spaces, every),
                         replace(c, ranks=(*c.ranks, *self.ranks)))
        self.ranks += w.more
        self.wanted.update(w.wanted)
        self.dtypes |= w.dtypes
        return w.init + w.body + w.merge

    def _space(self, state: State, spaces: dict[str, tuple[str, ...]], every: tuple[str, ...]) -> tuple[str, ...]:
        base = spaces.get(state.name[1:], every)
        return base if set(state.vars) | set(state.over) <= set(base) else every
