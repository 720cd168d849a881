"""Prefill: plain and causal beside torch's own kernel, variants beside FlexAttention or Inductor and beside plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from memcomp.models._inputs import normal, qkv
from memcomp.models.bench import Case, Layer, Rival, fixed
from memcomp.models.families.attention import INF, attend, flex, places, scores, sigmoids, softmax1

CAP, WINDOW, PREFIX, DOCUMENTS = 20.0, 256, 256, 4
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((1, 8, 1024, 64), (1, 8, 4096, 64), (2, 16, 2048, 128))
VARIED = (1, 8, 2048, 64)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(CAP * torch.tanh(scores(q, k) / CAP), v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend((scores(q, k) - slopes[:, None, None] * (at - key)).masked_fill(key > at, -INF), v)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(torch.where((key <= at) & (key > at - WINDOW), scores(q, k), -INF), v)


def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(scores(q, k).masked_fill((ids[:, None] != ids[None, :]) | (key > at), -INF), v)


def normalised(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
    return attend(scores(rms_norm(q, (q.shape[-1],), wq, 1e-6), rms_norm(k, (k.shape[-1],), wk, 1e-6)), v)


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(torch.where((key < PREFIX) | (key <= at), scores(q, k), -INF), v)


def everything(n: int) -> float:
    return float(n * n)


def below(n: int) -> float:
    return n * (n + 1) / 2


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, *more: Callable[[], Tensor],
           ) -> Callable[[], tuple[Tensor, ...]]:
    batch, heads, n, dim = shape
    return lambda: (*qkv(batch, heads, heads, n, n, dim, dtype=dtype),
                    *(t.to(dtype) if t.is_floating_point() else t for t in (f() for f in more)))


def flops(shape: tuple[int, int, int, int], seen: float) -> float:
    batch, heads, _, dim = shape
    return 4.0 * batch * heads * dim * seen


def prefill() -> Iterator[Case]:
    asked = {"f32": {64: (1.15, 1.35), 128: (1.0, 1.3)}, "bf16": {64: (1.7, 1.8), 128: (1.4, 1.5)}}
    for word, dtype in DTYPES.items():
        for shape in SHAPES:
            bars = asked[word][shape[3]]
            yield Case(f"prefill {word} {shape}", full, inputs(shape, dtype), {"SDPA": Rival(fixed(full))},
                       {"SDPA": bars[0]}, flops(shape, everything(shape[2])))
            own = {"own full": 1 / 0.58} if shape[2] == 4096 else {}
            rivals = {"SDPA": Rival(fixed(causal))} | ({"own full": Rival(fixed(full), "memcomp")} if own else {})
            yield Case(f"prefill {word} {shape} causal", causal, inputs(shape, dtype), rivals,
                       {"SDPA": bars[1], **own}, flops(shape, below(shape[2])))


def variants() -> Iterator[Case]:
    n = VARIED[2]
    ids = torch.arange(n) * DOCUMENTS // n
    outside = below(n - WINDOW)
    inside = DOCUMENTS * below(n // DOCUMENTS)

    def weights() -> Tensor:
        return normal((VARIED[3],), seed=3)[0] * 0.1 + 1

    def slopes() -> Tensor:
        return torch.exp2(-torch.arange(1.0, VARIED[1] + 1))

    table: list[tuple[str, Layer, tuple[Callable[[], Tensor], ...], Callable[..., Callable[..., Any]] | None, Layer,
                      float]] = [
        ("softcap", softcap, (), flex(lambda s, b, h, p, m: torch.tanh(s / CAP) * CAP), full, everything(n)),
        ("ALiBi", alibi, (slopes,), flex(lambda s, b, h, p, m, slopes: s - slopes[h] * (p - m),
                                         lambda b, h, p, m, slopes: m <= p), causal, below(n)),
        ("window", windowed, (), flex(seen=lambda b, h, p, m: (m <= p) & (m > p - WINDOW)), full,
         below(n) - outside),
        ("sigmoid", sigmoids, (), None, full, everything(n)),
        ("softmax1", softmax1, (), None, full, everything(n)),
        ("documents", documents, (lambda: ids,),
         flex(seen=lambda b, h, p, m, ids: (ids[p] == ids[m]) & (m <= p)), full, inside),
        ("normalised queries and keys", normalised, (weights, weights), None, full, everything(n)),
        ("prefix", prefix, (), flex(seen=lambda b, h, p, m: (m < PREFIX) | (m <= p)), full,
         below(n) + below(PREFIX - 1)),
    ]
    for word, dtype in DTYPES.items():
        for name, fn, more, flexed, plain, seen in table:
            rival = Rival(flexed or fixed(fn), "inductor")
            rivals = {"FlexAttention" if flexed else "Inductor": rival}
            base = f"own {'causal' if plain is causal else 'full'}"
            share = seen / (below(n) if plain is causal else everything(n))

            def beside(*args: Tensor, plain: Layer = plain) -> Layer:
                return lambda q, k, v, *rest: plain(q, k, v)

            yield Case(f"variant {word} {name} {VARIED}", fn, inputs(VARIED, dtype, *more),
                       {**rivals, base: Rival(beside, "memcomp")}, {" / ".join(rivals): 4.0, base: 1 / (1.2 * share)},
                       flops(VARIED, seen))


CASES = (*prefill(), *variants())
