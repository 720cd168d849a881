"""What a launch is called with: a pointer and strides for each tensor that it touches, then sizes."""

from __future__ import annotations

from dataclasses import dataclass

from memcomp.ir.expr import Access, Expr, Size, walk
from memcomp.ir.tile import Load, Store, TileKernel, TileProgram, expressions, statements

POINTERS = {"f64": "*fp64", "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i64": "*i64", "i32": "*i32",
            "i16": "*i16", "i8": "*i8", "u8": "*u8", "bool": "*i1"}


@dataclass(frozen=True, slots=True)
class Argument:
    """kind: pointer, stride or size; of: the param or rank; at: the stride's position."""

    name: str
    kind: str
    of: str
    at: int = 0


@dataclass(frozen=True, slots=True)
class Arguments:
    """args: in order.  signature: Triton's type of each, by name; aligned: those that are multiples of 16 where
    tensors are laid out as usual (the base in bytes, strides in elements)."""

    args: tuple[Argument, ...]
    signature: dict[str, str]
    aligned: frozenset[str]


def arguments(tp: TileProgram, k: TileKernel, units: tuple[int, ...]) -> Arguments:
    """The arguments of a launch.  units: by param the position of stride 1, which is no argument."""
    touched = {n.tensor for s in statements(k.body) for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
    touched |= {s.target.tensor if isinstance(s, Store) else s.source.tensor
                for s in statements(k.body) if isinstance(s, (Load, Store))}
    sizes = {n.rank for e in _expressions(k) for n in walk(e) if isinstance(n, Size)}
    args: list[Argument] = []
    signature: dict[str, str] = {}
    for p, unit in zip(tp.params, units, strict=True):
        if p.name not in touched:
            continue
        args.append(Argument(f"{p.name}_ptr", "pointer", p.name))
        signature[args[-1].name] = POINTERS[p.dtype]
        for n in range(len(p.shape)):
            if n != unit:
                args.append(Argument(f"{p.name}_s{n}", "stride", p.name, n))
                signature[args[-1].name] = "i32"
    for r in tp.sizes:
        if r in sizes:
            args.append(Argument(r, "size", r))
            signature[r] = "i32"
    return Arguments(tuple(args), signature, frozenset(a.name for a in args if a.kind != "size"))


def _expressions(k: TileKernel) -> list[Expr]:
    found = [e for _, e in k.grid]
    found += [e for d in k.dims for e in (d.count, d.start)]
    return found + [e for s in statements(k.body) for e in expressions(s)]
