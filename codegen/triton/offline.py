"""Kernel text -> machine code for a GPU that need not be there: no driver, no device, nothing printed, no file kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import linecache
import os
import re
import sys
import tempfile
import threading
import types
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from memcomp.codegen.binary import Binary
from memcomp.codegen.elf import resources
from memcomp.ir.errors import Refusal

# one at a time: Triton's knobs and file descriptor 2 belong to the whole process
_compiling = threading.Lock()
FILE, MOST = 65536, 255   # registers of a processor, and of a thread at most
_SAYING_NOTHING = ("Failures have been detected", "Internal Triton PTX codegen error")


def compile_text(source: str, function: str, signature: Mapping[str, str], constants: Mapping[str, Any],
                 divisible: Collection[str], capability: int, warps: int = 4, stages: int = 2,
                 registers: int | None = None, kept: bool = False) -> Binary:
    """Compile one `@triton.jit` or `@gluon.jit` function of a module's text.

    signature:  type of each argument that is no constant ("*bf16", "i32", "i64", "fp32", "tensordesc<bf16[64,128]>").
    constants:  value of each `tl.constexpr` argument; those with a default may be left out.
    divisible:  arguments that are multiples of 16 (addresses in bytes, integers as they are).  Only then are loads
                16 bytes wide and asynchronous: strides matter as much as pointers.
    capability: 80, 89, 90, 100.
    registers: the most that a thread may have.  Left to itself ptxas may rather store some than let fewer blocks run at
                once; where it does, it is asked once more for all that a thread can have.
    kept: read and write the user's cache of what Triton compiled.

    Raises Refusal with the first line that the compiler calls an error.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    jitted = getattr(module(source), function)
    names = list(jitted.arg_names)
    wrong = [n for n in (*signature, *constants, *divisible) if n not in names]
    missing = [p.name for p in jitted.params
               if p.name not in signature and p.name not in constants and not p.has_default]
    if wrong or missing:
        raise Refusal(f"{function} takes ({', '.join(names)})", ", ".join(
            [f"no argument {n!r}" for n in wrong] + [f"no type or value for {n!r}" for n in missing]))
    fixed = {p.name: constants.get(p.name, p.default) for p in jitted.params if p.name not in signature}
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if registers is not None:
        options["maxnreg"] = registers
    described = _source(jitted)(jitted, {n: signature.get(n, "constexpr") for n in names},
                          constexprs={(names.index(n),): v for n, v in fixed.items()},
                          attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible})
    printed: list[str] = []
    try:
        with _compiling, _alone(kept), _quiet(printed):
            made = triton.compile(described, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton raises errors of a dozen classes, RuntimeError for its passes
        text = "".join(printed)
        for left in re.findall(r"\S+\.ptx\b", str(error)):  # ptxas was given it, and it is kept where ptxas fails
            Path(left).unlink(missing_ok=True)
        raise Refusal(f"Triton {triton.__version__} does not compile {function} for sm_{capability}",
                      _first_error(text, error)) from error
    told = made.metadata._asdict()
    cubin = made.asm["cubin"]
    binary = Binary(
        name=told["name"], capability=capability, version=triton.__version__, cubin=cubin, ptx=made.asm["ptx"],
        ttgir=_without_places(made.asm["ttgir"]), parameters=tuple((n, signature[n]) for n in names if n in signature),
        warps=int(told["num_warps"]), shared=int(told["shared"]), scratch=int(told.get("global_scratch_size") or 0),
        alignment=int(told.get("global_scratch_align") or 1), tensor_memory=int(told.get("tmem_size") or 0),
        resources=resources(cubin, told["name"]))
    most = min(MOST, FILE // (32 * warps) // 8 * 8)
    if registers is None and not jitted.is_gluon() and binary.resources.registers < most and binary.spills:
        again = compile_text(source, function, signature, constants, divisible, capability, warps, stages, most, kept)
        return again if again.spills < binary.spills else binary
    return binary


def _source(jitted: Any) -> Any:
    """What Triton calls the text of a function in its language."""
    if jitted.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


@lru_cache(maxsize=256)
def module(source: str) -> types.ModuleType:
    """The text as a module.  Triton reads the text of a function through `inspect`, which finds it by a file name that
    is made of the text's digest; no file is written, and line numbers in errors are those of the text."""
    name = f"memcomp_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    place = f"<{name}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    made = types.ModuleType(name)
    made.__file__ = place
    sys.modules[name] = made   # else inspect looks through all modules for the one that a function is of
    exec(compile(source, place, "exec"), made.__dict__)
    return made


@contextlib.contextmanager
def _alone(kept: bool) -> Iterator[None]:
    """Nothing of the user's settings decides what is compiled; nor do files, and what Triton writes is gone afterwards,
    but where its cache is kept."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        if not kept:
            knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True   # a debugger's view of text that is in no file
        yield


@contextlib.contextmanager
def _quiet(printed: list[str]) -> Iterator[None]:
    """What C++ and Python print meanwhile goes into `printed`: a failing compile writes its whole IR."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))


def _first_error(printed: str, error: Exception) -> str:
    """What the compiler says first: of C++ and ptxas what follows `error:`, where they only say that a pass failed its
    name, else the exception, the picture with the caret included."""
    for line in (*printed.splitlines(), *str(error).splitlines()):
        found = re.search(r"\berror\s*:\s*(.*)", line)
        if found and not found[1].startswith(_SAYING_NOTHING):
            return found[1].strip()
    if passes := re.findall(r"Pipeline failed while executing \[`(\w+)`", printed):
        return f"the pass {passes[0]} failed"
    kept = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join([*kept[:1], *kept[1:][-3:]]) or type(error).__name__


def _without_places(text: str) -> str:
    """The IR without where each operation was written: some were in files of this machine."""
    kept: list[str] = []
    for line in text.splitlines():
        if line.startswith("#loc"):
            continue
        while (start := line.find(" loc(")) >= 0:
            depth, quoted, at = 0, False, start + 4
            while True:
                quoted ^= line[at] == '"'
                depth += 0 if quoted else (line[at] == "(") - (line[at] == ")")
                at += 1
                if not depth:
                    break
            line = line[:start] + line[at:]
        kept.append(line)
    return "\n".join(kept) + "\n"
