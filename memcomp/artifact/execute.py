"""Runs a plan: kernels and copies on an arena.  Needs numpy and what the kernels need; torch only where the plan says so.

What depends on the inputs' shapes alone is made once a thread and shape: places in the arena, arguments of all steps.
A call then hands over its inputs, fresh outputs, and launches.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from memcomp.artifact import weights
from memcomp.artifact.arena import placed
from memcomp.artifact.folder import Folder
from memcomp.artifact.manifest import expression
from memcomp.artifact.memory import NUMPY, Array, carrier, empty, tensor
from memcomp.artifact.plan import Plan, Step, Tensor, check, lives, root
from memcomp.ir.errors import InputError, Refusal
from memcomp.ir.expr import Const, Expr
from memcomp.ir.target import BYTES
from memcomp.sizes import evaluate

KEPT = 8  # so many combinations of shapes stay bound, a thread
Act: TypeAlias = Callable[[list[Any]], None]  # of a call's tensors, by position


def bound(folder: Folder, kernels: Mapping[str, Any], plan: Plan) -> Model:
    """The model of a verified directory.  InputError where its parts do not fit each other."""
    check(plan, kernels)
    held = weights.read(folder.place(weights.FILE)) if weights.FILE in folder.manifest.files else {}
    for t in plan.tensors:
        if t.kind == "weight" and (t.name not in held or held[t.name].dtype != t.dtype or
                                   tuple(map(str, held[t.name].shape)) != t.shape):
            raise InputError(f"{weights.FILE} has no {t.name} of {t.dtype}[{', '.join(t.shape)}]")
    for k, step in enumerate(plan.steps):
        spec = kernels[step.what].spec if step.kind == "kernel" else None
        if spec is not None and ((len(step.reads), len(step.writes)) != (len(spec.inputs), len(spec.outputs)) or
                                 step.sizes.keys() != {r.name for r in spec.sizes}):
            raise InputError(f"the plan cannot be run: step {k} does not call {step.what} as it is")
    return Model(plan, kernels, held)


class Model:
    """A plan as a function of its inputs: `model(*inputs)`, or by name.  Several threads may call it at once.

    Inputs: numpy arrays, `Array`s or torch's tensors; outputs are torch's where an input is, else numpy arrays, or
    `Array`s where numpy has no such dtype.  Raises TypeError for a wrong number of inputs, InputError for an input of
    another dtype or shape than the model takes, IndexError for an index out of bounds.
    """

    def __init__(self, plan: Plan, kernels: Mapping[str, Any], held: Mapping[str, Array]) -> None:
        """kernels: by name, with `function`, `arguments` and `work`; held: the weights by name, all that the plan has."""
        self.plan = plan
        self.of = {t.name: t for t in plan.tensors}
        self._kernels, self._weights = kernels, dict(held)
        self._texts = {x: expression(x) for t in plan.tensors for x in (*t.shape, *t.strides, t.offset)}
        self._texts |= {x: expression(x) for s in plan.steps for x in s.sizes.values()}
        self._shared = {n: tensor(a) for n, a in self._weights.items()}
        self._mine = threading.local()
        self._taken = [(self.of[n], n) for n in plan.inputs]

    @property
    def needs_torch(self) -> tuple[str, ...]:
        """Operators of torch that it calls."""
        return self.plan.torch

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        given = self._inputs(inputs, named)
        bound = self._bound(tuple(tuple(x.shape) for x in given))
        torch = next((x for x in inputs if _is_torch(x)), None) if inputs else \
            next((x for x in named.values() if _is_torch(x)), None)
        return bound(given, torch is not None)

    def bytes(self, **sizes: int) -> int:
        """Bytes of the arena, scratch included, at these sizes."""
        return self._places(sizes)[1]

    def _inputs(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        names = self.plan.inputs
        if len(inputs) > len(names) or named.keys() != set(names[len(inputs):]):
            raise TypeError(f"the model takes {len(names)} inputs, {', '.join(names)}; got {len(inputs)}"
                            + (f" and {', '.join(named)}" if named else ""))
        given = [*inputs, *(named[n] for n in names[len(inputs):])]
        return [_held(x, t) for x, (t, _) in zip(given, self._taken, strict=True)]

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
                                 f"its shape is {shape}, the model's ({', '.join(self.of[name].shape)})")
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
                raise InputError(f"{name} has the shape {shape}; the model takes {wanted}",
                                 ", ".join(self.of[name].shape), "dimensions that differ are named by --dynamic")
        return sizes

    def _at(self, text: str, sizes: Mapping[str, int]) -> int:
        return _value(self._texts[text], sizes)

    def _places(self, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """Offsets in the arena, of every buffer and of scratch (the k-th of step s is `s/k`), and its bytes."""
        spans = lives(self.plan.tensors, self.plan.steps)
        held = {n: BYTES[self.of[n].dtype] * _product(self._at(x, sizes) for x in self.of[n].shape) for n in spans}
        for s, step in enumerate(self.plan.steps):
            for k, (dtype, shape) in enumerate(self._work(step, sizes)):
                spans[f"{s}/{k}"], held[f"{s}/{k}"] = (s, s), BYTES[dtype] * _product(shape)
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
                fixed[name] = _within(room, at, self.of[name].dtype, self._shape(name, sizes))
        outs = list(dict.fromkeys(n for n in self.plan.outputs))
        slots = {n: k for k, n in enumerate((*self.plan.inputs, *outs))}
        views: list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = []
        for t in self.plan.tensors:
            if t.kind == "alias":
                shape = self._shape(t.name, sizes)
                strides = tuple(self._at(x, sizes) for x in t.strides)
                base = root(self.of, t.name).name
                if base in fixed:
                    fixed[t.name] = _strided(fixed[base], shape, strides, self._at(t.offset, sizes))
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
            work = [tensor(_within(room, places[f"{at}/{k}"], dtype, shape))
                    for k, (dtype, shape) in enumerate(kernel.work(own))]
            args = [handed.get(n) for n in (*step.reads, *step.writes)] + [*work, *kernel.arguments(own)]
            return _launch(kernel.function, args, [(k, slots[n]) for k, n in enumerate((*step.reads, *step.writes))
                                                   if n in slots])
        reads = [_pick(n, fixed, slots) for n in step.reads]
        writes = [_pick(n, fixed, slots) for n in step.writes]
        if step.kind == "copy":
            return lambda given: _copy(reads[0](given), writes[0](given))
        if step.kind == "check":
            size, wraps = self._at(step.sizes["size"], sizes), step.what == "wraps"
            ignored = self._at(step.sizes["ignored"], sizes) if "ignored" in step.sizes else None
            return lambda given: _look(_numbers(reads[0](given)), size, wraps, ignored)
        return _by_torch(step, sizes, reads, writes)


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
            from memcomp.dtypes import DTYPES
            from torch import empty as fresh

            given += [fresh(shape, dtype=DTYPES[dtype]) for dtype, shape in self.outs]
        else:
            given += [empty(dtype, shape) for dtype, shape in self.outs]
        for _, base, shape, strides, offset in self.views:
            x = given[base]
            given.append(x.as_strided(shape, strides, offset + x.storage_offset()) if _is_torch(x)
                         else _strided(x, shape, strides, offset))
        for act in self.acts:
            act(given)
        return tuple(x.data if isinstance(x, Array) and x.dtype in NUMPY else x for x in (given[k] for k in self.results))


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
        held = fixed[name]
        return lambda _: held
    slot = slots[name]
    return lambda given: given[slot]


def _held(x: Any, t: Tensor) -> Any:
    """An input as steps take it: row-major, of the plan's dtype."""
    if _is_torch(x):
        found = _named(str(x.dtype))
        if found == t.dtype:
            x = x.detach()
            return x if x.is_contiguous() else x.contiguous()
    elif isinstance(x, Array):
        found = x.dtype
        if found == t.dtype:
            return Array(found, np.ascontiguousarray(x.data).reshape(x.data.shape))
    else:
        x = np.asarray(x)
        found = next((n for n, kind in NUMPY.items() if x.dtype == kind), str(x.dtype))
        if found == t.dtype:
            return Array(found, np.ascontiguousarray(x).reshape(x.shape))
    raise InputError(f"{t.name} is {found}; the model takes {t.dtype}", hint="convert it first")


