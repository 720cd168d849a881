"""Host memory as kernels take it, of every dtype, with numpy alone: bf16 and the 8-bit floats too."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from memcomp.ir.errors import Refusal

LINE = 64  # bytes: where fresh memory begins
NUMPY: dict[str, Any] = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i16": np.int16,
    "i8": np.int8, "u8": np.uint8, "bool": np.bool_}
_BITS: dict[str, Any] = {"bf16": np.uint16, "e4m3": np.uint8, "e5m2": np.uint8}  # numpy has no such numbers
CODES = {**dict.fromkeys(("i64", "i32", "i16", "i8"), 0), "u8": 1, **dict.fromkeys(("f64", "f32", "f16"), 2), "bf16": 4,
         "bool": 6, "e4m3": 10, "e5m2": 12}  # DLPack's kDLInt, kDLUInt, kDLFloat, kDLBfloat, kDLBool, kDLFloat8_...
OURS = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "e4m3",
        "float8_e5m2": "e5m2", "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
        "bool": "bool"}  # by the names that torch, numpy and DLPack give them


class Array:
    """An array with one of memcomp's dtypes.  data: the numbers, or their bits as whole numbers where numpy has no such
    dtype; any strides.  Whoever takes DLPack takes it."""

    __slots__ = ("data", "dtype")

    def __init__(self, dtype: str, data: np.ndarray[Any, Any]) -> None:
        if data.dtype != carrier(dtype):
            raise Refusal(f"{dtype} is held in {np.dtype(carrier(dtype)).name}, not in {data.dtype.name}")
        self.dtype, self.data = dtype, data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The numbers; f32 of bf16.  Refusal where numpy has none like these."""
        if self.dtype in NUMPY:
            return self.data
        if self.dtype == "bf16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        raise Refusal(f"numpy has no numbers like {self.dtype}", hint="read it through DLPack, or the bits in .data")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = _writable(self.data).__dlpack__()
        if self.dtype not in NUMPY:
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            tensor = DLTensor.from_address(pointer(capsule, b"dltensor"))
            tensor.code = CODES[self.dtype]
        return capsule

    def __repr__(self) -> str:
        return f"Array({self.dtype}, {list(self.shape)})"


class DLTensor(ctypes.Structure):
    """DLPack's tensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64)]


def carrier(dtype: str) -> Any:
    """The dtype of numpy that holds it."""
    return NUMPY.get(dtype) or _BITS[dtype]


def empty(dtype: str, shape: Sequence[int]) -> Array:
    """Fresh memory, row-major, from a multiple of 64 bytes."""
    room = np.empty(prod(shape) * np.dtype(carrier(dtype)).itemsize + LINE, np.uint8)
    return within(room, -room.ctypes.data % LINE, dtype, shape)


def within(room: np.ndarray[Any, Any], at: int, dtype: str, shape: Sequence[int]) -> Array:
    """The array that lies row by row in `room`, from byte `at` on.  Kernels ask for a last stride of one element even
    where there is none, and numpy's own strides are 0 there."""
    kind = np.dtype(carrier(dtype))
    return Array(dtype, np.ndarray(tuple(shape), kind, room, at, [kind.itemsize * s for s in steps_of(shape)]))


def steps_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides row by row, in elements; where an extent is 0, as torch counts."""
    return tuple(prod(max(1, n) for n in shape[d + 1:]) for d in range(len(shape)))


def fresh(dtype: str, shape: Sequence[int]) -> Any:
    """Memory for an output: numpy's array where numpy has the dtype."""
    if dtype not in NUMPY:
        return empty(dtype, shape)
    return empty(dtype, shape).data if 0 in shape else np.empty(shape, NUMPY[dtype])


def copied(x: Array) -> Array:
    """The same elements row by row."""
    made = empty(x.dtype, x.shape)
    made.data[...] = x.data
    return made


def tensor(x: Any) -> Any:
    """Anything with DLPack, a numpy array that may only be read too, as tvm_ffi's tensor: handed over once, it costs
    a kernel's call nothing.  It keeps the memory alive."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(Array(_name(x), x) if isinstance(x, np.ndarray) and not x.flags.writeable else x)


def _name(x: np.ndarray[Any, Any]) -> str:
    return next((n for n, kind in NUMPY.items() if x.dtype == kind), "")


def _writable(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same memory; DLPack of old cannot say that it may only be read, and kernels only read their inputs."""
    if x.flags.writeable:
        return x
    if not x.size:
        return within(np.empty(0, np.uint8), 0, _name(x), x.shape).data
    reach = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    low = x.ctypes.data + sum(r for r in reach if r < 0)
    high = x.ctypes.data + sum(r for r in reach if r > 0) + x.itemsize
    room = (ctypes.c_char * (high - low)).from_address(low)
    room.owner = x
    return np.ndarray(x.shape, x.dtype, room, x.ctypes.data - low, x.strides)
