"""Cut: read each candidate, follow its result while it is only rearranged, and prove that one place can compute it all.

Where reading through a node would see what is written later, the node becomes an input and the region is read again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from memcomp.capture import table
from memcomp.capture.candidates import ATTENTION, Group, groups, missed, module_path, source
from memcomp.capture.chains import chains, lawless
from memcomp.capture.decompose import decompose
from memcomp.capture.finish import finish
from memcomp.capture.loops import MANY, SUGGESTION, collect, loops
from memcomp.capture.reader import Reader, meta
from memcomp.capture.region import Refused, Region
from memcomp.capture.value import Value
from memcomp.capture.writes import dual, memory, mutates, transformed, written
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Var
from memcomp.passes.reroll import reroll, unrolled
from memcomp.pipeline import gains

SHARED = 32  # so many statements may stand outside the steps of a loop
TRAILING = ("view", "transpose", "permute", "same", "convert", "dropout")


@dataclass(frozen=True)
class Places:
    """Where nodes stand in the graph, and which tensors are written by which: (writing node, tensor)."""

    order: dict[fx.Node, int]
    writes: tuple[tuple[fx.Node, fx.Node], ...]
    strided: tuple[tuple[fx.Node, Hashable], ...]  # operators that read by strides, and what memory

    @staticmethod
    def of(gm: fx.GraphModule) -> Places:
        order = {n: k for k, n in enumerate(gm.graph.nodes)}
        return Places(order, tuple((n, x) for n in order if mutates(n) for x in written(n)),
                      tuple((n, memory(n)) for n in order if _spelt(n) in BY_STRIDE))


def find_regions(gm: fx.GraphModule, which: str = "gain",
                 apart: Collection[frozenset[fx.Node]] = ()) -> tuple[list[Region], list[Refused]]:
    """All regions of a graph, attention first, and the candidates that could not be read.

    which: chains of reductions without a product are taken where that "gain"s a pass, or "all".
    apart: `optional` groups of an earlier call that nothing could be made of; the smaller ones are tried.

    Nodes need example values (`example_value` from Dynamo, `val` from export).  The graph keeps its meaning; users of a
    tensor that come after an operator that writes into it are only made to name that operator's result, and operators
    may be taken apart.
    """
    _name_writes(gm)
    decompose(gm)
    collect(gm)
    regions: list[Region] = []
    refused: list[Refused] = []
    places = Places.of(gm)
    looped = _loops(gm, places, regions, refused)
    found = groups(gm, looped)
    chained = chains(gm, [*looped, *(n for g in found for n in g.core)])
    todo = [*found, *chained][::-1]
    gainless: dict[str, tuple[str, ...]] = {}  # the norms of equal layers are looked at once
    while todo:
        group = todo.pop()
        if group.otherwise and group.core in apart:
            todo += group.otherwise[::-1]
            continue
        alike = _alike(group, places) if group.chain and which != "all" else ""
        if alike in gainless:
            refused += [Refused(source(group.ends[-1]), why, chain=True) for why in gainless[alike]]
            continue
        try:
            region = _region(gm, group, places, regions)
            if group.otherwise:
                region = replace(region, optional=group.core)
            gain, lacking = (True, ()) if not group.chain or which == "all" else gains(region.program)
            if gain:
                regions.append(region)
            else:
                gainless[alike] = lacking
                refused += [Refused(region.source, why, chain=True) for why in lacking]
        except Refusal as why:
            if group.otherwise:
                todo += group.otherwise[::-1]
                continue
            refused.append(Refused(source(group.ends[-1]), "; ".join(s for s in (why.what, why.hint) if s),
                                   chain=group in chained))
    regions.sort(key=lambda g: places.order[g.outputs[-1]])
    taken = looped | {n for g in regions for n in g.nodes}
    for node, reason in missed(gm, taken, {r.where for r in refused}):
        refused.append(Refused(source(node), reason))
    refused += [Refused(source(n), why, chain=True) for n, why in lawless(gm) if n not in taken]
    return regions, refused


def _alike(group: Group, places: Places) -> str:
    """The same text for groups that compute the same of tensors of equal shapes, and give the same of it away."""
    nodes = sorted(group.core, key=places.order.__getitem__)
    at = {n: k for k, n in enumerate(nodes)}

    def shown(n: fx.Node) -> Any:
        m = meta(n)
        return at.get(n, (tuple(m.shape), m.dtype) if isinstance(m, torch.Tensor) else str(m))

    return repr([(n.op, n.target, fx.map_arg((n.args, n.kwargs), shown), any(u not in at for u in n.users))
                 for n in nodes])


def _loops(gm: fx.GraphModule, places: Places, regions: list[Region], refused: list[Refused]) -> set[fx.Node]:
    """Unrolled loops that become one region each.  Of the others the long ones are refused, and the steps of short ones
    may be regions.  Returns the nodes that are settled so."""
    settled: set[fx.Node] = set()
    for loop in loops(gm):
        try:
            region = _region(gm, Group(loop.core, (loop.end,)), places, regions, loop=True)
            program = reroll(region.program)
            before, after = len(region.program.cascade.einsums), len(program.cascade.einsums)
            if unrolled(program) or after > SHARED + 4 * before // loop.steps:
                raise Refusal(f"a loop that was unrolled: {unrolled(region.program)}", hint=SUGGESTION)
            regions.append(replace(region, program=program))
        except Refusal as why:
            if loop.steps < MANY:
                continue
            refused.append(Refused(source(loop.end), "; ".join(s for s in (why.what, why.hint) if s)))
        settled |= loop.core
    return settled


def _name_writes(gm: fx.GraphModule) -> None:
    """`x.mul_(2); y = x + 1` becomes `w = x.mul_(2); y = w + 1`: the same tensor, but each value has one name."""
    passed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        passed.add(node)
        target = node.args[0] if node.args else None
        if table.returns_target(node) and isinstance(target, fx.Node):
            target.replace_all_uses_with(node, delete_user_cb=lambda u: u not in passed)


def _region(gm: fx.GraphModule, group: Group, places: Places, others: Sequence[Region], *,
            loop: bool = False) -> Region:
    for n in group.core:
        m = meta(n)
        if isinstance(m, torch.Tensor) and m.is_complex():
            raise Refusal("complex numbers")
        if transformed(n) or dual(gm.graph):
            raise Refusal("it is inside a transform of functions (vmap, grad, jvp)", hint="kernels take plain tensors")
        if table.base_name(n) == ATTENTION:
            _agree(n)
    taken = {n for r in others for n in r.nodes if table.base_name(n) in TRAILING}
    group = replace(group, core=group.core - taken)
    stop = {n for r in others for n in r.outputs} - group.core  # one kernel reads what another writes
    while True:
        try:
            return _read(gm, group, places, others, stop, loop)
        except _Order as why:
            if why.nodes <= stop:
                raise
            stop |= why.nodes


def _agree(node: fx.Node) -> None:
    """torch's shape rule does not tie the lengths of keys and values, which a kernel relies on: ask, and so guard."""
    named = {**dict(zip(("query", "key", "value"), node.args, strict=False)), **node.kwargs}
    q, k, v = (meta(n) for n in (named.get("query"), named.get("key"), named.get("value")) if isinstance(n, fx.Node))
    try:
        equal = bool(k.shape[-2] == v.shape[-2] and q.shape[-1] == k.shape[-1])
    except GuardOnDataDependentSymNode as why:
        raise Refusal("a length that depends on data") from why
    if not equal:
        raise Refusal("keys and values, or queries and keys, differ in length")