def _is_torch(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


_TORCH = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "e4m3",
          "float8_e5m2": "e5m2", "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
          "bool": "bool"}


def _named(dtype: str) -> str:
    word = dtype.removeprefix("torch.")
    return _TORCH.get(word, word)


def _within(room: Any, at: int, dtype: str, shape: tuple[int, ...]) -> Array:
    kind = np.dtype(carrier(dtype))
    end = at + kind.itemsize * _product(shape)
    return Array(dtype, room[at:end].view(kind).reshape(shape))


def _strided(x: Array, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Array:
    """Part of a row-major array.  Refusal where it would reach out of it."""
    flat = x.data.reshape(-1)
    reach = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if _product(shape) and (reach >= flat.size or offset < 0 or any(s < 0 for s in strides)):
        raise Refusal(f"a view of {x} reaches element {reach}")
    return Array(x.dtype, np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [s * flat.itemsize for s in strides]))


def _numbers(x: Any) -> Any:
    return x.data if isinstance(x, Array) else x.numpy()


def _bits(x: Any) -> Any:
    """The elements as numpy can move them."""
    if isinstance(x, Array):
        return x.data
    import torch

    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).numpy()


def _copy(source: Any, to: Any) -> None:
    """The library's copy: bits, of equal dtype and shape."""
    a, b = _bits(source), _bits(to)
    word = np.dtype(f"u{a.dtype.itemsize}")
    np.copyto(b.view(word), a.view(word), casting="no")


