"""Is a program well formed?  Run after capture and after every rewrite.

What is checked: every name is known and used with its number of indices; kinds (conditions, integer indices, dtypes);
iteration spaces; single assignment and written before read, by proof (`ir.flow`); the mapping.  What cannot be proved
either way because it depends on data (an index that gathers) is taken as stated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from memcomp.ir import flow
from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor
from memcomp.ir.errors import nearest
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, conjuncts, symbols, variables, walk
from memcomp.ir.kinds import KindError, kind_of, kind_of_dtype
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import Program
from memcomp.ir.show import show_einsum, show_expr, show_rank, show_tensor
from memcomp.ir.verify_declared import MOST_RANKS, check_declared, check_indices, check_names, fail
from memcomp.ir.verify_mapping import check_mapping
from memcomp.ir.verify_places import check_kinds as kinds_of_places
from memcomp.ir.verify_places import check_places


def verify(program: Program, since: Program | None = None) -> None:
    """Raise VerifyError for the first invariant that the program breaks: what, the statement with carets, a hint.

    since: a program that was verified: a cascade that it shares is not looked at again.
    """
    check_names(program)
    if since is None or program.cascade is not since.cascade:
        check_declared(program.cascade)
        _Statements(program.cascade).check()
    check_mapping(program)
    if not program.cascade.outputs():
        fail(f"{program.name!r} computes nothing: it has no out and no state", f"program {program.name}", program.name,
             "declare what it computes: out O[M]: f32")


class _Statements:
    """The statements of a cascade, checked one after the other."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.ranks: dict[str, Rank] = {r.name: r for r in c.ranks}
        self.tensors: dict[str, Tensor] = {t.name: t for t in c.tensors}
        self.writes: dict[str, list[tuple[int, Access]]] = {}
        self.at: Einsum | None = None  # the statement at hand

    @property
    def text(self) -> str:
        """Of the statement at hand."""
        return show_einsum(self.at) if self.at is not None else ""

    def fail(self, what: str, part: Expr | str, hint: str, *, right: bool = False) -> NoReturn:
        fail(what, self.text, part if isinstance(part, str) else show_expr(part), hint, right=right)

    def check(self) -> None:
        for i, s in enumerate(self.c.einsums):
            for o in s.outs:
                self.writes.setdefault(o.tensor, []).append((i, o))
        for s in self.c.einsums:
            self.at = s
            self.check_shape(s)
            for o in s.outs:
                self.check_written(o)
        for s in self.c.einsums:
            self.at = s
            self.check_space(s)
            self.check_reads(s)
            self.check_kinds(s)
        known = flow.facts(self.c, frozenset(n for n, t in self.tensors.items() if kind_of_dtype(t.dtype) == "int"))
        for i, s in enumerate(self.c.einsums):
            self.at = s
            self.check_bounds(s)
            self.check_assignment(i, s, known)
            self.check_order(i, s, known)
        for t in self.c.tensors:
            if t.role in ("out", "state") and t.name + "'" * (t.role == "state") not in self.writes:
                fail(f"{t.role} {t.name!r} is never written", show_tensor(t), t.name,
                     "write it, or declare it in" if t.role == "state" else "write it, or drop it")

    # -- one statement on its own -------------------------------------------------------------------------------------

    def check_shape(self, s: Einsum) -> None:
        """Number of outputs, the reduction and its variables."""
        monoid = MONOIDS.get(s.reduce.monoid) if s.reduce else None
        if s.reduce and monoid is None:
            self.fail(f"unknown reduction {s.reduce.monoid!r}", s.reduce.monoid, nearest(s.reduce.monoid, MONOIDS))
        wanted = monoid.outs if monoid else 1
        if len(s.outs) != wanted:
            name = s.reduce.monoid if s.reduce else "a statement"
            self.fail(f"{name} has {wanted} result{'s' * (wanted > 1)}, found {len(s.outs)}", "",
                      "value and index: V[p], I[p] = argmax{m} X[p, m]" if wanted > 1 else "write two statements")
        if wanted > 1 and s.outs[0].index != s.outs[1].index:
            self.fail("value and index are written at different places", s.outs[1], f"write {s.outs[1].tensor}"
                      f"[{', '.join(map(show_expr, s.out.index))}]")
        if s.reduce is None:
            check_places(s, self.fail)
            return
        if not s.reduce.over or len(set(s.reduce.over)) < len(s.reduce.over):
            self.fail(f"{s.reduce.monoid} needs at least one variable, each once", s.reduce.monoid,
                      f"write {s.reduce.monoid}{{m}}")
        for v in s.reduce.over:
            if any(v in variables(i) for o in s.outs for i in o.index):
                self.fail(f"{v!r} is reduced, and indexes the result", v, f"drop {v} on one side")
        check_places(s, self.fail)

    def check_written(self, o: Access) -> None:
        """May this statement write that tensor, and with these indices?"""
        t = self.c.declared(o.tensor)
        if o.tensor.endswith("'"):
            state = self.c.declared(o.tensor[:-1])
            if state is None or state.role != "state":
                states = [t.name for t in self.c.tensors if t.role == "state"]
                self.fail(f"{o.tensor!r} is the new value of a state, and {o.tensor[:-1]!r} is none", o.tensor,
                          nearest(o.tensor[:-1], states) if states else f"declare it: state {o.tensor[:-1]}[...]: f32")
            self.tensors[o.tensor] = t = state
        if t is None:
            t = self.infer(o)
        elif t.role == "in":
            self.fail(f"input {o.tensor!r} is written", o, "declare it state, and write its new value "
                      f"{o.tensor}'[...], or write another tensor")
        elif t.role == "state" and not o.tensor.endswith("'"):
            self.fail(f"state {o.tensor!r} is written without '", o, f"its new value is {o.tensor}'")
        if len(o.index) != len(t.ranks):
            check_indices(o, t, self.text)
        for i in o.index:
            v = _plain(i)
            if v and v.upper() in self.ranks and self.ranks[v.upper()].iterative and _offset(i) not in (0, 1):
                self.fail(f"an iteration of {v.upper()!r} writes at {v} or {v} + 1", i,
                          f"write {o.tensor} at {v} + 1, and carry more values in more tensors")

    def infer(self, o: Access) -> Tensor:
        """A temporary that is not declared has the ranks its writers give it: a variable, or r + n of an iterative."""
        known = self.tensors.get(o.tensor)
        if known is not None:
            ranks = [_rank_of(i) for i in o.index]
            if len(ranks) == len(known.ranks):
                for i, r, k in zip(o.index, ranks, known.ranks, strict=True):
                    if r not in ("", k):
                        self.fail(f"{o.tensor!r} is written over {r or show_expr(i)} here and over {k} before", i,
                                  f"declare it: temp {o.tensor}[...]: f32")
            return known
        found: list[str] = []
        for d in range(len(o.index)):
            names = [_rank_of(w.index[d]) for _, w in self.writes[o.tensor] if len(w.index) == len(o.index)]
            name = next((n for n in names if n), None)
            if name is None or "?" in names:
                bad = next((w.index[d] for _, w in self.writes[o.tensor]
                            if len(w.index) == len(o.index) and _rank_of(w.index[d]) in ("", "?")), o.index[d])
                part = bad if show_expr(bad) in self.text else o
                self.fail(f"the ranks of {o.tensor!r} cannot be read off its index {show_expr(bad)!r}", part,
                          f"declare it: temp {o.tensor}[...]: f32")
            if name not in self.ranks:
                self.fail(f"unknown variable {name.lower()!r}", name.lower(), nearest(name.lower(), self.vars()))
            found.append(name)
        try:
            self.tensors[o.tensor] = self.c.tensor(o.tensor)
        except KeyError:
            self.fail(f"no one writer shows all ranks of {o.tensor!r}", o, f"declare it: temp {o.tensor}"
                      f"[{', '.join(found)}]: f32")
        return self.tensors[o.tensor]

    def vars(self) -> list[str]:
        return [r.var for r in self.c.ranks]

    def check_space(self, s: Einsum) -> None:
        """Variables are known, and those of body and guard are iterated; sizes are known."""
        space = s.space()
        if len(space) > MOST_RANKS:
            self.fail(f"a statement over {len(space)} variables", "", f"at most {MOST_RANKS}, as arrays of numpy have")
        for v in space:
            if v.upper() not in self.ranks:
                self.fail(f"unknown variable {v!r}", v, nearest(v, self.vars()))
        known = {*space, *self.ranks}
        for e in _parts(s):
            for n in () if symbols(e) <= known else walk(e):
                if isinstance(n, Size) and n.rank not in self.ranks:
                    self.fail(f"unknown size {n.rank!r}", n, nearest(n.rank, self.ranks))
                if isinstance(n, Var) and n.name not in space:
                    if n.name.upper() not in self.ranks:
                        self.fail(f"unknown variable {n.name!r}", n, nearest(n.name, self.vars()))
                    self.fail(f"{n.name!r} is neither an index of the result nor reduced", n,
                              f"index the result with {n.name}, or reduce: sum{{{n.name}}}")
        for v in space:
            x = self.ranks[v.upper()].extent
            for u in sorted(variables(x)) if x is not None and not isinstance(x, Knob) else ():
                if u not in space:
                    self.fail(f"the extent of {v.upper()!r} depends on {u!r}, which this statement does not iterate",
                              v, f"{show_rank(self.ranks[v.upper()])}: index the result with {u}, or reduce over it")

    def check_reads(self, s: Einsum) -> None:
        """Tensors read are known and have one index for each rank."""
        for e in _parts(s):
            for n in walk(e):
                if not isinstance(n, Access):
                    continue
                t = self.tensors.get(n.tensor)
                if t is None and n.tensor.endswith("'") and n.tensor[:-1] in self.tensors:
                    self.fail(f"the new value {n.tensor!r} is read and never written", n,
                              f"read {n.tensor[:-1]}, or write {n.tensor}[...] = ...", right=True)
                if t is None:
                    self.fail(f"tensor {n.tensor!r} is neither declared nor written", n.tensor + "[",
                              nearest(n.tensor, self.tensors))
                if t.role in ("temp", "out") and n.tensor not in self.writes:
                    self.fail(f"{t.role} {n.tensor!r} is read and never written", n, "write it, or declare it in",
                              right=True)
                if len(n.index) != len(t.ranks):
                    check_indices(n, t, self.text)

    def check_kinds(self, s: Einsum) -> None:
        def dtype(name: str) -> str:
            return self.tensors[name].dtype

        try:
            for e in _parts(s):
                for n in walk(e):
                    if isinstance(n, Access):
                        self.check_integers(n, dtype)
            for c in conjuncts(s.guard):
                if kind_of(c, dtype) != "bool":
                    self.fail(f"a guard is a condition, and {show_expr(c)!r} is none", c,
                              self.declare(c, "bool") or "compare it: x != 0")
            body = kind_of(s.body, dtype)
            kinds_of_places(s, dtype, self.fail)
        except KindError as fault:
            read = next((n for e in _parts(s) for n in walk(e) if show_expr(n) == fault.where), None)
            self.fail(fault.what, fault.where, (self.declare(read, "i64") if read is not None else "") or fault.hint)
        if s.reduce and s.reduce.monoid in ("and", "or") and body != "bool":
            self.fail(f"{s.reduce.monoid!r} reduces conditions", s.body, "compare it: x != 0")
        for o in s.outs:
            have = "int" if o is not s.out else body
            want = kind_of_dtype(dtype(o.tensor))
            if {"bool": 0, "int": 1, "real": 2}[have] > {"bool": 0, "int": 1, "real": 2}[want]:
                self.fail(f"{o.tensor!r} is {dtype(o.tensor)}, and its value is {have}", o,
                          "convert it: int(x), or x != 0 for a condition; or declare another dtype")

    def check_integers(self, a: Access, dtype: Callable[[str], str]) -> None:
        for i in a.index:
            if kind_of(i, dtype) != "int":
                self.fail(f"an index is an integer, and {show_expr(i)!r} of {a.tensor!r} is none", i,
                          self.declare(i, "i64") or "convert it: int(x)")

    def declare(self, e: Expr, dtype: str) -> str:
        """The missing declaration, where `e` is a temporary that has none."""
        if not isinstance(e, Access) or self.c.declared(e.tensor) is not None:
            return ""
        return f"declare it: temp {e.tensor}[{', '.join(self.tensors[e.tensor].ranks)}]: {dtype}"

    def check_bounds(self, s: Einsum) -> None:
        """Indices that are certainly outside: plain ones, of fixed extents, that no guard and no choice shields."""
        guarded = {v for c in s.guards() for v in variables(c)}
        for a in (*s.outs, *_unshielded(s.body)):
            t = self.tensors[a.tensor]
            for d, (i, r) in enumerate(zip(a.index, t.ranks, strict=True)):
                more = max((_offset(w.index[d]) for _, w in self.writes.get(a.tensor, ())), default=0) \
                    if self.ranks[r].iterative else 0
                have, last = self.fixed(r), self.last(i)
                if (isinstance(i, Size) and i.rank == r and not more) or (
                        have is not None and last is not None and last >= have + more and not variables(i) & guarded):
                    self.fail(f"index {show_expr(i)!r} of {a.tensor!r} goes beyond rank {r}", a,
                              f"{show_rank(self.ranks[r])}; guard the statement, or declare another rank")
                if isinstance(i, Const) and i.value < 0:
                    self.fail(f"index {show_expr(i)!r} of {a.tensor!r} is negative", a, "indices start at 0")

    def fixed(self, rank: str) -> int | None:
        x = self.ranks[rank].extent
        return int(x.value) if isinstance(x, Const) else None

    def last(self, i: Expr) -> int | None:
        """The greatest value of a plain index, where it is fixed and taken."""
        if isinstance(i, Const):
            return int(i.value)
        v = _plain(i)
        n = self.fixed(v.upper()) if v else None
        return n - 1 + _offset(i) if n else None

    # -- statements among each other ----------------------------------------------------------------------------------

    def check_assignment(self, i: int, s: Einsum, known: flow.Facts) -> None:
        """Every element is written once."""
        for o in s.outs:
            clash = flow.collides(s, o, known)
            if clash:
                v = min(clash)
                self.fail(f"nothing shows that different points of {v!r} write different elements of {o.tensor!r}", o,
                          f"reduce over {v}, or make the index one to one, like m1*M0 + m0 with m0 < M0")
            for j, w in self.writes[o.tensor]:
                if j < i and not flow.disjoint(self.c.einsums[j], w, s, o, known):
                    self.fail(f"{o.tensor!r} is written twice, and nothing shows that the elements differ", o,
                              f"first: {show_einsum(self.c.einsums[j])}")

    def check_order(self, i: int, s: Einsum, known: flow.Facts) -> None:
        """Every element is written before it is read."""
        for a in dict.fromkeys(s.accesses()):
            for j, w in self.writes.get(a.tensor, ()):
                if not flow.earlier(i, a, j, w, known):
                    self.too_early(i, s, a, j, w, known)
            self.check_start(s, a)

    def check_start(self, s: Einsum, a: Access) -> None:
        """A value carried from one iteration to the next has a first one."""
        guarded = {v for c in s.guards() for v in variables(c)}
        for d, i in enumerate(a.index):
            v = _plain(i)
            if v is None or _offset(i) or v in guarded or not self.ranks[v.upper()].iterative:
                continue
            written = [_offset(w.index[d]) for _, w in self.writes.get(a.tensor, ()) if _plain(w.index[d]) == v]
            if written and min(written) > 0 and len(written) == len(self.writes[a.tensor]):
                first = show_expr(Access(a.tensor, tuple(Const(0) if n == d else x for n, x in enumerate(a.index))))
                self.fail(f"{show_expr(a)!r} has no value in the first iteration", a,
                          f"write {first} = ... before the loop", right=True)

    def too_early(self, i: int, s: Einsum, a: Access, j: int, w: Access, known: flow.Facts) -> NoReturn:
        both = [v for v in s.space() if v in self.c.einsums[j].space()]
        ordered = [v for v in both if self.ranks[v.upper()].iterative]
        step = next((v for x in w.index if (v := _plain(x)) in both and _offset(x)), None)
        hint = "order the statements so that it is written first"
        if step and step not in ordered:
            hint = f"if {step.upper()} runs in order, declare: rank {step.upper()} = ... iter"
        elif ordered and set(known.loops[i]) & set(known.loops[j]):
            hint = f"inside the loop over {ordered[0].upper()}, read what an earlier iteration or statement wrote"
        elif ordered:
            hint = f"the statements of a loop over {ordered[0].upper()} stand together"
        self.fail(f"{show_expr(a)!r} is read before it is written", a,
                  f"{hint}; written by: {show_einsum(self.c.einsums[j])}", right=True)


