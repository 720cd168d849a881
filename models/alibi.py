"""Attention with linear biases: the score falls with the distance, by a slope of its own in every head; causal.

q, k, v (B, H, P, E) -> (B, H, P, E).
Press et al., "Train Short, Test Long: Attention with Linear Biases", arXiv 2108.12409.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2], device=q.device)
        distance = place[:, None] - place[None, :]
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 - self.slopes[:, None, None].to(q.dtype) * distance
        return torch.softmax(scores.masked_fill(distance < 0, float("-inf")), -1) @ v


def build(batch: int = 2, heads: int = 4, length: int = 40, dim: int = 16,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(heads), qkv(batch, heads, heads, length, length, dim, dtype=dtype)
