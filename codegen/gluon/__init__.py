"""GPU kernels for sm_90 through Gluon, whose warps divide the work: `emit` writes text."""

from memcomp.codegen.gluon.emit import admits, emit

__all__ = ["DEVICE", "admits", "emit"]

DEVICE = "cuda"
