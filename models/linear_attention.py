"""Linear attention: a positive feature map in place of the exponential, so keys and values fold into one small state.

q (B, H, P, E), k (B, H, M, E), v (B, H, M, F) -> (B, H, P, F); feature map elu(x) + 1.
Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", arXiv 2006.16236.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = elu(q) + 1.0, elu(k) + 1.0
        state = k.transpose(-2, -1) @ v
        return q @ state / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)


def build(batch: int = 2, heads: int = 4, queries: int = 40, keys: int = 48, dim: int = 16,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), qkv(batch, heads, heads, queries, keys, dim, dtype=dtype)
