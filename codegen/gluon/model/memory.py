"""Shared memory: who may touch its bytes, barriers that count, products and boxes on their way.

Every access is an event.  A partition *knows* the events that are certain to lie behind it: its own, those of the
parent before it began, and through a barrier's completed phase all that those who arrived had known.  A transfer is
known through the barrier that counts its bytes, a product through a wait that covers it.  A read needs to know every
write to the same bytes, a write every read and write: what nothing orders is a fault, whatever the order of this run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from memcomp.codegen.gluon.model.layouts import Layout
from memcomp.codegen.gluon.model.values import DType, Fault, Memory, Tensor, here

if TYPE_CHECKING:
    from memcomp.codegen.gluon.model.machine import Block

place = threading.local()   # block: of threads, that runs


def block() -> Block:
    """The block of threads that runs; Fault outside of one."""
    found: Block | None = getattr(place, "block", None)
    if found is None:
        raise Fault("this needs a kernel that runs")
    return found


@dataclass(eq=False, slots=True)
class Partition:
    """Warps that run one function.  known, fenced: events as bits; ready: None, or what it waits for."""

    name: str
    warps: int
    known: int = 0
    fenced: int = 0
    ready: Callable[[], bool] | None = None
    why: Callable[[], str] = str
    done: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    flight: list[Product] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Barrier:
    """count arrivals and as many bytes as were expected end a phase."""

    name: str
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    coming: tuple[int, int] = (0, 0)
    done: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return (f"{self.name}: phase {self.phase}, {self.pending} of {self.count} arrivals and "
                f"{self.bytes} bytes to come")

    def arrived(self, n: int, known: int, fenced: int) -> None:
        if n > self.pending:
            raise Fault(f"more arrivals than a phase has; {self}")
        self.pending -= n
        self.took(known, fenced)

    def took(self, known: int, fenced: int) -> None:
        self.coming = self.coming[0] | known, self.coming[1] | fenced
        if self.pending:
            return
        if self.bytes < 0:
            raise Fault(f"more bytes come than were expected; {self}")
        if not self.bytes:
            self.done = self.done[0] | self.coming[0], self.done[1] | self.coming[1]
            self.phase, self.pending, self.coming = self.phase + 1, self.count, (0, 0)


@dataclass(frozen=True, eq=False, slots=True)
class Mark:
    """An access to bytes of shared memory."""

    region: np.ndarray[Any, Any]
    event: int
    writes: bool
    plain: bool   # by the threads, not by the units beside them
    what: str


@dataclass(eq=False, slots=True)
class Allocation:
    name: str
    dtype: DType
    data: np.ndarray[Any, Any]
    marks: list[Mark] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)

    def overlapping(self, region: np.ndarray[Any, Any]) -> Iterator[Mark]:
        return (m for m in self.marks if np.shares_memory(m.region, region))

    def read(self, region: np.ndarray[Any, Any], event: int, plain: bool, who: Partition) -> None:
        written = False
        for m in self.overlapping(region):
            if m.writes:
                written = True
                if not m.event & who.known:
                    raise Fault(f"{self.name} is read and nothing has waited for the write at {m.what}")
                if m.plain and not plain and not m.event & who.fenced:
                    raise Fault(f"{self.name} is read by another unit with no fence after the write at {m.what}")
        if not written:
            raise Fault(f"{self.name} is read and nothing was written there")
        # who knows this read knows all that its partition knew: older reads of the same bytes need not be kept
        self.marks = [m for m in self.marks if m.writes or not m.event & who.known or not _same(m.region, region)]
        self.marks.append(Mark(region, event, False, plain, here()))

    def write(self, region: np.ndarray[Any, Any], event: int, plain: bool, who: Partition) -> None:
        for m in self.overlapping(region):
            if not m.event & who.known:
                raise Fault(f"{self.name} is written while it may be {'written' if m.writes else 'read'} at {m.what}")
        self.marks = [m for m in self.marks if not _same(m.region, region)]
        self.marks.append(Mark(region, event, True, plain, here()))


def _same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.ctypes.data == b.ctypes.data and a.shape == b.shape and a.strides == b.strides


class Shared:
    """A view of shared memory.  region: its elements as they lie there; data: as the view has them."""

    def __init__(self, of: Allocation, region: np.ndarray[Any, Any], data: np.ndarray[Any, Any],
                 layout: Layout) -> None:
        self.of, self.region, self.data, self.layout = of, region, data, layout

    @property
    def dtype(self) -> DType:
        return self.of.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    rank = property(lambda self: self.data.ndim)
    type = property(lambda self: self)

    @property
    def nbytes_per_cta(self) -> int:
        return int(self.data.size) * self.dtype.bits // 8

    def index(self, index: Any) -> Shared:
        at = int(index)
        if self.data.ndim < 2 or not 0 <= at < self.data.shape[0]:
            raise Fault(f"index {at} of {self.shape}")
        if self.region is not self.data:
            raise Fault("a permuted view is indexed")
        part = self.region[at]
        return Shared(self.of, part, part, self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if self.region is not self.data or start + length > self.data.shape[dim]:
            raise Fault(f"a slice of {start} + {length} along {dim} of {self.shape}")
        part = self.region[(slice(None),) * dim + (slice(start, start + length),)]
        return Shared(self.of, part, part, self.layout)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.of, self.region, self.data.transpose(order), self.layout)

    def reshape(self, shape: Sequence[int]) -> Shared:
        if self.region is not self.data or math.prod(shape) != self.data.size:
            raise Fault(f"{self.shape} as {list(shape)}")
        part = self.region.reshape(shape)
        if not np.shares_memory(part, self.region):
            raise Fault(f"{self.shape} as {list(shape)} is no view")
        return Shared(self.of, part, part, self.layout)

    def load(self, layout: Layout) -> Tensor:
        all_ = block()
        all_.step()
        self.of.read(self.region, all_.own(), True, all_.current)
        return Tensor(self.data.copy(), self.dtype, layout)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype is not self.dtype:
            raise Fault(f"{value} is stored to {self.dtype} {self.shape}")
        all_ = block()
        all_.step()
        self.of.write(self.region, all_.own(), True, all_.current)
        self.data[...] = value.data

    def _keep_alive(self) -> None:
        pass

    @property
    def barrier(self) -> Barrier:
        """The barrier there; Fault where there is none."""
        found = self.of.barriers.get(self.place)
        if found is None:
            raise Fault(f"{self.of.name} is no barrier that was initialised")
        return found

    @property
    def place(self) -> int:
        if self.data.size != 1 or self.dtype.name != "int64":
            raise Fault(f"{self.of.name} {self.shape} of {self.dtype} is no barrier")
        return int(self.region.ctypes.data - self.of.data.ctypes.data) // 8


@dataclass(eq=False, slots=True)
class Product:
    """left . right + total, on its way.  Operands are read when a wait covers it: what came between is seen in them."""

    left: Tensor | Shared
    right: Shared
    total: Tensor | Product
    adds: bool
    layout: Any
    event: int
    what: str
    value: np.ndarray[Any, Any] | None = None

    @property
    def dtype(self) -> DType:
        return self.total.dtype

    @property
    def shape(self) -> list[int]:
        return self.total.shape

    type = property(lambda self: self)

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"the product at {self.what} is read before a wait has handed it out ({name})")

    def finish(self) -> None:
        if self.value is None:
            out = self.left.data.astype(np.float32) @ self.right.data.astype(np.float32)
            if self.adds:
                base = self.total.value if isinstance(self.total, Product) else self.total.data
                out = base + out
            self.value = out.astype(self.dtype.numpy)

    def handed(self) -> Tensor:
        """The value as a tensor that raises when it is read too early."""
        if self.value is None:
            return Tensor(np.zeros(self.shape), self.dtype, self.layout, self)
        return Tensor(self.value, self.dtype, self.layout)


@dataclass(frozen=True, eq=False, slots=True)
class Transfer:
    """A box on its way to shared memory."""

    source: np.ndarray[Any, Any]
    to: Shared
    barrier: Barrier
    event: int
    what: str

    def finish(self) -> None:
        self.to.data[...] = self.source
        self.barrier.bytes -= self.to.nbytes_per_cta
        self.barrier.took(self.event, 0)


@dataclass(frozen=True, eq=False, slots=True)
class Box:
    """Part of a tensor in global memory: where its elements are, and which of them are in the tensor at all."""

    of: Memory
    places: np.ndarray[Any, Any]
    inside: np.ndarray[Any, Any]

    @staticmethod
    def at(of: Memory, offset: int, shape: Sequence[int], strides: Sequence[int], size: Sequence[int],
           start: Sequence[int]) -> Box:
        places, inside = np.full((), offset, np.int64), np.full((), True)
        for dim, (n, step, length, first) in enumerate(zip(shape, strides, size, start, strict=True)):
            i = (first + np.arange(length)).reshape((-1,) + (1,) * (len(size) - dim - 1))
            places, inside = np.asarray(places + i * step), np.asarray(inside & (i >= 0) & (i < n))
        if (inside & ((places < 0) | (places >= of.elements.size))).any():
            raise Fault(f"a box of {of.name} leaves its memory")
        return Box(of, np.where(inside, places, 0), inside)

    def load(self) -> np.ndarray[Any, Any]:
        """Its elements, zero outside of the tensor."""
        held = self.of.elements
        return np.where(self.inside, held[self.places] if held.size else 0, 0).astype(held.dtype)

    def store(self, data: np.ndarray[Any, Any]) -> None:
        self.of.elements[self.places[self.inside]] = data.reshape(self.places.shape)[self.inside]
