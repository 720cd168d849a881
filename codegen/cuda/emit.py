"""TileProgram -> CUDA C++: one kernel a launch, one block of warps for each task.

Text only; nothing here imports CUDA.  A tile's points are spread over threads and registers (`spread`); every loop over
registers is unrolled.  A reduction joins what a thread has; what threads have is joined where it is first read for more
than to be scaled or added to, so that a loop which only adds up joins its sums once, after its last step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from memcomp.codegen.cuda.express import CTYPES, Point, Scope, number
from memcomp.codegen.cuda.memory import PACKED, Memory, Rows, accesses, vectors
from memcomp.codegen.cuda.spread import Block, blocks, bytes_held, pressure
from memcomp.codegen.cuda.words import HEAD
from memcomp.codegen.launches import Argument, Launch
from memcomp.codegen.names import Names
from memcomp.codegen.triton.arguments import arguments
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, call, variables, walk
from memcomp.ir.ops import MONOIDS
from memcomp.ir.target import BYTES, Target
from memcomp.ir.target import target as named
from memcomp.ir.tile import (
    Dot,
    Fold,
    Kernel,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    TileProgram,
    When,
    expressions,
    statements,
)

_JOIN = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "and": "And", "or": "Or"}
_AGAIN = ("max", "min", "and", "or")   # joining a number to itself changes nothing
_HELD = {"f32": "f32", "f64": "f64", "i64": "i64", "bool": "bool"}
TAKEN = set("""alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float for
friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
public register reinterpret_cast return short signed sizeof static static_assert static_cast struct switch template
this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor
xor_eq threadIdx blockIdx blockDim gridDim warpSize INLINE Block fetch put Sum Prod Max Min And Or combine from_lane
AT_ONCE from_bf16 from_f16 bf16_of f16_of i8_of u8_of to_bf16 to_f16 highest lowest most least mod floordiv sigmoid
xlogx abs fabs exp exp2 log log2 sin cos erf tanh expm1 log1p floor rint sqrt pow i main linux unix""".split())


def emit(tp: TileProgram, target: Target | str, units: tuple[int, ...] | None = None, aligned: bool = True) -> Kernel:
    """Kernel text; deterministic.

    units: for each param the position whose stride is 1 in memory, -1 where there is none; the last by default.
    aligned: rows begin at multiples of 16 bytes where extents say so.  Else the text takes nothing for granted, and
    strides have 64 bits.
    Raises Refusal where a stored format or an operator has no form here, and where tiles do not fit in registers.
    """
    machine = named(target) if isinstance(target, str) else target
    texts = [w.text for w in _writers(tp, units, aligned)]
    return Kernel(tp.name, "cuda", "\n".join([HEAD, *texts]), "", tp, machine.name)


def launches(tp: TileProgram, target: Target | str, units: tuple[int, ...] | None = None, aligned: bool = True
             ) -> tuple[Launch, ...]:
    """What the kernels of `emit` with the same arguments are launched with, in the program's order."""
    return tuple(w.launch for w in _writers(tp, units, aligned))


def admits(tp: TileProgram, target: Target) -> int:
    """0: every launch fits its registers; 1: some may spill.  Raises Refusal where one has no text."""
    return max((int(w.spills) for w in _writers(tp, None, True)), default=0)


def _writers(tp: TileProgram, units: tuple[int, ...] | None, aligned: bool) -> list[Writer]:
    places = units if units is not None else tuple(len(p.shape) - 1 for p in tp.params)
    rows = Rows.of(tp, places, aligned)
    names = Names(TAKEN)
    return [Writer(tp, k, names.fresh(re.sub(r"\W", "_", k.name), plain=True), places, rows, aligned)
            for k in tp.kernels]
