"""What the command line says of a function's inputs: `x=bf16[2,S,64]`, `x.S=16:4096`; and inputs made of that.

A name in a shape is an extent that is left open: equal names are equal extents.  Tensors are the same at every call:
real ones standard normal, integers as great as those of the example that they stand for, else 0 or 1 (which name a row
of any table).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memcomp.ir.errors import InputError, OptionError, nearest
from memcomp.ir.target import BYTES

_INPUT = re.compile(r"(\w+)=(\w+)\[([\w\s,]*)\]")
_DYNAMIC = re.compile(r"(\w+)\.(\w+)=(\d{1,18}):(\d{1,18})", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Dim:
    """An extent that is left open, its name, and between what it may lie (most: None where nothing bounds it)."""

    name: str
    least: int = 1
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor: a dtype's name, and an extent or a name for each dim."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What was said of inputs.

    inputs:    tensors by the name, or the position, of a parameter.
    dynamic:   (input, dim's number or name) -> its least and greatest extent.
    sizes:     extents that stand for open ones where something is run.
    arguments: of a factory, as they were written.
    """

    inputs: Mapping[str, Spec]
    dynamic: Mapping[tuple[str, str], tuple[int, int]]
    sizes: Mapping[str, int]
    arguments: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """The open extents that the inputs name."""
        return {d for s in self.inputs.values() for d in s.shape if isinstance(d, str)}


NOTHING = Asked({}, {}, {}, {})


def asked(inputs: Iterable[str] = (), dynamic: Iterable[str] = (), sizes: Iterable[str] = (),
          arguments: Iterable[str] = ()) -> Asked:
    """Read options as they were written.  Raises OptionError."""
    return Asked(_once("--input", map(_input, inputs)), _once("--dynamic", map(_dynamic, dynamic)),
                 _once("--size", map(_size, sizes)), _once("--arg", map(_argument, arguments)))


