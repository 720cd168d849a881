"""Program -> TileProgram: one kernel per mapping group, over shared params.

The only place that knows both sides.  What it does with a group is told in `lower_ops` (statements to tile
operations), `lower_fuse` (fewer tiles) and `lower_emit` (loads, masks, loop bounds, dots, stores).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from math import isfinite, isinf

from memcomp.codegen.lower_emit import Emitter
from memcomp.codegen.lower_exact import in_parts, references, small_sums, spread
from memcomp.codegen.lower_fill import fills
from memcomp.codegen.lower_fuse import buffers, compose, keep_old, kind, split_costly, split_deep, split_products
from memcomp.codegen.lower_ops import OLD, GroupOps, group_ops
from memcomp.codegen.lower_pieces import Sizes, kernels_of
from memcomp.codegen.lower_tiles import tile_dtype
from memcomp.ir.cascade import Cascade, Tensor
from memcomp.ir.errors import Refusal, VerifyError
from memcomp.ir.expr import Access, Const, Expr, Size, call, transform, walk
from memcomp.ir.places import declared
from memcomp.ir.program import Program, knobs
from memcomp.ir.register import expanded
from memcomp.ir.show import show_einsum
from memcomp.ir.target import target
from memcomp.ir.tile import Param, TileKernel, TileProgram
from memcomp.ir.tile_verify import verify_tile

BEYOND_F32 = 2.0**128 - 2.0**103  # the least that rounds to infinity


def lower(program: Program) -> TileProgram:
    """The tile program of a closed, mapped program.

    Raises VerifyError where a knob is open or a statement belongs to no group, Refusal where a group has no tile form.
    """
    if open_knobs := knobs(program):
        raise VerifyError(f"knob {open_knobs[0].name} of {program.name} is open", hint="close the knobs first")
    program = expanded(program)
    c = declared(program.cascade)
    _check_numbers(c)
    owner = {t: g.name for g in program.mapping.groups for t in g.tensors}
    for e in c.einsums:
        for name in e.names:
            if name not in owner:
                raise VerifyError(f"{name} belongs to no group of the mapping", program.name)
    sizes = Sizes(c)
    grouped = []
    for group in program.mapping.groups:

        def outside(name: str, own: str = group.name) -> list[Access]:
            return [n for e in c.einsums if owner[e.out.tensor] != own for n in e.accesses() if n.tensor == name]

        grouped += [group_ops(c, part, members, outside) for part, members in kernels_of(c, group)]
    params = _params(c, sizes, grouped)
    dropped = {n: k for g in grouped for n, k in g.carried.items() if n in g.stores and n not in g.each_step}
    by_name = {p.name: p for p in params}
    written = Counter(n for g in grouped for n in g.stores)
    pieces = {n for n, k in written.items() if k > 1}
    kernels = [*fills(program.name, c, grouped, params)]
    kernels += [_kernel(program, c, g, by_name, dropped, pieces) for g in grouped]
    symbols = tuple(r.name for r in c.ranks if sizes.symbolic(r))
    tiles = TileProgram(program.name, params, symbols, tuple(kernels), program.target)
    verify_tile(tiles)
    return tiles


def _check_numbers(c: Cascade) -> None:
    """A real that f32 does not hold would be infinite in a kernel, and is not in the meaning."""
    if any(t.dtype == "f64" for t in c.tensors):
        return
    for e in c.einsums:
        for n in (n for root in (e.body, *e.guards()) for n in walk(root) if isinstance(n, Const)):
            if isinstance(n.value, float) and abs(n.value) >= BEYOND_F32 and isfinite(n.value):
                raise Refusal(f"{n.value} does not fit f32", show_einsum(e), "declare a tensor f64, or write inf")


def _params(c: Cascade, sizes: Sizes, grouped: list[GroupOps]) -> tuple[Param, ...]:
    """Inputs and states, outputs, then workspace: what one kernel leaves for another."""

    def param(t: Tensor, role: str) -> Param:
        return Param(t.name, t.dtype, tuple(sizes.index(Size(r)) for r in t.ranks), role)

    out = [param(t, t.role) for t in c.tensors if t.role in ("in", "state")]
    stepped = {n: k for g in grouped for n, k in g.carried.items() if n in g.stores}
    each = {n for g in grouped for n in g.each_step}

    def stored(t: Tensor, role: str) -> Param:
        p = param(t, role)
        k = stepped.get(t.name)
        if k is None:
            return p
        shape = list(p.shape)
        if t.name in each:
            shape[k] = sizes.index(call("add", shape[k], 1))
        else:
            del shape[k]
        return Param(p.name, p.dtype, tuple(shape), role)

    out += [stored(t, "out") for t in c.tensors if t.role == "out"]
    known, real = {p.name for p in out}, _real(out)
    for g in grouped:
        for name in g.stores:
            if name.removesuffix("'") not in known:
                t = c.tensor(name)
                if c.declared(t.name) is None and t.dtype == "f32":
                    t = replace(t, dtype=real)  # what its tile holds: it may be compared with what is computed again
                out.append(stored(t, "work"))
                known.add(name)
    return tuple(out)


def _kernel(
    program: Program,
    c: Cascade,
    g: GroupOps,
    params: dict[str, Param],
    dropped: dict[str, int],
    pieces: Collection[str],
) -> TileKernel:
    _workspace_reads(g, dropped)
    dtype = _dtypes(c, g, params)
    declared = {o.target for o in g.ops if c.declared(o.target.removesuffix("'")) is not None}
    long = not program.target or target(program.target).long_sums == "f64"
    small = small_sums(g, dtype, declared) if long else set[str]()
    dtype |= dict.fromkeys(small | references(g, small), "f64")
    compose(g, small)
    if long:
        in_parts(g, dtype, declared)
    stored = {n: p.dtype for n, p in params.items()}
    split_products(g, {**stored, **dtype})
    split_costly(g)
    split_deep(g)
    keep_old(g)
    for o in g.ops:
        if o.target not in dtype:  # copies of carried tiles, factors of products, parts of what is deep
            made = {"bool": "bool", "int": "i64"}.get(kind(o.body, {**stored, **dtype}), _real(params.values()))
            dtype[o.target] = dtype.get(o.target.removesuffix("_old")) or made
    if _real(params.values()) != "f64":
        spread(g, dtype, declared)
    home = buffers(g, dtype)
    return Emitter(g, params, dtype, home, pieces).kernel(f"{program.name}_{g.group.name}")


def _workspace_reads(g: GroupOps, dropped: dict[str, int]) -> None:
    """Carried tensors of other groups are read at their last step only: their workspace has no iterative rank.

    The new value of a state (`X'`) is read from the state's own param.
    """
    own = {o.target for o in g.ops}

    def f(n: Expr) -> Expr:
        if not isinstance(n, Access) or n.tensor in own or n.tensor.removesuffix(OLD) in own:
            return n
        k = dropped.get(n.tensor)
        index = n.index if k is None else n.index[:k] + n.index[k + 1 :]
        return Access(n.tensor.removesuffix("'"), index)

    g.ops[:] = [
        replace(
            o, body=transform(o.body, f), guards=tuple(transform(x, f) for x in o.guards), empty=transform(o.empty, f)
        )
        for o in g.ops
    ]
    g.stores = {n: Access(a.tensor, tuple(transform(i, f) for i in a.index)) for n, a in g.stores.items()}


def _dtypes(c: Cascade, g: GroupOps, params: dict[str, Param]) -> dict[str, str]:
    """dtype of each group tensor's tile: declared, or what its statements compute (reals are f32).

    A whole number that starts a sum of integers, 0.0, is one of them, and an infinity that starts a maximum.
    """
    stored = {n: p.dtype for n, p in params.items()}
    out: dict[str, str] = {}
    for o in g.ops:
        if (t := c.declared(o.target.removesuffix("'"))) is not None:
            out[o.target] = tile_dtype(t.dtype)
    kinds: dict[str, set[str]] = {}
    real = _real(params.values())
    for start in ("i64", "i64", real, real):  # what starts with a whole number is an integer until more is known
        for o in g.ops:
            if c.declared(o.target.removesuffix("'")) is None:
                found = kinds.setdefault(o.target, set())
                x = o.body.value if isinstance(o.body, Const) else None
                whole = isinstance(x, float) and (x.is_integer() or isinf(x))
                found.add("int" if o.twin else "whole" if whole else kind(o.body, {**stored, **out}))
                chosen = (("real", real), ("int", "i64"), ("whole", start), ("bool", "bool"))
                out[o.target] = next((d for k, d in chosen if k in found), real)
    return out


def _real(params: Iterable[Param]) -> str:
    """dtype of undeclared real tiles: f64 where a param is."""
    return "f64" if any(p.dtype == "f64" for p in params) else "f32"
