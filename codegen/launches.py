"""What a kernel for a GPU is launched with: grid, block, shared memory, arguments in order, and what its machine code
takes for granted of them.  The same for all who write kernels; nothing here knows a driver."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

from memcomp.codegen.elf import parameters
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var
from memcomp.ir.ops import OPS
from memcomp.ir.target import Target

BYTES = {"i32": 4, "i64": 8, "map": 128}  # of an argument; a pointer has 8
MOST = {"i32": 2**31 - 1, "i64": 2**63 - 1}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument.

    kind: "pointer" (to a tensor's first element), "stride" (in elements), "extent" (of a tensor, at a position), "size"
        (the extent of a rank), "map" (a tensor as sm_90 and later fetch boxes of it), "scratch" (to memory of the
        launch's own, `Launch.scratch` bytes a block), "null" (a pointer that nothing reads).
    of: the param or the rank; at: the position of a stride or an extent.
    type: "*bf16" and the like, "i32", "i64", "map".
    multiple: what the machine code takes for granted: a pointer (a map's too) in bytes, a stride in elements, is a
        multiple of it.
    places, box, swizzle: of a map: the positions of the param that it has, the last of stride 1; the elements of a box
        along each; the bytes within which a box is permuted in shared memory.
    """

    name: str
    kind: str
    of: str = ""
    at: int = 0
    type: str = "i32"
    multiple: int = 1
    places: tuple[int, ...] = ()
    box: tuple[int, ...] = ()
    swizzle: int = 0

    @property
    def bytes(self) -> int:
        return BYTES.get(self.type, 8)


@dataclass(frozen=True, slots=True)
class Launch:
    """grid: blocks in x, y and z, over sizes; block: threads; shared: bytes of dynamic shared memory a block; scratch:
    bytes of global memory for each block, at a multiple of `alignment`.

    together: blocks wait for one another, so all must be there at one time: a cooperative launch, of as many blocks as
    the device holds and the grid (of x alone) has, each of which takes tasks in turns.
    """

    function: str
    grid: tuple[Expr, ...]
    block: int
    shared: int
    args: tuple[Argument, ...]
    scratch: int = 0
    alignment: int = 1
    together: bool = False

    def blocks(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """The grid in numbers.  Refusal where CUDA has no such grid."""
        found = [value(e, sizes) for e in self.grid]
        x, y, z = *found, *(1,) * (3 - len(found))
        if x > 2**31 - 1 or max(y, z) > 65535:
            raise Refusal(f"{self.function} takes {x} x {y} x {z} blocks",
                          "a launch has at most 2147483647 x 65535 x 65535", "call it with smaller extents, in parts")
        return x, y, z


@dataclass(frozen=True, slots=True)
class Layout:
    """What a call's tensors allow the machine code to take for granted.

    units: by param the position of stride 1, which is no argument, -1 where there is none.
    loose: arguments that are no multiples of what they usually are; wide: those that need 64 bits.
    """

    units: tuple[int, ...]
    loose: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel's machine code for one layout: the launches in order, and by launch the cubin that has its function."""

    layout: Layout
    compiler: str
    launches: tuple[Launch, ...]
    cubins: tuple[bytes, ...] = field(repr=False)

    def __post_init__(self) -> None:
        for launch, cubin in zip(self.launches, self.cubins, strict=True):
            agree(launch, cubin)


def fitting(form: Form, machine: Target) -> Form:
    """The form; Refusal where a block takes more shared memory than the machine gives one."""
    there = machine.level("smem").bytes
    for x in form.launches:
        if x.shared > there:
            raise Refusal(f"{x.function} takes {x.shared:,} bytes of shared memory, and a block of {machine.name} has "
                          f"{there:,}", "the compiler took more than was foretold", "compile it with smaller tiles")
    return form


def agree(launch: Launch, cubin: bytes) -> None:
    """Refusal where the machine code takes other arguments or other blocks than the launch gives."""
    told = parameters(cubin, launch.function)
    wanted, given = [size for _, size in told.places], [a.bytes for a in launch.args]
    if wanted != given:
        raise Refusal(f"{launch.function} is launched with arguments of {given} bytes, its machine code takes {wanted}",
                      ", ".join(f"{a.name}: {a.type}" for a in launch.args))
    if told.threads and told.threads != launch.block:
        raise Refusal(f"{launch.function} is launched with {launch.block} threads, its machine code is for "
                      f"{told.threads}")


def packed(args: Sequence[Argument]) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each argument, as C lays out a struct of them; a map begins at a multiple of 64."""
    at = 0
    for a in args:
        step = min(a.bytes, 64)
        at = -(-at // step) * step
        yield at, a.bytes
        at += a.bytes


def described(name: str, param: str, places: tuple[int, ...], box: tuple[int, ...], swizzle: int, item: int
              ) -> tuple[Argument, ...]:
    """What Triton makes of an argument `tensordesc<..>`: the map, then every extent and every stride.

    item: bytes of an element.  Maps need bases and strides of 16 bytes.
    """
    return (Argument(name, "map", param, type="map", multiple=16, places=places, box=box, swizzle=swizzle),
            *(Argument(f"{name}_n{n}", "extent", param, n) for n in places),
            *(Argument(f"{name}_s{n}", "stride", param, n, "i64", 16 // item) for n in places[:-1]),
            Argument(f"{name}_s{places[-1]}", "stride", param, places[-1], "i64"))


def distinct(args: Iterable[Argument]) -> tuple[Argument, ...]:
    """Of all launches, each once, with what any of them takes for granted (powers of two)."""
    found: dict[str, Argument] = {}
    for a in args:
        found[a.name] = replace(a, multiple=max(a.multiple, found[a.name].multiple if a.name in found else 1))
    return tuple(found.values())


def loosened(args: Sequence[Argument], layout: Layout) -> tuple[Argument, ...]:
    """The arguments of the usual layout, as they are in another."""
    return tuple(replace(a, multiple=1 if a.name in layout.loose else a.multiple,
                         type="i64" if a.name in layout.wide else a.type) for a in args)


def value(e: Expr, sizes: Mapping[str, int], at: Mapping[str, int] = MappingProxyType({})) -> int:
    """An extent in numbers, where variables have the values `at`.  Raises LookupError where it reads a tensor."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Size):
        return sizes[e.rank]
    if isinstance(e, Var):
        return at[e.name]
    if isinstance(e, Access):
        raise LookupError(e.tensor)
    return int(OPS[e.op].numpy(*(value(x, sizes, at) for x in e.args)))


def factor(extents: Sequence[Expr]) -> int:
    """A number that the product of the extents is a multiple of, whatever sizes are."""
    return prod(int(e.value) if isinstance(e, Const) else
                factor(e.args) if isinstance(e, Call) and e.op == "mul" else 1 for e in extents)


def unit(strides: Sequence[int]) -> int:
    """The position with stride 1, the last if there are several, -1 if there is none."""
    return next((k for k in range(len(strides) - 1, -1, -1) if strides[k] == 1), -1)
