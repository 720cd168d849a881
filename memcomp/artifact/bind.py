"""The steps of a plan at fixed shapes: what each does to a call's tensors, natively where it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from memcomp.artifact import walk
from memcomp.artifact.arrays import copy, is_torch, look, put, strided
from memcomp.artifact.foreign import by_torch
from memcomp.artifact.kernel import empty_strided
from memcomp.artifact.memory import Array, DLTensor, fresh, tensor, within
from memcomp.artifact.plan import Step
from memcomp.ir.errors import InputError

Act: TypeAlias = Callable[[list[Any]], None]  # on a call's tensors, by position
Walk: TypeAlias = Callable[..., "int | None"]
Shape: TypeAlias = tuple[int, ...]
View: TypeAlias = tuple[int, Shape, Shape, int]  # which of a call's tensors; extents, strides, offset


@dataclass(frozen=True, slots=True)
class Bound:
    """A plan at fixed shapes, for one thread.  outs: dtype, shape and strides of each output; torchs: what makes them
    where torch's are asked for; results: the outputs' positions among a call's tensors."""

    acts: Sequence[Act]
    outs: Sequence[tuple[str, Shape, Shape]]
    results: Sequence[int]
    torchs: list[Callable[[], Any]] = field(default_factory=list)

    def __call__(self, given: list[Any], torch: bool) -> tuple[Any, ...]:
        if torch:
            if not self.torchs:
                from memcomp.dtypes import DTYPES

                make = empty_strided()
                self.torchs.extend(partial(make, shape, strides, DTYPES[dtype]) for dtype, shape, strides in self.outs)
            given += [make() for make in self.torchs]
        else:
            given += [fresh(dtype, shape) for dtype, shape, _ in self.outs]
        for act in self.acts:
            act(given)
        return tuple([given[k] for k in self.results])


@dataclass(frozen=True, slots=True)
class Walked:
    """Steps first .. last - 1 of a program, which lies at `place`, by machine code.  says: what raises where a step met
    an index of no element."""

    program: walk.Program
    walker: Walk | None
    place: int
    first: int
    last: int
    outer: int
    says: Mapping[int, Act]

    def __call__(self, given: list[Any]) -> None:
        assert self.walker is not None
        stopped = self.walker(self.place, self.first, self.last, *given[:self.outer])
        while stopped is not None:
            self.says[stopped](given)
            stopped = self.walker(self.place, stopped + 1, self.last, *given[:self.outer])


