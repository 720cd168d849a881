"""Binds a built kernel to the tensors of a region: which extents it takes, which outputs it fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from memcomp.ir.errors import Refusal
from memcomp.ir.program import Program
from memcomp.ir.tile import TileProgram
from memcomp.pipeline import fixed
from memcomp.runtime import Entry, Extents, Recompute
from memcomp.sizes import extent, input_shapes, sources, spell

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "i64": torch.int64, "i32": torch.int32,
    "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}


def make_entry(key: str, program: Program, tiles: TileProgram, kernel: Callable[..., Any],
               order: tuple[tuple[int, ...], ...], symbols: Sequence[str], recompute: Recompute | None) -> Entry:
    """The entry that runs `kernel` on tensors shaped as the inputs of `program`.

    program: as read; tiles: what the kernel was emitted from, its tensors in the same order; symbols: the names of the
    leading `sizes` of a call.  Raises Refusal where an extent that is needed is found in no input.
    """
    cascade = program.cascade
    ins, outs = cascade.inputs(), cascade.outputs()
    params = [p for p in tiles.params if p.role in ("in", "state")]
    if any(t.role == "state" for t in cascade.tensors):
        raise Refusal(f"{program.name} carries a state", hint="states are not called through torch")
    if len(params) != len(ins):
        raise Refusal(f"{program.name} takes {len(ins)} tensors, its kernel {len(params)}")
    read = {name: str(x) for name, x in fixed(program).items()}
    read |= _spelt(input_shapes(cascade)) | {name: f"s[{i}]" for i, name in enumerate(symbols)}
    sizes = read | _spelt([p.shape for p in params])
    missing = [s for s in tiles.sizes if s not in sizes]
    if missing:
        raise Refusal(f"the extent of rank {missing[0]} is in no input's shape", hint="pass a tensor that has it")
    return Entry(
        key, kernel, len(tiles.kernels), tuple(len(t.ranks) for t in ins),
        tuple(function([spell(extent(cascade, r), read) for r in t.ranks]) for t in outs),
        tuple(DTYPES[t.dtype] for t in outs), tuple(order) or ((),) * len(outs),
        function([sizes[s] for s in tiles.sizes]),
        tuple((function([spell(x, sizes) for x in p.shape]), DTYPES[p.dtype])
              for p in tiles.params if p.role == "work"),
        recompute,
    )


def _spelt(shapes: Sequence[Sequence[Any]]) -> dict[str, str]:
    return {name: f"t[{i}].shape[{d}]" + (f" // {divisor}" if divisor != 1 else "")
            for name, (i, d, divisor) in sources(shapes).items()}


def function(parts: Sequence[str]) -> Extents:
    """`(t, s) -> (part, ...)` compiled once: this runs on every call of a region."""
    return eval(f"lambda t, s: ({''.join(p + ', ' for p in parts)})")  # type: ignore[no-any-return]
