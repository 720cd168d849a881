"""Cut: which nodes of a graph become regions.

A region is one attention node, or the nodes between contractions whose operands are both data: the producers' scores
flow through maps, views and reductions into the consumers.  Linear layers (an operand is a parameter) stay outside.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.finish import finish
from memcomp.capture.reader import Reader, meta
from memcomp.capture.region import Refused, Region
from memcomp.capture.value import Value
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Var

ATTENTION = "scaled_dot_product_attention"
PASSES = ("view", "map", "reduce")
TRAILING = ("view", "transpose", "permute", "same", "convert", "dropout")
COMPOSITES = ("softmax", "_safe_softmax")
OPAQUE = ("flex_attention", "_scaled_dot_product", "multi_head_attention", "_transformer_encoder_layer_fwd")


@dataclass(frozen=True)
class Group:
    """Contractions that feed each other, and all nodes between them."""

    core: frozenset[fx.Node]
    ends: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Places:
    """Where nodes stand in the graph, and which tensors are written where: (position, root of the tensor)."""

    order: dict[fx.Node, int]
    writes: tuple[tuple[int, fx.Node], ...]

    @staticmethod
    def of(gm: fx.GraphModule) -> Places:
        order = {n: k for k, n in enumerate(gm.graph.nodes)}
        writes = ((order[n], _root(x)) for n in order if table.mutates(n) and table.rule(n) is None
                  for x in table.written(n))
        return Places(order, tuple(writes))


def find_regions(gm: fx.GraphModule) -> tuple[list[Region], list[Refused]]:
    """All regions of a graph in its order, and the attention-like candidates that could not be read.

    Nodes need example values (`example_value` from Dynamo, `val` from export).  The graph keeps its meaning; users of a
    tensor that come after an operator that writes into it are only made to name that operator's result.
    """
    _name_writes(gm)
    regions: list[Region] = []
    refused: list[Refused] = []
    places = Places.of(gm)
    for group in _groups(gm):
        try:
            regions.append(_region(gm, group, places, f"region{len(regions)}"))
        except Refusal as why:
            refused.append(Refused(source(group.ends[-1]), "; ".join(s for s in (why.what, why.hint) if s)))
    taken = {n for g in regions for n in g.nodes}
    for node, reason in _missed(gm, taken, {r.where for r in refused}):
        refused.append(Refused(source(node), reason))
    return regions, refused


def _name_writes(gm: fx.GraphModule) -> None:
    """`x.mul_(2); y = x + 1` becomes `w = x.mul_(2); y = w + 1`: the same tensor, but each value has one name."""
    passed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        passed.add(node)
        target = node.args[0] if node.args else None
        if table.returns_target(node) and isinstance(target, fx.Node):
            target.replace_all_uses_with(node, delete_user_cb=lambda u: u not in passed)


# -- candidates ---------------------------------------------------------------------------------------------------


def _tensors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if isinstance(meta(n), torch.Tensor)]


def _weight(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Is the node a parameter, seen through views and conversions?"""
    while True:
        if node.op == "get_attr":
            return isinstance(table.attribute(gm, str(node.target)), torch.nn.Parameter)
        if node.op == "placeholder":
            return isinstance(meta(node), torch.nn.Parameter)
        r = table.rule(node)
        if r is None or r.kind != "view" and table.base_name(node) != "convert" or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a contraction multiplies."""
    inputs = _tensors(node.all_input_nodes)
    return inputs[1:] if table.base_name(node) == "baddbmm" else inputs


def _is_anchor(gm: fx.GraphModule, node: fx.Node) -> bool:
    r = table.rule(node)
    if r is None or r.kind != "contract" or table.base_name(node) == ATTENTION:
        return False
    inputs = _operands(node)
    if not inputs or any(_weight(gm, n) for n in inputs) or not all(meta(n).is_floating_point() for n in inputs):
        return False
    if table.base_name(node) == "einsum":
        return True
    first = meta(inputs[0])
    return first.ndim >= 2 and not (isinstance(first.shape[-1], int) and first.shape[-1] == 1)


def _batched(node: fx.Node) -> bool:
    """Do both operands of the contraction carry a batch rank?"""
    if table.base_name(node) == "einsum":
        left, _, right = str(node.args[0]).partition("->")
        shared = set.intersection(*(set(x) for x in left.replace(" ", "").split(",")))
        return bool(shared & set(right))
    return all(meta(n).ndim > 2 for n in _operands(node))


def _groups(gm: fx.GraphModule) -> list[Group]:
    anchors = {n for n in gm.graph.nodes if _is_anchor(gm, n)}
    reach: dict[fx.Node, frozenset[fx.Node]] = {}
    for n in gm.graph.nodes:
        if n in anchors:
            reach[n] = frozenset((n,))
            continue
        r = table.rule(n)
        passing = r is not None and r.kind in PASSES
        reach[n] = frozenset(a for i in n.all_input_nodes for a in reach[i]) if passing else frozenset()
    feeds: dict[fx.Node, set[fx.Node]] = {}
    for n in gm.graph.nodes:
        if n in anchors:
            makers = {a for i in n.all_input_nodes for a in reach[i] if a not in feeds}
            if makers:
                feeds[n] = makers
    groups = [Group(frozenset((n,)), (n,)) for n in gm.graph.nodes
              if table.rule(n) is not None and table.base_name(n) == ATTENTION]
    for ends, makers in _joined(feeds):
        core = _between(ends, makers, reach, anchors)
        reducing = any((r := table.rule(n)) is not None and r.kind == "reduce" for n in core)
        if reducing or all(_batched(n) for n in (*ends, *makers)):
            groups.append(Group(frozenset(core), tuple(ends)))
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    return sorted(groups, key=lambda g: max(order[n] for n in g.ends))


def _joined(feeds: dict[fx.Node, set[fx.Node]]) -> list[tuple[list[fx.Node], set[fx.Node]]]:
    """Consumers that share a producer stand in one group."""
    out: list[tuple[list[fx.Node], set[fx.Node]]] = []
    for end, makers in feeds.items():
        touching = [g for g in out if g[1] & makers]
        merged: tuple[list[fx.Node], set[fx.Node]] = ([end], set(makers))
        for g in touching:
            merged = (g[0] + merged[0], g[1] | merged[1])
            out.remove(g)
        out.append(merged)
    return out


def _between(ends: Sequence[fx.Node], makers: set[fx.Node], reach: dict[fx.Node, frozenset[fx.Node]],
             anchors: set[fx.Node]) -> set[fx.Node]:
    core = set(ends) | makers
    todo = [i for e in ends for i in e.all_input_nodes]
    while todo:
        n = todo.pop()
        if n in core or not reach[n] & makers or n in anchors:
            continue
        core.add(n)
        todo += n.all_input_nodes
    return core


# -- one region ---------------------------------------------------------------------------------------------------


def _region(gm: fx.GraphModule, group: Group, places: Places, name: str) -> Region:
    for n in group.core:
        m = meta(n)
        if isinstance(m, torch.Tensor) and m.is_complex():
            raise Refusal("complex numbers")
        if table.base_name(n) == ATTENTION:
            _agree(n)
    stop: set[fx.Node] = set()
    while True:
        try:
            return _read(gm, group, places, name, stop)
        except _Order as why:
            if why.nodes <= stop:
                raise
            stop |= why.nodes


def _agree(node: fx.Node) -> None:
    """torch's shape rule does not tie the lengths of keys and values, which a kernel relies on: ask, and so guard."""
    named = {**dict(zip(("query", "key", "value"), node.args, strict=False)), **node.kwargs}
    q, k, v = (meta(n) for n in (named.get("query"), named.get("key"), named.get("value")) if isinstance(n, fx.Node))
    if not (k.shape[-2] == v.shape[-2] and q.shape[-1] == k.shape[-1]):
        raise Refusal("keys and values, or queries and keys, differ in length")


