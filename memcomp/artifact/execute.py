"""Runs a plan: kernels and copies on an arena.  Needs numpy and what the kernels need; torch where the plan says so.

What depends on the inputs' shapes alone is made once a thread and shape: places in the arena, arguments of all steps.
A call then hands over its inputs, fresh outputs, and launches.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from memcomp.artifact import weights
from memcomp.artifact.arena import placed
from memcomp.artifact.arrays import copy, held, is_torch, look, strided
from memcomp.artifact.folder import Folder
from memcomp.artifact.foreign import by_torch
from memcomp.artifact.manifest import expression
from memcomp.artifact.memory import Array, empty, fresh, tensor, within
from memcomp.artifact.plan import Plan, Step, check, lives, root
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Const, Expr, Size, walk
from memcomp.ir.target import BYTES
from memcomp.sizes import evaluate

KEPT = 8  # so many combinations of shapes stay bound, a thread
Act: TypeAlias = Callable[[list[Any]], None]  # of a call's tensors, by position


def bound(folder: Folder, kernels: Mapping[str, Any], plan: Plan) -> Model:
    """The model of a verified directory.  InputError where its parts do not fit each other."""
    check(plan, kernels)
    stored = weights.read(folder.place(weights.FILE)) if weights.FILE in folder.manifest.files else {}
    for t in plan.tensors:
        if t.kind == "weight" and (t.name not in stored or stored[t.name].dtype != t.dtype or
                                   tuple(map(str, stored[t.name].shape)) != t.shape):
            raise InputError(f"{weights.FILE} has no {t.name} of {t.dtype}[{', '.join(t.shape)}]")
    for k, step in enumerate(plan.steps):
        spec = kernels[step.what].spec if step.kind == "kernel" else None
        if spec is not None and ((len(step.reads), len(step.writes)) != (len(spec.inputs), len(spec.outputs)) or
                                 step.sizes.keys() != {r.name for r in spec.sizes}):
            raise InputError(f"the plan cannot be run: step {k} does not call {step.what} as it is")
    model, sizes = Model(plan, kernels, stored), {s.name for s in plan.sizes}
    if any(isinstance(x, Size) and x.rank not in sizes for e in model.extents for x in walk(e)):
        raise InputError("the plan cannot be run: it has an extent over sizes that it does not have")
    return model


class Model:
    """A plan as a function of its inputs: `model(*inputs)`, or by name.  Several threads may call it at once.

    Inputs: numpy arrays, `Array`s or torch's tensors; outputs are torch's where an input is, else numpy arrays, or
    `Array`s where numpy has no such dtype.  Raises TypeError for a wrong number of inputs, InputError for an input of
    another dtype or shape than the model takes, Refusal where a gradient is asked for, IndexError for an index out of
    bounds.
    """

    def __init__(self, plan: Plan, kernels: Mapping[str, Any], stored: Mapping[str, Array]) -> None:
        """kernels: by name, with `function`, `arguments` and `work`; stored: the weights by name, all of the plan."""
        self.plan = plan
        self.of = {t.name: t for t in plan.tensors}
        self._kernels, self._weights = kernels, dict(stored)
        self._texts = {x: expression(x) for t in plan.tensors for x in (*t.shape, *t.strides, t.offset)}
        self._texts |= {x: expression(x) for s in plan.steps for x in s.sizes.values()}
        self._shared = {n: tensor(a) for n, a in self._weights.items()}
        self._mine = threading.local()
        self._taken = [self.of[n] for n in plan.inputs]

    @property
    def extents(self) -> Collection[Expr]:
        """All of the plan, with strides, offsets and numbers of steps."""
        return self._texts.values()

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        if named or len(inputs) != len(self._taken):
            inputs = self._ordered(inputs, named)
        given = [held(x, t) for x, t in zip(inputs, self._taken, strict=True)]
        return self._bound(tuple([x.shape for x in given]))(given, any(map(is_torch, given)))

    def bytes(self, **sizes: int) -> int:
        """Bytes of the arena, scratch included, at these sizes."""
        return self._places(sizes)[1]

    def _ordered(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        names = self.plan.inputs
        if len(inputs) > len(names) or named.keys() != set(names[len(inputs):]):
            raise TypeError(f"the model takes {len(names)} inputs, {', '.join(names)}; got {len(inputs)}"
                            + (f" and {', '.join(named)}" if named else ""))
        return (*inputs, *(named[n] for n in names[len(inputs):]))

    def _bound(self, shapes: tuple[tuple[int, ...], ...]) -> _Bound:
        known: OrderedDict[Any, _Bound] | None = getattr(self._mine, "known", None)
        if known is None:
            known = self._mine.known = OrderedDict()
        found = known.get(shapes)
        if found is None:
            found = known[shapes] = self._bind(shapes)
            if len(known) > KEPT:
                known.popitem(last=False)
        return found

    def _sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The sizes that the shapes show; InputError in a sentence where the model does not take them."""
        by = dict(zip(self.plan.inputs, shapes, strict=True))
        for name, shape in by.items():
            if len(shape) != len(self.of[name].shape):
                raise InputError(f"{name} has {len(shape)} dimensions; the model takes {len(self.of[name].shape)}",
                                 f"its shape is {tuple(shape)}, the model's ({', '.join(self.of[name].shape)})")
        sizes: dict[str, int] = {}
        for s in self.plan.sizes:
            n = sizes[s.name] = by[s.of][s.dim] // s.divisor
            if n < s.least or s.most is not None and n > s.most:
                most = "" if s.most is None else f" to {s.most * s.divisor}"
                raise InputError(f"dimension {s.dim} of {s.of} is {n * s.divisor}; the model was compiled for "
                                 f"{s.least * s.divisor}{most or ' and more'}", s.name,
                                 "compile it with a wider --dynamic")
        for name, shape in by.items():
            wanted = tuple(self._at(x, sizes) for x in self.of[name].shape)
            if shape != wanted:
                raise InputError(f"{name} has the shape {tuple(shape)}; the model takes {wanted}",
                                 ", ".join(self.of[name].shape), "dimensions that differ are named by --dynamic")
        return sizes

    def _at(self, text: str, sizes: Mapping[str, int]) -> int:
        return _value(self._texts[text], sizes)

    def _places(self, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """Offsets in the arena, of every buffer and of scratch (the k-th of step s is `s/k`), and its bytes."""
        spans = lives(self.plan.tensors, self.plan.steps)
        held = {n: BYTES[self.of[n].dtype] * prod(self._at(x, sizes) for x in self.of[n].shape) for n in spans}
        for s, step in enumerate(self.plan.steps):
            for k, (dtype, shape) in enumerate(self._work(step, sizes)):
                spans[f"{s}/{k}"], held[f"{s}/{k}"] = (s, s), BYTES[dtype] * prod(shape)
        offsets, total = placed(list(held.values()), [spans[n] for n in held])
        return dict(zip(held, offsets, strict=True)), total

    def _work(self, step: Step, sizes: Mapping[str, int]) -> Sequence[tuple[str, tuple[int, ...]]]:
        return self._kernels[step.what].work(self._own(step, sizes)) if step.kind == "kernel" else ()

    def _own(self, step: Step, sizes: Mapping[str, int]) -> dict[str, int]:
        return {n: self._at(x, sizes) for n, x in step.sizes.items()}

    def _bind(self, shapes: Sequence[tuple[int, ...]]) -> _Bound:
        sizes = self._sizes(shapes)
        places, total = self._places(sizes)
        room = empty("u8", (total,)).data
        fixed: dict[str, Array] = dict(self._weights)
        for name, at in places.items():
            if name in self.of:
                fixed[name] = within(room, at, self.of[name].dtype, self._shape(name, sizes))
        outs = list(dict.fromkeys(n for n in self.plan.outputs))
        slots = {n: k for k, n in enumerate((*self.plan.inputs, *outs))}
        views: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = []
        for t in self.plan.tensors:
            if t.kind == "alias":
                shape = self._shape(t.name, sizes)
                strides = tuple(self._at(x, sizes) for x in t.strides)
                base = root(self.of, t.name).name
                if base in fixed:
                    fixed[t.name] = strided(fixed[base], shape, strides, self._at(t.offset, sizes))
                else:
                    slots[t.name] = len(slots)
                    views.append((slots[t.name], slots[base], shape, strides, self._at(t.offset, sizes)))
        handed = {n: self._shared.get(n) or tensor(a) for n, a in fixed.items()}
        acts = [a for s, step in enumerate(self.plan.steps)
                if (a := self._act(s, step, sizes, room, places, fixed, handed, slots)) is not None]
        made = [(self.of[n].dtype, self._shape(n, sizes)) for n in outs]
        return _Bound(acts, made, views, [slots[n] for n in self.plan.outputs], room)

    def _shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(self._at(x, sizes) for x in self.of[name].shape)

    def _act(self, at: int, step: Step, sizes: Mapping[str, int], room: Any, places: Mapping[str, int],
             fixed: Mapping[str, Array], handed: Mapping[str, Any], slots: Mapping[str, int]) -> Act | None:
        if all(0 in self._shape(n, sizes) for n in step.writes) and step.writes:
            return None
        if step.kind == "kernel":
            kernel, own = self._kernels[step.what], self._own(step, sizes)
            work = [tensor(within(room, places[f"{at}/{k}"], dtype, shape))
                    for k, (dtype, shape) in enumerate(kernel.work(own))]
            args = [handed.get(n) for n in (*step.reads, *step.writes)] + [*work, *kernel.arguments(own)]
            return _launch(kernel.function, args, [(k, slots[n]) for k, n in enumerate((*step.reads, *step.writes))
                                                   if n in slots])
        reads = [_pick(n, fixed, slots) for n in step.reads]
        writes = [_pick(n, fixed, slots) for n in step.writes]
        if step.kind == "copy":
            return lambda given: copy(reads[0](given), writes[0](given))
        if step.kind == "check":
            size, wraps = self._at(step.sizes["size"], sizes), step.what == "wraps"
            ignored = self._at(step.sizes["ignored"], sizes) if "ignored" in step.sizes else None
            return lambda given: look(reads[0](given), size, wraps, ignored)
        return by_torch(step, sizes, reads, writes)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A plan at fixed shapes, for one thread: `room` is the arena that its steps' arguments lie in."""

    acts: Sequence[Act]
    outs: Sequence[tuple[str, tuple[int, ...]]]
    views: Sequence[tuple[int, int, tuple[int, ...], tuple[int, ...], int]]
    results: Sequence[int]
    room: Any

    def __call__(self, given: list[Any], torch: bool) -> tuple[Any, ...]:
        if torch:
            from torch import empty

            from memcomp.dtypes import DTYPES

            given += [empty(shape, dtype=DTYPES[dtype]) for dtype, shape in self.outs]
        else:
            given += [fresh(dtype, shape) for dtype, shape in self.outs]
        for _, base, shape, strides, offset in self.views:
            x = given[base]
            given.append(x.as_strided(shape, strides, offset + x.storage_offset()) if is_torch(x)
                         else strided(x, shape, strides, offset))
        for act in self.acts:
            act(given)
        return tuple([given[k] for k in self.results])


def _launch(function: Callable[..., Any], args: list[Any], filled: Sequence[tuple[int, int]]) -> Act:
    if not filled:
        return lambda _: function(*args)

    def act(given: list[Any]) -> None:
        mine = args.copy()
        for k, slot in filled:
            mine[k] = given[slot]
        function(*mine)

    return act


def _pick(name: str, fixed: Mapping[str, Array], slots: Mapping[str, int]) -> Callable[[list[Any]], Any]:
    if name in fixed:
        one = fixed[name]
        return lambda _: one
    slot = slots[name]
    return lambda given: given[slot]


def _value(e: Expr, sizes: Mapping[str, int]) -> int:
    return e.value if isinstance(e, Const) and isinstance(e.value, int) else evaluate(e, sizes)
