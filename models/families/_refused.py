"""Layers that no law of the table makes one pass: right all the same, in as many kernels as their stages need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memcomp.models.families import Inputs
from memcomp.models.families.reductions import shaped


@dataclass(frozen=True, slots=True)
class Refused:
    """fn and inputs as for `Family`.  says: words of the refusal: the operator, and what is missing."""

    name: str
    fn: Callable[..., Any]
    inputs: Inputs
    says: tuple[str, ...]


def quantised_product(x: Tensor, w: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (torch.round(x / scale) @ w.T) * scale


def sparse_maximum(x: Tensor) -> Tensor:
    """Martins and Astudillo, "From Softmax to Sparsemax", arXiv 1602.02068."""
    z = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    above = z.cumsum(-1) - 1
    support = (k * z > above).sum(-1, keepdim=True)
    return torch.relu(x - above.gather(-1, support - 1) / support)


def median_deviation(x: Tensor) -> Tensor:
    return (x - x.median(-1, keepdim=True).values).abs().mean(-1)


def exponential_of_product(x: Tensor) -> Tensor:
    scale = x.square().mean(-1, keepdim=True).tanh()
    return torch.exp(x * scale).sum(-1)


def serial(x: Tensor, w: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(6):
        h = torch.tanh(h * w[t] + x[:, t])
    return h


REFUSED: tuple[Refused, ...] = (
    Refused("quantised_product", quantised_product, shaped("R L", "O L"), ("round",)),
    Refused("sparse_maximum", sparse_maximum, shaped("R L"), ("sort",)),
    Refused("median_deviation", median_deviation, shaped("R L"), ("median",)),
    Refused("exponential_of_product", exponential_of_product, shaped("R L"), ("exp",)),
    Refused("serial", serial, shaped("R L", "L"), ("tanh",)),
)
