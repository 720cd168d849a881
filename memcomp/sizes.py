"""Extents of symbolic ranks, found from the shapes of the tensors that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memcomp.ir.cascade import Cascade, Knob, extent_of
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Call, Const, Expr, Size
from memcomp.ir.program import Program
from memcomp.ir.show import show_expr

EXAMPLE_EXTENT = 1024  # stands for a symbolic extent without a bound where candidates are only ranked
_INFIX = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def extent(cascade: Cascade, rank: str) -> Expr:
    """The extent of a rank as an expression over sizes; a symbol is its own `Size`.

    Raises Refusal where the extent depends on data or on a knob: such a rank has no shape.
    """
    x = cascade.rank(rank).extent
    if x is None:
        return Size(rank)
    if isinstance(x, Knob) or not isinstance(x, (Const, Size, Call)):
        raise Refusal(f"the extent of rank {rank} depends on data or on a choice",
                      hint="a tensor needs a rectangular shape")
    return x


def input_shapes(cascade: Cascade) -> list[tuple[Expr, ...]]:
    """The shape of each input, as expressions."""
    return [tuple(extent(cascade, r) for r in t.ranks) for t in cascade.inputs()]


def sources(shapes: Sequence[Sequence[Expr]]) -> dict[str, tuple[int, int, int]]:
    """size -> (tensor, dimension, divisor): where each size can be read, alone or times a constant."""
    found: dict[str, tuple[int, int, int]] = {}
    for i, shape in enumerate(shapes):
        for d, x in enumerate(shape):
            divisor = 1
            if isinstance(x, Call) and x.op == "mul" and len(x.args) == 2:
                a, b = x.args if isinstance(x.args[1], Const) else reversed(x.args)
                if isinstance(b, Const) and isinstance(b.value, int):
                    x, divisor = a, b.value
            if isinstance(x, Size):
                found.setdefault(x.rank, (i, d, divisor))
    return found


def solve(cascade: Cascade, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Extents of the symbolic ranks that the given shapes of the inputs show."""
    return {name: shapes[i][d] // divisor for name, (i, d, divisor) in sources(input_shapes(cascade)).items()}


def spell(x: Expr, found: Mapping[str, str]) -> str:
    """Python source of an extent; `found` spells the sizes.  The source works on ints and on SymInts."""
    if isinstance(x, Const):
        return repr(x.value)
    if isinstance(x, Size):
        if x.rank not in found:
            raise Refusal(f"the extent of rank {x.rank} is in no input's shape", hint="pass a tensor that has it")
        return f"({found[x.rank]})"
    if isinstance(x, Call) and x.op in _INFIX:
        return f"({_INFIX[x.op].join(spell(a, found) for a in x.args)})"
    if isinstance(x, Call) and x.op == "ceildiv":
        a, b = (spell(a, found) for a in x.args)
        return f"(-(-{a} // {b}))"
    if isinstance(x, Call) and x.op in ("max", "min"):
        return f"{x.op}({', '.join(spell(a, found) for a in x.args)})"
    raise Refusal(f"an extent is not an expression over sizes: {show_expr(x)}")


def evaluate(x: Expr, sizes: Mapping[str, int]) -> int:
    """The value of an extent."""
    return int(eval(spell(x, {n: str(v) for n, v in sizes.items()})))


def fixed(program: Program) -> dict[str, int]:
    """Ranks whose extent is a number."""
    extents = ((r.name, extent_of(program.cascade, r.name)) for r in program.cascade.ranks)
    return {name: x for name, x in extents if x is not None}


def shape_sizes(read: Program, program: Program, known: Mapping[str, int]) -> dict[str, int]:
    """An extent for every symbolic rank of `program`, a rewritten form of `read`, which stands for the same tensors.

    known: extents of symbolic ranks of `read`; one that is not known is its bound or `EXAMPLE_EXTENT`.
    """
    given = fixed(read) | {r.name: known.get(r.name, r.bound or EXAMPLE_EXTENT)
                           for r in read.cascade.ranks if r.extent is None}
    shapes = [[evaluate(x, given) for x in shape] for shape in input_shapes(read.cascade)]
    found = given | solve(program.cascade, shapes)
    return {r.name: found.get(r.name, r.bound or EXAMPLE_EXTENT) for r in program.cascade.ranks if r.extent is None}
