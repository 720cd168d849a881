"""What Gluon computes with: element types, tensors in registers.

A tensor is a numpy array with the type and the layout that Gluon gives it.  bf16 is held as the f32 of the same value
and rounded after every operation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memcomp.codegen.gluon.model.layouts import AUTO, SliceLayout

TEXT = "<gluon "  # file names of modules that the model runs begin so


class Fault(Exception):
    """What the text does and a GPU would not forgive, with the line that does it."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}\n    {here()}" if here() else why)


def here() -> str:
    """The line of the text that runs."""
    import linecache

    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(TEXT):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    return f"line {frame.f_lineno}: {linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}"


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.  kind: b (truth values), i, u, f; hold: the numpy type that holds it."""

    name: str
    bits: int
    kind: str
    hold: str

    @property
    def primitive_bitwidth(self) -> int:
        return self.bits

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.hold)

    def __str__(self) -> str:
        return self.name


_WORDS = {"b": "int", "i": "int", "u": "uint", "f": "float"}
DTYPES = {f"{_WORDS[kind]}{bits}": DType(f"{_WORDS[kind]}{bits}", bits, kind, hold) for kind, bits, hold in (
    ("b", 1, "?"), ("i", 8, "i1"), ("i", 16, "i2"), ("i", 32, "i4"), ("i", 64, "i8"), ("u", 8, "u1"), ("u", 16, "u2"),
    ("u", 32, "u4"), ("u", 64, "u8"), ("f", 16, "f2"), ("f", 32, "f4"), ("f", 64, "f8"))}
DTYPES["bfloat16"] = DType("bfloat16", 16, "f", "f4")
STORED = {"bool": DTYPES["int1"], "bf16": DTYPES["bfloat16"]} | {
    f"{d.kind}{d.bits}": d for d in DTYPES.values() if d.kind != "b" and d.name != "bfloat16"}
BOOL, I32, I64, F32, F64, BF16 = (DTYPES[n] for n in ("int1", "int32", "int64", "float32", "float64", "bfloat16"))


@dataclass(frozen=True, slots=True)
class Memory:
    """A tensor in global memory as a pointer's type: its elements in the order of addresses."""

    element_ty: DType
    elements: np.ndarray[Any, Any]
    name: str


