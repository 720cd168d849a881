"""What guards leave of the loops of a kernel: rounds that run, and those of them that need a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, variables, walk
from memcomp.ir.ops import OPS
from memcomp.ir.show import show_expr
from memcomp.ir.tile import Loop, Statement, TileKernel, When

TASKS, CELLS = 1024, 1 << 16  # tasks and rounds looked at; of more an even sample


@dataclass(frozen=True, slots=True)
class Rounds:
    """A loop of a kernel over all its tasks.

    total:  tasks times the rounds of the whole rank; 0 where data decide the bounds.
    run, masked: rounds that run, and those of them that look at a guard.
    exact:  every task and round was looked at.
    fixed:  further variables of the bounds, which stand at 0: only the longest of them, `task`, is counted over.
    table:  for each task that was looked at its rounds: 0 left out, 1 runs, 2 runs with a mask.
    """

    kernel: str
    loop: str
    var: str
    task: str = ""
    total: int = 0
    run: int = 0
    masked: int = 0
    exact: bool = True
    fixed: tuple[str, ...] = ()
    table: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        if not self.total:
            return "data decide the bounds when it runs"
        about = "" if self.exact else "about "
        where = "".join(f", at {v} = 0" for v in self.fixed)
        return (f"{about}{self.run} of {self.total} rounds run ({self.run / self.total:.1%}), {about}{self.masked} of "
                f"them with a mask{where}")


def rounds(kernel: TileKernel, sizes: Mapping[str, int], whole: Mapping[str, int]) -> tuple[Rounds, ...]:
    """Every loop of the kernel at these sizes; whole: variable of a loop -> its rounds where nothing is left out."""
    grid = {v: max(1, int(_value(x, sizes))) for v, x in kernel.grid}
    return tuple(_count(kernel.name, x, grid, sizes, whole.get(x.var, 0)) for x in _loops(kernel.body))


def _loops(body: Iterable[Statement]) -> Iterable[Loop]:
    for s in body:
        if isinstance(s, Loop):
            yield s
        if isinstance(s, (Loop, When)):
            yield from _loops(s.body)
        if isinstance(s, When):
            yield from _loops(s.orelse)


def _count(kernel: str, loop: Loop, grid: Mapping[str, int], sizes: Mapping[str, int], whole: int) -> Rounds:
    said = f"for {loop.var} = {show_expr(loop.lo)} to {show_expr(loop.hi)}"
    bounds = loop.lo, loop.hi
    asked = variables(loop.lo) | variables(loop.hi)
    if any(_looks(b) for b in bounds) or not asked <= grid.keys():
        return Rounds(kernel, said, loop.var)
    known = {*grid, loop.var}
    body, skips = _step(loop.body)
    masks = [m for m in _masks(body) if not _looks(m) and variables(m) <= known]
    task = max(sorted(asked), key=lambda v: grid[v], default="")
    tasks = grid.get(task, 1)
    every = -(-tasks // TASKS)
    looked = np.arange(0, tasks, every)[:, None]  # down: tasks; across: rounds
    env: dict[str, Any] = {**sizes, **dict.fromkeys(grid, 0), task: looked}
    lo, hi = (np.broadcast_to(_value(b, env), looked.shape) for b in bounds)
    columns = max(whole, int(hi.max()))
    hop = max(1, -(-columns * len(looked) // CELLS))
    at = np.arange(0, columns, hop)[None, :]
    live, full = (lo <= at) & (at < hi), np.ones((1, 1), bool)
    for m in skips:
        if _looks(m) or not variables(m) <= known:
            return Rounds(kernel, said, loop.var)
        live = live & _value(m, {**env, loop.var: at})
    for m in masks:
        full = full & _value(m, {**env, loop.var: at})
    table = np.where(live, np.where(full, 1, 2), 0)
    share = tasks / len(looked)
    run = round(int((table > 0).sum()) * hop * share) if skips else round(int(np.maximum(hi - lo, 0).sum()) * share)
    masked = round(int((table == 2).sum()) * hop * share)
    return Rounds(kernel, said, loop.var, task, columns * tasks, run, masked, every * hop == 1,
                  tuple(sorted(asked - {task})), tuple(map(tuple, table.tolist())))


def _looks(e: Expr) -> bool:
    return any(isinstance(n, Access) for n in walk(e))


def _step(body: tuple[Statement, ...]) -> tuple[tuple[Statement, ...], tuple[Expr, ...]]:
    """What a round does, and the condition under which it does it."""
    last = body[-1] if body else None
    if isinstance(last, When) and not last.orelse and len(last.body) > 1:
        return last.body, (last.cond,)
    return body, ()


def _masks(body: Iterable[Statement]) -> list[Expr]:
    """Conditions under which a round needs no mask."""
    conds = [s.cond for s in body if isinstance(s, When)]
    return list(dict.fromkeys(c.args[0] if isinstance(c, Call) and c.op == "not" else c for c in conds))


def _value(e: Expr, env: Mapping[str, Any]) -> Any:
    """An integer expression over sizes and variables, which may be arrays."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Var):
        return env[e.name]
    if isinstance(e, Size):
        return env[e.rank]
    assert isinstance(e, Call), "bounds that look at data were sorted out"
    return OPS[e.op].numpy(*(_value(a, env) for a in e.args))
