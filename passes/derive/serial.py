"""Loops that stay serial: a step that is no associative map of what it carries cannot be merged, only repeated.

Sums and scalings of the carried value compose (affine maps), so do sums and extremes (tropical ones), and logic; any
other function of it, or a mixture, has no law.
"""

from __future__ import annotations

from collections.abc import Mapping

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Var, walk
from memcomp.ir.places import MARKS
from memcomp.passes.derive.sides import NoLaw

_KINDS = {"max": "extremes", "min": "extremes", "topk": "extremes", "argmax": "extremes", "argmin": "extremes",
          "mul": "scalings", "div": "scalings", "sum": "scalings", "and": "logic", "or": "logic", "not": "logic"}


def serial(c: Cascade) -> list[tuple[str, str, NoLaw]]:
    """(tensor, iterative rank, why) for every carried tensor whose step has no law."""
    out = []
    for r in c.ranks:
        steps = [s for s in c.einsums if r.iterative and r.var in s.space()]
        after = Call("add", (Var(r.var), Const(1)))
        for name, at in {s.names[0]: s.out.index.index(after) for s in steps if after in s.out.index}.items():
            try:
                _Step(name, at, r.var).run(steps)
            except NoLaw as why:
                out.append((name, r.name, why))
    return out


class _Step:
    """What the statements of one round are as maps of `name` at this round: None where they do not depend on it."""

    def __init__(self, name: str, at: int, v: str) -> None:
        self.name, self.at, self.v = name, at, v
        self.known: dict[str, frozenset[str]] = {}

    def run(self, steps: list[Einsum]) -> None:
        """Raises NoLaw if the value of the next round is no law-abiding map of this round's."""
        failed: dict[str, NoLaw] = {}
        touched = {self.name}  # what the carried value reaches
        for s in steps:
            if touched.isdisjoint(s.reads()):
                continue
            touched.update(s.names)
            try:
                kind = self.kind(s.body, failed)
                for g in s.guards():
                    self.free(g, failed)
                if kind is not None and s.reduce is not None:
                    kind = self.with_(s.reduce.monoid, s.body, kind)
            except NoLaw as why:
                if self.name in s.names:
                    raise
                failed.update(dict.fromkeys(s.names, why))
                continue
            if kind is not None:
                self.known.update(dict.fromkeys(s.names, kind))

    def kind(self, e: Expr, failed: Mapping[str, NoLaw]) -> frozenset[str] | None:
        if isinstance(e, Access):
            if e.tensor in failed:
                raise failed[e.tensor]
            if e.tensor == self.name:
                return frozenset() if e.index[self.at] == Var(self.v) else None
            return self.known.get(e.tensor)
        if not isinstance(e, Call):
            return None
        if e.op == "where":
            self.free(e.args[0], failed)
        kinds = [self.kind(a, failed) for a in e.args]
        mine = [k for k in kinds if k is not None]
        if not mine:
            return None
        joined = frozenset().union(*mine)
        if e.op in ("add", "sub", "neg", "where", "real", *MARKS):
            return self.with_("", e, joined)
        if len(mine) == 1 or e.op in ("max", "min", "and", "or"):
            if not (e.op == "div" and kinds[0] is None):
                return self.with_(e.op, e, joined)
        raise NoLaw(e.op, e, f"{self.name} steps by {e.op} of itself, which does not compose (edge {self.name} -> "
                             f"{self.name})")

    def with_(self, op: str, e: Expr, kinds: frozenset[str]) -> frozenset[str]:
        out = kinds | ({_KINDS.get(op, op)} if op else set())
        if len(out) > 1 or out - {"extremes", "scalings", "logic"}:
            raise NoLaw(op or "add", e, f"{self.name} steps by {', '.join(sorted(out))} of itself: none compose "
                                        f"(edge {self.name} -> {self.name})")
        return out

    def free(self, cond: Expr, failed: Mapping[str, NoLaw]) -> None:
        """A condition must not ask for the carried value."""
        for n in walk(cond):
            if isinstance(n, Access) and self.kind(n, failed) is not None:
                op = cond.op if isinstance(cond, Call) else "where"
                raise NoLaw(op, cond, f"{self.name} chooses its own step (edge {self.name} -> {self.name})")


__all__ = ["serial"]
