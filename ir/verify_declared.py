"""The declarations of a program: names, ranks with their extents, tensors, knobs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from memcomp.ir.cascade import DTYPES, Cascade, Knob, Rank, Tensor
from memcomp.ir.errors import VerifyError, nearest
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, variables, walk
from memcomp.ir.fold import INTEGER as FOLDED
from memcomp.ir.kinds import KindError, kind_of, kind_of_dtype
from memcomp.ir.parse import RESERVED, ROLES
from memcomp.ir.program import Program
from memcomp.ir.rounding import INTEGER
from memcomp.ir.show import show_knob, show_rank, show_tensor

MOST_RANKS = 64  # of a tensor and of an iteration space
_RANK = re.compile(r"[A-Z_][A-Z0-9_]*")
_TENSOR = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def fail(what: str, text: str, part: str, hint: str, *, right: bool = False) -> NoReturn:
    """VerifyError that shows `text` with carets under the first whole occurrence of `part`.

    right: look to the right of the `=` first.  A trailing bracket in `part` is looked for, and gets no caret.
    """
    text, part = text.rstrip(), part.rstrip()
    head = r"(?<![\w'])" if part[:1].isalnum() else ""
    tail = r"(?![\w'])" if part[-1:].isalnum() else ""
    word = re.compile(head + re.escape(part) + tail)
    start, width = 0, len(text)
    m = (word.search(text, text.find(" = ") + 3) if right else None) or word.search(text)
    if part and m:
        start, width = m.start(), len(part.rstrip("[(")) or 1
    raise VerifyError(what, f"  {text}\n  {' ' * start}{'^' * width}", hint)


def check_names(p: Program) -> None:
    """Names that the text form can hold: program, target, proofs, ranks, tensors; each declared once."""
    head = f"program {p.name}" + f" on {p.target}" * bool(p.target)
    for what, word in (("name", p.name), ("target", p.target)):
        if (not word and what == "name") or re.search(r"[\s#]", word):
            fail(f"a program's {what} is one word, found {word!r}", head, word, "write program NAME, or program NAME "
                 "on TARGET")
    for line in p.proofs:
        if line != line.strip() or len(line.splitlines()) > 1:
            fail("a proof is one line of text", f"proof {line!r}", "", "join the lines, and strip them")
    seen: set[str] = set()
    for r in p.cascade.ranks:
        if not _RANK.fullmatch(r.name) or r.name.upper() == r.name.lower() or r.var in RESERVED:
            fail(f"{r.name!r} cannot be the name of a rank", show_rank(r), r.name,
                 "a rank is an upper-case name whose lower-case form is no word of the language")
        if r.name in seen:
            fail(f"rank {r.name!r} is declared twice", show_rank(r), r.name, "declare each rank once")
        seen.add(r.name)
    seen = set()
    for t in p.cascade.tensors:
        if not _TENSOR.fullmatch(t.name):
            fail(f"{t.name!r} cannot be the name of a tensor", show_tensor(t), t.name,
                 "a tensor is a name of letters, digits and _; X' is written for a state X, not declared")
        if t.name in seen:
            fail(f"tensor {t.name!r} is declared twice", show_tensor(t), t.name, "declare each tensor once")
        seen.add(t.name)


def check_declared(c: Cascade) -> None:
    """Extents, bounds, knobs, dtypes and empty values."""
    ranks = {r.name: r for r in c.ranks}
    tensors = {t.name: t for t in c.tensors}
    for t in c.tensors:
        _check_tensor(t, ranks)
    choices: dict[str, tuple[int, ...]] = {}
    for r in c.ranks:
        text = show_rank(r)
        if r.bound is not None and r.bound < 1:
            fail(f"the bound of rank {r.name!r} is not positive", text, str(r.bound), "write rank M <= 8192")
        if isinstance(r.extent, Knob):
            check_knob(r.extent, text, choices)
        elif r.extent is not None:
            _check_extent(r, r.extent, text, ranks, tensors)
    _check_acyclic(ranks)
    _check_fixed(c)


def _check_fixed(c: Cascade) -> None:
    """What is known of extents before run time: they are not negative, and elements can be counted in 64 bits."""
    ranks = {r.name: r for r in c.ranks}
    known: dict[str, int | None] = {}

    def extent(name: str) -> int | None:
        x = ranks[name].extent
        if name not in known:
            known[name] = None if x is None or isinstance(x, Knob) else value(x)
        return known[name]

    def value(e: Expr) -> int | None:
        if isinstance(e, Const):
            return int(e.value)
        if isinstance(e, Size):
            return extent(e.rank)
        if not isinstance(e, Call) or e.op not in FOLDED:
            return None
        args = [n for n in map(value, e.args) if n is not None]
        if len(args) < len(e.args) or (e.op in ("floordiv", "mod", "ceildiv") and not args[1]):
            return None
        return int(FOLDED[e.op](*args))

    for r in c.ranks:
        n = extent(r.name)
        if n is not None and r.extent is not None and not 0 <= n < 2**63:
            fail(f"the extent of rank {r.name!r} is {n}", show_rank(r), show_knob(r.extent),
                 "an extent is 0 or more, and fits 64 bits")
    for t in c.tensors:
        if math.prod(n for r in t.ranks if (n := extent(r)) is not None) >= 2**60:
            fail(f"{t.name!r} has more elements than any memory", show_tensor(t), t.name,
                 "its fixed extents are too large")


def check_knob(k: Knob, text: str, choices: dict[str, tuple[int, ...]]) -> None:
    """Choices are positive, distinct and the same wherever the knob is named."""
    if not _TENSOR.fullmatch(k.name):
        fail(f"{k.name!r} cannot be the name of a knob", text, show_knob(k), "write ?m0 in 32|64|128")
    if not k.choices or min(k.choices) < 1:
        fail(f"the choices of knob {k.name!r} are not positive integers", text, show_knob(k), "write ?m0 in 32|64|128")
    if len(set(k.choices)) < len(k.choices):
        fail(f"a choice of knob {k.name!r} stands twice", text, show_knob(k), "list each choice once")
    if choices.setdefault(k.name, k.choices) != k.choices:
        fail(f"knob {k.name!r} has other choices here than before", text, show_knob(k),
             f"before: {'|'.join(map(str, choices[k.name]))}")


def _check_tensor(t: Tensor, ranks: Mapping[str, Rank]) -> None:
    text = show_tensor(t)
    for r in t.ranks:
        if r not in ranks:
            fail(f"unknown rank {r!r} of tensor {t.name!r}", text, r, nearest(r, ranks))
    if t.dtype not in DTYPES:
        fail(f"unknown dtype {t.dtype!r}", text, t.dtype, nearest(t.dtype, DTYPES))
    if t.role not in ROLES:
        fail(f"unknown role {t.role!r}", text, t.role, nearest(t.role, ROLES))
    if t.empty != t.empty or (kind_of_dtype(t.dtype) != "real" and not float(t.empty).is_integer()):
        fail(f"{t.dtype} cannot hold the empty value {t.empty}", text, f"empty {t.empty}",
             "an empty value is a number of the tensor's dtype")
    if t.dtype in INTEGER and not np.iinfo(INTEGER[t.dtype]).min <= t.empty <= np.iinfo(INTEGER[t.dtype]).max:
        fail(f"{t.dtype} cannot hold the empty value {int(t.empty)}", text, text[text.index("empty"):],
             f"{t.dtype} holds {np.iinfo(INTEGER[t.dtype]).min} to {np.iinfo(INTEGER[t.dtype]).max}")
    if len(t.ranks) > MOST_RANKS:
        fail(f"{t.name!r} has {len(t.ranks)} ranks", text, t.name, f"at most {MOST_RANKS}, as arrays of numpy have")


def _check_extent(r: Rank, e: Expr, text: str, ranks: Mapping[str, Rank], tensors: Mapping[str, Tensor]) -> None:
    def dtype(name: str) -> str:
        return tensors[name].dtype

    data = False
    for n in walk(e):
        name = n.name.upper() if isinstance(n, Var) else n.rank if isinstance(n, Size) else ""
        if name and name not in ranks:
            word = n.name if isinstance(n, Var) else name
            fail(f"unknown {'variable' if isinstance(n, Var) else 'size'} {word!r} in the extent of rank {r.name!r}",
                 text, word, nearest(name, ranks))
        if isinstance(n, Access):
            data = True
            t = tensors.get(n.tensor)
            if t is None or t.role not in ("in", "state"):
                known = [t.name for t in tensors.values() if t.role in ("in", "state")]
                fail(f"the extent of rank {r.name!r} reads {n.tensor!r}, which is no input", text, n.tensor,
                     nearest(n.tensor, known))
            check_indices(n, t, text)
    try:
        kind = kind_of(e, dtype)
    except KindError as fault:
        fail(fault.what, text, fault.where, fault.hint)
    if kind != "int":
        fail(f"the extent of rank {r.name!r} is no integer", text, show_knob(e), "a quotient is M//M0, or ceil(M/M0)")
    if isinstance(e, Const) and e.value < 0:
        fail(f"the extent of rank {r.name!r} is negative", text, show_knob(e), "an extent is 0 or more")
    if (data or variables(e)) and r.bound is None:
        fail(f"ragged rank {r.name!r} has no bound", text, show_knob(e), f"write {text} <= 512")


def _check_acyclic(ranks: Mapping[str, Rank]) -> None:
    needs = {
        name: {n.name.upper() if isinstance(n, Var) else n.rank for n in walk(r.extent) if isinstance(n, (Var, Size))}
        if r.extent is not None and not isinstance(r.extent, Knob) else set()
        for name, r in ranks.items()
    }
    done: set[str] = set()
    while True:
        ready = {n for n in needs if n not in done and needs[n] <= done}
        if not ready:
            break
        done |= ready
    for name, r in ranks.items():
        if name not in done and name in _reach(name, needs):
            fail(f"the extent of rank {name!r} depends on itself", show_rank(r), name,
                 f"it needs {', '.join(sorted(needs[name]))}")


def _reach(name: str, needs: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(needs[name])
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += needs[n]
    return found


def check_indices(a: Access, t: Tensor, text: str) -> None:
    """One index for each rank."""
    if len(a.index) != len(t.ranks):
        n, m = len(t.ranks), len(a.index)
        fail(f"{a.tensor!r} has {n} rank{'s' * (n != 1)}, found {m} ind{'ex' if m == 1 else 'ices'}",
             text, f"{a.tensor}[", f"write {a.tensor}[{', '.join(r.lower() for r in t.ranks)}]")