class _Order(Refusal):
    """The region cannot be computed at one place of the graph; not reading through `nodes` may help."""

    def __init__(self, what: str, nodes: Iterable[fx.Node]) -> None:
        self.nodes = frozenset(nodes)
        super().__init__(what)


def _read(gm: fx.GraphModule, group: Group, places: Places, name: str, stop: set[fx.Node]) -> Region:
    r, order = Reader(gm, group.core, stop), places.order
    nodes = set(group.core)
    outputs: list[tuple[fx.Node, Value]] = []
    for n in group.ends:
        r.read(n)
    nodes |= _inner(r.through, group.core)
    for n in sorted(group.core, key=order.__getitem__):
        if n in group.ends or any(u not in nodes for u in n.users):
            v = r.read(n)
            if not isinstance(v, Value):
                if any(u not in nodes and u.target is not operator.getitem for u in n.users):
                    raise Refusal(f"{n} is not one tensor", where=str(n))
                continue
            end, v, chain = _trailing(r, n, v)
            nodes |= chain
            outputs.append((end, v))
    done = finish(r, _program_name(outputs[-1][0]), outputs)
    ends = tuple(n for n, _ in outputs)
    sizes = [n for _, n in done.sizes if isinstance(n, fx.Node)]
    _check_convex(nodes, done.inputs, set(r.through))
    anchor = _place(order, nodes, ends, [*done.inputs, *sizes], set(r.through))
    _check_mutation(places, nodes, done.inputs, set(r.through), order[anchor])
    return Region(name, done.program, done.inputs, done.sizes, ends, tuple(sorted(nodes, key=order.__getitem__)),
                  source(ends[-1]), tuple(_order(n) for n in ends), anchor)


