"""A kernel's machine code in a file, with all that a launch needs, so that neither its text nor a compiler is needed.

The file: MAGIC, the version and the header's length (little-endian, 4 and 8 bytes), the header (JSON: names, shapes,
launches, and of each cubin its place and SHA-256), the cubins one behind another, SHA-256 of all before.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from memcomp.artifact.launch import Launched
from memcomp.codegen.launches import Argument, Form, Launch, Layout, distinct, factor, fitting
from memcomp.files import put
from memcomp.ir.errors import InputError, Refusal
from memcomp.ir.expr import Expr
from memcomp.ir.lex import read_line
from memcomp.ir.parse import parse_expr
from memcomp.ir.show import show_expr
from memcomp.ir.target import target
from memcomp.ir.tile import Kernel, Param
from memcomp.sizes import evaluate, sources

MAGIC, VERSION = b"memcomp\0", 2
ENDING = ".mcc"
_HEAD = struct.Struct("<8sIQ")


@dataclass(frozen=True, slots=True)
class Saved:
    """One kernel for one compute capability; its forms, the one that takes most for granted first.  left: why others
    are not there."""

    name: str
    target: str
    capability: int
    backend: str
    params: tuple[Param, ...]
    sizes: tuple[str, ...]
    forms: tuple[Form, ...]
    left: tuple[str, ...] = ()

    def form(self, layout: Layout) -> Form:
        """The first form that takes nothing for granted that the layout does not allow; Refusal where none is."""
        for f in self.forms:
            if f.layout.units == layout.units and f.layout.loose >= layout.loose and f.layout.wide >= layout.wide:
                return f
        raise Refusal(f"{self.name} was not saved for tensors laid out like these",
                      "; ".join((f"stride 1 at the positions {layout.units}, saved for {self.forms[0].layout.units}",
                                 *self.left)), "make them contiguous, and let them begin at multiples of 16 bytes")


def saved(kernel: Kernel, compiled: Callable[[Kernel, Layout], Form] | None = None) -> Saved:
    """A kernel compiled for tensors whose last stride is 1: for those that are aligned as usual; for those whose
    strides are what extents make of them, row by row; and for any of fewer than 2**31 elements from one position to the
    next.  The last two are left out where the backend takes no such tensors: a launch with one is an error.

    compiled: its backend's by default.  Raises Refusal where the kernel is for no GPU, and where it does not compile.
    """
    if compiled is None:
        backend = import_module(f"memcomp.codegen.{kernel.backend}")
        if backend.DEVICE != "cuda":
            raise Refusal(f"{kernel.name} is no kernel for a GPU", f"target {kernel.isa}, backend {kernel.backend}",
                          "name a target with one, e.g. h100 (`memcomp targets`)")
        compiled = backend.compiled
    params = kernel.program.params
    units = tuple(len(p.shape) - 1 for p in params)
    machine = target(kernel.isa)
    forms, left = [fitting(compiled(kernel, Layout(units)), machine)], []
    args = [a for x in forms[0].launches for a in x.args if a.multiple > 1]
    shapes = {p.name: p.shape for p in params}
    for loose in (frozenset(a.name for a in args if a.kind == "stride"
                            and factor(shapes[a.of][a.at + 1:]) % a.multiple), frozenset(a.name for a in args)):
        if loose and loose != forms[-1].layout.loose:
            try:
                forms.append(fitting(compiled(kernel, Layout(units, loose)), machine))
            except Refusal as error:
                left.append(error.what)
    return Saved(kernel.name, kernel.isa, target(kernel.isa).capability, kernel.backend, params, kernel.program.sizes,
                 tuple(forms), tuple(dict.fromkeys(left)))


def save(made: Saved, place: str | Path) -> None:
    """Write the file, whole or not at all; equal kernels give equal files.  InputError where it cannot be written."""
    put(Path(place), to_bytes(made))


def load(place: str | Path) -> Loaded:
    """Read a file.  InputError where it is none of ours, damaged, or of another version."""
    try:
        return Loaded(from_bytes(Path(place).read_bytes(), str(place)))
    except OSError as error:
        raise InputError(f"cannot read {place}", error.strerror or str(error)) from error


class Loaded:
    """A saved kernel as a function of its inputs."""

    def __init__(self, made: Saved) -> None:
        self.saved = made
        usual = distinct(a for x in made.forms[0].launches for a in x.args)
        self.launched = Launched(made.name, made.target, made.capability, made.params, made.sizes, lambda _: usual,
                                 made.form)

    def __call__(self, *inputs: Any, **sizes: int) -> tuple[Any, ...]:
        """The outputs, row-major on the inputs' device.  sizes: extents that no input's shape shows.

        Raises TypeError for a wrong number of inputs or a missing size, Refusal as `Launched`.
        """
        import torch

        from memcomp.dtypes import DTYPES

        ins = [p for p in self.saved.params if p.role in ("in", "state")]
        if len(inputs) != len(ins):
            raise TypeError(f"{self.saved.name} takes {len(ins)} tensors, got {len(inputs)}")
        for p, t in zip(ins, inputs, strict=True):
            if len(getattr(t, "shape", ())) != len(p.shape):
                raise Refusal(f"{self.saved.name} takes {p.name} as a tensor of rank {len(p.shape)}, not "
                              f"{f'one of rank {len(t.shape)}' if hasattr(t, 'shape') else type(t).__name__}")
        found = {r: inputs[i].shape[d] // divisor for r, (i, d, divisor) in sources([p.shape for p in ins]).items()}
        found |= sizes
        if missing := [r for r in self.saved.sizes if r not in found]:
            raise TypeError(f"{self.saved.name} needs the extent {missing[0]}, which is in no input's shape")
        for p, t in zip(ins, inputs, strict=True):
            want = tuple(evaluate(x, found) for x in p.shape)
            if tuple(t.shape) != want:
                raise Refusal(f"{self.saved.name} takes {p.name} of shape {want}, not {tuple(t.shape)}")
        given = dict(zip((p.name for p in ins), inputs, strict=True))
        tensors = [given[p.name] if p.name in given else given[p.over] if p.over else
                   torch.empty([evaluate(x, found) for x in p.shape], dtype=DTYPES[p.dtype], device=inputs[0].device)
                   for p in self.saved.params]
        self.launched(*tensors, *(found[r] for r in self.saved.sizes))
        return tuple(t for p, t in zip(self.saved.params, tensors, strict=True) if p.role == "out")


def to_bytes(made: Saved) -> bytes:
    """The file's bytes."""
    places: dict[bytes, dict[str, Any]] = {}
    end = 0
    for cubin in (c for f in made.forms for c in f.cubins):
        if cubin not in places:
            places[cubin] = {"at": end, "bytes": len(cubin), "sha256": hashlib.sha256(cubin).hexdigest()}
            end += len(cubin)
    header = {
        "name": made.name, "target": made.target, "capability": made.capability, "backend": made.backend,
        "params": [{**asdict(p), "shape": [show_expr(x) for x in p.shape]} for p in made.params],
        "sizes": made.sizes, "left": made.left,
        "forms": [{"units": f.layout.units, "loose": sorted(f.layout.loose), "wide": sorted(f.layout.wide),
                   "compiler": f.compiler,
                   "launches": [{**asdict(x), "grid": [show_expr(e) for e in x.grid], "cubin": places[c]}
                                for x, c in zip(f.launches, f.cubins, strict=True)]} for f in made.forms]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    body = _HEAD.pack(MAGIC, VERSION, len(text)) + text + b"".join(places)
    return body + hashlib.sha256(body).digest()


def from_bytes(data: bytes, where: str = "") -> Saved:
    """What `to_bytes` wrote.  InputError where it is none of ours, damaged, or of another version."""
    if len(data) < _HEAD.size + 32 or data[:8] != MAGIC:
        raise InputError("this is no saved kernel", where)
    _, version, size = _HEAD.unpack_from(data)
    if version != VERSION:
        raise InputError(f"a saved kernel of version {version}; this memcomp reads {VERSION}", where,
                         "save it again with this memcomp")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError("a saved kernel is damaged: its digest is another", where)
    head = json.loads(data[_HEAD.size:_HEAD.size + size])
    code = data[_HEAD.size + size:-32]
    return Saved(head["name"], head["target"], head["capability"], head["backend"],
                 tuple(Param(**{**p, "shape": _exprs(p["shape"])}) for p in head["params"]), tuple(head["sizes"]),
                 tuple(_form(f, code) for f in head["forms"]), tuple(head["left"]))


def _form(f: Mapping[str, Any], code: bytes) -> Form:
    launches, cubins = [], []
    for x in f["launches"]:
        place = x["cubin"]
        cubins.append(code[place["at"]:place["at"] + place["bytes"]])
        launches.append(Launch(**{**{k: v for k, v in x.items() if k != "cubin"}, "grid": _exprs(x["grid"]),
                                  "args": tuple(Argument(**{**a, "places": tuple(a["places"]), "box": tuple(a["box"])})
                                                for a in x["args"])}))
    return Form(Layout(tuple(f["units"]), frozenset(f["loose"]), frozenset(f["wide"])), f["compiler"],
                tuple(launches), tuple(cubins))


def _exprs(texts: Sequence[str]) -> tuple[Expr, ...]:
    return tuple(parse_expr(read_line(1, t)) for t in texts)
