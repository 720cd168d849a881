"""What capture reads means what torch computes: `interpret(region.program)` equals the graph's own float64 values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import checkpoint

import memcomp
from memcomp.capture import Refused, Region, capture, find_regions, read_exported
from memcomp.ir.errors import InputError
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse, show
from memcomp.ir.traversal import passes
from memcomp.ir.verify import verify
from memcomp.passes import PIPELINE
from memcomp.stations import rewrite

INF = math.inf


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gave, and each region's inputs as they are at its place."""

    def __init__(self, gm: fx.GraphModule, regions: list[Region]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.places = {r.anchor: r for r in regions}
        self.seen: dict[fx.Node, Any] = {}
        self.inputs: dict[str, list[torch.Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.places:
            self.inputs[self.places[n].name] = [self.env[i].clone() for i in self.places[n].inputs]
        out = super().run_node(n)
        self.seen[n] = out.clone() if isinstance(out, torch.Tensor) else out
        return out


def dynamo(fn: Callable[..., Any], args: tuple[Any, ...], dynamic: bool | None = None,
           kwargs: dict[str, Any] | None = None) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The Dynamo graph of a call and the arguments it was called with."""
    found: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inner: Any) -> Any:
            found.append((gm, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in inner)))
            return gm.forward(*inner)
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **(kwargs or {}))
    (one,) = found
    return one


def holds(gm: fx.GraphModule, args: tuple[Any, ...], tolerance: float = 1e-9) -> tuple[list[Region], list[Refused]]:
    """Find the regions of a graph and compare each with the values that the graph itself computes."""
    regions, refused = find_regions(gm)
    run = Recorder(gm, regions)
    with torch.no_grad():
        run.run(*args)
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    for region in regions:
        verify(region.program)
        assert parse(show(region.program)) == region.program
        names = [t.name for t in region.program.cascade.inputs()]
        inputs = {t: (x.double() if x.is_floating_point() else x).numpy()
                  for t, x in zip(names, run.inputs[region.name], strict=True)}
        sizes = {s: int(run.seen[n]) if isinstance(n, fx.Node) else n for s, n in region.sizes}
        assert all(order[n] < order[region.anchor] for n in region.inputs)
        got = interpret(region.program, inputs, sizes)
        for tensor, node in zip(region.program.cascade.outputs(), region.outputs, strict=True):
            want = run.seen[node].double().numpy()
            assert got[tensor.name].shape == want.shape
            np.testing.assert_allclose(got[tensor.name], want, rtol=tolerance, atol=tolerance, equal_nan=True,
                                       err_msg=str(region.program))
    return regions, [r for r in refused if not r.chain]


B, H, J, P, E = 2, 6, 2, 7, 8


def data(p: int = P, m: int = P, heads: int = J, e: int = E,
         f: int = E) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(p * 100 + m)
    q, k, v = (torch.randn(B, h, n, w, generator=g, dtype=torch.float64)
               for h, n, w in ((H, p, e), (heads, m, e), (heads, m, f)))
    return q * 3, k, v


def repeat_kv(x: torch.Tensor) -> torch.Tensor:
    b, j, m, e = x.shape
    return x[:, :, None].expand(b, j, H // j, m, e).reshape(b, H, m, e)


def causal(p: int, m: int) -> torch.Tensor:
    return torch.arange(m)[None, :] <= torch.arange(p)[:, None] + (m - p)


def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bias: Any = None, scale: float = 0.3,
            change: Callable[[torch.Tensor], torch.Tensor] = lambda s: s) -> torch.Tensor:
    s = change(torch.matmul(q, repeat_kv(k).transpose(2, 3)) * scale)
    if bias is not None:
        s = s + bias
    a = F.dropout(F.softmax(s, dim=-1), p=0.1, training=False)
    return torch.matmul(a, repeat_kv(v)).transpose(1, 2).contiguous().reshape(q.shape[0], q.shape[2], -1)


def lowest(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, torch.zeros((), dtype=torch.float64), torch.finfo(torch.float64).min)


def flat(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """bmm over merged batch and head dimensions, as decompositions write it; sqrt of the scale on both sides."""
    k, v = repeat_kv(k), repeat_kv(v)
    b, h, p, e = q.shape
    m = k.shape[2]
    s = math.sqrt(0.3)
    x = torch.bmm((q * s).expand(b, h, p, e).reshape(b * h, p, e), (k.transpose(-2, -1) * s).reshape(b * h, e, m))
    a = torch.ops.aten._safe_softmax(x.view(b, h, p, m), -1)
    y = torch.bmm(a.expand(b, h, p, m).view(b * h, p, m), v.expand(b, h, m, e).reshape(b * h, m, e))
    return y.view(b, h, p, e).permute(0, 2, 1, 3).reshape(b, p, h * e)


def pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = torch.einsum("bhpe,bhme->bhpm", q, repeat_kv(k)) / 2.5
    s = s.masked_fill(~causal(q.shape[2], k.shape[2]), -INF)
    x = (s - s.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhpm,bhmf->bphf", x / x.sum(-1, keepdim=True), repeat_kv(v))


def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    p, m = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    bias = slopes[None, :, None, None] * (m[None, :] - p[:, None])
    mask = torch.triu(torch.full((q.shape[2], k.shape[2]), -INF, dtype=q.dtype), diagonal=1)
    return written(q, k, v, bias=bias + mask)


def index_grid(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(n)
    return torch.arange(B)[:, None, None, None], x[None, None, :, None], x[None, None, None, :]


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """transformers' packed-sequence detection on positions that are an arange: folds to plain causal."""
    n = q.shape[2]
    positions = (torch.arange(n) + 0).unsqueeze(0)
    step = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    ids = (step != 1).cumsum(-1)
    b, i, j = index_grid(n)
    b = b * 0
    mask = i.new_ones((), dtype=torch.bool) & (ids[b, i] == ids[b, j]) & (j <= i)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask.expand(B, -1, n, n))


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    keep = pad.to(torch.bool)
    b, i, j = index_grid(n)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=(j <= i) & (j > i - 3) & keep[b, j])


def fused(x: torch.Tensor) -> torch.Tensor:
    """q, k and v out of one projection, as gpt2 splits them."""
    q, k, v = (t.view(B, P, H, E).transpose(1, 2) for t in x.split(H * E, dim=2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, P, H * E)


PAD = torch.ones(B, P, dtype=torch.int64)
PAD[0, :4] = 0
PAD[1, 5:] = 0
MASK = torch.rand(B, 1, P, P, generator=torch.Generator().manual_seed(5)) > 0.4
MASK[:, :, 3] = False
NOISE = torch.randn(B, 1, P, P, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
FLOAT = torch.where(MASK, NOISE, -INF)
SDPA = F.scaled_dot_product_attention


def dead_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = (q @ k.mT).masked_fill(~causal(q.shape[2], k.shape[2]).tril(-1), -INF)
    return torch.softmax(torch.cat([s, torch.full_like(s[..., :1], -INF)], -1), -1)[..., :-1] @ v


def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ repeat_kv(k).transpose(-1, -2)
    s *= 0.3
    s.masked_fill_(~causal(q.shape[2], k.shape[2]), -INF)
    return s.softmax(-1) @ repeat_kv(v)


def bias_by_setitem(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(P, P, dtype=q.dtype)
    bias[:, 3:] = -INF
    return written(q, k, v, bias=bias)


def new_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kc: torch.Tensor, vc: torch.Tensor,
              at: torch.Tensor) -> torch.Tensor:
    """The cache is written first: the region must read the new keys."""
    kc.index_copy_(2, at, k)
    vc.index_copy_(2, at, v)
    mask = torch.arange(kc.shape[2])[None, None, None] <= at[None, None, :, None]
    return SDPA(q, repeat_kv(kc), repeat_kv(vc), attn_mask=mask)


def written_between(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The keys are scaled, then written: the region must read the old ones."""
    scaled = k * 0.5
    k.add_(1.0)
    return SDPA(q, repeat_kv(scaled), repeat_kv(v)) + k.sum()


def square_root_of_a_size(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ repeat_kv(k).transpose(-1, -2) / math.sqrt(q.size(-1)), -1) @ repeat_kv(v)


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-1, -2)) * torch.ones(P, P, dtype=q.dtype).tril()) @ v


def two_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q[..., :5] @ k[..., :5].transpose(-1, -2) + q[..., 5:] @ k[..., 5:].transpose(-1, -2)
    return torch.softmax(s, -1) @ v


def weights_too(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.softmax(q @ k.transpose(-1, -2), -1)
    return a @ v, a.cumsum(-1)


def weights_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    a = torch.softmax(q @ k.transpose(-1, -2), -1)
    return a @ (a @ v)


def by_log_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2)
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return SDPA(q, k, v, attn_mask=causal(P, P) & (torch.arange(P) > torch.arange(P)[:, None] - 3))


def sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """One more score per head that takes weight and gives no value."""
    s = q @ repeat_kv(k).transpose(-1, -2) * 0.3 + lowest(causal(P, P))
    s = torch.cat([s, sink.reshape(1, -1, 1, 1).expand(B, -1, P, 1)], -1)
    s = s - s.max(-1, keepdim=True).values
    return F.softmax(s, -1)[..., :-1] @ repeat_kv(v)


def alibi_by_power(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    slopes = torch.pow(2.0, -(torch.arange(H) + 1) / H).double()
    return written(q, k, v, bias=slopes[:, None, None] * torch.arange(P) + lowest(causal(P, P)))


def static_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    mask = torch.arange(k.shape[2])[None, None, None, :] <= at[None, None, :, None]
    return SDPA(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)


def softcap(s: torch.Tensor) -> torch.Tensor:
    return torch.tanh(s / 5) * 5


def lower_only(s: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(torch.tril(torch.ones(P, P)) == 0, -INF)


def by_method(s: torch.Tensor) -> torch.Tensor:
    return s.where(causal(*s.shape[-2:]), -INF)


def small_integers(s: torch.Tensor) -> torch.Tensor:
    """Integers of 8 bits that wrap around, when converted and when computed with."""
    n = torch.arange(s.shape[-1])
    wrapped = (n * 100).to(torch.int8), n.to(torch.uint8) - 3, -((n - 128).to(torch.int8))
    return s + sum(w.double() for w in wrapped) / 100


def either(s: torch.Tensor) -> torch.Tensor:
    n = torch.arange(s.shape[-1])
    return s.masked_fill(torch.maximum(n > n[:, None], n == 0), -1e3)


def bias_of(make: Callable[..., torch.Tensor], **kw: Any) -> Callable[..., torch.Tensor]:
    """`written` with a bias made inside the traced function (from the mask argument, if there is one)."""
    return lambda q, k, v, *mask: written(q, k, v, bias=make(*mask), **kw)


def infinite(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0.0, -INF)


HEADS = data(heads=H)
ONE = tuple(t[0, 0] for t in data(5, 8))
CACHE = torch.randn(B, J, 9, E, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
AT = torch.tensor([4, 5])
# name: function, inputs, a part that the program's text must hold (lengths fixed)
CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str]] = {
    "sdpa": (lambda q, k, v: SDPA(q, k, v), HEADS, ""),
    "sdpa other lengths": (lambda q, k, v: SDPA(q, k, v), data(3, 9, H, 8, 5), ""),
    "sdpa no rows": (lambda q, k, v: SDPA(q, k, v), data(0, 5, H), ""),
    "sdpa no keys": (lambda q, k, v: SDPA(q, k, v), data(5, 0, H), ""),
    "sdpa causal": (lambda q, k, v: SDPA(q, k, v, is_causal=True), HEADS, "where m <= p"),
    "sdpa causal top left": (lambda q, k, v: SDPA(q, k, v, is_causal=True), data(4, 9, H), "where m <= p"),
    "sdpa causal more rows": (lambda q, k, v: SDPA(q, k, v, is_causal=True), data(9, 4, H), "where m <= p"),
    "sdpa scale": (lambda q, k, v: SDPA(q, k, v, scale=0.7), HEADS, "* 0.7"),
    "sdpa gqa": (lambda q, k, v: SDPA(q, k, v, enable_gqa=True, is_causal=True), data(), "K[b, h//3, m, e]"),
    "sdpa repeat_kv": (lambda q, k, v: SDPA(q, repeat_kv(k), repeat_kv(v)), data(), "V[b, h//3, m, f]"),
    "sdpa repeat_interleave": (lambda q, k, v: SDPA(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, 1)),
                               data(), "V[b, h//3, m, f]"),
    "sdpa bool mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), (*HEADS, MASK), "where mask[b, 0, p, m]"),
    "sdpa float mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), (*HEADS, FLOAT), "bias[b, 0, p, m]"),
    "sdpa one head": (lambda q, k, v: SDPA(q, k, v), ONE, ""),
    "sdpa window": (windowed, HEADS, "m <= p and p <= m + 2"),
    "sdpa packed": (packed, data(), "where m <= p"),
    "sdpa padded window": (padded, (*data(), PAD), "ids[b, m] != 0"),
    "sdpa static cache": (static_cache, (*data(2, 9), AT), "m <= ids[p]"),
    "sdpa new cache": (new_cache, (*data(2, 2), CACHE, CACHE + 1, AT), "m <= ids[p]"),
    "sdpa written between": (written_between, data(), ""),
    "sdpa one projection": (fused, (torch.randn(B, P, 3 * H * E, dtype=torch.float64),), ""),
    "written": (written, data(), "K[b, h//3, m, e]"),
    "written root": (square_root_of_a_size, data(), "/ 2.828"),
    "written causal inf": (bias_of(lambda: infinite(causal(P, P))), data(), "where m <= p"),
    "written causal lowest": (bias_of(lambda: lowest(causal(P, P))), data(), "where m <= p"),
    "written later rows": (bias_of(lambda: lowest(causal(4, 9))), data(4, 9), "where m <= p + 5"),
    "written dead rows lowest": (bias_of(lowest), (*data(), MASK), "where(mask"),
    "written dead rows inf": (bias_of(infinite), (*data(), MASK), "where mask"),
    "written float mask": (bias_of(lambda m: m), (*data(), FLOAT), "bias"),
    "written softcap": (bias_of(lambda: lowest(causal(P, P)), change=softcap), data(), "tanh"),
    "written tril": (lambda q, k, v: written(q, k, v, change=lower_only), data(), "where m <= p"),
    "written where method": (lambda q, k, v: written(q, k, v, change=by_method), data(), "where m <= p"),
    "written small integers": (lambda q, k, v: written(q, k, v, change=small_integers), data(), "% 256"),
    "written remainder": (lambda q, k, v: written(q, k, v, change=lambda s: s + s % 0.25 + s // 2), data(), "floor("),
    "written greatest of truths": (lambda q, k, v: written(q, k, v, change=either), data(), "m == 0"),
    "written window": (bias_of(lambda: lowest(causal(P, P) & ~causal(P, P).tril(-3))), data(), "m <= p"),
    "written flat": (flat, data(), "K[b, h//3, m, e]"),
    "written pieces": (pieces, data(), "where m <= p"),
    "written alibi": (alibi, (*data(), torch.rand(H, dtype=torch.float64)), "bias[h]"),
    "written alibi by power": (alibi_by_power, data(), "bias[h] * real(m)"),
    "written sinks": (sinks, (*data(), torch.rand(H, dtype=torch.float64)), "exp(bias[h]"),
    "written dead sink": (dead_sink, HEADS, ""),
    "written one head": (lambda q, k, v: torch.softmax(q @ k.T / 3, -1) @ v, ONE, ""),
    "written in place": (in_place, data(), "where m <= p"),
    "written bias by setitem": (bias_by_setitem, data(), "bias[p, m]"),
    "linear attention": (linear_attention, HEADS, "where m <= p"),
    "two score parts": (two_scores, HEADS, ""),
    "weights used too": (weights_too, HEADS, "out O0[B, H, P, M]"),
    "weights used twice": (weights_twice, HEADS, ""),
    "weights used where not a number": (lambda q, k, v: (lambda p: p @ v + torch.xlogy(p, p).sum(-1, keepdim=True))(
        (q @ k.mT).softmax(-1)), HEADS, "nan"),
    "log-sum-exp": (by_log_sum, HEADS, ""),
}


def fresh(args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(a.clone() for a in args)


@pytest.mark.parametrize("name", CASES)
def test_dynamo(name: str) -> None:
    fn, args, part = CASES[name]
    regions, refused = holds(*dynamo(fn, fresh(args), False))
    assert len(regions) == 1 and not refused
    assert part in str(regions[0].program)


LONG = [n for n in CASES if n.startswith("sdpa")] + [
    "written", "written root", "written causal lowest", "written flat", "written alibi", "written sinks",
    "linear attention"]


@pytest.mark.parametrize("name", LONG)
def test_dynamic(name: str) -> None:
    fn, args, _ = CASES[name]
    regions, refused = holds(*dynamo(fn, fresh(args), True))
    assert len(regions) == 1 and not refused


def test_no_graph_is_an_error() -> None:
    def prints(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(InputError, match="one graph"):
        capture(prints, torch.ones(2))


def test_a_length_that_no_input_shows() -> None:
    def after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int) -> torch.Tensor:
        mask = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + past
        return SDPA(q, k, v, attn_mask=mask)

    (region,), refused = holds(*dynamo(after, (*data(3, 11, H), 6), True))
    assert not refused and len(region.sizes) == 1
    assert f"m <= p + {region.sizes[0][0]}" in str(region.program)


@pytest.mark.parametrize("name", CASES)
def test_export(name: str) -> None:
    fn, args, part = CASES[name]
    regions, refused = holds(capture(fn, *fresh(args), level="export"), fresh(args))
    assert len(regions) == 1 and not refused
    assert part in str(regions[0].program)


class Module(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("sdpa") and " no " not in n])
def test_decomposed(name: str) -> None:
    """After the core ATen decompositions, where one attention operator has become bmm and normalisation."""
    fn, args, _ = CASES[name]
    with torch.no_grad():
        ep = torch.export.export(Module(fn), fresh(args), strict=False).run_decompositions()
    regions, refused = holds(read_exported(ep), fresh(args))
    assert len(regions) == 1 and not refused


def test_dead_rows_are_what_torch_gives() -> None:
    """Row 3 of MASK has no live point: zero, not a number, and the plain mean."""
    for name, check in (("sdpa bool mask", lambda o: (o == 0).all()),
                        ("written dead rows inf", lambda o: o.isnan().all()),
                        ("written dead rows lowest", lambda o: o.isfinite().all() and (o != 0).all())):
        fn, args, _ = CASES[name]
        gm, inner = dynamo(fn, args, False)
        (region,), _ = holds(gm, inner)
        run = Recorder(gm, [region])
        run.run(*inner)
        names = [t.name for t in region.program.cascade.inputs()]
        got = torch.from_numpy(interpret(region.program, dict(zip(
            names, (x.numpy() for x in run.inputs[region.name]), strict=True)))["O"])
        assert check(got[:, :, 3] if name.startswith("sdpa") else got[:, 3]), name


def scan_between(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).cumsum(-1).softmax(-1) @ v


def scan_beside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2)
    return (s + s.cumsum(-1)).softmax(-1) @ v


def written_inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2)
    k.add_(1.0)
    v.mul_(2.0)
    return s.softmax(-1) @ v + k.sum()


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v, "dropout is active"),
    "dropout in sdpa": (lambda q, k, v: SDPA(q, k, v, dropout_p=0.5), "dropout is active"),
    "scan between": (scan_between, "cumsum stands between"),
    "scan beside": (scan_beside, "cumsum stands between"),
    "remainder": (lambda q, k, v: ((q @ k.mT) % 0.1).softmax(-1) @ v, "exact only by a power of two"),
    "bits": (lambda q, k, v: (q @ k.mT).view(dtype=torch.int64).double().softmax(-1) @ v, "view as another dtype"),
    "checkpoint": (lambda *x: checkpoint(SDPA, *x, use_reentrant=False), "it is inside tag_activation_checkpoint"),
    "branch": (lambda *x: torch.cond(x[0].sum() > 0, SDPA, lambda q, k, v: q + 0, x), "it is inside cond"),
    "input written inside": (written_inside, "is written while the region would read it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fn, why = REFUSED[name]
    gm, _ = dynamo(fn, fresh(HEADS), False)
    before = str(gm.graph)
    regions, refused = find_regions(gm)
    if name == "scan between":  # what follows the scan is a region of its own
        assert len(regions) == 1 and not refused and str(gm.graph) == before
        return
    assert not regions and len(refused) == 1 and why in refused[0].why
    assert __file__.rpartition("/")[2] in refused[0].where


def test_norms_of_matrices_and_the_greatest_of_long_integers_stay() -> None:
    """A matrix's norm is not that of its elements, and a running maximum is a real number of 24 bits."""
    x = torch.randn(5, 4)
    for ord, many in ((None, 1), (2, 0), (1, 0), (INF, 0)):
        found = capture(lambda x, p=ord: x / torch.linalg.norm(x, p), x, level="export")
        assert len(find_regions(found, "all")[0]) == many
    for dtype, many in ((torch.int64, 0), (torch.int32, 0), (torch.int16, 1), (torch.bool, 1)):
        found, _ = dynamo(lambda n, x: (x * n.amax(-1, keepdim=True)).sum(-1), (x.to(dtype), x))
        regions, _ = find_regions(found, "all")
        assert sum("max" in str(r.program) or "or{" in str(r.program) for r in regions) == many


@pytest.mark.parametrize("short", (False, True))
def test_a_row_without_live_points_is_known_by_its_maximum(short: bool) -> None:
    """As torch and TVM write attention out: some score is not -inf (or the greatest of integers is 1) just if the
    greatest is not, and what that asks of a row is asked where the row is finished: one pass."""
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT * 0.3 + bias
        live = (s == -INF).logical_not()
        some = live.to(torch.int8).amax(-1, keepdim=True).bool() if short else live.any(-1, keepdim=True)
        return torch.where(some.logical_not(), 0.0, s.softmax(-1)) @ v

    args = *(torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7)), torch.randn(5, 7, dtype=torch.float64)
    args[3][2], args[3][3, 1:] = -INF, -INF
    gm, given = dynamo(attention, args)
    (region,), _ = holds(gm, given)
    names = PIPELINE[:PIPELINE.index("reduce_passes") + 1]
    after = rewrite(region.program, observe=lambda *_: None, names=names)
    assert passes(after)["K", "M"] == passes(after)["V", "M"] == 1


@pytest.mark.parametrize("outside", (-INF, torch.finfo(torch.float32).min, -1e9))
def test_a_top_k_shows_what_a_mask_put_there(outside: float) -> None:
    """Rows of fewer live points than results: the rest are what the mask wrote, not the identity."""
    def best(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT
        return s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), outside).topk(4)[0]

    gm, args = dynamo(best, (torch.randn(2, 7, 8), torch.randn(2, 7, 8)))
    assert len(holds(gm, args, 1e-5)[0]) == 1


LOW = torch.finfo(torch.float32).min


@pytest.mark.parametrize("hide", (
    lambda s, pad, causal: s.masked_fill(~pad, -INF).masked_fill(~causal, LOW),
    lambda s, pad, causal: s.masked_fill(~causal, LOW).masked_fill(~pad, -INF),
    lambda s, pad, causal: s + torch.where(pad, 0.0, -INF) + torch.where(causal, 0.0, LOW),
    lambda s, pad, causal: torch.where(causal, s + torch.where(pad, 0.0, -INF), LOW),
))
def test_rows_that_are_minus_infinity_wherever_a_mask_leaves_them_live(hide: Callable[..., torch.Tensor]) -> None:
    """Their greatest number is what the other mask wrote: it is no guard where -inf may stand behind it."""
    def layer(q: torch.Tensor, k: torch.Tensor, pad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = q @ k.mT
        s = hide(s, pad, torch.ones(s.shape[-2:], dtype=torch.bool).tril())
        return s.softmax(-1) @ k, s.logsumexp(-1), s.amax(-1), *s.max(-1)

    q, k = torch.randn(2, 2, 7, 8).unbind()
    for lost in (0, 1, 3):
        gm, args = dynamo(layer, (q, k, torch.arange(7) >= lost))
        holds(gm, args, 1e-5)


def test_a_table_is_told_from_the_places_by_the_operator() -> None:
    """torch.nn.functional takes the places first, the operator the table; both may be integers."""
    table = torch.arange(88).reshape(11, 8)
    i, q = torch.tensor([[3, 1, 10, 0]] * 2), torch.randn(2, 5, 8)
    for look in (F.embedding, lambda i, t: F.embedding(i, weight=t), lambda i, t: torch.embedding(t, i),
                 lambda i, t: torch.ops.aten.embedding.default(t, i)):
        gm, args = dynamo(lambda i, t, q, look=look: (q @ look(i, t).float().mT * 0.01).softmax(-1) @ q[:, :4],
                          (i, table, q))
        (region,), _ = holds(gm, args, 1e-5)
        assert len(region.inputs) == 3


@pytest.mark.parametrize("write", (
    lambda s, x: torch.select_scatter(s, x[..., 0], -1, 7), lambda s, x: torch.select_scatter(s, x[..., 0], -1, -8),
    lambda s, x: torch.slice_scatter(s, x, -1, 1, 5), lambda s, x: torch.slice_scatter(s, x[:1], -1, 1, 4),
))
def test_what_torch_does_not_write_is_left_to_torch(write: Callable[..., torch.Tensor]) -> None:
    """Example values do not show these errors: the region begins after them, and torch raises them."""
    seen: list[fx.GraphModule] = []
    compiled = torch.compile(lambda s, x: (s.mT @ write(s, x)).softmax(-1) @ s.mT,
                             backend=lambda gm, _: seen.append(gm) or gm)
    with pytest.raises((RuntimeError, IndexError), match="slice|range"):
        compiled(torch.randn(2, 5, 7), torch.randn(2, 5, 3))
    (region,), _ = find_regions(seen[0])
    assert any("scatter" in str(n.target) for n in region.inputs)


def test_linear_layers_stay() -> None:
    """Contractions with parameters are no regions; of what stands between them only the passes are told."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Softmax(-1), torch.nn.Linear(8, 8))
    gm, _ = dynamo(net, (torch.randn(2, 3, 8),))
    regions, (told,) = find_regions(gm)
    assert not regions and told.chain and told.why.startswith("2 passes over M in any form")


def tiny(kind: str, attention: str) -> Any:
    transformers = pytest.importorskip("transformers")
    known: dict[str, Any] = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=128)
    if kind in ("llama", "gemma2"):
        known.update(num_key_value_heads=2, head_dim=8)
    if kind == "t5":
        known = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    if kind == "deepseek_v3":
        known.update(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, kv_lora_rank=16,
                     q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=1, topk_group=1,
                     first_k_dense_replace=1, num_key_value_heads=4)
    auto = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}.get(kind, "AutoModelForCausalLM")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **known)
    return getattr(transformers, auto).from_config(config, attn_implementation=attention).eval()


TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 12, dtype=torch.int64)
LEFT[0, :3] = 0
# model, attention, keywords of the call, regions, a part of the last program
MODELS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("llama", "sdpa", {"use_cache": False}, 2, "where m <= p"),
    ("llama", "eager", {"attention_mask": LEFT}, 2, "m <= p and ids[b, m] != 0"),
    ("gemma2", "eager", {}, 2, "tanh"),
    ("gpt2", "sdpa", {"attention_mask": LEFT}, 2, "m <= p and ids[b, m] != 0"),
    ("bert", "sdpa", {"attention_mask": LEFT}, 2, "where ids[b, m] != 0"),
    ("t5", "eager", {"decoder_input_ids": TOKENS, "use_cache": False}, 6, ""),
    ("deepseek_v3", "eager", {}, 2, "where m <= p"),
]


@pytest.mark.parametrize("kind, attention, kwargs, count, part", MODELS, ids=[f"{m[0]} {m[1]}" for m in MODELS])
def test_transformers(kind: str, attention: str, kwargs: dict[str, Any], count: int, part: str,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gm, inner = dynamo(tiny(kind, attention), (TOKENS,), None, kwargs)
    regions, refused = holds(gm, inner, 2e-5)
    assert len(regions) == count and not refused
    assert part in str(regions[-1].program)
    assert len({r.source for r in regions}) == count


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_transformers_decode(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step with a cache: symbolic lengths, the cache written before it is read, KV heads shared."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny("llama", "sdpa")
    from transformers import DynamicCache, StaticCache

    cache = StaticCache(config=model.config, max_cache_len=24) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)

    def step(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        return model(tokens, past_key_values=cache).logits

    regions, refused = holds(*dynamo(step, (TOKENS[:, :3], cache), True), 2e-5)
    assert len(regions) == 2 and not refused
    text = str(regions[-1].program)
    assert "K[b, h//2, m, e]" in text and ("m <= ids[p]" if static else "where m + P <= p + M") in text
    assert not regions[-1].sizes


def test_transformers_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny("llama", "sdpa")
    with torch.no_grad():
        gm = capture(model, TOKENS, level="export", kwargs={"use_cache": False}, dynamic=True)
    regions, refused = holds(gm, (TOKENS, False), 2e-5)
    assert len(regions) == 2 and not refused
    assert all("where m <= p" in str(r.program) and "rank M = P" in str(r.program) for r in regions)
    assert [r.source.split()[0] for r in regions] == [f"model.layers.{k}.self_attn" for k in (0, 1)]


def test_numbers_made_of_fewer_bytes_are_made_where_they_are_read() -> None:
    """Codes, in any arithmetic over places that proves its shifts; for many rows they are numbers in memory instead."""
    def attention(q: Any, k: Any, v: Any, s: Any) -> Any:
        e = torch.arange(32)

        def numbers(codes: Any) -> Any:
            return ((codes[..., e // 2] >> (e % 2 * 4)) & 15) * s[..., e // 16] - s[..., e // 16]

        return F.scaled_dot_product_attention(q, numbers(k), numbers(v))

    def stored(rows: int) -> set[str]:
        codes = torch.randint(0, 256, (2, 1, 64, 16), dtype=torch.uint8)
        given = (torch.randn(1, 1, rows, 32).expand(2, 1, rows, 32), codes, codes.flip(2), torch.rand(2, 1, 64, 2))
        torch._dynamo.reset()
        assert rows > 1 or memcomp.check(attention, *given).ok
        torch._dynamo.reset()
        (region,) = memcomp.explain(attention, *given).regions
        return {t.dtype for t in region.program.cascade.inputs()}

    assert "u8" in stored(1) and stored(64) == {"f32"}
