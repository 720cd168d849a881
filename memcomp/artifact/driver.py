"""The way to the driver: four calls of cuda.core, and torch's device and stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from memcomp.codegen.launches import Argument
from memcomp.ir.errors import Refusal

_INTEGERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
_FREELY = 48 * 1024  # bytes of shared memory that a launch may ask for without saying so before


class Driver(Protocol):
    """What a launch needs of a machine with a GPU; tests put another in its place."""

    def capability(self, device: int) -> int:
        """90 for 9.0."""

    def load(self, device: int, cubin: bytes, function: str, shared: int) -> Any:
        """The function, ready to be launched with that much dynamic shared memory."""

    def stream(self, device: int) -> Any:
        """A context in which the device is the current one; its value is torch's current stream there."""

    def launch(self, kernel: Any, stream: Any, grid: tuple[int, int, int], block: int, shared: int,
               args: Sequence[Any]) -> None:
        """Put one launch into the stream; waits for nothing."""


def packed(a: Argument, value: int) -> Any:
    """An argument as cuda.core takes it: a plain int is a pointer."""
    kind = _INTEGERS.get(a.type)
    return value if kind is None else kind(value)


class Core:
    """cuda.core and torch."""

    def __init__(self) -> None:
        self._codes: dict[bytes, Any] = {}
        self._lock = threading.Lock()

    def capability(self, device: int) -> int:
        core = _core()
        found = core.Device(device).compute_capability
        return int(10 * found.major + found.minor)

    def load(self, device: int, cubin: bytes, function: str, shared: int) -> Any:
        from cuda.bindings import driver

        with self._lock:
            if cubin not in self._codes:
                self._codes[cubin] = _core().ObjectCode.from_cubin(cubin)
            kernel = self._codes[cubin].get_kernel(function)
        if shared > _FREELY:  # cuda.core's launch does not do it
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            error, = driver.cuKernelSetAttribute(most, shared, kernel.handle, driver.CUdevice(device))
            if error != driver.CUresult.CUDA_SUCCESS:
                raise Refusal(f"{function} takes {shared} bytes of shared memory a block",
                              f"device {device} does not give them: {error.name}")
        return kernel

    @contextmanager
    def stream(self, device: int) -> Iterator[Any]:
        import torch

        with torch.cuda.device(device):
            yield _core().Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)

    def launch(self, kernel: Any, stream: Any, grid: tuple[int, int, int], block: int, shared: int,
               args: Sequence[Any]) -> None:
        core = _core()
        core.launch(stream, core.LaunchConfig(grid=grid, block=block, shmem_size=shared), kernel, *args)


def _core() -> Any:
    try:
        import cuda.core
    except ModuleNotFoundError as error:
        raise Refusal("kernels for a GPU are launched by cuda-core, which is not installed",
                      hint="pip install memcomp[cuda]") from error
    return cuda.core
