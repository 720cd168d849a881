"""Attention as users write it: every family is a short function of q (1, H, P, E), k (1, J, M, E), v (1, J, M, F).

The long rank is M, the keys; the last query stands at the last key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, rms_norm, scaled_dot_product_attention, sigmoid

from memcomp.models._inputs import normal, qkv
from memcomp.models.families import Family, Inputs

HEADS, DIM = 4, 16
WINDOW, SINKS, PREFIX, CLIP = 100, 4, 37, 24
INF = float("inf")


def scores(q: Tensor, k: Tensor) -> Tensor:
    out: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return out


def attend(s: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(s, -1) @ v


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Where queries (P, 1) and keys (1, M) stand."""
    at = torch.arange(q.shape[-2], device=q.device) + (k.shape[-2] - q.shape[-2])
    return at[:, None], torch.arange(k.shape[-2], device=q.device)[None, :]


# -- what is done to the scores ---------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.transpose(-2, -1), v)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend((scores(q, k) - slopes[:, None, None] * (at - key)).masked_fill(key > at, -INF), v)


def clipped_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A learned bias by clipped distance (Shaw et al., arXiv 1803.02155, as a scalar a head)."""
    at, key = places(q, k)
    return attend(scores(q, k) + table[:, (at - key).clamp(-CLIP, CLIP) + CLIP], v)


def t5_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A learned bias by bucket of distance, far ones by logarithm (Raffel et al., arXiv 1910.10683)."""
    at, key = places(q, k)
    far, near = (at - key).clamp(min=0), 16
    big = near + (torch.log(far.float().clamp(min=1) / near) / math.log(128 / near) * (32 - near)).long()
    return attend(q @ k.transpose(-2, -1) + table[:, torch.where(far < near, far, big.clamp(max=31))], v)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(20.0 * torch.tanh(scores(q, k) / 20.0), v)


def own_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Any function of a score, in plain PyTorch."""
    s = scores(q, k)
    return attend(torch.where(s > 0, torch.log1p(s.abs()), 0.5 * s) + 0.25 * torch.sin(s), v)


def temperature(q: Tensor, k: Tensor, v: Tensor, warmth: Tensor) -> Tensor:
    return attend(q @ k.transpose(-2, -1) / warmth[:, None, None], v)


def cosine(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor) -> Tensor:
    """A learned scale a head over cosines (Swin V2, Liu et al., arXiv 2111.09883)."""
    scale = log_scale.clamp(max=math.log(100.0)).exp()[:, None, None]
    return attend(normalize(q, dim=-1) @ normalize(k, dim=-1).transpose(-2, -1) * scale, v)


def rms_keys(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
    """Learned RMS normalisation of queries and keys."""
    return attend(scores(rms_norm(q, (q.shape[-1],), wq, 1e-6), rms_norm(k, (k.shape[-1],), wk, 1e-6)), v)


def l2_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q / q.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
    k = k / k.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return attend(10.0 * (q @ k.transpose(-2, -1)), v)


# -- which keys are seen ----------------------------------------------------------------------------------------------


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(scores(q, k).masked_fill(key > at, -INF), v)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(torch.where((key <= at) & (key > at - WINDOW), scores(q, k), -INF), v)


def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(torch.where((key <= at) & ((at - key) % 4 == 0), scores(q, k), -INF), v)


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(torch.where((key < PREFIX) | (key <= at), scores(q, k), -INF), v)


def streaming(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last keys and the first few (Xiao et al., arXiv 2309.17453)."""
    at, key = places(q, k)
    return attend(torch.where((key <= at) & ((key > at - WINDOW) | (key < SINKS)), scores(q, k), -INF), v)


def documents(q: Tensor, k: Tensor, v: Tensor, own: Tensor, ids: Tensor) -> Tensor:
    """Only keys of the query's own document, up to its place."""
    at, key = places(q, k)
    return attend(scores(q, k).masked_fill((own[:, None] != ids[None, :]) | (key > at), -INF), v)


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    key = torch.arange(k.shape[-2], device=k.device)
    return attend(scores(q, k).masked_fill((key >= lengths[:, None])[:, None, None, :], -INF), v)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return attend(scores(q, k).masked_fill(~seen, -INF), v)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(scores(q, k) + bias, v)


