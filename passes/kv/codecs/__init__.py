"""Formats of stored numbers, each a cascade of Einsums that encodes and one statement that decodes.

`FAMILIES` is the registry: a function of keyword-only parameters a family; `codec` looks one up and keeps what it made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from memcomp.ir.errors import OptionError, nearest
from memcomp.passes.kv.codecs import affine, floats, ggml, tables
from memcomp.passes.kv.codecs.codec import NUMPY, Codec, Plane, Table, decode, encode, from_bytes, to_bytes


def _cast(dtype: str) -> Callable[..., Codec]:
    def made(*, group: int = 1) -> Codec:
        return floats.cast(dtype, group)

    made.__doc__ = f"Numbers rounded to {dtype}."
    return made


FAMILIES: dict[str, Callable[..., Codec]] = {
    **{d: _cast(d) for d in ("f32", "f16", "bf16")},
    "int": affine.integers, "planes": affine.planes_of, "bfp": affine.block_float,
    "fp8": floats.fp8, "mx": floats.mx, "nvfp4": floats.nvfp4,
    "lut": tables.lut, "vq": tables.vq,
    "q8_0": ggml.q8_0, "q4_0": ggml.q4_0, "q4_1": ggml.q4_1, "q5_0": ggml.q5_0, "q5_1": ggml.q5_1,
    "iq4_nl": ggml.iq4_nl, "ggml_mxfp4": floats.ggml_mxfp4, "ggml_nvfp4": floats.ggml_nvfp4,
}


def codec(family: str, **params: Any) -> Codec:
    """The codec of a family.  OptionError for a family or parameter that is not known, Refusal where codes do not fill
    words or shares do not fill groups."""
    if family not in FAMILIES:
        raise OptionError(f"unknown codec {family!r}", hint=nearest(family, FAMILIES))
    known = inspect.signature(FAMILIES[family]).parameters
    for name, value in params.items():
        if name not in known:
            raise OptionError(f"{family} has no parameter {name!r}", hint=nearest(name, known))
        kind = type(known[name].default)
        if type(value) is not kind or kind is int and value < (name == "group"):
            raise OptionError(f"{name} of {family} cannot be {value}", hint=f"by default it is {known[name].default}")
    return _made(family, tuple(sorted(params.items())))


@cache
def _made(family: str, params: tuple[tuple[str, Any], ...]) -> Codec:
    return FAMILIES[family](**dict(params))


__all__ = ["FAMILIES", "NUMPY", "Codec", "Plane", "Table", "codec", "decode", "encode", "from_bytes", "to_bytes"]
