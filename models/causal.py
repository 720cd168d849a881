"""Causal self-attention with its projections, written by hand: additive mask, softmax, two products.

x (B, P, D) -> (B, P, D).  Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import normal


class Attention(nn.Module):
    def __init__(self, model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        into, out = normal((3 * model, model), (model, model), seed=1)
        self.into = nn.Parameter(2 * into * model**-0.5)
        self.out = nn.Parameter(out * model**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, model = x.shape
        q, k, v = (x @ self.into.T).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), -1)
        heads: Tensor = weights @ v
        return heads.transpose(1, 2).reshape(batch, length, model) @ self.out.T


def build(batch: int = 2, heads: int = 4, length: int = 40, model: int = 64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(model, heads), normal((batch, length, model))
