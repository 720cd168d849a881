"""What capture reads means what torch computes: `interpret(region.program)` equals the graph's own values in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx

from memcomp.capture import Refused, Region, capture, find_regions, read_exported
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse, show
from memcomp.ir.verify import verify

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
    return regions, refused


B, H, J, P, E, D = 2, 6, 2, 7, 8, 5


def data(p: int = P, m: int = P, heads: int = J, e: int = E, f: int = E) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """transformers' packed-sequence detection on positions that are an arange: folds to plain causal."""
    n = q.shape[2]
    positions = (torch.arange(n) + 0).unsqueeze(0)
    step = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    ids = (step != 1).cumsum(-1)
    b, i, j = torch.arange(B)[:, None, None, None] * 0, torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]
    mask = i.new_ones((), dtype=torch.bool) & (ids[b, i] == ids[b, j]) & (j <= i)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask.expand(B, -1, n, n))


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    n = q.shape[2]
    keep = pad.to(torch.bool)
    b, i, j = torch.arange(B)[:, None, None, None], torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]
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
FLOAT = torch.where(MASK, torch.randn(B, 1, P, P, generator=torch.Generator().manual_seed(6), dtype=torch.float64), -INF)
SDPA = F.scaled_dot_product_attention

# name: function, inputs, a part that the program's text must hold
CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str]] = {
    "sdpa": (lambda q, k, v: SDPA(q, k, v), data(heads=H), ""),
    "sdpa other lengths": (lambda q, k, v: SDPA(q, k, v), data(3, 9, H, 8, 5), ""),
    "sdpa causal": (lambda q, k, v: SDPA(q, k, v, is_causal=True), data(heads=H), "where m <= p"),
    "sdpa causal top left": (lambda q, k, v: SDPA(q, k, v, is_causal=True), data(4, 9, H), "where m <= p"),
    "sdpa causal more rows": (lambda q, k, v: SDPA(q, k, v, is_causal=True), data(9, 4, H), "where m <= p"),
    "sdpa scale": (lambda q, k, v: SDPA(q, k, v, scale=0.7), data(heads=H), "* 0.7"),
    "sdpa gqa": (lambda q, k, v: SDPA(q, k, v, enable_gqa=True, is_causal=True), data(), "K[b, h//3, m, e]"),
    "sdpa repeat_kv": (lambda q, k, v: SDPA(q, repeat_kv(k), repeat_kv(v)), data(), "V[b, h//3, m, f]"),
    "sdpa repeat_interleave": (lambda q, k, v: SDPA(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, 1)), data(),
                               "V[b, h//3, m, f]"),
    "sdpa bool mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), (*data(heads=H), MASK), "where mask[b, 0, p, m]"),
    "sdpa float mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), (*data(heads=H), FLOAT), "bias[b, 0, p, m]"),
    "sdpa one head, no batch": (lambda q, k, v: SDPA(q, k, v), tuple(t[0, 0] for t in data()), ""),
    "sdpa window": (lambda q, k, v: SDPA(q, k, v, attn_mask=causal(P, P) & (torch.arange(P) > torch.arange(P)[:, None] - 3)),
                    data(heads=H), "m <= p"),
    "sdpa packed": (packed, data(), "where m <= p"),
    "sdpa padded window": (padded, (*data(), PAD), "ids[b, m] != 0"),
    "sdpa static cache": (lambda q, k, v, pos: SDPA(q, repeat_kv(k), repeat_kv(v), attn_mask=(
        torch.arange(9)[None, None, None, :] <= pos[None, None, :, None])), (*data(2, 9), torch.tensor([4, 5])), "m <= ids[p]"),
    "sdpa one projection": (fused, (torch.randn(B, P, 3 * H * E, dtype=torch.float64),), ""),
    "written": (written, data(), "K[b, h//3, m, e]"),
    "written causal inf": (lambda q, k, v: written(q, k, v, bias=torch.where(causal(P, P), 0.0, -INF)), data(), "where m <= p"),
    "written causal lowest": (lambda q, k, v: written(q, k, v, bias=lowest(causal(P, P))), data(), "where m <= p"),
    "written later rows": (lambda q, k, v: written(q, k, v, bias=lowest(causal(4, 9))), data(4, 9), "where m <= p + 5"),
    "written dead rows lowest": (lambda q, k, v, m: written(q, k, v, bias=lowest(m)), (*data(), MASK), "where(mask"),
    "written dead rows inf": (lambda q, k, v, m: written(q, k, v, bias=torch.where(m, 0.0, -INF)), (*data(), MASK), "where mask"),
    "written float mask": (lambda q, k, v, m: written(q, k, v, bias=m), (*data(), FLOAT), "bias"),
    "written softcap": (lambda q, k, v: written(q, k, v, bias=lowest(causal(P, P)), change=lambda s: torch.tanh(s / 5) * 5),
                        data(), "tanh"),
    "written tril": (lambda q, k, v: written(q, k, v, change=lambda s: s.masked_fill(
        torch.tril(torch.ones(P, P)) == 0, -INF)), data(), "where m <= p"),
    "written window": (lambda q, k, v: written(q, k, v, bias=lowest(causal(P, P) & ~causal(P, P).tril(-3))), data(), "m <= p"),
    "written flat": (flat, data(), "K[b, h//3, m, e]"),
    "written pieces": (pieces, data(), "where m <= p"),
    "written alibi": (alibi, (*data(), torch.rand(H, dtype=torch.float64)), "bias[h]"),
    "written one head": (lambda q, k, v: torch.softmax(q @ k.T / 3, -1) @ v, tuple(t[0, 0] for t in data(5, 8)), ""),
    "linear attention": (lambda q, k, v: ((q @ k.transpose(-1, -2)) * torch.ones(P, P, dtype=q.dtype).tril()) @ v,
                         data(heads=H), "where m <= p"),
    "two score parts": (lambda q, k, v: torch.softmax(
        q[..., :5] @ k[..., :5].transpose(-1, -2) + q[..., 5:] @ k[..., 5:].transpose(-1, -2), -1) @ v, data(heads=H), ""),
    "weights used too": (lambda q, k, v: (lambda a: (a @ v, a.sum(-2)))(torch.softmax(q @ k.transpose(-1, -2), -1)),
                         data(heads=H), ""),
    "log-sum-exp": (lambda q, k, v: (lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v)(
        q @ k.transpose(-1, -2)), data(heads=H), ""),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_dynamo(name: str, dynamic: bool) -> None:
    fn, args, part = CASES[name]
    regions, refused = holds(*dynamo(fn, args, dynamic))
    assert len(regions) == 1 and not refused
    if not dynamic:
        assert part in str(regions[0].program)


@pytest.mark.parametrize("name", CASES)
def test_export(name: str) -> None:
    fn, args, part = CASES[name]
    regions, refused = holds(capture(fn, *args, level="export"), args)
    assert len(regions) == 1 and not refused
    assert part in str(regions[0].program)


class Module(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


@pytest.mark.parametrize("name", CASES)
def test_decomposed(name: str) -> None:
    fn, args, _ = CASES[name]
    with torch.no_grad():
        ep = torch.export.export(Module(fn), args, strict=False).run_decompositions()
    regions, refused = holds(read_exported(ep), args)
    assert len(regions) == 1 and not refused