def _look(index: Any, size: int, wraps: bool, ignored: int | None) -> None:
    if index.size and (index.min() < (-size if wraps else 0) or index.max() >= size):
        bad = index[(index < (-size if wraps else 0)) | (index >= size)]
        bad = bad if ignored is None else bad[bad != ignored]
        if bad.size:
            raise IndexError(f"index {int(bad[0])} is out of bounds for a dimension of {size} elements")


def _by_torch(step: Step, sizes: Mapping[str, int], reads: Sequence[Callable[[list[Any]], Any]],
              writes: Sequence[Callable[[list[Any]], Any]]) -> Act:
    """A step that torch runs: an operator of torch's own, by its name; what it makes is copied to where it belongs."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise Refusal(f"{step.what} needs torch, which is not installed",
                      hint="pip install torch, or compile with --strict to see what is in the way") from error
    from memcomp.dtypes import DTYPES

    space, _, rest = step.what.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if space == "aten" else None
    run = getattr(packet, overload, None)
    if not isinstance(run, torch._ops.OpOverload):
        raise Refusal(f"torch {torch.__version__} has no operator {step.what}")
    args, kwargs = json.loads(step.args)
    places = [int(x) for k, x in step.sizes.items() if k.startswith("out")]

    def read(x: Any, given: list[Any]) -> Any:
        if isinstance(x, list):
            return [read(y, given) for y in x]
        if isinstance(x, dict):
            (kind, value), = x.items()
            if kind == "tensor":
                held = reads[value](given)
                return torch.from_dlpack(held) if isinstance(held, Array) else held
            return {"size": lambda: _value(expression(value), sizes), "dtype": lambda: DTYPES[value],
                    "device": lambda: torch.device(value)}[kind]()
        return x

    def act(given: list[Any]) -> None:
        with torch.no_grad():
            made = run(*read(args, given), **{k: read(x, given) for k, x in kwargs.items()})
            made = made if isinstance(made, (tuple, list)) else (made,)
            for place, write in zip(places, writes, strict=True):
                to = write(given)
                (torch.from_dlpack(to) if isinstance(to, Array) else to).copy_(made[place])

    return act


def _value(e: Expr, sizes: Mapping[str, int]) -> int:
    return e.value if isinstance(e, Const) and isinstance(e.value, int) else evaluate(e, sizes)


def _product(xs: Any) -> int:
    out = 1
    for x in xs:
        out *= x
    return out
