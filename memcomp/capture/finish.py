"""From what was read to a Program: outputs named, in-tensors declared, shape symbols solved by input shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from memcomp.capture.collect import put_together
from memcomp.capture.extent import Extent, expression, extent, product, same, size_name, tidy
from memcomp.capture.reader import DTYPE, Reader, meta, shape_of, symbol_range
from memcomp.capture.value import Value, join
from memcomp.ir.cascade import Cascade, Einsum, Rank, Tensor
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, Size, Var, reads, substitute, transform, variables, walk
from memcomp.ir.program import Program
from memcomp.ir.simplify import simplify


@dataclass(frozen=True)
class Finished:
    program: Program
    inputs: tuple[fx.Node, ...]
    sizes: tuple[tuple[str, fx.Node | int], ...]


def finish(r: Reader, name: str, outputs: Sequence[tuple[fx.Node, Value]], *, apart: bool = False) -> Finished:
    """Close the reading: `outputs` are the nodes and their values, in order.

    apart: an output that is put together is written piece by piece.
    """
    out_names: dict[str, str] = {}
    if apart:
        outs = [put_together(r, v, "O" if len(outputs) == 1 else f"O{k}") for k, (_, v) in enumerate(outputs)]
    else:
        several = _read_by_several(r, [v for _, v in outputs])
        outs = [_output(r, v, "O" if len(outputs) == 1 else f"O{k}", out_names, several)
                for k, (_, v) in enumerate(outputs)]
    statements = _needed([_renamed(s, out_names) for s in r.statements], {t.name for t in outs})
    used = list(dict.fromkeys(a.tensor for s in statements for a in _accesses(s) if a.tensor in r.leaf_of))
    ins = [_input(r, t, statements) for t in used]
    doubles = all(meta(n).dtype == torch.float64 for n, _ in outputs)
    temps = _temps(r, statements, outs, "f64" if doubles else "f32")
    solved, ranks, sizes = _sizes(r, ins, outs, temps, statements)
    statements = [_map(s, lambda e: _sized(e, solved)) for s in statements]
    names = _names(r, statements, used)
    statements = [_renamed(s, names) for s in statements]
    ins = [replace(t, name=names[t.name]) for t in ins]
    cascade = Cascade(tuple(ranks), (*ins, *temps, *outs), tuple(statements))
    return Finished(Program(name, cascade, target="cpu"), tuple(r.leaf_of[t] for t in used), tuple(sizes))


def _accesses(s: Einsum) -> list[Access]:
    es = [s.body, *([s.guard] if s.guard is not None else []), *(i for o in s.outs for i in o.index)]
    return [n for e in es for n in walk(e) if isinstance(n, Access)]


def _map(s: Einsum, f: Callable[[Expr], Expr]) -> Einsum:
    outs = tuple(Access(o.tensor, tuple(f(i) for i in o.index)) for o in s.outs)
    return Einsum(outs, f(s.body), s.reduce, None if s.guard is None else f(s.guard))


def _renamed(s: Einsum, names: Mapping[str, str]) -> Einsum:
    """The statement with tensors called as `names` says."""
    def f(x: Expr) -> Expr:
        return Access(names.get(x.tensor, x.tensor), x.index) if isinstance(x, Access) else x

    s = _map(s, lambda e: transform(e, f))
    return Einsum(tuple(Access(names.get(o.tensor, o.tensor), o.index) for o in s.outs), s.body, s.reduce, s.guard)


def _needed(statements: Sequence[Einsum], roots: set[str]) -> list[Einsum]:
    keep: list[Einsum] = []
    wanted = set(roots)
    for s in reversed(statements):
        if wanted & set(s.names):
            keep.append(s)
            wanted |= s.reads()
    return keep[::-1]


def _read_by_several(r: Reader, values: Sequence[Value]) -> set[str]:
    """Temporaries that more than one output reads."""
    each = [reads(r.probe(v)) for v in values]
    return {t for t in set().union(*each) if sum(t in e for e in each) > 1}


def _output(r: Reader, v: Value, hint: str, out_names: dict[str, str], several: set[str]) -> Tensor:
    """Write `v` to an out-tensor: its last statement writes there directly where it is only rearranged.

    out_names: temporaries that are out-tensors as they stand, to be renamed when all outputs are known.
    several: temporaries that other outputs read too.
    """
    n = len(v.factors)
    hints = [("B", "H", "P", "F")[k + max(0, 4 - n)] if k + max(0, 4 - n) < 4 else "X" for k in range(n)]
    axes = r.axes(v.factors, hints, set())
    ix = tuple(Var(str(f.rank).lower()) for f in axes)
    ranks: list[str] = []
    index: list[Expr] = []
    for d in Value(v.dims, v.dtype, v.at).split(ix):
        own = axes[:len(d)]
        del axes[:len(d)]
        ranks.append(str(own[0].rank) if len(own) == 1 else r.rank("X", product(*(f.extent for f in own))))
        index.append(join([(i, f.extent) for i, f in zip(d, own, strict=True)]))
    e = r.simplify(v.at(ix))
    at = _last(r, e) if not reads(e) & several else None
    if at is not None:
        r.names -= set(r.statements[at].names)
    name = r.fresh(hint)
    empty = 0.0
    if at is None and isinstance(e, Access) and e.tensor in r.written and e.index == tuple(index) \
            and e.tensor not in out_names:
        out_names[e.tensor], empty = name, r.written[e.tensor].empty
    elif at is None:
        r.statements.append(Einsum((Access(name, tuple(index)),), e))
    else:
        s = r.statements[at]
        assert isinstance(e, Access)
        empty = r.written[e.tensor].empty
        table: Mapping[Expr, Expr] = {o: i for o, i in zip(s.out.index, e.index, strict=True) if o != i}
        guard = None if s.guard is None else r.simplify(substitute(s.guard, table))
        r.statements[at] = Einsum((Access(name, tuple(index)),), r.simplify(substitute(s.body, table)), s.reduce, guard)
    dtype = DTYPE.get(v.dtype)
    if dtype is None:
        raise Refusal(f"an output of {v.dtype}", hint=f"known: {', '.join(DTYPE.values())}")
    return Tensor(name, tuple(ranks), dtype, "out", empty)


def _last(r: Reader, e: Expr) -> int | None:
    """The only statement that writes the temporary that `e` is, if nothing else reads it and `e` only renames."""
    if not isinstance(e, Access) or e.tensor not in r.written:
        return None
    if any(e.tensor in s.reads() for s in r.statements):
        return None
    at = next((k for k, s in enumerate(r.statements) if s.names == (e.tensor,)), None)
    if at is None:
        return None
    own = r.statements[at].out.index
    fits = all(o == i or i == Const(0) and r.ranges[_name(o)][1] == 1 for o, i in zip(own, e.index, strict=True))
    return at if fits else None


def _name(v: Expr) -> str:
    assert isinstance(v, Var)
    return v.name


def _input(r: Reader, name: str, statements: Sequence[Einsum]) -> Tensor:
    """An in-tensor; a dimension read by one plain variable of its extent has that variable's rank."""
    node = r.leaf_of[name]
    t = meta(node) if meta(node) is not None else None
    shape = shape_of(t) if t is not None else ()
    found = [a for s in statements for a in _accesses(s) if a.tensor == name]
    ranks: list[str] = []
    for k, e in enumerate(shape):
        plain = (i.name.upper() for a in found for i in (a.index[k],) if isinstance(i, Var))
        rank = next((x for x in plain if same(r.ranks[x], e) and x not in ranks), None)
        if rank is None:
            unit = next((x for x in r.ranks if x == "B" and same(r.ranks[x], e) and e == 1 and x not in ranks), None)
            heads = any(variables(a.index[k]) for a in found)
            known = next((x for x in r.ranks if heads and x == "J" and same(r.ranks[x], e) and x not in ranks), None)
            rank = unit or known or r.rank("J" if heads else "U", e)
        ranks.append(rank)
    assert t is not None
    return Tensor(name, tuple(ranks), DTYPE[t.dtype], "in")


