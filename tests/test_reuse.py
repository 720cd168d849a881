"""Results over the memory of a tensor that dies with the call: where that is right, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memcomp
from memcomp import runtime
from memcomp.codegen.overwrite import overwritable, overwrite
from memcomp.codegen.tvm import build, emit
from memcomp.ir.errors import VerifyError
from memcomp.ir.tile import TileProgram
from memcomp.ir.tile_text import parse_tile
from memcomp.ir.tile_verify import verify_tile

pytestmark = pytest.mark.usefixtures("fresh")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# -- what a kernel allows ----------------------------------------------------------------------------------------------

FORM = """tiles t on cpu
param X[N, 40]: f32 in
param Y[N, 40]: f32 out
sizes N
kernel t_g0
  grid n1: ceil(N/4)
  dim n0[4] count min(N - n1*4, 4) start n1*4
  dim e[40] count 40 start 0
  dim e0[8] count 8 start e1*8
  tile A[n0, e]: f32
  tile B[n0, e0]: f32
  tile S[n0]: f32
"""
SUM = """  load A = X[n1*4 + n0, e]
  fold S = sum{e} A[n0, e]
"""
BY_PARTS = """  for e1 = 0 to 5 {
    load B = X[n1*4 + n0, e1*8 + e0]
    map B = B[n0, e0] - S[n0]
    store Y[n1*4 + n0, e1*8 + e0] = B
  }
