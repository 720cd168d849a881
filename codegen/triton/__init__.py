"""GPU kernels through Triton: `emit` writes text, `compiled` makes machine code, `interpreted` runs it on the CPU."""

from memcomp.codegen.triton.build import compiled, taken
from memcomp.codegen.triton.emit import admits, emit, options
from memcomp.codegen.triton.interpreter import interpreted

__all__ = ["DEVICE", "admits", "compiled", "emit", "interpreted", "options", "taken"]

DEVICE = "cuda"
