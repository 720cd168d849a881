"""What else a group can compute on the way: other reductions of its scores, maps of its results, norms of its operands.

All of it is optional: where a grown or merged group cannot be read, the groups it was made of are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.extent import Extent, same
from memcomp.capture.reader import elements, meta, shape_of
from memcomp.capture.writes import mutates

Reach = Mapping[fx.Node, frozenset[fx.Node]]
_ALONG = ("dim", "normalized_shape")


def grown(core: frozenset[fx.Node], makers: frozenset[fx.Node], reach: Reach, scalars: bool) -> frozenset[fx.Node]:
    """The core with side results, what is mapped from results, and normalised operands.

    scalars: also side results that are one number (a mean over everything), which only few kernels can give.
    """
    out = set(core) | {n for n in _reductions(core, makers, reach) if scalars or meta(n).ndim}
    out |= _maps(out, core)
    for n in sorted(core, key=lambda n: n.name):
        if (r := table.rule(n)) is not None and r.kind == "contract":
            for operand in n.all_input_nodes:
                out |= _norm(operand, out)
    return frozenset(out)


def _kind(n: fx.Node) -> str:
    r = table.rule(n)
    return r.kind if r is not None else ""


def _reductions(core: frozenset[fx.Node], makers: frozenset[fx.Node], reach: Reach) -> set[fx.Node]:
    """Reductions of the scores that no contraction of the core needs (log-sum-exp, entropy), and what leads there."""
    def inside(n: fx.Node) -> bool:
        return n not in core and n in reach and bool(reach[n]) and reach[n] <= makers and \
            _kind(n) in ("view", "map", "reduce")

    out: set[fx.Node] = set()
    todo = [n for n in reach if inside(n) and _kind(n) == "reduce" and isinstance(meta(n), torch.Tensor)]
    while todo:
        n = todo.pop()
        if n not in out:
            out.add(n)
            todo += [i for i in n.all_input_nodes if inside(i)]
    return out


def _maps(nodes: set[fx.Node], core: frozenset[fx.Node]) -> set[fx.Node]:
    """Maps of what the group gives, no larger than that; rearrangements only between them."""
    graph = next(iter(core)).graph
    ends = [n for n in nodes if any(u not in nodes for u in n.users) and _kind(n) in ("contract", "reduce")]
    out: set[fx.Node] = set()
    given = set(ends)
    for n in graph.nodes:
        before = n.all_input_nodes
        if n in nodes or not any(i in given for i in before) or _kind(n) not in ("view", "map") or mutates(n):
            continue
        if all(i in given or _small(i, n) for i in before if isinstance(meta(i), torch.Tensor)):
            given.add(n)
            out.add(n)
    while True:
        loose = {n for n in out if not any(u in out for u in n.users)
                 and (_kind(n) == "view" or table.base_name(n) in ("convert", "same", "dropout"))}
        if not loose:
            return out
        out -= loose


def _small(leaf: fx.Node, result: fx.Node) -> bool:
    """Is it a parameter, a constant or an input of few elements: nothing that had to be stored for the map alone?"""
    return elements(leaf) <= elements(result) and leaf.op in ("placeholder", "get_attr")


def _norm(operand: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Maps and reductions over the features that make an operand out of one tensor of its size."""
    if operand in inside or not isinstance(meta(operand), torch.Tensor):
        return set()
    own: set[fx.Node] = set()
    size = elements(operand)
    leaves: dict[fx.Node, None] = {}
    for n in [operand, *_before(operand)]:
        if n is not operand and not any(u in own for u in n.users):
            continue
        fits = (_kind(n) in ("view", "map") or _kind(n) == "reduce" and _over_features(n)) and not mutates(n) \
            and table.base_name(n) != "cat" and elements(n) <= size \
            and all(u in own or u in inside for u in n.users)
        if fits:
            own.add(n)
        elif isinstance(meta(n), torch.Tensor):
            leaves[n] = None
    whole = [n for n in leaves if elements(n) >= size]
    if len(whole) != 1 or not any(_kind(n) == "reduce" for n in own):
        return set()
    return own


def _before(node: fx.Node) -> Iterable[fx.Node]:
    """Nodes that stand before `node`, the last first."""
    at = node
    while at.prev.op != "root":
        at = at.prev
        yield at


def _over_features(n: fx.Node) -> bool:
    """Does it reduce the last dimension, of fixed extent, and nothing else?"""
    first = n.all_input_nodes[0]
    x, y = meta(first), meta(n)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or not x.ndim or \
            not isinstance(x.shape[-1], int):
        return False
    if y.ndim == x.ndim and tuple(y.shape[:-1]) == tuple(x.shape[:-1]) and y.shape[-1] == 1:
        return True
    args, kwargs = table.normal(table.rules()[table.base_name(n)], n)
    given: list[Any] = [kwargs[k] for k in _ALONG if k in kwargs] or list(args[1:2])
    return tuple(y.shape) == tuple(x.shape) and given in (
        [-1], [x.ndim - 1], [(x.shape[-1],)], [[x.shape[-1]]], [torch.Size((x.shape[-1],))])


def shares(a: frozenset[fx.Node], b: frozenset[fx.Node]) -> bool:
    """Do two groups read the same keys and the same values (two tensors in all) for results of one shape?"""
    def outside(core: frozenset[fx.Node]) -> set[fx.Node]:
        found = {_root(i) for n in core if _kind(n) == "contract" for i in n.all_input_nodes if i not in core}
        return {n for n in found if isinstance(meta(n), torch.Tensor) and meta(n).ndim > 1}

    def shapes(core: frozenset[fx.Node]) -> list[tuple[Extent, ...]]:
        return [shape_of(meta(n)) for n in core if _kind(n) == "contract" and any(u not in core for u in n.users)]

    def within(some: list[tuple[Extent, ...]], more: list[tuple[Extent, ...]]) -> bool:
        return all(any(len(x) == len(y) and all(map(same, x, y)) for y in more) for x in some)

    return len(outside(a) & outside(b)) >= 2 and not a & b and within(shapes(a), shapes(b)) \
        and within(shapes(b), shapes(a))


def _root(n: fx.Node) -> fx.Node:
    while _kind(n) == "view" and len(n.all_input_nodes) == 1:
        n = n.all_input_nodes[0]
    return n
