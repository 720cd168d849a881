"""Families of layers as users write them: one plain function each, with inputs of any length; the folder is the list.

A module of this folder holds a tuple `FAMILIES`; `families()` joins them.  tests/test_families*.py and
benchmarks/families.py go through the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

import torch
from torch import Tensor


class Inputs(Protocol):
    def __call__(self, rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Inputs with `rows` independent rows (queries, tokens) over a long rank of `length`; always the same."""


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write a layer, and what is expected of it.

    fn:      the layer: tensors -> a tensor or a tuple of them.
    inputs:  makes its arguments.
    long:    (argument, dim) pairs that hold the long rank; the first one names it in the program that is read.
    rows:    (argument, dim) pairs that hold the rows.
    kernels: launches a call.
    passes:  over the long rank, in the program that runs.
    why:     what forces a second pass or kernel, where there is one.
    flex:    arguments -> the same layer written with FlexAttention; None: it cannot be written so.
    """

    name: str
    fn: Callable[..., Any]
    inputs: Inputs
    long: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...] = ()
    kernels: int = 1
    passes: int = 1
    why: str = ""
    flex: Callable[..., Callable[..., Any]] | None = None


def families() -> tuple[Family, ...]:
    """All families, module by module in the order of their names."""
    modules = sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(f for m in modules for f in import_module(f"{__name__}.{m}").FAMILIES)