def _inner(through: Iterable[fx.Node], core: frozenset[fx.Node]) -> set[fx.Node]:
    """Nodes read through that come from the core and serve nothing else (`zeros_like(weights)`)."""
    inside, inner = set(core), set()
    for n in reversed(list(through)):
        if n not in inside and all(u in inside for u in n.users):
            inner.add(n)
            inside.add(n)
    after: set[fx.Node] = set()
    for n in through:
        if any(i in after or i in core for i in n.all_input_nodes):
            after.add(n)
    return inner & after


def _trailing(r: Reader, node: fx.Node, v: Value) -> tuple[fx.Node, Value, set[fx.Node]]:
    """Follow the only user while it rearranges; end at the last node whose dimensions are the statement's own."""
    best, chain, seen = (node, v), {node}, {node}
    at, w = node, v
    while len(at.users) == 1:
        user = next(iter(at.users))
        rule = table.rule(user)
        if rule is None or table.base_name(user) not in TRAILING or user.all_input_nodes[0] is not at:
            break
        r.memo[at] = w
        try:
            out = r.apply(rule, user)
        except Refusal:
            break
        if not isinstance(out, Value):
            break
        at, w = user, out
        seen.add(at)
        if _rearranged(r, w):
            best, chain = (at, w), set(seen)
    return best[0], best[1], chain


def _rearranged(r: Reader, v: Value) -> bool:
    if any(len(d) != 1 for d in v.dims):
        return False
    e = r.probe(v)
    return isinstance(e, Access) and all(isinstance(i, (Var, Const)) for i in e.index)


def _place(order: dict[fx.Node, int], nodes: set[fx.Node], outputs: Sequence[fx.Node], inputs: Sequence[fx.Node],
           through: set[fx.Node]) -> fx.Node:
    """The node before which the region can be computed as a whole."""
    last = max(outputs, key=order.__getitem__)
    users = [u for n in outputs for u in n.users if u not in nodes]
    first = min(users, key=order.__getitem__, default=last)
    place = last if order[last] < order[first] else first
    if any(order[i] >= order[place] for i in inputs):
        raise _Order("an input is computed after the first use of a result", through)
    return place


