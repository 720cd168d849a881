"""TileProgram -> Triton text: one `@triton.jit` function per launch, one program instance per grid point.

Text only; nothing here imports triton.  A launch is written by `writer`, what its statements compute by `values`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from memcomp.codegen.names import Names
from memcomp.codegen.order import order
from memcomp.codegen.rounding import narrow
from memcomp.codegen.triton.arguments import arguments
from memcomp.codegen.triton.resources import Setting, chosen, need
from memcomp.codegen.triton.resources import options as settings_to_measure
from memcomp.codegen.triton.words import HEAD, TAKEN, used
from memcomp.codegen.triton.writer import Writer
from memcomp.ir.target import Target
from memcomp.ir.target import target as named
from memcomp.ir.tile import Kernel, TileProgram

_TOLD = re.compile(r"^ +'(\w+)': dict\(num_warps=(\d+), num_stages=(\d+)(?:, programs=(\d+))?(, specialised=1)?\),$",
                   re.MULTILINE)


def emit(tp: TileProgram, target: Target | str, units: tuple[int, ...] | None = None,
         aligned: bool = True, settings: Mapping[str, Setting] | None = None) -> Kernel:
    """Kernel text; deterministic.

    units: for each param the position whose stride is 1 in memory, -1 where there is none; the last by default.
    aligned: tensors begin at multiples of 16 bytes and their other strides are multiples of 16 elements, so that a
    machine's copy engine can take them.  settings: by function, of those that are not to be as the resource model says.
    Raises Refusal where a stored format, an operator or a contraction has no form here.
    """
    places = units if units is not None else tuple(len(p.shape) - 1 for p in tp.params)
    words: set[str] = set()
    allowed = narrow(tp)
    machine = named(target) if isinstance(target, str) else target
    launches = list(zip(tp.kernels, function_names(tp), strict=True))
    given = {n: (settings or {}).get(n) or chosen(tp, k, machine) for k, n in launches}
    texts = [Writer(tp, k, arguments(tp, k, places), allowed, words, given[n], order(tp, k, machine),
                     aligned and machine.has("tma")).kernel(n) for k, n in launches]
    told = "".join(f"    {n!r}: dict(num_warps={x.warps}, num_stages={x.stages}"
                   f"{f', programs={x.programs}' if x.programs else ''}"
                   f"{', specialised=1' if x.specialised else ''}),\n" for n, x in given.items())
    source = "\n\n".join([HEAD, *used(words), *texts, f"SETTINGS = {{\n{told}}}\n"])
    return Kernel(tp.name, "triton", source, "SETTINGS", tp, machine.name)


def settings_of(source: str) -> dict[str, Setting]:
    """The settings that a text says of itself, by function."""
    return {name: Setting(int(w), int(s), int(programs or 0), bool(special))
            for name, w, s, programs, special in _TOLD.findall(source)}


def admits(tp: TileProgram, target: Target) -> float:
    """0: every launch fits the machine well; more: some spill, or wait (`resources.Need`).  Raises Refusal where one
    does not fit or has no text."""
    emit(tp, target)
    return max((need(tp, k, target, chosen(tp, k, target)).strain for k in tp.kernels), default=0)


def options(tp: TileProgram, target: Target) -> dict[str, dict[str, Setting]]:
    """What `emit` may be given as `settings` to be chosen from by measuring, by words that name no function: "" as the
    resource model says, then one launch at a time with another setting."""
    found: dict[str, dict[str, Setting]] = {"": {}}
    for n, (k, name) in enumerate(zip(tp.kernels, function_names(tp), strict=True)):
        found |= {f"launch {n}: {s}": {name: s} for s in settings_to_measure(tp, k, target)[1:]}
    return found


def function_names(tp: TileProgram) -> list[str]:
    """The names of the launches' functions in the text."""
    names = Names(TAKEN)
    return [names.fresh(re.sub(r"\W", "_", k.name), plain=True) for k in tp.kernels]
