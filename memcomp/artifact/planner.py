"""From the parts of a graph to a plan: tensors by name, steps in order, buffers in an arena."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from memcomp.artifact.arena import placed
from memcomp.artifact.exported import Exported, Kept
from memcomp.artifact.foreign import unfit
from memcomp.artifact.plan import Life, Plan, Step, Tensor, lives, root
from memcomp.capture import table
from memcomp.capture.candidates import source
from memcomp.capture.lookups import ancestors, lookups
from memcomp.capture.puts import Put, put
from memcomp.capture.reader import DTYPE, meta
from memcomp.capture.region import Region
from memcomp.capture.rest import Alias, Foreign, Part
from memcomp.ir.errors import Refusal
from memcomp.ir.target import BYTES
from memcomp.sizes import evaluate, input_shapes, sources


class Planner:
    """Fills a plan part by part; `weights` are the tensors that it needs, each once."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.steps: list[Step] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.torch: list[str] = []
        self._called = dict(reversed(list(zip(exported.outputs, exported.results, strict=True))))
        self._same: dict[tuple[Any, ...], str] = {}
        self._looked: set[tuple[str, ...]] = set()
        for n, label in zip(exported.inputs, exported.labels, strict=True):
            self.names[n] = self._new(label, "input", DTYPE[meta(n).dtype], exported.shape(n))
        for k in exported.kept:
            if k.start is not None:
                start = self._stored(f"{k.name}.start", k.start) if _bits(k.start).any() else ""
                self.names[k.before] = self._new(k.name, "state", DTYPE[k.start.dtype], exported.shape(k.before),
                                                 of=start)
        self._over = {n for k in exported.kept for n in _in_place(k)}

    def add(self, part: Part, kernel: str = "") -> None:
        """kernel: of a region."""
        if isinstance(part, Alias):
            held, x, base = self.exported, meta(part.node), meta(part.of)
            self._add(part.node, "alias", of=self.name(part.of), strides=tuple(map(held.text, x.stride())),
                      offset=held.text(x.storage_offset() - base.storage_offset()))
        elif isinstance(part, Region):
            self._kernel(part, kernel)
        elif isinstance(part, Put):
            self._put(part)
        else:
            self._foreign(part)

    def plan(self) -> Plan:
        """The plan: its outputs in memory of their own, and what it keeps where it is kept."""
        outs: dict[fx.Node, str] = {}
        for n in dict.fromkeys(self.exported.outputs):
            name = self.name(n)
            t = self.tensors[name]
            if t.kind == "buffer":
                self.tensors[name] = Tensor(name, "output", t.dtype, t.shape)
                outs[n] = name
            else:
                outs[n] = self._new(self._called[n], "output", t.dtype, t.shape)
                self.steps.append(Step("copy", "", (name,), (outs[n],), {}))
        self._keep()
        tensors = tuple(self.tensors.values())
        spans = lives(tensors, self.steps)
        of = {t.name: t for t in tensors}
        example = dict(self.exported.example)
        sizes = [bytes_of(of[n], example) for n in spans]
        offsets, total = placed(sizes, list(spans.values()))
        return Plan(self.exported.sizes, tensors, tuple(self.names[n] for n in self.exported.inputs),
                    tuple(outs[n] for n in self.exported.outputs), tuple(self.steps),
                    tuple(Life(n, *spans[n], at, size) for n, at, size in zip(spans, offsets, sizes, strict=True)),
                    example, total, tuple(dict.fromkeys(self.torch)))

    def _keep(self) -> None:
        """Copy new values to where old ones are that nobody reads any more; those that are themselves old values of
        others first to where they stay."""
        held = self.exported
        left = [(self.names[k.before], self.name(k.after)) for k in held.kept
                if self.names[k.before] != self.name(k.after)]
        gone = {to for to, _ in left}
        late = []
        for to, new in left:
            t = self.tensors[new]
            if root(self.tensors, new).name in gone:
                stays = self._new(f"{to}.new", "buffer", t.dtype, t.shape)
                self.steps.append(Step("copy", "", (new,), (stays,), {}))
                new = stays
            late.append(Step("copy", "", (new,), (to,), {}))
        self.steps += late

    def name(self, node: fx.Node) -> str:
        """The name of a node's tensor; a weight is taken in when it is first asked for."""
        if node not in self.names:
            assert node.op == "get_attr", node
            self.names[node] = self._weight(node)
        return self.names[node]

    def _weight(self, node: fx.Node) -> str:
        return self._stored(str(node.target), table.attribute(self.exported.gm, str(node.target)))

    def _stored(self, wanted: str, value: torch.Tensor) -> str:
        value = value.detach().contiguous()
        if value.dtype not in DTYPE:
            raise Refusal(f"the weight {wanted} is {value.dtype}", hint=f"known: {', '.join(DTYPE.values())}")
        content = hashlib.sha256(_bits(value).numpy().tobytes())
        key = (value.dtype, tuple(value.shape), content.digest())
        if key not in self._same:
            name = self._new(wanted, "weight", DTYPE[value.dtype], tuple(map(str, value.shape)))
            self.weights[name], self._same[key] = value, name
        return self._same[key]

    def _add(self, node: fx.Node, kind: str, **more: Any) -> str:
        name = self._called.get(node, str(node)) if kind == "buffer" else str(node)
        dtype = meta(node).dtype
        if dtype not in DTYPE:
            raise Refusal(f"{node} is {dtype}", source(node), f"known: {', '.join(DTYPE.values())}")
        self.names[node] = self._new(name, kind, DTYPE[dtype], self.exported.shape(node), **more)
        return self.names[node]

    def _new(self, name: str, kind: str, dtype: str, shape: tuple[str, ...], **more: Any) -> str:
        while name in self.tensors:
            name += "_"
        self.tensors[name] = Tensor(name, kind, dtype, shape, **more)
        return name

    def _kernel(self, region: Region, kernel: str) -> None:
        cascade, held = region.program.cascade, self.exported
        for n, t in zip((*region.inputs, *region.outputs), (*cascade.inputs(), *cascade.outputs()), strict=True):
            if DTYPE[meta(n).dtype] != t.dtype:
                raise Refusal(f"{n} is {meta(n).dtype} in the graph and {t.dtype} in its region", region.source)
        reads = tuple(map(self.name, region.inputs))
        for x in lookups(ancestors(region)):
            self._look(x)
        sizes = {}
        for rank, (i, d, divisor) in sources(input_shapes(cascade)).items():
            sizes[rank] = held.text(meta(region.inputs[i]).shape[d])
            if divisor != 1:
                sizes[rank] = f"({sizes[rank]})//{divisor}"
        for rank, number in region.sizes:
            sizes[rank] = held.text(meta(number) if isinstance(number, fx.Node) else number)
        self.steps.append(Step("kernel", kernel, reads, tuple(self._add(n, "buffer") for n in region.outputs), sizes))

    def _put(self, p: Put) -> None:
        if p.node in self._over:
            self.names[p.node] = self.name(p.of)
        else:
            self.steps.append(Step("copy", "", (self.name(p.of),), (self._add(p.node, "buffer"),), {}))
        self.steps.append(Step("put", "wraps" if p.wraps else "", (self.name(p.source), self.name(p.index)),
                               (self.names[p.node],), {"dim": str(p.dim)}))

    def _look(self, x: Any) -> None:
        """An index that names an element that is not there is an error, as it is in torch."""
        sizes = {"size": self.exported.text(meta(x.read).shape[x.dim])}
        if x.ignored is not None:
            sizes["ignored"] = str(x.ignored)
        step = Step("check", "wraps" if x.wraps else "", (self.name(x.index),), (), sizes)
        key = (step.what, *step.reads, *sizes.values())
        if key not in self._looked:
            self._looked.add(key)
            self.steps.append(step)

    def _foreign(self, part: Foreign) -> None:
        target = part.node.target
        own = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
        if why := unfit(target) if own else part.why:
            raise Refusal(f"{target} can be run by no artifact: {why}", source(part.node))
        reads: list[str] = []
        args = json.dumps([[self._argument(a, reads) for a in part.node.args],
                           {k: self._argument(a, reads) for k, a in part.node.kwargs.items()}])
        places = [int(n.args[1]) if n is not part.node else 0 for n in part.outputs]  # type: ignore[arg-type]
        writes = tuple(self._add(n, "buffer") for n in part.outputs)
        self.torch.append(str(target))
        self.steps.append(Step("torch", str(target), tuple(reads), writes,
                               {f"out{k}": str(p) for k, p in enumerate(places)}, args))

    def _argument(self, a: Any, reads: list[str]) -> Any:
        if isinstance(a, fx.Node):
            value = meta(a)
            if isinstance(value, torch.Tensor):
                reads.append(self.name(a))
                return {"tensor": len(reads) - 1}
            if isinstance(value, torch.SymInt):
                return {"size": self.exported.text(value)}
            a = value
        if isinstance(a, (list, tuple)):
            return [self._argument(x, reads) for x in a]
        if isinstance(a, torch.dtype) and a in DTYPE:
            return {"dtype": DTYPE[a]}
        if isinstance(a, torch.device) and a.type == "cpu":
            return {"device": "cpu"}
        if a is None or isinstance(a, (bool, int, float, str)):
            return a
        raise Refusal(f"an argument {a!r} of an operator of torch cannot be kept")


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of its numbers."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)


def _in_place(k: Kept) -> list[fx.Node]:
    """The nodes that may put into the memory of what is kept itself: nobody else reads what it held before each."""
    found, at = [], k.after
    while at is not k.before:
        p = put(at)
        if p is None or len(p.of.users) != 1 or p.of in (p.source, p.index):
            return []
        found.append(at)
        at = p.of
    return found


def bytes_of(t: Tensor, sizes: Mapping[str, int]) -> int:
    """Bytes of a row-major tensor at these sizes."""
    from memcomp.artifact.manifest import expressions

    n = BYTES[t.dtype]
    for e in expressions(t.shape):
        n *= evaluate(e, sizes)
    return int(n)
