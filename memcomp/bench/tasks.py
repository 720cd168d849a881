"""What `memcomp bench --device cuda` asks of a process: to check a form of a case, or to time the forms of one.

Answers are plain values: they cross to another process and into a file.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcomp.ir.errors import Refusal
from memcomp.workers import FAILED, OK, WRONG, Answer, Job, failure, line

if TYPE_CHECKING:
    from torch import Tensor

    from memcomp.backend import Installed
    from memcomp.bench.cuda import Loop, Machine
    from memcomp.models.bench import Case, Layer
    from memcomp.oracle import Error, Report, Tolerance

OWN = "memcomp "  # and the name of a backend: one of our forms of a case
PARTS = 8         # of a result that are compared with float64, spread over its batch and heads
ROUNDS = 21
SOME = 37         # points of a program's symbolic rank, of the next one more


class Tasks:
    """Does jobs, on a GPU or, to rehearse, on this machine's processor.

    rehearse: Triton's interpreter instead of a GPU, and small cases.  target: that is compiled for, "" for the nearest.
    """

    def __init__(self, rehearse: bool, target: str = "") -> None:
        self.rehearse, self._target = rehearse, target
        self._ready: dict[str, Loop] = {}

    def answer(self, job: Job) -> Answer:
        """Do a job; what goes wrong is the answer."""
        import torch

        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                found: Answer = getattr(self, job.do)(*job.given)
        except Exception as error:
            found = failure(error)
        lost = False
        try:
            if "machine" in self.__dict__:
                self.machine.wait()
        except Exception as error:
            found, lost = Answer(FAILED, found.why or f"the device is lost: {line(error)}"), True
        return Answer(found.state, found.why, found.told, lost, round(time.perf_counter() - begin, 3))

    @cached_property
    def machine(self) -> Machine:
        from memcomp.bench.cuda import Gpu, Rehearsal

        return Rehearsal() if self.rehearse else Gpu()

    @cached_property
    def target(self) -> str:
        from memcomp.bench.cuda import target_of

        return self._target or target_of(self.machine.facts())

    @cached_property
    def cases(self) -> dict[str, Case]:
        from memcomp.models.bench import cases
        from memcomp.models.bench.operators import listed

        return {c.name: c for c in (listed(small=True) if self.rehearse else cases("cuda"))}

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def facts(self) -> Answer:
        """The device, what is compiled for, which backends write for it, versions, and what the cache calls it all."""
        from memcomp.backends import backends_for
        from memcomp.bench.measure import versions
        from memcomp.cache import environment

        return Answer(OK, told={"device": self.machine.facts(), "target": self.target,
                                "backends": backends_for("cuda"), "versions": versions("torch", "triton", "cuda-core"),
                                "environment": environment(self.machine.place)})

    def peaks(self) -> Answer:
        return Answer(OK, told=asdict(self.machine.peaks()))

    def program(self, file: str, backend: str) -> Answer:
        """The kernel of a .mc file beside its meaning in float64, where symbolic ranks have `SOME` points."""
        from memcomp.config import config
        from memcomp.ir.text import parse
        from memcomp.oracle import Reference
        from memcomp.pipeline import compile_program
        from memcomp.sizes import fixed, shape_sizes

        program, settings = parse(Path(file).read_text()), config(self._options(backend))
        symbols = {r.name: min(SOME + n, r.bound or SOME + n) for n, r in enumerate(program.cascade.ranks)
                   if r.extent is None}
        known = {**fixed(program), **shape_sizes(program, program, symbols)}
        compiled = compile_program(program, config=settings, sizes=known)
        return _judged(Reference(program, known).report(compiled, settings))

    def family(self, name: str, backend: str) -> Answer:
        """A family of layers beside itself in float64, on few rows and keys."""
        import torch

        from memcomp.models.families import families
        from memcomp.oracle import check
        from memcomp.runtime import stats

        (found,) = (f for f in families() if f.name == name)
        args, before = found.inputs(70, 200, torch.bfloat16), stats()["launches"]
        report = check(found.fn, *args, **self._options(backend), rest="eager")
        if stats()["launches"] == before:
            raise Refusal("nothing in it is a region")
        return _judged(report)

    def check(self, name: str, form: str) -> Answer:
        """A form of a case, at its full size, beside parts of the result in float64."""
        import torch

        case, args = self._begin(name)
        run, own = self._made(case, form, args)
        out = _poisoned(run, args)
        if not isinstance(out, torch.Tensor):
            raise Refusal(f"the case {name} gives {type(out).__name__}, not a tensor")
        error, bound, eager = compared(case, args, out)
        told: dict[str, Any] = {"rms": error.rms, "max": error.max, "bound": bound.max, "bound_rms": bound.rms,
                                "eager": eager.max, "bytes": sum(t.numel() * t.element_size() for t in (*args, out)),
                                "own": [_told(x) for x in own]}
        right = bound.admits(error)
        why = "" if right else f"rms {error.rms:.1e} (bound {bound.rms:.1e}), max {error.max:.1e} ({bound.max:.1e})"
        return Answer(OK if right else WRONG, why, told)

    def prepare(self, name: str, forms: Sequence[str]) -> Answer:
        """Make the forms of a case ready to be timed; the next job is `time`."""
        from memcomp.bench.cuda import copies

        self._ready = {}
        case, args = self._begin(name)
        size = sum(t.numel() * t.element_size() for t in args)
        sets = [args, *(tuple(t.clone() for t in args) for _ in range(1, copies(size, self.machine.facts()["l2"])))]
        missing, held = {}, {}
        for form in forms:
            try:
                run, _ = self._made(case, form, args)
                held[form] = self.machine.held(_call(run, args))
                self._ready[form] = self.machine.loop([_call(run, x) for x in sets])
            except Exception as error:
                missing[form] = failure(error).why
                self.machine.wait()
        return Answer(OK, told={"missing": missing, "held": held, "sets": len(sets)})

    def time(self) -> Answer:
        """The forms that are ready, in turn."""
        from memcomp.bench.measure import take_turns

        rounds, warm = (2, 0) if self.rehearse else (ROUNDS, 2)
        times = take_turns({n: x.run for n, x in self._ready.items()}, rounds, warm, self.machine.clock)
        told = {n: {**asdict(t.each(self._ready[n].calls)), "calls": self._ready[n].calls, "rounds": rounds,
                    "without_graph": self._ready[n].why} for n, t in times.items()}
        self._ready = {}
        return Answer(OK, told=told)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> tuple[Case, tuple[Tensor, ...]]:
        """A case and its arguments, where nothing was compiled before: equal programs of other sizes share kernels."""
        import torch

        import memcomp

        torch._dynamo.reset()
        memcomp.reset()
        if self.machine.place == "cuda":
            torch.cuda.empty_cache()
        case = self.cases[name]
        with torch.device(self.machine.place):
            return case, case.inputs()

    def _options(self, backend: str) -> dict[str, Any]:
        return {"target": self.target, "backend": backend, "strict": True, "cache": "off", **self.machine.options}

    def _made(self, case: Case, form: str, args: tuple[Tensor, ...]) -> tuple[Layer, list[Installed]]:
        """A function of the case's arguments; what of it is memcomp's, once it was called."""
        import torch

        own: list[Installed] = []
        if not form.startswith(OWN):
            from memcomp.bench import compiled

            return compiled(case.rivals[form], args, {}), own
        from memcomp.backend import install
        from memcomp.config import config

        settings = config({**self._options(form.removeprefix(OWN)), "rest": "eager", **case.options})

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            found, refused = install(gm, settings)
            if not found:
                raise Refusal("; ".join(f"{r.where}: {r.why}" for r in refused) or "nothing in it is a region")
            own.extend(found)
            return gm.forward

        return torch.compile(case.fn, backend=backend, dynamic=False), own


def _poisoned(run: Layer, args: tuple[Tensor, ...]) -> Any:
    """A result, the second one, in memory that held no numbers: what is not written shows."""
    import torch
    from torch.utils._pytree import tree_leaves

    found = [t for t in tree_leaves(run(*args)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    shapes = [(t.shape, t.dtype, t.device) for t in found]
    del found
    blocks = [torch.full(shape, math.nan, dtype=dtype, device=device) for shape, dtype, device in shapes]
    del blocks  # torch's allocator hands the memory out again
    return run(*args)


def apart(rehearse: bool, target: str = "") -> Tasks:
    """In a process of its own."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: for rivals that are written in it
    return Tasks(rehearse, target)


