"""GPU kernels for sm_90 through Gluon, whose warps divide the work: `emit` writes text, `compiled` makes machine code,
`interpreted` runs it on a CPU."""

from memcomp.codegen.gluon.build import compiled, taken
from memcomp.codegen.gluon.emit import admits, emit, unfit
from memcomp.codegen.gluon.interpreter import interpreted

__all__ = ["DEVICE", "admits", "compiled", "emit", "interpreted", "taken", "unfit"]

DEVICE = "cuda"
