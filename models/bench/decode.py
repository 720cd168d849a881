"""One query a head over a long cache: groups of query heads on one KV head, one KV head for all, a latent for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import normal, qkv
from memcomp.models.bench import Case, Rival, fixed
from memcomp.models.families.attention import attend, scores

ASKED = {  # group -> times SDPA, at 16k keys
    torch.bfloat16: {1: 1.2, 3: 3.0, 4: 3.5, 8: 6.0},
    torch.float32: {1: 1.1, 3: 2.0, 4: 2.5, 8: 4.0},
}
LATENT, ROTARY = 512, 64


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query heads of a KV head as rows of one product."""
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, dim)
    return attend(scores(rows, k), v).reshape(batch, heads, 1, v.shape[-1])


def absorbed(q: Tensor, cache: Tensor) -> Tensor:
    """q (B, H, 1, 576) over a cache (B, M, 576) whose first 512 columns are the values (DeepSeek-V2, arXiv 2405.04434,
    with both up-projections absorbed); scaled as by heads of 128 + 64."""
    s = q[:, :, 0] @ cache.transpose(1, 2) * (128 + ROTARY) ** -0.5
    return torch.softmax(s, -1) @ cache[..., :LATENT]


def absorbed_fused(q: Tensor, cache: Tensor) -> Tensor:
    keys = cache[:, None]
    return scaled_dot_product_attention(q, keys, keys[..., :LATENT], scale=(128 + ROTARY) ** -0.5,
                                        enable_gqa=True)[:, :, 0]


def kv(dtype: torch.dtype, batch: int, heads: int, kv_heads: int, keys: int, dim: int,
       ) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: qkv(batch, heads, kv_heads, 1, keys, dim, dtype=dtype)


def decodes() -> Iterator[Case]:
    for dtype, asked in ASKED.items():
        word = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
        shapes = [(16384, dim, group) for dim in (64, 128) for group in asked]
        shapes += [(keys, 128, group) for keys in (2048, 4096) for group in (3, 4, 8)]
        for keys, dim, group in shapes:
            bar = asked[group] if keys == 16384 else 2.2
            read = {"read": 0.9} if group <= 4 else {}
            yield Case(f"decode {word} group {group} dim {dim} keys {keys}", grouped,
                       kv(dtype, 1, 8 * group, 8, keys, dim), {"SDPA": Rival(fixed(grouped))},
                       {"SDPA": bar, **read}, 4.0 * 8 * group * keys * dim)
        rivals = {"SDPA": Rival(fixed(grouped)), "products": Rival(fixed(products))}
        yield Case(f"decode {word} one KV head, 32 heads, dim 128 keys 16384", grouped,
                   kv(dtype, 1, 32, 1, 16384, 128), rivals, {" / ".join(rivals): 2.0}, 4.0 * 32 * 16384 * 128)
        latent = {"SDPA": Rival(fixed(absorbed_fused)), "products": Rival(fixed(absorbed))}

        def cached(dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            return normal((1, 16, 1, LATENT + ROTARY), (1, 8192, LATENT + ROTARY), dtype=dtype)

        yield Case(f"decode {word} latent 576/512, 16 heads, keys 8192", absorbed, cached, latent,
                   {" / ".join(latent): 2.0}, 2.0 * 16 * 8192 * (2 * LATENT + ROTARY))


CASES = tuple(decodes())
