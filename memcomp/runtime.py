"""The torch op that runs a compiled region, its registry, and the counts of what happened.

`memcomp::call(Tensor[] inputs, SymInt[] sizes, str key) -> Tensor[]` runs the region registered under `key`;
`memcomp::overwrite` writes its result over one of the inputs.  The key is a digest of everything the result depends on:
a graph that Inductor stored on disk can never bind another kernel.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad

from memcomp.ir.errors import Refusal

Tensors: TypeAlias = Sequence[torch.Tensor]
Extents: TypeAlias = Callable[[Tensors, Sequence[Any]], Any]
Prepare: TypeAlias = Callable[[Tensors, Sequence[int]], tuple[list[torch.Tensor], list[Any]]]


class Fallback(UserWarning):
    """A region (or the rest) runs through torch; the text names it and says why."""


class _Counts:
    """What happened since the last `reset`, safe from several threads and after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self.regions = self.launches = self.graphs = self.recompilations = 0
        self.kernels: set[str] = set()
        self.fallbacks: Counter[str] = Counter()


_COUNTS = _Counts()


def _after_fork() -> None:
    _COUNTS.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def stats() -> dict[str, Any]:
    """Counts since the last `reset`.

    regions: regions handed to kernels; kernels: distinct kernels they use; launches: kernel launches;
    fallbacks: {reason: count}, empty when none; graphs: graphs torch handed over; recompilations: those of them that
    are another version of a function compiled before.
    """
    with _COUNTS.lock:
        return {"regions": _COUNTS.regions, "kernels": len(_COUNTS.kernels), "launches": _COUNTS.launches,
                "fallbacks": dict(_COUNTS.fallbacks), "graphs": _COUNTS.graphs,
                "recompilations": _COUNTS.recompilations}


def reset() -> None:
    """Zero the counts and drop in-process caches; functions compiled before keep running."""
    from memcomp.pipeline import forget

    forget()
    with _COUNTS.lock:
        _COUNTS.clear()


def count_graph(again: bool) -> None:
    """torch handed over a graph; `again`: of code that was compiled before."""
    with _COUNTS.lock:
        _COUNTS.graphs += 1
        _COUNTS.recompilations += again


def count_region(kernel: str) -> None:
    with _COUNTS.lock:
        _COUNTS.regions += 1
        _COUNTS.kernels.add(kernel)


def fall_back(where: str, reason: str, keeper: str = "torch") -> None:
    """Count a fallback, and warn once per reason: which part stays with whom and why."""
    with _COUNTS.lock:
        first = reason not in _COUNTS.fallbacks
        _COUNTS.fallbacks[reason] += 1
    if first:
        warnings.warn(f"memcomp: {where} stays with {keeper}: {reason}", Fallback, stacklevel=2)


@dataclass(frozen=True)
class Recompute:
    """A region's original torch computation, for its gradients.

    module(*inputs, *sizes) returns the region's outputs; autocast: the arguments of the `torch.autocast` it was in.
    """

    module: torch.fx.GraphModule
    autocast: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class Check:
    """Input `at` names places of a dimension of `size` elements, from (inputs, sizes): 0 .. size - 1, from -size where
    it wraps, or `ignored`."""

    at: int
    size: Extents
    wraps: bool
    ignored: int | None

    def __call__(self, inputs: Tensors, sizes: Sequence[int]) -> None:
        """Where a place does not exist, raises IndexError on the CPU; on a GPU the device stops with an assertion, and
        nobody waits for it: both as torch does."""
        index = inputs[self.at]
        if not index.numel():
            return
        (size,) = self.size(inputs, sizes)
        least = -size if self.wraps else 0
        if index.is_cuda:
            torch._assert_async(torch.logical_not(self._bad(index, least, size).any()),
                                f"an index is out of bounds for a dimension of {size} elements")
            return
        low, high = torch.aminmax(index)
        if low < least or high >= size:
            bad = self._bad(index, least, size)
            if bad.any():
                raise IndexError(f"index {int(index[bad][0])} is out of bounds for a dimension of {size} elements")

    def _bad(self, index: torch.Tensor, least: int, size: int) -> torch.Tensor:
        bad = (index < least) | (index >= size)
        return bad if self.ignored is None else bad & (index != self.ignored)


