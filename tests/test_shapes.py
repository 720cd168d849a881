"""The shapes of attention: groups, head sizes, lengths, dtypes, masks, layouts, rows with no key, nothing at all.

Everything is compiled with `strict` and compared with the same function in float64; the bound is the oracle's.  The
fast part is a covering subset of the product, `make sweep` runs the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memcomp
from memcomp.backend import memcomp as backend
from memcomp.oracle import measure, tolerance

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
GROUPS = (1, 2, 3, 5, 7, 8)
HEADS = ((16, 16), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
LENGTHS = (1, 7, 63, 64, 65, 1000, 4096)
WINDOW = 50
LIGHT = 70_000  # scores per head that the fast part computes at most


pytestmark = pytest.mark.usefixtures("fresh", "no_grad")


def full(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def causal(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def window(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The last WINDOW keys up to the query's own, the last query being at the last key."""
    at = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
    key = torch.arange(k.shape[2])[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(key <= at) & (key > at - WINDOW), **options)


FORMS: dict[str, Callable[..., Tensor]] = {"full": full, "causal": causal, "bool": masked, "float": masked,
                                           "window": window}


def grouped(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        return fn(q, k, v, *mask, enable_gqa=True)

    return run


def repeated(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        b, j, m, e = k.shape
        g = q.shape[1] // j
        k = k[:, :, None].expand(b, j, g, m, e).reshape(b, j * g, m, e)
        v = v[:, :, None].expand(b, j, g, m, v.shape[-1]).reshape(b, j * g, m, v.shape[-1])
        return fn(q, k, v, *mask)

    return run


SPELLINGS = {"enable_gqa": grouped, "repeat_kv": repeated}


def inputs(form: str, queries: int, keys: int, *, group: int = 1, heads: tuple[int, int] = (16, 16), batch: int = 2,
           kv: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    e, f = heads
    shapes = (batch, group * kv, queries, e), (batch, kv, keys, e), (batch, kv, keys, f)
    made = [torch.randn(s) for s in shapes]
    if form == "bool":
        made.append(torch.rand(batch, 1, queries, keys) < 0.6)
    if form == "float":
        made.append(torch.randn(batch, 1, queries, keys))
    return [t.to(dtype) if t.is_floating_point() else t for t in made]


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(fn, backend=backend, options={"rest": "eager", "strict": True}, fullgraph=True)


def compare(got: Tensor, fn: Callable[..., Tensor], args: Sequence[Tensor], what: object = None) -> None:
    """`got` is `fn(*args)`, as near to float64 as the oracle asks; args[2] holds the values that are averaged."""
    own = fn(*args)
    exact = fn(*(t.double() if t.is_floating_point() else t for t in args))
    absolute = fn(*(t.double().abs() if i == 2 else t.double() if t.is_floating_point() else t
                    for i, t in enumerate(args)))
    name = next(n for n, d in DTYPES.items() if d == own.dtype)
    assert got.dtype == own.dtype and got.shape == own.shape
    if not got.numel():
        return
    scale = absolute.numpy()
    bound = tolerance([name], name, elements=own.numel(), length=args[1].shape[2] + args[0].shape[3],
                      torch_error=measure(own.double().numpy(), exact.numpy(), scale))
    error = measure(got.double().numpy(), exact.numpy(), scale)
    assert bound.admits(error), (what, error, bound)


def check_lengths(fn: Callable[..., Tensor], form: str, pairs: Sequence[tuple[int, int]], **shape: Any) -> None:
    """One compilation for all lengths but 1, one kernel per call, no fallback."""
    fast = compiled(fn)
    for queries, keys in pairs:
        args = inputs(form, queries, keys, **shape)
        for t in args[:3]:
            if t.shape[2] > 1:
                torch._dynamo.mark_dynamic(t, 2)
        for t in args[3:]:
            for d in (2, 3):
                if t.shape[d] > 1:
                    torch._dynamo.mark_dynamic(t, d)
        compare(fast(*args), fn, args, (queries, keys))
    found = memcomp.stats()
    assert found["fallbacks"] == {} and found["launches"] >= len(pairs)
    kinds = {(queries == 1, keys == 1) for queries, keys in pairs}
    assert found["graphs"] == found["regions"] == len(kinds) and found["kernels"] <= len(kinds)


def covering(factors: dict[str, Sequence[Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows that show every pair of values of the named pairs of factors (greedy, deterministic)."""
    missing = {((a, x), (b, y)): None for a, b in pairs for x in factors[a] for y in factors[b]}

    def gain(row: dict[str, Any], name: str, x: Any) -> tuple[int, int]:
        new = row | {name: x}
        return (sum(new.get(a) == u and new.get(b) == w for (a, u), (b, w) in missing),
                sum((name, x) in pair for pair in missing))

    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name, values in factors.items():
            if name not in row:
                gains = [gain(row, name, x) for x in values]
                row[name] = values[gains.index(max(gains))]
        missing = {k: None for k in missing if not all(row[a] == x for a, x in k)}
        rows.append(row)
    return rows


FACTORS: dict[str, Sequence[Any]] = {"dtype": tuple(DTYPES), "heads": HEADS, "form": tuple(FORMS), "group": GROUPS,
                                     "spelling": tuple(SPELLINGS)}
SPELT = [(x, "spelling") for x in FACTORS if x != "spelling"]
PAIRS = [("dtype", "heads"), ("dtype", "form"), ("dtype", "group"), *SPELT]
PREFILL = covering(FACTORS, PAIRS)
DECODE = [{name: values[i % len(values)] for name, values in FACTORS.items()} for i in range(len(HEADS))]


def _id(row: dict[str, Any]) -> str:
    return "-".join("/".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in row.values())


def _run(row: dict[str, Any], pairs: Sequence[tuple[int, int]], **shape: Any) -> None:
    fn = SPELLINGS[row["spelling"]](FORMS[row["form"]])
    check_lengths(fn, row["form"], pairs, group=row["group"], heads=row["heads"], dtype=DTYPES[row["dtype"]], **shape)


@pytest.mark.parametrize("row", PREFILL, ids=_id)
def test_prefill(row: dict[str, Any]) -> None:
    at = PREFILL.index(row)
    pairs = [x for x in product(LENGTHS[1:], LENGTHS[1:]) if x[0] * x[1] <= LIGHT]
    _run(row, [x for i, x in enumerate(pairs) if (i - at) % 8 == 0], batch=1 + at % 2)


@pytest.mark.parametrize("row", DECODE, ids=_id)
def test_decode(row: dict[str, Any]) -> None:
    _run(row, [(1, keys) for keys in LENGTHS[1:]])


@pytest.mark.parametrize("row", DECODE[:3], ids=_id)
def test_one_key(row: dict[str, Any]) -> None:
    _run(row, [(1, 1), (65, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_lengths(dtype: str, form: str, heads: tuple[int, int]) -> None:
    """Each group and spelling in turn: with all of them it would take days."""
    turn = (list(DTYPES).index(dtype) * len(FORMS) + list(FORMS).index(form)) * len(HEADS) + HEADS.index(heads)
    group, spelling = list(product(GROUPS, SPELLINGS))[turn % (len(GROUPS) * len(SPELLINGS))]
    torch._dynamo.reset()
    memcomp.reset()
    row = {"dtype": dtype, "form": form, "heads": heads, "group": group, "spelling": spelling}
    _run(row, list(product(LENGTHS, LENGTHS)), batch=1, kv=1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features outside": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one key for all": lambda t: t[:, :, :1].expand_as(t),
    "one head for all": lambda t: t[:, :1].expand_as(t),
    "one batch for all": lambda t: t[:1].expand_as(t),
    "one feature for all": lambda t: t[..., :1].expand_as(t),
    "one element in": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "every second feature": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
    "every second position": lambda t: torch.stack([t, -t], -2).flatten(2, 3)[:, :, ::2],
    "inside a larger one": lambda t: F.pad(t, (1, 3, 2, 1))[:, :, 2:-1, 1:-3],
}


@pytest.mark.parametrize("queries,dtype", [(70, "f32"), (70, "bf16"), (70, "f16"), (1, "f32"),
                                           pytest.param(1, "bf16", marks=pytest.mark.slow),
                                           pytest.param(1, "f16", marks=pytest.mark.slow)])
def test_layouts(queries: int, dtype: str) -> None:
    cases = ((0,), (1, 2)) if dtype == "f32" else ((0, 1, 2),)
    for name, lay in LAYOUTS.items():
        torch._dynamo.reset_code_caches()
        for which in cases:
            fast = compiled(full)
            args = inputs("full", queries, 70, heads=(40, 40), dtype=DTYPES[dtype])
            args = [lay(t) if i in which else t for i, t in enumerate(args)]
            compare(fast(*args), full, args, (name, which))
    assert memcomp.stats()["fallbacks"] == {} and memcomp.stats()["launches"] == len(cases) * len(LAYOUTS)
    assert memcomp.stats()["kernels"] == 1


@pytest.mark.parametrize("shape,form", [((1, 1, 33, 70), "bool"), ((2, 1, 1, 70), "bool"), ((2, 4, 33, 70), "bool"),
                                        ((33, 70), "bool"), ((1, 1, 33, 1), "bool"), ((2, 4, 33, 70), "float"),
                                        ((1, 1, 33, 1), "float")], ids=str)
def test_masks_of_any_shape_and_layout(shape: tuple[int, ...], form: str) -> None:
    fn = grouped(masked)
    fast = compiled(fn)
    whole = torch.rand(shape) < 0.6 if form == "bool" else torch.randn(shape)
    shifted = torch.cat([whole.flatten()[:1], whole.flatten()])[1:].view(shape)
    for mask in (whole, shifted, whole.expand(2, 4, 33, 70)):
        args = [*inputs("full", 33, 70, group=2), mask]
        compare(fast(*args), fn, args, tuple(mask.shape))
    assert memcomp.stats()["fallbacks"] == {} and memcomp.stats()["launches"] == 3


def plain(fill: Callable[[Tensor], float], additive: bool) -> Callable[..., Tensor]:
    """Attention as one writes it down, dead scores filled with, or added to, a value."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        low = fill(s)
        s = s + torch.zeros_like(s).masked_fill(~mask, low) if additive else s.masked_fill(~mask, low)
        return torch.softmax(s, -1) @ v

    return run


def sdpa_float(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros_like(mask, dtype=q.dtype).masked_fill(
        ~mask, float("-inf")))


def infinite(_: Tensor) -> float:
    return float("-inf")


def lowest(s: Tensor) -> float:
    return torch.finfo(s.dtype).min


DEAD: dict[str, tuple[Callable[..., Tensor], str]] = {
    "SDPA, bool": (masked, "zero"),
    "SDPA, -inf": (sdpa_float, "zero"),
    "filled with -inf": (plain(infinite, False), "nan"),
    "added -inf": (plain(infinite, True), "nan"),
    "filled with the lowest": (plain(lowest, False), "mean"),
    "added the lowest": (plain(lowest, True), "mean"),
}


def _rows_without_a_key(form: str, dtype: str, sizes: Sequence[tuple[int, int]]) -> None:
    fn, meaning = DEAD[form]
    fast = compiled(fn)
    for queries, keys in sizes:
        args = inputs("bool", queries, keys, dtype=DTYPES[dtype])
        mask = args[3]
        mask[0, :, 0] = False  # no key
        if queries > 4:
            mask[0, :, 1], mask[0, :, 2] = True, torch.arange(keys) < keys // 2
            mask[0, :, 3], mask[0, :, 4] = torch.arange(keys) >= keys - 1, torch.arange(keys) == 0
        got = fast(*args)
        compare(got, fn, args, (queries, keys))
        row = got[0, :, 0].double()
        want = {"zero": torch.zeros_like(row), "nan": torch.full_like(row, torch.nan),
                "mean": args[2][0].double().mean(-2)}[meaning]
        torch.testing.assert_close(row, want, rtol=1e-2, atol=1e-2, equal_nan=True)
    assert memcomp.stats()["fallbacks"] == {} and memcomp.stats()["launches"] >= len(sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", DEAD)
def test_rows_without_a_key(form: str, dtype: str) -> None:
    _rows_without_a_key(form, dtype, [(40, 300), (1, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", DEAD)
def test_rows_without_a_key_of_any_length(form: str, dtype: str) -> None:
    _rows_without_a_key(form, dtype, list(product((1, 5, 65, 1000), (1, 3, 64, 65, 1000))))


NOTHING = ((0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0), (0, 0, 0), (2, 1, 0))
EMPTY = {"full": full, "causal": causal, "window": window, "own": plain(infinite, False)}


# each extent of nothing in two forms of four, each form with three extents; `make sweep` takes all
@pytest.mark.parametrize("fn,batch,queries,keys", [
    pytest.param(fn, *shape, id=f"{name}-{'-'.join(map(str, shape))}", marks=[pytest.mark.slow] * ((i + j) % 2))
    for i, (name, fn) in enumerate(EMPTY.items()) for j, shape in enumerate(NOTHING)])
def test_nothing(fn: Callable[..., Tensor], batch: int, queries: int, keys: int) -> None:
    args = inputs("bool" if fn not in (full, causal, window) else "full", queries, keys, batch=batch)
    got, want = compiled(fn)(*args), fn(*args)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, equal_nan=True)
    assert memcomp.stats()["fallbacks"] == {}


@pytest.mark.parametrize("changes", [[(4, 2, 16), (4, 2, 32)], [(4, 2, 16), (6, 3, 16)]], ids=["head size", "heads"])
def test_another_number_that_kernels_know_is_another_graph(changes: list[tuple[int, int, int]]) -> None:
    """torch makes a symbol of what it sees change: a head size or a group does not stay one."""
    fn = grouped(causal)
    for dynamic in (None, True):
        torch._dynamo.reset()
        memcomp.reset()
        fast = torch.compile(fn, backend=backend, options={"rest": "eager", "strict": True}, dynamic=dynamic)
        for heads, kv, e in changes:
            args = inputs("full", 20, 20, group=heads // kv, kv=kv, heads=(e, e))
            compare(fast(*args), fn, args, (heads, kv, e))
        assert memcomp.stats()["fallbacks"] == {} and memcomp.stats()["launches"] == len(changes)


def test_the_fast_part_shows_what_it_says() -> None:
    for rows in (PREFILL, DECODE):
        for name, values in FACTORS.items():
            assert {r[name] for r in rows} == set(values)
    for a, b in PAIRS:
        assert {(r[a], r[b]) for r in PREFILL} == set(product(FACTORS[a], FACTORS[b]))
