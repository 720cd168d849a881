"""Programs as text: the inverse of `memcomp.ir.parse`."""

from __future__ import annotations

import math
from itertools import groupby

from memcomp.ir.cascade import Einsum, Knob, Rank, Tensor
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var
from memcomp.ir.ops import OPS
from memcomp.ir.program import Group, Program

# Binding strength of the infix spellings, loosest first; comparisons do not chain, the rest groups to the left.
LEVELS: dict[str, int] = {
    "or": 1, "and": 2, "<": 4, "<=": 4, ">": 4, ">=": 4, "==": 4, "!=": 4, "+": 5, "-": 5,
    "*": 6, "/": 6, "//": 6, "%": 6, "<<": 7, ">>": 7, "&": 7, "|": 7,
}
NOT, COMPARE, SUM, PRODUCT, NEGATE = 3, 4, 5, 6, 8
INFIX: dict[str, str] = {OPS[n].infix: n for n in OPS if OPS[n].infix in LEVELS}  # spelling -> operator
SPELLING: dict[str, str] = {name: s for s, name in INFIX.items()}  # operator -> spelling


def show_const(value: bool | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, int) else repr(float(value))


def show_expr(e: Expr, level: int = 0) -> str:
    """The text of an expression; parentheses where it stands in a place that binds tighter than `level`."""
    if isinstance(e, Const):
        return show_const(e.value)
    if isinstance(e, Var):
        return e.name
    if isinstance(e, Size):
        return e.rank
    if isinstance(e, Access):
        return f"{e.tensor}[{', '.join(show_expr(i) for i in e.index)}]"
    text, mine = _call(e)
    return f"({text})" if mine < level else text


def _call(e: Call) -> tuple[str, int]:
    """Text of an operator call and how tightly it binds."""
    if e.op in SPELLING and len(e.args) == 2:
        spelling = SPELLING[e.op]
        mine = LEVELS[spelling]
        left = show_expr(e.args[0], mine + (mine == COMPARE))
        right = show_expr(e.args[1], mine + 1)
        tight = mine >= PRODUCT and not set(" [") & set(left + right)  # m1*M0, h//3, but Q[b] * K[b]
        return (f"{left}{spelling}{right}" if tight else f"{left} {spelling} {right}"), mine
    if e.op == "not" and len(e.args) == 1:
        return f"not {show_expr(e.args[0], NOT)}", NOT
    if e.op == "neg" and len(e.args) == 1 and not isinstance(e.args[0], Const):  # -3 is the constant
        return f"-{show_expr(e.args[0], NEGATE)}", NEGATE
    if e.op == "ceildiv" and len(e.args) == 2:
        return f"ceil({show_expr(e.args[0], PRODUCT)}/{show_expr(e.args[1], PRODUCT + 1)})", NEGATE + 1
    return f"{e.op}({', '.join(show_expr(a) for a in e.args)})", NEGATE + 1


def show_knob(k: Expr | Knob) -> str:
    return f"?{k.name} in {'|'.join(map(str, k.choices))}" if isinstance(k, Knob) else show_expr(k, SUM)


def show_rank(r: Rank) -> str:
    extent = "" if r.extent is None else f" = {show_knob(r.extent)}"
    bound = "" if r.bound is None else f" <= {r.bound}"
    return f"rank {r.name}{extent}{bound}{' iter' if r.iterative else ''}"


def show_tensor(t: Tensor) -> str:
    plain = t.empty == 0.0 and math.copysign(1.0, t.empty) > 0  # an empty of -0.0 is said
    empty = "" if plain else f" empty {show_const(float(t.empty))}"
    return f"{t.role} {t.name}[{', '.join(t.ranks)}]: {t.dtype}{empty}"


def show_einsum(s: Einsum) -> str:
    """One statement, as it stands in the text."""
    outs = ", ".join(show_expr(o) for o in s.outs)
    held = f": {s.reduce.held}" if s.reduce and s.reduce.held else ""
    reduce = f"{s.reduce.monoid}{{{', '.join(s.reduce.over)}}}{held} " if s.reduce else ""
    guard = "" if s.guard is None else f" where {show_expr(s.guard)}"
    return f"{outs} = {reduce}{show_expr(s.body)}{guard}"


def show_group(g: Group) -> list[str]:
    lines = [f"group {g.name}: {', '.join(g.tensors)}".rstrip()]
    lines += [f"  partition {rank}: {show_knob(size)}" for rank, size in g.partition]
    if g.space:
        lines.append(f"  space {', '.join(g.space)}")
    if g.loop_order:
        lines.append(f"  loop-order {', '.join(g.loop_order)}")
    if g.lane is not None:
        lines.append(f"  lane {g.lane}")
    for level, kept in groupby(g.keep, key=lambda k: k[1]):
        lines.append(f"  keep {', '.join(tensor for tensor, _ in kept)} @ {level}")
    for phase in g.phases:
        bound = [f"{', '.join(tensor for tensor, _ in same)} @ {unit}"
                 for unit, same in groupby(phase.bind, key=lambda b: b[1])]
        lines.append(f"  {'drain' if phase.drain else 'phase'} {', '.join(bound)}")
    return lines


def show(program: Program) -> str:
    """The text of a program; `parse(show(p)) == p`.  Ends with a newline."""
    on = f" on {program.target}" if program.target else ""
    c = program.cascade
    lines = [f"program {program.name}{on}"]
    lines += [show_rank(r) for r in c.ranks]
    lines += [show_tensor(t) for t in c.tensors]
    lines += [show_einsum(s) for s in c.einsums]
    for g in program.mapping.groups:
        lines += show_group(g)
    lines += [f"proof {line}" for line in program.proofs]
    return "\n".join(lines) + "\n"
