"""A Relax function as a torch module, with inputs made up for it: what the command line reads."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from memcomp.capture.lookups import lookups
from memcomp.capture.reader import meta
from memcomp.capture.relax.reader import functions, read
from memcomp.ir.errors import InputError, nearest
from memcomp.signature import Dim


def function(module: Any, name: str = "") -> tuple[fx.GraphModule, tuple[torch.Tensor, ...],
                                                   tuple[dict[int, Dim], ...]]:
    """The Relax function `name` of an IRModule (by default its only one, else main) as a torch module, tensors to call
    it with, and which of their extents are open, by dim.

    Raises InputError where there is none, or some of its operators have no row in the table.
    """
    from tvm import relax

    known = {str(n.name_hint): f for n, f in functions(module)}
    if not name:
        name = next(iter(known)) if len(known) == 1 else "main"
        if known and name not in known:
            raise InputError("the IRModule has several Relax functions, and none is called main",
                             hint=f"say which, module:name@function: {', '.join(sorted(known))}")
    if name not in known:
        raise InputError(f"the IRModule has no Relax function {name!r}", hint=nearest(name, known))
    found = known[name]
    body = found.body
    if not isinstance(body, relax.SeqExpr):
        raise InputError(f"the Relax function {name!r} is not in normal form",
                         hint="relax.transform.Normalize()(module)")
    bounds = {str(n): int(x) for n, x in dict((found.attrs or {}).get("tir_var_upper_bound", {})).items()}
    sizes: dict[str, int] = {}
    for v in relax.analysis.defined_symbolic_vars(found):
        sizes[v.name] = _hint(bounds.get(v.name), set(sizes.values()))
    block = read(found, [b for part in body.blocks for b in part.bindings], [body.body], sizes)
    if block.left:
        told = "; ".join(f"{r.where}: {r.why}" for r in block.left)
        raise InputError(f"the Relax function {name!r} has operators that cannot be read", told,
                         "memcomp.relax.FuseRegions takes what can be, and leaves the rest to TVM")
    given = [n for n in block.gm.graph.nodes if n.op == "placeholder"]
    if hidden := [n for n in given if not isinstance(meta(n), torch.Tensor)]:
        raise InputError(f"the size {block.sizes[hidden[0]]} is no extent of a tensor that comes in",
                         hint="memcomp.relax.FuseRegions takes such functions")
    limits = {n: _limit(block.gm, n) for n in given}
    dims: list[dict[int, Dim]] = []
    for n in given:
        shape = block.tensors[n].ty.shape.values
        dims.append({d: Dim(shape[d].name, *_range(s)) for d, s in enumerate(meta(n).shape)
                     if isinstance(s, torch.SymInt) and hasattr(shape[d], "name")})
    return block.gm, tuple(_example(meta(n), limits[n]) for n in given), tuple(dims)


def _hint(most: int | None, used: set[int]) -> int:
    """An extent to run with; no two are equal, since torch takes equal ones for one and the same."""
    found = 61 if most is None or most > 61 else most
    while found in used:
        found = sympy.nextprime(found) if most is None or most > 61 else found - 1
    return int(found)


def _range(size: torch.SymInt) -> tuple[int, int | None]:
    known = size.node.shape_env.bound_sympy(size.node.expr)
    return max(int(known.lower), 2), int(known.upper) if known.upper < 1 << 40 else None


def _limit(gm: fx.GraphModule, node: fx.Node) -> int:
    """How many elements an input of integers names, as far as the graph looks up anything with it."""
    named = [int(meta(x.read).shape[x.dim]) for x in lookups(list(gm.graph.nodes)) if x.index is node]
    return min(named, default=2)


def _example(like: torch.Tensor, limit: int) -> torch.Tensor:
    shape, random = [int(s) for s in like.shape], torch.Generator().manual_seed(0)
    if like.dtype.is_floating_point:
        return torch.randn(shape, generator=random).to(like.dtype)
    return torch.randint(0, limit, shape, generator=random).to(like.dtype)