class Tensor:
    """A value in registers.

    layout: None of a single number.  flight: the product that makes it, where it was handed out before that had ended.
    """

    __slots__ = ("_data", "dtype", "flight", "layout")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Any, dtype: Any, layout: Any = None, flight: Any = None) -> None:
        self._data = np.asarray(data, dtype=np.int64 if isinstance(dtype, Memory) else dtype.numpy)
        self.dtype, self.layout, self.flight = dtype, layout if self._data.ndim else None, flight
        rank = getattr(layout, "rank", self._data.ndim)
        if self._data.ndim and rank != self._data.ndim:
            raise Fault(f"a tensor of {self._data.ndim} dims cannot have the layout {layout}")

    @property
    def data(self) -> np.ndarray[Any, Any]:
        if self.flight is not None:
            raise Fault(f"the product at {self.flight.what} is read after a wait that does not cover it")
        return self._data

    def handed(self) -> Tensor:
        """What a wait makes of it."""
        return self if self.flight is None else self.flight.handed()

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape)

    @property
    def type(self) -> Tensor:
        return self

    def __repr__(self) -> str:
        return f"<{self.dtype} {self.shape} {self.layout}>"

    def _single(self) -> Any:
        if self._data.ndim:
            raise Fault("a block is used where a single value must stand")
        return self.data.item()

    def __bool__(self) -> bool:
        return bool(self._single())

    def __int__(self) -> int:
        return int(self._single())

    def __index__(self) -> int:
        if self.dtype.kind not in "iub":
            raise Fault(f"{self.dtype} is no index")
        return int(self._single())

    def __float__(self) -> float:
        return float(self._single())

    def to(self, dtype: DType, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
        if fp_downcast_rounding not in (None, "rtne"):
            raise Fault(f"rounding {fp_downcast_rounding} is not modelled")
        return bits(self, dtype) if bitcast else cast(self, dtype)

    def broadcast_to(self, shape: Sequence[int]) -> Tensor:
        return Tensor(np.broadcast_to(self.data, tuple(shape)), self.dtype, self.layout)

    def __getitem__(self, key: Any) -> Tensor:
        out, axis = self, 0
        for k in key if isinstance(key, tuple) else (key,):
            if k is None:
                out = expand_dims(out, axis)
            elif k != slice(None):
                raise Fault("only None and : index a tensor")
            axis += 1
        return out

    def __add__(self, o: Any) -> Tensor: return binary("add", self, o)
    def __radd__(self, o: Any) -> Tensor: return binary("add", o, self)
    def __sub__(self, o: Any) -> Tensor: return binary("sub", self, o)
    def __rsub__(self, o: Any) -> Tensor: return binary("sub", o, self)
    def __mul__(self, o: Any) -> Tensor: return binary("mul", self, o)
    def __rmul__(self, o: Any) -> Tensor: return binary("mul", o, self)
    def __truediv__(self, o: Any) -> Tensor: return binary("truediv", self, o)
    def __rtruediv__(self, o: Any) -> Tensor: return binary("truediv", o, self)
    def __floordiv__(self, o: Any) -> Tensor: return binary("quotient", self, o)
    def __rfloordiv__(self, o: Any) -> Tensor: return binary("quotient", o, self)
    def __mod__(self, o: Any) -> Tensor: return binary("rest", self, o)
    def __rmod__(self, o: Any) -> Tensor: return binary("rest", o, self)
    def __lshift__(self, o: Any) -> Tensor: return binary("shl", self, o)
    def __rlshift__(self, o: Any) -> Tensor: return binary("shl", o, self)
    def __rshift__(self, o: Any) -> Tensor: return binary("shr", self, o)
    def __rrshift__(self, o: Any) -> Tensor: return binary("shr", o, self)
    def __and__(self, o: Any) -> Tensor: return binary("and", self, o)
    def __rand__(self, o: Any) -> Tensor: return binary("and", o, self)
    def __or__(self, o: Any) -> Tensor: return binary("or", self, o)
    def __ror__(self, o: Any) -> Tensor: return binary("or", o, self)
    def __xor__(self, o: Any) -> Tensor: return binary("xor", self, o)
    def __rxor__(self, o: Any) -> Tensor: return binary("xor", o, self)
    def __lt__(self, o: Any) -> Tensor: return binary("lt", self, o)
    def __le__(self, o: Any) -> Tensor: return binary("le", self, o)
    def __gt__(self, o: Any) -> Tensor: return binary("gt", self, o)
    def __ge__(self, o: Any) -> Tensor: return binary("ge", self, o)
    def __eq__(self, o: object) -> Any: return binary("eq", self, o)
    def __ne__(self, o: object) -> Any: return binary("ne", self, o)
    def __neg__(self) -> Tensor: return Tensor(-self.data, self.dtype, self.layout)
    def __invert__(self) -> Tensor: return Tensor(~self.data, self.dtype, self.layout)


def _quotient(a: Any, b: Any) -> Any:
    """Rounds to zero, as machines do."""
    q = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where((a < 0) != (b < 0), -q, q)


_OPS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "quotient": _quotient,
    "rest": np.fmod, "shl": np.left_shift, "shr": np.right_shift, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": np.not_equal, "most": np.fmax, "least": np.fmin, "highest": np.maximum, "lowest": np.minimum,
}
_TRUTHS = ("lt", "le", "gt", "ge", "eq", "ne")
_WHOLE = ("quotient", "shl", "shr", "and", "or", "xor")


def binary(name: str, a: Any, b: Any) -> Tensor:
    """An operation on two tensors, or a tensor and a number, as Gluon types it."""
    a, b, dtype = together(a, b, name)
    if isinstance(dtype, Memory):
        return Tensor(_OPS[name](a.data, b.data), dtype, layout_of(a, b))
    if name in _WHOLE and dtype.kind == "f":
        raise Fault(f"{name} of {dtype}")
    out = _OPS[name](cast(a, dtype).data, cast(b, dtype).data)
    return rounded(out, BOOL if name in _TRUTHS else dtype, layout_of(a, b))


