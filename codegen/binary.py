"""Machine code for a GPU: one kernel of one compute capability, whichever compiler made it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from memcomp.codegen.elf import Resources
from memcomp.ir.errors import Refusal


@dataclass(frozen=True, slots=True)
class Binary:
    """One kernel for one compute capability.

    version: of the compiler; registers differ between two of them.
    parameters: (name, type as Triton writes it: "*bf16", "i32") of the arguments that the machine code takes, in
        order.  Triton's code takes two more pointers, to global and to profile scratch, null where none is asked.
    warps: of 32 threads in a block as launched (specialised warps included); shared: dynamic shared memory, bytes;
    scratch, alignment: bytes of global memory for each block; tensor_memory: columns (sm_100).
    ptx, ttgir: what the machine code was made of; empty where the compiler gives none.
    """

    name: str
    capability: int
    version: str
    cubin: bytes = field(repr=False)
    parameters: tuple[tuple[str, str], ...]
    warps: int
    shared: int
    resources: Resources
    scratch: int = 0
    alignment: int = 1
    tensor_memory: int = 0
    ptx: str = field(default="", repr=False)
    ttgir: str = field(default="", repr=False)

    @property
    def sass(self) -> str:
        """The machine code as text, by an nvdisasm; Refusal where it cannot be read."""
        return disassemble(self.cubin)

    def instructions(self, *names: str) -> dict[str, int]:
        """How often the machine code has each instruction, all of its variants together (`LDGSTS`, `HGMMA`, `STL`)."""
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", self.sass, re.MULTILINE)
        return {name: found.count(name) for name in names}

    @property
    def spills(self) -> int:
        """Instructions that put a register into local memory.  A stack alone is not a spill."""
        return self.instructions("STL")["STL"] if self.resources.stack else 0


def disassemble(cubin: bytes) -> str:
    """Machine code as text."""
    program = tool_of("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        run = subprocess.run([program, "-c", str(file)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise Refusal("nvdisasm cannot read the machine code", run.stderr.strip().splitlines()[0])
    return run.stdout


def tool_of(name: str) -> str:
    """A program that reads machine code: the one in Triton's wheel, which is newer than most toolkits, else the
    toolkit's.  Refusal where neither is there."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if found.exists():
            return str(found)
    if (program := shutil.which(name)) is not None:
        return program
    raise Refusal(f"no {name} is here", hint="pip install memcomp[triton], or a CUDA toolkit in the search path")
