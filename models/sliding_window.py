"""Sliding-window attention: each query sees itself and the `window - 1` keys before it.

q, k, v (B, H, P, E) -> (B, H, P, E).
Beltagy et al., "Longformer", arXiv 2004.05150; as used by Jiang et al., "Mistral 7B", arXiv 2310.06825.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query = torch.arange(q.shape[-2], device=q.device)[:, None]
        key = torch.arange(k.shape[-2], device=q.device)[None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=(key <= query) & (key > query - self.window))


def build(batch: int = 2, heads: int = 4, length: int = 80, dim: int = 16, window: int = 24,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(window), qkv(batch, heads, heads, length, length, dim, dtype=dtype)
