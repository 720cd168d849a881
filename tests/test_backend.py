"""The torch.compile backend, end to end on small modules."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memcomp
from memcomp import runtime
from memcomp.backend import memcomp as backend
from memcomp.oracle import measure, tolerance

pytestmark = pytest.mark.usefixtures("fresh")


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend=backend, options={"rest": "eager", "strict": True, **options})


def same(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """`actual` is as near to float64 as the oracle asks of it."""
    dtype = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[eager.dtype]
    assert actual.dtype == eager.dtype and actual.shape == eager.shape
    got, own, want = (t.detach().double().numpy() for t in (actual, eager, exact))
    bound = tolerance([dtype], dtype, elements=max(want.size, 1), length=None, torch_error=measure(own, want))
    error = measure(got, want)
    assert bound.admits(error), (error, bound)


def agrees(fn: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    double = [t.double() if t.is_floating_point() else t for t in inputs]
    same(compiled(fn, **options)(*inputs), fn(*inputs), fn(*double))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, float("-inf")), -1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, j, m, e = k.shape
    g = q.shape[1] // j
    k, v = (x[:, :, None].expand(b, j, g, m, x.shape[-1]).reshape(b, j * g, m, x.shape[-1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def qkv(heads: int = 2, kv: int = 2, queries: int = 33, keys: int = 33, e: int = 16, batch: int = 1,
        dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(batch, heads, queries, e, dtype=dtype), torch.randn(batch, kv, keys, e, dtype=dtype),
            torch.randn(batch, kv, keys, e, dtype=dtype))


class Block(nn.Module):
    """Attention with its projections, and something for the rest to fuse."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, p, w = x.shape
        q, k, v = self.qkv(x).view(b, p, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        return x + self.out(causal(q, k, v).transpose(1, 2).reshape(b, p, w)).relu()


def blocks(n: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(n)))


