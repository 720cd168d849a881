"""Multi-head attention written out in three passes over the keys: maximum, denominator, weighted sum.

q (B, H, P, E), k (B, H, M, E), v (B, H, M, F) -> (B, H, P, F).
Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; the passes: Nayak et al., "FuseMax", arXiv 2406.10491.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        numerator = torch.exp(scores - scores.amax(-1, keepdim=True))
        return numerator / numerator.sum(-1, keepdim=True) @ v


def build(batch: int = 2, heads: int = 4, queries: int = 40, keys: int = 48, dim: int = 16, dim_v: int = 0,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), qkv(batch, heads, heads, queries, keys, dim, dim_v, dtype)
