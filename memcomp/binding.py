"""Binds a built kernel to the tensors of a region: which extents it takes, which outputs it fills."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from memcomp.dtypes import DTYPES
from memcomp.ir.errors import Refusal
from memcomp.ir.program import Program
from memcomp.ir.tile import TileProgram
from memcomp.runtime import Entry, Extents, Prepare, Recompute
from memcomp.sizes import extent, fixed, input_shapes, sources, spell

Fresh: TypeAlias = tuple[Sequence[str], torch.dtype, tuple[int, ...]]  # extents, dtype, order of a tensor


@dataclass(frozen=True, slots=True)
class Taken:
    """What a kernel takes besides the inputs, as texts over (t, s): tensors and sizes of a call.

    outs, work: extents and dtype of each output and of each tensor that the kernel works in; sizes: its integers.
    """

    outs: tuple[tuple[tuple[str, ...], torch.dtype], ...]
    work: tuple[tuple[tuple[str, ...], torch.dtype], ...]
    sizes: tuple[str, ...]


def taken(program: Program, tiles: TileProgram, symbols: Sequence[str]) -> Taken:
    """What the kernel of `tiles` takes, called for `program`.  Arguments and errors as of `make_entry`."""
    cascade = program.cascade
    ins, params = cascade.inputs(), [p for p in tiles.params if p.role in ("in", "state")]
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
    return Taken(
        tuple((tuple(spell(extent(cascade, r), read) for r in t.ranks), DTYPES[t.dtype]) for t in cascade.outputs()),
        tuple((tuple(spell(x, sizes) for x in p.shape), DTYPES[p.dtype]) for p in tiles.params if p.role == "work"),
        tuple(sizes[s] for s in tiles.sizes))


def make_entry(key: str, program: Program, tiles: TileProgram, kernel: Callable[..., Any],
               order: tuple[tuple[int, ...], ...], symbols: Sequence[str], recompute: Recompute | None,
               device: str = "cpu") -> Entry:
    """The entry that runs `kernel` on tensors shaped as the inputs of `program`.

    program: as read; tiles: what the kernel was emitted from, its tensors in the same order; symbols: the names of the
    leading `sizes` of a call; device: of the results.  Raises Refusal where an extent
    that is needed is found in no input.
    """
    needs = taken(program, tiles, symbols)
    params = [p for p in tiles.params if p.role in ("in", "state")]
    order = tuple(order) or ((),) * len(needs.outs)
    outs = [(*x, o) for x, o in zip(needs.outs, order, strict=True)]
    over = next((k for k, p in enumerate(params) for q in tiles.params if q.over == p.name), -1)
    prepare = preparation([len(t.ranks) for t in program.cascade.inputs()], outs, [(*x, ()) for x in needs.work],
                          needs.sizes, over, device)
    return Entry(key, kernel, len(tiles.kernels), prepare, tuple(function(shape) for shape, _ in needs.outs),
                 tuple(kind for _, kind in needs.outs), order, recompute, over=over)


def _spelt(shapes: Sequence[Sequence[Any]]) -> dict[str, str]:
    return {name: f"t[{i}].shape[{d}]" + (f" // {divisor}" if divisor != 1 else "")
            for name, (i, d, divisor) in sources(shapes).items()}


def function(parts: Sequence[str]) -> Extents:
    """`(t, s) -> (part, ...)` compiled once: this runs on every call of a region."""
    return eval(f"lambda t, s: ({''.join(p + ', ' for p in parts)})")  # type: ignore[no-any-return]


def preparation(dims: Sequence[int], outs: Sequence[Fresh], work: Sequence[Fresh], ints: Sequence[str],
                over: int = -1, device: str = "cpu") -> Prepare:
    """What runs before every launch, as straight code: `(t, s) -> (outs, arguments)`, the arguments being the leading
    tensors of `t` with last stride 1 (copied where it is another), new outs, new work, and the integers.

    dims: number of dimensions of each of the leading tensors; extents and ints: texts over (t, s), each computed once;
    over: the tensor that is the only output too, as it is; device: of what is made, of several that of `t[0]`.
    """
    # as Inductor's code allocates
    known: dict[str, Any] = {"empty": torch._C._dynamo.guards._empty_strided_cpu}  # type: ignore[attr-defined]
    empty, named = ("empty", "") if device == "cpu" else ("t[0].new_empty_strided", "dtype=")
    shapes: dict[str, str] = {}
    names: dict[str, str] = {}

    def shape(tensor: re.Match[str]) -> str:
        return shapes.setdefault(tensor[0], f"shape{tensor[1]}")

    def value(text: str) -> str:
        if not re.search(r"\b[ts]\[", text):
            return str(eval(text))
        return names.setdefault(re.sub(r"\bt\[(\d+)\]\.shape", shape, text), f"n{len(names)}")

    def fresh(extents: Sequence[str], dtype: torch.dtype, order: tuple[int, ...]) -> str:
        """A new tensor; strides are those of torch, where an extent of 0 counts as 1."""
        size = [value(x) for x in extents]
        strides, step, factors = [""] * len(size), 1, ""
        for d in reversed(order or range(len(size))):
            strides[d] = f"{step}{factors}"
            if size[d].isdigit():
                step *= max(1, int(size[d]))
            else:
                factors += f" * ({size[d]} or 1)"
        kind = str(dtype).rpartition(".")[2]
        known[kind] = dtype
        return f"{empty}(({''.join(n + ', ' for n in size)}), ({''.join(n + ', ' for n in strides)}), {named}{kind})"

    made = [fresh(*x) for x in outs] if over < 0 else [f"t[{over}]"]
    args = [f"(t[{i}] if t[{i}].stride()[-1] == 1 else t[{i}].contiguous())" if n and i != over else f"t[{i}]"
            for i, n in enumerate(dims)]
    args += [f"o{i}" for i in range(len(outs))] + [fresh(*x) for x in work] + [value(x) for x in ints]
    lines = [f"{name} = {text}" for text, name in (*shapes.items(), *names.items())]
    lines += [f"o{i} = {text}" for i, text in enumerate(made)]
    lines += [f"return [{', '.join(f'o{i}' for i in range(len(outs)))}], [{', '.join(args)}]"]
    exec("def prepare(t, s):\n    " + "\n    ".join(lines), known)
    return known["prepare"]  # type: ignore[no-any-return]