def _check_convex(nodes: set[fx.Node], inputs: Sequence[fx.Node], through: set[fx.Node]) -> None:
    after: set[fx.Node] = set()
    todo = [u for n in nodes for u in n.users if u not in nodes]
    while todo:
        n = todo.pop()
        if n not in after:
            after.add(n)
            todo += n.users
    if bad := [n for n in inputs if n in after or n in nodes]:
        raise _Order(f"{table.base_name(bad[0]) or bad[0]} stands between its nodes and cannot be read", through)


ALIASING = ("view", "expand", "permute", "transpose", "t", "numpy_T", "getattr", "slice", "narrow", "select", "split",
            "chunk", "split_with_sizes", "tensor_split", "unbind", "getitem")


def _root(node: fx.Node) -> fx.Node:
    """The tensor whose memory the node may show."""
    while (table.base_name(node) in (*ALIASING, "same", "convert") or table.mutates(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _check_mutation(places: Places, nodes: set[fx.Node], inputs: Sequence[fx.Node], through: set[fx.Node],
                    place: int) -> None:
    """What is read through may not be written later, nor an input between where the graph and the region read it."""
    order, writes = places.order, places.writes
    last = max(order[n] for n in nodes)
    changed = {w for k, w in writes if k < last and (w in nodes or w in through)}
    if changed:
        raise _Order(f"{next(iter(changed))} is written after it was made", changed & through)
    for root in {_root(leaf) for leaf in inputs}:
        reading = [n for n in nodes | through if table.base_name(n) not in ALIASING
                   and any(_root(a) is root for a in n.all_input_nodes)]
        moved = {n for n in reading if any(w is root and min(order[n], place) <= k < max(order[n], place)
                                           for k, w in writes)}
        if moved:
            raise _Order(f"{root} is written while the region would read it", moved & through)


def _order(node: fx.Node) -> tuple[int, ...]:
    """Where users transpose heads and positions next, store so that what follows needs no copy."""
    swaps = any(table.base_name(u) == "transpose" and set(u.args[1:]) in ({1, 2}, {-3, -2}) for u in node.users)
    return (0, 2, 1, 3) if swaps and meta(node).ndim == 4 else ()


def source(node: fx.Node) -> str:
    """Module path and file:line of the user's code that made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = path.replace("L['self'].", "").replace("L['self']", "").replace("_modules['", "").replace("']", "")
    lines = [x.strip() for x in str(node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File ")]
    where = ""
    if lines:
        file, _, rest = lines[-1].removeprefix('File "').partition('", line ')
        where = f"{file}:{rest.split(',')[0]}"
    return " ".join(s for s in (path, where) if s) or str(node)


def _program_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    last = str(list(stack.values())[-1][0]).rpartition(".")[2] if stack else ""
    return last if last.isidentifier() else "region"


def _missed(gm: fx.GraphModule, taken: set[fx.Node], reported: set[str]) -> list[tuple[fx.Node, str]]:
    """Attention-like nodes outside all regions that have not been reported."""
    out = []
    for n in gm.graph.nodes:
        name = table.base_name(n)
        if n in taken or source(n) in reported:
            continue
        if any(x in name for x in OPAQUE):
            out.append((n, f"{name} is one operator here and has no rule"))
        elif name in COMPOSITES and (between := _after_contraction(gm, n)) is not None:
            out.append((n, f"{between[0]} stands between the contraction and it" if between else
                        "its weights do not reach a second contraction through operators that have rules"))
    return out


def _after_contraction(gm: fx.GraphModule, node: fx.Node) -> list[str] | None:
    """None: no contraction of data feeds the node; else the operators on the way that cannot be read."""
    seen: set[fx.Node] = set()
    between: list[str] = []
    found = False
    todo = list(node.all_input_nodes)
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if _is_anchor(gm, n):
            found = True
            continue
        r, inputs = table.rule(n), _tensors(n.all_input_nodes)
        if r is None or r.kind not in PASSES:
            if len(inputs) != 1:
                continue
            between.append(table.base_name(n))
        todo += inputs
    return between if found else None
