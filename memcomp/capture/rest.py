"""A whole graph in parts: the regions that were found, and a region for everything else that its results need.

Read from the graph's outputs backwards: what nothing needs is in no part.  An operator joins the part of its only
user, unless a product or a reduction that it leads to stands there already: what feeds one is stored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from memcomp.capture import table
from memcomp.capture.candidates import module_path, source
from memcomp.capture.decompose import decompose
from memcomp.capture.finish import finish
from memcomp.capture.lookups import ancestors, lookups
from memcomp.capture.puts import Put, put, spelled
from memcomp.capture.reader import Reader, meta
from memcomp.capture.region import Region
from memcomp.capture.value import Value
from memcomp.capture.writes import memory, mutates
from memcomp.ir.errors import Refusal

JOINS = ("view", "map", "index")
HEAVY = ("contract", "reduce")
_SILENT = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size",
           "sym_constrain_range")


@dataclass(frozen=True)
class Alias:
    """A node that shows the memory of another, which is row-major and no alias, by its own strides and offset."""

    node: fx.Node
    of: fx.Node


@dataclass(frozen=True)
class Foreign:
    """An operator that has no kernel: torch's.  outputs: the nodes that hold its tensors; why: what is missing."""

    node: fx.Node
    outputs: tuple[fx.Node, ...]
    why: str


Part: TypeAlias = "Region | Alias | Put | Foreign"


def tidy(gm: fx.GraphModule) -> None:
    """Without what only looks at tensors, conversions that convert nothing, and what nobody reads; operators without a
    rule are taken apart where torch can."""
    for n in list(gm.graph.nodes):
        name, of = table.base_name(n), n.args[0] if n.args else None
        if name.rpartition(".")[2] in _SILENT and not n.users:
            gm.graph.erase_node(n)
        elif name == "convert" and isinstance(of, fx.Node) and not mutates(n) and _same(meta(of), meta(n)):
            n.replace_all_uses_with(of)
    decompose(gm, everywhere=True)
    spelled(gm)
    gm.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or mutates(n))


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and \
        a.device == b.device and a.ndim == b.ndim


def parts(gm: fx.GraphModule, regions: Sequence[Region], works: Callable[[Region], str]) -> list[Part]:
    """All that makes the graph's outputs, in an order in which it can be run.

    regions: of `find_regions`, each of which works; works: why a region cannot be compiled, "" where it can.
    """
    cut = _Cut(gm, works)
    for r in regions:
        for n in r.outputs:
            cut.made[n] = r
    out = next(n for n in gm.graph.nodes if n.op == "output")
    for n in out.all_input_nodes:
        cut.need(n)
    return cut.done


