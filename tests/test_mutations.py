"""Wrong kernels are caught: a tile program changed in one place between `lower` and `emit` fails the oracle's check.

Two statements, for every mutant, dtype and length.  The oracle rejects the mutant exactly where it means something
else: the same tiles in float64 say whether it does.  And it means the same only where `harmless` says so and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memcomp
from memcomp.codegen import python
from memcomp.codegen.lower import lower
from memcomp.ir.expr import Access, Call, Const, Expr, Var, call, children, reads, rebuild, substitute, variables, walk
from memcomp.ir.program import Program, close, knobs
from memcomp.ir.simplify import simplify
from memcomp.ir.text import parse
from memcomp.ir.tile import Dot, Fold, Load, Loop, Map, Statement, Store, TileKernel, TileProgram, When
from memcomp.ir.tile_interpret import solve_sizes
from memcomp.oracle import Error, Tolerance, measure, tolerance
from memcomp.stations import rewrite
from tests.mapped import extent

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
DTYPES = ("f32", "bf16", "f16")
LENGTHS = (1, 7, 63, 64, 65, 1000, 4096)
WINDOW = 50
B, J, G, E_ = 2, 2, 2, 16
TILE = 32  # keys at a time, where not said

# -- programs, as capture reads them, and what they are in torch ------------------------------------------------------

TEXT = """
program attention on cpu
rank B = {B}
rank H = {H}
rank J = {J}
rank P = {P}
rank M = {M}
rank E = {E}
rank F = {E}
in Q[B, H, P, E]: {dtype}
in K[B, J, M, E]: {dtype}
in V[B, J, M, F]: {dtype}
out O[B, H, P, F]: {dtype}
S[b, h, p, m] = sum{{e}} Q[b, h, p, e] * K[b, h//{G}, m, e]
W[b, h, p, m] = S[b, h, p, m] * 0.25
GM[b, h, p] = max{{m}} W[b, h, p, m]{where}
SN[b, h, p, m] = exp(W[b, h, p, m] - GM[b, h, p]){where}
SD[b, h, p] = sum{{m}} SN[b, h, p, m]{where}
A[b, h, p, m] = SN[b, h, p, m] / SD[b, h, p]{where}
O[b, h, p, f] = sum{{m}} A[b, h, p, m] * V[b, h//{G}, m, f]{where}
"""
WHERE = {"full": "", "causal": " where m <= p", "window": f" where m <= p + M - P and p + M - P < m + {WINDOW}"}


def reference(form: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p, m, late = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]), k.shape[2] - q.shape[2]
    mask = {"full": None, "causal": m <= p, "window": (m <= p + late) & (p + late < m + WINDOW)}[form]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@cache
def tiles(form: str, dtype: str, decode: bool, tile: int) -> TileProgram:
    """The tile program for any lengths: `tile` keys at a time."""
    text = TEXT.format(B=B, H=J * G, J=J, G=G, E=E_, P=1 if decode else 640, M=1280, dtype=dtype, where=WHERE[form])
    p: Program = rewrite(parse(text), observe=lambda *_: None)
    choices = {k.name: tile if k.name == "m0" else k.choices[0 if tile == TILE else -1] for k in knobs(p)}
    return lower(close(p, choices))


# -- mutators: each yields (what, program) for every place it applies to ----------------------------------------------

Body: TypeAlias = tuple[Statement, ...]
Edit: TypeAlias = Callable[[Statement, bool], Iterator[tuple[str, Body]]]


def edited(body: Body, edit: Edit, inside: bool = False) -> Iterator[tuple[str, Body]]:
    """Bodies with exactly one statement edited; `inside`: in a loop."""
    for i, s in enumerate(body):
        for what, new in edit(s, inside):
            yield what, body[:i] + new + body[i + 1:]
        if isinstance(s, Loop):
            for what, inner in edited(s.body, edit, True):
                yield what, (*body[:i], replace(s, body=inner), *body[i + 1:])
        if isinstance(s, When):
            for what, inner in edited(s.body, edit, inside):
                yield what, (*body[:i], replace(s, body=inner), *body[i + 1:])
            for what, inner in edited(s.orelse, edit, inside):
                yield what, (*body[:i], replace(s, orelse=inner), *body[i + 1:])


def each(tp: TileProgram, edit: Edit) -> Iterator[tuple[str, TileProgram]]:
    for i, k in enumerate(tp.kernels):
        for what, body in edited(k.body, edit):
            yield what, replace(tp, kernels=(*tp.kernels[:i], replace(k, body=body), *tp.kernels[i + 1:]))


def first_tile_dropped(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    if isinstance(s, Loop):
        yield s.var, (replace(s, lo=s.lo + 1),)


def last_tile_dropped(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    if isinstance(s, Loop):
        yield s.var, (replace(s, hi=s.hi - 1),)


def _shifted(e: Expr) -> Iterator[Expr]:
    """The expression with one comparison of positions moved by one, either way."""
    kids = children(e)
    for i, k in enumerate(kids):
        for new in _shifted(k):
            yield rebuild(e, (*kids[:i], new, *kids[i + 1:]))
    if isinstance(e, Call) and e.op in ("lt", "le", "gt", "ge") and variables(e) and not any(
            isinstance(n, Access) for n in walk(e)):
        for by in (1, -1):
            yield Call(e.op, (e.args[0], e.args[1] + by))


def mask_shifted(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    if isinstance(s, Map):
        for n, body in enumerate(_shifted(s.body)):
            yield f"{s.tile} by {'+-'[n % 2]}1, comparison {n // 2}", (replace(s, body=body),)


def mask_skipped(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    """Every tile is taken for one that needs no mask."""
    if isinstance(s, When) and inside and s.orelse:
        yield "", s.body


def mask_always(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    """No tile is taken for one that needs no mask."""
    if isinstance(s, When) and inside and s.orelse:
        yield "", s.orelse


def correction_skipped(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    """A carried tile is not rescaled."""
    if isinstance(s, Map) and inside and isinstance(s.body, Call) and s.body.op == "mul":
        if any(isinstance(a, Access) and a.tensor == s.tile for a in s.body.args) and not any(
                isinstance(a, Const) for a in s.body.args):
            yield s.tile, ()
    for old, _, own in _joined(s, inside):
        if isinstance(old, Call) and old.op == "mul" and own in old.args:
            yield s.tile, (Map(s.tile, substitute(s.body, {old: own})),)


def accumulation_dropped(s: Statement, inside: bool) -> Iterator[tuple[str, Body]]:
    if isinstance(s, Fold | Dot) and s.accumulate:
        yield f"{s.tile} ({s.monoid if isinstance(s, Fold) else 'dot'})", (replace(s, accumulate=False),)
    for _, new, _ in _joined(s, inside):
        yield f"{s.tile} (sum)", (Map(s.tile, new),)


def _joined(s: Statement, inside: bool) -> Iterator[tuple[Expr, Expr, Access]]:
    """What a carried tile is added to as a map says it: the old value, moved; the new part; the tile."""
    if isinstance(s, Map) and inside and isinstance(s.body, Call) and s.body.op == "add":
        for old, new in (s.body.args, s.body.args[::-1]):
            own = next((n for n in walk(old) if isinstance(n, Access) and n.tensor == s.tile), None)
            if own is not None and s.tile not in reads(new):
                yield old, new, own


def heads_swapped(tp: TileProgram) -> Iterator[tuple[str, TileProgram]]:
    """One load or store takes a whole rank (batch, key head, head of a group) in reverse."""
    for i, k in enumerate(tp.kernels):
        cut = {v for d in k.dims for v in variables(d.count) | variables(d.start)}
        extents = {v: n for v, n in k.grid if v not in cut}
        extents |= {d.name: d.count for d in k.dims if d.capacity in (J, G) and isinstance(d.count, Const)}

        def edit(s: Statement, inside: bool, k: TileKernel = k,
                 extents: dict[str, Expr] = extents) -> Iterator[tuple[str, Body]]:
            if not isinstance(s, Load | Store):
                return
            at = s.source if isinstance(s, Load) else s.target
            for v, n in extents.items():
                table = Var(v)
                if any(v in variables(x) for x in at.index):
                    turned = Access(at.tensor, tuple(_put(x, table, n - 1 - Var(v)) for x in at.index))
                    new = replace(s, source=turned) if isinstance(s, Load) else replace(s, target=turned)
                    yield f"{at.tensor} along {v}", (new,)

        for what, body in edited(k.body, edit):
            yield what, replace(tp, kernels=(*tp.kernels[:i], replace(k, body=body), *tp.kernels[i + 1:]))


def _put(e: Expr, old: Expr, new: Expr) -> Expr:
    return new if e == old else rebuild(e, tuple(_put(k, old, new) for k in children(e))) if children(e) else e


def point_lost(tp: TileProgram) -> Iterator[tuple[str, TileProgram]]:
    """One point less of a tile dimension, in every tile."""
    for i, k in enumerate(tp.kernels):
        for j, d in enumerate(k.dims):
            shorter = replace(d, count=simplify(call("max", 0, d.count - 1), index=True))
            dims = (*k.dims[:j], shorter, *k.dims[j + 1:])
            yield d.name, replace(tp, kernels=(*tp.kernels[:i], replace(k, dims=dims), *tp.kernels[i + 1:]))


EDITS: tuple[Edit, ...] = (first_tile_dropped, last_tile_dropped, mask_shifted, mask_skipped, mask_always,
                           correction_skipped, accumulation_dropped)


def mutants(tp: TileProgram) -> Iterator[tuple[str, str, TileProgram]]:
    """(kind, place, program) of every mutant."""
    for edit in EDITS:
        for what, new in each(tp, edit):
            yield edit.__name__, what, new
    for whole in (heads_swapped, point_lost):
        for what, new in whole(tp):
            yield whole.__name__, what, new


def harmless(kind: str, place: str, form: str, queries: int, keys: int, tile: int) -> bool | None:
    """Does the mutant mean the same?  None: not told here, float64 decides."""
    seen = {"full": keys, "causal": min(keys, queries), "window": min(keys, WINDOW)}[form]  # by who sees most
    if kind in ("heads_swapped", "point_lost"):
        if place == "m0":  # a step ends with the last key that some query of its tile sees
            return False
        # the weight of a single key is 1 whatever its score, for all heads of its group
        return seen == 1 and (place[0] in "QK" or place in ("e", "O along g"))
    if kind == "mask_always":
        return True  # a tile that needs no mask may have one
    if form == "window":
        return None
    steps = math.ceil(seen / tile)  # of the task with the most keys
    if kind == "correction_skipped":
        return True if steps == 1 else None  # nothing to rescale, nor later below the first maximum
    if kind == "accumulation_dropped":  # nothing yet to join; and any reference serves, it need not be the greatest
        return steps == 1 or "(max)" in place
    if kind in ("mask_shifted", "mask_skipped"):
        return keys == 1 and "-1" not in place  # there is no later key to let in
    return False


# -- running and judging ----------------------------------------------------------------------------------------------


def inputs(dtype: str, queries: int, keys: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=random).to(TORCH[dtype])
            for s in ((B, J * G, queries, E_), (B, J, keys, E_), (B, J, keys, E_))]


def run(tp: TileProgram, args: list[Tensor], dtype: str) -> np.ndarray:
    shapes = {p.name: tuple(t.shape) for p, t in zip(tp.params, args, strict=False)}
    sizes = solve_sizes(tp, shapes)
    rest = [torch.full([extent(n, sizes) for n in p.shape], 77.0, dtype=TORCH[p.dtype]) for p in tp.params[len(args):]]
    with np.errstate(all="ignore"):
        python.build(python.emit(tp))(*args, *rest, *sizes.values())
    return next(t for p, t in zip(tp.params[len(args):], rest, strict=True) if p.role == "out").double().numpy()


def double(tp: TileProgram) -> TileProgram:
    """The same tiles in float64."""
    real = {"f32": "f64", "bf16": "f64", "f16": "f64"}
    return replace(
        tp, params=tuple(replace(p, dtype=real.get(p.dtype, p.dtype)) for p in tp.params),
        kernels=tuple(replace(k, tiles=tuple(replace(t, dtype=real.get(t.dtype, t.dtype)) for t in k.tiles))
                      for k in tp.kernels))


@dataclass(frozen=True)
class Judge:
    """The oracle's comparison for one set of inputs."""

    exact: np.ndarray
    scale: np.ndarray
    bound: Tolerance

    @staticmethod
    def of(form: str, args: list[Tensor], dtype: str) -> Judge:
        q, k, v = (t.double() for t in args)
        exact, scale = reference(form, q, k, v).numpy(), reference(form, q, k, v.abs()).numpy()
        own = measure(reference(form, *args).double().numpy(), exact, scale)
        bound = tolerance([dtype], dtype, elements=exact.size, length=args[1].shape[2] + E_, torch_error=own)
        return Judge(exact, scale, bound)

    def error(self, got: np.ndarray) -> Error:
        return measure(got, self.exact, self.scale)

    def accepts(self, got: np.ndarray) -> bool:
        return self.bound.admits(self.error(got))


def show(form: str, dtype: str, queries: int, keys: int, tile: int) -> set[tuple[str, str]]:
    """Judge the kernel and all its mutants; returns (kind, place) of the rejected."""
    tp = tiles(form, dtype, queries == 1, tile)
    args = inputs(dtype, queries, keys)
    judge = Judge.of(form, args, dtype)
    here = (form, dtype, queries, keys, tile)
    assert judge.accepts(run(tp, args, dtype)), (here, judge.error(run(tp, args, dtype)), judge.bound)
    assert not judge.accepts(np.zeros_like(judge.exact)), (here, judge.bound)
    wide = [t.double() for t in args]
    meant = run(double(tp), wide, "f64")
    found = set()
    for kind, place, mutant in mutants(tp):
        other = run(double(mutant), wide, "f64")
        changed = not np.array_equal(np.isnan(other), np.isnan(meant)) or measure(other, meant, judge.scale).max > 1e-9
        expected = harmless(kind, place, form, queries, keys, tile)
        assert expected is None or changed != expected, (here, kind, place, "changed" if changed else "the same")
        accepted = judge.accepts(run(mutant, args, dtype))
        assert accepted != changed, (here, kind, place, measure(other, meant, judge.scale), judge.bound)
        if changed:
            found.add((kind, place))
    return found


ALWAYS = {"heads_swapped", "point_lost", "first_tile_dropped", "last_tile_dropped"}
SEVERAL = {"correction_skipped", "accumulation_dropped"}
MASKS = {"mask_shifted", "mask_skipped"}
DECODE = [(1, keys) for keys in LENGTHS]
PREFILL = [(7, 7), (63, 64), (64, 65), (65, 63), (7, 1000), (65, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", WHERE)
def test_wrong_decoding_is_caught(form: str, dtype: str) -> None:
    found = set().union(*({kind for kind, _ in show(form, dtype, 1, keys, TILE)} for _, keys in DECODE))
    assert found >= ALWAYS | (SEVERAL if form != "causal" else set())  # with m <= p one query sees one key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", WHERE)
def test_wrong_prefill_is_caught(form: str, dtype: str) -> None:
    found = set().union(*({kind for kind, _ in show(form, dtype, *pair, TILE)} for pair in PREFILL))
    assert found >= ALWAYS | SEVERAL | (MASKS if form != "full" else set())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", WHERE)
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("queries", LENGTHS)
def test_wrong_kernels_are_caught_at_every_length(queries: int, keys: int, form: str, dtype: str) -> None:
    for tile in (32, 64, 128):
        if tile == 128 or queries * keys <= 70_000:
            show(form, dtype, queries, keys, tile)


# -- end to end: the machine's own kernels, judged by `memcomp.check` -------------------------------------------------


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _checked(patch: pytest.MonkeyPatch, dtype: str, change: Callable[[TileProgram], TileProgram]) -> bool:
    torch._dynamo.reset()
    memcomp.reset()
    with patch.context() as m:
        m.setattr("memcomp.codegen.lower.lower", lambda p: change(lower(p)))
        report = memcomp.check(causal, *inputs(dtype, 300, 300), rest="eager", strict=True)
    assert memcomp.stats()["launches"] == 1
    return report.ok


def _first(kind: str, tp: TileProgram) -> TileProgram:
    return next(new for k, place, new in mutants(tp) if k == kind and not harmless(k, place, "causal", 300, 300, 128))


NAMED = ("last_tile_dropped", "mask_shifted", "correction_skipped", "heads_swapped")
REST = sorted((ALWAYS | SEVERAL | MASKS) - set(NAMED))


@pytest.mark.parametrize("kind,dtype", [(k, "f32") for k in NAMED] + [
    pytest.param(k, d, marks=pytest.mark.slow) for d in DTYPES for k in (*NAMED, *REST) if d != "f32" or k in REST])
def test_wrong_machine_code_is_caught(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _checked(monkeypatch, dtype, lambda tp: _first(kind, tp))


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_machine_code_is_not(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _checked(monkeypatch, dtype, lambda tp: tp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", LENGTHS)
def test_an_output_of_zeros_is_wrong(keys: int, dtype: str) -> None:
    for queries in (1, 7, 65):
        judge = Judge.of("full", inputs(dtype, queries, keys), dtype)
        alone = tolerance([dtype], dtype, elements=judge.exact.size, length=keys * E_, torch_error=None)
        for wrong in (0.0, math.nan, math.inf):
            error = judge.error(np.full_like(judge.exact, wrong))
            assert not judge.bound.admits(error)
            assert not alone.admits(error)  # without torch's own error to go by, too
