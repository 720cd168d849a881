"""Chains: reductions that feed each other, and the products at their ends, outside of attention.

A product joins at the beginning where its result is only reduced (logits under a loss), and at the end where it sums
what the reductions normalise.  A product with a parameter is a layer, which torch's own kernels do well: it joins only
where its result, which is larger than what comes out, is then never written.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from memcomp.capture import table
from memcomp.capture.candidates import ATTENTION, Group, weight
from memcomp.capture.extent import same
from memcomp.capture.reader import meta, shape_of
from memcomp.capture.writes import mutates
from memcomp.ir.ops import OPS

PASSES = ("view", "map", "reduce", "index")
ORDERS = ("sort", "argsort", "msort", "median", "nanmedian", "kthvalue", "mode", "quantile", "unique")
SERIAL = 4  # so many applications of one function in a row are a loop


def chains(gm: fx.GraphModule, taken: Iterable[fx.Node]) -> list[Group]:
    """The groups of a graph's reductions of real numbers, without the nodes that are taken."""
    return _Chains(gm, frozenset(taken)).groups()


def lawless(gm: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """Nodes that no state of fixed size can stream, and the law they lack."""
    out: list[tuple[fx.Node, str]] = []
    depth: dict[fx.Node, dict[str, int]] = {}
    for n in gm.graph.nodes:
        name, r = table.base_name(n), table.rule(n)
        if name in ORDERS and _real(n):
            out.append((n, f"no law for {name}: where an element stands among all others is no state of fixed size"))
        depth[n] = {}
        if r is None or r.kind not in ("view", "map"):
            continue
        for i in n.all_input_nodes:
            for f, k in depth[i].items():
                depth[n][f] = max(depth[n].get(f, 0), k)
        if name in OPS and len(OPS[name].monotone) == 1 and name not in ("neg", "real", "int", "relu"):
            depth[n][name] = depth[n].get(name, 0) + 1
            if depth[n][name] == SERIAL:
                out.append((n, f"no law for {name} of what {name} made, step after step: it is not associative"))
    return out


class _Chains:
    def __init__(self, gm: fx.GraphModule, taken: frozenset[fx.Node]) -> None:
        self.gm, self.taken = gm, taken
        self.order = {n: k for k, n in enumerate(gm.graph.nodes)}
        self.kind = {n: r.kind for n in gm.graph.nodes if (r := table.rule(n)) is not None and n not in taken}
        self.seeds = {n for n, k in self.kind.items() if k == "reduce"}
        self.products = {n for n, k in self.kind.items() if k == "contract" and table.base_name(n) != ATTENTION
                         and all(meta(i).is_floating_point() for i in _tensors(n.all_input_nodes))}
        self.parent: dict[fx.Node, fx.Node] = {}

    def groups(self) -> list[Group]:
        if not any(_real(n) for n in self.seeds):
            return []
        reach = self._joined()
        members: dict[fx.Node, set[fx.Node]] = {}
        for n in sorted(self.parent, key=self.order.__getitem__):
            members.setdefault(self._root(n), set()).add(n)
        out = []
        for group in members.values():
            if any(n in self.seeds and _real(n) for n in group):
                core = self._with_tail(self._with_head(self._between(group, reach)))
                if core is not None:
                    ends = sorted((n for n in core if not any(u in core for u in n.users)), key=self.order.__getitem__)
                    out.append(Group(frozenset(core), tuple(ends), not core & self.products))
        return out

    # -- which belong together -------------------------------------------------------------------------------------

    def _joined(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """Join reductions with those and the products that feed them; what reaches each node unwritten."""
        reach: dict[fx.Node, frozenset[fx.Node]] = {}
        reads: dict[fx.Node, fx.Node] = {}
        for n in self.gm.graph.nodes:
            incoming = frozenset(a for i in n.all_input_nodes for a in reach.get(i, ()))
            reach[n] = frozenset()
            if n in self.seeds:
                self._join(n, *incoming)
                for i in _tensors(n.all_input_nodes)[:1]:
                    self._join(n, reads.setdefault(i, n))  # two reductions of one tensor walk it together
                reach[n] = frozenset((n,))
            elif n in self.products:
                if incoming & self.seeds and not any(weight(self.gm, i) for i in n.all_input_nodes):
                    self._join(n, *incoming)
                    reach[n] = frozenset((n,))
                elif self._reduced_away(n):
                    reach[n] = frozenset((n,))
            elif self.kind.get(n) in PASSES and incoming:
                if len(incoming) > 1 and incoming & self.parent.keys():
                    self._join(*incoming)
                reach[n] = incoming
            if reach[n] and not all(self._reads(u) for u in n.users):
                reach[n] = frozenset()  # it is written anyway
        return reach

    def _reads(self, user: fx.Node) -> bool:
        return user.op == "output" or self.kind.get(user) in (*PASSES, "contract") and (
            user not in self.products or not any(weight(self.gm, i) for i in user.all_input_nodes))

    def _join(self, *nodes: fx.Node) -> None:
        first = self._root(nodes[0])
        for n in nodes[1:]:
            self.parent[self._root(n)] = first

    def _root(self, n: fx.Node) -> fx.Node:
        self.parent.setdefault(n, n)
        while self.parent[n] is not n:
            n = self.parent[n]
        return n

    def _reduced_away(self, product: fx.Node) -> bool:
        """Does every way from the product lead through a reduction that leaves fewer elements?"""
        todo = [product]
        while todo:
            n = todo.pop()
            if not n.users:
                return False
            for u in n.users:
                if self.kind.get(u) not in PASSES:
                    return False
                if not self._leaves_less(u):
                    todo.append(u)
        return True

    def _leaves_less(self, n: fx.Node) -> bool:
        if self.kind[n] not in ("reduce", "index"):
            return False
        m = meta(n)
        outs = _tensors([n]) or [u for u in n.users if isinstance(meta(u), torch.Tensor)]
        before = shape_of(meta(_tensors(n.all_input_nodes)[0]))
        shapes = [shape_of(meta(o)) for o in outs] if not isinstance(m, tuple) else [
            shape_of(x) for x in m if isinstance(x, torch.Tensor)]
        return all(len(s) < len(before) or any(not same(a, b) for a, b in zip(s, before, strict=True)) for s in shapes)

    # -- what lies between and after -------------------------------------------------------------------------------

    def _between(self, group: set[fx.Node], reach: dict[fx.Node, frozenset[fx.Node]]) -> set[fx.Node]:
        core = set(group)
        todo = [i for n in group for i in n.all_input_nodes]
        while todo:
            n = todo.pop()
            if n not in core and reach.get(n, frozenset()) & group and self.kind.get(n) in PASSES:
                core.add(n)
                todo += n.all_input_nodes
        return core

    def _with_head(self, core: set[fx.Node]) -> set[fx.Node]:
        """With the maps that nothing else reads: what they give is never written."""
        todo = [i for n in core for i in n.all_input_nodes]
        while todo:
            n = todo.pop()
            if n not in core and self.kind.get(n) in ("map", "view") and n not in self.taken \
                    and all(u in core for u in n.users) and not mutates(n) and _real_tensor(n) \
                    and _tensors(n.all_input_nodes):
                core.add(n)
                todo += n.all_input_nodes
        return core

    def _with_tail(self, core: set[fx.Node]) -> set[fx.Node] | None:
        """With the maps that follow and need nothing that comes between; None: others stand in between already."""
        after = {n for n in core}
        for n in sorted(self.order, key=self.order.__getitem__):
            if n in core or not any(i in after for i in n.all_input_nodes):
                continue
            inside = all(i in core or i not in after for i in n.all_input_nodes)
            late = any(u in core for u in n.users)
            joins = late or self.kind.get(n) in ("map", "view", "index")
            if inside and joins and n not in self.taken and self._tail(n, core):
                core.add(n)
            elif late:
                return None
            after.add(n)
        while True:  # what only rearranges at the end is free where it stands
            loose = {n for n in core - self.seeds - self.products if not any(u in core for u in n.users)
                     and (self.kind[n] == "view" or table.base_name(n) == "convert")
                     and _tensors(n.all_input_nodes)}
            if not loose:
                return core
            core = core - loose

    def _tail(self, n: fx.Node, core: set[fx.Node]) -> bool:
        """What else the map reads is there when the core's last reduction starts."""
        last = max(self.order[x] for x in core if x in self.seeds or x in self.products)

        def early(i: fx.Node) -> bool:
            return i in core or self.order[i] < last or i.op in ("placeholder", "get_attr") or (
                self.kind.get(i) in ("view", "source") and all(map(early, i.all_input_nodes)))

        return all(map(early, n.all_input_nodes))


def _tensors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if isinstance(meta(n), torch.Tensor)]


def _real_tensor(n: fx.Node) -> bool:
    return isinstance(meta(n), torch.Tensor) and bool(meta(n).is_floating_point())


def _real(n: fx.Node) -> bool:
    return any(meta(i).is_floating_point() for i in _tensors(n.all_input_nodes)[:1])
