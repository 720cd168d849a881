"""The folders of `codegen`, each of which writes kernels in one language: who is asked, and what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
    from memcomp.ir.target import Target
    from memcomp.pipeline import Compiled

SPILLS = 2.0  # of strain: from there on registers do not suffice


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


def unfit(backend: str, machine: str) -> tuple[str, str]:
    """Why a backend has no kernels for a machine ("" where it has), and which backends have."""
    from memcomp.ir.target import target

    def why(name: str) -> str:
        return str(codegen(name).unfit(target(machine)))

    said = why(backend)
    return said, f"for {machine}: {', '.join(b for b in backends() if not why(b))}" if said else ""


def backend_of(config: Config) -> str:
    """The codegen backend that writes the kernels."""
    from memcomp.ir.target import target

    return config.backend or target(config.target).backend


def device_of(config: Config) -> str:
    """Where the tensors are that kernels take: "cpu" or "cuda"."""
    return str(codegen(backend_of(config)).DEVICE)


def emit(program: Program, *, config: Config, observe: Observer, setting: str = "") -> tuple[TileProgram, Kernel]:
    """Tiles and kernel text of a closed program.  setting: of `ways`.  Raises OptionError where it is none."""
    from memcomp.codegen.lower import lower

    tiles = lower(program)
    observe("lower", tiles)
    kernel = _emitted(tiles, backend_of(config), config, setting)
    observe("emit", kernel)
    return tiles, kernel


def _emitted(tiles: TileProgram, backend: str, config: Config, setting: str) -> Kernel:
    from memcomp.ir.target import target

    module, machine = codegen(backend), target(config.target)
    if not setting:
        return module.emit(tiles, machine)  # type: ignore[no-any-return]
    known = _settings(module, tiles, machine)
    if setting not in known:
        raise OptionError(f"the backend {backend} has no setting {setting!r}", tiles.name, nearest(setting, known))
    return module.emit(tiles, machine, settings=known[setting])  # type: ignore[no-any-return]


def _settings(module: Any, tiles: TileProgram, machine: Target) -> dict[str, Any]:
    """What a backend can be told of how to write a kernel, by words; "" is its own choice."""
    return dict(module.options(tiles, machine)) if hasattr(module, "options") else {"": {}}


def preferred(closed: Program, sizes: Mapping[str, int], config: Config) -> str:
    """Of `ways`, the setting that the backend takes by itself at these sizes; "" where it has no say."""
    from memcomp.codegen.lower import lower
    from memcomp.ir.target import target

    said = getattr(codegen(backend_of(config)), "preferred", None)
    if said is not None:
        with suppress(Refusal):  # what cannot be written is told by who writes it
            return str(said(lower(closed), target(config.target), sizes))
    return ""


def writers(config: Config) -> tuple[str, ...]:
    """The backends that may write a kernel: the one that is asked for, else the target's own, then those of the same
    device that can tell before anything is compiled whether a program is for them (`admits`)."""
    own = backend_of(config)
    if config.backend:
        return (own,)
    return own, *(b for b in backends_for(device_of(config)) if b != own and hasattr(codegen(b), "admits"))


def ways(closed: Program, config: Config) -> Iterator[tuple[str, str]]:
    """The backends that can write a closed program, with the settings that each can be told: "" and "" first, for the
    target's own (or the one asked for) as it thinks best; nothing where that cannot."""
    from memcomp.codegen.lower import lower
    from memcomp.ir.target import target

    own, *others = writers(config)
    if not others and not hasattr(codegen(own), "options"):
        yield "", ""
        return
    with suppress(Refusal):
        tiles, machine = lower(closed), target(config.target)
        for b in (own, *others):
            module = codegen(b)
            with suppress(Refusal):
                if hasattr(module, "admits"):
                    module.admits(tiles, machine)
                yield from (("" if b == own else b, words) for words in _settings(module, tiles, machine))


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

    tiles = overwrite(compiled.tiles, compiled.tiles.params[at].name)
    return tiles, _emitted(tiles, compiled.kernel.backend, config, compiled.choice.setting)


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


def least_tile(config: Config) -> int:
    """The smallest size of a tile that the backend has a use for where larger ones do not fit; 0: it has none."""
    return int(getattr(codegen(backend_of(config)), "LEAST", 0))


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
