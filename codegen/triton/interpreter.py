"""Kernels by Triton's interpreter, on the CPU: slow, and the way to their numbers where there is no GPU.

Triton reads TRITON_INTERPRET when it is imported, so this runs in a process of its own, kept for the next call.
The interpreter multiplies the bit patterns of bf16: it is given f32 tensors of the same values, and the text rounds
what goes into bf16 by itself (`words.to_bf16`).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memcomp.codegen.launches import Layout, unit, value
from memcomp.codegen.order import tasks
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.build import text
from memcomp.codegen.triton.emit import function_names, settings_of
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Kernel

_lock = threading.Lock()
_worker: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class Call:
    """One launch: function of the text, program instances, and what it is given: numbers, or which tensor."""

    function: str
    grid: int
    args: tuple[int | str, ...]


def interpreted(kernel: Kernel) -> Callable[..., None]:
    """A callable(*tensors, *sizes) for tensors on any device, copied to this machine's memory and back.  Raises
    TypeError for a wrong number of arguments, Refusal with what the interpreter says where the text cannot run."""
    tp, texts = kernel.program, {}

    def run(*given: Any) -> None:
        if len(given) != len(tp.params) + len(tp.sizes):
            raise TypeError(f"{tp.name} takes {len(tp.params)} tensors and {len(tp.sizes)} sizes, "
                            f"got {len(given)} arguments")
        tensors = {p.name: t for p, t in zip(tp.params, given, strict=False)}
        sizes = {r: int(n) for r, n in zip(tp.sizes, given[len(tp.params):], strict=True)}
        units = tuple(unit(t.stride()) for t in tensors.values())
        layout = Layout(units, frozenset(a.name for k in tp.kernels for a in arguments(tp, k, units).args
                                         if a.kind == "stride" and tensors[a.of].stride(a.at) % a.multiple))
        if layout not in texts:
            texts[layout] = text(kernel, layout)
        source, calls = texts[layout], _calls(kernel, layout, tensors, sizes)
        half = {p.name for p in kernel.program.params if p.dtype == "bf16"}
        plain = {n: _plain(t, n in half) for n, t in tensors.items()}
        done = _ask(source, calls, plain)
        for p in kernel.program.params:
            if p.role != "in":
                tensors[p.name].copy_(done[p.name])

    return run


def _calls(kernel: Kernel, layout: Layout, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> list[Call]:
    out, how = [], settings_of(kernel.source)
    for k, name in zip(kernel.program.kernels, function_names(kernel.program), strict=True):
        args = tuple(a.of if a.kind == "pointer" else int(tensors[a.of].stride(a.at)) if a.kind == "stride"
                     else sizes[a.of] for a in arguments(kernel.program, k, layout.units).args)
        total = value(tasks(k), sizes)
        out.append(Call(name, min(total, how[name].programs or total), args))
    return out


def _plain(t: Any, half: bool) -> Any:
    """A tensor in this machine's memory, as f32 if `half`, with the strides that it has: converted as a whole, one that
    overlaps or has gaps would get others."""
    held = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    flat = t.as_strided((held,), (1,)).cpu()
    return (flat.float() if half else flat).as_strided(t.shape, t.stride())


def _ask(source: str, calls: list[Call], tensors: dict[str, Any]) -> dict[str, Any]:
    with _lock:
        if not _worker or _worker[0].poll() is not None:
            serve = f"from {__name__} import serve; serve()"
            _worker[:] = [subprocess.Popen([sys.executable, "-c", serve], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, env=os.environ | {"TRITON_INTERPRET": "1"})]
        process = _worker[0]
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((source, calls, tensors), process.stdin)
            process.stdin.flush()
            error, done = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as stopped:
            raise Refusal("the process of Triton's interpreter ended") from stopped
        except BaseException:
            process.kill()  # an answer that nobody waited for must not be taken for the next one
            raise
    if error:
        raise Refusal("Triton's interpreter cannot run the kernel", error)
    return done  # type: ignore[no-any-return]


def serve() -> None:
    """Answer what `_ask` sends, until it ends."""
    from memcomp.codegen.triton.offline import module

    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the interpreter prints is no answer
    while True:
        try:
            source, calls, tensors = pickle.load(given)
        except EOFError:
            return
        error = ""
        try:
            functions = module(source)
            for c in calls:
                if c.grid:
                    args = (tensors[a] if isinstance(a, str) else a for a in c.args)
                    getattr(functions, c.function)[(c.grid,)](*args)
        except Exception as failed:  # whatever it is, the caller hears of it
            error = f"{type(failed).__name__}: {failed}"
        pickle.dump((error, tensors), answers)
        answers.flush()
