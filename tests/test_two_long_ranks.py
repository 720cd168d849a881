"""Reductions over two long ranks, each of which has results that the other one reduces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, elu

import memcomp
from memcomp.codegen.lower import lower
from memcomp.ir.interpret import interpret
from memcomp.ir.text import parse
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.ir.verify import verify
from memcomp.passes.reduce_passes import reduce_passes
from tests.hostile import wrong
from tests.mapped import mapped

OPTIONS: dict[str, Any] = {"rest": "eager", "strict": True, "chains": "all"}

NORMALISER = """
program normaliser
rank P{}
rank M
in K[P, M]: f32
in Q[P, M]: f32
out O[P]: f32
R[m] = sum{{p}} K[p, m]
N[p] = sum{{m}} Q[p, m] * R[m]
O[p] = 1.0 / N[p]
"""


@pytest.mark.parametrize("extent,kernels", [("", 2), (" = 7", 1), (" = 700", 1), (" = 20000", 2)])
def test_what_every_task_would_walk_again_is_made_once(extent: str, kernels: int) -> None:
    """R walks P, of which the tasks have points: a kernel of its own, unless a tile holds all of P."""
    p = parse(NORMALISER.format(extent))
    q = mapped(reduce_passes(p))
    verify(q)
    tiles = lower(q)
    assert len(tiles.kernels) == kernels
    n, rng = min(int(extent.strip(" =") or 50), 700), np.random.default_rng(0)
    a = {k: rng.random((n, 40)) + 0.5 for k in "QK"}
    if n == int(extent.strip(" =") or 50):
        np.testing.assert_allclose(interpret_tile(tiles, a)["O"], interpret(p, a)["O"], rtol=1e-12)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = elu(q) + 1, elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


def both_ways(x: Tensor, y: Tensor) -> Tensor:
    """Symmetric InfoNCE (Radford et al., arXiv 2103.00020)."""
    s, own = x @ y.T, torch.arange(len(x))
    return (cross_entropy(s, own) + cross_entropy(s.T, own)) / 2


def rows_and_columns(x: Tensor, y: Tensor) -> Tensor:
    s = x @ y.T
    return torch.logsumexp(s, 0) + torch.logsumexp(s, 1)


@pytest.mark.usefixtures("fresh", "no_grad")
@pytest.mark.parametrize("fn,shape,count,regions,launches", [
    (linear_attention, (1, 2, 301, 16), 3, 2, 2),  # the normaliser; the product of products
    (both_ways, (301, 24), 2, 1, 4),  # rows, columns, and a mean of each
    (rows_and_columns, (301, 24), 2, 1, 2),
])
def test_layers(fn: Any, shape: tuple[int, ...], count: int, regions: int, launches: int,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memcomp.forms.alternatives", lambda *_: ("", {}))  # shares depend on the cores
    torch.manual_seed(0)
    args = [torch.randn(shape) for _ in range(count)]
    fast = torch.compile(fn, backend="memcomp", options=OPTIONS, fullgraph=True, dynamic=False)
    assert not wrong(fn, args, fast(*args).reshape(fn(*args).shape))
    stats = memcomp.stats()
    assert (stats["regions"], stats["launches"]) == (regions, launches) and not stats["fallbacks"], stats


@pytest.mark.usefixtures("fresh", "no_grad")
def test_rows_and_columns_of_one_product_take_one_pass_each() -> None:
    """Each loop makes its tiles of the scores again; none is stored."""
    (region,) = memcomp.explain(both_ways, torch.randn(300, 24), torch.randn(300, 24)).regions
    assert max(region.passes.before.values()) == 3
    assert all(n == 1 for (t, _), n in region.passes.after.items() if t in ("Q", "K"))
    assert not any(len(p.shape) == 2 for p in lower(region.program).params if p.role == "work")


@pytest.mark.usefixtures("fresh", "no_grad")
@pytest.mark.parametrize("rows,outputs,why", [
    (33, 24, ()),
    (1, 24, ("g1: O needs OP of every P, and g0 has a task for each",)),  # without rows the groups are the tasks
    (33, 4000, ("g1: O needs OP of every P, and g0 has a task for each",)),  # 16,000 sums a row
])
def test_another_launch_says_what_it_waits_for(rows: int, outputs: int, why: tuple[str, ...]) -> None:
    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.group_norm(x, 4) @ w.T

    told = memcomp.explain(grouped, torch.randn(rows, 512), torch.randn(outputs, 512))
    assert tuple(told.json()["regions"][0]["waits"]) == why
    assert all(f"launch {line}" in str(told) for line in why)