class _Order(Refusal):
    """The region cannot be computed at one place of the graph; not reading through `nodes` may help."""

    def __init__(self, what: str, nodes: Iterable[fx.Node]) -> None:
        self.nodes = frozenset(nodes)
        super().__init__(what)


def _read(gm: fx.GraphModule, group: Group, places: Places, others: Sequence[Region], stop: set[fx.Node],
          loop: bool) -> Region:
    r, order = Reader(gm, group.core, stop, sliced=loop), places.order
    nodes = set(group.core)
    read = {n for other in others for n in other.inputs}
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
            end, v, chain = (n, v, {n}) if loop else _trailing(r, n, v, read)
            nodes |= chain
            outputs.append((end, v))
    done = finish(r, _program_name(outputs[-1][0]), outputs, apart=loop)
    ends = tuple(n for n, _ in outputs)
    sizes = [n for _, n in done.sizes if isinstance(n, fx.Node)]
    _check_convex(nodes, done.inputs, set(r.through))
    anchor = _place(order, nodes, ends, [*done.inputs, *sizes], set(r.through))
    _check_mutation(places, nodes, done.inputs, set(r.through), order[anchor])
    return Region(f"region{len(others)}", done.program, done.inputs, done.sizes, ends,
                  tuple(sorted(nodes, key=order.__getitem__)), source(ends[-1]),
                  tuple(_order(n, places) for n in ends), anchor)


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


