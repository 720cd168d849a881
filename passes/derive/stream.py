"""Streaming a rank: stages of accepted reductions, their loops, and what is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Cascade, Einsum, Knob, extent_of
from memcomp.ir.expr import Access, Call, Expr, Size, Var, conjunction, reads, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import Program
from memcomp.passes.derive.assemble import assembled, cut_ranks, live, ragged, roots
from memcomp.passes.derive.closing import Closing
from memcomp.passes.derive.emit import Writer
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.finals import Finals
from memcomp.passes.derive.plan import Inliner, View, count, iterative, reduces, view
from memcomp.passes.derive.sides import NoLaw
from memcomp.passes.derive.stage import Stage
from memcomp.passes.derive.states import OrderState, State
from memcomp.passes.derive.terms import Term
from memcomp.passes.derive.tiles import Cut


@dataclass(frozen=True, slots=True)
class Refused:
    """A reduction that no law moves: where = "TENSOR over RANK", why = the operator and the missing law."""

    where: str
    why: str


_FITS = 256  # points of a fiber that a tile holds whole
_REFUSED = re.compile(r"refused (\S+ over \S+): (.*)")


def refusals(program: Program) -> tuple[Refused, ...]:
    """The refusals recorded in the program's proofs."""
    return tuple(Refused(m[1], m[2]) for p in program.proofs if (m := _REFUSED.fullmatch(p)))


def streamed(program: Program, splits: int | Knob | None, tile: tuple[int, ...], frame: str,
             ranks: tuple[str, ...] | None) -> Program:
    done: set[str] = set()
    while True:
        names = [r for r in _candidates(program.cascade, ranks) if r not in done]
        if not names:
            return program
        done.add(names[0])
        program = _Stream(program, names[0], splits, tile, frame).run()


def _candidates(c: Cascade, ranks: tuple[str, ...] | None) -> list[str]:
    """Ranks to stream: those whose fiber fits no tile first, then most passes first."""
    loops = iterative(c)
    written = {v for t in c.outputs() for s in (*c.writers(t.name), *c.writers(t.name + "'"))
               for o in s.outs for i in o.index for v in variables(i)}
    out: list[tuple[bool, int, int, str]] = []
    for k, r in enumerate(c.ranks):
        mine = [s for s in c.einsums if r.var in s.space()]
        if r.var in loops or not any(reduces(s, r.var) for s in mine):
            continue
        if any(loops & set(s.space()) for s in mine):
            continue
        if ranks is not None and r.name not in ranks or ranks is None and r.var in written:
            continue
        passes = count(c, c.einsums, r.var)
        if passes >= 2 or any(reduces(s, r.var) and _long(c, s, r.var) for s in mine):
            fixed = extent_of(c, r.name)
            out.append((fixed is not None and fixed <= _FITS, -passes, k, r.name))
    return [name for *_, name in sorted(out)]


def _long(c: Cascade, s: Einsum, v: str) -> bool:
    """Does the reduction read a temporary along v (which would have to be stored whole)?"""
    given = {t.name for t in c.tensors if t.role in ("in", "state")}
    return any(isinstance(n, Access) and n.tensor not in given and any(v in variables(i) for i in n.index)
               for n in walk(s.body))


