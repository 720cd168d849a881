"""GPU kernels through Triton: `emit` writes text, `build` launches it, `interpreted` runs it on the CPU."""

from memcomp.codegen.triton.build import build
from memcomp.codegen.triton.emit import emit

__all__ = ["build", "emit"]
