"""GPU kernels in CUDA C++: `emit` writes text, `launches` says what it is launched with, `compiled` makes machine code,
`interpreted` runs the text on the CPU."""

from memcomp.codegen.cuda.compile import compiled, taken
from memcomp.codegen.cuda.emit import admits, emit, launches
from memcomp.codegen.cuda.host import interpreted

__all__ = ["DEVICE", "admits", "compiled", "emit", "interpreted", "launches", "taken"]

DEVICE = "cuda"
LEAST = 4   # points of a tile along a dim, where tiles of more would need more registers than there are