def _temps(r: Reader, statements: Sequence[Einsum], outs: Sequence[Tensor], real: str) -> list[Tensor]:
    """Declarations of the temporaries that are not plain f32, empty 0."""
    done = {t.name for t in outs}
    out = []
    for n in (n for s in statements for n in s.names):
        w = r.written.get(n)
        if n in done or w is None:
            continue
        dtype = r.dtypes.get(n, real)
        if dtype != "f32" or w.empty != 0:
            out.append(Tensor(n, tuple(v.upper() for v in w.at), dtype, "temp", w.empty))
    return out


def _sizes(r: Reader, ins: Sequence[Tensor], outs: Sequence[Tensor], temps: Sequence[Tensor],
           statements: Sequence[Einsum]) -> tuple[dict[str, Expr], list[Rank], list[tuple[str, fx.Node | int]]]:
    """Ranks with extents, and each shape symbol as an expression over ranks whose extent an input shape gives."""
    order = list(dict.fromkeys([*(x for t in (*ins, *outs, *temps) for x in t.ranks),
                                *(v.upper() for s in statements for v in s.space())]))
    given: dict[Extent, str] = {}
    for t in ins:
        for x in t.ranks:
            e = r.ranks[x]
            if not isinstance(e, int):
                given.setdefault(sympy.expand(e), x)
    symbols = {s for x in order for s in _symbols(r.ranks[x])}
    named = _size_names(statements) - {size_name(s) for s in symbols}
    if named:
        symbols |= {s for s in _graph_symbols(r.gm) if size_name(s) in named}
    solved: dict[str, Expr] = {}
    progress = True
    while progress:
        progress = False
        for e, x in sorted(given.items(), key=lambda p: len(_symbols(p[0]))):
            unknown = [s for s in _symbols(e) if size_name(s) not in solved]
            if len(unknown) == 1 and sympy.diff(e, unknown[0]) == 1:
                rest = sympy.expand(e - unknown[0])
                solved[size_name(unknown[0])] = simplify(Size(x) - _sized(expression(tidy(rest)), solved))
                progress = True
    ranks: list[Rank] = []
    sizes: list[tuple[str, fx.Node | int]] = []
    for s in sorted(symbols, key=str):
        if size_name(s) not in solved:
            x = r.rank("L", s)
            solved[size_name(s)] = Size(x)
            sizes.append((x, _provider(r.gm, s)))
            ranks.append(Rank(x, None, _bound(r, s)))
    for x in order:
        e = r.ranks[x]
        if isinstance(e, int):
            ranks.append(Rank(x, Const(e)))
        elif given.get(sympy.expand(e)) == x:
            ranks.append(Rank(x, None, _bound(r, e)))
        elif sympy.expand(e) in given:
            ranks.append(Rank(x, Size(given[sympy.expand(e)])))
        else:
            ranks.append(Rank(x, simplify(_sized(expression(e), solved))))
    return solved, _defined_first(ranks), sizes


