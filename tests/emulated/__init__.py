"""A kernel's machine code on an emulated machine: Bochs, started from a disk that holds nothing but the kernel.

Bochs is looked for on the path and must be built with AMX and EVEX (`./configure --enable-amx --enable-evex
--enable-avx --enable-x86-64 --enable-cpu-level=6 --with-nogui`); BXSHARE names the folder of its BIOS where it is not
installed.
A C compiler and binutils make the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TOOLS = "bochs", "gcc", "as", "ld", "objcopy"
CODES = {"int8": (0, 8), "uint8": (1, 8), "int32": (0, 32), "int64": (0, 64), "float32": (2, 32), "bfloat16": (4, 16)}
PIECE, PIECES = 64 * 512, 12  # what `boot.s` reads
SETTINGS = """
megs: 64
cpu: model={model}, count=1, ips=2000000, reset_on_triple_fault=0
ata0-master: type=disk, path={folder}/disk, mode=flat, cylinders=64, heads=16, spt=63
boot: disk
display_library: nogui
com1: enabled=1, mode=file, dev={folder}/out
log: {folder}/log
clock: sync=none
panic: action=fatal
speaker: enabled=0
"""


def here() -> bool:
    """Is everything there that is needed?"""
    return all(shutil.which(t) for t in TOOLS)


def call(module: Any, tensors: Sequence[tuple[np.ndarray[Any, Any], str]], sizes: Sequence[int], folder: Path, *,
         chunks: int, model: str = "sapphire_rapids") -> np.ndarray[Any, Any]:
    """What the last of the tensors holds after a compiled kernel ran on an emulated processor.

    tensors: arguments as (elements, dtype of the kernel), bf16 as their bits; chunks: tasks of a parallel loop.
    Raises RuntimeError with the processor's state where it did not come to its end.
    """
    module.write_to_file(str(folder / "kernel.o"))
    head, inputs, arguments = [], ['.section .inputs, "aw"'], []
    for k, (a, kind) in enumerate(tensors):
        (folder / f"t{k}").write_bytes(a.tobytes())
        inputs.append(f'.balign 64\n.global t{k}\nt{k}: .incbin "{folder}/t{k}"\n.zero 64')
        strides = [prod(a.shape[i + 1:]) for i in range(a.ndim)]
        code, bits = CODES[kind]
        head.append(f"extern u8 t{k}[]; static i64 s{k}[] = {{{', '.join(map(str, a.shape))}}}, "
                    f"d{k}[] = {{{', '.join(map(str, strides))}}}; "
                    f"static Tensor x{k} = {{t{k}, 1, 0, {a.ndim}, {code}, {bits}, 1, s{k}, d{k}, 0}};")
        arguments.append(f"{{7, 0, (u64)&x{k}}}")
    arguments += [f"{{1, 0, {n}}}" for n in sizes]
    last, result = len(tensors) - 1, tensors[-1][0]
    (folder / "arguments.h").write_text(
        f"#define CHUNKS {chunks}\n#define RESULT t{last}\n#define RESULT_BYTES {result.nbytes}\n"
        f"#define TENSORS {' '.join(head)}\n#define ARGUMENTS {', '.join(arguments)}\n")
    (folder / "inputs.s").write_text("\n".join([*inputs, '.section .note.GNU-stack, "", @progbits', ""]))
    compiler = ("gcc -c -O1 -ffreestanding -fno-pic -mno-red-zone -mgeneral-regs-only -fno-stack-protector "
                "-fno-asynchronous-unwind-tables -mcmodel=large -w -I. -o start.o")
    for command in ([*compiler.split(), str(HERE / "start.c")], ["as", "-o", "boot.o", str(HERE / "boot.s")],
                    ["as", "-o", "inputs.o", "inputs.s"],
                    ["ld", "--no-warn-rwx-segments", "-o", "all", "-T", str(HERE / "layout.ld"), "-e", "_boot",
                     "boot.o", "start.o", "kernel.o", "inputs.o"],
                    *(["objcopy", "-O", "binary", f"--only-section=.{s}", "all", s] for s in ("boot", "text"))):
        subprocess.run(command, check=True, cwd=folder)
    code_and_data = (folder / "text").read_bytes()
    assert len(code_and_data) <= PIECE * PIECES, len(code_and_data)
    (folder / "disk").write_bytes(((folder / "boot").read_bytes() + code_and_data).ljust(64 * 16 * 63 * 512, b"\0"))
    (folder / "settings").write_text(SETTINGS.format(model=model, folder=folder))
    ran = subprocess.run(["bochs", "-q", "-f", str(folder / "settings")], capture_output=True, timeout=120,
                         stdin=subprocess.DEVNULL, env=os.environ, cwd=folder)
    got = (folder / "out").read_bytes()
    if got[:1] != b"K" or len(got) <= result.nbytes:
        raise RuntimeError(got[:200].decode(errors="replace") + ran.stderr.decode()[-500:]
                           + (folder / "log").read_text()[-2000:])
    return np.frombuffer(got[1:1 + result.nbytes], result.dtype).reshape(result.shape)