def _once(option: str, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise OptionError(f"{option} names {key if isinstance(key, str) else '.'.join(key)} twice")
        found[key] = value
    return found


def _input(text: str) -> tuple[str, Spec]:
    found = _INPUT.fullmatch(text.strip())
    if not found:
        raise OptionError(f"--input {text!r} is not name=dtype[shape]", hint="e.g. --input 'x=bf16[2,S,64]'")
    name, dtype, inside = found.groups()
    if dtype not in BYTES:
        raise OptionError(f"--input {text!r}: unknown dtype {dtype!r}", hint=nearest(dtype, BYTES))
    return name, Spec(dtype, tuple(_extent(text, d.strip()) for d in inside.split(",")) if inside.strip() else ())


def _extent(text: str, word: str) -> int | str:
    if _NUMBER.fullmatch(word):
        return int(word)
    if word.isidentifier():
        return word
    raise OptionError(f"--input {text!r}: {word!r} is neither a number nor a name",
                      hint="a name leaves an extent open, e.g. --input 'x=f32[S,64]'")


def _dynamic(text: str) -> tuple[tuple[str, str], tuple[int, int]]:
    found = _DYNAMIC.fullmatch(text.strip())
    if not found:
        raise OptionError(f"--dynamic {text!r} is not name.dim=min:max", hint="e.g. --dynamic x.1=16:4096")
    least, most = int(found[3]), int(found[4])
    if not least < most:
        raise OptionError(f"--dynamic {text!r} leaves nothing open", hint="the least extent comes first")
    return (found[1], found[2]), (least, most)


def _size(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not _NUMBER.fullmatch(value):
        raise OptionError(f"--size {text!r} is not RANK=N", hint="e.g. --size M=4096")
    return name, int(value)


def _argument(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"--arg {text!r} is not name=value", hint="e.g. --arg heads=8")
    return name, value


def parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function or a module's `forward`; [] where Python cannot tell."""
    try:
        return list(inspect.signature(getattr(fn, "forward", fn)).parameters.values())
    except (TypeError, ValueError):
        return []


def positional(fn: Callable[..., Any], count: int) -> tuple[str, ...]:
    """Names of a function's first `count` inputs, as far as it has names for them, else their positions."""
    names = [p.name for p in parameters(fn) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names[i] if i < len(names) else str(i) for i in range(count))


def by_position(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function with those of its parameters last, and by position, that are given by keyword only; itself where it
    has none.  InputError where any number of others stands before them."""
    given = parameters(fn)
    only = [p.name for p in given if p.kind == p.KEYWORD_ONLY]
    if not only:
        return fn
    if any(p.kind == p.VAR_POSITIONAL for p in given):
        if needed := [p.name for p in given if p.name in only and p.default is p.empty]:
            raise InputError(f"{', '.join(needed)} can be given by keyword only, after any number of inputs",
                             hint="give the others names, too")
        return fn
    head = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def call(*args: Any) -> Any:
        return fn(*args[:len(head)], **dict(zip(only, args[len(head):], strict=False)))

    call.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in given if p in head or p.name in only],
        __validate_parameters__=False)  # one without a default may come after one that has one
    call.__name__ = getattr(fn, "__name__", type(fn).__name__)
    if not hasattr(fn, "parameters"):
        return call
    import torch

    made = torch.nn.Module()  # keeps the tensors of a module where they are found
    made.fn, made.forward = fn, call  # type: ignore[assignment]
    return made.train(fn.training)  # type: ignore[attr-defined]


def filled(fn: Callable[..., Any], examples: Sequence[Any], ask: Asked
           ) -> tuple[tuple[Any, ...], tuple[dict[int, Dim], ...]]:
    """The inputs to call `fn` with, and which of their extents are open, by dim.

    examples: what stands where nothing is said.  Raises OptionError where what is said does not fit `fn`.
    """
    places = _Places(fn, len(examples))
    ranges = _ranges(ask)
    extents: dict[str, int] = {}
    for name in (d for s in ask.inputs.values() for d in s.shape if isinstance(d, str)):
        if name not in extents:
            extents[name] = _stand_in(Dim(name, *ranges.get(name, ())), ask.sizes.get(name), set(extents.values()))
    values, shapes = dict(enumerate(examples)), dict[int, tuple[int | str, ...]]()
    for name, spec in ask.inputs.items():
        at = places.of(name)
        shape = [d if isinstance(d, int) else extents[d] for d in spec.shape]
        values[at], shapes[at] = _tensor(name, spec.dtype, shape, values.get(at)), spec.shape
    for at in range(max(*values, -1, places.needed - 1) + 1):
        if at not in values:
            values[at] = places.default(at)
    dims: list[dict[int, Dim]] = [
        {d: Dim(x, *ranges.get(x, ())) for d, x in enumerate(shapes.get(at, ())) if isinstance(x, str)}
        for at in range(len(values))]
    for (name, dim), (least, most) in ask.dynamic.items():
        at = places.of(name)
        if at not in values:
            raise OptionError(f"--dynamic {name}.{dim}: no input is given for {name}")
        if dim.isdigit():
            dims[at][_dim(name, dim, values[at], least, most)] = Dim(f"{name}_{dim}", least, most)
        elif dim not in shapes.get(at, ()):
            raise OptionError(f"--dynamic {name}.{dim}: {name} has no extent named {dim}",
                              hint=f"name it (--input '{name}=f32[{dim},64]') or give the dim's number")
    return tuple(values[i] for i in range(len(values))), tuple(dims)


class _Places:
    """Where the inputs of a function stand, by name or by number."""

    def __init__(self, fn: Callable[..., Any], examples: int) -> None:
        given = parameters(fn)
        named = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.names, self._defaults = [p.name for p in named], [p.default for p in named]
        self.needed = max((at + 1 for at, p in enumerate(named) if p.default is p.empty), default=0)
        more = not given or any(p.kind == p.VAR_POSITIONAL for p in given)
        self._most = 1000 if more else max(len(named), examples)

    def of(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        if name.isdigit() and int(name) < self._most:
            return int(name)
        hint = nearest(name, self.names) if self.names else "its inputs have no names: 0 is the first"
        raise OptionError(f"the function has no input {name!r}", hint=hint)

    def default(self, at: int) -> Any:
        """What stands where nothing is given.  Raises OptionError where nothing may."""
        if at < len(self.names) and self._defaults[at] is not inspect.Parameter.empty:
            return self._defaults[at]
        missing = self.names[at] if at < len(self.names) else str(at)
        raise OptionError(f"no input is given for {missing}", f"inputs: {', '.join(self.names) or 'any number'}",
                          f"e.g. --input '{missing}=f32[2,S,64]'")


def marked(inputs: Sequence[Any], dims: Sequence[Mapping[int, Dim]]) -> tuple[Any, ...]:
    """The inputs, as torch's compiler is told that these extents are open."""
    import torch

    found = list(inputs)
    for at, open_dims in enumerate(dims):
        if open_dims:
            found[at] = inputs[at].detach().requires_grad_(inputs[at].requires_grad)
            for dim, x in open_dims.items():
                limits = {} if x.most is None else {"min": x.least, "max": x.most}  # torch takes both or none
                torch._dynamo.mark_dynamic(found[at], dim, **limits)
    return tuple(found)


def _ranges(ask: Asked) -> dict[str, tuple[int, int]]:
    """Of every named extent that has one."""
    found: dict[str, tuple[int, int]] = {}
    for (name, dim), limits in ask.dynamic.items():
        if not dim.isdigit() and found.setdefault(dim, limits) != limits:
            raise OptionError(f"--dynamic gives {dim} two ranges, the second for {name}",
                              hint="equal names are equal extents")
    return found


def _stand_in(x: Dim, size: int | None, taken: set[int]) -> int:
    """An extent for an open one.  Open extents differ, since torch takes equal ones for one and the same, and none is
    1, which it takes for a fixed one."""
    if size is None:
        tries = [*range(64, 4096, 16), *range(max(x.least, 2), max(x.least, 2) + 2 + len(taken))]
        size = next((n for n in tries if n >= x.least and (x.most is None or n <= x.most) and n not in taken), x.least)
    if not x.least <= size or x.most is not None and size > x.most:
        limits = f"{x.least}:{x.most}" if x.most is not None else f"{x.least} and more"
        raise OptionError(f"--size {x.name}={size} is outside of its range {limits}")
    if size < 2:
        raise OptionError(f"{x.name} cannot be open and {size} here: torch fixes extents of 0 and 1",
                          hint=f"--size {x.name}=64, or the number itself in --input")
    return size


def _dim(name: str, dim: str, value: Any, least: int, most: int) -> int:
    shape = getattr(value, "shape", None)
    if shape is None or int(dim) >= len(shape):
        what = f"it is {type(value).__name__}" if shape is None else f"its shape is {list(shape)}"
        raise OptionError(f"--dynamic {name}.{dim}: {name} has no such dim", what)
    if not max(least, 2) <= shape[int(dim)] <= most:
        raise OptionError(f"--dynamic {name}.{dim}={least}:{most}: the example has {shape[int(dim)]} there",
                          "torch fixes extents of 0 and 1" if shape[int(dim)] < 2 else "",
                          "give another with --input")
    return int(dim)


def _tensor(name: str, dtype: str, shape: Sequence[int], example: Any) -> Any:
    import torch

    from memcomp.dtypes import DTYPES

    random, kind = torch.Generator().manual_seed(0), DTYPES[dtype]
    try:
        if kind.is_floating_point:
            return torch.randn(shape, generator=random).to(kind)
        low, high = 0, 1
        if isinstance(example, torch.Tensor) and example.dtype == kind and kind != torch.bool and example.numel():
            low, high = int(example.min()), int(example.max())
        return torch.randint(low, high + 1, shape, generator=random).to(kind)
    except RuntimeError as error:  # torch's word for memory that is not there, and for sizes beyond 64 bits
        raise InputError(f"--input {name} of shape {list(shape)} cannot be made", str(error).splitlines()[0]) from error
