"""The op of a region: what it takes and gives is the same by every way through torch's dispatcher."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import memcomp
from memcomp import runtime
from memcomp.binding import preparation
from memcomp.ir.errors import Refusal


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    memcomp.reset()
    yield


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def call_of(inputs: Sequence[Tensor]) -> tuple[list[int], str]:
    """(sizes, key) of the op's call in `attention` of such inputs."""
    seen: list[tuple[list[int], str]] = []

    def watched(entry: runtime.Entry, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        seen.append((list(sizes), entry.key))
        return run(entry, tensors, sizes)

    run = runtime.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "run", watched)
        torch.compile(attention, backend="memcomp", dynamic=True, options={"rest": "eager", "strict": True})(*inputs)
    return seen[-1]


DOORS = [pytest.param(torch.ops.memcomp.call.default, id="op"), pytest.param(runtime.call, id="call")]


@pytest.mark.parametrize("op", DOORS)
def test_the_ways_to_the_kernel_agree(op: Callable[..., list[Tensor]]) -> None:
    inputs = torch.randn(3, 1, 2, 5, 8).unbind()
    sizes, key = call_of(inputs)
    want = attention(*inputs)
    launched = memcomp.stats()["launches"]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            got, = op(list(inputs), sizes, key)
        torch.testing.assert_close(got, want)
        assert not got.requires_grad and got.is_inference() == (mode is torch.inference_mode)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.no_grad():
        assert not op(leaves, sizes, key)[0].requires_grad
    got, = op(leaves, sizes, key)
    torch.testing.assert_close(got, want)
    assert got.requires_grad and memcomp.stats()["launches"] == launched + 5


@pytest.mark.parametrize("op", DOORS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_mode_sees_the_op_and_a_fake_tensor_never_reaches_the_kernel(op: Callable[..., list[Tensor]],
                                                                        inference: bool) -> None:
    inputs = torch.randn(3, 1, 2, 5, 8).unbind()
    sizes, key = call_of(inputs)
    launched = memcomp.stats()["launches"]

    class Log(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with torch.inference_mode(inference):
        op(list(inputs), sizes, key)  # the plain way first: what it left behind must not shortcut the others
        with Log():
            op(list(inputs), sizes, key)
        assert seen == [torch.ops.memcomp.call.default] and memcomp.stats()["launches"] == launched + 2
        with FakeTensorMode() as fake:
            out, = op([fake.from_tensor(t) for t in inputs], sizes, key)
    assert type(out).__name__ == "FakeTensor" and memcomp.stats()["launches"] == launched + 2


@pytest.mark.parametrize("op", DOORS)
def test_inputs_that_are_negated_lazily(op: Callable[..., list[Tensor]]) -> None:
    """torch resolves them below autograd."""
    inputs = torch.randn(3, 1, 2, 5, 8).unbind()
    sizes, key = call_of(inputs)
    lazy = torch.complex(torch.zeros_like(inputs[0]), -inputs[0]).conj().imag
    assert lazy.is_neg()
    got, = op([lazy, *inputs[1:]], sizes, key)
    torch.testing.assert_close(got, attention(*inputs))


def test_a_graph_that_python_runs_calls_the_kernel_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """But only where nothing else would see the op: a class of the user's, a function mode, a profiler do."""
    inputs = torch.randn(3, 1, 2, 5, 8).unbind()
    sizes, key = call_of(inputs)
    through: list[str] = []
    ways = {runtime._call.__code__, runtime._call_autograd.__code__}

    def seen(entry: runtime.Entry, tensors: Sequence[Tensor], shapes: Sequence[int]) -> list[Tensor]:
        through.append("op" if ways & {f.frame.f_code for f in inspect.stack()} else "past")
        return run(entry, tensors, shapes)

    class Own(Tensor):
        pass

    run = runtime.run
    monkeypatch.setattr(runtime, "run", seen)
    compiled = torch.compile(attention, backend="memcomp", dynamic=True, options={"rest": "eager", "strict": True})
    torch.testing.assert_close(compiled(*inputs), attention(*inputs))
    assert through == ["past"]
    got, = runtime.call([t.as_subclass(Own) for t in inputs], sizes, key)
    assert isinstance(got, Own)
    with torch.overrides.BaseTorchFunctionMode():
        runtime.call(list(inputs), sizes, key)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        runtime.call(list(inputs), sizes, key)
    assert "memcomp::call" in {e.key for e in profile.key_averages()}
    assert through == ["past", "op", "op", "op"]


@pytest.mark.parametrize("order", [(), *itertools.permutations(range(3))])
def test_new_tensors_are_laid_out_as_torch_does(order: tuple[int, ...]) -> None:
    """Also where an extent is 0 or 1, fixed or not."""
    texts = ["t[0].shape[0]", "(3)", "(t[0].shape[1] * s[0])"]
    prepare = preparation([2], [(texts, torch.float16, order)], [(["(2)", texts[2]], torch.int64, ())],
                          ["s[0]", texts[2]])
    for rows, columns, n in itertools.product((0, 1, 5), (0, 2), (1, 4)):
        x = torch.zeros(columns, rows).T
        (out,), args = prepare([x], [n])
        extents = (rows, 3, columns * n)
        dims = order or range(3)
        want = torch.empty([extents[d] for d in dims], dtype=torch.float16).permute(
            sorted(range(3), key=dims.__getitem__))
        assert (out.shape, out.stride(), out.dtype) == (want.shape, want.stride(), want.dtype)
        first, second, work, *ints = args
        assert second is out and ints == [n, columns * n]
        assert work.shape == (2, columns * n) and work.dtype == torch.int64
        assert torch.equal(first, x) and (first.stride()[-1] == 1 or not x.numel())


def test_tangents_are_never_dropped() -> None:
    inputs = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    tangent = torch.randn_like(inputs[0])

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(by_hand(forward_ad.make_dual(q, tangent), k, v)).tangent  # type: ignore[return-value]

    want, options = inside(*inputs), {"rest": "eager", "strict": False}
    with pytest.warns(runtime.Fallback, match="jvp"):
        torch.testing.assert_close(torch.compile(inside, backend="memcomp", options=options)(*inputs), want)
    compiled = torch.compile(by_hand, backend="memcomp", options=options)
    with forward_ad.dual_level(), pytest.warns(runtime.Fallback, match="jvp"):
        runtime.reset()
        dual = compiled(forward_ad.make_dual(inputs[0], tangent), *inputs[1:])
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want)
    torch._dynamo.reset()
    assert compiled(*inputs).shape == want.shape and memcomp.stats()["launches"] == 1
    with forward_ad.dual_level(), pytest.raises(Refusal, match="tangents"):
        compiled(forward_ad.make_dual(inputs[0], tangent), *inputs[1:])
