"""CUDA C++ text on the CPU: compiled by g++ with a model of blocks (`model`), to check kernels without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memcomp.codegen.cuda.emit import emit, launches
from memcomp.codegen.cuda.model import MODEL
from memcomp.codegen.launches import Launch, Layout, unit
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Kernel

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
_CTYPES = {"i32": ctypes.c_int, "i64": ctypes.c_longlong}
_C = {"i32": "int", "i64": "long long"}
_WAITING = {1: "threads of a warp wait at different places", 2: "warps wait at different places",
            3: "blocks wait for each other"}

_lock = threading.Lock()


def interpreted(kernel: Kernel) -> Callable[..., None]:
    """A callable(*tensors, *sizes) in the order of the program's params and sizes, for tensors on any device, copied to
    this machine's memory and back.  Raises Refusal where there is no C++ compiler, or threads wait for each other."""
    tp = kernel.program
    forms: dict[Layout, Form] = {}

    def form(tensors: dict[str, Any]) -> Form:
        layout = Layout(tuple(unit(t.stride()) for t in tensors.values()))
        if loose := _loose(launches(tp, kernel.isa, layout, kernel.runs), tensors):
            layout = Layout(layout.units, loose)
        if layout not in forms:
            forms[layout] = Form(emit(tp, kernel.isa, layout, kernel.runs).source,
                                 launches(tp, kernel.isa, layout, kernel.runs))
        return forms[layout]

    def run(*given: Any) -> None:
        if len(given) != len(tp.params) + len(tp.sizes):
            raise TypeError(f"{tp.name} takes {len(tp.params)} tensors and {len(tp.sizes)} sizes, "
                            f"got {len(given)} arguments")
        tensors = {p.name: t.cpu() for p, t in zip(tp.params, given, strict=False)}
        sizes = {r: int(n) for r, n in zip(tp.sizes, given[len(tp.params):], strict=True)}
        with _lock:
            form(tensors).run(tensors, sizes)
        for p, t in zip(tp.params, given, strict=False):
            if p.role != "in" and t is not tensors[p.name]:
                t.copy_(tensors[p.name])

    return run


class Form:
    """The text for one layout of tensors, compiled."""

    def __init__(self, source: str, launches: tuple[Launch, ...]) -> None:
        self.launches = launches
        self.library = compiled(source, launches)

    def run(self, tensors: dict[str, Any], sizes: dict[str, int]) -> None:
        for x in self.launches:
            if not (blocks := math.prod(x.blocks(sizes))):
                continue
            args = [_CTYPES.get(a.type, ctypes.c_void_p)(_value(a, tensors, sizes)) for a in x.args]
            if failed := getattr(self.library, f"run_{x.function}")(ctypes.c_longlong(blocks), *args):
                raise Refusal(f"{x.function} waits for ever: {_WAITING[failed]}", hint="a fault of the cuda backend")


def _loose(launches: tuple[Launch, ...], tensors: dict[str, Any]) -> frozenset[str]:
    """Arguments that are no multiples of what the text takes for granted."""
    return frozenset(a.name for x in launches for a in x.args
                     if a.multiple > 1 and _value(a, tensors, {}) % a.multiple)


def _value(a: Any, tensors: dict[str, Any], sizes: dict[str, int]) -> int:
    if a.kind == "pointer":
        return int(tensors[a.of].data_ptr())
    return int(tensors[a.of].stride(a.at)) if a.kind == "stride" else sizes[a.of]


def compiled(source: str, launches: tuple[Launch, ...]) -> ctypes.CDLL:
    """The text with the model of a block, as a library with a function run_NAME(blocks, arguments) for each kernel."""
    compiler = next((c for c in map(shutil.which, COMPILERS) if c), None)
    if compiler is None:
        raise Refusal("kernels in CUDA C++ run on the CPU through a C++ compiler, and there is none",
                      hint=f"install one of {', '.join(COMPILERS)}")
    runs = []
    for x in launches:
        names = [f"a{n}" for n in range(len(x.args))]
        declared = "".join(f", {_C.get(a.type, 'void *')} {n}" for a, n in zip(x.args, names, strict=True))
        given = ", ".join(n if a.type in _C else f"(decltype(pointer<{k}>({x.function}))){n}"
                          for k, (a, n) in enumerate(zip(x.args, names, strict=True)))
        runs.append(f'extern "C" int run_{x.function}(long long blocks{declared}) {{\n'
                    f"  return simulate(blocks, {x.block}, {x.shared}, {int(x.together)}, "
                    f"[&] {{ {x.function}({given}); }});\n}}\n")
    text = "\n".join([MODEL, source, _POINTER, *runs])
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder, "kernel.cpp"), Path(folder, f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so")
        file.write_text(text)
        done = subprocess.run([compiler, *FLAGS, str(file), "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr[:200])
            raise Refusal("the kernel's text does not compile for the CPU", first.partition("error")[2])
        return ctypes.CDLL(str(library))


_POINTER = r'''
template <int N, class First, class... Rest> struct Argument : Argument<N - 1, Rest...> {};
template <class First, class... Rest> struct Argument<0, First, Rest...> { using type = First; };
template <int N, class... Args> typename Argument<N, Args...>::type pointer(void (*)(Args...));
'''
