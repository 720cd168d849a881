"""Python loops that Dynamo unrolls: one region and one kernel, or a refusal within seconds that says what to write."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import memcomp
from memcomp.capture.find import find_regions
from memcomp.config import config
from memcomp.ir.traversal import passes
from memcomp.pipeline import compile_program

Fn = Callable[[Tensor, Tensor, Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("fresh")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1) @ v


def queries(q: Tensor, k: Tensor, v: Tensor, w: int = 16) -> Tensor:
    return torch.stack([attend(q[i], k[max(0, i - w):i + 1], v[max(0, i - w):i + 1]) for i in range(q.shape[0])])


def queries_in_heads(q: Tensor, k: Tensor, v: Tensor, w: int = 6) -> Tensor:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (x.unflatten(0, (1, -1)).unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.cat([sdpa(q[:, :, i:i + 1], k[:, :, max(0, i - w):i + 1], v[:, :, max(0, i - w):i + 1])
                      for i in range(q.shape[2])], 2)


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        out[i:i + 1] = attend(q[i:i + 1], k[:i + 1], v[:i + 1])
    return out


def blocks(q: Tensor, k: Tensor, v: Tensor, n: int = 10) -> Tensor:
    return torch.cat([attend(q[b:b + n], k[:b + n], v[:b + n]) for b in range(0, q.shape[0], n)])


def documents(q: Tensor, k: Tensor, v: Tensor, n: int = 8) -> Tensor:
    return torch.cat([attend(q[a:a + n], k[a:a + n], v[a:a + n]) for a in range(0, q.shape[0], n)])


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.unflatten(-1, (4, -1)), k.unflatten(-1, (4, -1)), v.unflatten(-1, (4, -1))
    return torch.stack([attend(q[:, h], k[:, h // 2], v[:, h // 2]) for h in range(4)], 1)


def heads_and_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.unflatten(-1, (2, -1)), k.unflatten(-1, (2, -1)), v.unflatten(-1, (2, -1))
    return torch.stack([torch.stack([attend(q[i:i + 1, h], k[:i + 1, h], v[:i + 1, h])[0] for i in range(q.shape[0])])
                        for h in range(2)])


def arguments(n: int = 24, e: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, e), torch.randn(n, e), torch.randn(n, e)


def dynamo(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> fx.GraphModule:
    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        seen.append(gm)
        return gm.forward

    torch.compile(fn, backend=keep, dynamic=False)(*args)
    return seen[0]


def holds(fn: Fn, args: tuple[Tensor, ...]) -> None:
    """Compiled, `fn` is one launch, and no further from float64 than twice what torch is."""
    compiled = memcomp.compile(fn, dynamic=False, strict=True, rest="eager")
    got = compiled(*args)
    want = fn(*(x.double() for x in args))
    own = (fn(*args) - want).abs().max()
    assert (got - want).abs().max() <= 2 * own + 1e-7
    stats = memcomp.stats()
    assert stats["regions"] == stats["kernels"] == stats["launches"] == 1 and not stats["fallbacks"]


@pytest.mark.parametrize("fn", [queries, queries_in_heads, written, blocks, documents, heads, heads_and_queries])
def test_one_region_and_one_kernel(fn: Fn) -> None:
    holds(fn, arguments(12 if fn is heads_and_queries else 24))


@pytest.mark.slow
def test_256_steps_of_windowed_attention() -> None:
    """One region, one kernel, one pass; memcomp's part takes seconds."""
    args = arguments(256)
    gm = dynamo(queries, args)
    began = time.process_time()
    regions, refused = find_regions(gm)
    assert time.process_time() - began < 5
    assert len(regions) == 1 and not refused
    assert len(regions[0].program.cascade.einsums) == 7
    made = compile_program(regions[0].program, config=config({}))
    was, now = passes(made.before), passes(made.program)
    long = next(r for t, r in was if t == "K" and was[t, r] > 1)
    assert was["K", long] == 3 and now["K", long] == now["V", long] == 1
    torch._dynamo.reset()
    holds(queries, args)


def test_irregular_steps_are_refused_with_the_rewrite() -> None:
    ends = [0, 3, 4, 9, 11, 12, 20, 21, 25, 33, 34, 40, 41, 47, 48, 49, 55, 64]

    def irregular(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q[a:b], k[a:b], v[a:b]) for a, b in zip(ends, ends[1:], strict=False)])

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        memcomp.compile(irregular, dynamic=False, rest="eager")(*arguments(64))
    said = [str(w.message) for w in seen if "does not go on" in str(w.message)]
    assert len(said) == 1 and "one operation over all steps, with a mask" in said[0]
    assert memcomp.stats()["regions"] == 0


def test_a_step_that_differs_is_named() -> None:
    def odd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q[i:i + 1] * (0.5 if i == 20 else 1.0), k[:i + 1], v[:i + 1]) for i in range(24)])

    regions, refused = find_regions(dynamo(odd, arguments()))
    assert not regions and len(refused) == 1 and "step 20" in refused[0].why


def test_attentions_of_different_tensors_are_no_loop() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q, k, v), attend(k, v, q)])

    regions, refused = find_regions(dynamo(two, arguments()))
    assert regions and not refused
    assert not any("steps of one form" in p for r in regions for p in r.program.proofs)
