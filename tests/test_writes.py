"""Writing into the scores, by any spelling and through any view, is seen by what reads them later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memcomp.backend import memcomp as backend

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("ignore::memcomp.runtime.Fallback")]

LIBRARY = torch.library.Library("memcomp_tests", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("double_it(Tensor(a!) x) -> ()")  # type: ignore[no-untyped-call]


def _double(x: Tensor) -> None:
    x.mul_(2)


LIBRARY.impl("double_it", _double, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("memcomp_tests::double_it", lambda x: None, lib=LIBRARY)

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu by position": lambda s: F.relu(s, True),
    "silu by position": lambda s: F.silu(s, True),
    "hardtanh by position": lambda s: F.hardtanh(s, -0.2, 0.2, True),
    "relu by keywords": lambda s: F.relu(input=s, inplace=True),
    "dropout of all": lambda s: F.dropout(s, 1.0, True, True),
    "a module": lambda s: torch.nn.LeakyReLU(0.1, True)(s),
    "diagonal": lambda s: torch.diagonal(s, 1, -2, -1).fill_(0),
    "data": lambda s: s.data.mul_(2),
    "detach": lambda s: s.detach().mul_(2),
    "movedim": lambda s: s.movedim(0, 1).mul_(2),
    "ravel": lambda s: torch.ravel(s).mul_(2),
    "as_strided": lambda s: s.as_strided((5,), (1,)).mul_(20),
    "unfold": lambda s: s.unfold(-1, 2, 2).mul_(2),
    "hsplit": lambda s: torch.hsplit(s, 2)[0].mul_(2),
    "idle contiguous": lambda s: s.contiguous().mul_(2),
    "broadcast_tensors": lambda s: torch.broadcast_tensors(s, s)[0].mul_(2),
    "an operator's packet": lambda s: torch.ops.memcomp_tests.double_it(s),
    "an operator": lambda s: torch.ops.memcomp_tests.double_it.default(s),
    "a copy": lambda s: s.clone().mul_(2),
    "not in place": lambda s: F.relu(s, False),
}


def equal(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    ours, own = ([t.clone() for t in inputs] for _ in range(2))
    torch.testing.assert_close(torch.compile(fn, backend=backend, options={"rest": "eager"})(*ours), fn(*own),
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("name", WRITES)
def test_scores_written_before_they_are_read(name: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        WRITES[name](s)
        return torch.softmax(s, -1) @ v

    equal(fn, *torch.randn(3, 2, 2, 6, 4).unbind())


def test_an_operand_written_once_is_not_written_twice() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = torch.exp(q)
        e.mul_(2)
        return torch.softmax(e @ k.mT, -1) @ v

    equal(fn, *torch.randn(3, 2, 2, 6, 4).unbind())


def test_an_input_written_through_another_that_shows_its_memory() -> None:
    def fn(q: Tensor, k: Tensor, both: Tensor) -> Tensor:
        s = q @ k.mT
        both.mul_(2)
        return torch.softmax(s, -1) @ k

    def called(q: Tensor, both: Tensor) -> Tensor:
        return fn(q, both[..., :4], both)

    equal(called, torch.randn(2, 6, 4), torch.randn(2, 6, 8))
