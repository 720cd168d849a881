"""The way to the driver: cuda.core loads, cuda.bindings launches, torch says on which stream.

cuda.core's own launch raises no limit of shared memory and takes no tensor map by value.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Protocol

from memcomp.ir.errors import Refusal

_FREELY = 48 * 1024  # bytes of shared memory that a launch may ask for without saying so before
_LINE = 64           # bytes: where a map begins


class Driver(Protocol):
    """What a launch needs of a machine with a GPU; tests put another in its place."""

    def capability(self, device: int) -> int:
        """90 for 9.0."""

    def load(self, device: int, cubin: bytes, function: str, shared: int) -> Any:
        """The function, ready to be launched with that much dynamic shared memory."""

    def stream(self, device: int) -> Any:
        """A context in which the device is the current one; its value is torch's current stream there."""

    def map(self, dtype: str, place: int, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...],
            swizzle: int) -> bytes:
        """A tensor as the memory unit knows it.  extents, strides in bytes (all but the last, which is one element),
        box: slowest first."""

    def room(self, device: int, kernel: Any, block: int, shared: int) -> int:
        """How many blocks of so many threads and bytes the device, the current one, holds at one time."""

    def launch(self, kernel: Any, stream: Any, grid: tuple[int, int, int], block: int, shared: int, data: bytes,
               places: Sequence[int], together: bool) -> None:
        """Put one launch into the stream; waits for nothing.  data: the arguments; places: where each begins;
        together: all of its blocks run at one time, or there is an error."""


class Core:
    """cuda.core, cuda.bindings and torch."""

    def __init__(self) -> None:
        self._codes: dict[bytes, Any] = {}
        self._lock = threading.Lock()

    def capability(self, device: int) -> int:
        found = _cuda().core.Device(device).compute_capability
        return int(10 * found.major + found.minor)

    def load(self, device: int, cubin: bytes, function: str, shared: int) -> Any:
        cuda = _cuda()
        with self._lock:
            if cubin not in self._codes:
                self._codes[cubin] = cuda.core.ObjectCode.from_cubin(cubin)
            kernel = self._codes[cubin].get_kernel(function).handle
        if shared > _FREELY:
            most = cuda.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _did(f"{function} takes {shared} bytes of shared memory a block",
                 cuda.driver.cuKernelSetAttribute(most, shared, kernel, cuda.driver.CUdevice(device)))
        return cuda.driver.CUfunction(int(kernel))

    @contextmanager
    def stream(self, device: int) -> Iterator[Any]:
        import torch

        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream

    @lru_cache(maxsize=1024)  # noqa: B019
    def map(self, dtype: str, place: int, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...],
            swizzle: int) -> bytes:
        d = _cuda().driver
        made = d.cuTensorMapEncodeTiled(
            getattr(d.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_TYPES[dtype]}"), len(box), place,
            [d.cuuint64_t(n) for n in reversed(extents)], [d.cuuint64_t(n) for n in reversed(strides)],
            [d.cuuint32_t(n) for n in reversed(box)], [d.cuuint32_t(1)] * len(box),
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(d.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle}B' if swizzle else 'NONE'}"),
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return ctypes.string_at(_did("a tensor cannot be fetched in boxes", made).getPtr(), 128)

    @lru_cache(maxsize=1024)  # noqa: B019
    def room(self, device: int, kernel: Any, block: int, shared: int) -> int:
        d = _cuda().driver
        count = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        what = "a device does not say how many blocks it holds"
        each = _did(what, d.cuOccupancyMaxActiveBlocksPerMultiprocessor(kernel, block, shared))
        return int(each) * int(_did(what, d.cuDeviceGetAttribute(count, d.CUdevice(device))))

    def launch(self, kernel: Any, stream: Any, grid: tuple[int, int, int], block: int, shared: int, data: bytes,
               places: Sequence[int], together: bool) -> None:
        room = ctypes.create_string_buffer(len(data) + _LINE)
        start = -(-ctypes.addressof(room) // _LINE) * _LINE
        ctypes.memmove(start, data, len(data))
        each = (ctypes.c_void_p * len(places))(*(start + at for at in places))
        given, driver = (kernel, *grid, block, 1, 1, shared, stream, ctypes.addressof(each)), _cuda().driver
        _did("a kernel cannot be launched",
             driver.cuLaunchCooperativeKernel(*given) if together else driver.cuLaunchKernel(*given, 0))


_TYPES = {"f64": "FLOAT64", "f32": "FLOAT32", "f16": "FLOAT16", "bf16": "BFLOAT16", "i64": "INT64", "i32": "INT32",
          "u8": "UINT8"}


def _did(what: str, answer: tuple[Any, ...]) -> Any:
    """What a call of the driver made; Refusal where it did not."""
    error, *made = answer
    if int(error):
        raise Refusal(what, f"the driver says {error.name}")
    return made[0] if made else None


@lru_cache(maxsize=1)
def _cuda() -> Any:
    try:
        import cuda.core
        from cuda.bindings import driver
    except ModuleNotFoundError as error:
        raise Refusal(f"kernels for a GPU are launched with {error.name}, which is not installed",
                      hint="pip install memcomp[cuda]") from error
    return SimpleNamespace(core=cuda.core, driver=driver)