@pytest.mark.parametrize("fn", [causal, by_hand])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_runs_in_one_kernel(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    agrees(fn, *qkv(dtype=dtype))
    found = memcomp.stats()
    assert (found["regions"], found["kernels"], found["launches"], found["fallbacks"]) == (1, 1, 1, {})


@pytest.mark.parametrize("fn", [grouped, repeated])
@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("queries", [1, 17])
def test_heads_that_share_keys(fn: Callable[..., Tensor], kv: int, queries: int) -> None:
    agrees(fn, *qkv(heads=6, kv=kv, queries=queries, keys=40))
    assert memcomp.stats()["regions"] == 1


@pytest.mark.parametrize("batch,length", [(0, 8), (2, 0)])
def test_nothing_to_compute_launches_nothing(batch: int, length: int) -> None:
    inputs = qkv(batch=batch, queries=length, keys=length)
    assert compiled(causal)(*inputs).shape == inputs[0].shape
    assert memcomp.stats()["launches"] == 0


def test_views_of_any_layout() -> None:
    q, k, v = qkv(e=24)
    inputs = (q.transpose(-1, -2).contiguous().transpose(-1, -2), k[..., :1].expand_as(k),
              torch.randn(1 + v.numel())[1:].view_as(v))
    agrees(causal, *inputs)


def test_equal_layers_share_one_kernel_and_inductor_keeps_the_rest() -> None:
    model = blocks(3).eval()
    with torch.no_grad():
        x = torch.randn(2, 20, 32)
        got = torch.compile(model, backend=backend, options={"strict": True}, fullgraph=True)(x)
        want = model(x)
        same(got, want, model.double()(x.double()))
    found = memcomp.stats()
    assert (found["regions"], found["kernels"], found["launches"], found["fallbacks"]) == (3, 1, 3, {})


@pytest.mark.skipif(not entry_points(group="torch_dynamo_backends", name="memcomp"), reason="memcomp is not installed")
def test_by_its_registered_name() -> None:
    torch.compile(causal, backend="memcomp", options={"rest": "eager", "strict": True})(*qkv())
    assert memcomp.stats()["regions"] == 1


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_ten_steps_of_training_equal_eagers(rest: str) -> None:
    models = [Block(), Block()]
    models[1].load_state_dict(models[0].state_dict())
    steps = [models[0], torch.compile(models[1], backend=backend, options={"rest": rest, "strict": True})]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    for _ in range(10):
        x = torch.randn(2, 12, 32)
        for step, optimizer in zip(steps, optimizers, strict=True):
            optimizer.zero_grad()
            step(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert memcomp.stats()["regions"] == 1 and memcomp.stats()["launches"] == 10


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(k.shape[-2])[None, :] <= torch.arange(q.shape[-2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("fn,kv", [(by_hand, 6), (grouped, 2), (repeated, 2), (masked, 3)])
def test_gradients_of_every_form_and_length(fn: Callable[..., Tensor], kv: int) -> None:
    fast = compiled(fn)
    for length in (12, 21, 30):  # the second becomes symbolic
        ours = [t.requires_grad_() for t in qkv(heads=6, kv=kv, queries=length, keys=length)]
        theirs, exact = ([t.detach().to(d).requires_grad_() for t in ours] for d in (torch.float32, torch.float64))
        for f, leaves in ((fast, ours), (fn, theirs), (fn, exact)):
            f(*leaves).square().sum().backward()
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert a.grad is not None and b.grad is not None and c.grad is not None
            same(a.grad, b.grad, c.grad)
    assert memcomp.stats()["fallbacks"] == {} and memcomp.stats()["regions"] == 2


def test_autocast_no_grad_and_inference_mode() -> None:
    model = Block().eval()
    fast, x = compiled(model), torch.randn(2, 12, 32)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with mode():
            got, want = fast(x), model(x)
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, atol=2e-2 if torch.is_tensor(got) and mode not in (
            torch.no_grad, torch.inference_mode) else 1e-5)
    assert memcomp.stats()["fallbacks"] == {} and memcomp.stats()["launches"] == 3


def test_autocast_around_the_region_keeps_its_dtypes_and_gradients() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return causal(q, k, v)

    ours, theirs = ([t.clone().requires_grad_() for t in qkv()] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    got, want = compiled(fn)(*ours), fn(*theirs)
    assert got.dtype == want.dtype == torch.bfloat16
    got.sum().backward()
    want.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == b.grad.dtype
        assert torch.allclose(a.grad, b.grad, atol=0.05)


def fixed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = q @ k.mT
    return torch.softmax(s, -1) @ v


def fixed_slope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    with torch.no_grad():
        m = s.amax(-1, keepdim=True) * 0.5
    e = torch.exp(s * m)
    return e / e.sum(-1, keepdim=True) @ v


def detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).detach(), -1) @ v


@pytest.mark.parametrize("fn", [fixed_scores, fixed_slope, detached])
def test_gradients_stop_where_the_user_stops_them(fn: Callable[..., Tensor]) -> None:
    ours, own = ([t.clone().requires_grad_() for t in qkv(queries=7, keys=9, e=4)] for _ in range(2))
    for a, b in zip(ours, own, strict=True):
        b.data.copy_(a.data)
    compiled(fn)(*ours).square().sum().backward()
    fn(*own).square().sum().backward()
    assert memcomp.stats()["regions"] == 1
    for a, b in zip(ours, own, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def slope(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.func.grad(lambda x: fn(x, k, v).sum())(q)


@pytest.mark.parametrize("transform", [torch.vmap, slope])
def test_inside_a_transform_of_functions_torch_keeps_it(transform: Callable[..., Any]) -> None:
    fn, inputs = transform(by_hand), qkv(queries=7, keys=7)
    with pytest.warns(runtime.Fallback, match="transform of functions"):
        got = torch.compile(lambda *x: fn(*x), backend=backend, options={"rest": "eager"})(*inputs)
    torch.testing.assert_close(got, fn(*inputs))


def test_what_does_not_broadcast_after_a_region_is_left_alone() -> None:
    agrees(lambda q, k, v: F.conv2d(causal(q, k, v), torch.ones(5, 2, 3, 3, dtype=q.dtype)), *qkv(queries=7, keys=7))
    assert memcomp.stats()["launches"] == 1


def test_a_result_is_laid_out_as_its_views_need() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o = by_hand(q, k, v)
        return o.view(-1)[:3], o.transpose(1, 2) * 1

    inputs = qkv(queries=7, keys=9, e=4)
    torch.testing.assert_close(compiled(fn)(*inputs), fn(*inputs), rtol=1e-4, atol=1e-5)
    assert memcomp.stats()["regions"] == 1


def test_a_growing_cache_compiles_at_most_twice() -> None:
    fast = compiled(grouped)
    q, k, v = qkv(heads=6, kv=2, queries=1, keys=64)
    with torch.no_grad():
        for length in range(5, 40, 5):
            same(fast(q, k[:, :, :length], v[:, :, :length]), grouped(q, k[:, :, :length], v[:, :, :length]),
                 grouped(q.double(), k[:, :, :length].double(), v[:, :, :length].double()))
    found = memcomp.stats()
    assert found["graphs"] <= 2 and found["recompilations"] <= 1 and found["kernels"] == 1


def test_two_threads_and_two_models() -> None:
    models = [Block(32, 4).eval(), Block(64, 2).eval()]
    inputs = [torch.randn(1, 24, 32), torch.randn(1, 24, 64)]
    fast = [compiled(m) for m in models]
    wrong: list[float] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                wrong.append(float((fast[i](inputs[i]) - models[i](inputs[i])).abs().max()))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wrong) == 80 and max(wrong) < 1e-5
    assert memcomp.stats()["launches"] == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork() -> None:
    fast, inputs = compiled(causal), qkv()
    want = fast(*inputs)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(fast(*inputs), want) else 2
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_reset_of_dynamo_resets_and_functions_compiled_before_keep_running() -> None:
    inputs = qkv()
    fast = compiled(causal)
    want = fast(*inputs)
    memcomp.reset()
    assert memcomp.stats()["regions"] == 0
    assert torch.equal(fast(*inputs), want)
    torch._dynamo.reset()
    assert memcomp.stats()["launches"] == 0


def test_own_failure_leaves_the_region_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("memcomp.backend.compile_program", fail)
    inputs = qkv()
    with pytest.warns(runtime.Fallback, match="region0 .*test_backend.*broken on purpose") as seen:
        got = torch.compile(blocks(2), backend=backend, options={"rest": "eager"})(torch.randn(1, 5, 32))
    assert got.shape == (1, 5, 32) and len([w for w in seen if w.category is runtime.Fallback]) == 1
    assert memcomp.stats()["fallbacks"] == {"RuntimeError: broken on purpose": 2}
    with pytest.raises(Exception, match="broken on purpose"):
        compiled(causal)(*inputs)


def test_inductor_that_cannot_build_leaves_the_rest_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    model, x = blocks(2).eval(), torch.randn(1, 5, 32)
    with pytest.warns(runtime.Fallback, match="no C\\+\\+ compiler"), torch.no_grad():
        got = torch.compile(model, backend=backend)(x)
        assert torch.allclose(got, model(x), atol=1e-5)
    assert memcomp.stats()["launches"] == 2


@pytest.mark.parametrize(("fn", "left"), [
    (causal, False),
    (lambda q, k, v: causal(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).mT, False),
    (lambda q, k, v: causal(q, k, v)[..., :k.shape[2] - 1], False),
    (lambda q, k, v: causal(q, k, v).transpose(1, 2).flatten(2), True),  # a copy
    (lambda q, k, v: causal(q, k, v).mul_(2), True),
])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_is_asked_only_where_something_is_left(fn: Callable[..., Tensor], left: bool, dynamic: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def rest(gm: torch.fx.GraphModule, *_: object, **__: object) -> Callable[..., Any]:
        asked.append(gm)
        return gm.forward

    asked: list[torch.fx.GraphModule] = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", rest)
    inputs = qkv()
    got = torch.compile(fn, backend=backend, options={"strict": True}, dynamic=dynamic)(*inputs)
    assert torch.allclose(got, fn(*inputs), atol=1e-5) and bool(asked) == left
    assert memcomp.stats()["launches"] == 1


def test_what_is_overwritten_in_between_is_not_moved_across() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        scores = q @ k.transpose(-2, -1)
        k.zero_()
        return torch.softmax(scores, -1) @ v + k.sum()

    inputs = qkv()
    with pytest.warns(runtime.Fallback, match="is written|overwrites"):
        got = torch.compile(fn, backend=backend, options={"rest": "eager"})(*inputs)
    assert torch.allclose(got, fn(*inputs), atol=1e-5)


@pytest.mark.parametrize("options", [{"tarqet": "cpu"}, {"rest": "nothing"}, {"target": "z80"}, {"strict": "yes"},
                                     {"tune": "please"}, {"rest_options": 3}, {"dump": "captur"}, {"dump": 3}])
def test_wrong_options_are_three_lines(options: dict[str, Any]) -> None:
    with pytest.raises(memcomp.OptionError) as caught:
        memcomp.compile(causal, **options)
    assert len(str(caught.value).splitlines()) <= 3 and "hint" in str(caught.value)
    with pytest.raises(Exception, match=next(iter(options))):
        torch.compile(causal, backend=backend, options=options)(*qkv())


def test_options_that_inductor_does_not_know_are_the_users_error() -> None:
    with pytest.raises(Exception, match="Inductor has no option 'max_autotun'"):
        torch.compile(causal, backend=backend, options={"rest_options": {"max_autotun": True}})(*qkv())
    assert memcomp.stats()["fallbacks"] == {}


def test_the_op_keeps_torchs_contract() -> None:
    fast = compiled(Block())
    fast(torch.randn(2, 6, 32))
    calls: list[tuple[Any, ...]] = []

    def record(entry: runtime.Entry, inputs: Any, sizes: Any) -> Any:
        calls.append((list(inputs), list(sizes), entry.key))
        return run(entry, inputs, sizes)

    run = runtime.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "run", record)
        fast(torch.randn(2, 6, 32))
    inputs, sizes, key = calls[0]
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.memcomp.call.default, (leaves, sizes, key))
    outs = torch.ops.memcomp.call([t.detach() for t in inputs], sizes, key)
    torch.library.opcheck(torch.ops.memcomp.backward.default,
                          (outs, [t.detach() for t in inputs], sizes, key, [True] * len(inputs)))


@pytest.mark.parametrize("fn", [
    lambda q, k, v: F.gelu(F.scaled_dot_product_attention(q, k, v)),  # gelu is taken apart
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 8, 8).amax(-1),
    lambda q, k, v: F.scaled_dot_product_attention(F.gelu(F.scaled_dot_product_attention(q, k, v)), k, v),
])
def test_gradients_through_regions_that_feed_each_other(fn: Callable[..., Tensor]) -> None:
    def grads(f: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(f(*leaves).square().sum(), leaves))

    inputs = torch.randn(3, 1, 2, 8, 4).unbind()
    for got, want in zip(grads(compiled(fn, chains="all")), grads(fn), strict=True):
        torch.testing.assert_close(got, want)
    assert not memcomp.stats()["fallbacks"] and memcomp.stats()["regions"]


@pytest.mark.parametrize("never", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_counts_only_where_it_is_chosen(never: float) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1)
        return p @ v + torch.where(p < 0, never, p * 2).sum(-1, keepdim=True)

    agrees(fn, *qkv())


@pytest.mark.parametrize("over", [(0, 1, 2), (0, 2), (1, 2)])
def test_a_side_result_that_no_kernel_gives_leaves_the_attention_its_kernel(over: tuple[int, ...]) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.mT).softmax(-1)
        return p @ v, -(p * (p + 1e-9).log()).sum(-1).mean(over)

    inputs = qkv(batch=2, queries=5)
    torch.testing.assert_close(compiled(fn)(*inputs), fn(*inputs))
    assert memcomp.stats()["regions"] == 1 and not memcomp.stats()["fallbacks"]


