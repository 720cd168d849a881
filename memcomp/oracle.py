"""The oracle: a float64 reference, a tolerance derived from the formats, a comparison.  It stands beside the line.

Errors are relative to a scale: the sum of the absolute terms that make an element (so that cancellation is not
charged to the kernel), or, where that is not known, the RMS of the reference.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memcomp.ir.cascade import Einsum
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Call, Expr, depth
from memcomp.ir.program import Program

if TYPE_CHECKING:
    from memcomp.config import Config
    from memcomp.pipeline import Compiled

EPSILON = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "e4m3": 2.0**-3, "e5m2": 2.0**-2}
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Error:
    """Root mean square and maximum of |actual - reference| / scale; infinite where NaNs or infinities differ."""

    rms: float
    max: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds of an `Error`."""

    rms: float
    max: float

    def admits(self, error: Error) -> bool:
        return error.rms <= self.rms and error.max <= self.max


def tolerance(inputs: Iterable[str], output: str, *, elements: int, length: int | None, torch_error: Error | None
              ) -> Tolerance:
    """How far a right answer may be from float64.

    inputs, output: dtypes.  Both are rounded once (a format epsilon each); the roundings of an f32 accumulator over
    `length` terms add up like a random walk (its epsilon times sqrt(length); None: not known, then only torch's error
    bounds).  The largest of n errors is about 1 + sqrt(2 ln n) times their RMS (n = `elements`).
    torch_error: torch's own error on the same values; a result may have at most twice that, but never less is asked for
    than the rounding of the output and, where `length` is known, of a plain accumulator (torch sums short rows in
    parts, which is more exact).  At least one of `length` and `torch_error` must be known.
    """
    if length is None and torch_error is None:
        raise ValueError("a tolerance needs a reduction length or torch's own error")
    peak = 1.0 + math.sqrt(2.0 * math.log(max(elements, 2)))
    rms = math.inf
    if length is not None:
        rms = (max((EPSILON.get(d, 0.0) for d in inputs), default=0.0) + EPSILON.get(output, 0.0)
               + EPSILON["f32"] * math.sqrt(max(length, 1)))
    bound = Tolerance(rms, rms * peak)
    if torch_error is None:
        return bound
    once, walk = EPSILON.get(output, 0.0), EPSILON["f32"] * math.sqrt(max(length or 1, 1))
    few = 0.5 + 0.5 / math.sqrt(max(elements, 1))  # the RMS of one error is that error
    return Tolerance(min(bound.rms, max(2.0 * torch_error.rms, once * few, walk / 2.0)),
                     min(bound.max, max(2.0 * torch_error.max, once, walk / 2.0 * (peak if length else 2.0))))


