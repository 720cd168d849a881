"""GPU kernels for sm_90 through Gluon, whose warps divide the work: `emit` writes, `interpreted` runs on a CPU."""

from memcomp.codegen.gluon.emit import admits, emit
from memcomp.codegen.gluon.interpreter import interpreted

__all__ = ["DEVICE", "admits", "emit", "interpreted"]

DEVICE = "cuda"