def _parts(s: Einsum) -> tuple[Expr, ...]:
    """Outputs, body and guard as expressions."""
    return (*s.outs, s.body, *((s.guard,) if s.guard is not None else ()))


def _step(i: Expr) -> tuple[Expr, int]:
    """An index as (rest, n) of rest + n."""
    if isinstance(i, Call) and i.op == "add":
        for rest, n in (i.args, i.args[::-1]):
            if isinstance(n, Const):
                return rest, int(n.value)
    return i, 0


def _plain(i: Expr) -> str | None:
    """The variable of an index v or v + n."""
    rest = _step(i)[0]
    return rest.name if isinstance(rest, Var) else None


def _offset(i: Expr) -> int:
    """n of an index v + n."""
    return _step(i)[1] if _plain(i) else 0


def _rank_of(i: Expr) -> str:
    """The rank an index of a writer names: "" where a constant leaves it open, "?" where it names none."""
    v = _plain(i)
    return v.upper() if v else "" if isinstance(i, Const) else "?"


def _unshielded(e: Expr) -> list[Access]:
    """Accesses that every point of the statement makes: not those inside a choice."""
    if isinstance(e, Call):
        return [a for k in (e.args[:1] if e.op == "where" else e.args) for a in _unshielded(k)]
    return [e, *(a for i in e.index for a in _unshielded(i))] if isinstance(e, Access) else []


__all__ = ["verify"]
