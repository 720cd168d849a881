"""CPU kernels through TVM: `emit` writes TVMScript, `build` compiles it in this process (no C compiler needed)."""

from memcomp.codegen.tvm.build import build, linked
from memcomp.codegen.tvm.emit import emit
from memcomp.ir.target import Target

__all__ = ["DEVICE", "build", "emit", "linked", "unfit"]

DEVICE = "cpu"


def unfit(machine: Target) -> str:
    """Why no kernel is written for a machine; "" where one may be."""
    return "it writes for CPUs" if machine.has("cuda") or machine.arrays else ""