# -- what takes the place of the normaliser ---------------------------------------------------------------------------


def sink_logit(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """One more logit a head that no value belongs to (gpt-oss)."""
    s = scores(q, k)
    both = torch.cat([s, sink[None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)], -1)
    return torch.softmax(both, -1)[..., :-1] @ v


def softmax1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    top = s.amax(-1, keepdim=True).clamp(min=0)
    weights = torch.exp(s - top)
    return weights / (torch.exp(-top) + weights.sum(-1, keepdim=True)) @ v


def without_a_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(scores(q, k))
    return weights / weights.sum(-1, keepdim=True) @ v


def sigmoids(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sigmoid(scores(q, k) - math.log(k.shape[-2])) @ v


def relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(scores(q, k)) / k.shape[-2] @ v


def relu_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.relu(scores(q, k))
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(scores(q, k)).square() / k.shape[-2] @ v


def squared_relu_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.relu(scores(q, k)) ** 2
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


# -- heads ------------------------------------------------------------------------------------------------------------


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1] // k.shape[1]
    return attend(scores(q, k.repeat_interleave(n, 1)), v.repeat_interleave(n, 1))


def one_kv_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scores(q, k), v)


# -- several results --------------------------------------------------------------------------------------------------


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    return attend(s, v), torch.logsumexp(s, -1)


