"""What a measurement depends on besides its problem: the machine, and the versions of what wrote the kernel."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

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
    """Of all that turns a program into a kernel: an entry measured with another compiler says little."""
    seen = hashlib.sha256()
    for package in ("memcomp.ir", "memcomp.passes", "memcomp.codegen"):
        _feed(seen, files(package), package)
    return seen.hexdigest()[:32]


def _feed(seen: Any, folder: Any, name: str) -> None:
    for item in sorted(folder.iterdir(), key=lambda x: str(x.name)):
        if item.is_dir() and item.name != "__pycache__":
            _feed(seen, item, f"{name}.{item.name}")
        elif item.name.endswith((".py", ".toml")):
            seen.update(f"{name}.{item.name}\0".encode())
            seen.update(item.read_bytes())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