def compared(case: Case, args: Sequence[Tensor], out: Tensor) -> tuple[Error, Tolerance, Error]:
    """The error of a result against the case in float64, relative to its RMS, how much may be (as in `oracle.check`),
    and torch's own.

    Up to `PARTS` parts of the axes along which everything is computed alone; all of the result must be finite.
    """
    from memcomp.dtypes import DTYPES
    from memcomp.oracle import Error, tolerance

    seen, ours, theirs = 0, _Sums(), _Sums()
    for given, there in parts(case, args, out):
        exact = (case.exact or case.fn)(*(t.double() if t.is_floating_point() else t for t in given))
        if exact.shape != there.shape:
            raise Refusal(f"{case.name} gives {tuple(there.shape)} where float64 gives {tuple(exact.shape)}")
        ours.add(there, exact)
        theirs.add(case.fn(*given), exact)
        seen += exact.numel()
    dtype = next(n for n, d in DTYPES.items() if d == out.dtype)
    eager = theirs.error()
    bound = tolerance([dtype], dtype, elements=seen, length=None, torch_error=eager)
    return ours.error() if bool(out.isfinite().all()) else Error(math.inf, math.inf), bound, eager


class _Sums:
    """Of squares, over parts."""

    def __init__(self) -> None:
        self.count, self.wrong, self.size, self.most = 0, 0.0, 0.0, 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        difference = (found.double() - exact).abs()
        self.count += exact.numel()
        self.wrong += float(difference.square().sum())
        self.size += float(exact.square().sum())
        most = float(difference.max())
        self.most = most if not most <= self.most else self.most  # a NaN stays

    def error(self) -> Error:
        from memcomp.oracle import Error

        scale = math.sqrt(self.size / self.count)
        found = Error(math.sqrt(self.wrong / self.count) / scale, self.most / scale)
        return found if math.isfinite(found.rms + found.max) else Error(math.inf, math.inf)


