"""What GPU kernels compute where it is easy to be wrong: odd strides, NaN, shares without points, pages, places.

By Triton's interpreter, against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from memcomp.models._inputs import normal
from memcomp.models.families import families
from tests.hostile import wrong

pytest.importorskip("triton", reason="Triton is not installed")
INF = float("inf")


def interpreted(fn: Callable[..., Any], *args: Tensor, **options: Any) -> Any:
    torch._dynamo.reset()
    how = {"target": "h100", "interpret": True, "rest": "eager", "strict": True, **options}
    with torch.no_grad():
        return torch.compile(fn, backend="memcomp", options=how, dynamic=False)(*args)


def near(got: Tensor, fn: Callable[..., Any], *args: Tensor) -> None:
    exact = fn(*(t.double() if t.is_floating_point() else t for t in args))
    own = (fn(*args).double() - exact).norm()
    assert (got.double() - exact).norm() <= 1.5 * own + 1e-7 * exact.norm()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def test_tensors_that_overlap_or_have_gaps() -> None:
    """One KV head for all, as it is expanded, and every other column of a wider tensor; bf16, which is converted."""
    q, k, v = (t.to(torch.bfloat16) for t in normal((2, 3, 19, 32), (2, 1, 37, 16), (1, 1, 37, 16)))
    args = q[..., ::2], k.expand(2, 3, 37, 16), v.expand(2, 3, 37, 16)
    near(interpreted(plain, *args), plain, *args)


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_a_row_of_nan_is_no_row_without_points(target: str) -> None:
    q, k, v = normal((1, 2, 9, 16), (1, 2, 70, 16), (1, 2, 70, 16))
    q[0, 1, 3, 2] = math.nan
    seen = torch.ones(9, 70, dtype=torch.bool)
    seen[5] = False

    def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen)

    got = interpreted(masked, q, k, v, seen, target=target, interpret=target != "cpu")
    assert got[0, 1, 3].isnan().all() and int(got.isnan().sum()) == 16 and not got[:, :, 5].any()


def paged(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """q (B, J, G, E) over pages of 16 (pages, 16, J, E), of which row b reads `lengths[b]` places."""
    m = torch.arange(16 * table.shape[1])
    k, v = (x[table[:, m // 16], m % 16] for x in (keys, values))
    s = torch.einsum("bjge,bmje->bjgm", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(m >= lengths[:, None, None, None], -INF)
    return torch.einsum("bjgm,bmje->bjge", torch.softmax(s, -1), v)


def test_pages_and_lengths() -> None:
    q, k, v = (t.to(torch.bfloat16) for t in normal((2, 2, 3, 32), (9, 16, 2, 32), (9, 16, 2, 32)))
    table = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:8].view(2, 4)
    args = q, k, v, table, torch.tensor([50, 1])
    near(interpreted(paged, *args), paged, *args)


def test_norms_in_front_and_products_behind() -> None:
    def layer(x: Tensor, w: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        q = rms_norm(x, (x.shape[-1],), w, 1e-6).view(1, -1, 2, 16).transpose(1, 2)
        return x + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ out

    args = normal((1, 5, 32), (32,), (1, 2, 37, 16), (1, 2, 37, 16), (32, 32))
    near(interpreted(layer, *args), layer, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_of_few_rows(dtype: torch.dtype) -> None:
    """Its one loop is over tiles of a rank, and has fewer tasks than the machine has processors; the root of an f64."""
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), w, 1e-6)

    args = [t.to(dtype) for t in normal((7, 100), (100,))]
    got = interpreted(norm, *args, chains="all")
    torch.testing.assert_close(got, norm(*(t.double() for t in args)).to(dtype))


def test_f64_is_f64_throughout() -> None:
    """A hyperbolic tangent near 0, integers of more than 24 bits."""
    def total(x: Tensor, t: Tensor) -> Tensor:
        return (torch.tanh(x) * t.double()).sum(-1)

    args = normal((5, 100))[0].double() * 0.3, torch.arange(500).view(5, 100) * 2**31
    torch.testing.assert_close(interpreted(total, *args, chains="all"), total(*args), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["gated_pick", pytest.param("top_renormalised", marks=pytest.mark.slow),
                                  "group_norm_joined"])
def test_places_and_norms_over_parts(name: str) -> None:
    """Shares without points, comparisons of single numbers, reductions over a part of what a product joins."""
    family = next(f for f in families() if f.name == name)
    args = family.inputs(9, 70, torch.float32)
    assert not wrong(family.fn, args, interpreted(family.fn, *args, chains="all"))
