"""The folders of `codegen`, each of which writes kernels in one language: who is asked, and what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from memcomp.config import Config
from memcomp.ir.errors import OptionError, Refusal, nearest
from memcomp.ir.program import Program
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.stations import Observer

if TYPE_CHECKING:
    from memcomp.pipeline import Compiled


def backends() -> list[str]:
    """Names of the codegen backends: the folder is the registry."""
    import memcomp.codegen

    return sorted(m.name for m in iter_modules(memcomp.codegen.__path__) if m.ispkg)


def backends_for(device: str) -> list[str]:
    """Those whose kernels take tensors on `device` ("cpu", "cuda"), as far as what they need is installed."""
    found = []
    for name in backends():
        with suppress(ModuleNotFoundError):
            if codegen(name).DEVICE == device:
                found.append(name)
    return found


def backend_of(config: Config) -> str:
    """The codegen backend that writes the kernels."""
    from memcomp.ir.target import target

    return config.backend or target(config.target).backend


def device_of(config: Config) -> str:
    """Where the tensors are that kernels take: "cpu" or "cuda"."""
    return str(codegen(backend_of(config)).DEVICE)


def emit(program: Program, *, config: Config, observe: Observer) -> tuple[TileProgram, Kernel]:
    """Tiles and kernel text of a closed program."""
    from memcomp.codegen.lower import lower
    from memcomp.ir.target import target

    tiles = lower(program)
    observe("lower", tiles)
    kernel: Kernel = codegen(backend_of(config)).emit(tiles, target(config.target))
    observe("emit", kernel)
    return tiles, kernel


def build(kernel: Kernel, config: Config) -> Callable[..., Any]:
    """A callable(*tensors, *sizes) of the emitted text.  Raises Refusal where its compiler is not installed."""
    backend = codegen(kernel.backend)
    try:
        if config.interpret and backend.DEVICE != "cpu":
            return backend.interpreted(kernel)  # type: ignore[no-any-return]
        if backend.DEVICE == "cuda":
            from memcomp.artifact.launch import Launched

            return Launched.of(kernel, backend)
        return backend.build(kernel)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise Refusal(f"the backend {kernel.backend} needs {error.name}, which is not installed") from error


def overwritable(compiled: Compiled) -> list[int]:
    """Positions of the inputs whose memory the output may take, as far as the kernel goes."""
    from memcomp.codegen.overwrite import overwritable

    names = overwritable(compiled.tiles)
    return [k for k, p in enumerate(compiled.tiles.params) if p.name in names]


def overwriting(compiled: Compiled, at: int, config: Config) -> tuple[TileProgram, Kernel]:
    """The same kernel with its output over the memory of the input at position `at`."""
    from memcomp.codegen.overwrite import overwrite
    from memcomp.ir.target import target

    tiles = overwrite(compiled.tiles, compiled.tiles.params[at].name)
    kernel: Kernel = codegen(compiled.kernel.backend).emit(tiles, target(config.target))
    return tiles, kernel


def strain(config: Config) -> Callable[[Program], float] | None:
    """How badly a closed program's kernels fit the machine, where the backend can tell before it compiles them."""
    from memcomp.ir.target import target

    admits = getattr(codegen(backend_of(config)), "admits", None)
    if admits is None:
        return None

    def found(closed: Program) -> float:
        from memcomp.codegen.lower import lower

        try:
            return float(admits(lower(closed), target(config.target)))
        except Refusal:
            return math.inf

    return found


def lowers(closed: Program) -> float:
    """0 for a program that has a tile form, else infinity."""
    from memcomp.codegen.lower import lower

    try:
        lower(closed)
    except Refusal:
        return math.inf
    return 0.0


def codegen(name: str) -> Any:
    if name not in backends():
        raise OptionError(f"unknown backend {name!r}", hint=nearest(name, backends()))
    return import_module(f"memcomp.codegen.{name}")