def _trailing(r: Reader, node: fx.Node, v: Value,
              read: Collection[fx.Node]) -> tuple[fx.Node, Value, set[fx.Node]]:
    """Follow the only user while it rearranges; end at the last node whose dimensions are the statement's own, or where
    another region reads it."""
    best, chain, seen = (node, v), {node}, {node}
    at, w = node, v
    while len(at.users) == 1 and at not in read:
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


def _check_mutation(places: Places, nodes: set[fx.Node], inputs: Sequence[fx.Node], through: set[fx.Node],
                    place: int) -> None:
    """What is read through may not be written later, nor an input between where the graph and the region read it."""
    if not places.writes:
        return
    order, inside, given = places.order, nodes | through, {memory(leaf) for leaf in inputs}
    last = max(order[n] for n in nodes)
    later = {memory(w) for n, w in places.writes if order[n] < last and table.rule(n) is None} - given
    if changed := {n for n in inside if memory(n) in later}:
        raise _Order(f"{min(changed, key=order.__getitem__)} is written after it was made", changed & through)
    for leaf in inputs:
        shown = memory(leaf)
        reading = [n for n in inside if (memory(n) != shown or mutates(n))
                   and any(memory(a) == shown for a in n.all_input_nodes)]
        when = [order[w] for w, x in places.writes if memory(x) == shown]
        moved = {n for n in reading if any(min(order[n], place) <= k < max(order[n], place) for k in when)}
        if moved:
            raise _Order(f"{leaf} is written while the region would read it", moved & through)


BY_STRIDE = ("view", "view_as", "as_strided")


def _order(node: fx.Node, places: Places) -> tuple[int, ...]:
    """Where users transpose heads and positions next, store so that what follows needs no copy; as torch does where
    somebody reads by strides."""
    shown = memory(node)
    if any(m == shown for n, m in places.strided if n is not node):
        strides = [s if isinstance(s, int) else int(s.node.hint or 0) for s in meta(node).stride()]
        order = tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
        return () if order == tuple(range(len(order))) else order
    if any(u.op == "output" for u in node.users):
        return ()
    swaps = any(table.base_name(u) == "transpose" and set(u.args[1:]) in ({1, 2}, {-3, -2}) for u in node.users)
    return (0, 2, 1, 3) if swaps and meta(node).ndim == 4 else ()


def _spelt(node: fx.Node) -> str:
    """The operator's name as it was called: `reshape` is not `view`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._opname)
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _program_name(node: fx.Node) -> str:
    last = module_path(node).rpartition(".")[2]
    return last if last.isidentifier() else "region"
