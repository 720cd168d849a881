"""Attention with a learned sink: one more logit a head that takes weight and gives no value; causal.

q, k, v (B, H, P, E) -> (B, H, P, E).
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453; the learned logit: OpenAI,
"gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import normal, qkv


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.sink = nn.Parameter(normal((heads,), seed=1)[0])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2], device=q.device)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(place[None, :] > place[:, None], float("-inf"))
        sink = self.sink[:, None, None].to(q.dtype)
        highest = torch.maximum(scores.amax(-1, keepdim=True), sink)
        numerator = torch.exp(scores - highest)
        return numerator / (numerator.sum(-1, keepdim=True) + torch.exp(sink - highest)) @ v


def build(batch: int = 2, heads: int = 4, length: int = 40, dim: int = 16,
          dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(heads), qkv(batch, heads, heads, length, length, dim, dtype=dtype)
