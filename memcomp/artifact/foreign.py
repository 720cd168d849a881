"""Steps that torch runs, where it is installed: operators of its own, by their names, never code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memcomp.artifact.arrays import is_torch
from memcomp.artifact.manifest import expression
from memcomp.artifact.plan import Step
from memcomp.ir.errors import Refusal
from memcomp.sizes import evaluate


def by_torch(step: Step, sizes: Mapping[str, int], reads: Sequence[Callable[[list[Any]], Any]],
              writes: Sequence[Callable[[list[Any]], Any]]) -> Callable[[list[Any]], None]:
    """A step that torch runs: an operator of torch's own, by its name; what it makes is copied to where it belongs."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise Refusal(f"{step.what} needs torch, which is not installed",
                      hint="pip install torch, or compile with --strict to see what is in the way") from error
    from torch.utils.dlpack import from_dlpack

    from memcomp.dtypes import DTYPES

    space, _, rest = step.what.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if space == "aten" else None
    run = getattr(packet, overload, None)
    if not isinstance(run, torch._ops.OpOverload):
        raise Refusal(f"torch {torch.__version__} has no operator {step.what}")
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
            return evaluate(expression(value), sizes) if kind == "size" else \
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
