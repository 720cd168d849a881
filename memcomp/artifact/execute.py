"""Runs a plan: kernels and copies on an arena.  Needs numpy and what the kernels need; torch where the plan says so.

What depends on the inputs' shapes alone is made once a thread and shape: places in the arena, arguments of all steps.
A call then hands over its inputs and fresh outputs; between the steps that torch runs, machine code walks all others.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

from memcomp.artifact import weights
from memcomp.artifact.arena import placed
from memcomp.artifact.arrays import held, inside, is_torch, same, strided
from memcomp.artifact.bind import Binding, Bound, View, Walk
from memcomp.artifact.folder import Folder
from memcomp.artifact.manifest import expression
from memcomp.artifact.memory import Array, empty, steps_of, within
from memcomp.artifact.plan import Plan, Step, lives, root, written
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Const, Expr, Size, walk
from memcomp.ir.target import BYTES
from memcomp.sizes import evaluate

KEPT = 8  # so many combinations of shapes stay bound, a thread


def bound(folder: Folder, kernels: Mapping[str, Any], plan: Plan, walker: Walk | None) -> Model:
    """The model of a verified directory.  InputError where its parts do not fit each other."""
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
    model, sizes = Model(plan, kernels, stored, walker), {s.name for s in plan.sizes}
    if any(isinstance(x, Size) and x.rank not in sizes for e in model.extents for x in walk(e)):
        raise InputError("the plan cannot be run: it has an extent over sizes that it does not have")
    return model


class Model:
    """A plan as a function of its inputs: `model(*inputs)`, or by name.  Several threads may call it at once; where it
    has a state, one call after another.

    Inputs: numpy arrays, `Array`s or torch's tensors; outputs are torch's where an input is, else numpy arrays, or
    `Array`s where numpy has no such dtype.  Raises TypeError for a wrong number of inputs, InputError for an input of
    another dtype or shape than the model takes, or that it writes into and cannot, Refusal where a gradient is asked
    for, IndexError for an index out of bounds.
    """

    def __init__(self, plan: Plan, kernels: Mapping[str, Any], stored: Mapping[str, Array],
                 walker: Walk | None = None) -> None:
        """kernels: by name, with `function`, `arguments` and `work`; stored: the weights by name, all of the plan;
        walker: `memcomp_walk` of one of the kernels' libraries, where functions are tvm-ffi's.  The state is this
        model's own."""
        self.plan = plan
        self.of = {t.name: t for t in plan.tensors}
        self._kernels, self._walker = kernels, walker
        self._texts = {x: expression(x) for t in plan.tensors for x in (*t.shape, *t.strides, t.offset)}
        self._texts |= {x: expression(x) for s in plan.steps for x in s.sizes.values()}
        self._stored = dict(stored)
        self.state = {t.name: empty(t.dtype, self._shape(t.name, {})) for t in plan.tensors if t.kind == "state"}
        self._fixed = {**self._stored, **self.state}
        self._mine, self._turn = threading.local(), threading.Lock() if self.state else None
        self._taken = [self.of[n] for n in plan.inputs]
        self._written = [k for k, n in enumerate(plan.inputs) if n in written(plan)]
        self.reset()

    def reset(self) -> None:
        """The state as it was when the model was compiled."""
        with self._turn or nullcontext():
            for name, array in self.state.items():
                start = self.of[name].of
                array.data[...] = self._stored[start].data if start else 0

    @property
    def extents(self) -> Collection[Expr]:
        """All of the plan, with strides, offsets and numbers of steps."""
        return self._texts.values()

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        if named or len(inputs) != len(self._taken):
            inputs = self._ordered(inputs, named)
        given, torch = [], False
        for x, t in zip(inputs, self._taken, strict=True):
            given.append(held(x, t))
            torch = torch or is_torch(given[-1])
        for k in self._written:
            if not same(inputs[k], given[k]):
                raise InputError(f"the model writes into {self._taken[k].name}, which must lie row by row and take it",
                                 hint="copy it first")
        run = self.at(tuple([x.shape for x in given]))
        if self._turn is None:
            return run(given, torch)
        with self._turn:
            return run(given, torch)

    def bytes(self, **sizes: int) -> int:
        """Bytes of the arena, scratch included, at these sizes."""
        return self._places(sizes)[1]

    def _ordered(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        names = self.plan.inputs
        if len(inputs) > len(names) or named.keys() != set(names[len(inputs):]):
            raise TypeError(f"the model takes {len(names)} inputs, {', '.join(names)}; got {len(inputs)}"
                            + (f" and {', '.join(named)}" if named else ""))
        return (*inputs, *(named[n] for n in names[len(inputs):]))

    def at(self, shapes: tuple[tuple[int, ...], ...]) -> Bound:
        """What a call with inputs of these shapes does, for this thread."""
        try:
            return self._mine.known[shapes]  # type: ignore[no-any-return]
        except (AttributeError, KeyError):
            known = self._mine.__dict__.setdefault("known", {})
        found = known[shapes] = self._bind(shapes)
        if len(known) > KEPT:
            del known[next(iter(known))]
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
        return _value(self._texts.get(text) or expression(text), sizes)

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

    def _bind(self, shapes: Sequence[tuple[int, ...]]) -> Bound:
        sizes = self._sizes(shapes)
        places, total = self._places(sizes)
        room = empty("u8", (total,)).data
        fixed = dict(self._fixed)
        for name, at in places.items():
            if name in self.of:
                fixed[name] = within(room, at, self.of[name].dtype, self._shape(name, sizes))
        outs = list(dict.fromkeys(self.plan.outputs))
        slots = {n: k for k, n in enumerate((*self.plan.inputs, *outs))}
        views: list[View] = []
        for t in self.plan.tensors:
            if t.kind == "alias":
                shape = self._shape(t.name, sizes)
                strides = tuple(self._at(x, sizes) for x in t.strides)
                base = root(self.of, t.name).name
                if base in fixed:
                    fixed[t.name] = strided(fixed[base], shape, strides, self._at(t.offset, sizes))
                else:
                    inside(prod(self._shape(base, sizes)), t.name, shape, strides, self._at(t.offset, sizes))
                    slots[t.name] = len(slots)
                    views.append((slots[base], shape, strides, self._at(t.offset, sizes)))
        shaped = {n: (x.dtype, self._shape(n, sizes)) for n, x in self.of.items()}
        binding = Binding(self._kernels, lambda x: self._at(x, sizes), shaped, room, places, fixed, slots,
                          len(slots) - len(views), views, self._walker)
        return Bound(binding.acts(self.plan.steps), [(*shaped[n], steps_of(shaped[n][1])) for n in outs],
                     [slots[n] for n in self.plan.outputs])

    def _shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(self._at(x, sizes) for x in self.of[name].shape)


def _value(e: Expr, sizes: Mapping[str, int]) -> int:
    return e.value if isinstance(e, Const) and isinstance(e.value, int) else evaluate(e, sizes)
