"""Attention that weighs each key by a sigmoid of its own score, biased by -log(keys); no normalisation over keys.

q (B, H, P, E), k (B, H, M, E), v (B, H, M, F) -> (B, H, P, F).
Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 - math.log(k.shape[-2])) @ v


def build(batch: int = 2, heads: int = 4, queries: int = 40, keys: int = 48, dim: int = 16,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), qkv(batch, heads, heads, queries, keys, dim, dtype=dtype)
