"""A kernel of an artifact as a function of its inputs, whoever's tensors these are: torch's, numpy's, any with DLPack.

What a call needs besides the launch is found once for each combination of shapes.  The machine code itself looks at
dtypes, shapes, strides and devices; what it refuses is looked at again here, for a sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from memcomp.artifact.manifest import Code, KernelSpec, Lookup, TensorSpec, expression, expressions
from memcomp.artifact.memory import OURS, Array, copied, fresh, steps_of, tensor
from memcomp.codegen.launches import value
from memcomp.ir.errors import Refusal
from memcomp.sizes import sources

MOST = 256  # combinations of shapes that are remembered
Shaped: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each of some tensors
Fresh: TypeAlias = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # and strides
Maker: TypeAlias = Callable[[str, tuple[int, ...], tuple[int, ...]], Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """What one combination of shapes comes to.  idle: no output has an element."""

    outputs: Fresh
    work: Fresh
    numbers: tuple[int, ...]
    bounds: tuple[int, ...]
    idle: bool


class Kernel:
    """function: the machine code, (*inputs, *outputs, *work, *numbers); writes outputs and work in place."""

    def __init__(self, spec: KernelSpec, code: Code, device: str, function: Callable[..., Any]) -> None:
        self.name, self.spec, self.code, self.device, self.function = spec.name, spec, code, device, function
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self._shapes = [expressions(t.shape) for t in spec.inputs]
        self._shown = sources(self._shapes)
        self._numbers = expressions(code.sizes)
        self._calls: dict[Any, _Call] = {}

    def __call__(self, *inputs: Any, **sizes: int) -> tuple[Any, ...]:
        """The outputs: torch's tensors where the first input is one, on its device, else numpy's arrays (`memory.Array`
        where numpy has no such dtype).  sizes: those that no input's shape shows.

        Inputs whose last stride is not 1 are copied first.  Raises Refusal for a wrong number of inputs, dtype, rank,
        shape, size or device, and where a gradient is asked for; IndexError as torch does.
        """
        try:
            key: Any = tuple([x.shape for x in inputs])
            call = self._calls.get((key, *sizes.items()) if sizes else key)
        except (AttributeError, TypeError):
            call = None
        if call is None:
            call = self._found(inputs, sizes)
        torch: Any = sys.modules.get("torch")
        if torch is not None and inputs and isinstance(inputs[0], torch.Tensor):
            make = _torchs(torch, inputs)
        elif self.device == "cpu":
            make = _fresh
        else:
            raise Refusal(f"{self.name} is a kernel for a GPU and takes torch's tensors", self.device)
        outs = [make(*x) for x in call.outputs]
        if call.idle:
            return tuple(outs)
        rest = (*outs, *[make(*x) for x in call.work], *call.numbers)
        try:
            self._run(inputs, rest, call.bounds)
        except (TypeError, ValueError, BufferError, RuntimeError) as error:
            self._run(self._usable(inputs, error), rest, call.bounds)
        return tuple(outs)

    def work(self, sizes: Mapping[str, int]) -> Shaped:
        """Memory that a call needs for itself."""
        return _shaped(self.code.work, sizes)

    def arguments(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The numbers at the end of a call of `function`."""
        return tuple(value(e, sizes) for e in self._numbers)

    def _run(self, inputs: Sequence[Any], rest: Sequence[Any], bounds: Sequence[int]) -> None:
        for look, bound in zip(self.spec.lookups, bounds, strict=True):
            _look(look, inputs[look.input], bound)
        self.function(*inputs, *rest)

    def _found(self, inputs: Sequence[Any], given: Mapping[str, int]) -> _Call:
        if len(inputs) != len(self.inputs):
            raise Refusal(f"{self.name} takes {len(self.inputs)} inputs, got {len(inputs)}",
                          ", ".join(t.name for t in self.inputs))
        for t, x in zip(self.inputs, inputs, strict=True):
            if len(getattr(x, "shape", ())) != len(t.shape) or not hasattr(x, "shape"):
                raise Refusal(f"{self.name} takes {t.name} as a tensor of rank {len(t.shape)}, not "
                              f"{f'one of rank {len(x.shape)}' if hasattr(x, 'shape') else type(x).__name__}")
        sizes = {r: int(inputs[i].shape[d]) // divisor for r, (i, d, divisor) in self._shown.items()}
        for r in self.spec.sizes:
            if r.name not in sizes and r.name not in given:
                raise Refusal(f"{self.name} needs the size {r.name}, which no input's shape shows",
                              hint=f"{self.name}(..., {r.name}=...)")
        if unknown := sorted(given.keys() - {r.name for r in self.spec.sizes} | given.keys() & sizes.keys()):
            raise Refusal(f"{self.name} takes no size {unknown[0]}, or finds it in a shape")
        sizes |= {name: int(n) for name, n in given.items()}
        for r in self.spec.sizes:
            if sizes[r.name] < r.least or r.most is not None and sizes[r.name] > r.most:
                raise Refusal(f"{self.name} takes {r.name} from {r.least} to {'any' if r.most is None else r.most}, "
                              f"not {sizes[r.name]}")
        for t, shape, x in zip(self.inputs, self._shapes, inputs, strict=True):
            want = tuple(value(e, sizes) for e in shape)
            if tuple(x.shape) != want:
                raise Refusal(f"{self.name} takes {t.name} of shape {list(want)}, not {list(x.shape)}",
                              f"[{', '.join(t.shape)}]")
        outputs = _shaped(self.outputs, sizes)
        call = _Call(_strided(outputs), _strided(self.work(sizes)), self.arguments(sizes),
                     tuple(value(expression(x.size), sizes) for x in self.spec.lookups),
                     all(0 in shape for _, shape in outputs))
        if len(self._calls) >= MOST:
            self._calls.clear()
        key = tuple([x.shape for x in inputs])
        self._calls[(key, *given.items()) if given else key] = call
        return call

    def _usable(self, inputs: Sequence[Any], error: Exception) -> list[Any]:
        """Inputs that machine code takes, after it did not take these: copied row by row where strides were the reason.
        Refusal where it will not take them."""
        made = []
        for t, x in zip(self.inputs, inputs, strict=True):
            try:
                seen = tensor(x.detach() if hasattr(x, "detach") else x)
                dtype, device = str(seen.dtype), str(seen.device).partition(":")[0]
            except Exception as odd:  # what DLPack's many writers raise is not of one class
                why = str(odd).splitlines()[0]
                raise Refusal(f"{self.name} cannot take {t.name}: {why}", type(x).__name__) from odd
            if OURS.get(dtype) != t.dtype:
                raise Refusal(f"{self.name} takes {t.name} as {t.dtype}, not as {OURS.get(dtype, dtype)}")
            if device != self.device:
                raise Refusal(f"{self.name} takes tensors of the device {self.device}, and {t.name} is on {device}")
            made.append(_rows(x, seen))
        if all(a is b for a, b in zip(made, inputs, strict=True)):
            raise error
        return made


def _shaped(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> Shaped:
    return tuple((t.dtype, tuple(value(e, sizes) for e in expressions(t.shape))) for t in specs)


def _strided(tensors: Shaped) -> Fresh:
    return tuple((dtype, shape, steps_of(shape)) for dtype, shape in tensors)


def _torchs(torch: Any, inputs: Sequence[Any]) -> Maker:
    """What makes tensors of torch's, where the first input is."""
    if torch.is_grad_enabled():
        for x in inputs:
            if getattr(x, "requires_grad", False):
                raise Refusal("a kernel of an artifact has no gradient", hint="call it under torch.no_grad()")
    if inputs[0].is_cpu:
        return _on_cpu()
    from memcomp.dtypes import DTYPES

    return lambda dtype, shape, _: torch.empty(shape, dtype=DTYPES[dtype], device=inputs[0].device)


@lru_cache(maxsize=1)
def _on_cpu() -> Maker:
    from memcomp.dtypes import DTYPES

    make = empty_strided()
    return lambda dtype, shape, strides: make(shape, strides, DTYPES[dtype])


def empty_strided() -> Callable[..., Any]:
    """torch's (shape, strides, dtype) -> a tensor in this memory."""
    torch: Any = import_module("torch")
    try:
        return torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[no-any-return]  # Inductor's: half of the time
    except AttributeError:
        return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)


def _fresh(dtype: str, shape: tuple[int, ...], _: tuple[int, ...]) -> Any:
    return fresh(dtype, shape)


def _rows(x: Any, seen: Any) -> Any:
    """The same elements row by row; itself where it lies so."""
    step, rows = 1, True
    for n, stride in zip(reversed(seen.shape), reversed(seen.strides), strict=True):
        rows, step = rows and stride == step, step * n
    if isinstance(x, np.ndarray):
        return x if rows and x.flags.writeable else copied(Array(OURS[x.dtype.name], x)).data
    if isinstance(x, Array):
        return x if rows else copied(x)
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return x if rows else x.new_empty(x.shape).copy_(x)
    if not rows:
        raise Refusal("a tensor must lie row by row", type(x).__name__, "copy it")
    return seen


def _look(look: Lookup, x: Any, size: int) -> None:
    """IndexError where an element names a place that does not exist; on a GPU the device stops, and nobody waits."""
    low = -size if look.wraps else 0

    def wrong(index: Any) -> Any:
        bad = (index < low) | (index >= size)
        return bad if look.ignored is None else bad & (index != look.ignored)

    if getattr(x, "is_cuda", False):
        torch: Any = sys.modules["torch"]
        torch._assert_async(torch.logical_not(wrong(x).any()),
                            f"an index is out of bounds for a dimension of {size} elements")
        return
    index = np.from_dlpack(x) if hasattr(x, "__dlpack__") and not isinstance(x, np.ndarray) else x
    if index.size and (index.min() < low or index.max() >= size) and (bad := wrong(index)).any():
        raise IndexError(f"index {int(index[bad][0])} is out of bounds for a dimension of {size} elements")
