"""GPU kernels through Triton: `emit` writes text, `build` launches it, `interpreted` runs it on the CPU."""

from memcomp.codegen.triton.build import build
from memcomp.codegen.triton.emit import admits, emit
from memcomp.codegen.triton.interpreter import interpreted

__all__ = ["DEVICE", "admits", "build", "emit", "interpreted"]

DEVICE = "cuda"
