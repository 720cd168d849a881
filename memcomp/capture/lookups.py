"""Places in tensors that index tensors name: torch looks whether they exist, and a region computes without looking."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.reader import meta

if TYPE_CHECKING:
    from memcomp.capture.region import Region


@dataclass(frozen=True)
class Lookup:
    """`index` names elements of dimension `dim` of `read`, from the end too where it `wraps`; `ignored` names none."""

    index: fx.Node
    read: fx.Node
    dim: int
    wraps: bool = False
    ignored: int | None = None


def lookups(nodes: Collection[fx.Node]) -> tuple[Lookup, ...]:
    """Those of the nodes that a region is computed from, each once, as far as what they name is known outside of it: by
    its inputs and arithmetic on integers.  What it selects itself (argmax, top-k) is inside, and an index without data
    was read."""
    found, inside = [x for n in nodes for x in _of(n)], {n for n in nodes if n.op not in ("placeholder", "get_attr")}
    return tuple(dict.fromkeys(x for x in found if _known_outside(x.index, inside)))


def ancestors(region: Region) -> list[fx.Node]:
    """Nodes between the region's inputs and its outputs, in graph order; the inputs themselves excluded."""
    stop = {*region.inputs, *(n for _, n in region.sizes if isinstance(n, fx.Node))}
    found: set[fx.Node] = set()
    todo = [n for n in region.outputs if n not in stop]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [n for n in node.all_input_nodes if n not in stop]
    return [n for n in region.outputs[0].graph.nodes if n in found]


def _of(node: fx.Node) -> Iterator[Lookup]:
    rule, name = table.rule(node), table.base_name(node)
    if rule is None or name not in ("gather", "index_select", "index", "getitem", "embedding", "nll_loss",
                                    "cross_entropy", "cross_entropy_loss"):
        return
    given = table.named(rule, node)
    x = given["x"]
    if not isinstance(x, fx.Node) or not isinstance(t := meta(x), torch.Tensor):
        return
    if name == "embedding":
        yield Lookup(given["indices"], x, 0)
    elif name in ("gather", "index_select"):
        yield Lookup(given["index"], x, given["dim"] % max(t.ndim, 1))
    elif name in ("index", "getitem"):
        for dim, i in _indexed(given, t.ndim):
            if isinstance(i, fx.Node) and isinstance(meta(i), torch.Tensor):
                yield Lookup(i, x, dim, wraps=True)
    else:
        yield Lookup(given["target"], x, min(1, t.ndim - 1), ignored=given.get("ignore_index", -100))


def _indexed(given: Mapping[str, Any], ndim: int) -> Iterator[tuple[int, Any]]:
    """Which dimension each item of an index stands for."""
    items = given["indices"] if "indices" in given else given["index"]
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    new = 0 if "indices" in given else sum(i is None for i in items)
    dim = 0
    for i in items:
        if i is Ellipsis:
            dim += ndim - (len(items) - 1 - new)
        elif i is not None or "indices" in given:
            yield dim, i
            dim += 1


def _known_outside(index: fx.Node, inside: Collection[fx.Node]) -> bool:
    data = False
    todo, seen = [index], set[fx.Node]()
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        value = meta(n)
        if n not in inside:
            data = data or isinstance(value, torch.Tensor)
        elif not isinstance(value, torch.Tensor) or value.is_floating_point():
            return False
        else:
            todo += n.all_input_nodes
    return data
