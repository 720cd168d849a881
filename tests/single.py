"""The meaning of a program in float32: every operator and every sum is rounded, as a kernel in float32 would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memcomp.ir import contract, ops, statement
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program

TILE = 8  # points that are summed before they join the running sum, in the plain form as in the derived one


def rounded(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.float32).astype(np.float64) if x.dtype.kind == "f" else x


def _wrapped(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: rounded(f(*args))


class _Sum:
    """np.add whose partial sums are float32."""

    def __call__(self, x: Any, y: Any) -> Any:
        return rounded(np.add(x, y))

    def reduce(self, x: Any, axis: Any, initial: Any) -> Any:
        if np.asarray(x).dtype.kind != "f":
            return np.add.reduce(x, axis=axis, initial=initial)
        x = np.moveaxis(x.astype(np.float32), axis, range(len(axis)))
        x = x.reshape(-1, *x.shape[len(axis):])
        total = np.full(x.shape[1:], initial, np.float32)
        for k in range(0, len(x), TILE):
            total = total + x[k:k + TILE].sum(0)
        return total.astype(np.float64)


def _contract(factors: Any, shape: Any, keep: int) -> Any:
    small = [f.astype(np.float32) if f.dtype.kind == "f" else f for f in factors]
    return rounded(contract.contract(small, shape, keep))


@contextmanager
def _single() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, row in list(ops.OPS.items()):
            patch.setitem(ops.OPS, name, replace(row, numpy=_wrapped(row.numpy)))
        patch.setitem(statement._JOIN, "sum", _Sum())
        patch.setattr(statement, "contract", _contract)
        yield


def single(program: Program, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`interpret` with float32 rounding after every step; the inputs are float32 already (`rounded`)."""
    with _single(), np.errstate(all="ignore"):
        return interpret(program, inputs)
