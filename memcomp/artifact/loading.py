"""`memcomp.load`: a directory -> callables.  Imports tvm_ffi for a CPU, cuda.core for a GPU; no compiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from memcomp.artifact.folder import Folder, verified
from memcomp.artifact.foreign import operators
from memcomp.artifact.kernel import Kernel
from memcomp.artifact.machines import chosen
from memcomp.artifact.manifest import Code, KernelSpec, Machine, Manifest, TensorSpec
from memcomp.codegen import threads
from memcomp.ir.errors import InputError, OptionError, Refusal, nearest


@dataclass(frozen=True, slots=True)
class Report:
    """What loading did.  target: what was taken; others: the other targets, each with why it was not; threads: whose
    threads kernels run on; seconds: from the first file to the last."""

    digest: str
    target: Machine
    others: tuple[str, ...]
    threads: str
    files: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        rows = [f"target   {self.target.name}", *(f"not      {x}" for x in self.others), f"threads  {self.threads}",
                f"files    {self.files}, {self.bytes:,} bytes, verified", f"digest   sha256:{self.digest}",
                f"loaded   in {self.seconds * 1e3:.0f} ms"]
        return "\n".join(rows)


class Artifact:
    """What `memcomp compile` wrote, ready to be called: the model, or its only kernel, as artifact(...), kernels as
    artifact["name"]."""

    def __init__(self, folder: Folder, kernels: Mapping[str, Kernel], report: Report,
                 model: Callable[..., tuple[Any, ...]] | None) -> None:
        self.folder, self.name, self.kernels, self.report = folder, folder.manifest.name, dict(kernels), report
        self.plan, self._model = folder.manifest.plan, model
        if model is None and len(self.kernels) == 1:
            self._model = next(iter(self.kernels.values()))

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Of the model (`plan.Tensor`), or of the only kernel (`manifest.TensorSpec`)."""
        return self._of("inputs")

    @property
    def outputs(self) -> tuple[Any, ...]:
        return self._of("outputs")

    def _of(self, side: str) -> tuple[TensorSpec, ...] | tuple[Any, ...]:
        if self.plan is not None:
            return tuple(map(self.plan.tensor, getattr(self.plan, side)))
        return tuple(getattr(self._only(), side))

    @property
    def states(self) -> tuple[Any, ...]:
        """What a model keeps from call to call (`plan.Tensor`), each loaded one its own."""
        return tuple(t for t in self.plan.tensors if t.kind == "state") if self.plan is not None else ()

    def reset(self) -> None:
        """The model's state as it was when it was compiled."""
        if self.plan is not None:
            self._only().reset()

    def __getitem__(self, name: str) -> Kernel:
        """A kernel.  OptionError lists those that there are."""
        if name not in self.kernels:
            raise OptionError(f"{self.folder.path} has no kernel {name!r}", hint=nearest(name, self.kernels))
        return self.kernels[name]

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        """The outputs of the model, or of the only kernel."""
        made: tuple[Any, ...] = (self._model or self._only())(*inputs, **named)
        return made

    def _only(self) -> Any:
        if self._model is None:
            raise Refusal(f"{self.folder.path} has {len(self.kernels)} kernels and no model",
                          hint=f'call one by its name: {", ".join(self.kernels)}')
        return self._model


def load(place: str | Path, *, target: str | None = None, digest: str | None = None) -> Artifact:
    """A directory that `memcomp compile` wrote.  Nothing of it is used before all of it is verified.

    target: the name of one of its targets instead of the best for this machine; digest: what the manifest's must be.
    Raises InputError for what `folder.verified` refuses, OptionError for an unknown target, Refusal where no target is
    this machine and where what loads or runs it is not installed.
    """
    start = time.perf_counter()
    folder = verified(place, digest, _imports)
    m = folder.manifest
    at, others = chosen(m.targets, str(folder.path), target)
    machine = m.targets[at]
    if m.plan is not None:
        operators(m.plan.torch, str(folder.path))
    if "amx_tile" in machine.features:
        threads.allow_tiles()
    modules: dict[str, Callable[..., Any]] = {}
    walker: Callable[..., Any] | None = None
    kernels, pool = {}, "" if machine.device == "cpu" else "the GPU's"
    for spec in m.kernels:
        code = next((c for c in spec.code if c.target == at), None)
        if code is None:
            raise InputError(f"{folder.path} has no code of {spec.name} for {machine.name}")
        if code.file not in modules:
            if machine.device == "cpu":
                modules[code.file], walker, pool = _library(folder, code)
            else:
                modules[code.file] = _cubins(folder, spec, code)
        kernels[spec.name] = Kernel(spec, code, machine.device, modules[code.file])
    model = None
    if m.plan is not None:
        from memcomp.artifact.execute import bound

        model = bound(folder, kernels, m.plan, walker)
    report = Report(m.digest, machine, others, pool or "none: there is no kernel", len(m.files),
                    sum(f.bytes for f in m.files.values()), time.perf_counter() - start)
    return Artifact(folder, kernels, report, model)


def _imports(m: Manifest) -> None:
    """What loading will import anyway; what is missing is said there."""
    if any(t.device == "cpu" for t in m.targets):
        with suppress(ModuleNotFoundError):
            import_module("tvm_ffi")


def _library(folder: Folder, code: Code) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    """A kernel, what walks plans, and whose threads they run on."""
    try:
        import tvm_ffi
    except ModuleNotFoundError as error:
        raise Refusal(f"a kernel for a CPU is loaded with {error.name}, which is not installed",
                      hint="pip install memcomp[runtime]") from error
    try:
        module = tvm_ffi.load_module(str(folder.place(code.file).absolute()))
        pool = threads.install(module, load=True)
        return module[code.entry], module["memcomp_walk"], pool
    except (OSError, RuntimeError, AttributeError, ValueError, KeyError) as error:  # another C library, say
        raise InputError(f"{folder.place(code.file)} cannot be loaded: {str(error).splitlines()[0]}") from error


def _cubins(folder: Folder, spec: KernelSpec, code: Code) -> Callable[..., Any]:
    from memcomp.artifact.files import Loaded, from_bytes

    saved = from_bytes(folder.place(code.file).read_bytes(), str(folder.place(code.file)))
    if len(saved.params) != len(spec.inputs) + len(spec.outputs) + len(code.work):
        raise InputError(f"{code.file} is not the code of {spec.name}")
    return Loaded(saved).launched
