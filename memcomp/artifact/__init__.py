"""Machine code for GPUs, launched: in the process that compiled it, and from a file where no compiler is.

    memcomp emit attention.mc --target h100 --cubin .        # here: needs a compiler, no GPU
    run = memcomp.artifact.load("attention.mcc")             # there: needs cuda-core, a GPU, no compiler
    o, = run(q, k, v)

Names are resolved on first use: reading a file needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memcomp.artifact.files import Loaded, Saved, load, save, saved
    from memcomp.artifact.launch import Launched

__all__ = ["Launched", "Loaded", "Saved", "load", "save", "saved"]
_HOMES = {"Launched": "launch", **dict.fromkeys(("Loaded", "Saved", "load", "save", "saved"), "files")}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'memcomp.artifact' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"memcomp.artifact.{_HOMES[name]}"), name)
