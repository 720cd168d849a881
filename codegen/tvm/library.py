"""A kernel as a shared library by the tvm-ffi ABI: loaded by tvm_ffi alone, without TVM's compiler or runtime."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import tempfile
from os import environ
from pathlib import Path

from memcomp.codegen.tvm.build import machine_code
from memcomp.codegen.tvm.isa import named_isa, required
from memcomp.codegen.tvm.walk import TEXT as WALK
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Kernel

# What TVM's runtime gives to kernels besides threads: room for tiles.  Where that runtime is, it puts its own in place.
_ROOM = """
#include <stdint.h>
#include <stdlib.h>
#ifdef __cplusplus
extern "C" {
#endif
static void* take(int device, int id, uint64_t bytes, int code, int bits) {
  void* room = 0;
  (void)device, (void)id, (void)code, (void)bits;
  return posix_memalign(&room, 64, bytes ? bytes : 64) ? 0 : room;
}
static int give(int device, int id, void* room) {
  (void)device, (void)id;
  free(room);
  return 0;
}
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = give;
#ifdef __cplusplus
}
#endif
"""


def library(kernel: Kernel) -> bytes:
    """The library's bytes; equal texts give equal bytes with one compiler.  It has the functions `kernel.entry`,
    `memcomp_install`, which must be called first (`codegen.threads`), and `memcomp_walk` (`walk`).

    Raises Refusal where the text does not compile and where this machine has no C compiler to link with.
    """
    linker = compiler()
    made = machine_code(kernel)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "room.c").write_text(_ROOM + WALK)
        made.write_to_file(f"{folder}/kernel.o")
        command = [*linker, "-shared", "-fPIC", "-O2", "-s", "-Wl,--build-id=none", "-o", "kernel.so", "kernel.o",
                   "room.c", "-lm"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:]
            raise Refusal(f"{kernel.name} is not linked by {linker[0]}", "".join(last))
        return (Path(folder) / "kernel.so").read_bytes()


def compiler() -> list[str]:
    """The command of the C compiler: $CC, else the first that is there.  Refusal where none is."""
    named = shlex.split(environ.get("CC", ""))
    for words in ([named] if named else [["cc"], ["gcc"], ["clang"], ["g++"]]):
        if shutil.which(words[0]):
            return words
    raise Refusal("a kernel is linked by a C compiler, and there is " +
                  (f"no {named[0]}, which CC names" if named else "none"),
                  hint="install gcc, or name one in CC; who loads the kernel needs none")


def machine(kernel: Kernel) -> tuple[str, str, tuple[str, ...]]:
    """What a library of it runs on: architecture, system, and features of the processor, as `ir.detect` names them."""
    return (platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64"),
            platform.system().lower(), required(named_isa(kernel.isa)))
