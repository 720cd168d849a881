"""Slices of a tensor that are replaced at places which another tensor names: `index_copy`, and `index_put` along one
dim.  A cache of keys and values is written so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from memcomp.capture import table
from memcomp.capture.reader import meta


@dataclass(frozen=True)
class Put:
    """`node` is `of`, but for the slices of `source` along a dim at the places that `index`, of one dim or none, names;
    wraps: from its end too."""

    node: fx.Node
    of: fx.Node
    source: fx.Node
    index: fx.Node
    dim: int
    wraps: bool

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return (self.node,)


def put(node: fx.Node) -> Put | None:
    """What a node puts where; None where it does something else, or its source has not the shape of what it replaces
    (`spelled`)."""
    found = _read(node)
    return found if found is not None and _fits(found) else None


def spelled(gm: fx.GraphModule) -> None:
    """What is written over all of a tensor as what it is, and what `index_put` writes broadcast to the shape of what
    it replaces, as operators of their own."""
    for n in list(gm.graph.nodes):
        if n.target is torch.ops.aten.copy.default:
            _copied(gm, n)
            continue
        p = _read(n)
        if p is None or _fits(p) or table.base_name(n) == "index_copy":
            continue
        shape, value, (x, indices, source) = list(meta(p.of).shape), meta(p.source), n.args[:3]
        point = meta(p.index).ndim == 0
        rest = [s for d, s in enumerate(shape) if d != p.dim or not point]
        if not point:
            rest[p.dim] = meta(p.index).shape[0]
        with gm.graph.inserting_before(n):
            wide = gm.graph.call_function(torch.ops.aten.expand.default, (source, rest))
            wide.meta = {**n.meta, "val": value.expand(rest)}
            if point:
                flat, wide = wide, gm.graph.call_function(torch.ops.aten.unsqueeze.default, (wide, p.dim))
                wide.meta = {**n.meta, "val": meta(flat).unsqueeze(p.dim)}
        n.args = (x, indices, wide, *n.args[3:])


def _copied(gm: fx.GraphModule, n: fx.Node) -> None:
    n.replace_all_uses_with(written_over(gm, n, n.all_input_nodes[-1], meta(n)))
    gm.graph.erase_node(n)


def written_over(gm: fx.GraphModule, at: fx.Node, now: fx.Node, value: torch.Tensor) -> fx.Node:
    """What a tensor like `value` holds once `at` has written `now` over all of it: of its own shape and dtype."""
    with gm.graph.inserting_before(at):
        if not _alike(meta(now).shape, value.shape):
            wide = gm.graph.call_function(torch.ops.aten.expand.default, (now, list(value.shape)))
            wide.meta = {**at.meta, "val": meta(now).expand(value.shape)}
            now = wide
        if meta(now).dtype != value.dtype:
            made = gm.graph.call_function(torch.ops.aten._to_copy.default, (now,), {"dtype": value.dtype})
            made.meta = {**at.meta, "val": meta(now).to(value.dtype)}
            now = made
    return now


def _alike(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _read(node: fx.Node) -> Put | None:
    name = table.base_name(node)
    if name not in ("index_copy", "index_put") or not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [a.name for a in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, source = given["self"], given["source" if name == "index_copy" else "values"]
    if name == "index_copy":
        dim, index = given["dim"] % max(meta(x).ndim, 1), given["index"]
    else:
        named = [(d, i) for d, i in enumerate(given["indices"]) if i is not None]
        if len(named) != 1 or given.get("accumulate"):
            return None
        ((dim, index),) = named
    if not all(isinstance(i, fx.Node) and isinstance(meta(i), torch.Tensor) for i in (x, source, index)):
        return None
    where, made = meta(index), meta(x)
    if where.dtype not in (torch.int64, torch.int32) or where.ndim > 1 or made.dtype != meta(source).dtype or \
            not made.ndim:
        return None
    return Put(node, x, source, index, dim, name == "index_put")


def _fits(p: Put) -> bool:
    x, source, index = (meta(n).shape for n in (p.of, p.source, p.index))
    wanted = [*x[:p.dim], index[0] if index else 1, *x[p.dim + 1:]]
    return _alike(source, wanted)
