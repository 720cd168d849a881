"""Round float64 values to a stored format, to nearest even, as the hardware and torch do."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

INTEGER: dict[str, type[np.signedinteger[Any]] | type[np.unsignedinteger[Any]]] = {
    "i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8}
# significand bits (with the hidden one), least normal exponent of frexp's 0.5 <= m < 1, largest value, overflow gives
_SMALL = {
    "bf16": (8, -125, 3.3895313892515355e38, np.inf),
    "e4m3": (4, -5, 448.0, 448.0),  # torch.float8_e4m3fn has no infinity and saturates
    "e5m2": (3, -13, 57344.0, np.inf),
}


def epsilon(dtype: str) -> float:
    """Distance from 1 to the next number of a real format (2**-23 for f32)."""
    return {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10}[dtype] if dtype not in _SMALL else 2.0 ** (
        1 - _SMALL[dtype][0])


def round_to(x: Array, dtype: str) -> Array:
    """float64 -> the nearest value of `dtype`, still float64; ties to even, subnormals kept; integers unchanged."""
    if dtype in INTEGER or dtype in ("bool", "f64") or x.dtype.kind != "f":
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "f32":
            return x.astype(np.float32).astype(np.float64)
        if dtype == "f16":
            return x.astype(np.float16).astype(np.float64)
        bits, least, largest, overflow = _SMALL[dtype]
        _, e = np.frexp(x)
        step = np.ldexp(1.0, np.maximum(e, least) - bits)
        out = np.where(np.isfinite(x), np.round(x / step) * step, x)
        out = np.where(np.abs(out) > largest, np.copysign(overflow, x), out)
    return out
