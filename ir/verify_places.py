"""Is a reduction to values and places well formed: its order rank, the places that it is given, what it starts from?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from memcomp.ir.cascade import Einsum
from memcomp.ir.expr import Access, Call, Expr, Var, variables, walk
from memcomp.ir.kinds import kind_of
from memcomp.ir.places import MARKS, Placed, placed

WRITE = "write V[p, k], I[p, k] = topk{m} onto(at(X[p, m], J[m]), W[p, k], L[p, k])"


def check_places(s: Einsum, fail: Callable[[str, Expr | str, str], NoReturn]) -> None:
    """`fail(what, part, hint)` for the first thing that is wrong."""
    top = s.reduce is not None and s.reduce.monoid == "topk"
    given = placed(s.body) if top else Placed(s.body)
    parts = [given.value, *([] if given.place is None else [given.place]), *s.guards()]
    for n in (n for x in (*parts, *(given.old or ()), *(i for o in s.outs for i in o.index)) for n in walk(x)):
        if isinstance(n, Call) and n.op in MARKS:
            fail(f"{n.op!r} stands outermost in what a topk reduces", f"{n.op}(", WRITE)
    if not top:
        return
    k = s.out.index[-1] if s.out.index else None
    if not isinstance(k, Var):
        fail("the last index of a topk result is the variable of its order rank", s.out,
             f"write {s.out.tensor}[.., k], with rank K the number of results")
    if any(k.name in variables(e) for e in (*parts, *s.out.index[:-1])):
        fail(f"{k.name!r} orders the results of topk and has no value in its body", s.body,
             "use another variable in the body")
    if given.old is not None and any(not isinstance(x, Access) or k not in x.index for x in given.old):
        fail(f"a topk starts from two lists in the order of {k.name!r}", s.body, WRITE)


def check_kinds(s: Einsum, dtype: Callable[[str], str], fail: Callable[[str, Expr | str, str], NoReturn]) -> None:
    """Places are integers."""
    given = placed(s.body)
    for x in (given.place, given.old[1] if given.old else None):
        if x is not None and kind_of(x, dtype) != "int":
            fail("a place is an integer, and this is none", x, "convert it: int(x), or declare an integer dtype")
