"""Multi-head latent attention: keys and values come out of a small latent, one rotary key serves all heads; causal.

q (B, H, P, N + R) without and with rotary part, latent (B, P, C), key (B, P, R) -> (B, H, P, F).
DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", arXiv 2405.04434.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memcomp.models._inputs import normal


class Attention(nn.Module):
    def __init__(self, heads: int, latent: int, plain: int, value: int) -> None:
        super().__init__()
        up_k, up_v = normal((heads, plain, latent), (heads, value, latent), seed=1)
        self.up_k = nn.Parameter(up_k * latent**-0.5)
        self.up_v = nn.Parameter(up_v * latent**-0.5)

    def forward(self, q: Tensor, latent: Tensor, key: Tensor) -> Tensor:
        plain = torch.einsum("bmc,hnc->bhmn", latent, self.up_k)
        k = torch.cat([plain, key[:, None].expand(-1, plain.shape[1], -1, -1)], -1)
        v = torch.einsum("bmc,hfc->bhmf", latent, self.up_v)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def build(batch: int = 2, heads: int = 4, length: int = 40, plain: int = 16, rotary: int = 8, value: int = 16,
          latent: int = 32) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(heads, latent, plain, value), normal(
        (batch, heads, length, plain + rotary), (batch, length, latent), (batch, length, rotary))
