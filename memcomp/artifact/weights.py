"""weights.safetensors, read by mapping the file: no library, and bf16 without torch."""

from __future__ import annotations

import json
import mmap
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from memcomp.artifact.memory import Array, carrier
from memcomp.ir.errors import InputError

FILE = "weights.safetensors"
_NAMES = {"f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "e4m3": "F8_E4M3", "e5m2": "F8_E5M2", "i64": "I64",
          "i32": "I32", "i16": "I16", "i8": "I8", "u8": "U8", "bool": "BOOL"}


def read(place: Path) -> dict[str, Array]:
    """All tensors, in memory that is the file's.  InputError where it is no such file."""
    try:
        with place.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        head = json.loads(data[8:start])
        return {n: _tensor(x, data, start) for n, x in head.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{place} holds no weights", str(error)) from error


def _tensor(x: Any, data: mmap.mmap, start: int) -> Array:
    dtype = next((d for d, name in _NAMES.items() if name == x["dtype"]), "")
    if not dtype:
        raise ValueError(f"the dtype {x['dtype']!r}")
    kind, shape, (first, last) = np.dtype(carrier(dtype)), tuple(map(int, x["shape"])), x["data_offsets"]
    count = prod(shape)
    if last - first != kind.itemsize * count or not 0 <= first <= last <= len(data) - start:
        raise ValueError(f"the place {first} to {last}")
    return Array(dtype, np.frombuffer(data, kind, count, start + first).reshape(shape))
