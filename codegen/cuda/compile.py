"""CUDA C++ -> machine code for a GPU that need not be there: by NVRTC (the `cuda` extra), or by nvcc without it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memcomp.codegen.binary import Binary
from memcomp.codegen.cuda.emit import emit, launches
from memcomp.codegen.elf import resources
from memcomp.codegen.launches import Argument, Form, Launch, Layout, distinct
from memcomp.ir.errors import Refusal
from memcomp.ir.target import target
from memcomp.ir.tile import Kernel

_FILE = "kernel.cu"
_OWN = 90  # from this capability on, the instructions of one alone have an architecture of their own: sm_90a


def compiled(kernel: Kernel, layout: Layout, kept: bool = False) -> Form:
    """Machine code of a kernel for tensors of one layout.  kept: nothing is, NVRTC being quick.

    Raises Refusal where no compiler is there, and with its first error where the text does not compile.
    """
    tp = kernel.program
    usual = layout == Layout(tuple(len(p.shape) - 1 for p in tp.params))
    source = kernel.source if usual else emit(tp, kernel.isa, layout, kernel.runs).source
    given = launches(tp, kernel.isa, layout, kernel.runs)
    made = compile_text(source, given, target(kernel.isa).capability)
    return Form(layout, made[0].version if made else "", given, tuple(b.cubin for b in made))


def taken(kernel: Kernel, units: tuple[int, ...]) -> tuple[Argument, ...]:
    """All arguments of the launches, each once, and what they are multiples of where nothing is odd."""
    return distinct(a for x in launches(kernel.program, kernel.isa, Layout(units), kernel.runs)
                    for a in x.args)


def compile_text(source: str, given: Sequence[Launch], capability: int, compiler: str = "") -> tuple[Binary, ...]:
    """Compile a text; by launch a Binary of its function, all with the one cubin.

    compiler: "nvrtc" or "nvcc"; the first that is there by default.  The text includes no header.
    Raises Refusal where there is no compiler, and with the compiler's first error where the text does not compile.
    """
    found = compiler or _there()
    architecture = f"sm_{capability}{'a' if capability >= _OWN else ''}"
    cubin, version = (_nvrtc if found == "nvrtc" else _nvcc)(source, architecture)
    return tuple(Binary(x.function, capability, version, cubin, tuple((a.name, a.type) for a in x.args),
                        x.block // 32, x.shared, resources(cubin, x.function)) for x in given)


def compilers() -> tuple[str, ...]:
    """Those of nvrtc and nvcc that are there."""
    found = ["nvcc"] if shutil.which("nvcc") else []
    if find_spec("cuda") is not None and find_spec("cuda.core") is not None:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

        try:
            load_nvidia_dynamic_lib("nvrtc")
            found.insert(0, "nvrtc")
        except DynamicLibNotFoundError:
            pass
    return tuple(found)


def _there() -> str:
    found = compilers()
    if not found:
        raise Refusal("no compiler for CUDA C++ is here: neither NVRTC nor nvcc", hint="pip install memcomp[cuda]")
    return found[0]


def _nvrtc(source: str, architecture: str) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(name=_FILE, arch=architecture, std="c++17")
    _, *version = nvrtc.nvrtcVersion()
    try:
        code: Any = Program(source, "c++", options).compile("cubin").code
    except Exception as error:  # NVRTCError, which cuda.core does not make public
        raise _refused(f"NVRTC {'.'.join(map(str, version))}", architecture, str(error)) from error
    return bytes(code), f"nvrtc {'.'.join(map(str, version))}"


def _nvcc(source: str, architecture: str) -> tuple[bytes, str]:
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.findall(r"release ([\d.]+)", told)[0]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _FILE).write_text(source)
        run = subprocess.run(["nvcc", f"-arch={architecture}", "-std=c++17", "-cubin", "-o", "kernel.cubin", _FILE],
                             capture_output=True, text=True, check=False, cwd=folder)
        if run.returncode:
            raise _refused(f"nvcc {version}", architecture, run.stderr)
        return (Path(folder) / "kernel.cubin").read_bytes(), f"nvcc {version}"


def _refused(compiler: str, architecture: str, log: str) -> Refusal:
    """With the first line that says `error`; lines of the text are those of the file."""
    for line in log.splitlines():
        found = re.search(r"^(.*?)\b(?:fatal )?error\s*:\s*(.*)", line)
        if found:
            at = re.search(r"\((\d+)\)", found[1])
            where = f"line {at[1]}: " if at else ""
            return Refusal(f"{compiler} does not compile the text for {architecture}", where + found[2].strip())
    kept = [line for line in log.splitlines() if line.strip()]
    return Refusal(f"{compiler} does not compile the text for {architecture}", "\n".join(kept[:2]))
