"""Compiled kernels -> a directory that runs where no compiler is."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import memcomp
from memcomp.artifact.folder import entries
from memcomp.artifact.manifest import (
    FORMAT,
    NAME,
    VERSION,
    Code,
    File,
    KernelSpec,
    Lookup,
    Machine,
    Manifest,
    Range,
    TensorSpec,
)
from memcomp.artifact.plan import Plan
from memcomp.artifact.schema import parsed
from memcomp.backends import codegen
from memcomp.files import check_place
from memcomp.ir.errors import InputError, Refusal
from memcomp.ir.expr import Call, Const, Expr, Size, substitute, walk
from memcomp.ir.program import Program
from memcomp.ir.show import show, show_expr
from memcomp.ir.target import BYTES
from memcomp.ir.tile import Kernel, TileProgram
from memcomp.pipeline import Compiled
from memcomp.sizes import extent, fixed, input_shapes, sources

_PACKAGES = ("torch", "apache-tvm", "apache-tvm-ffi", "triton", "cuda-core")


class Pack:
    """What is to be a directory: kernels and files are added one by one and written together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._files: dict[str, bytes | Path] = {}
        self._targets: dict[str, Machine] = {}
        self._kernels: dict[KernelSpec, str] = {}  # without its name -> its name
        self._code: dict[tuple[str, str], str] = {}  # target, digest of a text -> file

    def kernel(self, read: Program, compiled: Mapping[str, Compiled], name: str = "", lookups: Sequence[Lookup] = (),
               ranges: Mapping[str, tuple[int, int | None]] | None = None) -> str:
        """Add a kernel; the name it has got.  One that is there already is not added again.

        read: as it was captured: its tensors and their shapes are what callers see; compiled: by name of the target;
        lookups: of index tensors; ranges: least and most of its sizes.  Raises Refusal where the program carries a
        state, where an extent is in no shape, and where the backend writes no machine code.
        """
        if any(t.role == "state" for t in read.cascade.tensors):
            raise Refusal(f"{read.name} carries a state", hint="a kernel of an artifact is a function of its inputs")
        ins, outs = read.cascade.inputs(), read.cascade.outputs()
        shapes = input_shapes(read.cascade)
        inputs = tuple(_spec(t.name, t.dtype, shape) for t, shape in zip(ins, shapes, strict=True))
        outputs = tuple(_spec(t.name, t.dtype, [extent(read.cascade, r) for r in t.ranks]) for t in outs)
        own = {r.name: r for r in read.cascade.ranks if r.extent is None}
        limits = {n: (0, r.bound) for n, r in own.items()} | dict(ranges or {})
        label = name or read.name or "kernel"
        code = tuple(self._compiled(label, target, c, read, shapes) for target, c in compiled.items())
        text = f"programs/{hashlib.sha256(show(read).encode()).hexdigest()[:16]}.mc"
        spec = KernelSpec("", inputs, outputs, tuple(Range(n, *limits[n]) for n in own), tuple(lookups), code, text)
        if spec in self._kernels:
            return self._kernels[spec]
        self._files[text] = show(read).encode()
        taken, made, k = set(self._kernels.values()), label, 2
        while made in taken:
            made, k = f"{label}_{k}", k + 1
        self._kernels[spec] = made
        return made

    def target(self, name: str) -> None:
        """A target of a model that has no kernel, and so runs on any CPU; code of a kernel says more."""
        self._targets.setdefault(name, Machine(name, "cpu"))

    def file(self, path: str, data: bytes | Path) -> None:
        """Add a file by its path in the directory: its bytes, or where they are."""
        self._files[path] = data

    def write(self, place: str | Path, plan: Plan | None = None) -> str:
        """Write the directory, whole or not at all; the digest of its manifest.  An artifact that is there is replaced;
        InputError where anything else is."""
        for spec, name in self._kernels.items():
            if len(spec.code) < len(self._targets):
                raise InputError(f"{name} has no code for every target: {', '.join(self._targets)}")
        check_directory(Path(place))
        root = Path(os.path.abspath(place))  # with a name, whatever dots it was given by
        part = root.with_name(f".{root.name}.{secrets.token_hex(4)}")
        old = part.with_name(part.name + ".old")
        try:
            files = {path: self._put(part / path, data) for path, data in sorted(self._files.items())}
            kernels = tuple(replace(spec, name=name) for spec, name in self._kernels.items())
            manifest = Manifest(FORMAT, VERSION, self.name, _producer(), files, tuple(self._targets.values()), kernels,
                                plan)
            (part / NAME).write_text(manifest.text(), encoding="ascii")
            if root.exists():
                root.rename(old)
            part.rename(root)
        except OSError as error:
            raise InputError(f"cannot write {root}", error.strerror or str(error)) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if old.exists() and not root.exists():  # interrupted in between
                old.rename(root)
            shutil.rmtree(old, ignore_errors=True)
        return manifest.own_digest()

    @staticmethod
    def _put(place: Path, data: bytes | Path) -> File:
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Path):
            shutil.copyfile(data, place)
        else:
            place.write_bytes(data)
        with place.open("rb") as written:
            return File(place.stat().st_size, hashlib.file_digest(written, "sha256").hexdigest())

    def _compiled(self, label: str, target: str, compiled: Compiled, read: Program, shapes: Sequence[Sequence[Expr]]
                  ) -> Code:
        tiles, kernel = compiled.tiles, compiled.kernel
        machine = machine_of(target, kernel)
        before = self._targets.setdefault(target, machine)
        if before != machine:
            self._targets[target] = replace(before, features=tuple(sorted({*before.features, *machine.features})))
        key = target, hashlib.sha256(kernel.source.encode()).hexdigest()
        if key not in self._code:
            stem = re.sub(r"[^A-Za-z0-9_]", "_", label)
            ending, data = _machine_code(kernel)
            self._code[key] = f"kernels/{stem}-{key[1][:12]}.{re.sub('[^A-Za-z0-9_]', '_', target)}{ending}"
            self._files[self._code[key]] = data
        table = _sizes(tiles, read, shapes)
        work = tuple(_spec(p.name, p.dtype, [substitute(x, table) for x in p.shape])
                     for p in tiles.params if p.role == "work")
        return Code(list(self._targets).index(target), self._code[key], kernel.entry, work,
                    tuple(show_expr(table[Size(s)]) for s in tiles.sizes), kernel.launches)