def rounded(data: Any, dtype: DType, layout: Any) -> Tensor:
    """Numbers as a tensor of this type: bf16 to the nearest, ties to even."""
    if dtype is BF16:
        x = np.ascontiguousarray(data, np.float32)
        i = x.view(np.uint32)
        up = ((i + np.uint32(0x7FFF) + ((i >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
        data = np.where(np.isnan(x), x, up).reshape(np.shape(data))
    return Tensor(data, dtype, layout)


def cast(x: Tensor, dtype: DType) -> Tensor:
    if x.dtype is dtype:
        return x
    if isinstance(x.dtype, Memory):
        raise Fault("a pointer is converted")
    return rounded(x.data.astype(dtype.numpy) if dtype.kind != "b" else x.data != 0, dtype, x.layout)


def bits(x: Tensor, dtype: DType) -> Tensor:
    """The same bits as another type."""
    if x.dtype.bits != dtype.bits:
        raise Fault(f"bits of {x.dtype} as {dtype}")
    if BF16 in (x.dtype, dtype):
        if dtype is BF16:
            return Tensor((x.data.astype(np.uint32) << 16).view(np.float32), dtype, x.layout)
        return Tensor((x.data.view(np.uint32) >> 16).astype(dtype.numpy), dtype, x.layout)
    return Tensor(x.data.view(dtype.numpy), dtype, x.layout)


def tensor(x: Any, dtype: DType | None = None) -> Tensor:
    """A number as a tensor."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, bool | np.bool_):
        return Tensor(x, dtype or BOOL)
    if isinstance(x, int | np.integer):
        return Tensor(x, dtype or (I32 if -2**31 <= x < 2**31 else I64))
    if isinstance(x, float):
        return Tensor(x, dtype or F32)
    raise Fault(f"{type(x).__name__} {x!r} is no value")


def together(a: Any, b: Any, name: str = "") -> tuple[Tensor, Tensor, Any]:
    """Both of one shape, and the type to compute in."""
    weak = [not isinstance(x, Tensor) for x in (a, b)]
    a, b = tensor(a), tensor(b)
    if isinstance(a.dtype, Memory) or isinstance(b.dtype, Memory):
        if name not in ("add", "sub") or isinstance(b.dtype, Memory) and (name == "sub" or isinstance(a.dtype, Memory)):
            raise Fault(f"{name} of {a} and {b}")
        dtype: Any = a.dtype if isinstance(a.dtype, Memory) else b.dtype
    else:
        dtype = common(a.dtype, b.dtype, weak, name)
    layout_of(a, b)
    if a.shape and b.shape:
        if len(a.shape) != len(b.shape) or any(m != n and 1 not in (m, n)
                                               for m, n in zip(a.shape, b.shape, strict=True)):
            raise Fault(f"shapes {a.shape} and {b.shape} do not go together")
    return a, b, dtype


def common(a: DType, b: DType, weak: Sequence[bool], name: str) -> DType:
    """Triton's rule: a literal of a lower or equal kind takes the tensor's type; else floats win, then wider ones."""
    order = {"b": 0, "i": 1, "u": 1, "f": 2}
    divides = name in ("truediv", "rest")
    if weak[0] != weak[1]:
        literal, other = (a, b) if weak[0] else (b, a)
        if order[literal.kind] <= order[other.kind]:
            a = b = other
    if "f" in (a.kind, b.kind):
        floats = {x for x in (a, b) if x.kind == "f"}
        wide = max(floats, key=lambda x: x.bits)
        return F32 if len(floats) == 2 and wide.bits == 16 or wide.bits == 16 and divides else wide
    if name == "truediv":
        return F32
    if a.bits == b.bits and {a.kind, b.kind} == {"i", "u"}:
        return a if a.kind == "u" else b
    return max(a, b, key=lambda x: x.bits)


def layout_of(*tensors: Tensor) -> Any:
    """The one layout of all that are blocks."""
    known = [t.layout for t in tensors if t.shape and t.layout is not AUTO]
    for other in known[1:]:
        if other != known[0]:
            raise Fault(f"layouts differ: {known[0]} and {other}")
    return known[0] if known else AUTO


def expand_dims(x: Tensor, axis: int) -> Tensor:
    if not x.shape:
        raise Fault("a single value has no dims")
    axis += (len(x.shape) + 1) * (axis < 0)
    if x.layout is AUTO:
        return Tensor(np.expand_dims(x.data, axis), x.dtype, AUTO)
    if not isinstance(x.layout, SliceLayout) or x.layout.dim != axis:
        raise Fault(f"a new dim {axis} of a tensor whose layout is {x.layout}")
    return Tensor(np.expand_dims(x.data, axis), x.dtype, x.layout.parent)


def without(layout: Any, axis: int, rank: int) -> Any:
    """The layout of what a reduction over an axis leaves."""
    return None if rank == 1 else AUTO if layout is AUTO else SliceLayout(axis, layout)
