"""Kernel text -> machine code with all that a launch of it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcomp.codegen.launches import Argument, Form, Launch, Layout, distinct, loosened
from memcomp.codegen.order import tasks
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.emit import emit, function_names, settings_of
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import call
from memcomp.ir.target import target
from memcomp.ir.tile import Kernel, TileKernel

if TYPE_CHECKING:
    from memcomp.codegen.binary import Binary

# Triton's machine code takes these too: to memory of the launch, and to that of a profiler which is not there
HIDDEN = (Argument("scratch", "scratch", type="*i8"), Argument("profile", "null", type="*i8"))


def compiled(kernel: Kernel, layout: Layout, kept: bool = False) -> Form:
    """Machine code of a kernel for tensors of one layout, by Triton, which needs no device for it.

    kept: read and write Triton's cache on the disk.  Raises Refusal where the text does not compile.
    """
    from memcomp.codegen.triton.offline import compile_text

    tp, machine = kernel.program, target(kernel.isa)
    source = text(kernel, layout)
    settings = settings_of(source)
    made: list[tuple[Launch, Binary]] = []
    for k, name in zip(tp.kernels, function_names(tp), strict=True):
        args, how = loosened(arguments(tp, k, layout.units).args, layout), settings[name]
        binary = compile_text(source, name, {a.name: a.type for a in args}, {},
                              {a.name for a in args if a.multiple > 1}, machine.capability, how.warps, how.stages,
                              kept=kept)
        if how.specialised and (binary.warps <= how.warps or "setmaxnreg" not in binary.ptx):
            raise Refusal(f"Triton {binary.version} compiles {name} for {machine.name} without specialised warps",
                          "it says so nowhere else", "compile it with another setting")
        made.append((launch(k, args, binary, how.programs), binary))
    return Form(layout, f"triton {made[0][1].version}" if made else "triton", tuple(x for x, _ in made),
                tuple(b.cubin for _, b in made))


def taken(kernel: Kernel, units: tuple[int, ...]) -> tuple[Argument, ...]:
    """All arguments of the launches, each once, and what they are multiples of where nothing is odd."""
    return distinct((*(a for k in kernel.program.kernels for a in arguments(kernel.program, k, units).args), *HIDDEN))


def launch(k: TileKernel, args: tuple[Argument, ...], binary: Binary, programs: int = 0) -> Launch:
    """How a function that Triton compiled for the launch `k` is started: one block for each point of the grid, or
    `programs` of them for all."""
    blocks = call("min", tasks(k), programs) if programs else tasks(k)
    return Launch(binary.name, (blocks,), 32 * binary.warps, binary.shared, (*args, *HIDDEN), binary.scratch,
                  binary.alignment)


def text(kernel: Kernel, layout: Layout) -> str:
    """The text for a layout: the kernel's own where it is the usual one."""
    usual = tuple(len(p.shape) - 1 for p in kernel.program.params)
    if layout.units == usual and not layout.loose:
        return kernel.source
    settings = {n: s for n, s in settings_of(kernel.source).items() if not (s.specialised and layout.loose)}
    return emit(kernel.program, kernel.isa, layout.units, not layout.loose, settings).source