@dataclass(frozen=True)
class Entry:
    """One registered region: its outputs, the kernel and what the kernel takes.

    prepare: from (inputs, sizes), the outputs, uninitialised, and all arguments of the kernel.
    shapes:  extents of each output, from (inputs, sizes), of the fake result.
    order:   per output, its dims from slowest to fastest in memory; () = row-major.
    checks:  of index tensors, before every launch; checked: how many inputs, the last ones, are there for these only.
    over:    the input whose memory the one output takes, -1 where outputs have memory of their own.
    """

    key: str
    kernel: Callable[..., Any]
    launches: int
    prepare: Prepare
    shapes: tuple[Extents, ...]
    dtypes: tuple[torch.dtype, ...]
    order: tuple[tuple[int, ...], ...]
    recompute: Recompute | None = field(default=None, compare=False)
    checks: tuple[Check, ...] = ()
    checked: int = 0
    over: int = -1


_ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Make `memcomp::call(..., key)` run this entry."""
    _ENTRIES[entry.key] = entry


def registered(key: str) -> bool:
    return key in _ENTRIES


def entry(key: str) -> Entry:
    return _ENTRIES[key]


def run(entry: Entry, inputs: Tensors, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Allocate the outputs and launch the kernel; without a launch where no output has an element."""
    outs, args = entry.prepare(inputs, sizes)
    for out in outs:
        if out.numel():
            break
    else:
        return outs
    for check in entry.checks:
        check(inputs, sizes)
    entry.kernel(*args)
    with _COUNTS.lock:
        _COUNTS.launches += entry.launches
    return outs


def _call(inputs: list[torch.Tensor], sizes: list[int], key: str) -> list[torch.Tensor]:
    return run(_ENTRIES[key], inputs, sizes)


def _overwrite(over: torch.Tensor, inputs: list[torch.Tensor], sizes: list[int], key: str) -> None:
    """As `_call`; the output takes the memory of the input `over`."""
    entry = _ENTRIES[key]
    run(entry, [*inputs[:entry.over], over, *inputs[entry.over:]], sizes)


def _call_fake(inputs: list[torch.Tensor], sizes: list[Any], key: str) -> list[torch.Tensor]:
    """Outputs with exactly the strides of the real result."""
    entry, outs = _ENTRIES[key], []
    like = inputs[0] if inputs else torch.empty(0)
    for shape, dtype, order in zip(entry.shapes, entry.dtypes, entry.order, strict=True):
        extents = shape(inputs, sizes)
        dims = order or range(len(extents))
        inverse = sorted(range(len(extents)), key=dims.__getitem__)
        outs.append(like.new_empty([extents[d] for d in dims], dtype=dtype).permute(inverse))
    return outs


def _call_autograd(keys: torch.DispatchKeySet, inputs: list[torch.Tensor], sizes: list[int],
                   key: str) -> list[torch.Tensor]:
    """Straight to the kernel where no gradient is asked for and nothing but the device comes below autograd: the way
    there through torch's dispatcher costs more than all the rest of a call."""
    if torch.is_grad_enabled():
        for t in inputs:
            if t.requires_grad:
                return list(_Differentiable.apply(keys, sizes, key, *inputs))  # type: ignore[no-untyped-call]
    if forward_ad._current_level >= 0 and any(map(_tangent, inputs)):
        raise Refusal("tangents (forward-mode gradients) were handed to a region compiled without them",
                      hint="compile inside the dual level: the region then stays with torch")
    return run(_ENTRIES[key], inputs, sizes) if _direct(keys) else _below_autograd(keys, inputs, sizes, key)


def call(inputs: list[torch.Tensor], sizes: list[int], key: str) -> list[torch.Tensor]:
    """`memcomp::call` where Python runs the graph: past torch's dispatcher if all that it would do is find the kernel.

    Plain tensors, no gradient asked for, and no mode, transform, trace or profiler that must see the op.  The way there
    is short when it is warm, but a kernel that has streamed a long cache leaves nothing of it in the processor's.
    """
    if torch._C._dispatch_tls_local_include_set().raw_repr() in _ALONE and forward_ad._current_level < 0 and \
            not torch._C._len_torch_function_stack() and not torch._C._autograd._profiler_enabled():
        graded = torch.is_grad_enabled()
        for t in inputs:
            if type(t) not in _PLAIN or graded and t.requires_grad or not _direct(torch._C._dispatch_keys(t)):
                break
        else:
            return run(_ENTRIES[key], inputs, sizes)
    made: list[torch.Tensor] = torch.ops.memcomp.call.default(inputs, sizes, key)
    return made


