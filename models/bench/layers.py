"""Layers around attention whose normaliser belongs into a product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memcomp.models._inputs import normal
from memcomp.models.bench import Case, Rival, fixed
from memcomp.models.families.reductions import cross_entropy, rms_norm_function

TOKENS, MODEL, WIDE, VOCABULARY = 2048, 576, 1536, 49152


def log_probabilities(x: Tensor, w: Tensor) -> Tensor:
    return F.log_softmax(F.linear(x, w), -1)


def norm(dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: normal((TOKENS, MODEL), (MODEL,), (WIDE, MODEL), dtype=dtype)


def head(dtype: torch.dtype, tokens: int, classes: int = 0) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        x, w = normal((tokens, MODEL), (VOCABULARY, MODEL), dtype=dtype)
        picked = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(2))
        return (x, w * MODEL**-0.5, *([picked] if classes else []))

    return make


def layers(word: str, dtype: torch.dtype) -> tuple[Case, ...]:
    def case(name: str, fn: Callable[..., Tensor], inputs: Callable[[], tuple[Tensor, ...]], flops: float) -> Case:
        return Case(f"layer {word} {name}", fn, inputs, {"Inductor": Rival(fixed(fn), "inductor")},
                    {"Inductor": 1.0}, flops)

    return (
        case(f"RMSNorm + linear ({TOKENS}, {MODEL}) -> {WIDE}", rms_norm_function, norm(dtype),
             2.0 * TOKENS * MODEL * WIDE),
        case(f"linear + cross-entropy, {TOKENS} tokens, vocabulary {VOCABULARY}", cross_entropy,
             head(dtype, TOKENS, VOCABULARY), 2.0 * TOKENS * MODEL * VOCABULARY),
        case(f"linear + log-softmax, 256 tokens, vocabulary {VOCABULARY}", log_probabilities, head(dtype, 256),
             2.0 * 256 * MODEL * VOCABULARY),
    )


CASES = (*layers("f32", torch.float32), *layers("bf16", torch.bfloat16))
