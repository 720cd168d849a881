"""Kernels by the model of Gluon, on the CPU: slow, and the way to their numbers where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from memcomp.codegen.gluon import model
from memcomp.codegen.gluon.box import Box
from memcomp.codegen.gluon.emit import boxes, emit, given
from memcomp.codegen.launches import unit, value
from memcomp.codegen.triton.emit import function_names
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Kernel


def interpreted(kernel: Kernel, seed: int = 0) -> Callable[..., None]:
    """A callable(*tensors, *sizes) for tensors on any device, copied to this machine's memory and back.

    seed: decides in which order groups of warps and transfers take turns.  Raises TypeError for a wrong number of
    arguments, Refusal with what the model says where the text does what a GPU would not forgive.
    """
    tp = kernel.program

    def run(*args: Any) -> None:
        if len(args) != len(tp.params) + len(tp.sizes):
            raise TypeError(f"{tp.name} takes {len(tp.params)} tensors and {len(tp.sizes)} sizes, "
                            f"got {len(args)} arguments")
        # a tensor without elements may have any strides: none is addressed by them
        tensors = {p.name: t if t.numel() else t.new_empty(t.shape) for p, t in zip(tp.params, args, strict=False)}
        sizes = {r: int(n) for r, n in zip(tp.sizes, args[len(tp.params):], strict=True)}
        units = tuple(unit(t.stride()) for t in tensors.values())
        usual = tuple(len(p.shape) - 1 for p in tp.params)
        source = kernel.source if units == usual else emit(tp, kernel.isa, units).source
        flat = {p.name: _flat(tensors[p.name]) for p in tp.params}
        held = {p.name: (flat[p.name].float() if p.dtype == "bf16" else flat[p.name]).cpu().numpy().copy()
                for p in tp.params}
        memory = {p.name: model.memory(held[p.name], p.name, p.dtype) for p in tp.params}
        for k, name in zip(tp.kernels, function_names(tp), strict=True):
            taken = [memory[a.of] if a.kind == "pointer" else int(tensors[a.of].stride(a.at)) if a.kind == "stride"
                     else sizes[a.of] for a in given(tp, k, units).args]
            grid = prod(value(extent, sizes) for _, extent in k.grid)
            try:
                taken[:0] = [_descriptor(x, memory, tensors) for x in boxes(tp, k, units).values()]
                model.run(source, name, grid, taken, warps=model.settings(source, name), seed=seed)
            except model.Fault as fault:
                raise Refusal("the model of Gluon cannot run the kernel", str(fault)) from fault
        for p in tp.params:
            if p.role != "in" and flat[p.name].numel():
                flat[p.name].copy_(flat[p.name].new_tensor(held[p.name]))

    return run


def _flat(t: Any) -> Any:
    """A tensor's memory from its first element to its last."""
    if not t.numel():
        return t.reshape(-1)
    return t.as_strided((1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)),), (1,))


def _descriptor(x: Box, memory: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    t = tensors[x.param]
    return model.described(memory[x.param], [t.shape[n] for n in x.places], [t.stride(n) for n in x.places], x.shape,
                           x.swizzle)