def check_directory(root: Path) -> None:
    """Before any work: can an artifact be written there?  InputError where not, and where a directory would be replaced
    that holds anything but an artifact: many programs have a manifest.json."""
    check_place(root / NAME if root.is_dir() else root)
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return
    hint = "name a directory that is not there, or is empty"
    try:
        given = parsed((root / NAME).read_bytes(), str(root / NAME))
        listed = {NAME, *given["files"]} if given["format"] == FORMAT else set()
    except (OSError, InputError, KeyError, TypeError):
        listed = set()
    if not listed:
        raise InputError(f"{root} is there and is no artifact", hint=hint)
    if other := sorted(path for path, _ in entries(root) if path not in listed):
        raise InputError(f"{root} has a file that is not the artifact's: {other[0]}", hint=hint)


def machine_of(target: str, kernel: Kernel) -> Machine:
    """What machine code of a kernel needs.  Refusal where its backend writes none."""
    backend = codegen(kernel.backend)
    if backend.DEVICE == "cuda":
        from memcomp.ir.target import target as named

        return Machine(target, "cuda", capability=named(kernel.isa).capability)
    if kernel.backend != "tvm":
        raise Refusal(f"the backend {kernel.backend} writes no machine code", hint="use tvm, triton, gluon or cuda")
    from memcomp.codegen.tvm.library import machine

    arch, system, features = machine(kernel)
    return Machine(target, "cpu", arch, system, features)


def _machine_code(kernel: Kernel) -> tuple[str, bytes]:
    if codegen(kernel.backend).DEVICE == "cuda":
        from memcomp.artifact.files import ENDING, saved, to_bytes

        return ENDING, to_bytes(saved(kernel))
    from memcomp.codegen.tvm.library import library

    return ".so", library(kernel)


def _sizes(tiles: TileProgram, read: Program, shapes: Sequence[Sequence[Expr]]) -> dict[Expr, Expr]:
    """The sizes of a kernel in those of the program that was read: where its inputs have them, else by name."""
    params = [p for p in tiles.params if p.role == "in"]
    if len(params) != len(shapes):
        raise Refusal(f"{read.name} takes {len(shapes)} tensors, its kernel {len(params)}")
    roles = [p.role for p in tiles.params]
    assert roles == sorted(roles, key=("in", "out", "work").index), roles
    found: dict[Expr, Expr] = {}
    for name, (i, d, divisor) in sources([p.shape for p in params]).items():
        x = shapes[i][d]
        found[Size(name)] = (Const(int(x.value) // divisor) if isinstance(x, Const) else x if divisor == 1 else
                             Call("floordiv", (x, Const(divisor))))
    for name in tiles.sizes:
        known = fixed(read)
        if Size(name) not in found:
            found[Size(name)] = Const(known[name]) if name in known else Size(name)
    there = {r.name for r in read.cascade.ranks}
    for e in found.values():
        for x in walk(e):
            if isinstance(x, Size) and x.rank not in there:
                raise Refusal(f"the extent of rank {x.rank} is in no input's shape", hint="pass a tensor that has it")
    return found


def _spec(name: str, dtype: str, shape: Sequence[Expr]) -> TensorSpec:
    return TensorSpec(name, dtype, tuple(map(show_expr, shape)), BYTES[dtype])


def _producer() -> dict[str, str]:
    """Versions of what made it, as far as they are installed."""
    found = {"memcomp": memcomp.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