@dataclass(slots=True)
class _Stream:
    program: Program
    rank: str
    splits: int | Knob | None
    tile: tuple[int, ...]
    frame: str
    taken: set[str] = field(default_factory=set)
    proofs: list[str] = field(default_factory=list)
    wanted: dict[str, str] = field(default_factory=dict)
    conditions: set[str] = field(default_factory=set)
    ends: dict[str, Access] = field(default_factory=dict)

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
        refused: dict[str, NoLaw] = {}
        while True:
            look = view(c, rest, v)
            look = View(v, {**{t: "carried" for t in carried}, **look.sides}, {**carried, **look.writer})
            stage = Stage(v, extent, facts, look.late, self._end(cut), lambda g: self.ends["$rho:" + g], self._fresh,
                          self.frame, cut.outer is not None)
            accepted, blocked = self._accept(rest, look, stage)
            refused = {**blocked, **refused}
            if not accepted:
                break
            stages += 1
            finished = self._finish(rest, look, stage, finals, accepted)
            early = [s for s in rest if s.names[0] not in accepted and self._side(look, s) in ("neutral", "carried")]
            carried.update({n: s for s in early for n in s.names if look.sides.get(n) == "carried"})
            prefix += early + self._write(look, stage, cut, accepted)
            rest = [finished.get(s.names[0], s) for s in rest if s not in early]
        lines = [f"refused {t} over {self.rank}: {why}" for t, why in refused.items()]
        alive = live(prefix + rest, roots(c))
        after = stages + count(c, [s for s in alive if s in rest], v)
        before = count(c, c.einsums, v)
        if stages == 0 or after > before or (after == before and after > 1):
            return self._refuse(lines)
        new = assembled(c, prefix + rest, self.wanted, self.conditions)
        new = replace(new, ranks=(*c.ranks, *cut_ranks(c, self.rank, cut, self.tile, self.splits)))
        proofs = [*self.proofs, *lines, f"{self.rank}: {before} -> {after} passes"]
        return replace(self.program, cascade=new, proofs=(*self.program.proofs, *proofs))

    def _refuse(self, lines: list[str]) -> Program:
        new = tuple(x for x in lines if x not in self.program.proofs)
        return replace(self.program, proofs=self.program.proofs + new) if new else self.program

    # -- names ----------------------------------------------------------------------------------------------------

    def _fresh(self, hint: str) -> str:
        hint = hint.replace("'", "")
        name, k = hint, 1
        while name in self.taken:
            k += 1
            name = f"{hint}{k}"
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

    def _accept(self, rest: list[Einsum], look: View,
                stage: Stage) -> tuple[dict[str, list[Term] | Expr], dict[str, NoLaw]]:
        """Order reductions first (they are the gauges of sums), then sums."""
        inline = Inliner(self.program.cascade, look)
        accepted: dict[str, list[Term] | Expr] = {}
        refused: dict[str, NoLaw] = {}
        todo = [s for s in rest if reduces(s, look.v)]
        for sums in (False, True):
            for s in todo:
                assert s.reduce is not None
                if (s.reduce.monoid == "sum") != sums:
                    continue
                name = s.names[0]
                body, guard = inline.body(s)
                try:
                    self._check(s, look, body, guard)
                    if sums:
                        terms, laws = stage.sum(s, body, guard)
                        accepted[name] = terms
                    else:
                        value, lifted = stage.order(s, body, guard)
                        accepted[name], laws = value, lifted.laws
                    self.proofs.append(f"{name}: one pass over {self.rank}" + (": " + "; ".join(laws) if laws else ""))
                except NoLaw as why:
                    refused[name] = why
        return accepted, refused

    def _check(self, s: Einsum, look: View, body: Expr, guard: tuple[Expr, ...]) -> None:
        if MONOIDS[s.reduce.monoid].outs != 1 or len(s.outs) != 1:  # type: ignore[union-attr]
            raise NoLaw(s.reduce.monoid, body, "a reduction with several results")  # type: ignore[union-attr]
        for e in guard:
            if any(look.late(t) for t in reads(e)):
                op = e.op if isinstance(e, Call) else "where"
                raise NoLaw(op, e, "a guard that needs a reduced value")
        for t in reads(body):
            if look.sides.get(t) == "mixed":
                raise NoLaw("reduce", body, f"{t} reduces another rank over a reduced value")

    def _finish(self, rest: list[Einsum], look: View, stage: Stage, finals: Finals,
                accepted: dict[str, list[Term] | Expr]) -> dict[str, Einsum]:
        """Finalise statements of accepted reductions, and of what is computed from them."""
        inline = Inliner(self.program.cascade, look)
        out: dict[str, Einsum] = {}
        for s in rest:
            name = s.names[0]
            if name in accepted:
                close = Closing(stage, finals, self.ends)
                value, guard = accepted[name], inline.guard(s)
                out[name] = close.sum(s, value, guard) if isinstance(value, list) else close.order(s, value, guard)
            elif self._side(look, s) == "late" and not reduces(s, look.v) and len(s.outs) == 1:
                if s.reduce is None:  # another reduction reads its operands by name
                    where = conjunction([finals.expr(g) for g in s.guards()])
                    out[name] = replace(s, body=finals.expr(s.body), guard=where)
                    finals.learn(s, s.body, finals.term(s.body))
        return out

    def _write(self, look: View, stage: Stage, cut: Cut, accepted: dict[str, list[Term] | Expr]) -> list[Einsum]:
        inline = Inliner(self.program.cascade, look)
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
            if g not in means:
                w.gauge(g, every)
        for state in counts:
            w.sum(state, every)
        for g in means:
            w.gauge(g, every)
        for state in stage.sums:
            if state not in counts:
                w.sum(state, self._space(state, spaces, every))
        self.wanted.update(w.wanted)
        self.conditions |= w.conditions
        return w.init + w.body + w.merge

    def _space(self, state: State, spaces: dict[str, tuple[str, ...]], every: tuple[str, ...]) -> tuple[str, ...]:
        base = spaces.get(state.name[1:], every)
        return base if set(state.vars) | set(state.over) <= set(base) else every
