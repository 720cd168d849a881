"""Inputs that break careless kernels, and how near to float64 a kernel must stay on them, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

EPS = 2.0**-23
SPACING = 2.0**-149  # of denormals


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


def wrong(fn: Callable[..., Any], args: Sequence[Tensor], got: Any) -> list[str]:
    """What is wrong with `got` for fn(*args) in fp32: a NaN that the function as written has not, an infinity that
    float64 has not, or a row further from float64 than twice the most of: the error of the function as written, what
    two roundings of each input move, and four roundings of the sum of absolute terms (args[2] holds what is added)."""
    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    random = torch.Generator().manual_seed(1)

    def rounded(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t + (2 * EPS * t.abs() + SPACING) * torch.randn(t.shape, generator=random, dtype=t.dtype)

    own, exact = leaves(fn(*args)), leaves(fn(*map(wide, args)))
    terms = leaves(fn(*(wide(t).abs() if n == 2 and t.is_floating_point() else wide(t) for n, t in enumerate(args))))
    moved = [leaves(fn(*(rounded(wide(t)) for t in args))) for _ in range(4)]
    out = []
    for n, (a, b, x) in enumerate(zip(leaves(got), own, exact, strict=True)):
        if (bad := a.isnan() & ~b.isnan()).any():
            out.append(f"output {n}: {int(bad.sum())} NaNs where the function has none")
        if (bad := a.isinf() & x.isfinite() & b.isfinite()).any():
            out.append(f"output {n}: {int(bad.sum())} infinities")
        width = x.shape[-1] if x.ndim == 4 else 1

        def rows(t: Tensor, x: Tensor = x, a: Tensor = a, b: Tensor = b, width: int = width) -> Tensor:
            sure = x.isfinite() & b.isfinite() & a.isfinite()
            return torch.where(sure, (t.double() - x).abs(), 0.0).reshape(-1, width).amax(-1)

        size = torch.maximum(x.abs(), terms[n].abs())
        scale = torch.where(size.isfinite(), size, 0.0).reshape(-1, width).amax(-1)
        allowed = 2 * torch.stack([rows(b), *(rows(m[n]) for m in moved), 4 * EPS * scale]).amax(0)
        least = float(scale.max()) * EPS + 1.2e-38
        if (bad := rows(a) > allowed + least).any():
            k = int((rows(a) / (allowed + least)).argmax())
            out.append(f"output {n}: {int(bad.sum())} rows, the worst {rows(a)[k]:.1e} against {allowed[k]:.1e} "
                       f"(as written {rows(b)[k]:.1e})")
    return out