def parts(case: Case, args: Sequence[Tensor], out: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Arguments and result of single points of the axes `case.alone`, evenly spread, the first and the last of all."""
    tensors = (*args, out)
    counts = [max(t.shape[d] for t, d in zip(tensors, axis, strict=True) if d >= 0) for axis in case.alone]
    total = math.prod(counts)
    some = min(PARTS, total)
    for k in sorted({round(i * (total - 1) / max(some - 1, 1)) for i in range(some)}):
        cut = list(tensors)
        for axis, count in zip(case.alone, counts, strict=True):
            k, at = divmod(k, count)
            cut = [t.narrow(d, at * t.shape[d] // count, 1) if d >= 0 else t for t, d in zip(cut, axis, strict=True)]
        yield tuple(cut[:-1]), cut[-1]


def _judged(report: Report) -> Answer:
    return Answer(OK if report.ok else WRONG, "" if report.ok else str(report.worst),
                  {"max": report.max_error, "bound": report.tolerance})


def _call(run: Layer, args: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: run(*args)


def _told(one: Installed) -> dict[str, Any]:
    """A region's kernel: what the cache calls its program, and what was chosen."""
    made = one.compiled
    return {"digest": made.digest, "launches": made.kernel.launches, "problem": dict(made.problem),
            "choice": {"form": made.choice.form, "knobs": dict(made.choice.knobs), "setting": made.choice.setting}}
