"""Arrays of a call: numpy's, `memory.Array`s and torch's, as steps take them; what the library's steps do to them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from memcomp.artifact.memory import NUMPY, OURS, Array, copied
from memcomp.artifact.plan import Tensor
from memcomp.ir.errors import InputError, Refusal


def held(x: Any, t: Tensor) -> Any:
    """An input as steps take it: row-major, of the plan's dtype."""
    if type(x) is np.ndarray and x.flags.carray and _KINDS.get(x.dtype) == t.dtype:
        return x
    if is_torch(x):
        if x.is_cpu and not x.requires_grad and _torchs().get(x.dtype) == t.dtype and x.is_contiguous() and \
                not x.is_neg():
            return x
        found = _named(str(x.dtype))
        if x.requires_grad and _graded():
            raise Refusal("a model of an artifact has no gradient", t.name, "call it under torch.no_grad()")
        if not x.is_cpu:
            raise InputError(f"{t.name} is on {x.device}; the model runs on the CPU", hint="move it first")
        if found == t.dtype:
            x = x.detach().resolve_neg()
            return x if x.is_contiguous() and (not x.ndim or x.stride(-1) == 1) else x.new_empty(x.shape).copy_(x)
    else:
        if not isinstance(x, (np.ndarray, Array)):
            x = np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
        found = x.dtype if isinstance(x, Array) else _KINDS.get(x.dtype) or str(x.dtype)
        if found == t.dtype:
            x = x if isinstance(x, Array) else Array(found, x)  # numpy's own DLPack refuses what may only be read
            return x if x.data.flags.c_contiguous and x.data.flags.aligned and _near(x.data) else copied(x)
    raise InputError(f"{t.name} is {found}; the model takes {t.dtype}", hint="convert it first")


def same(x: Any, given: Any) -> bool:
    """Is what `held` gave for an input the input's own memory, to be written into?"""
    if is_torch(given):
        return is_torch(x) and bool(x.data_ptr() == given.data_ptr()) and not x.is_neg()
    mine, data = given.data if isinstance(given, Array) else given, x.data if isinstance(x, Array) else x
    return isinstance(data, np.ndarray) and data.flags.writeable and mine.ctypes.data == data.ctypes.data


def _near(x: np.ndarray[Any, Any]) -> bool:
    """Is the last stride one element?  Kernels ask for it where the extent is 1 or 0, too."""
    return not x.ndim or x.strides[-1] == x.itemsize


def _graded() -> bool:
    import torch

    return torch.is_grad_enabled()


_NATURAL = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # where what is negative is very large
_KINDS = {np.dtype(kind): name for name, kind in NUMPY.items()}


def is_torch(x: Any) -> bool:
    kind: Any = type(x)
    return _of_torch(kind)


@lru_cache(maxsize=64)
def _of_torch(kind: Any) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


@lru_cache(maxsize=1)
def _torchs() -> dict[Any, str]:
    from memcomp.dtypes import DTYPES

    return {kind: name for name, kind in DTYPES.items()}


def _named(dtype: str) -> str:
    word = dtype.removeprefix("torch.")
    return OURS.get(word, word)


def strided(x: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
    """Part of a row-major array.  Refusal where it would reach out of it."""
    x = x if isinstance(x, Array) else Array(_KINDS[x.dtype], x)
    flat = x.data.reshape(-1)
    inside(flat.size, str(x), shape, strides, offset)
    return Array(x.dtype, np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [s * flat.itemsize for s in strides]))


def inside(count: int, name: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
    """Refusal where a view of `count` elements would reach out of them."""
    reach = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if any(n < 0 for n in shape) or 0 not in shape and (reach >= count or offset < 0 or any(s < 0 for s in strides)):
        raise Refusal(f"a view of {name} reaches element {reach}")


def _numbers(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else x.data if isinstance(x, Array) else x.numpy()


def _bits(x: Any) -> Any:
    """The elements as numpy can move them."""
    if not is_torch(x):
        return _numbers(x)
    import torch

    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()


def copy(source: Any, to: Any) -> None:
    """The library's copy: bits, of equal dtype and shape."""
    a, b = _bits(source), _bits(to)
    word = np.dtype(f"u{a.dtype.itemsize}")
    np.copyto(b.view(word), a.view(word), casting="no")


def put(source: Any, index: Any, to: Any, dim: int, wraps: bool) -> None:
    """The library's put: slices of `source` along a dim go to the places that `index` names.  IndexError, and nothing
    written, where one of them does not exist."""
    look(index, to.shape[dim], wraps, None)
    a, b, places = _bits(source), _bits(to), np.atleast_1d(_numbers(index))
    word = np.dtype(f"u{a.dtype.itemsize}")
    b.view(word)[(slice(None),) * dim + (places,)] = a.view(word)


def look(x: Any, size: int, wraps: bool, ignored: int | None) -> None:
    """IndexError where an element names a place that does not exist."""
    index = _numbers(x)
    if not wraps and index.size and index.view(_NATURAL[index.itemsize]).max() < size:
        return
    low = -size if wraps else 0
    if index.size and (index.min() < low or index.max() >= size):
        bad = index[(index < low) | (index >= size)]
        bad = bad if ignored is None else bad[bad != ignored]
        if bad.size:
            raise IndexError(f"index {int(bad[0])} is out of bounds for a dimension of {size} elements")
