"""What a program means: run it in float64, numpy, one statement at a time over its whole iteration space.

The order of statements, iterative ranks, guards, empty values and states are as `ir.cascade` says.  In detail:

* A point beyond the extent of a ragged rank is not in the space.  A guard keeps points out: a reduction has its
  identity there, a plain statement leaves the point empty; what is read or computed there has no influence.
* Consecutive statements that write at a variable of an iterative rank run in order, once per value of it.
* `top-k` and `arg` reductions see excluded points as the identity; ties take the lowest row-major index over the
  extents; with fewer than k points the rest of k stays empty.  NaN counts as the greatest value (least, for argmin).
* Integer and bool tensors hold integers and bools; everything else is float64, whatever its declared dtype.
* An open knob takes its first choice, unless `sizes` names it: the meaning does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memcomp.ir.cascade import Cascade, Einsum, Tensor
from memcomp.ir.errors import InputError, VerifyError, nearest
from memcomp.ir.evaluate import Array, Block, OutOfRange
from memcomp.ir.expr import Call, Const, Var, variables
from memcomp.ir.extents import Extents
from memcomp.ir.program import Program
from memcomp.ir.rounding import INTEGER, round_to
from memcomp.ir.statement import execute


def interpret(program: Program | Cascade, inputs: Mapping[str, Any], sizes: Mapping[str, int] | None = None, *,
              rounded: bool = False) -> dict[str, Array]:
    """Outputs and new states by name.

    inputs:  one array per `in` and `state` tensor, shaped as its ranks.  Symbolic extents are solved from the shapes.
    sizes:   extents that no input shows, and values of knobs.
    rounded: round what is stored in declared tensors to their dtype (to nearest even); else all is float64.
    Raises InputError for missing, extra or ill-shaped inputs and for reads or writes outside a tensor.
    """
    cascade = program.cascade if isinstance(program, Program) else program
    return _Run(cascade, inputs, dict(sizes or {}), rounded).run()


class _Run:
    def __init__(self, cascade: Cascade, inputs: Mapping[str, Any], sizes: dict[str, int], rounded: bool) -> None:
        self.cascade, self.rounded = cascade, rounded
        self.declared = {t.name: t for t in cascade.tensors}
        self.writers: dict[str, list[Einsum]] = {}
        for e in cascade.einsums:
            for name in e.names:
                self.writers.setdefault(name, []).append(e)
        needed = {t.name: t for t in cascade.inputs()}
        for name in inputs:
            if name not in needed:
                raise InputError(f"no input is named {name!r}", hint=nearest(name, needed))
        for name in needed:
            if name not in inputs:
                raise InputError(f"input {name!r} is missing", hint=f"given: {', '.join(sorted(inputs)) or 'none'}")
        self.values: dict[str, Array] = {n: self._input(t, np.asarray(inputs[n])) for n, t in needed.items()}
        self.extents = Extents(cascade, {n: (t.ranks, self.values[n].shape) for n, t in needed.items()}, sizes,
                               self.tensor, self.extra)

    def _input(self, t: Tensor, x: Array) -> Array:
        if x.ndim != len(t.ranks):
            raise InputError(f"{t.name!r} has {x.ndim} dimensions, its ranks are [{', '.join(t.ranks)}]",
                             f"shape {x.shape}")
        x = self.cast(t, x)
        return round_to(x, t.dtype) if self.rounded else x

    def cast(self, t: Tensor, x: Array) -> Array:
        """The values as this tensor holds them: int64, bool or float64.  Least and greatest of no integers, which a
        share of a rank may have, are the ends of the type, as in kernels; a result that has them is an error."""
        if t.dtype in INTEGER:
            info = np.iinfo(INTEGER[t.dtype])
            with np.errstate(invalid="ignore"):  # what is no integer is found below
                y = x.astype(np.int64)
            if x.dtype.kind == "f" and not np.array_equal(x, y):
                ends = np.isinf(x) & (t.role == "temp")
                y = np.where(ends, np.where(x > 0, info.max, info.min), y)
                if (bad := (x != y) & ~ends).any():
                    raise InputError(f"{t.name!r} holds integers ({t.dtype}), and was given {x[bad].flat[0]}",
                                     hint="convert with int(x)")
            if y.size and not (info.min <= y.min() and y.max() <= info.max):
                raise InputError(f"a value of {t.name!r} does not fit {t.dtype}", f"{y.min()} .. {y.max()}")
            return y
        if t.dtype == "bool":
            if x.dtype != bool and not np.isin(x, (0, 1)).all():
                raise InputError(f"{t.name!r} holds truth values, and was given {x.flat[0]}", hint="compare: x != 0")
            return x.astype(bool)
        return x.astype(np.float64)

    # -- tensors --------------------------------------------------------------------------------------------------

    def extra(self, name: str, dim: int) -> int:
        """1 for a dimension that is written at `r+1`: it holds one element more than its iterative rank."""
        for e in self.writers.get(name, ()):
            for o in e.outs:
                if o.tensor == name and dim < len(o.index):
                    i = o.index[dim]
                    if (isinstance(i, Call) and i.op == "add" and len(vs := variables(i)) == 1
                            and Const(1) in i.args and self.cascade.rank(next(iter(vs)).upper()).iterative):
                        return 1
        return 0

    def tensor(self, name: str) -> Array:
        """The values of a tensor, made empty on first use."""
        x = self.values.get(name)
        if x is None:
            x = self.values[name] = self._fresh(name)
        return x

    def _fresh(self, name: str) -> Array:
        old = name[:-1]
        if name.endswith("'") and old in self.declared and self.declared[old].role == "state":
            return self.values[old].copy()
        try:
            t = self.cascade.tensor(name)
        except KeyError:
            raise VerifyError(f"tensor {name!r} is not declared, and its writers do not show its ranks",
                              hint=f"declare it: temp {name}[...]: f32") from None
        shape = tuple(self.extents.stored(r, d, name) for d, r in enumerate(t.ranks))
        if name not in self.declared:  # an undeclared temporary holds whatever is written to it
            return np.zeros(shape, np.int64) if name in self.writers else np.zeros(shape)
        empty = np.full(shape, t.empty)
        return self.cast(t, empty) if np.isfinite(t.empty) or t.dtype not in INTEGER else np.zeros(shape, np.int64)

    def store(self, name: str, index: tuple[Any, ...], x: Array, keep: Array | None) -> None:
        """tensor[index] = x where keep."""
        t = self.declared.get(name) or (self.declared.get(name[:-1]) if name.endswith("'") else None)
        old = self.tensor(name)
        if t is None:
            kind = np.result_type(old.dtype, x.dtype) if old.dtype != x.dtype else x.dtype
            if old.dtype != kind:
                old = self.values[name] = old.astype(kind)
        else:
            x = self.cast(t, x if keep is None else np.where(keep, x, np.zeros((), x.dtype)))
            if self.rounded:
                x = round_to(x, t.dtype)
        if all(isinstance(i, (slice, int)) for i in index):
            target = old[index]
            if np.ndim(target) == 0:
                if keep is None or bool(np.all(keep)):
                    old[index] = x.reshape(())
            elif keep is None:
                target[...] = x
            else:
                np.copyto(target, x, where=keep)
            return
        arrays = [np.broadcast_to(i, x.shape) for i in index]
        if keep is not None:
            keep = np.broadcast_to(keep, x.shape)
            arrays, x = [i[keep] for i in arrays], x[keep]
        old[tuple(arrays)] = x

    # -- statements -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            self._sequence(list(enumerate(self.cascade.einsums)), {})
        out: dict[str, Array] = {}
        for t in self.cascade.outputs():
            name = t.name + "'" if t.role == "state" and t.name + "'" in self.writers else t.name
            out[t.name] = self.tensor(name)
        return out

    def _sequence(self, todo: list[tuple[int, Einsum]], fixed: Mapping[str, int]) -> None:
        """Statements in order; a run of them over an iterative rank goes round together."""
        at = 0
        while at < len(todo):
            best: tuple[int, str] | None = None
            for v in self._iterated(todo[at][1], fixed):
                end = at
                while end < len(todo) and v in self._iterated(todo[end][1], fixed):
                    end += 1
                if best is None or end > best[0]:
                    best = end, v
            if best is None:
                self._statement(*todo[at], fixed)
                at += 1
                continue
            end, v = best
            for value in range(self.extents.limit(v.upper(), fixed)):
                self._sequence(todo[at:end], {**fixed, v: value})
            at = end

    def _iterated(self, e: Einsum, fixed: Mapping[str, int]) -> list[str]:
        """Variables of iterative ranks that the statement writes at, in the order of the declared ranks."""
        own = {v for o in e.outs for i in o.index for v in variables(i)} - fixed.keys()
        return [r.var for r in self.cascade.ranks if r.iterative and r.var in own]

    def _statement(self, number: int, e: Einsum, fixed: Mapping[str, int]) -> None:
        axes = {v: (0, self.extents.limit(v.upper(), fixed)) for v in e.space() if v not in fixed}
        ragged = tuple((v, x) for v in e.space() if (x := self.extents.ragged(v.upper())) is not None)
        guards = tuple(Call("lt", (Var(v), x)) for v, x in ragged)
        try:
            execute(e, Block(axes, fixed, self.tensor, self.extents.size), guards, self.extents, self.store)
        except OutOfRange as fault:
            raise self._located(number, e, fault) from None

    def _located(self, number: int, e: Einsum, fault: OutOfRange) -> InputError:
        from memcomp.ir.show import show_einsum, show_expr

        at = ", ".join(f"{v}={n}" for v, n in sorted(fault.at.items()))
        return InputError(
            f"{show_expr(fault.access)} leaves {fault.access.tensor!r}: index {fault.index} in dimension {fault.dim} "
            f"of {fault.size} elements", f"statement {number + 1}: {show_einsum(e)}", f"at {at}" if at else "")
