"""A saved kernel through the real cuda.core, on a driver that only writes down what it is told, with no compiler."""

import contextlib
import sys
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

COMPILERS = ("triton", "tvm", "tvm_ffi", "memcomp.passes", "memcomp.capture", "memcomp.codegen.")
NONE = ("memcomp.codegen.launches", "memcomp.codegen.elf")


class NoCompiler(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith(COMPILERS) and name not in NONE:
            raise AssertionError(f"{name} is imported where no compiler is")


@dataclass(frozen=True)
class Given:
    """What a launch reads of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: int
    device: torch.device = torch.device("cuda", 1)
    strides: tuple[int, ...] | None = None

    def stride(self, at: int | None = None) -> Any:
        every = self.strides or torch.empty(self.shape, device="meta").stride()
        return every if at is None else every[at]

    def data_ptr(self) -> int:
        return self.place


def main(file: str, extents: str) -> None:
    sys.meta_path.insert(0, NoCompiler())
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda _: SimpleNamespace(cuda_stream=0x1234)  # type: ignore[assignment,return-value]
    from memcomp.artifact import load
    from memcomp.dtypes import DTYPES
    from memcomp.sizes import evaluate

    loaded = load(file)
    for call in extents.split(";"):
        sizes = {r: int(n) for r, n in (x.split("=") for x in call.split(","))}
        tensors = [Given(tuple(evaluate(x, sizes) for x in p.shape), DTYPES[p.dtype], (k + 1) << 36)
                   for k, p in enumerate(loaded.saved.params)]
        loaded.launched(*tensors, *(sizes[r] for r in loaded.saved.sizes))
    assert "libnvrtc" not in Path("/proc/self/maps").read_text(), "cuda.core loaded its compiler"


if __name__ == "__main__":
    main(*sys.argv[1:])
