"""Steps of a plan as records for `memcomp_walk`, which every library of a kernel brings (`codegen/tvm/walk.py`).

Kernels get arguments that were packed once: tvm-ffi's values (TVMFFIAny), tensors as DLPack's DLTensor.  Memory that is
another at every call, the inputs and outputs, is a hole in a tensor that the walk fills first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from memcomp.artifact.memory import CODES, Array, DLTensor, carrier, steps_of

KERNEL, CHECK, COPY, PUT = range(4)
_INTEGER, _TENSOR, _HEADER = 1, 7, 24  # kTVMFFIInt, kTVMFFIDLTensorPtr; bytes of TVMFFIObject


class _Value(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("zero", ctypes.c_uint32), ("held", ctypes.c_int64)]


class _Step(ctypes.Structure):
    _fields_ = [("what", ctypes.c_int64), ("call", ctypes.c_void_p), ("self", ctypes.c_void_p),
                ("args", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Hole(ctypes.Structure):
    _fields_ = [("tensor", ctypes.c_void_p), ("given", ctypes.c_int64), ("offset", ctypes.c_int64)]


class _Program(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_void_p), ("holes", ctypes.c_void_p), ("count", ctypes.c_int64)]


Argument: TypeAlias = "DLTensor | int"


class Program:
    """Steps in order.  Whoever runs it keeps it; it keeps the memory that stays."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._holes: list[_Hole] = []
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._steps)

    def fixed(self, x: Array) -> DLTensor:
        """A tensor whose memory stays."""
        self._kept.append(x)
        size = x.data.itemsize
        return self._tensor(x.dtype, x.shape, [s // size for s in x.data.strides], x.data.ctypes.data)

    def given(self, at: int, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None,
              offset: int = 0) -> DLTensor:
        """A tensor in memory that is the call's `at`-th; strides (row by row where there are none) and offset: in
        elements."""
        made = self._tensor(dtype, shape, steps_of(shape) if strides is None else strides, None)
        self._holes.append(_Hole(ctypes.addressof(made), at, offset * np.dtype(carrier(dtype)).itemsize))
        return made

    def _tensor(self, dtype: str, shape: Sequence[int], strides: Sequence[int], place: int | None) -> DLTensor:
        extents, steps = ((ctypes.c_int64 * len(x))(*x) for x in (shape, strides))
        made = DLTensor(place, 1, 0, len(shape), CODES[dtype], 8 * np.dtype(carrier(dtype)).itemsize, 1,
                      ctypes.addressof(extents), ctypes.addressof(steps), 0)
        self._kept += [extents, steps, made]
        return made

    def add(self, what: int, args: Sequence[Argument], function: Any = None) -> None:
        """KERNEL: a call of tvm-ffi's `function`.  CHECK: a tensor of places, the first of them, the end, and, where
        one names nothing, that one.  COPY: from, to.  PUT: places along a dim, what is put there, where, the dim, the
        first place."""
        values = (_Value * len(args))(*map(_value, args))
        call = handle = None
        if function is not None:  # a function of tvm-ffi's is an object that begins with what calls it
            handle = function.__chandle__()
            call = ctypes.c_void_p.from_address(handle + _HEADER).value
        self._steps.append(_Step(what, call, handle, ctypes.addressof(values), len(args)))
        self._kept += [values, function]

    def ready(self) -> int:
        """Where the program lies, for the walk; nothing is added after that."""
        steps, holes = (_Step * len(self._steps))(*self._steps), (_Hole * len(self._holes))(*self._holes)
        program = _Program(ctypes.addressof(steps), ctypes.addressof(holes), len(holes))
        self._kept += [steps, holes, program]
        return ctypes.addressof(program)


def _value(x: Argument) -> _Value:
    return _Value(_TENSOR, 0, ctypes.addressof(x)) if isinstance(x, DLTensor) else _Value(_INTEGER, 0, x)
