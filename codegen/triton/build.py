"""Kernel text -> a callable: launched on the GPU that its tensors are on, or run by Triton's interpreter."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memcomp.codegen.triton.arguments import Arguments, arguments
from memcomp.codegen.triton.emit import emit, function_names
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const, Expr, Size, children
from memcomp.ir.ops import OPS
from memcomp.ir.tile import Kernel, TileProgram

Units = tuple[int, ...]


def build(kernel: Kernel) -> Callable[..., None]:
    """A callable(*tensors, *sizes) in the order of the program's params and sizes; writes outputs in place.

    Tensors on a GPU, any strides.  Raises TypeError for a wrong number of arguments, Refusal where tensors are not on a
    GPU (`interpreted` runs them there) or where the text does not compile.
    """
    return Launch(kernel)


@dataclass(frozen=True, slots=True)
class Call:
    """One launch: function of the text, program instances, and what it is given: numbers, or which tensor."""

    function: str
    grid: int
    args: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """The text for one layout of the tensors, and by launch the function's name and what it takes."""

    source: str
    functions: tuple[tuple[str, Arguments], ...]

    @staticmethod
    def of(tp: TileProgram, units: Units, source: str) -> Form:
        return Form(source, tuple((name, arguments(tp, k, units))
                                  for k, name in zip(tp.kernels, function_names(tp), strict=True)))

    def calls(self, tp: TileProgram, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> list[Call]:
        """The launches on these tensors."""
        out = []
        for k, (name, taken) in zip(tp.kernels, self.functions, strict=True):
            args = tuple(a.of if a.kind == "pointer" else int(tensors[a.of].stride(a.at)) if a.kind == "stride"
                         else sizes[a.of] for a in taken.args)
            out.append(Call(name, math.prod(value(extent, sizes) for _, extent in k.grid), args))
        return out


class Launch:
    """A kernel and its texts by the layout of its tensors."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        usual = tuple(len(p.shape) - 1 for p in kernel.program.params)
        self._forms = {usual: Form.of(kernel.program, usual, kernel.source)}
        self._lock = threading.Lock()

    def __call__(self, *given: Any) -> None:
        from memcomp.codegen.triton.offline import module

        tensors, source, calls = self.prepared(given)
        if any(not t.is_cuda for t in tensors.values()):
            raise Refusal(f"{self.kernel.name} is a kernel for a GPU and its tensors are not on one",
                          self.kernel.isa, "move them to the device, or compile for a target of this machine")
        functions = module(source)
        for c in calls:
            if c.grid:
                args = (tensors[a] if isinstance(a, str) else a for a in c.args)
                getattr(functions, c.function)[(c.grid,)](*args, **functions.SETTINGS[c.function])

    def prepared(self, given: tuple[Any, ...]) -> tuple[dict[str, Any], str, list[Call]]:
        """The tensors by param, the text for their layout, and the launches."""
        tp = self.kernel.program
        if len(given) != len(tp.params) + len(tp.sizes):
            raise TypeError(f"{tp.name} takes {len(tp.params)} tensors and {len(tp.sizes)} sizes, "
                            f"got {len(given)} arguments")
        tensors = {p.name: t for p, t in zip(tp.params, given, strict=False)}
        sizes = {r: int(n) for r, n in zip(tp.sizes, given[len(tp.params):], strict=True)}
        form = self._form(tuple(_unit(t) for t in tensors.values()))
        return tensors, form.source, form.calls(tp, tensors, sizes)

    def _form(self, units: Units) -> Form:
        with self._lock:
            if units not in self._forms:
                tp = self.kernel.program
                self._forms[units] = Form.of(tp, units, emit(tp, self.kernel.isa, units).source)
            return self._forms[units]


def value(e: Expr, sizes: Mapping[str, int]) -> int:
    """An extent in numbers."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Size):
        return sizes[e.rank]
    return int(OPS[e.op].numpy(*(value(x, sizes) for x in children(e))))  # type: ignore[union-attr]


def _unit(t: Any) -> int:
    """The position with stride 1, the last if there are several, -1 if there is none."""
    strides = t.stride()
    return next((k for k in range(len(strides) - 1, -1, -1) if strides[k] == 1), -1)
