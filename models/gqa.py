"""Grouped-query attention: several query heads read one KV head, causal.

q (B, H, P, E), k (B, J, P, E), v (B, J, P, F) -> (B, H, P, F); query head h reads KV head h // (H / J).
Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", arXiv 2305.13245.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def build(batch: int = 2, heads: int = 6, kv_heads: int = 2, length: int = 40, dim: int = 16, dim_v: int = 0,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), qkv(batch, heads, kv_heads, length, length, dim, dim_v, dtype)
