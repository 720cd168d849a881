"""What a directory says of itself: `manifest.json`, its only form, and when it is believed.

The text has one form for each content (`schema.canonical`) and holds the SHA-256 of itself, with that field empty, so
that no byte can be another unseen.  That is against damage; against who may write the directory a digest known from
elsewhere helps (`memcomp.load(place, digest=...)`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from memcomp.artifact import schema
from memcomp.artifact.plan import Plan, check
from memcomp.ir.errors import InputError
from memcomp.ir.expr import Call, Const, Expr, Size, walk
from memcomp.ir.lex import read_line
from memcomp.ir.parse import parse_expr
from memcomp.ir.target import BYTES

FORMAT, VERSION, NAME = "memcomp artifact", 2, "manifest.json"
LONGEST = 1 << 26  # bytes of a manifest
LONG = 400         # characters of an extent
DIVIDING = ("floordiv", "mod", "ceildiv")
OPERATORS = ("add", "sub", "mul", "max", "min", "neg")
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*\Z")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True, slots=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What code needs.  device: "cpu" or "cuda"; of a CPU: arch and system as `platform` names them, in lower case ("":
    any, where there is no code), and its features in the words of `ir.detect`; of a GPU: the compute capability, 90 for
    9.0, else 0."""

    name: str
    device: str
    arch: str = ""
    system: str = ""
    features: tuple[str, ...] = ()
    capability: int = 0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """shape: texts of expressions over sizes; alignment: of the first element, in bytes, that is needed."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    alignment: int


@dataclass(frozen=True, slots=True)
class Range:
    """A size and its least and greatest value; None: any."""

    name: str
    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """The input at a position names places of a dimension of `size` elements: 0 .. size - 1, from -size where it wraps,
    or `ignored`."""

    input: int
    size: str
    wraps: bool
    ignored: int | None


@dataclass(frozen=True, slots=True)
class Code:
    """A kernel for the machine at position `target`.  It takes inputs, outputs, work, then sizes, which are texts of
    expressions over the sizes of the kernel; `entry`: of the file."""

    target: int
    file: str
    entry: str
    work: tuple[TensorSpec, ...]
    sizes: tuple[str, ...]
    launches: int


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """lookups: what is checked of index tensors before a call."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[Range, ...]
    lookups: tuple[Lookup, ...]
    code: tuple[Code, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """producer: versions of what made it; files: by path, all that are there but the manifest; plan: of a whole model,
    None where kernels are called one by one."""

    format: str
    version: int
    name: str
    producer: dict[str, str]
    files: dict[str, File]
    targets: tuple[Machine, ...]
    kernels: tuple[KernelSpec, ...]
    plan: Plan | None = None
    digest: str = ""

    def text(self) -> str:
        """The canonical text, with its digest."""
        return _signed(schema.canonical(replace(self, digest="")))[1]

    def own_digest(self) -> str:
        return _signed(schema.canonical(replace(self, digest="")))[0]


def _signed(text: str) -> tuple[str, str]:
    """The digest of a text that has none, and the text with it.  Only a name of the outermost mapping stands after one
    space at the beginning of a line."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return digest, text.replace('\n "digest": ""', f'\n "digest": "{digest}"', 1)


def read(data: bytes, where: str) -> Manifest:
    """A manifest's text, believed: of this version, undamaged, and sensible.  InputError in one sentence where not."""
    given = schema.parsed(data, where)
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise InputError(f"{where} is no manifest of an artifact of memcomp")
    version = given.get("version")
    if version != VERSION or type(version) is not int:
        age = "a newer" if isinstance(version, int) and version > VERSION else "an older"
        raise InputError(f"{where} is of {age} format, {version}; this memcomp reads {VERSION}", hint=
                         "load it with a newer memcomp" if age == "a newer" else "compile it again with this memcomp")
    made = schema.read(Manifest, given, where)
    if _signed(schema.text(given | {"digest": ""}))[1].encode() != data:
        raise InputError(f"{where} is damaged: it is not what its digest says")
    _sensible(made, where)
    if made.plan is not None:
        check(made.plan, [k.name for k in made.kernels])
    return made


def _sensible(m: Manifest, where: str) -> None:
    """What types do not say.  A manifest that we wrote passes; one that somebody else wrote is no way to other files,
    other memory or other code."""
    for path, f in m.files.items():
        if not _PATH.match(path) or path == NAME:
            raise InputError(f"{where} lists {path!r}, which is no path inside of the artifact")
        if not re.fullmatch("[0-9a-f]{64}", f.sha256) or f.bytes < 0:
            raise InputError(f"{where} has no digest of {path}")
    if len({k.name for k in m.kernels}) < len(m.kernels):
        raise InputError(f"{where} has two kernels of one name")
    for machine in m.targets:
        if machine.device not in ("cpu", "cuda"):
            raise InputError(f"{where} is for a device {machine.device!r}; known: cpu, cuda")
    for k in m.kernels:
        names = {r.name for r in k.sizes}
        if not all(_WORD.match(n) for n in names):
            raise InputError(f"{where}: {k.name} has a size whose name is none")
        tensors = (*k.inputs, *k.outputs, *(w for c in k.code for w in c.work))
        for t in tensors:
            if t.dtype not in BYTES:
                raise InputError(f"{where}: {k.name} has a tensor of the unknown dtype {t.dtype!r}")
        texts = [*(x for t in tensors for x in t.shape), *(x for c in k.code for x in c.sizes),
                 *(x.size for x in k.lookups)]
        for e in map(expression, texts):
            if any(isinstance(x, Size) and x.rank not in names for x in walk(e)):
                raise InputError(f"{where}: {k.name} has an extent over sizes that it does not have")
        if any(not 0 <= x.input < len(k.inputs) for x in k.lookups):
            raise InputError(f"{where}: {k.name} looks at an input that it does not have")
        for c in k.code:
            if c.file not in m.files or not 0 <= c.target < len(m.targets):
                raise InputError(f"{where}: {k.name} has code that is not there")


@lru_cache(maxsize=4096)
def expression(text: str) -> Expr:
    """An extent over sizes: whole numbers, sizes, sums and the like; nothing that reads data or may divide by 0.
    InputError."""
    if len(text) > LONG:
        raise InputError(f"an extent has at most {LONG} characters")
    line = read_line(1, text)
    found = parse_expr(line)
    if line.next.kind != "end" or not all(map(_extent, walk(found))):
        raise InputError(f"{text!r} is no extent over sizes")
    return found


def _extent(x: Expr) -> bool:
    if isinstance(x, Const):
        return type(x.value) is int
    if isinstance(x, Call) and x.op in DIVIDING:
        return isinstance(x.args[1], Const) and x.args[1].value > 0
    return isinstance(x, Size) or isinstance(x, Call) and x.op in OPERATORS


def expressions(texts: Iterable[str]) -> tuple[Expr, ...]:
    return tuple(map(expression, texts))
