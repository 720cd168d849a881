"""Workloads that `memcomp bench` times: layers in plain PyTorch, their rivals, how much faster memcomp is asked to be.

A module of this folder holds a tuple `CASES`; the folder is the list.  `_flash` is no case but a rival.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeAlias

from torch import Tensor

Layer: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Rival:
    """Another way to compute a case's layer.

    made:     from the case's arguments to a function of them; what it prepares (a block mask) is not timed.
    compiler: "" to call it as it is, "inductor", or "memcomp": another layer on the same data, whose kernel this one
              is measured by.
    """

    made: Callable[..., Layer]
    compiler: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """fn: the layer that memcomp compiles, tensors -> a tensor or a tuple; exact: the same for float64, if not fn.

    inputs:  makes its arguments, on torch's default device.
    rivals:  by name, in the order of their turns.
    bars:    rivals joined by " / " (the fastest counts), or "read", a loop that reads as much -> how many times faster.
    flops:   multiplications and additions of the products, as the layer needs them (masked ones not counted).
    options: of torch.compile(backend="memcomp").
    device:  whose sizes these are, "cpu" or "cuda".
    alone:   axes along which every part is computed alone (batch, heads): the dim of each argument that has it, and of
             the result, last; -1 for none.
    """

    name: str
    fn: Layer
    inputs: Callable[[], tuple[Tensor, ...]]
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    exact: Layer | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    alone: tuple[tuple[int, ...], ...] = ()


def fixed(fn: Layer) -> Callable[..., Layer]:
    """A rival that needs no preparation."""
    return lambda *args: fn


def cases(device: str = "cpu") -> tuple[Case, ...]:
    """All cases of a device's sizes, module by module in the order of their names."""
    modules = sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(c for m in modules for c in import_module(f"{__name__}.{m}").CASES if c.device == device)
