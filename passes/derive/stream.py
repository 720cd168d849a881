"""Streaming a rank: stages of accepted reductions, their loops, and what is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor, extent_of, written_ranks
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, conjunction, reads, transform, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import Program
from memcomp.passes.derive.closing import Closing
from memcomp.passes.derive.emit import Writer
from memcomp.passes.derive.facts import Facts
from memcomp.passes.derive.finals import Finals
from memcomp.passes.derive.plan import Inliner, View, carries, count, iterative, reduces, view
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
            return self._refuse([f"refused {self.rank} over {self.rank}: no law for a ragged rank without a bound"])
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
        alive = _live(prefix + rest, _roots(c))
        after = stages + count(c, [s for s in alive if s in rest], v)
        before = count(c, c.einsums, v)
        if stages == 0 or after > before or (after == before and after > 1):
            return self._refuse(lines)
        return self._assemble(prefix + rest, cut, names, [*self.proofs, *lines,
                              f"{self.rank}: {before} -> {after} passes"])

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
        if r.extent is None or isinstance(r.extent, Knob) or not _ragged(r.extent):
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

    # -- the new cascade ------------------------------------------------------------------------------------------

    def _assemble(self, statements: list[Einsum], cut: Cut, names: tuple[str, str, str], proofs: list[str]) -> Program:
        c = self.program.cascade
        kept = _live(statements, _roots(c))
        written = {n for s in kept for n in s.names}
        back = {want: mine for mine, want in reversed(self.wanted.items()) if mine in written and want not in written}
        table = {mine: want for want, mine in back.items()}
        kept = [_renamed(s, table) for s in kept]
        written = {n for s in kept for n in s.names}
        tensors: list[Tensor] = []
        for t in c.tensors:
            if t.role != "temp" or (t.name in written and t.name not in back):
                tensors.append(t)
            elif t.name in back and t.dtype != "f32":
                s = next(s for s in kept if s.names[0] == t.name)
                tensors.append(Tensor(t.name, written_ranks(s.out) or t.ranks, t.dtype))
        known = {t.name for t in tensors}
        wide = any(t.dtype == "f64" for t in c.outputs())
        for s in kept:  # what is undeclared holds f32
            dtype = "bool" if s.names[0] in self.conditions else "f64" if wide else ""
            ranks_of = written_ranks(s.out)
            if dtype and s.names[0] not in known and ranks_of is not None:
                tensors.append(Tensor(s.names[0], ranks_of, dtype))
                known.add(s.names[0])
        size = cut.inner.upper()
        per = Call("ceildiv", (self._total(c), Size(size)))
        ranks = [Rank(size, Knob(cut.inner, self.tile))]
        if cut.outer is not None and self.splits is not None:
            ranks.append(Rank(cut.outer.upper(), self.splits if isinstance(self.splits, Knob) else Const(self.splits)))
            per = Call("ceildiv", (per, Size(cut.outer.upper())))
        ranks.append(Rank(cut.step.upper(), per, iterative=True))
        cascade = Cascade((*c.ranks, *ranks), tuple(tensors), tuple(kept))
        lines = tuple(p for p in proofs if p not in self.program.proofs)
        return replace(self.program, cascade=cascade, proofs=self.program.proofs + lines)

    def _total(self, c: Cascade) -> Expr:
        r = c.rank(self.rank)
        if r.extent is not None and not isinstance(r.extent, Knob) and _ragged(r.extent):
            assert r.bound is not None
            return Const(r.bound)
        return Size(self.rank)


def _ragged(extent: Expr) -> bool:
    return bool(variables(extent)) or any(isinstance(n, Access) for n in walk(extent))


def _roots(c: Cascade) -> set[str]:
    return {t.name for t in c.outputs()} | {t.name + "'" for t in c.outputs()}


def _live(statements: list[Einsum], roots: set[str]) -> list[Einsum]:
    """Statements that the roots need."""
    need, todo = set(roots), list(roots)
    by: dict[str, list[Einsum]] = {}
    for s in statements:
        for n in s.names:
            by.setdefault(n, []).append(s)
    while todo:
        for s in by.get(todo.pop(), ()):
            for t in s.reads():
                if t not in need:
                    need.add(t)
                    todo.append(t)
    return [s for s in statements if any(n in need for n in s.names)]


def _renamed(s: Einsum, table: dict[str, str]) -> Einsum:
    def f(e: Expr) -> Expr:
        return Access(table[e.tensor], e.index) if isinstance(e, Access) and e.tensor in table else e

    def g(e: Expr) -> Expr:
        return transform(e, f)

    outs = tuple(g(o) for o in s.outs)
    return Einsum(outs, g(s.body), s.reduce, None if s.guard is None else g(s.guard))  # type: ignore[arg-type]


__all__ = ["Refused", "carries", "refusals", "streamed"]
