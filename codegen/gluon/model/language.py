"""The words of `triton.experimental.gluon` that emitted text uses, as Python functions on the model's values."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from memcomp.codegen.gluon.model import layouts, tensors
from memcomp.codegen.gluon.model import values as v
from memcomp.codegen.gluon.model.memory import Box, Product, Shared, block
from memcomp.codegen.gluon.model.values import DTYPES, F32, I32, I64, DType, Fault, Memory, Tensor

_WIDE = 0x5555_5555  # what a masked load without `other` gives: nothing that is meant


def constexpr(x: Any) -> Any:
    """What is known when the text is compiled; here a value like any."""
    return x


def jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda f: f


# memory

def _addresses(pointer: Tensor, mask: Any) -> tuple[Memory, Any, Any]:
    if not isinstance(pointer, Tensor) or not isinstance(pointer.dtype, Memory):
        raise Fault(f"{pointer!r} is no pointer")
    inside: Any = True
    if mask is not None:
        mask = v.tensor(mask)
        v.layout_of(pointer, mask)
        inside = mask.data != 0
    places, inside = np.broadcast_arrays(pointer.data, inside)
    if pointer.shape != list(places.shape):
        raise Fault(f"a mask of {mask.shape} for pointers of {pointer.shape}")
    wrong = inside & ((places < 0) | (places >= pointer.dtype.elements.size))
    if wrong.any():
        of = pointer.dtype
        raise Fault(f"{of.name} has {of.elements.size} elements; element {places[wrong][0]} is named")
    return pointer.dtype, np.where(inside, places, 0), inside


def load(pointer: Tensor, mask: Any = None, other: Any = None, **_: Any) -> Tensor:
    of, places, inside = _addresses(pointer, mask)
    kind = of.element_ty
    rest = v.cast(v.tensor(other), kind).data if other is not None else (
        np.nan if kind.kind == "f" else False if kind.kind == "b" else np.array(_WIDE).astype(kind.numpy))
    found = of.elements[places] if of.elements.size else np.zeros(places.shape, kind.numpy)
    return Tensor(np.where(inside, found, rest), kind, pointer.layout)


def store(pointer: Tensor, value: Any, mask: Any = None, **_: Any) -> None:
    of, places, inside = _addresses(pointer, mask)
    value = v.tensor(value)
    v.layout_of(pointer, value)
    data = np.broadcast_to(v.cast(value, of.element_ty).data, places.shape)
    of.elements[places[inside]] = data[inside]


def allocate_shared_memory(element_ty: DType, shape: Sequence[int], layout: Any, value: Tensor | None = None) -> Shared:
    made = block().allocate(element_ty, shape, layout)
    if value is not None:
        made.store(value)
    return made


class Descriptor:
    """A tensor in global memory and the box that one transfer takes of it."""

    def __init__(self, pointer: Tensor, shape: Sequence[Any], strides: Sequence[Any], block_shape: Sequence[int],
                 layout: Any, padding_option: str = "zero") -> None:
        self.of, self.offset = pointer.dtype, int(pointer)
        self.shape, self.strides = [int(n) for n in shape], [int(n) for n in strides]
        self.block_shape, self.layout, self.dtype = [int(n) for n in block_shape], layout, pointer.dtype.element_ty
        size = self.dtype.bits // 8
        if padding_option != "zero":
            raise Fault("only zeros are put around tensors")
        if not 1 <= len(self.shape) == len(self.strides) == len(self.block_shape) <= 5:
            raise Fault(f"shape {self.shape}, strides {self.strides}, box {self.block_shape}")
        if self.strides[-1] != 1 or self.offset * size % 16 or any(s * size % 16 for s in self.strides[:-1]):
            raise Fault(f"{self.of.name}: strides {self.strides} of {size} bytes from {self.offset}, not all of 16")
        if any(n > 256 for n in self.block_shape[:-1]) or self.block_shape[-1] * size < 16:
            raise Fault(f"a box of {self.block_shape}")
        if layout.element_bitwidth != self.dtype.bits or layout.rank != len(self.block_shape):
            raise Fault(f"a box of {self.block_shape} {self.dtype} has the layout {layout}")

    type = property(lambda self: self)
    block_type = property(lambda self: self)

    @property
    def nbytes_per_cta(self) -> int:
        return math.prod(self.block_shape) * int(self.dtype.bits) // 8

    def box(self, at: Sequence[Any], view: Shared) -> Box:
        """The part that begins at these coordinates and has the shape of the view."""
        shape = [*self.block_shape]
        while len(shape) > len(view.shape) and shape[0] == 1:
            shape.pop(0)
        if shape != view.shape or self.dtype is not view.dtype:
            raise Fault(f"a box of {self.block_shape} {self.dtype} for {view.shape} {view.dtype}")
        if len(at) != len(self.shape) or any(isinstance(x, Tensor) and x.dtype is not I32 for x in at):
            raise Fault(f"coordinates {list(at)} for {self.shape}: one i32 for each dim")
        return Box.at(self.of, self.offset, self.shape, self.strides, self.block_shape, [int(x) for x in at])


def fetch(descriptor: Descriptor, at: Sequence[Any], barrier: Shared, result: Shared, pred: Any = True,
          multicast: bool = False, cache_policy: Any = None) -> None:
    if multicast:
        raise Fault("one block takes part")
    part = descriptor.box(at, result)
    if pred:
        block().transfer(part.load().reshape(result.shape), result, barrier)


def send(descriptor: Descriptor, at: Sequence[Any], source: Shared, cache_policy: Any = None) -> None:
    block().send(source, descriptor.box(at, source))


def store_wait(pendings: int, read_only: bool = True) -> None:
    block().sent(int(pendings))


# barriers

def init(barrier: Shared, count: int) -> None:
    block().init(barrier, count)


def invalidate(barrier: Shared) -> None:
    del barrier.of.barriers[barrier.place]


def expect(barrier: Shared, bytes: int, pred: Any = True) -> None:
    if pred:
        block().arrive(barrier, 1, int(bytes))


def arrive(barrier: Shared, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        block().arrive(barrier, int(count))


def wait(barrier: Shared, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    if pred:
        block().wait(barrier, phase)


# products

def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: Any = True, precision: Any = None,
                  max_num_imprecise_acc: Any = None, is_async: bool = False) -> Any:
    if isinstance(a, Tensor):
        kind = a.layout
        if not isinstance(kind, layouts.DotOperandLayout) or kind.operand_index or kind.parent != acc.layout:
            raise Fault(f"a left operand whose layout is {kind}, for a sum whose layout is {acc.layout}")
        if kind.k_width != 32 // a.dtype.bits:
            raise Fault(f"k_width {kind.k_width} of {a.dtype}")
    if not isinstance(acc.layout, layouts.NVMMADistributedLayout) or tuple(acc.layout.version) != (3, 0):
        raise Fault(f"a sum whose layout is {acc.layout}")
    for x in (a, b):
        if isinstance(x, Shared) and not isinstance(x.layout, layouts.NVMMASharedLayout):
            raise Fault(f"an operand in shared memory whose layout is {x.layout}")
        if not isinstance(x, Shared | Tensor) or x is b and not isinstance(x, Shared):
            raise Fault(f"{x!r} is no operand")
    (m, k), (depth, n) = a.shape, b.shape
    if k != depth or [m, n] != acc.shape or a.dtype is not b.dtype or a.dtype.bits != 16 or acc.dtype is not F32:
        raise Fault(f"{a.dtype} {a.shape} x {b.dtype} {b.shape} + {acc.dtype} {acc.shape}")
    rows, (_, columns, step) = 16 * acc.layout.warps_per_cta[0], acc.layout.instr_shape
    if m % rows or n % columns or columns % 8 or columns > 256 or step != 256 // a.dtype.bits:
        raise Fault(f"a product of {m} x {n} x {k} as {acc.layout}")
    if math.prod(acc.layout.warps_per_cta) != block().current.warps:
        raise Fault(f"{acc.layout} in a partition of {block().current.warps} warps")
    made = block().product(a, b, acc, bool(use_acc))
    return made if is_async else warpgroup_mma_wait(0, [made])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
    if not deps:
        raise Fault("a wait hands out what it is given, and is given nothing")
    block().drain(int(num_outstanding))
    out = tuple(x.handed() if isinstance(x, Product | Tensor) else x for x in deps)
    return out[0] if len(out) == 1 else out


def fence_async_shared(cluster: bool = False) -> None:
    block().fence()


# programs

def program_id(axis: int) -> Tensor:
    return Tensor(block().program[axis], I32)


def num_programs(axis: int) -> Tensor:
    return Tensor(block().grid[axis], I32)


def num_warps() -> int:
    return block().current.warps


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Fault(f"static_assert: {message}")


def counted(*ends: Any) -> Iterator[Any]:
    """`range`: what it counts is a value of the run, unless every end is known when the text is compiled."""
    if not any(isinstance(x, Tensor) for x in ends):
        yield from builtins.range(*ends)
        return
    wide = any(isinstance(x, Tensor) and x.dtype.bits > 32 for x in ends)
    for i in builtins.range(*(int(x) for x in ends)):
        yield Tensor(i, I64 if wide else I32)


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _nothing(*_: Any, **__: Any) -> None:
    pass


def modules() -> dict[str, ModuleType]:
    """Every module that text may import of Triton, by its name."""
    out: dict[str, ModuleType] = {}
    hopper = ".experimental.gluon.language.nvidia.hopper"
    parents = [hopper[:n] for n, c in enumerate(hopper) if c == "."]
    for name in (f"triton{x}" for x in (*parents, ".language", hopper, f"{hopper}.mbarrier", f"{hopper}.tma")):
        out[name] = ModuleType(name)
        above, _, last = name.rpartition(".")
        if above:
            setattr(out[above], last, out[name])
    gluon, gl = out["triton.experimental.gluon"], out["triton.experimental.gluon.language"]
    units = out[f"triton{hopper}"]
    gluon.__dict__.update(jit=jit, constexpr_function=jit)
    gl.__dict__.update(DTYPES)
    gl.__dict__.update({n: getattr(layouts, n) for n in layouts.__all__})
    gl.__dict__.update({n: getattr(tensors, n) for n in tensors.__all__})
    gl.__dict__.update(tensors.NAMED)
    for f in (constexpr, load, store, program_id, num_programs, num_warps, static_assert, allocate_shared_memory):
        setattr(gl, f.__name__, f)
    gl.__dict__.update(
        static_range=builtins.range, multiple_of=_same, max_contiguous=_same, max_constancy=_same, assume=_nothing,
        device_print=_nothing, static_print=_nothing, barrier=lambda: block().step(), num_ctas=lambda: 1,
        expand_dims=v.expand_dims, to_tensor=v.tensor, tensor=Tensor, shared_memory_descriptor=Shared,
        warp_specialize=lambda functions, warps, registers=None: block().specialize(functions, warps))
    out["triton.language"].__dict__["PropagateNan"] = type("PropagateNan", (), {"ALL": "all", "NONE": "none"})
    units.__dict__.update(warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
                          fence_async_shared=fence_async_shared)
    units.mbarrier.__dict__.update(
        MBarrierLayout=layouts.MBarrierLayout, init=init, invalidate=invalidate, expect=expect, arrive=arrive,
        wait=wait)
    units.tma.__dict__.update(
        async_load=fetch, async_copy_global_to_shared=fetch, async_store=send, async_copy_shared_to_global=send,
        store_wait=store_wait, make_tensor_descriptor=Descriptor)
    return out
