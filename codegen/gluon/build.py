"""Kernel text -> machine code."""

from __future__ import annotations

from memcomp.codegen.binary import Binary
from memcomp.codegen.gluon.box import Box
from memcomp.codegen.gluon.emit import boxes, given
from memcomp.codegen.triton.emit import function_names
from memcomp.ir.target import target
from memcomp.ir.tile import Kernel


def binaries(kernel: Kernel) -> list[Binary]:
    """Machine code of each launch, for tensors laid out as usual; needs no device."""
    from memcomp.codegen.triton.offline import compile_text, module

    tp = kernel.program
    units = tuple(len(p.shape) - 1 for p in tp.params)
    out: list[Binary] = []
    for k, name in zip(tp.kernels, function_names(tp), strict=True):
        args = given(tp, k, units)
        signature = {n: described(x) for n, x in boxes(tp, k, units).items()} | args.signature
        out.append(compile_text(kernel.source, name, signature, {}, args.aligned, target(kernel.isa).capability,
                                module(kernel.source).SETTINGS[name]["num_warps"]))
    return out


def described(x: Box) -> str:
    """Triton's type of a descriptor."""
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=x.swizzle, element_bitwidth=16, rank=len(x.shape))
    return f"tensordesc<{x.dtype if x.dtype != 'f16' else 'fp16'}[{','.join(map(str, x.shape))}],{layout!r}>"