"""
MAY = {
    "all read before": SUM + BY_PARTS,
    "an earlier launch reads all": SUM.replace("n1*4 + n0, e]", "0, e]") + "  store W[n1*4 + n0] = S\n" + FORM[
        FORM.index("kernel"):].replace("t_g0", "t_g1") + "  load S = W[n1*4 + n0]\n" + BY_PARTS,
    "a row to a task": (SUM + BY_PARTS).replace("n1*4 + n0", "n1"),
}
MAY_NOT = {
    "a row of another task": SUM.replace("n1*4 + n0", "max(n1*4 + n0 - 1, 0)") + BY_PARTS,
    "rows that overlap": SUM.replace("n1*4", "n1*2") + BY_PARTS,
    "read after the write": SUM + BY_PARTS + SUM + "  store Y[n1*4 + n0, 0] = S\n",
    "of what an earlier turn wrote": SUM + BY_PARTS.replace(
        "load B = X[n1*4 + n0, e1*8 + e0]", "load A = X[n1*4 + n0, e]").replace("B[n0, e0] - S[n0]", "S[n0]"),
    "of another element than is written": SUM + BY_PARTS.replace("store Y[n1*4 + n0, e1*8 + e0]",
                                                               "store Y[n1*4 + n0, 39 - e1*8 - e0]"),
    "of the other order of parts": SUM + BY_PARTS.replace("load B = X[n1*4 + n0, e1*8 + e0]",
                                                        "load B = X[n1*4 + n0, 32 - e1*8 + e0]"),
    "a later launch reads": SUM + BY_PARTS + FORM[FORM.index("kernel"):].replace("t_g0", "t_g1") + SUM
    + "  store W[n1*4 + n0] = S\n",
}


def tiles(body: str) -> TileProgram:
    text = FORM.replace("sizes", "param W[N]: f32 work\nsizes" if " W[" in body else "sizes") + body
    launches = [k if "e1 =" in k else re.sub(r".*\b(dim e0|tile B)\b.*\n", "", k) for k in text.split("kernel ")]
    return parse_tile("kernel ".join(launches))


@pytest.mark.parametrize("name", MAY)
@pytest.mark.parametrize("rows", [1, 6, 37])
def test_one_tensor_may_stand_for_both(name: str, rows: int) -> None:
    tp = tiles(MAY[name])
    assert overwritable(tp) == ("X",)
    over = overwrite(tp, "X")
    verify_tile(over)
    assert parse_tile(str(over)) == over
    if "n1*4 + n0" not in str(tp.kernels[-1].body):
        return  # grids of other shapes are read only
    x, work = normal(rows, 40), [torch.empty(rows)] * (len(tp.params) - 2)
    want = torch.empty_like(x)
    build(emit(tp, "cpu"))(x, want, *work, rows)
    for order in ((0, 1), (1, 0)):
        y = x.permute(order).contiguous().permute(order)
        build(emit(over, "cpu"))(y, y, *work, rows)
        assert torch.equal(y, want)


@pytest.mark.parametrize("name", MAY_NOT)
def test_what_is_read_after_it_was_written_keeps_its_memory(name: str) -> None:
    assert overwritable(tiles(MAY_NOT[name])) == ()


def test_an_output_lies_over_an_input_like_it() -> None:
    tp = tiles(MAY["all read before"])
    for text in ("out over Z", "out over Y"):
        with pytest.raises(VerifyError, match="lies over"):
            verify_tile(parse_tile(str(tp).replace("40]: f32 out", f"40]: f32 {text}")))


# -- what a graph allows -----------------------------------------------------------------------------------------------

def logs(y: Tensor) -> Tensor:
    return F.log_softmax(y, -1)


def chained(x: Tensor, w: Tensor) -> Tensor:
    return logs(logs(F.linear(x, w)).relu() + 1)


def parts(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([logs(y) for y in F.linear(x, w).chunk(2, 0)])


def changed_before(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y.mul_(2)
    return logs(y)


def changed_after(x: Tensor, w: Tensor) -> Tensor:
    y = logs(F.linear(x, w))
    z = y.view(-1)
    y.mul_(2)
    return z + 1


OVER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a product": lambda x, w: logs(F.linear(x, w)),
    "changed before": changed_before,
    "chained": chained,
}


def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, w)
    return logs(y), y


def used_later(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    return logs(y) + y.sort(-1).values


def seen_by_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    z = y[:1]
    return logs(y) + z


def changed_when_read(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    z = logs(y)
    y.add_(1)
    return z


def over_a_result_that_is_seen(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = logs(F.linear(x, w))
    return logs(y.view(y.shape) * 2), y


APART: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an argument": lambda x, w: logs(x),
    "a view of an argument": lambda x, w: logs(x.view(5, -1, x.shape[1])),
    "an argument unchanged": lambda x, w: logs(F.dropout(x.contiguous(), training=False)),
    "returned": both,
    "used later": used_later,
    "seen by a view": seen_by_a_view,
    "changed when read": changed_when_read,
    "of other strides": lambda x, w: logs(F.linear(w, x).T),
}


EITHER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "over a result that is seen": over_a_result_that_is_seen,
    "parts": parts,
    "changed after": changed_after,
    "a view": lambda x, w: logs((x @ w.T).view(5, -1, w.shape[0])),
    "a copy": lambda x, w: logs(x.clone()),
    "used in the region": lambda x, w: (lambda y: logs(y) + y)(F.linear(x, w)),
}


def overwrites(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[Any, list[int]]:
    """The result, and per launch the input that it overwrote."""
    seen: list[int] = []

    def record(entry: runtime.Entry, tensors: Any, sizes: Any) -> Any:
        seen.append(entry.over)
        return run(entry, tensors, sizes)

    run = runtime.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "run", record)
        fast = torch.compile(fn, backend="memcomp", options={"strict": True, "chains": "all", **options})
        first = fast(*inputs)
        kept = [t.clone() for t in first] if isinstance(first, tuple) else first.clone()
        fast(*[t + 1 for t in inputs])  # the first result stays what it was
        torch.testing.assert_close(list(first) if isinstance(first, tuple) else first, kept, rtol=0, atol=0)
    return first, seen


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("name", [*OVER, *APART, *EITHER])
def test_the_memory_of_what_dies_is_taken_and_no_other(name: str, rest: str) -> None:
    fn = (OVER | APART | EITHER)[name]
    x, w = normal(20, 16), normal(48, 16)
    given = [x.clone(), w.clone()]
    got, seen = overwrites(fn, x, w, rest=rest)
    torch.testing.assert_close(got, fn(*given), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, given[0]) and torch.equal(w, given[1])
    if name in OVER:
        assert seen and seen[0] == 0
    elif name in APART:
        assert seen and set(seen) == {-1}


def test_what_gradients_need_is_kept() -> None:
    x, w = normal(20, 16), normal(48, 16)
    leaf = w.clone().requires_grad_()
    got, seen = overwrites(lambda x, w: logs(F.linear(x, w)), x, leaf)
    assert set(seen) == {-1}
    got.square().sum().backward()
    other = w.clone().requires_grad_()
    logs(F.linear(x, other)).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    scale = torch.ones(20, 16, requires_grad=True)  # the product is saved for the gradient of the scale
    fast = torch.compile(lambda x, s: (lambda y: (logs(y), (y * s).sum()))(x * 2), backend="memcomp",
                         options={"rest": "eager", "chains": "all"})
    _, total = fast(x, scale)
    total.backward()
    torch.testing.assert_close(scale.grad, x * 2)


def test_any_number_of_rows_and_the_ops_contract() -> None:
    w, fn = normal(48, 16), lambda x, w: logs(F.linear(x, w))
    fast = memcomp.compile(fn, normal(20, 16), w, chains="all")
    for rows in (20, 7, 1, 65):
        x = normal(rows, 16)
        torch.testing.assert_close(fast(x, w), fn(x, w), rtol=1e-5, atol=1e-5)
    key = next(k for k, e in runtime._ENTRIES.items() if e.over >= 0)
    torch.library.opcheck(torch.ops.memcomp.overwrite.default, (normal(5, 48), [], [], key))


def test_in_a_module_on_any_rank() -> None:
    layer = nn.Linear(16, 48).requires_grad_(False)
    got, seen = overwrites(lambda x: logs(layer(x)), normal(2, 3, 16))
    torch.testing.assert_close(got, logs(layer(normal(2, 3, 16))), rtol=1e-5, atol=1e-5)
    assert set(seen) == {0}
