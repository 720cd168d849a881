"""What a measurement depends on besides its problem: the machine, and the versions of what wrote the kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

# all of memcomp that decides which kernel a choice is: folders, and files of the package itself
ROOMS = ("ir", "passes", "codegen")
FILES = ("backends.py", "choice.py", "forms.py", "pipeline.py", "sizes.py", "stations.py", "tune/space.py")
BUILDERS = {"cpu": ("apache-tvm",), "cuda": ("triton", "nvidia-cuda-nvrtc")}


def environment(device: str) -> dict[str, Any]:
    """device: "cpu", or "cuda" for torch's current GPU."""
    return {"device": _gpu() if device == "cuda" else _cpu(), "code": code(),
            "versions": {p: _version(p) for p in BUILDERS[device]}}


def present(device: str) -> bool:
    """Is such a device here?"""
    if device == "cpu":
        return True
    import torch

    return torch.cuda.is_available()


def _cpu() -> dict[str, Any]:
    """Features and sizes, never a name: names are masked and lie."""
    from memcomp.ir.detect import cpu

    found = cpu()
    return {"kind": "cpu", "cores": found.cores, "lanes": found.lanes, "features": list(found.features),
            "caches": {name: list(x) for name, x in found.caches.items()}}


def _gpu() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"kind": "cuda", "name": found.name, "capability": 10 * found.major + found.minor,
            "processors": found.multi_processor_count, "memory": found.total_memory}


@lru_cache(maxsize=1)
def code() -> str:
    """Of all that turns a program and a choice into a kernel: an entry measured with another compiler says little."""
    return digested(files("memcomp"))


def digested(package: Any) -> str:
    """Of a memcomp's folder: a path, or what `importlib.resources` gives."""
    seen = hashlib.sha256()
    parts = [(f, package.joinpath(f)) for f in FILES]
    for name, item in (*(x for room in ROOMS for x in _texts(package.joinpath(room), room)), *parts):
        seen.update(f"{name}\0".encode())
        seen.update(item.read_bytes())
    return seen.hexdigest()[:32]


def _texts(folder: Any, name: str) -> Iterator[tuple[str, Any]]:
    for item in sorted(folder.iterdir(), key=lambda x: str(x.name)):
        if item.is_dir() and item.name != "__pycache__":
            yield from _texts(item, f"{name}/{item.name}")
        elif item.name.endswith((".py", ".toml")):
            yield f"{name}/{item.name}", item


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
