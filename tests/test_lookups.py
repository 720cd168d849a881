"""Places that index tensors name: a region raises where torch raises, and looks only where there are such tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import memcomp
from memcomp import runtime

CLASSES, ROWS = 10, 6
Fn = Callable[..., Tensor]


def attend(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ k


def losses(x: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(x, t)


def flattened(x: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(x.view(2, 3, CLASSES).view(-1, CLASSES), t.view(2, 3).view(-1))


def shifted(x: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(x[:-1], t[1:])


def ignoring(x: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(x, t, ignore_index=3)


def picked(x: Tensor, t: Tensor) -> Tensor:
    return torch.log_softmax(x, -1).gather(1, t[:, None]).sum()


def biased(x: Tensor, t: Tensor) -> Tensor:
    """Read through, with a table of fewer elements than are read."""
    keys = x.repeat(3, 1)
    return attend(x[None], keys[None], x[0][t[:, None].expand(ROWS, 3 * ROWS)])


def segments(x: Tensor, t: Tensor) -> Tensor:
    ids = torch.arange(CLASSES) // 2
    own = (ids + (t[:1] - t[:1]))[t]
    return scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=own[:, None] == own[None, :])


FUNCTIONS = [losses, flattened, shifted, ignoring, picked, biased, segments]


def compiled(fn: Fn, **options: object) -> Fn:
    torch._dynamo.reset()
    memcomp.reset()
    return torch.compile(fn, backend="memcomp", options={"strict": True}, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, CLASSES), torch.randint(4, CLASSES, (ROWS,))


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_raises_where_torch_does(fn: Fn, given: tuple[Tensor, Tensor]) -> None:
    x, t = given
    fast = compiled(fn)
    torch.testing.assert_close(fast(x, t), fn(x, t), atol=1e-5, rtol=1e-4)
    assert memcomp.stats()["regions"] == 1
    for place in (0, 2, ROWS - 1):
        for wrong in (CLASSES, -CLASSES - 1, 3, -100):
            bad = t.clone()
            bad[place] = wrong
            try:
                want: Tensor | None = fn(x, bad)
            except (IndexError, RuntimeError):
                want = None
            if want is not None:
                torch.testing.assert_close(fast(x, bad), want, atol=1e-5, rtol=1e-4, equal_nan=True)
                continue
            launched = memcomp.stats()["launches"]
            with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for a dimension of {CLASSES} "):
                fast(x, bad)
            assert memcomp.stats()["launches"] == launched


@pytest.mark.parametrize("classes", [7, 12])
def test_lengths_that_are_symbols(given: tuple[Tensor, Tensor], classes: int) -> None:
    x, t = torch.randn(ROWS, classes), given[1] % classes
    fast = compiled(losses, dynamic=True)
    torch.testing.assert_close(fast(x, t), losses(x, t))
    with pytest.raises(IndexError, match=f"of {classes} elements"):
        fast(x, t + classes)


def test_gradients_are_those_of_torch(given: tuple[Tensor, Tensor]) -> None:
    x, t = given
    found = []
    for fn in (compiled(shifted), shifted):
        leaf = x.clone().requires_grad_()
        fn(leaf, t).backward()  # type: ignore[no-untyped-call]
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_nothing_is_looked_at_without_index_tensors(given: tuple[Tensor, Tensor],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_ENTRIES", {})
    x = given[0]

    def positions(x: Tensor) -> Tensor:
        """Indices that no data decides."""
        at = torch.arange(ROWS)
        bias = x[0][(at[:, None] - at[None, :]).clamp(0, CLASSES - 1)]
        return attend(x[None], x[None], bias)

    compiled(positions)(x)
    made = runtime._ENTRIES.values()
    assert made and not any(e.checks or e.checked for e in made)


def test_division_by_data_stays_with_torch(given: tuple[Tensor, Tensor]) -> None:
    """torch raises where the divisor is 0."""

    def blocks(x: Tensor, n: Tensor) -> Tensor:
        own = torch.arange(ROWS) // n
        return scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=own[:, None] == own[None, :])

    x, n = given[0], torch.tensor(2)
    fast = compiled(blocks)
    torch.testing.assert_close(fast(x, n), blocks(x, n))
    assert memcomp.stats()["regions"] == 1
    with pytest.raises(RuntimeError):
        fast(x, torch.tensor(0))