def with_entropy(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    weights = torch.softmax(s, -1)
    return weights @ v, -(weights * torch.log_softmax(s, -1)).sum(-1)


def two_over_one(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions that read the same keys and values."""
    return attend(scores(q, k), v), attend(scores(other, k), v)


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The difference of two maps, the queries and keys of the second at the odd heads (Ye et al., arXiv 2410.05258)."""
    weights = torch.softmax(scores(q, k), -1)
    return (weights[:, ::2] - 0.8 * weights[:, 1::2]) @ v


# -- FlexAttention's way, where it has one ----------------------------------------------------------------------------


def flex(score: Callable[..., Tensor] | None = None, seen: Callable[..., Tensor] | None = None,
         **options: Any) -> Callable[..., Callable[..., Any]]:
    """The layer as FlexAttention takes it, made for given arguments (whose block mask it then holds):
    score(s, b, h, at, key, *more) and seen(b, h, at, key, *more)."""

    def prepared(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ahead = k.shape[-2] - q.shape[-2]

        def within(b: Tensor, h: Tensor, p: Tensor, m: Tensor) -> Tensor:
            assert seen is not None
            return seen(b, h, p + ahead, m, *more)

        mask = create_block_mask(within, None, None, q.shape[-2], k.shape[-2], str(q.device)) if seen else None

        def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Any:
            mod = None if score is None else lambda s, b, h, p, m: score(s, b, h, p + ahead, m, *more)
            return flex_attention(q, k, v, score_mod=mod, block_mask=mask, **options)

        return run

    return prepared


# -- inputs -----------------------------------------------------------------------------------------------------------


def made(*more: Callable[[int, int], Tensor], kv: int = HEADS, heads: int = HEADS, dim_v: int = 0,
         value_heads: int = 0) -> Inputs:
    """q, k, v and what `more` makes of (rows, length)."""

    def inputs(rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = qkv(1, heads, kv, rows, length, DIM, dim_v, dtype)
        v = v[:, : value_heads or kv].clone(memory_format=torch.contiguous_format)
        others = (f(rows, length) for f in more)
        return (q, k, v, *(t.to(dtype) if t.is_floating_point() else t for t in others))

    return inputs


def drawn(*shape: int, shift: float = 0.0) -> Callable[[int, int], Tensor]:
    return lambda rows, length: normal(shape, seed=3)[0] + shift


def document_ids(length: int) -> Tensor:
    return torch.arange(length) * 5 // max(length, 1)


KEYS = ((1, 2), (2, 2))
QUERIES = ((0, 2),)


def family(name: str, fn: Callable[..., Any], inputs: Inputs | None = None, long: tuple[tuple[int, int], ...] = KEYS,
           rows: tuple[tuple[int, int], ...] = QUERIES, **rest: Any) -> Family:
    return Family(name, fn, inputs or made(), long, rows, **rest)


FAMILIES = (
    family("plain", plain, flex=flex(scale=1.0)),
    family("scaled", scaled, flex=flex()),
    family("SDPA", fused, flex=flex()),
    family("causal", causal, flex=flex(seen=lambda b, h, p, m: m <= p)),
    family("windowed", windowed, flex=flex(seen=lambda b, h, p, m: (m <= p) & (m > p - WINDOW))),
    family("dilated", dilated, flex=flex(seen=lambda b, h, p, m: (m <= p) & ((p - m) % 4 == 0))),
    family("prefix-LM", prefix, flex=flex(seen=lambda b, h, p, m: (m < PREFIX) | (m <= p))),
    family("window and first tokens", streaming,
           flex=flex(seen=lambda b, h, p, m: (m <= p) & ((m > p - WINDOW) | (m < SINKS)))),
    family("documents", documents,
           made(lambda p, m: document_ids(m)[max(m - p, 0):], lambda p, m: document_ids(m)),
           (*KEYS, (4, 0)), (*QUERIES, (3, 0)),
           flex=flex(seen=lambda b, h, p, m, own, ids: (ids[p] == ids[m]) & (m <= p))),
    family("padding", padded, made(lambda p, m: torch.tensor([m - m // 3])),
           flex=flex(seen=lambda b, h, p, m, lengths: m < lengths[b])),
    family("boolean mask", masked,
           made(lambda p, m: torch.rand(p, m, generator=torch.Generator().manual_seed(4)) < 0.6),
           (*KEYS, (3, 1)), (*QUERIES, (3, 0)),
           flex=flex(seen=lambda b, h, p, m, seen: seen[p + seen.shape[0] - seen.shape[1], m])),
    family("additive bias", biased, made(lambda p, m: normal((HEADS, p, m), seed=5)[0]),
           (*KEYS, (3, 2)), (*QUERIES, (3, 1))),
    family("ALiBi", alibi, made(lambda p, m: 2.0 ** (-2.0 * torch.arange(1, HEADS + 1))),
           flex=flex(lambda s, b, h, p, m, slopes: s - slopes[h] * (p - m), lambda b, h, p, m, slopes: m <= p)),
    family("bias by clipped distance", clipped_bias, made(drawn(HEADS, 2 * CLIP + 1)),
           flex=flex(lambda s, b, h, p, m, table: s + table[h, (p - m).clamp(-CLIP, CLIP) + CLIP])),
    family("T5 bias", t5_bias, made(drawn(HEADS, 32))),
    family("soft cap", softcap, flex=flex(lambda s, b, h, p, m: 20.0 * torch.tanh(s / 20.0))),
    family("own score function", own_score, flex=flex(
        lambda s, b, h, p, m: torch.where(s > 0, torch.log1p(s.abs()), 0.5 * s) + 0.25 * torch.sin(s))),
    family("temperature a head", temperature, made(drawn(HEADS, shift=5.0)),
           flex=flex(lambda s, b, h, p, m, warmth: s / warmth[h], scale=1.0)),
    family("cosine with a learned scale", cosine, made(drawn(HEADS, shift=2.0))),
    family("RMS of queries and keys", rms_keys, made(drawn(DIM, shift=1.0), drawn(DIM, shift=1.0))),
    family("L2 of queries and keys", l2_keys),
    family("sink logit", sink_logit, made(drawn(HEADS))),
    family("softmax1", softmax1),
    family("without a maximum", without_a_maximum),
    family("sigmoid", sigmoids),
    family("ReLU", relu),
    family("ReLU, normalised", relu_normalised),
    family("squared ReLU", squared_relu),
    family("squared ReLU, normalised", squared_relu_normalised),
    family("grouped heads", grouped, made(heads=6, kv=2), flex=flex(enable_gqa=True)),
    family("one KV head", one_kv_head, made(heads=5, kv=1), flex=flex(enable_gqa=True)),
    family("wider values", scaled, made(dim_v=40), flex=flex()),
    family("with log-sum-exp", with_lse, flex=flex(return_lse=True)),
    family("with entropy", with_entropy),
    family("two attentions over one K and V", two_over_one,
           made(lambda p, m: normal((1, HEADS, p, DIM), seed=6)[0]), rows=(*QUERIES, (3, 2))),
    family("differential", differential, made(value_heads=HEADS // 2)),
)
