"""Product-key memory: the best of slots**2 values, found by two small searches over half keys; softmax over the found.

x (B, D) -> (B, F); sub-keys (H, 2, N, E), values (N * N, F), `top` slots a head.
Lample et al., "Large Memory Layers with Product Keys", arXiv 1907.05242.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import normal


class Memory(nn.Module):
    def __init__(self, model: int, heads: int, slots: int, half: int, value: int, top: int) -> None:
        super().__init__()
        self.top, self.slots = top, slots
        query, keys, values = normal((heads, 2, half, model), (heads, 2, slots, half), (slots * slots, value), seed=1)
        self.query, self.keys, self.values = (nn.Parameter(t) for t in (query * model**-0.5, keys, values))

    def forward(self, x: Tensor) -> Tensor:
        query = torch.einsum("bd,hsed->bhse", x, self.query)
        scores, places = torch.einsum("bhse,hsne->bhsn", query, self.keys).topk(self.top, -1)
        sums = scores[:, :, 0, :, None] + scores[:, :, 1, None, :]
        slots = places[:, :, 0, :, None] * self.slots + places[:, :, 1, None, :]
        best, where = sums.flatten(-2).topk(self.top, -1)
        rows = self.values[slots.flatten(-2).gather(-1, where)]
        return (torch.softmax(best, -1)[..., None] * rows).sum((1, 2))


def build(batch: int = 6, model: int = 32, heads: int = 2, slots: int = 16, half: int = 8, value: int = 24,
          top: int = 4) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Memory(model, heads, slots, half, value, top), normal((batch, model))
