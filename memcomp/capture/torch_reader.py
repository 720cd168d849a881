"""Getting graphs from torch: through Dynamo, and from torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from memcomp.ir.errors import InputError


def capture(fn: Callable[..., Any], *example_inputs: Any, dynamic: bool | None = None,
            level: Literal["dynamo", "export"] = "dynamo", kwargs: dict[str, Any] | None = None) -> fx.GraphModule:
    """The graph of one call of `fn` on the example inputs.

    dynamo: as a torch.compile backend gets it (one graph, parameters lifted).  export: as torch.export gives it.
    dynamic: lengths symbolic (True), fixed (False) or as torch decides (None).  Raises InputError where `fn` does not
    give one graph.
    """
    kwargs = kwargs or {}
    if level == "export":
        module = fn if isinstance(fn, torch.nn.Module) else _Wrapped(fn)
        shapes = _auto(module, example_inputs, kwargs) if dynamic else None
        return read_exported(torch.export.export(module, example_inputs, kwargs, dynamic_shapes=shapes, strict=False))
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    name = getattr(fn, "__name__", type(fn).__name__)
    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*example_inputs, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as why:
        raise InputError(f"{name} does not give one graph", str(why).partition("\n")[0],
                         "torch.compile(fn, fullgraph=True) must accept it") from why
    if len(graphs) != 1:
        raise InputError(f"{name} gives {len(graphs)} graphs, not one graph",
                         hint="fn must compute something on tensors")
    return graphs[0]


def read_exported(ep: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph module of an exported program, its parameters as attributes."""
    gm = ep.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


class _Wrapped(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def _auto(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All lengths of all tensors left for torch to decide."""
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor):
            shapes[x] = {k: torch.export.Dim.AUTO for k in range(x.ndim)}
    return shapes.dynamic_shapes(module, args, kwargs)
