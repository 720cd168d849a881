"""Kernel text -> machine code in this process, and the callable that launches it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from memcomp.codegen.tvm.emit import Layout, emit
from memcomp.codegen.tvm.isa import Isa, named_isa
from memcomp.codegen.tvm.words import WORDS
from memcomp.ir.errors import Refusal
from memcomp.ir.tile import Kernel

_compiling = threading.Lock()


def build(kernel: Kernel) -> Callable[..., None]:
    """A callable(*tensors, *sizes) in the order of the program's params and sizes; writes outputs in place.

    Takes torch tensors (anything with DLPack) of any strides, aligned to their elements.  Kernel text is written for
    tensors whose last stride is 1; for others a form of its own is emitted and compiled at the first call.
    Raises TypeError or ValueError for a wrong dtype or shape, Refusal where the text does not compile.
    """
    return Launch(kernel)


class Launch:
    """One kernel and its forms per memory layout."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.usual: Layout = tuple(len(p.shape) - 1 for p in kernel.program.params)
        self.forms: dict[Layout, Callable[..., Any]] = {self.usual: compiled(kernel)}
        self.entry = self.forms[self.usual]
        self.varied = False   # other layouts have been seen: look before calling

    def __call__(self, *args: Any) -> None:
        if not self.varied:
            try:
                self.entry(*args)
                return
            except ValueError as error:
                if "strides" not in str(error):
                    raise
            self.varied = True
        program = self.kernel.program
        if len(args) != len(program.params) + len(program.sizes):
            raise TypeError(f"{program.name} takes {len(program.params)} tensors and {len(program.sizes)} sizes, "
                            f"got {len(args)} arguments")
        tensors = [_plain(t) for t in args[:len(self.usual)]]
        layout = tuple(_unit(t) for t in tensors)
        known = self.forms.get(layout)
        if known is None:
            known = compiled(emit(self.kernel.program, named_isa(self.kernel.isa), layout))
            self.forms[layout] = known
        known(*tensors, *args[len(self.usual):])


def _plain(t: Any) -> Any:
    """The same elements; strides that do not matter are those of a fresh tensor."""
    if t.numel() == 0:
        return t.new_empty(t.shape)
    if any(n == 1 and s != 1 for n, s in zip(t.shape, t.stride(), strict=True)):
        return t.as_strided(t.shape, [1 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])
    return t


def _unit(t: Any) -> int:
    """The position with stride 1, the last if there are several, -1 if there is none."""
    strides = t.stride()
    if strides and strides[-1] == 1:
        return len(strides) - 1
    return next((k for k in range(len(strides) - 1, -1, -1) if strides[k] == 1 and t.shape[k] > 1), -1)


def compiled(kernel: Kernel) -> Callable[..., Any]:
    """Compile the text and load it; parallel loops run on torch's threads where it has loaded its OpenMP."""
    from memcomp.codegen import threads
    from memcomp.codegen.tvm import launcher

    if any(m.tiles for m in named_isa(kernel.isa).instructions):
        threads.allow_tiles()
    loaded = machine_code(kernel)
    launcher.install(loaded)
    return loaded[kernel.entry]  # type: ignore[no-any-return]


def machine_code(kernel: Kernel) -> Any:
    """The compiled module, which need not be able to run on this machine; `inspect_source("asm")` is its text."""
    return _module({kernel.entry: kernel}, last=False)


def linked(kernels: Mapping[str, Kernel]) -> Any:
    """Kernels for one machine as one compiled module, each under its name, to be called as TVM's own programs call:
    the tensors that are read, the sizes, then the tensors that are written.  It has no other names, and no launcher:
    several may be parts of one library."""
    return _module(kernels, last=True)


def _module(kernels: Mapping[str, Kernel], last: bool) -> Any:
    """last: sizes stand before the tensors that are written, and these last."""
    import tvm
    from tvm import tirx

    from memcomp.codegen.tvm import instructions, launcher
    from memcomp.codegen.tvm.script import read

    (form,) = {k.isa: named_isa(k.isa) for k in kernels.values()}.values()
    functions: dict[str, Any] = {}
    kernel = next(iter(kernels.values()))
    try:
        with machine(form):
            for name, kernel in kernels.items():
                function = read(kernel.source, vocabulary())[kernel.entry]
                if last:
                    function = _written_last(function, kernel).with_attr("global_symbol", name)
                functions[name] = function
        own, (name, function) = instructions.text(form.instructions), next(iter(functions.items()))
        own += launcher.UNTOLD if last else ""
        if own:
            functions[name] = function.with_body(
                tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", own, function.body))
        module = tvm.IRModule(functions) if last else launcher.with_launcher(functions)
        with _compiling:
            tirx.compilation_pipeline.register_tir_pipeline("memcomp", _pipeline)
            return tirx.build(module, target=machine(form), pipeline="memcomp")
    except (SyntaxError, RecursionError) as error:  # the text is legal: only Python's own limits are met
        raise Refusal(f"{kernel.name} is nested too deeply for TVM's script", str(error)) from error
    except RuntimeError as error:  # every error of TVM's own derives from it
        lines = [line for line in str(error).splitlines() if line.strip(" |^\n")]
        raise Refusal(f"TVM does not compile {', '.join(k.name for k in kernels.values())}",
                      lines[-1].strip() if lines else "") from error


def _written_last(function: Any, kernel: Kernel) -> Any:
    from tvm import tirx

    params = kernel.program.params
    first = sum(p.role in ("in", "state") for p in params)
    order = [*function.params[:first], *function.params[len(params):], *function.params[first:len(params)]]
    return tirx.PrimFunc(order, function.body, function.ret_type, function.attrs)


def machine(isa: Isa) -> Any:
    import tvm

    options: dict[str, Any] = {"kind": "llvm"}
    if isa.cpu:
        options["mcpu"] = isa.cpu
    if isa.attributes:
        options["mattr"] = list(isa.attributes)
    return tvm.target.Target(options)


def vocabulary() -> dict[str, Any]:
    from memcomp.codegen.tvm import bf16, maths
    from memcomp.codegen.tvm import vocabulary as words

    known = {**{n: getattr(m, n) for m in (words, bf16) for n in WORDS if hasattr(m, n)}, **maths.FUNCTIONS,
             "inf": float("inf"), "nan": float("nan")}
    missing = WORDS - set(known) - {"T", "I"}
    assert not missing, missing
    return known


def _pipeline() -> Any:
    """Only what code generation needs: TVM's simplifier reorders float arithmetic (x + c - c becomes x)."""
    from tvm import tirx
    from tvm.ir.transform import Sequential

    passes = Sequential([
        tirx.transform.FlattenBuffer(), tirx.transform.UnrollLoop(), tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(), tirx.transform.SplitHostDevice(), tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ])
    return passes, tirx.compilation_pipeline.finalize_host_passes, tirx.compilation_pipeline.finalize_device_passes
