"""GPU kernels through Triton: `emit` writes text, `compiled` makes machine code, `interpreted` runs it on the CPU."""

from memcomp.codegen.triton.build import compiled, taken
from memcomp.codegen.triton.emit import admits, emit, options
from memcomp.codegen.triton.interpreter import interpreted
from memcomp.ir.target import Target

__all__ = ["DEVICE", "LEAST", "admits", "compiled", "emit", "interpreted", "options", "taken", "unfit"]

DEVICE = "cuda"
LEAST = 16  # points of a tile along a dim: fewer are no product of tensor cores


def unfit(machine: Target) -> str:
    """Why no kernel is written for a machine; "" where one may be."""
    return "" if machine.has("cuda") else "it writes for GPUs"
