"""Machine code that runs where no compiler is: a directory of kernels, or a whole model, and single kernels for GPUs.

    memcomp compile MODEL -o DIR                             # here: compilers
    run = memcomp.load("DIR")                                # there: none; memcomp[runtime] or memcomp[runtime-cuda]
    o, = run(q, k, v)

    memcomp emit attention.mc --target h100 --cubin .        # one kernel in one file
    o, = memcomp.artifact.load("attention.mcc")(q, k, v)

Names are resolved on first use: reading a file needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memcomp.artifact.files import Loaded, Saved, save, saved
    from memcomp.artifact.folder import Folder, verified
    from memcomp.artifact.kernel import Kernel
    from memcomp.artifact.launch import Launched
    from memcomp.artifact.loading import Artifact
    from memcomp.artifact.pack import Pack

__all__ = ["Artifact", "Folder", "Kernel", "Launched", "Loaded", "Pack", "Saved", "load", "save", "saved", "verified"]
_HOMES = {"Launched": "launch", **dict.fromkeys(("Loaded", "Saved", "save", "saved"), "files"), "Artifact": "loading",
          "Kernel": "kernel", "Pack": "pack", "Folder": "folder", "verified": "folder"}


def load(place: str | Path, **options: Any) -> Any:
    """A directory (`loading.load`, which takes the options), or the file of one kernel (`files.load`)."""
    from importlib import import_module

    home = "loading" if Path(place).is_dir() or options else "files"
    return import_module(f"memcomp.artifact.{home}").load(place, **options)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'memcomp.artifact' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"memcomp.artifact.{_HOMES[name]}"), name)
