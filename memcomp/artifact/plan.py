"""What a whole model is at run time: tensors, and the steps that make them one from another.

Extents, strides and numbers are texts: expressions over the plan's sizes (`S*4`), in the language of programs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from memcomp.ir.errors import InputError
from memcomp.ir.target import BYTES

KINDS = ("input", "weight", "state", "buffer", "output", "alias")
STEPS = ("kernel", "check", "copy", "put", "torch")
PLACES = ("i64", "i32", "i16", "i8", "u8")  # what names elements
_OWN = {"check": (1, 0, "size"), "copy": (1, 1, ""), "put": (2, 1, "dim")}  # how many it reads and writes, its size


@dataclass(frozen=True, slots=True)
class Size:
    """A number that the inputs' shapes show: dimension `dim` of input `of`, divided by `divisor`; from `least` to
    `most` (None: no limit)."""

    name: str
    of: str
    dim: int
    divisor: int
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the plan.

    kind: "input" and "output" are the caller's; "weight" is read from weights.safetensors by its name; a "state" is
    kept from call to call, and is at first the weight `of`, or 0 where that is empty; a "buffer" lies in the arena
    while somebody needs it; an "alias" shows the memory of the tensor `of` with strides and an offset, in elements.
    All but aliases are row-major.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[str, ...]
    of: str = ""
    strides: tuple[str, ...] = ()
    offset: str = "0"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done.

    kernel: `what` reads tensors in the order of its inputs and writes those of its outputs; sizes: those that it takes,
            by name.  Its scratch, which differs between machines, lies in the arena while it runs.
    check:  the elements of the tensor read name places of a dimension of `sizes["size"]` elements, from its end too
            with `what` "wraps"; `sizes["ignored"]`, where there is one, names none.
    copy:   the library's: elements from one tensor to another of the same shape and dtype.
    put:    the library's: the slices of the first tensor read along `sizes["dim"]` go to those places of the tensor
            written that the second, of one dim or none, names; from its end too with `what` "wraps".
    torch:  an operator of torch, by its name with overload.  args: its arguments as JSON, tensors as {"tensor": i}, the
            i-th read, sizes as {"size": text}.
    """

    kind: str
    what: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sizes: dict[str, str]
    args: str = ""


@dataclass(frozen=True, slots=True)
class Life:
    """A buffer of the arena: needed from the step `first` to the step `last`, both included.  at, bytes: where it lies
    and how long it is at the sizes the model was compiled with (`Plan.example`)."""

    name: str
    first: int
    last: int
    at: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """outputs: names of tensors, one may come twice.  arena: bytes of all buffers at the example sizes, without the
    kernels' scratch.  torch: names of the operators that need torch at run time."""

    sizes: tuple[Size, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    lives: tuple[Life, ...]
    example: dict[str, int]
    arena: int
    torch: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)


def _takes(step: Step, of: Mapping[str, Tensor]) -> bool:
    """Has a step of the library's own as many tensors as it needs, of the right dtypes, and its numbers?"""
    if step.kind not in _OWN:
        return True
    reads, writes, size = _OWN[step.kind]
    if (len(step.reads), len(step.writes)) != (reads, writes) or size and size not in step.sizes:
        return False
    dtypes = [of[n].dtype for n in (*step.reads, *step.writes)]
    places = () if step.kind == "copy" else dtypes[reads - 1:reads]
    return all(x in PLACES for x in places) and (not writes or dtypes[0] == dtypes[-1])


def lives(tensors: Collection[Tensor], steps: Collection[Step]) -> dict[str, tuple[int, int]]:
    """First and last step of every buffer, through all its aliases."""
    of = {t.name: t for t in tensors}
    found: dict[str, tuple[int, int]] = {}
    for at, step in enumerate(steps):
        for name in (*step.writes, *step.reads):
            base = root(of, name)
            if base.kind == "buffer":
                found[base.name] = (found.get(base.name, (at, at))[0], at)
    return found