class _Cut:
    def __init__(self, gm: fx.GraphModule, works: Callable[[Region], str]) -> None:
        self.gm, self.works = gm, works
        self.order = {n: k for k, n in enumerate(gm.graph.nodes)}
        self.made: dict[fx.Node, Part] = {}
        self.done: list[Part] = []
        self.placed: set[int] = set()

    def need(self, node: fx.Node) -> None:
        """Place what makes the node, after all that it needs itself."""
        todo = [node]
        while todo:
            n = todo[-1]
            if not isinstance(meta(n), torch.Tensor) or n.op in ("placeholder", "get_attr"):
                todo.pop()
                continue
            part = self.made.get(n) or self._part(n)
            if id(part) in self.placed:
                todo.pop()
                continue
            if missing := [i for i in _inputs(part) if not self._there(i)]:
                todo += missing
                continue
            todo.pop()
            self.placed.add(id(part))
            self.done.append(part)

    def _there(self, n: fx.Node) -> bool:
        return n.op in ("placeholder", "get_attr") or not isinstance(meta(n), torch.Tensor) or \
            n in self.made and id(self.made[n]) in self.placed

    def _part(self, n: fx.Node) -> Part:
        part = self._chosen(n)
        for o in part.outputs if not isinstance(part, Alias) else (part.node,):
            self.made[o] = part
        return part

    def _chosen(self, n: fx.Node) -> Part:
        if (found := put(n)) is not None:
            return found
        core = self._core(n)
        if all(_kind(x) == "view" for x in core) and (base := self._base(n)) is not None:
            return Alias(n, base)
        why = ""
        tries = [core, frozenset((n,))] if len(core) > 1 else [core]
        for nodes in tries:
            try:
                region = self._region(n, nodes)
                why = self.works(region)
            except Refusal as error:
                why = error.what
            if not why:
                return region
        return self._foreign(n, why)

    def _region(self, end: fx.Node, core: frozenset[fx.Node]) -> Region:
        stop = [n for n in self.made if n not in core]
        if any(mutates(n) and table.rule(n) is None for n in core):
            raise Refusal(f"{table.base_name(end)} writes into a tensor")
        r = Reader(self.gm, core, stop, sliced=True)
        value = r.read(end)
        if not isinstance(value, Value):
            raise Refusal(f"{end} is not one tensor")
        name = module_path(end).rpartition(".")[2]
        made = finish(r, name if name.isidentifier() else table.base_name(end), [(end, value)])
        if any(n in core for n in made.inputs):
            raise Refusal(f"{end} is not computed by itself")
        return Region(f"rest{self.order[end]}", made.program, made.inputs, made.sizes, (end,),
                      tuple(sorted(core, key=self.order.__getitem__)), source(end), ((),), end)

    def _core(self, end: fx.Node) -> frozenset[fx.Node]:
        core = {end}
        feeding = {end} if _kind(end) in HEAVY else set()  # what leads to a product or a reduction, and itself
        at = end
        while (at := at.prev).op != "root":
            users = [u for u in at.users if u in core]
            if not users or at in self.made or _kind(at) not in (*JOINS, *HEAVY) or mutates(at):
                continue
            several = isinstance(meta(at), (tuple, list))
            leads = any(u in feeding for u in users)
            if not several and len(users) < len(at.users) or leads and (
                    _kind(at) in HEAVY or any(_kind(u) == "contract" for u in users)):
                continue
            core.add(at)
            if leads or _kind(at) in HEAVY:
                feeding.add(at)
        return frozenset(core)

    def _base(self, n: fx.Node) -> fx.Node | None:
        """The node whose row-major memory `n` shows, where that is so."""
        base = n
        while base.op not in ("placeholder", "get_attr") and _kind(base) == "view" and (
                base is n or isinstance(self.made.get(base, Alias(base, base)), Alias)):
            given = [i for i in base.all_input_nodes if isinstance(meta(i), torch.Tensor)]
            if len(given) != 1:
                return None
            base = given[0]
        shown = meta(n).stride()
        held = meta(base)
        row = _row_major(held) and memory(base) == memory(n) and held.dtype == meta(n).dtype
        return base if row and base is not n and shown and statically_known_true(shown[-1] == 1) else None

    def _foreign(self, n: fx.Node, why: str) -> Foreign:
        node = n.all_input_nodes[0] if n.target is operator.getitem else n
        found = isinstance(meta(node), (tuple, list))
        outs = tuple(u for u in node.users if u.target is operator.getitem) if found else (node,)
        return Foreign(node, outs, why if table.rule(node) else f"{table.base_name(node) or node} has no rule")


def _inputs(part: Part) -> Collection[fx.Node]:
    if isinstance(part, Alias):
        return (part.of,)
    if isinstance(part, Put):
        return part.of, part.source, part.index
    if isinstance(part, Region):  # places that torch looks at, too
        return (*part.inputs, *(x.index for x in lookups(ancestors(part))))
    return part.node.all_input_nodes


def _row_major(t: torch.Tensor) -> bool:
    step: Any = 1
    for n, s in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if not statically_known_true(n == 1) and not statically_known_true(s == step):
            return False
        step = step * n
    return True


def _kind(n: fx.Node) -> str:
    r = table.rule(n)
    return r.kind if r is not None else ""
