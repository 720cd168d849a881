"""Inputs that break careless kernels, and how near to float64 a kernel must stay on them, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.rows import EPS, bound

SPACING = 2.0**-149  # of denormals
SMALLEST = 2.0**-126  # normal number: below it a kernel may write 0
COPIES = 7


def leaves(x: Any) -> list[Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def hostile(args: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Variants of (q, k, v, ...): extreme scores, ties, denormals, an outlier, drift, infinite scores."""
    q, k, v, *more = args
    keys = k.shape[-2]

    def far(x: float) -> Tensor:
        one = torch.zeros_like(k[..., :1, :])
        one[..., 0] = x  # the score is +-x by the sign of the query's first element
        return torch.cat([k[..., : keys // 2, :], one, k[..., keys // 2 + 1:, :]], -2)

    ramp = torch.linspace(-1.0, 1.0, keys, dtype=k.dtype)[:, None] * q.mean((0, 2), keepdim=True)[:, : k.shape[1]]
    at = torch.arange(keys)[:, None] == keys // 3
    yield "scores of 1e4", [q * 3e3, k, v, *more]
    yield "ties", [q, k[..., :1, :].expand_as(k).contiguous(), v, *more]
    yield "denormal scores", [q * 1e-19, k * 1e-20, v, *more]
    yield "denormal values", [q, k, v * 1e-40, *more]
    yield "an outlier among keys", [q, torch.where(at, k * 1e3, k), v, *more]
    yield "an outlier among values", [q, k, torch.where(at, v * 1e6, v), *more]
    yield "rising", [q, k + 30.0 * ramp, v, *more]
    yield "falling", [q, k - 30.0 * ramp, v, *more]
    yield "an infinite score", [q, far(float("inf")), v, *more]
    yield "nothing but -inf", [q.abs() + 0.1, torch.full_like(k, -float("inf")), v, *more]
    for n, t in enumerate(more, 3):
        def changed(new: Tensor, n: int = n) -> list[Tensor]:
            return [*args[:n], new, *args[n + 1:]]

        if t.shape[-1:] == (keys,) and t.ndim > 1:
            tiles, row = torch.arange(keys) // 32 % 3 == 1, torch.arange(t.shape[-2])[:, None] == 1
            low: bool | float = False if t.dtype == torch.bool else -float("inf")
            yield "whole tiles masked", changed(t.masked_fill(tiles | (torch.arange(keys) < 64), low))
            yield "a row masked", changed(t.masked_fill(row, low))
            yield "all masked", changed(torch.full_like(t, low))
            if t.is_floating_point():
                yield "an infinite bias", changed(t.masked_fill(row & (torch.arange(keys) == 40), float("inf")))
        elif t.dtype == torch.int64:
            yield "no key at all", changed(torch.full_like(t, -1))
            yield "one key or one document", changed(torch.ones_like(t))


def wrong(fn: Callable[..., Any], args: Sequence[Tensor], got: Any, copies: int = COPIES) -> list[str]:
    """What is wrong with `got` for fn(*args) in fp32: a NaN that the function as written has not, an infinity that
    float64 has not, or a row further from float64 than `rows.bound` (the last dim of a matrix, and of what has as many
    dims as the first argument, is a row; of others, such as a number a query, every element is one).

    copies: how many times the data are moved by a last place or two to see what the function as written loses.
    """
    random = torch.Generator().manual_seed(1)

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t + (2 * EPS * t.abs() + SPACING) * torch.randn(t.shape, generator=random, dtype=t.dtype)

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    draws = [list(args), *([moved(t) for t in args] for _ in range(copies))]
    naive = [(leaves(fn(*a)), leaves(fn(*map(wide, a)))) for a in draws]
    own, exact = naive[0]
    out = []
    for n, (a, b, x) in enumerate(zip(leaves(got), own, exact, strict=True)):
        if (bad := a.isnan() & ~b.isnan()).any():
            out.append(f"output {n}: {int(bad.sum())} NaNs where the function has none")
        if (bad := a.isinf() & x.isfinite() & b.isfinite()).any():
            out.append(f"output {n}: {int(bad.sum())} infinities")
        width = x.shape[-1] if x.ndim in (2, args[0].ndim) else 1

        def rows(t: Tensor, x: Tensor, width: int = width) -> Tensor:
            """The largest error of each row, where both are finite."""
            off = torch.where(x.isfinite() & t.isfinite(), (t.double() - x).abs(), 0.0)
            return off.reshape(-1, width).amax(-1)

        largest = torch.where(x.isfinite(), x.abs(), 0.0).reshape(-1, width).amax(-1)
        lost = torch.stack([rows(t[n], w[n]) for t, w in naive]).amax(0)
        allowed = bound(lost, largest) + SMALLEST
        off = rows(torch.where(b.isfinite(), a, float("nan")), x)
        if (bad := off > allowed).any():
            k = int((off / allowed).argmax())
            out.append(f"output {n}: {int(bad.sum())} rows, the worst {off[k]:.1e} against {allowed[k]:.1e} "
                       f"(as written {lost[k]:.1e}, largest {largest[k]:.1e})")
    return out