@dataclass(frozen=True)
class Binding:
    """A plan's steps, to be bound.

    at: an extent as a number; shapes: dtype and shape of every tensor; room: the arena; places: offsets in it, of
    scratch too; fixed: tensors whose memory stays; slots: positions of the others in a call, first `outer` inputs and
    outputs, then views of those; walker: the machine code that runs steps, None where kernels are Python's functions.
    """

    kernels: Mapping[str, Any]
    at: Callable[[str], int]
    shapes: Mapping[str, tuple[str, Shape]]
    room: Any
    places: Mapping[str, int]
    fixed: Mapping[str, Array]
    slots: Mapping[str, int]
    outer: int
    views: Sequence[View]
    walker: Walk | None

    def acts(self, steps: Sequence[Step]) -> list[Act]:
        """What a call does, one after another; native steps in a row are one act."""
        native, found = _Native(self), list["Act | tuple[int, int]"]()
        says: dict[int, Act] = {}
        for k, step in enumerate(steps):
            self._fits(k, step)
            if step.kind != "put" and step.writes and all(0 in self.shapes[n][1] for n in step.writes):
                continue
            if self.walker is None or step.kind == "torch":
                found.append(self._act(k, step))
                continue
            number = len(native.program)
            if step.kind in ("check", "put"):
                says[number] = self._act(k, step)
            native.add(k, step)
            if found and isinstance(found[-1], tuple):
                found[-1] = found[-1][0], number + 1
            else:
                found.append((number, number + 1))
        place = native.program.ready()
        return [Walked(native.program, self.walker, place, *x, self.outer, says) if isinstance(x, tuple) else x
                for x in found]

    def _fits(self, k: int, step: Step) -> None:
        """InputError where the library's own step would reach out of its tensors, which machine code does not ask."""
        shapes = [self.shapes[n][1] for n in (*step.reads, *step.writes)]
        fits = step.kind != "copy" or shapes[0] == shapes[1]
        if step.kind == "put":
            (source, places, to), dim = shapes, self.at(step.sizes["dim"])
            fits = 0 <= dim < len(to) and len(places) < 2 and source == (*to[:dim], *(places or (1,)), *to[dim + 1:])
        if not fits:
            raise InputError(f"the plan cannot be run: step {k}, a {step.kind}, has tensors of shapes that do not fit",
                             ", ".join(map(str, shapes)), "compile the model again")

    def own(self, step: Step) -> dict[str, int]:
        """The sizes that a step's kernel takes."""
        return {n: self.at(x) for n, x in step.sizes.items()}

    def work(self, k: int, step: Step) -> list[Array]:
        """The scratch of a step's kernel."""
        return [within(self.room, self.places[f"{k}/{j}"], dtype, shape)
                for j, (dtype, shape) in enumerate(self.kernels[step.what].work(self.own(step)))]

    def _act(self, k: int, step: Step) -> Act:
        if step.kind == "kernel":
            kernel = self.kernels[step.what]
            names = (*step.reads, *step.writes)
            args = [tensor(self.fixed[n]) if n in self.fixed else None for n in names]
            return self._launch(kernel.function, [*args, *map(tensor, self.work(k, step)),
                                                  *kernel.arguments(self.own(step))],
                                [(j, self.slots[n]) for j, n in enumerate(names) if n in self.slots])
        reads, writes = [self._pick(n) for n in step.reads], [self._pick(n) for n in step.writes]
        if step.kind == "copy":
            return lambda given: copy(reads[0](given), writes[0](given))
        if step.kind == "put":
            dim, wraps = self.at(step.sizes["dim"]), step.what == "wraps"
            return lambda given: put(reads[0](given), reads[1](given), writes[0](given), dim, wraps)
        if step.kind == "check":
            size, wraps = self.at(step.sizes["size"]), step.what == "wraps"
            ignored = self.at(step.sizes["ignored"]) if "ignored" in step.sizes else None
            return lambda given: look(reads[0](given), size, wraps, ignored)
        return by_torch(step, self.at, reads, writes)

    def _launch(self, function: Callable[..., Any], args: list[Any], filled: Sequence[tuple[int, int]]) -> Act:
        def act(given: list[Any]) -> None:
            mine = args.copy()
            for k, slot in filled:
                mine[k] = self._seen(given, slot)
            function(*mine)

        return act

    def _pick(self, name: str) -> Callable[[list[Any]], Any]:
        if name in self.fixed:
            one = self.fixed[name]
            return lambda _: one
        slot = self.slots[name]
        return lambda given: self._seen(given, slot)

    def _seen(self, given: list[Any], slot: int) -> Any:
        """A tensor of a call; a view is made where it is asked for."""
        if slot < self.outer:
            return given[slot]
        base, shape, strides, offset = self.views[slot - self.outer]
        x = given[base]
        return x.as_strided(shape, strides, offset + x.storage_offset()) if is_torch(x) else strided(
            x, shape, strides, offset)


class _Native:
    """Steps as records of a program; a tensor is packed once."""

    def __init__(self, of: Binding) -> None:
        self.of, self.program = of, walk.Program()
        self._packed: dict[str, DLTensor] = {}

    def add(self, k: int, step: Step) -> None:
        of, args = self.of, [self._tensor(n) for n in (*step.reads, *step.writes)]
        if step.kind == "kernel":
            kernel = of.kernels[step.what]
            self.program.add(walk.KERNEL, [*args, *map(self.program.fixed, of.work(k, step)),
                                           *kernel.arguments(of.own(step))], kernel.function)
        elif step.kind == "copy":
            self.program.add(walk.COPY, args)
        elif step.kind == "put":
            source, places, to = args
            dim = of.at(step.sizes["dim"])
            size = of.shapes[step.writes[0]][1][dim]
            self.program.add(walk.PUT, [places, source, to, dim, -size if step.what == "wraps" else 0])
        else:
            size = of.at(step.sizes["size"])
            ignored = [of.at(step.sizes["ignored"])] if "ignored" in step.sizes else []
            self.program.add(walk.CHECK, [*args, -size if step.what == "wraps" else 0, size, *ignored])

    def _tensor(self, name: str) -> DLTensor:
        of = self.of
        if name not in self._packed:
            if name in of.fixed:
                made = self.program.fixed(of.fixed[name])
            elif (slot := of.slots[name]) < of.outer:
                made = self.program.given(slot, *of.shapes[name])
            else:
                base, shape, strides, offset = of.views[slot - of.outer]
                made = self.program.given(base, of.shapes[name][0], shape, strides, offset)
            self._packed[name] = made
        return self._packed[name]
