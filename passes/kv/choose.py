"""Scores by which tokens are chosen, and the choice; everything in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memcomp.passes.kv.account import kept
from memcomp.passes.kv.side import Tables, table
from memcomp.passes.kv.slots import Select

Array = npt.NDArray[Any]


def weights(q: Array, k: Array, at_q: Array, at_k: Array, scale: float) -> Array:
    """Attention weights w[b, h, r, m, n]: of r queries a key head, causal by positions."""
    b, h, n, e = k.shape
    s = np.einsum("bhrme,bhne->bhrmn", q.reshape(b, h, -1, *q.shape[2:]), k) * scale
    s = np.where(at_k[..., None, None, :] <= at_q[:, None], s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return np.asarray(w / w.sum(-1, keepdims=True))


def score(select: Select, k: Array, v: Array, q: Array | None, at: Array, scale: float, tables: Tables) -> Array:
    """What each of the tokens is worth: [b, h, n].  q: the prompt's queries, at the same positions as the tokens."""
    if select.word == "norm":
        worth = -np.sqrt((k * k).sum(-1))
    elif select.word == "direction":
        d = table(tables, "k", "direction")
        worth = (k * (d[:, None] if d.ndim == 2 else d)).sum(-1)
    elif select.word in ("attention", "strip") and q is not None:
        newest = select.window if select.word == "strip" else q.shape[2]
        w = weights(q[:, :, -newest:], k, at[:, 0, None, None, -newest:, None].squeeze(1), at, scale)
        worth = w.sum((2, 3))
    else:
        worth = np.zeros(k.shape[:3])
    if select.weighted:
        worth = worth * np.abs(v).sum(-1)
    return smoothed(worth, select.pool)


def smoothed(x: Array, width: int) -> Array:
    """The greatest of `width` neighbours around each."""
    left = (width - 1) // 2
    wide = np.pad(x, ((0, 0), (0, 0), (left, width - 1 - left)), constant_values=-np.inf)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(wide, width, -1).max(-1))


def chosen(select: Select, worth: Array, of: int) -> Array:
    """The places, in rising order, of the tokens that stay: index[b, h, i].  of: tokens that the share is of."""
    n = worth.shape[-1]
    stay = min(kept(select.budget, select.share, select.unit, of), n)
    if stay == n:
        return np.broadcast_to(np.arange(n), worth.shape)
    units = worth[..., :n // select.unit * select.unit].reshape(*worth.shape[:2], -1, select.unit).mean(-1)
    best = np.sort(np.argsort(-units, axis=-1, kind="stable")[..., :stay // select.unit], -1)
    return (best[..., None] * select.unit + np.arange(select.unit)).reshape(*worth.shape[:2], -1)
