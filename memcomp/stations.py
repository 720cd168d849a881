"""The way of a program, station by station: what rewrites it, and who looks on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeAlias

from memcomp.config import Config
from memcomp.ir.program import Program
from memcomp.ir.tile import Kernel
from memcomp.ir.verify import verify
from memcomp.passes import PIPELINE

STATIONS = ("capture", *PIPELINE, "tune", "lower", "emit")
CANONICAL = PIPELINE.index("canonicalize") + 1  # the form in which the user's passes are counted
GENERAL = PIPELINE.index("generalize") + 1  # what comes after works on the program that equal layers share
Observer: TypeAlias = Callable[[str, object], None]


def observers(config: Config, observe: Observer | None = None) -> Observer:
    """`observe`, after the stations that MEMCOMP_DUMP asks for were printed to stderr.

    A backend's name (`tvm`) means the emitted text.
    """

    def seen(station: str, value: object) -> None:
        names = {station, value.backend} if isinstance(value, Kernel) else {station}
        if names & set(config.dump):
            print(f"# {station}\n{text_of(value)}", file=sys.stderr, flush=True)
        if observe is not None:
            observe(station, value)

    return seen


def text_of(value: object) -> str:
    """The text of what a station made: a program, tiles or a kernel."""
    return value.source if isinstance(value, Kernel) else str(value)


def rewrite(program: Program, *, observe: Observer, names: tuple[str, ...] = PIPELINE,
            options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Program:
    """Run the rewrites of `names` in order on a verified program, and verify what each makes.

    options: of a rewrite, by its name.
    """
    for name in names:
        step = getattr(import_module(f"memcomp.passes.{name}"), name)
        rewritten = step(program, **options.get(name, {}))
        if rewritten is not program:
            verify(rewritten, since=program)
        program = rewritten
        observe(name, program)
    return program
