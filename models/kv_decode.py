"""One decode step with a KV cache of fixed size: write the new key and value, attend to what is there.

q (B, H, 1, E), k, v (B, J, 1, E), keys, values (B, J, L, E) the cache, place (1,) int64 -> out (B, H, 1, E).
The cache is written in place.  Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", arXiv 1911.02150.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import normal


class Step(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> Tensor:
        keys.index_copy_(2, place, k)
        values.index_copy_(2, place, v)
        seen = torch.arange(keys.shape[2], device=q.device)[None, :] <= place[:, None]
        return scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)


def build(batch: int = 2, heads: int = 6, kv_heads: int = 2, size: int = 48, dim: int = 16, place: int = 30,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    new, cache = (batch, kv_heads, 1, dim), (batch, kv_heads, size, dim)
    return Step(), (*normal((batch, heads, 1, dim), new, new, cache, cache, dtype=dtype), torch.tensor([place]))
