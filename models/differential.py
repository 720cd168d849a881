"""Differential attention: one attention map minus lambda times another, over the same values; causal.

q, k (B, 2H, P, E) hold the two maps of head h at 2h and 2h + 1, v (B, H, P, F) -> (B, H, P, F).
Ye et al., "Differential Transformer", arXiv 2410.05258 (lambda is fixed at its initial value; the norm is theirs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from memcomp.models._inputs import normal


class Attention(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2], device=q.device)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores.masked_fill(place[None, :] > place[:, None], float("-inf")), -1)
        difference = (weights[:, ::2] - self.start * weights[:, 1::2]) @ v
        return rms_norm(difference, (v.shape[-1],), eps=1e-5) * (1.0 - self.start)


def build(batch: int = 2, heads: int = 2, length: int = 40, dim: int = 16, dim_v: int = 32, start: float = 0.8,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    both = (batch, 2 * heads, length, dim)
    return Attention(start), normal(both, both, (batch, heads, length, dim_v), dtype=dtype)
