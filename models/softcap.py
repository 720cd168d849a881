"""Attention whose scores are capped smoothly by a tanh; causal or not.

q (B, H, P, E), k (B, H, P, E), v (B, H, P, F) -> (B, H, P, F).
Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", arXiv 2408.00118.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import qkv


class Attention(nn.Module):
    def __init__(self, cap: float, causal: bool) -> None:
        super().__init__()
        self.cap, self.causal = cap, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 / self.cap)) * self.cap
        if self.causal:
            place = torch.arange(q.shape[-2], device=q.device)
            scores = scores.masked_fill(place[None, :] > place[:, None], float("-inf"))
        return torch.softmax(scores, -1) @ v


def build(batch: int = 2, heads: int = 4, length: int = 40, dim: int = 16, cap: float = 2.0, causal: bool = False,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(cap, causal), qkv(batch, heads, heads, length, length, dim, dtype=dtype)
