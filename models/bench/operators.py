"""Operators at the sizes of a GPU: `memcomp bench --device cuda` times them, benchmarks/gpu_offline.py compiles them.

Ten of them are those of Neptune (PLDI 2026, scripts/neptune_bench/operators.py): f16 there, bf16 here.  What matters
most comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import qkv
from memcomp.models.bench import Case, Layer, Rival, fixed
from memcomp.models.bench import attention as layers
from memcomp.models.bench.decode import grouped
from memcomp.models.families.attention import INF, attend, flex, places, scores, sigmoids, softmax1

FLEX, INDUCTOR, PLAIN = "FlexAttention", "Inductor", "Triton, plain"
KERNELS = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION"}  # of torch.nn.attention.SDPBackend
CAP, FAR = 50.0, 4096
Inputs = Callable[[], tuple[Tensor, ...]]


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softcap, causal, grouped heads."""
    return attend(_causal(_capped(q, k)), _heads(q, v))


def capped_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, key = places(q, k)
    return attend(_causal(_capped(q, k)).masked_fill(key <= at - FAR, -INF), _heads(q, v))


def biased(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi of the last row."""
    key = torch.arange(k.shape[-2], device=k.device)
    return attend(scores(q, k) - slopes[:, None, None] * (k.shape[-2] - 1 - key), v)


def capped_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(_capped(q, k), _heads(q, v))


def grouped_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _heads(q: Tensor, x: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _capped(q: Tensor, k: Tensor) -> Tensor:
    return CAP * torch.tanh(scores(q, _heads(q, k)) / CAP)


def _causal(s: Tensor) -> Tensor:
    rows, keys = s.shape[-2:]
    at, key = torch.arange(rows, device=s.device)[:, None], torch.arange(keys, device=s.device)
    return s.masked_fill(key > at, -INF)


def kernel(name: str, causal: bool = False) -> Rival:
    """One of the kernels of torch's own attention, and no other."""

    def made(*args: Tensor) -> Layer:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        only = getattr(SDPBackend, KERNELS[name])

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(only):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return run

    return Rival(made)


def plain(causal: bool) -> Rival:
    """Flash attention in fifty lines of Triton."""

    def made(*args: Tensor) -> Layer:
        from memcomp.models.bench._flash import flash

        return lambda q, k, v: flash(q, k, v, causal)

    return Rival(made)


def torch_kernels(causal: bool = False) -> dict[str, Rival]:
    return {name: kernel(name, causal) for name in KERNELS}


def below(b: Tensor, h: Tensor, p: Tensor, m: Tensor, *more: Tensor) -> Tensor:
    return m <= p


def cap(s: Tensor, b: Tensor, h: Tensor, p: Tensor, m: Tensor) -> Tensor:
    return torch.tanh(s / CAP) * CAP


def slope(s: Tensor, b: Tensor, h: Tensor, p: Tensor, m: Tensor, slopes: Tensor) -> Tensor:
    return s - slopes[h] * (p - m)


def listed(small: bool = False, narrow: bool = True) -> Iterator[Case]:
    """All operators; small: with few rows and keys, for machines without a GPU, and few columns where they are to be
    narrow too."""

    def one(name: str, fn: Layer, heads: int, kv: int, rows: int, keys: int, dim: int, seen: float,
            rivals: Mapping[str, Rival], out: int = 0, batch: int = 1,
            more: tuple[tuple[int, Inputs], ...] = ()) -> Case:
        """seen: the share of pairs of a row and a key that count; more: the dim of heads (-1: none), the tensor."""
        if small:
            batch, heads, kv = min(batch, 2), heads // kv * min(kv, 2), min(kv, 2)
            rows, keys = min(rows, 40), 40 if rows > 1 else 70
            dim, out = (max(16, dim // 8), out // 8) if narrow else (dim, out)
        columns = dim + (out or dim)

        def inputs() -> tuple[Tensor, ...]:
            given = [t for _, f in more for t in f()]
            q, k, v = qkv(batch, heads, kv, rows, keys, dim, out, torch.bfloat16)
            return q, k, v, *(t[:keys] if at < 0 else t[:heads] for (at, _), t in zip(more, given, strict=True))

        alone = ((0, 0, 0, *(-1 for _ in more), 0), (1, 1, 1, *(at for at, _ in more), 1))
        bars = {FLEX: 1.0} if FLEX in rivals else {}
        return Case(name, fn, inputs, rivals, bars, 2.0 * batch * heads * rows * keys * columns * seen,
                    device="cuda", alone=alone)

    def prefill(name: str, fn: Layer, heads: int, kv: int, n: int, seen: float, rivals: Mapping[str, Rival],
                dim: int = 128, **rest: Any) -> Case:
        return one(name, fn, heads, kv, n, n, dim, seen, rivals, **rest)

    def decode(name: str, fn: Layer, heads: int, kv: int, keys: int, rivals: Mapping[str, Rival], batch: int = 1,
               dim: int = 128, **rest: Any) -> Case:
        return one(name, fn, heads, kv, 1, keys, dim, 1.0, rivals, batch=batch, **rest)

    def slopes() -> tuple[Tensor, ...]:
        return (torch.exp2(-torch.arange(1.0, 33.0) / 4).to(torch.bfloat16),)

    def ids() -> tuple[Tensor, ...]:
        return (torch.arange(n) * layers.DOCUMENTS // n,)

    n = 40 if small else 8192
    half = (n + 1) / (2 * n)

    def near(w: int) -> float:
        return (min(w, n) - min(w, n) * (min(w, n) - 1) / (2 * n)) / n

    full = {**torch_kernels(), FLEX: Rival(flex(), "inductor"), PLAIN: plain(False)}
    under = {**torch_kernels(True), FLEX: Rival(flex(seen=below), "inductor"), PLAIN: plain(True)}
    group = {**torch_kernels(), FLEX: Rival(flex(enable_gqa=True), "inductor")}

    def variant(fn: Layer, *flexed: Any, **options: Any) -> dict[str, Rival]:
        return {FLEX: Rival(flex(*flexed, **options), "inductor"), INDUCTOR: Rival(fixed(fn), "inductor")}

    yield prefill("prefill 16k", layers.full, 16, 16, 16384, 1.0, full)
    yield prefill("prefill 16k causal", layers.causal, 16, 16, 16384, half, under)
    for heads in (64, 32):
        for batch, keys in ((1, 32768), (8, 8192), (64, 4096)):
            yield decode(f"decode {heads}/8 batch {batch} keys {keys}", grouped, heads, 8, keys, group, batch)
    yield prefill("prefill_global", layers.full, 32, 32, n, 1.0, full)
    yield prefill("prefill_causal", layers.causal, 32, 32, n, half, under)
    yield prefill("prefill_alibi", layers.alibi, 32, 32, n, half, variant(layers.alibi, slope, below),
                  more=((0, slopes),))
    yield prefill("prefill_gqa", grouped_causal, 64, 8, n, half,
                  {**torch_kernels(True), FLEX: Rival(flex(seen=below, enable_gqa=True), "inductor"),
                   PLAIN: plain(True)})
    yield prefill("prefill_softcap", capped, 32, 16, n, half, variant(capped, cap, below, enable_gqa=True))
    yield prefill("prefill_windowed", capped_window, 32, 8, n, near(FAR),
                  variant(capped_window, cap, lambda b, h, p, m: (m <= p) & (m > p - FAR), enable_gqa=True))
    yield decode("decode_causal", grouped, 32, 32, n, group)
    yield decode("decode_alibi", biased, 32, 32, n, variant(biased, slope), more=((0, slopes),))
    yield decode("decode_gqa", grouped, 64, 8, n, group)
    yield decode("decode_softcap", capped_decode, 32, 16, n, variant(capped_decode, cap, enable_gqa=True))
    for dim in (128, 64):
        yield prefill(f"window 256 D {dim}", layers.windowed, 32, 32, n, near(layers.WINDOW),
                      variant(layers.windowed, seen=lambda b, h, p, m: (m <= p) & (m > p - layers.WINDOW)), dim)
        yield prefill(f"documents D {dim}", layers.documents, 32, 32, n, half / layers.DOCUMENTS,
                      variant(layers.documents, seen=lambda b, h, p, m, ids: (ids[p] == ids[m]) & (m <= p)), dim,
                      more=((-1, ids),))
        yield prefill(f"prefix D {dim}", layers.prefix, 32, 32, n, half,
                      variant(layers.prefix, seen=lambda b, h, p, m: (m < layers.PREFIX) | (m <= p)), dim)
        yield prefill(f"sigmoid D {dim}", sigmoids, 32, 32, n, 1.0, {INDUCTOR: Rival(fixed(sigmoids), "inductor")}, dim)
        yield prefill(f"softmax1 D {dim}", softmax1, 32, 32, n, 1.0, {INDUCTOR: Rival(fixed(softmax1), "inductor")},
                      dim)
    latent = {FLEX: group[FLEX], INDUCTOR: Rival(fixed(layers.full), "inductor")}
    for batch in (1, 8):
        yield decode("latent decode 576/512" + f" batch {batch}" * (batch > 1), layers.full, 16, 1, n, latent, batch,
                     576, out=512)
    for dim in (64, 96, 192, 256):
        yield prefill(f"prefill_global D {dim}", layers.full, 32, 32, n, 1.0, full, dim)
        yield prefill(f"prefill_causal D {dim}", layers.causal, 32, 32, n, half, under, dim)
    for heads in (3, 4, 5, 6, 7, 16):
        yield decode(f"decode group {heads}", grouped, 8 * heads, 8, n, group)


CASES = tuple(listed())
