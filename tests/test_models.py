"""Laws of the workloads: every file of models/ is covered the day it appears."""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import memcomp
from memcomp.oracle import measure, tolerance

NAMES = sorted(f.stem for f in (Path(__file__).parent.parent / "models").glob("[a-z]*.py"))
LAUNCHES = {"product_key_memory": 2}  # lists of two halves are searched at once, then joined


def made(name: str, **options: Any) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    module, inputs = import_module(f"memcomp.models.{name}").build(**options)
    return module.eval(), inputs


@pytest.mark.parametrize("name", NAMES)
def test_reproducible_and_near_float64(name: str) -> None:
    before = torch.random.get_rng_state()
    (module, inputs), (again, same) = made(name), made(name)
    assert torch.equal(before, torch.random.get_rng_state())
    twin = copy.deepcopy(module).double()
    wide = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
    with torch.no_grad():
        result = module(*inputs)
        assert torch.equal(result, again(*same)) and result.std() > 0.01
        torch.testing.assert_close(result.double(), twin(*wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str) -> None:
    text = import_module(f"memcomp.models.{name}").__doc__ or ""
    first, _, rest = text.partition("\n")
    assert first.endswith(".") and "->" in rest and ("arXiv" in rest or "20" in rest)


@pytest.mark.filterwarnings("ignore::memcomp.runtime.Fallback")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name: str) -> None:
    """Within the oracle's tolerance, every input left or changed as eager does."""
    memcomp.reset()
    module, inputs = made(name)
    ours, exact = [x.clone() for x in inputs], [x.double() if x.is_floating_point() else x.clone() for x in inputs]
    with torch.no_grad():
        got = torch.compile(module, backend="memcomp", options={"rest": "eager"})(*ours)
        eager = module(*inputs)
        reference = copy.deepcopy(module).double()(*exact)
    for x, y, z in zip((got, *ours), (eager, *inputs), (reference, *exact), strict=True):
        error, torchs = (measure(a.double().numpy(), z.double().numpy()) for a in (x, y))
        bound = tolerance(["f32"], "f32", elements=max(z.numel(), 2), length=None, torch_error=torchs)
        assert bound.admits(error), (error, bound)
    stats = memcomp.stats()
    assert (stats["regions"], stats["launches"]) == (1, LAUNCHES.get(name, 1)) and not stats["fallbacks"], stats
