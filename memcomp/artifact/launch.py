"""Machine code on torch's tensors: on their device and its current stream, checked before every launch.

Nothing here waits for the device or reads a tensor's elements, and what is allocated comes from torch's allocator: a
call may be captured in a CUDA graph, once one call before has loaded the code.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from memcomp.artifact.driver import Core, Driver
from memcomp.codegen.launches import MOST, Argument, Form, Launch, Layout, fitting, packed, unit
from memcomp.ir.errors import Refusal
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Kernel, Param

Units: TypeAlias = tuple[int, ...]  # of a `Layout`
_CORE = Core()

# launches with their functions on a device, and how their arguments are packed
_Loaded: TypeAlias = tuple[tuple[Launch, Any, struct.Struct, tuple[int, ...]], ...]


class Launched:
    """A callable(*tensors, *sizes) in the order of the program's params and sizes; writes outputs in place.

    Tensors of one GPU, any strides.  Raises TypeError for a wrong number of arguments, and Refusal where a dtype, the
    GPU or what the machine code takes for granted is not as it must be.
    """

    def __init__(self, name: str, target: str, capability: int, params: Sequence[Param], sizes: Sequence[str],
                 usual: Callable[[Units], tuple[Argument, ...]], form: Callable[[Layout], Form],
                 driver: Driver = _CORE) -> None:
        """usual: all arguments, each once, and what they are multiples of where nothing is odd."""
        self.name, self.target, self.capability, self.params = name, target, capability, tuple(params)
        self.sizes, self._form, self._driver, self._usual = tuple(sizes), form, driver, lru_cache(maxsize=None)(usual)
        self._loaded: dict[tuple[int, Layout], _Loaded] = {}
        self._known: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    @staticmethod
    def of(kernel: Kernel, backend: Any, driver: Driver = _CORE) -> Launched:
        """A kernel that its backend compiles when it is called, for each layout of its tensors once."""
        from memcomp.ir.target import target

        def form(layout: Layout) -> Form:
            try:
                return fitting(backend.compiled(kernel, layout, kept=True), target(kernel.isa))
            except ModuleNotFoundError as error:
                raise Refusal(f"the backend {kernel.backend} needs {error.name}, which is not installed") from error

        return Launched(kernel.name, kernel.isa, target(kernel.isa).capability, kernel.program.params,
                        kernel.program.sizes, lambda units: backend.taken(kernel, units), form, driver)

    def __call__(self, *given: Any) -> None:
        tensors, sizes = self._taken(given)
        device = self._device(tensors.values())
        units = tuple(map(_unit, tensors.values()))
        args = self._usual(units)
        values = {a.name: self._value(a, tensors, sizes) for a in args}
        layout = Layout(units, frozenset(a.name for a in args if values[a.name] % a.multiple),
                        frozenset(a.name for a in args if _reach(a, values[a.name], tensors) > MOST.get(a.type, 2**64)))
        loaded = self._loaded.get((device, layout)) or self._load(device, layout, values)
        with self._driver.stream(device) as stream:
            for launch, kernel, form, places in loaded:
                grid = launch.blocks(sizes)
                if not all(grid):
                    continue
                if launch.together:
                    grid = (min(grid[0], self._driver.room(device, kernel, launch.block, launch.shared)), 1, 1)
                if launch.scratch:
                    scratch = self._scratch(device, grid[0] * grid[1] * grid[2] * launch.scratch)
                    values["scratch"] = scratch.data_ptr()
                data = form.pack(*(self._map(a, tensors[a.of]) if a.kind == "map" else values[a.name]
                                   for a in launch.args))
                self._driver.launch(kernel, stream, grid, launch.block, launch.shared, data, places,
                                    launch.together)

    def _taken(self, given: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, int]]:
        if len(given) != len(self.params) + len(self.sizes):
            raise TypeError(f"{self.name} takes {len(self.params)} tensors and {len(self.sizes)} sizes, "
                            f"got {len(given)} arguments")
        tensors = {p.name: t for p, t in zip(self.params, given, strict=False)}
        for name, dtype in self._dtypes():
            if tensors[name].dtype != dtype:
                raise Refusal(f"{self.name} takes {name} as {dtype}, not as {tensors[name].dtype}")
        return tensors, {r: int(n) for r, n in zip(self.sizes, given[len(self.params):], strict=True)}

    def _dtypes(self) -> list[tuple[str, Any]]:
        if not self._known:
            from memcomp.dtypes import DTYPES

            self._known = [(p.name, DTYPES[p.dtype]) for p in self.params]
        return self._known

    def _device(self, tensors: Iterable[Any]) -> int:
        devices = {t.device for t in tensors}
        if len(devices) != 1 or (device := devices.pop()).type != "cuda":
            raise Refusal(f"{self.name} is a kernel for a GPU and its tensors are not on one", self.target,
                          "move them to the device, or compile for a target of this machine")
        return int(device.index)

    def _value(self, a: Argument, tensors: dict[str, Any], sizes: dict[str, int]) -> int:
        if a.kind == "size":
            return sizes[a.of]
        if a.kind in ("pointer", "map"):
            return int(tensors[a.of].data_ptr())
        if a.kind == "extent":
            return int(tensors[a.of].shape[a.at])
        if a.kind == "stride":  # with one element or none nobody steps
            return int(tensors[a.of].stride(a.at)) if tensors[a.of].shape[a.at] > 1 else 0
        return 0

    def _map(self, a: Argument, t: Any) -> bytes:
        """The tensor at the positions of the map.  The driver takes no stride of less than 16 bytes, not even where
        nobody steps, and no extent of 0."""
        dtype = next(p.dtype for p in self.params if p.name == a.of)
        strides = tuple(BYTES[dtype] * t.stride(n) if t.shape[n] > 1 else a.multiple for n in a.places[:-1])
        return self._driver.map(dtype, t.data_ptr(), tuple(max(1, t.shape[n]) for n in a.places), strides, a.box,
                                a.swizzle)

    def _load(self, device: int, layout: Layout, values: Mapping[str, int]) -> _Loaded:
        there = self._driver.capability(device)
        if there != self.capability:
            raise Refusal(f"{self.name} is machine code for compute capability {self.capability / 10} ({self.target}), "
                          f"device {device} has {there / 10}", hint="compile for a target of that capability")
        args = self._usual(layout.units)
        odd = ", ".join([f"{a.name} = {values[a.name]} is no multiple of {a.multiple}" for a in args
                         if a.name in layout.loose] +
                        [f"{a.name} = {values[a.name]} reaches beyond 32 bits" for a in args if a.name in layout.wide])
        if any(a.kind == "size" for a in args if a.name in layout.wide):
            raise Refusal(f"{self.name} counts in 32 bits", odd)
        with self._lock:
            if (device, layout) not in self._loaded:
                try:
                    form = self._form(layout)
                except Refusal as error:
                    raise Refusal(error.what, "; ".join(s for s in (odd, error.where) if s), error.hint) from error
                self._loaded[device, layout] = tuple(
                    (x, self._driver.load(device, cubin, x.function, x.shared), *_packing(x.args))
                    for x, cubin in zip(form.launches, form.cubins, strict=True))
            return self._loaded[device, layout]

    def _scratch(self, device: int, size: int) -> Any:
        import torch

        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))


def _packing(args: Sequence[Argument]) -> tuple[struct.Struct, tuple[int, ...]]:
    """How the arguments lie one behind another, and where each begins."""
    text, end = "<", 0
    places = tuple(packed(args))
    for a, (at, size) in zip(args, places, strict=True):
        text += f"{at - end}x" * (at > end) + {"i32": "i", "i64": "q", "map": f"{size}s"}.get(a.type, "Q")
        end = at + size
    return struct.Struct(text), tuple(at for at, _ in places)


def _reach(a: Argument, x: int, tensors: Mapping[str, Any]) -> int:
    """The largest number that machine code makes of an argument in the argument's own bits: a tile multiplies a stride
    with the places of its points, of a tile that holds all of a rank with every place."""
    return abs(x) * max(1, tensors[a.of].shape[a.at] - 1) if a.kind == "stride" else abs(x)


def _unit(t: Any) -> int:
    """The position of stride 1: the last where it will do, which with one element there it always does."""
    strides = t.stride()
    return len(strides) - 1 if strides and t.shape[-1] <= 1 else unit(strides)
