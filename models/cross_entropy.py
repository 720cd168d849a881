"""The head of a language model: logits over the vocabulary and the loss of each token, log-sum-exp minus its logit.

x (N, D), target (N,) int64 -> loss (N,); weight (V, D).
Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memcomp.models._inputs import normal


class Head(nn.Module):
    def __init__(self, model: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal((vocabulary, model), seed=1)[0] * model**-0.5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = x @ self.weight.T
        highest = logits.amax(-1, keepdim=True)
        total = torch.exp(logits - highest).sum(-1, keepdim=True)
        return (torch.log(total) + highest - logits.gather(-1, target[:, None]))[:, 0]


def build(tokens: int = 40, model: int = 32, vocabulary: int = 200) -> tuple[nn.Module, tuple[Tensor, ...]]:
    target = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    return Head(model, vocabulary), (*normal((tokens, model)), target)
