"""The threads of CPU kernels, and what else they ask of the process that runs them.  Needs neither torch nor TVM.

A kernel module has a function `memcomp_install`, which takes the address of a record: a function like GOMP_parallel,
one that says how many threads there are, and whether to run alone.  There is one record; modules read it at every
call.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any

from memcomp.ir.errors import Refusal

ALONE = "none: each loop runs on its caller's thread, for there is no libgomp"
_lock = threading.Lock()
_runtime = (ctypes.c_void_p * 3)(None, None, 1)
_how = ""          # whose threads they are, in words; "" before anybody asked
_with_torch = False


def install(module: Any, load: bool) -> str:
    """Send the parallel loops of a loaded kernel module to the threads of this process; says whose they are.  They are
    torch's where torch is: two pools that both spin make each other wait for milliseconds.

    load: take the system's libgomp where the process has none.  "" where there is none and none was to be loaded, and
    nothing was done.  A torch that is imported later is seen by the next module, and then by all.
    """
    how = _found(load)
    if how:
        module["memcomp_install"](ctypes.c_void_p(ctypes.addressof(_runtime)))
    return how


def allow_tiles() -> None:
    """Ask Linux to let this process, its threads and children use AMX tile registers; Refusal if it does not."""
    arch_prctl, request, tile_data = 158, 0x1023, 18  # the x86-64 system call; ARCH_REQ_XCOMP_PERM; XFEATURE_XTILEDATA
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(arch_prctl), ctypes.c_long(request), ctypes.c_long(tile_data)) != 0:
        raise Refusal("the system does not let this process use AMX tile registers", os.strerror(ctypes.get_errno()))


def _found(load: bool) -> str:
    """Fill the record, which lives as long as the process."""
    global _how, _with_torch
    with _lock:
        first = _runtime[0] is None
        if first or "torch" in sys.modules and not _with_torch:
            torch = _loaded("libtorch_cpu") if "torch" in sys.modules else None
            gomp = _loaded("libgomp") or (_library("libgomp.so.1") if load else None)
            if gomp is not None and (first or torch is not None):
                # at::get_num_threads: what torch.set_num_threads and the calling thread ask for
                count = getattr(torch, "_ZN2at15get_num_threadsEv", None) or gomp.omp_get_max_threads
                _runtime[0], _runtime[1] = (ctypes.cast(f, ctypes.c_void_p).value for f in (gomp.GOMP_parallel, count))
                _with_torch = torch is not None
                _how = "torch's OpenMP" if _with_torch else f"OpenMP of {Path(gomp._name).name}"
                if first:
                    _runtime[2] = 0
                    if hasattr(os, "register_at_fork"):
                        os.register_at_fork(after_in_child=_alone)
        return _how or (ALONE if load else "")


def _alone() -> None:
    """After a fork: libgomp's threads do not survive one."""
    _runtime[2] = 1


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _loaded(stem: str) -> Any:
    """A library that this process has loaded already, by the start of its file name; torch's own before others."""
    paths: list[str] = []
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        paths = [line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/") and stem in line]
    except OSError:
        if torch:
            paths = [str(p) for p in (Path(torch).parent / "lib").glob(f"{stem}*")]
    named = [p for p in dict.fromkeys(paths) if Path(p).name.startswith(stem)]
    own = str(Path(torch).parent) if torch else "\0"
    return next(filter(None, map(_library, sorted(named, key=lambda p: not p.startswith(own)))), None)
