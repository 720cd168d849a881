"""Attention as torch's own fused operator, with or without a causal mask.

q (B, H, P, E), k (B, H, M, E), v (B, H, M, F) -> (B, H, P, F).
Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def build(batch: int = 2, heads: int = 4, queries: int = 40, keys: int = 48, dim: int = 16, dim_v: int = 0,
          causal: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(causal), qkv(batch, heads, heads, queries, keys, dim, dim_v, dtype)
