"""Example inputs: reproducible, and without touching torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Standard normal tensors of these shapes on torch's default device, the same at every call; drawn in float32 and
    then converted."""
    device = torch.get_default_device()
    if device.type == "meta":
        return tuple(torch.empty(shape, dtype=dtype) for shape in shapes)
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def qkv(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dim_v: int = 0,
        dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q (batch, heads, queries, dim), k (batch, kv_heads, keys, dim), v (batch, kv_heads, keys, dim_v or dim)."""
    return normal((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim_v or dim),
                  dtype=dtype)
