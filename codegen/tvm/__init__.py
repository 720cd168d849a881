"""CPU kernels through TVM: `emit` writes TVMScript, `build` compiles it in this process (no C compiler needed)."""

from memcomp.codegen.tvm.build import build, linked
from memcomp.codegen.tvm.emit import emit

__all__ = ["DEVICE", "build", "emit", "linked"]

DEVICE = "cpu"
