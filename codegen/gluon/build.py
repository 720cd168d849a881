"""Kernel text -> machine code with all that a launch of it needs."""

from __future__ import annotations

from memcomp.codegen.binary import Binary
from memcomp.codegen.gluon.box import Box
from memcomp.codegen.gluon.emit import boxes, emit, given
from memcomp.codegen.launches import Argument, Form, Layout, described, distinct, loosened
from memcomp.codegen.triton.build import HIDDEN, launch
from memcomp.codegen.triton.emit import function_names
from memcomp.ir.errors import Refusal
from memcomp.ir.target import BYTES, target
from memcomp.ir.tile import Kernel, TileKernel

_TYPES = {"bf16": "bf16", "f16": "fp16"}


def compiled(kernel: Kernel, layout: Layout, kept: bool = False) -> Form:
    """Machine code of a kernel for tensors of one layout, by Triton, which needs no device for it.

    kept: read and write Triton's cache on the disk.  Raises Refusal where the text does not compile, and for tensors
    that the memory unit cannot fetch: that begin at no multiple of 16 bytes, or have strides that are none.
    """
    tp = kernel.program
    of_maps = {a.name for k in tp.kernels for a in _maps(kernel, k, layout.units)}
    if odd := sorted(layout.loose & of_maps):
        raise Refusal(f"{kernel.name} fetches tensors that begin at multiples of 16 bytes and whose strides are such",
                      f"not so: {', '.join(odd)}", "make them contiguous, or use the triton backend")
    made = [(k, _given(kernel, k, layout.units), b)
            for k, b in zip(tp.kernels, binaries(kernel, layout, kept), strict=True)]
    return Form(layout, f"triton {made[0][2].version}" if made else "triton",
                tuple(launch(k, loosened(args, layout), b) for k, args, b in made), tuple(b.cubin for *_, b in made))


def taken(kernel: Kernel, units: tuple[int, ...]) -> tuple[Argument, ...]:
    """All arguments of the launches, each once, and what they are multiples of where nothing is odd."""
    return distinct((*(a for k in kernel.program.kernels for a in _given(kernel, k, units)), *HIDDEN))


def _given(kernel: Kernel, k: TileKernel, units: tuple[int, ...]) -> tuple[Argument, ...]:
    return (*_maps(kernel, k, units), *given(kernel.program, k, units).args)


def _maps(kernel: Kernel, k: TileKernel, units: tuple[int, ...]) -> tuple[Argument, ...]:
    return tuple(a for n, x in boxes(kernel.program, k, units).items()
                 for a in described(n, x.param, x.places, x.piece, x.swizzle, BYTES[x.dtype]))


def binaries(kernel: Kernel, layout: Layout | None = None, kept: bool = False) -> list[Binary]:
    """Machine code of each launch; for tensors laid out as usual where no layout is given."""
    from memcomp.codegen.triton.offline import compile_text, module

    tp = kernel.program
    usual = tuple(len(p.shape) - 1 for p in tp.params)
    at = layout or Layout(usual)
    source = kernel.source if at.units == usual else emit(tp, kernel.isa, at.units).source
    out: list[Binary] = []
    for k, name in zip(tp.kernels, function_names(tp), strict=True):
        args = loosened(given(tp, k, at.units).args, at)
        signature = {n: _type(x) for n, x in boxes(tp, k, at.units).items()} | {a.name: a.type for a in args}
        out.append(compile_text(source, name, signature, {}, {a.name for a in args if a.multiple > 1},
                                target(kernel.isa).capability, module(source).SETTINGS[name]["num_warps"], kept=kept))
    return out


def _type(x: Box) -> str:
    """Triton's type of a descriptor."""
    from triton.experimental.gluon.language._layouts import NVMMASharedLayout

    layout = NVMMASharedLayout(swizzle_byte_width=x.swizzle, element_bitwidth=8 * BYTES[x.dtype], rank=len(x.shape))
    return f"tensordesc<{_TYPES[x.dtype]}[{','.join(map(str, x.shape))}],{layout!r}>"
