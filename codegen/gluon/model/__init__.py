"""Gluon on the CPU: text for a GPU's warps, run as Python, where what a missing wait would break is a fault.

Gluon has no interpreter.  `run` gives the text modules of the same names whose functions (`language`, `tensors`)
compute with numpy (`values`) and keep the books of a GPU: who may touch which bytes of shared memory (`memory`), in any
order of its warps (`machine`).  The model sees no speed, and not whether a compiler keeps what the text says.
"""

from __future__ import annotations

import builtins
import hashlib
import inspect
import linecache
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from memcomp.codegen.gluon.model.language import Descriptor, constexpr, counted, modules
from memcomp.codegen.gluon.model.layouts import NVMMASharedLayout
from memcomp.codegen.gluon.model.machine import Block
from memcomp.codegen.gluon.model.values import STORED, TEXT, Fault, Memory, Tensor, tensor

__all__ = ["Fault", "described", "memory", "run", "settings"]


@lru_cache(maxsize=64)
def functions(source: str) -> dict[str, Any]:
    """The names that the text defines."""
    known = modules()

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name.partition(".")[0] != "triton":
            return __import__(name, globals, locals, fromlist, level)
        if name not in known:
            raise Fault(f"the model of Gluon has no {name}")
        return known[name] if fromlist else known["triton"]

    place = f"{TEXT}{hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    names: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": imported, "range": counted}}
    exec(compile(source, place, "exec"), names)
    return names


def settings(source: str, function: str) -> int:
    """Warps that the text asks for."""
    return int(functions(source)["SETTINGS"][function]["num_warps"])


def memory(array: np.ndarray[Any, Any], name: str, dtype: str) -> Tensor:
    """A pointer to the first element of a flat array that is written in place.  bf16 is given as f32."""
    kind = STORED[dtype]
    if array.dtype != kind.numpy or array.ndim != 1:
        raise TypeError(f"{name}: {dtype} is held as flat {kind.numpy}, not {array.dtype} {array.shape}")
    return Tensor(0, Memory(kind, array, name))


def described(pointer: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int],
              swizzle: int) -> Descriptor:
    """A descriptor made by the host."""
    bits = pointer.dtype.element_ty.bits
    return Descriptor(pointer, shape, strides, block, NVMMASharedLayout(swizzle, bits, len(block)))


def run(source: str, function: str, grid: int | Sequence[int], args: Sequence[Any] | Mapping[str, Any], *,
        warps: int = 4, seed: int = 0) -> None:
    """Run a kernel of the text, every program of its grid one after another.

    args: pointers (`memory`) and numbers, in order or by name; parameters that are `constexpr` take any value.
    warps: of the parent and the first partition.  seed: decides in which order partitions and transfers take turns.

    Raises Fault where the text does what a GPU would not forgive: an access that nothing orders, partitions that all
    wait, layouts that differ, an element outside of its tensor.
    """
    called: Callable[..., Any] = functions(source)[function]
    taken = inspect.signature(called)
    bound = taken.bind(**args) if isinstance(args, Mapping) else taken.bind(*args)
    bound.apply_defaults()
    fixed = {n for n, p in taken.parameters.items() if p.annotation is constexpr}
    given = [a if n in fixed or isinstance(a, Descriptor) else tensor(a) for n, a in bound.arguments.items()]
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    sizes += (1,) * (3 - len(sizes))
    with np.errstate(all="ignore"):
        for n in range(math.prod(sizes)):
            at = (n % sizes[0], n // sizes[0] % sizes[1], n // sizes[0] // sizes[1])
            Block(at, sizes, warps, seed).run(called, given)
