"""GPU kernels in CUDA C++: `emit` writes text, `launches` says what it is launched with, `compiled` makes machine code,
`interpreted` runs the text on the CPU."""

from memcomp.codegen.cuda.compile import compiled, taken
from memcomp.codegen.cuda.emit import admits, emit, launches, options, preferred
from memcomp.codegen.cuda.host import interpreted
from memcomp.ir.target import Target

__all__ = ["DEVICE", "admits", "compiled", "emit", "interpreted", "launches", "options", "preferred", "taken",
           "unfit"]

DEVICE = "cuda"
LEAST = 4   # points of a tile along a dim, where tiles of more would need more registers than there are


def unfit(machine: Target) -> str:
    """Why no kernel is written for a machine; "" where one may be."""
    return "" if machine.has("cuda") else "it writes for GPUs"
