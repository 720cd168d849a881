"""Sums of products as matrix products, so that scores of 4096 x 4096 do not cost their p*m*f intermediate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from memcomp.ir.evaluate import Array


def contract(factors: Sequence[Array], shape: tuple[int, ...], keep: int) -> Array:
    """Sum over the axes from `keep` on of the product of the factors.

    Each factor has a dimension per axis of `shape`, of length 1 where it does not vary; so has the result over its
    first `keep` axes (length 1 where no factor varies).
    """
    parts = [f.astype(np.int64) if f.dtype == bool else f for f in factors]
    parts = [f.reshape((1,) * (len(shape) - f.ndim) + f.shape) for f in parts]
    reduced = range(keep, len(shape))
    times = math.prod(shape[a] for a in reduced if all(f.shape[a] == 1 for f in parts))
    # a reduced axis that only one factor has is summed there first; products of the same axes are joined
    parts.sort(key=lambda f: f.size)
    joined: list[Array] = []
    out: Array
    while parts:
        f = parts.pop(0)
        host = next((k for k, g in enumerate(parts) if all(n in (1, m) for n, m in zip(f.shape, g.shape, strict=True))),
                    None)
        if host is None:
            joined.append(f)
        else:
            parts[host] = parts[host] * f
    while len(joined) > 2:
        joined.sort(key=lambda f: f.size)
        a, b, *rest = joined
        # axes that no other factor and no output needs can go now
        gone = [ax for ax in reduced if all(f.shape[ax] == 1 for f in rest)]
        joined = [_pair(a, b, gone), *rest]
    if len(joined) == 1:
        out = joined[0].sum(axis=tuple(reduced), keepdims=True)
    else:
        out = _pair(joined[0], joined[1], list(reduced))
    out = out.reshape(out.shape[:keep])
    return np.multiply(out, times) if times != 1 else out


def _pair(a: Array, b: Array, gone: Sequence[int]) -> Array:
    """Sum over the axes `gone` of a * b, by matmul; the summed axes keep length 1."""
    def alone(x: Array, y: Array) -> Array:
        axes = tuple(ax for ax in gone if x.shape[ax] > 1 and y.shape[ax] == 1)
        return x.sum(axis=axes, keepdims=True) if axes else x

    a, b = alone(a, b), alone(b, a)
    axes = range(a.ndim)
    both = [ax for ax in axes if a.shape[ax] > 1 and b.shape[ax] > 1]
    summed = [ax for ax in both if ax in gone]
    batch = [ax for ax in both if ax not in gone]
    left = [ax for ax in axes if ax not in both and a.shape[ax] > 1]
    right = [ax for ax in axes if ax not in both and b.shape[ax] > 1]
    ones = [ax for ax in axes if a.shape[ax] == 1 and b.shape[ax] == 1]
    n = math.prod(a.shape[ax] for ax in summed)
    lead = tuple(a.shape[ax] for ax in batch)
    x = a.transpose(batch + left + summed + right + ones).reshape(*lead, math.prod(a.shape[ax] for ax in left), n)
    y = b.transpose(batch + summed + right + left + ones).reshape(*lead, n, math.prod(b.shape[ax] for ax in right))
    z: Array = np.matmul(x, y)
    shape = [*lead, *(a.shape[ax] for ax in left), *(b.shape[ax] for ax in right)]
    order = batch + left + right
    z = z.reshape(shape + [1] * (a.ndim - len(order)))
    return z.transpose(np.argsort(order + [ax for ax in axes if ax not in order]))