def _defined_first(ranks: list[Rank]) -> list[Rank]:
    """Run-time symbols before the ranks that are computed from them."""
    return [x for x in ranks if not _derived(x)] + [x for x in ranks if _derived(x)]


def _derived(x: Rank) -> bool:
    return x.extent is not None and not isinstance(x.extent, Const)


def _symbols(e: Extent) -> set[sympy.Symbol]:
    return set() if isinstance(e, int) else set(e.free_symbols)


def _size_names(statements: Sequence[Einsum]) -> set[str]:
    es = [e for s in statements for e in (s.body, s.guard, *(i for o in s.outs for i in o.index)) if e is not None]
    return {n.rank for e in es for n in walk(e) if isinstance(n, Size)}


def _graph_symbols(gm: fx.GraphModule) -> set[sympy.Symbol]:
    """The symbols of all shapes and run-time integers of a graph."""
    out: set[sympy.Symbol] = set()
    for node in gm.graph.nodes:
        m = meta(node)
        for s in (*m.shape,) if isinstance(m, torch.Tensor) else (m,):
            if isinstance(s, torch.SymInt):
                out |= _symbols(extent(s))
    return out


def _provider(gm: fx.GraphModule, s: sympy.Symbol) -> fx.Node:
    nodes: list[fx.Node] = list(gm.graph.nodes)
    for node in nodes:
        m = meta(node)
        if isinstance(m, torch.SymInt) and m.node.expr == s:
            return node
    raise Refusal(f"the run-time number {s} is neither in an input's shape nor a node of the graph")


def _bound(r: Reader, e: Extent) -> int | None:
    """The greatest value that torch's guards allow, where they limit it below what memory can hold."""
    if isinstance(e, int) or not e.is_Symbol:
        return None
    high = symbol_range(r.gm, e)[1]
    return high - 1 if high is not None and high < 1 << 40 else None


def _sized(e: Expr, solved: Mapping[str, Expr]) -> Expr:
    table: Mapping[Expr, Expr] = {Size(k): v for k, v in solved.items()}
    out = substitute(e, table)
    return out if out == e else simplify(out)


def _names(r: Reader, statements: Sequence[Einsum], used: Sequence[str]) -> dict[str, str]:
    """Short names for the in-tensors by what they do: Q and K make scores, V is summed with weights."""
    taken = {n for s in statements for n in s.names}
    out: dict[str, str] = {}

    def give(tensor: str, hint: str) -> None:
        if tensor in out or tensor not in used:
            return
        name, k = hint, 2
        while name in taken:
            name, k = f"{hint}{k}", k + 1
        taken.add(name)
        out[tensor] = name

    for s in statements:
        if s.reduce is not None and s.reduce.monoid == "sum":
            leaves = [a for a in walk(s.body) if isinstance(a, Access) and a.tensor in used]
            real = [a.tensor for a in leaves if meta(r.leaf_of[a.tensor]).dtype.is_floating_point]
            for t, hint in zip(real, ("Q", "K") if len(real) > 1 else ("V",), strict=False):
                give(t, hint)
    for t in used:
        m = meta(r.leaf_of[t])
        real = m.dtype.is_floating_point
        give(t, "mask" if m.dtype == torch.bool else "ids" if not real else "bias" if m.ndim else "scale")
    return out
