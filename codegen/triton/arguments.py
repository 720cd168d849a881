"""What a launch is called with: a pointer and strides for each tensor that it touches, then sizes."""

from __future__ import annotations

from dataclasses import dataclass

from memcomp.codegen.launches import Argument, factor
from memcomp.ir.expr import Access, Expr, Size, walk
from memcomp.ir.tile import Load, Param, Store, TileKernel, TileProgram, expressions, statements

POINTERS = {"f64": "*fp64", "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i64": "*i64", "i32": "*i32",
            "i16": "*i16", "i8": "*i8", "u8": "*u8", "bool": "*i1"}
ALIGNED = 16  # what Triton is told of an argument, or nothing


@dataclass(frozen=True, slots=True)
class Arguments:
    """args: in order; `multiple` holds where tensors are laid out as usual."""

    args: tuple[Argument, ...]

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of each, by name."""
        return {a.name: a.type for a in self.args}

    @property
    def aligned(self) -> frozenset[str]:
        """Those that are multiples of 16: bases in bytes, strides in elements."""
        return frozenset(a.name for a in self.args if a.multiple == ALIGNED)


def arguments(tp: TileProgram, k: TileKernel, units: tuple[int, ...]) -> Arguments:
    """The arguments of a launch.  units: by param the position of stride 1, which is no argument."""
    touched = {n.tensor for s in statements(k.body) for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
    touched |= {s.target.tensor if isinstance(s, Store) else s.source.tensor
                for s in statements(k.body) if isinstance(s, (Load, Store))}
    sizes = {n.rank for e in _expressions(k) for n in walk(e) if isinstance(n, Size)}
    args: list[Argument] = []
    for p, unit in zip(tp.params, units, strict=True):
        if p.name in touched:
            args.append(Argument(f"{p.name}_ptr", "pointer", p.name, type=POINTERS[p.dtype], multiple=ALIGNED))
            args += [Argument(f"{p.name}_s{n}", "stride", p.name, n, multiple=_usual(p, n))
                     for n in range(len(p.shape)) if n != unit]
    args += [Argument(r, "size", r) for r in tp.sizes if r in sizes]
    return Arguments(tuple(args))


def _usual(p: Param, n: int) -> int:
    """What a stride is a multiple of where nothing is odd.  Work is made row by row: there it is known."""
    return ALIGNED if p.role != "work" or factor(p.shape[n + 1:]) % ALIGNED == 0 else 1


def _expressions(k: TileKernel) -> list[Expr]:
    found = [e for _, e in k.grid]
    found += [e for d in k.dims for e in (d.count, d.start)]
    return found + [e for s in statements(k.body) for e in expressions(s)]
