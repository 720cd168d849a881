"""Reductions over one, two and three dimensions at once: one region, the stated kernels, and right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memcomp
from tests.hostile import wrong

pytestmark = pytest.mark.usefixtures("fresh", "no_grad")


def of_tokens(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.T).flatten(0, 1), target.flatten())


def of_points(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target)


def of_all(x: Tensor) -> Tensor:
    return x.var()


def of_a_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((1, 2)), x.var((1, 2))


def over_batch(x: Tensor, w: Tensor) -> Tensor:
    """Batch normalisation in front of a product."""
    mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), keepdim=True, unbiased=False)
    return torch.einsum("bcl,ol->bco", (x - mean) * torch.rsqrt(var + 1e-5), w)


def of_features(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:]).flatten(1) @ w.T


def grouped_softmax(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x.reshape(x.shape[0], 4, -1), -1).reshape(x.shape) @ w.T


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


CASES: list[tuple[Callable[..., object], tuple[Tensor, ...], int]] = [
    (of_tokens, (normal(3, 19, 16), normal(301, 16), classes(3, 19)), 2),  # the loss of a row; their mean
    (of_points, (normal(3, 301, 19), classes(3, 19)), 2),
    (of_points, (normal(3, 301, 5, 7), classes(3, 5, 7)), 2),
    (of_points, (normal(301), torch.tensor(7)), 1),
    (of_all, (normal(33, 301),), 1),
    (of_all, (normal(301, 33),), 1),
    (of_a_matrix, (normal(5, 70, 301),), 1),
    (over_batch, (normal(9, 4, 301), normal(24, 301)), 1),
    (of_features, (normal(9, 5, 67), normal(24, 335)), 1),
    (grouped_softmax, (normal(33, 1204), normal(24, 1204)), 1),
]


@pytest.mark.parametrize("fn,args,kernels", CASES, ids=[f"{fn.__name__}-{a[0].dim()}d" for fn, a, _ in CASES])
def test_one_region(fn: Callable[..., object], args: tuple[Tensor, ...], kernels: int) -> None:
    options = {"rest": "eager", "strict": True, "chains": "all"}
    got = torch.compile(fn, backend="memcomp", options=options, fullgraph=True, dynamic=False)(*args)
    stats = memcomp.stats()
    assert stats["regions"] == 1 and stats["launches"] == kernels and not stats["fallbacks"], stats
    assert not wrong(fn, args, got)


def test_two_ranks_too_long_for_a_tile_are_refused() -> None:
    x = torch.zeros((), dtype=torch.float32).expand(13_000, 14_000)
    with pytest.warns(UserWarning, match="rank M has no bound and the mapping does not cut it"):
        got = torch.compile(of_all, backend="memcomp", options={"rest": "eager", "chains": "all"})(x)
    assert got == 0