def root(of: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor whose memory `name` shows."""
    t = of[name]
    while t.kind == "alias":
        t = of[t.of]
    return t


def written(plan: Plan) -> frozenset[str]:
    """The inputs that a call writes into."""
    of = {t.name: t for t in plan.tensors}
    return frozenset(n for step in plan.steps for n in step.writes if of[n].kind == "input")


def check(plan: Plan, kernels: Collection[str]) -> None:
    """What a plan must be to be run.  Raises InputError with the first thing that is not so."""
    for why in _faults(plan, kernels):
        raise InputError(f"the plan cannot be run: {why}", hint="compile the model again")


def _faults(plan: Plan, kernels: Collection[str]) -> Iterator[str]:
    of = {t.name: t for t in plan.tensors}
    if len(of) != len(plan.tensors):
        yield "two tensors have one name"
    for t in plan.tensors:
        if t.kind not in KINDS:
            yield f"{t.name} is a {t.kind!r}"
        if t.dtype not in BYTES:
            yield f"{t.name} has the unknown dtype {t.dtype!r}"
        if t.kind == "alias" and len(t.strides) != len(t.shape):
            yield f"{t.name} has {len(t.shape)} dims and {len(t.strides)} strides"
        seen = {t.name}
        while t.kind == "alias":
            if t.of not in of or t.of in seen:
                yield f"{t.name} is an alias of {t.of!r}"
                return
            if of[t.of].dtype != t.dtype:
                yield f"{t.name} is {t.dtype} and an alias of {t.of!r}, which is not"
            seen.add(t.of)
            t = of[t.of]
    for name in (*plan.inputs, *plan.outputs, *(s.of for s in plan.sizes)):
        if name not in of:
            yield f"there is no tensor {name!r}"
    for kind, names in (("input", plan.inputs), ("output", plan.outputs)):
        for name in names:
            if of[name].kind != kind:
                yield f"{name} is no {kind}"
        if lost := {t.name for t in plan.tensors if t.kind == kind} - set(names):
            yield f"{min(lost)} is an {kind} that nobody gives or takes"
    if len(set(plan.inputs)) < len(plan.inputs):
        yield "two inputs are one"
    for s in plan.sizes:
        if s.of not in plan.inputs or not 0 <= s.dim < len(of[s.of].shape) or s.divisor < 1:
            yield f"the size {s.name} is no extent of an input"
    for t in plan.tensors:
        if t.kind == "state" and not all(x.isdigit() for x in t.shape):
            yield f"the state {t.name} has open extents"
        if t.kind == "state" and t.of and (t.of not in of or of[t.of].kind != "weight" or
                                           (of[t.of].dtype, of[t.of].shape) != (t.dtype, t.shape)):
            yield f"the state {t.name} is at first {t.of!r}, which is no such weight"
    made = {t.name for t in plan.tensors if t.kind in ("input", "weight", "state")}
    for k, step in enumerate(plan.steps):
        if step.kind not in STEPS:
            yield f"step {k} is a {step.kind!r}"
        if step.kind == "kernel" and step.what not in kernels:
            yield f"step {k} calls {step.what!r}, and there is no such kernel"
        for name in (*step.reads, *step.writes):
            if name not in of:
                yield f"step {k} names {name!r}, and there is no such tensor"
                return
        if not _takes(step, of):
            yield f"step {k} is a {step.kind} of other tensors or numbers than one has"
        for name in step.reads:
            if root(of, name).name not in made:
                yield f"step {k} reads {name} before it is made"
        for name in step.writes:
            own = ("buffer", "output", "state", "input") if step.kind in ("copy", "put") else ("buffer", "output")
            if of[name].kind not in own:
                yield f"step {k} writes {name}, which is no tensor of its own"
            if step.kind == "put" and name not in made:
                yield f"step {k} writes into {name} before it is made"
            made.add(name)
    if {step.what for step in plan.steps if step.kind == "torch"} != set(plan.torch):
        yield "it does not say which operators need torch"
    for name in plan.outputs:
        if root(of, name).name not in made:
            yield f"the output {name} is never made"
    found = lives(plan.tensors, plan.steps)
    if {x.name: (x.first, x.last) for x in plan.lives} != found:
        yield "the lives of its buffers are others than its steps say"
