"""Steps that torch runs, where it is installed: operators of its own, by their names, never code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from memcomp.artifact.arrays import is_torch
from memcomp.artifact.plan import Step
from memcomp.ir.errors import Refusal


def operators(names: Sequence[str], where: str) -> None:
    """Refusal where torch must run steps and is not installed, or has no such operator."""
    if names and find_spec("torch") is None:
        raise Refusal(f"{where} needs torch, which is not installed, for {', '.join(names)}",
                      hint="pip install torch; `memcomp compile --strict` says what is in the way")
    for name in names:
        _operator(name)


def _operator(what: str) -> Any:
    import torch

    space, _, rest = what.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if space == "aten" else None
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise Refusal(f"torch {torch.__version__} has no operator {what}")
    if why := unfit(found):
        raise Refusal(f"{what} can be run by no artifact: {why}")
    return found


def unfit(op: Any) -> str:
    """Why no artifact may run an operator of torch's own, "" where it may."""
    names = {a.name for a in op._schema.arguments}
    if op._schema.is_mutable:
        return "it writes into a tensor"
    if "storage_offset" in names:
        return "it names places in memory, and what it reads may lie elsewhere; index or slice instead"
    return "it opens a file" if "filename" in names else ""


def by_torch(step: Step, at: Callable[[str], int], reads: Sequence[Callable[[list[Any]], Any]],
              writes: Sequence[Callable[[list[Any]], Any]]) -> Callable[[list[Any]], None]:
    """A step that torch runs: an operator of torch's own, by its name; what it makes is copied to where it belongs."""
    import torch
    from torch.utils.dlpack import from_dlpack

    from memcomp.dtypes import DTYPES

    run = _operator(step.what)
    args, kwargs = json.loads(step.args)
    places = [int(x) for k, x in step.sizes.items() if k.startswith("out")]

    def read(x: Any, given: list[Any]) -> Any:
        if isinstance(x, list):
            return [read(y, given) for y in x]
        if isinstance(x, dict):
            (kind, value), = x.items()
            if kind == "tensor":
                held = reads[value](given)
                return held if is_torch(held) else from_dlpack(held)
            return at(value) if kind == "size" else \
                DTYPES[value] if kind == "dtype" else torch.device(value)
        return x

    def act(given: list[Any]) -> None:
        with torch.no_grad():
            made = run(*read(args, given), **{k: read(x, given) for k, x in kwargs.items()})
            made = made if isinstance(made, (tuple, list)) else (made,)
            for place, write in zip(places, writes, strict=True):
                to = write(given)
                (to if is_torch(to) else from_dlpack(to)).copy_(made[place])

    return act
