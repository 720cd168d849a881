"""The python backend: tile programs as readable numpy text.  Slow on purpose; it is the living check of the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memcomp.codegen.python.emit import emit_source
from memcomp.ir.errors import InputError
from memcomp.ir.tile import Kernel, TileProgram

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from memcomp.ir.target import Target

__all__ = ["DEVICE", "build", "emit", "unfit"]

DEVICE = "cpu"


def unfit(machine: Target) -> str:
    """Why no kernel is written for a machine; "" where one may be: numpy shows here what would run there."""
    return ""


def emit(tp: TileProgram, target: object = None) -> Kernel:
    """The program as one numpy function `entry(*tensors, *sizes)` that writes into the out, state and work arrays.

    `target` is taken for the backends' common signature; numpy runs everywhere.
    """
    entry = _identifier(tp.name)
    return Kernel(tp.name, "python", emit_source(tp, entry), entry, tp)


def build(kernel: Kernel) -> Callable[..., None]:
    """Compile the text.  Tensors are numpy arrays or torch CPU tensors (shared, not copied), in the order of
    `kernel.program.params`; then the sizes.  A numpy array for a
    bf16 param is its uint16 view.

    Raises InputError where an argument is missing or has the wrong number of dimensions.
    """
    scope: dict[str, Any] = {}
    exec(compile(kernel.source, f"<memcomp python {kernel.name}>", "exec"), scope)
    entry: Callable[..., None] = scope[kernel.entry]
    params, sizes = kernel.program.params, kernel.program.sizes

    def run(*args: Any) -> None:
        if len(args) != len(params) + len(sizes):
            raise InputError(
                f"{kernel.name} takes {len(params)} tensors and {len(sizes)} sizes, and was given {len(args)}"
            )
        arrays = [_array(a, p.dtype) for a, p in zip(args, params, strict=False)]
        for a, p in zip(arrays, params, strict=True):
            if a.ndim != len(p.shape):
                raise InputError(f"{p.name!r} of {kernel.name} has {a.ndim} dimensions, expected {len(p.shape)}")
        entry(*arrays, *(int(n) for n in args[len(params) :]))

    return run


def _array(x: Any, dtype: str) -> npt.NDArray[np.generic]:
    """A numpy view of the same memory.  numpy has no bf16: such a tensor comes as uint16."""
    import numpy as np

    if isinstance(x, np.ndarray):
        return x
    if dtype == "bf16":
        x = x.view(sys.modules["torch"].uint16)  # x is a torch tensor, so torch is there; this folder imports none
    out: npt.NDArray[np.generic] = x.detach().numpy()
    return out


def _identifier(name: str) -> str:
    clean = "".join(ch if ch.isalnum() else "_" for ch in name)
    return clean if clean and not clean[0].isdigit() else f"k_{clean}"