def measure(actual: Array, reference: Array, scale: Array | float | None = None) -> Error:
    """The error of `actual` against a float64 `reference` of the same shape."""
    if actual.shape != reference.shape:
        return Error(math.inf, math.inf)
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(actual[~finite], reference[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return Error(math.inf, math.inf)
    if not finite.any():
        return Error(0.0, 0.0)
    difference = np.abs(actual[finite] - reference[finite])
    if scale is None:
        scale = float(np.sqrt(np.mean(reference[finite] ** 2)))
    divisor = np.broadcast_to(np.asarray(scale, np.float64), reference.shape)[finite]
    if not difference.any():
        return Error(0.0, 0.0)
    relative = np.divide(difference, divisor, out=np.where(difference > 0, math.inf, 0.0), where=divisor > 0)
    size = float(np.sqrt(np.mean(divisor**2)))
    return Error(float(np.sqrt(np.mean(difference**2))) / size if size else math.inf, float(relative.max()))


def absolute_terms(program: Program, inputs: Mapping[str, Array],
                   sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
    """Per output element, the sum of the absolute values of the terms that make it: the scale of its error."""
    from memcomp.ir.interpret import interpret

    outs = {t.name for t in program.cascade.outputs()} | {t.name + "'" for t in program.cascade.outputs()}

    def terms(e: Einsum) -> Einsum:
        added = e.reduce is None or e.reduce.monoid == "sum"
        return replace(e, body=_absolute(e.body)) if added and outs & set(e.names) else e

    absolute = replace(program, cascade=replace(program.cascade, einsums=tuple(map(terms, program.cascade.einsums))))
    return {k: np.abs(v) for k, v in interpret(absolute, dict(inputs), dict(sizes or {})).items()}


def _absolute(e: Expr) -> Expr:
    if isinstance(e, Call) and e.op in ("add", "sub"):
        return Call("add", tuple(map(_absolute, e.args)))
    return Call("abs", (e,))


@dataclass(frozen=True, slots=True)
class Row:
    """One output compared."""

    name: str
    error: Error
    tolerance: Tolerance

    @property
    def ok(self) -> bool:
        return self.tolerance.admits(self.error)

    def __str__(self) -> str:
        verdict = 'ok' if self.ok else 'WRONG'
        return (f"{self.name}: {verdict}  max {self.error.max:.2e} (bound {self.tolerance.max:.2e})  "
                f"rms {self.error.rms:.2e} (bound {self.tolerance.rms:.2e})")


@dataclass(frozen=True, slots=True)
class Report:
    """The comparison of a compiled function with float64, output by output."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(r.ok for r in self.rows)

    @property
    def worst(self) -> Row:
        """The row nearest to, or furthest over, its bound; a wrong one if there is any."""
        return max(self.rows, key=lambda r: (not r.ok, r.error.max / r.tolerance.max if r.tolerance.max else 0.0))

    @property
    def max_error(self) -> float:
        return self.worst.error.max

    @property
    def tolerance(self) -> float:
        return self.worst.tolerance.max

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))


def check(fn: Callable[..., Any], *example_inputs: Any, **options: Any) -> Report:
    """Run `fn` compiled, by eager torch, and in float64, and compare.

    fn: a function, or an nn.Module (its float64 twin is a copy).  Every run gets its own copy of the inputs.  Errors
    are relative to the RMS of each output; the bound is twice eager torch's own error.  Integer outputs must be equal.
    All runs are on the device that the kernels are for; a module whose parameters are elsewhere is copied there.
    options: as for `compile`.  Raises OptionError for a wrong option, InputError where `fn` returns no tensors.
    """
    import torch

    from memcomp.backend import compile, uncompiled
    from memcomp.config import config

    fn, place = uncompiled(fn), _place(config(options))
    if isinstance(fn, torch.nn.Module) and any(t.device.type != place for t in (*fn.parameters(), *fn.buffers())):
        fn = copy.deepcopy(fn).to(place)
    example_inputs = tuple(_moved(example_inputs, place))
    compiled = compile(fn, **options)
    with torch.no_grad():
        actual = _leaves(compiled(*_copied(example_inputs)))
        eager = _leaves(fn(*_copied(example_inputs)))
        double = copy.deepcopy(fn).double() if isinstance(fn, torch.nn.Module) else fn
        exact = _leaves(double(*_copied(example_inputs, torch.float64)))
    if not actual or not len(actual) == len(eager) == len(exact):
        raise InputError("the function returns no tensors, or not the same number each time", repr(fn))
    triples = enumerate(zip(actual, eager, exact, strict=True))
    return Report(tuple(_row(f"output {i}", a, e, x) for i, (a, e, x) in triples))


def check_program(program: Program, sizes: Mapping[str, int] | None = None, **options: Any) -> Report:
    """Run the kernel of a program on random inputs and compare with its meaning in float64.

    sizes: extents of symbolic ranks; others have their bound, or `sizes.EXAMPLE_EXTENT`.  Real inputs are standard
    normal; integers lie below the smallest extent, so that they may index any rank.  Errors are relative to the sum of
    absolute terms.  Raises InputError where the tensors do not fit this machine's memory.
    """
    from memcomp.config import config
    from memcomp.pipeline import compile_program
    from memcomp.sizes import fixed, shape_sizes

    known = {**fixed(program), **shape_sizes(program, program, sizes or {})}
    settings = config(options)
    _fits(program, known)
    return Reference(program, known).report(compile_program(program, config=settings, sizes=known), settings)


class Reference:
    """What a program means in float64 on random inputs of these extents, to compare kernels with."""

    def __init__(self, program: Program, known: Mapping[str, int]) -> None:
        """known: of all ranks.  Raises InputError where the tensors do not fit this machine's memory."""
        from memcomp.ir.interpret import interpret

        _fits(program, known)
        self.program, self.known = program, dict(known)
        self.tensors = random_inputs(program, known)
        arrays = {t.name: x.double().numpy() if t.dtype in EPSILON else x.numpy()
                  for t, x in zip(program.cascade.inputs(), self.tensors, strict=True)}
        self.exact, terms = interpret(program, arrays, known), absolute_terms(program, arrays, known)
        # at least their RMS: what cancels in the numerator of a quotient is not seen among its terms
        self.scale = {n: np.maximum(terms[n], _rms(x)) for n, x in self.exact.items()}

    def report(self, compiled: Compiled, settings: Config) -> Report:
        """The errors of a kernel of the program."""
        outs = caller(self.program, compiled, self.tensors, self.known, settings)()
        rows, length = [], _roundings(self.program, self.known)
        for t, out in zip(self.program.cascade.outputs(), outs, strict=True):
            bound = tolerance([i.dtype for i in self.program.cascade.inputs()], t.dtype, elements=out.numel(),
                              length=length, torch_error=None)
            error = measure(out.cpu().double().numpy(), self.exact[t.name], self.scale[t.name])
            rows.append(Row(t.name, error, bound))
        return Report(tuple(rows))


def _rms(x: Array) -> float:
    finite = x[np.isfinite(x)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def random_inputs(program: Program, known: Mapping[str, int]) -> list[Any]:
    """A program's inputs, always the same ones; integers may index any rank.  known: the extents of all ranks."""
    import torch

    from memcomp.dtypes import DTYPES
    from memcomp.sizes import evaluate, input_shapes

    random, tensors = torch.Generator().manual_seed(0), []
    for t, shape in zip(program.cascade.inputs(), input_shapes(program.cascade), strict=True):
        extents, dtype = [evaluate(x, known) for x in shape], DTYPES[t.dtype]
        if t.dtype in EPSILON:
            tensors.append(torch.randn(extents, generator=random).to(dtype))
        else:
            high = 2 if t.dtype == "bool" else max(1, min(known.values(), default=1))
            tensors.append(torch.randint(0, high, extents, generator=random).to(dtype))
    return tensors


def caller(program: Program, compiled: Compiled, tensors: Sequence[Any], known: Mapping[str, int],
           settings: Config) -> Callable[[], list[Any]]:
    """A call of a program's kernel on these inputs, on the kernel's device; gives the outputs."""
    from memcomp.binding import make_entry
    from memcomp.runtime import run

    symbols, place = [r.name for r in program.cascade.ranks if r.extent is None], _place(settings)
    entry = make_entry(program.digest, program, compiled.tiles, compiled.entry, (), symbols, None, place)
    inputs, sizes = _moved(list(tensors), place), [known[s] for s in symbols]
    return lambda: run(entry, inputs, sizes)


def _fits(program: Program, known: Mapping[str, int]) -> None:
    """Every tensor in float64, as `interpret` holds it, and twice that for what a statement computes on the way."""
    c = program.cascade
    names = {t.name for t in c.tensors} | {n for e in c.einsums for n in e.names if not n.endswith("'")}
    need = 24 * sum(math.prod(known.get(r, 1) for r in c.tensor(n).ranks) for n in names)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise InputError(f"{program.name} needs about {need / 2**30:.3g} GiB to be checked, and this machine has "
                         f"{have / 2**30:.3g}", hint="give its ranks smaller extents or bounds")


def _roundings(program: Program, known: Mapping[str, int]) -> int:
    """How many roundings follow one another at most: the terms of reductions and of loops, the operations of bodies."""
    c = program.cascade
    over = {v for e in c.einsums if e.reduce for v in e.reduce.over}
    over |= {r.var for r in c.ranks if r.iterative}
    return math.prod([1, *(known.get(v.upper(), 1) for v in over)]) + sum(depth(e.body) - 1 for e in c.einsums)


def _row(name: str, actual: Any, eager: Any, exact: Any) -> Row:
    from memcomp.dtypes import DTYPES

    dtype = next(n for n, d in DTYPES.items() if d == actual.dtype)
    got, own, want = (t.detach().cpu().double().numpy() for t in (actual, eager, exact))
    if dtype not in EPSILON:
        wrong = 0.0 if np.array_equal(got, own) else math.inf
        return Row(name, Error(wrong, wrong), Tolerance(0.0, 0.0))
    own_error = measure(own, want)
    return Row(name, measure(got, want),
               tolerance([dtype], dtype, elements=want.size, length=None, torch_error=own_error))


def _place(settings: Config) -> str:
    """Where the tensors are that a check runs on."""
    from memcomp.backends import device_of

    return "cpu" if settings.interpret else device_of(settings)


def _moved(values: Any, place: str) -> Any:
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.to(place) if isinstance(x, torch.Tensor) and x.device.type != place else x, values)


def _leaves(value: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    if not isinstance(value, (torch.Tensor, tuple, list, dict)) and hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def _copied(inputs: tuple[Any, ...], dtype: Any = None) -> tuple[Any, ...]:
    import torch
    from torch.utils._pytree import tree_map

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return copy.deepcopy(x)
        if dtype is not None:
            return x.detach().to(dtype, copy=True) if x.is_floating_point() else x.clone()
        # the same strides and offset, which a clone would tidy away
        storage = x.untyped_storage().clone()  # type: ignore[no-untyped-call]
        new = x.detach().new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())
        new.__dict__.update((k, v) for k, v in x.__dict__.items() if k.startswith("_dynamo_"))  # which dims are open
        return new

    return tuple(tree_map(one, inputs))