def test_a_region_reads_what_another_made() -> None:
    def experts(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
        p, i = gate.softmax(-1).topk(2, -1)
        return torch.einsum("bk,bkd->bd", p, torch.einsum("bd,bkde->bke", x, w[i]))

    agrees(experts, torch.randn(6, 8), torch.randn(6, 4), torch.randn(4, 8, 8))
    assert memcomp.stats()["regions"] == 2


def test_the_best_of_no_elements_is_torchs_error() -> None:
    for fn in (lambda x: x.max(), lambda x: x.max(-1), lambda x: x.min(-1, keepdim=True)[0]):
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, IndexError), match="Expected reduction dim"):
            compiled(fn, chains="all")(torch.randn(3, 0))


def test_a_small_addend_is_not_lost_in_a_large_one() -> None:
    def scaled(x: Tensor) -> Tensor:  # a constant row: (x - least) / (0 + eps)
        least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return ((x - least) / (most - least + 1e-6)).sum(-1)

    agrees(scaled, torch.tensor([[100.0] * 50, [*range(50)]]))
    assert memcomp.stats()["regions"] == 1


def test_steps_of_a_loop_over_a_length_that_is_a_symbol() -> None:
    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([((q[:, i:i + 1] @ k.transpose(1, 2) * (1 + i % 2 * 2)).softmax(-1) @ v)[:, 0]
                            for i in range(3)], 1)

    q, k, v = torch.randn(3, 2, 8, 4).unbind()
    fast = torch.compile(loop, backend=backend, dynamic=True, options={"rest": "eager", "strict": True})
    torch.testing.assert_close(fast(q, k, v), loop(q, k, v))
    assert memcomp.stats()["regions"]