def _direct(keys: torch.DispatchKeySet) -> bool:
    """Is the kernel next below autograd?"""
    seen = keys.raw_repr()
    known = _DIRECT.get(seen)
    if known is None:
        known = _DIRECT[seen] = ((keys & _BELOW_AUTOGRAD) - _VIEWS).highestPriorityTypeId() in _DEVICES
    return known


def _tangent(t: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_DIRECT: dict[int, bool] = {}  # set of dispatch keys -> the answer of `_direct`
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)  # passes on an op that makes new tensors
_SELECT = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_ALONE = frozenset({  # what a thread adds to the keys of its tensors outside of all modes; in inference mode
    (_SELECT | _VIEWS).raw_repr(), _SELECT.raw_repr()})


def _below_autograd(keys: torch.DispatchKeySet, inputs: list[torch.Tensor], sizes: list[int],
                    key: str) -> list[torch.Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        made: list[torch.Tensor] = torch.ops.memcomp.call.default.redispatch(keys & _BELOW_AUTOGRAD, inputs, sizes, key)
        return made


class _Differentiable(torch.autograd.Function):
    """A call whose gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, keys: torch.DispatchKeySet, sizes: list[int], key: str,
                *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.sizes, ctx.key = sizes, key
        ctx.save_for_backward(*inputs)
        return tuple(_below_autograd(keys, list(inputs), sizes, key))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[3:])
        found = iter(torch.ops.memcomp.backward(list(grads), list(ctx.saved_tensors), ctx.sizes, ctx.key, needs))
        return None, None, None, *(next(found) if need else None for need in needs)


def _backward(grads: list[torch.Tensor], inputs: list[torch.Tensor], sizes: list[int], key: str,
              needs: list[bool]) -> list[torch.Tensor]:
    """Gradients for the inputs marked in `needs`, by recomputing the region through torch."""
    recompute, given = _ENTRIES[key].recompute, len(inputs) - _ENTRIES[key].checked
    if recompute is None:
        raise Refusal("a region compiled without gradients was asked for them",
                      hint="compile under torch.enable_grad() with inputs that require grad")
    with _above_autograd(), torch.enable_grad():
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        with _autocast(recompute.autocast):
            outs = recompute.module(*leaves[:given], *sizes)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in pairs], [t for t in leaves if t.requires_grad],
                                    [g.to(o.dtype) for o, g in pairs], allow_unused=True)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    # copies: gradients may be views of one another or of `grads`, and the fake result is row-major
    return [torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None
            else g.clone(memory_format=torch.contiguous_format) for t, g in zip(wanted, found, strict=True)]


def _backward_fake(grads: list[torch.Tensor], inputs: list[torch.Tensor], sizes: list[Any], key: str,
                   needs: list[bool]) -> list[torch.Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]


def _above_autograd() -> Any:
    """Autograd's dispatch keys are masked inside an op; recomputing needs them back."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    exclude = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude - keys)


def _autocast(states: tuple[tuple[Any, ...], ...]) -> Any:
    if not states:
        return nullcontext()
    device, dtype, enabled, cache = states[0]
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)


def _differentiate_twice(ctx: Any, *grads: Any) -> Any:
    raise Refusal("second derivatives of a compiled region", hint="leave the function that needs them to torch")


_LIBRARY = torch.library.Library("memcomp", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("call(Tensor[] inputs, SymInt[] sizes, str key) -> Tensor[]")  # type: ignore[no-untyped-call]
_LIBRARY.define("overwrite(Tensor(a!) over, Tensor[] inputs, SymInt[] sizes, str key) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.define("backward(Tensor[] grads, Tensor[] inputs, SymInt[] sizes, str key, bool[] needs) -> Tensor[]")  # type: ignore[no-untyped-call]
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("call", _call, _device)  # type: ignore[no-untyped-call]
    _LIBRARY.impl("overwrite", _overwrite, _device)  # type: ignore[no-untyped-call]
    _LIBRARY.impl("backward", _backward, _device)  # type: ignore[no-untyped-call]
_LIBRARY.impl("call", _call_autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
torch.library.register_fake("memcomp::call", _call_fake, lib=_LIBRARY)
torch.library.register_fake("memcomp::overwrite", lambda over, inputs, sizes, key: None, lib=_LIBRARY)
torch.library.register_fake("memcomp::backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("memcomp::backward", _differentiate_twice, lib=_LIBRARY)
