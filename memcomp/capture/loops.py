"""Unrolled loops: pieces that are computed alike and then put together, as Dynamo leaves a Python loop.

A loop's results meet in one `cat` or `stack`, or are written into slices of a fresh tensor (`collect` makes that a
`cat`).  All steps are read as one region, whose program `passes.reroll` then turns into one step over a new rank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.candidates import ATTENTION, weight
from memcomp.capture.reader import meta

COLLECT = ("cat", "stack")
FRESH = ("zeros", "zeros_like", "empty", "empty_like", "new_zeros", "new_empty")
STEP = ("view", "map", "reduce", "contract", "source")
MANY = 16
"""So many steps are not compiled one by one: each would be a kernel of its own and its time to compile."""
SUGGESTION = ("write the loop as one operation over all steps, with a mask that says what each step sees "
              "(`where(allowed, scores, -inf)`), or give all steps one form")


@dataclass(frozen=True)
class Loop:
    """end: the node that puts the pieces together; core: all nodes that only this serves; steps: how many pieces."""

    core: frozenset[fx.Node]
    end: fx.Node
    steps: int


def loops(gm: fx.GraphModule) -> list[Loop]:
    """Nodes that collect what two or more steps compute, each with a reduction; the outermost where they nest."""
    out: list[Loop] = []
    inner: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if table.base_name(node) in COLLECT and node not in inner and len(_pieces(node)) > 1:
            core = _core(gm, node)
            inner |= core.keys()
            reducing = {k for n, k in core.items() if k is not node and _reduces(n)}
            if len(reducing) > 1:
                out.append(Loop(frozenset(core), node, _steps(node, core)))
    return out[::-1]


def _pieces(node: fx.Node) -> list[fx.Node]:
    found = node.args[0] if node.args else node.kwargs.get("tensors")
    return [n for n in found if isinstance(n, fx.Node)] if isinstance(found, (list, tuple)) else []


def _steps(node: fx.Node, core: dict[fx.Node, fx.Node]) -> int:
    """Pieces, those of loops inside counted one by one."""
    return sum(_steps(n, core) if n in core and table.base_name(n) in COLLECT else 1 for n in _pieces(node))


def _core(gm: fx.GraphModule, end: fx.Node) -> dict[fx.Node, fx.Node]:
    """What is computed for one piece alone -> that piece; the end for itself."""
    core = {end: end}
    n, waiting = end, set(end.all_input_nodes)
    while waiting:  # users stand after what they use, so a node's owners are known when it is reached
        n = n.prev
        waiting.discard(n)
        owners = {n if u is end else core.get(u) for u in n.users}
        if len(owners) == 1 and (owner := owners.pop()) is not None and _step(gm, n):
            core[n] = owner
            waiting.update(n.all_input_nodes)
    return core


def _step(gm: fx.GraphModule, n: fx.Node) -> bool:
    """May a step compute the node: by a rule, and not a layer (a product with a parameter)?"""
    r = table.rule(n)
    if r is None or r.kind not in STEP:
        return False
    return r.kind != "contract" or not any(weight(gm, i) for i in n.all_input_nodes)


def _reduces(n: fx.Node) -> bool:
    r = table.rule(n)
    return r is not None and r.kind == "reduce" or table.base_name(n) == ATTENTION


# -- writes into slices -----------------------------------------------------------------------------------------------


def collect(gm: fx.GraphModule) -> None:
    """`o = zeros(n, e); o[0:1] = a; o[1:n] = b; use(o)` becomes `use(cat([a, b]))`: the graph keeps its meaning.

    Only where the slices tile the tensor and nobody looks at it before the last is written.
    """
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method") or table.base_name(node) not in FRESH:
            continue
        writes = [u for u in node.users if _is_write(u, node)]
        if len(writes) > 1 and (places := [_place(w) for w in writes]) and None not in places:
            _collected(gm, node, writes, [p for p in places if p is not None])


Place = tuple[tuple[int, int] | int | None, ...]
"""Per dimension: a slice, an index, or None for all of it."""


def _is_write(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.setitem and user.args[0] is node and isinstance(user.args[2], fx.Node)


def _place(write: fx.Node) -> Place | None:
    """Where a write goes, if that is a box of fixed place."""
    target = meta(write.args[0])  # type: ignore[arg-type]
    items: list[Any] = list(write.args[1]) if isinstance(write.args[1], (tuple, list)) else [write.args[1]]
    shape: list[Any] = list(target.shape)
    out: list[tuple[int, int] | int | None] = []
    if Ellipsis in [x for x in items if not isinstance(x, fx.Node)]:
        k = items.index(Ellipsis)
        items[k:k + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    for size, x in zip(shape, items, strict=False):
        if isinstance(x, slice) and x == slice(None):
            out.append(None)
        elif not isinstance(size, int):
            return None
        elif isinstance(x, slice) and all(b is None or isinstance(b, int) for b in (x.start, x.stop, x.step)):
            first, end, step = x.indices(size)
            if step != 1:
                return None
            out.append(None if (first, end) == (0, size) else (first, end))
        elif isinstance(x, int) and not isinstance(x, bool):
            out.append(x % size)
        else:
            return None
    return (*out, *(None,) * (len(shape) - len(out)))


def _collected(gm: fx.GraphModule, node: fx.Node, writes: list[fx.Node], places: list[Place]) -> None:
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    last = max(writes, key=order.__getitem__)
    others = [u for u in node.users if u not in writes]
    if any(order[u] < order[last] for u in others) or any(w.users for w in writes):
        return
    target = meta(node)
    if any(meta(w.args[2]).dtype != target.dtype for w in writes):  # type: ignore[arg-type]
        return
    rest = [(p, w.args[2]) for p, w in zip(places, writes, strict=True)]
    if not _tiles(rest, list(target.shape)):
        return
    with gm.graph.inserting_after(last):
        anchor = gm.graph.call_function(torch.clone, (node,))  # a place to build before
    with gm.graph.inserting_before(anchor):
        whole = _assembled(gm, rest, list(target.shape), 0)
    node.replace_all_uses_with(whole, delete_user_cb=lambda u: u not in writes and u is not anchor)
    for w in (anchor, *writes, node):
        gm.graph.erase_node(w)


def _tiles(rest: Sequence[tuple[Place, Any]], shape: list[Any], dim: int = 0) -> bool:
    """Do the boxes fill the tensor, each place once, row by row?"""
    if dim == len(shape):
        return len(rest) == 1
    rows: dict[tuple[int, int] | None, list[tuple[Place, Any]]] = {}
    for p, v in rest:
        x = p[dim]
        rows.setdefault((x, x + 1) if isinstance(x, int) else x, []).append((p, v))
    if None in rows:
        return len(rows) == 1 and _tiles(rest, shape, dim + 1)
    ends = [0, *(b for _, b in sorted(r for r in rows if r is not None))]
    starts = [*(a for a, _ in sorted(r for r in rows if r is not None)), shape[dim]]
    return starts == ends and all(_tiles(row, shape, dim + 1) for row in rows.values())


def _assembled(gm: fx.GraphModule, rest: Sequence[tuple[Place, Any]], shape: list[Any], dim: int) -> fx.Node:
    if dim == len(shape):
        place, value = rest[0]
        want = [n if p is None else 1 if isinstance(p, int) else p[1] - p[0] for p, n in zip(place, shape, strict=True)]
        kept = [n for p, n in zip(place, want, strict=True) if not isinstance(p, int)]
        if list(meta(value).shape) != kept:
            value = _node(gm, torch.Tensor.expand, value, *kept)
        return value if len(kept) == len(want) else _node(gm, torch.Tensor.reshape, value, want)
    rows: dict[int, list[tuple[Place, Any]]] = {}
    for p, v in rest:
        x = p[dim]
        rows.setdefault(-1 if x is None else x if isinstance(x, int) else x[0], []).append((p, v))
    parts = [_assembled(gm, rows[k], shape, dim + 1) for k in sorted(rows)]
    return parts[0] if len(parts) == 1 else _node(gm, torch.cat, parts, dim)


def _node(gm: fx.GraphModule, f: Any, *args: Any) -> fx.Node:
    """A call with its example value."""
    name = f.__name__
    out = gm.graph.call_function(f, args) if f is torch.cat else gm.graph.call_method(name, args)
    out.meta["example_value"] = f(*fx.map_arg(args, meta))
    source = next((n for n in out.all_input_nodes), None)
    if source is not None:
        out.meta |= {k: v for k, v in source.meta.items() if k in ("nn_module_stack", "stack_trace")}
    return out
