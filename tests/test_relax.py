"""The TVM door: Relax modules are inputs, and `FuseRegions` puts memcomp's kernels into what TVM builds."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import memcomp
from memcomp.__main__ import main
from memcomp.oracle import measure, tolerance
from memcomp.runtime import Fallback

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402
from tvm.relax.frontend.torch import from_exported_program  # noqa: E402
from tvm.script import ir as I  # noqa: E402
from tvm.script import relax as R  # noqa: E402
from tvm.script import tirx as X  # noqa: E402

from memcomp.capture.relax import functions, read  # noqa: E402
from memcomp.capture.relax.table import ROWS  # noqa: E402
from memcomp.capture.relax.whole import function  # noqa: E402
from memcomp.relax import FuseRegions  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NAMES = sorted(f.stem for f in (Path(__file__).parent.parent / "models").glob("[a-z]*.py"))
QUICK = ("gqa",)  # the others take seconds each
REFUSED = {  # by from_exported_program itself, which says this
    "cross_entropy": "amax.default", "mha": "amax.default", "sink": "amax.default", "kv_decode": "IndexPut",
}
PARTS = {"product_key_memory"}  # a part may be left to TVM, with a warning


def exported(name: str, **options: Any) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], Any]:
    module, inputs = import_module(f"memcomp.models.{name}").build()
    return module.eval(), inputs, torch.export.export(module.eval(), inputs, **options)


def built(module: Any) -> Callable[..., list[torch.Tensor]]:
    """`main` of a module that TVM's usual pipeline has built; what it gives twice over is the same."""
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        twice = [flat(machine["main"](*(tvm.runtime.from_dlpack(x.contiguous()) for x in inputs))) for _ in range(2)]
        assert all(map(torch.equal, *twice))
        return twice[0]

    return run


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, tvm.runtime.Tensor):
        return [torch.from_dlpack(result).clone()]
    return [t for part in result for t in flat(part)]


def bindings(module: Any) -> list[Any]:
    return [b for _, f in functions(module) for part in f.body.blocks for b in part.bindings]


def called(module: Any) -> list[str]:
    """What the kernels of a module are called, after TVM has made a kernel of each of its own operators."""
    found = []
    for b in bindings(relax.transform.LegalizeOps()(module)):
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.Op) and str(b.value.op.name) in (
                "relax.call_tir", "relax.call_dps_packed"):
            callee = b.value.args[0]
            found.append(str(getattr(callee, "global_symbol", None) or callee.name_hint))
    return found


def ours(module: Any) -> list[str]:
    return [name for name in called(module) if name.startswith("memcomp_")]


def agree(got: list[torch.Tensor], torchs: Any, exact: Any) -> None:
    """As near to float64 as torch is, within the oracle's tolerance."""
    torchs, exact = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (torchs, exact))
    assert len(got) == len(exact)
    for x, y, z in zip(got, torchs, exact, strict=True):
        error, theirs = (measure(t.double().numpy(), z.double().numpy()) for t in (x, y))
        bound = tolerance(["f32"], "f32", elements=max(z.numel(), 2), length=None, torch_error=theirs)
        assert bound.admits(error), (error, bound)


def planned(module: Any) -> list[str]:
    """Names of the operators that make memory, after TVM has planned it."""
    steps = tvm.transform.Sequential([
        relax.transform.LegalizeOps(), relax.transform.RewriteDataflowReshape(), relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(), relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory()])
    return [str(b.value.op.name) for b in bindings(steps(module))
            if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.Op)]


@pytest.mark.parametrize("name", [
    n if n in QUICK or n in REFUSED else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_models_with_and_without(name: str) -> None:
    """Equal outputs, fewer kernels, memory planned by TVM."""
    module, inputs, program = exported(name)
    if name in REFUSED:
        with pytest.raises((AssertionError, ValueError), match=REFUSED[name]):
            from_exported_program(program)
        return
    plain = from_exported_program(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in PARTS else "error", Fallback)
        fused = FuseRegions("cpu", tune="off")(plain)
    with torch.no_grad():
        torchs = module(*inputs)
        exact = copy.deepcopy(module).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    agree(built(plain)(*inputs), torchs, exact)
    agree(built(fused)(*inputs), torchs, exact)
    assert ours(fused) and len(called(fused)) < len(called(plain)) and not ours(plain)
    left = planned(fused)
    assert "relax.call_dps_packed" not in left and left.count("relax.builtin.alloc_tensor") == 1, "but for the result"
    assert left.count("relax.memory.alloc_storage") <= left.count("relax.memory.alloc_tensor")


def test_one_module_for_all_lengths() -> None:
    """Symbolic sizes stay symbolic, whatever numbers they take."""
    length = torch.export.Dim("length", min=2, max=512)
    module, _, program = exported("causal", dynamic_shapes=({1: length},))
    fused = FuseRegions("cpu", strict=True, tune="off", sizes={"length": 100})(from_exported_program(program))
    assert len(ours(fused)) == 1 and "relax.memory.alloc_storage" in planned(fused)
    run = built(fused)
    for n in (1, 2, 17, 100, 512):
        x = torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            agree(run(x), module(x), copy.deepcopy(module).double()(x.double()))
    assert run(torch.ones(2, 0, 64))[0].shape == (2, 0, 64)


@I.ir_module
class Mixed:
    """Two regions, the second reading what the first gives; an operator without a row; one that nobody uses."""

    @R.function
    def main(x: R.Tensor((2, 8, "n", 16), "float32"), image: R.Tensor((1, 1, 8, 16), "float32")):
        with R.dataflow():
            unused = R.nn.softmax(x)  # noqa: F841
            turned = R.permute_dims(x, [0, 1, 3, 2])
            scores = R.matmul(x, turned)
            pool = R.nn.max_pool2d(image, pool_size=[2, 2])
            weights = R.nn.softmax(R.multiply(scores, R.const(0.25, "float32")))
            first = R.matmul(weights, x)
            again = R.matmul(R.sigmoid(R.matmul(first, turned)), first)
            R.output(first, again, pool)
        return (first, again, pool)


def test_what_has_no_row_stays_with_tvm() -> None:
    fused = FuseRegions(strict=True, tune="off")(Mixed)
    assert len(ours(fused)) == 2 and "max_pool2d" in called(fused)
    assert len(called(fused)) == 3, "nothing is left of what the kernels compute, nor of what nobody uses"
    (_, f), = functions(Mixed)
    (block,) = f.body.blocks
    (left,) = read(f, list(block.bindings), [], {}).left
    assert left.where == "nn.max_pool2d" and "no row" in left.why
    generator = torch.Generator().manual_seed(0)
    x, image = torch.randn(2, 8, 37, 16, generator=generator), torch.randn(1, 1, 8, 16, generator=generator)
    for wanted, got, near in zip(built(Mixed)(x, image), built(fused)(x, image), (1e-5, 1e-4, 0.0), strict=True):
        torch.testing.assert_close(got, wanted, rtol=near, atol=near)


@I.ir_module
class Apart:
    """A region in two dataflow blocks and between them; one in none; one that something with an effect divides."""

    @R.function
    def blocks(x: R.Tensor((2, 8, "n", 16), "float32")):
        with R.dataflow():
            scores = R.matmul(x, R.permute_dims(x, [0, 1, 3, 2]))
            R.output(scores)
        scaled = R.multiply(scores, R.const(0.25, "float32"))
        with R.dataflow():
            out = R.matmul(R.nn.softmax(scaled), x)
            R.output(out)
        return out

    @R.function
    def plain(x: R.Tensor((2, 8, "n", 16), "float32")):
        scores = R.matmul(x, R.permute_dims(x, [0, 1, 3, 2]))
        out = R.matmul(R.nn.softmax(R.multiply(scores, R.const(0.25, "float32"))), x)
        return out

    @R.function(pure=False)
    def effect(x: R.Tensor((2, 8, "n", 16), "float32")):
        with R.dataflow():
            scores = R.matmul(x, R.permute_dims(x, [0, 1, 3, 2]))
            R.output(scores)
        _ = R.print(x, format="")
        with R.dataflow():
            out = R.matmul(R.nn.softmax(R.multiply(scores, R.const(0.25, "float32"))), x)
            R.output(out)
        return out


def test_a_region_is_found_across_blocks_and_outside_of_them() -> None:
    """Where nothing with an effect stands in it: TVM's own pass makes one block of pure bindings."""
    fused = FuseRegions("cpu", strict=True, tune="off")(Apart)
    left = {str(name.name_hint): [type(b).__name__ for b in f.body.blocks] for name, f in functions(fused)}
    assert left == {"blocks": ["DataflowBlock"], "plain": ["DataflowBlock"],
                    "effect": ["DataflowBlock", "BindingBlock", "DataflowBlock"]}
    assert len(ours(fused)) == 3 and len(set(ours(fused))) == 2
    assert sorted(set(called(fused)) - set(ours(fused))) == ["matmul", "transpose"], "what `effect` prints between"
    machine, x = relax.VirtualMachine(tvm.compile(fused, "llvm"), tvm.cpu()), torch.randn(2, 8, 37, 16)
    for name in left:
        (got,) = flat(machine[name](tvm.runtime.from_dlpack(x)))
        torch.testing.assert_close(got, torch.softmax(x @ x.mT / 4, -1) @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("begin, inbound, one", [(0, False, True), (1, True, True), ("n", False, False)])
def test_a_slice_may_end_where_it_is_known_when_it_runs(begin: Any, inbound: bool, one: bool) -> None:
    """Of a cache, so many keys as there are: cut off at its end unless TVM is told that it is not beyond."""
    n, s, p = (tvm.ir.Var(x, "int64") for x in "nsp")
    builder = relax.BlockBuilder()
    q, k, y = (relax.Var(x, relax.TensorType(shape, "float32")) for x, shape in (
        ("q", (1, p, 2, 16)), ("k", (1, s, 2, 16)), ("y", (n,))))
    with builder.function("main", [q, k, y]):
        with builder.dataflow():
            ends = ([n], [s]) if begin == "n" else ([begin], [n])
            kept = builder.emit(relax.op.strided_slice(k, [1], *ends, assume_inbound=inbound))
            out = builder.emit_output(relax.op.nn.attention(q, kept, kept))
        builder.emit_func_output(out)
    fused = FuseRegions("cpu", strict=True, tune="off")(builder.get())
    assert len(ours(fused)) == 1 and (called(fused) == ours(fused)) == one
    run = built(fused)
    for many in (7, 40) if inbound or begin == "n" else (7, 40, 99):
        given = torch.randn(1, 5, 2, 16), torch.randn(1, 41, 2, 16)
        x, keys = (t.transpose(1, 2) for t in given)
        keys = keys[:, :, many:] if begin == "n" else keys[:, :, begin:many]
        wanted = torch.nn.functional.scaled_dot_product_attention(x, keys, keys).transpose(1, 2)
        torch.testing.assert_close(run(*given, torch.zeros(many))[0], wanted, rtol=1e-5, atol=1e-5)


def test_an_operator_that_could_not_be_read_is_named() -> None:
    """One that has a row, but not for these arguments; who reads it may be read."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((2, 9, 8), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            turned = builder.emit(relax.op.strided_slice(x, [1], [-1], [-99], [-1]))
            scores = builder.emit(relax.op.nn.softmax(relax.op.matmul(x, relax.op.permute_dims(turned, [0, 2, 1]))))
            out = builder.emit_output(relax.op.matmul(scores, x))
        builder.emit_func_output(out)
    with pytest.warns(Fallback, match="strided_slice stays with TVM: a slice in steps of -1"):
        assert len(ours(FuseRegions("cpu", tune="off")(builder.get()))) == 1


def test_names_of_tvms_are_no_names_of_pythons() -> None:
    """Names that no Python function could give its parameters, and equal ones."""
    x, y = torch.randn(2, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for names in (("lambda", "p.0"), ("x", "x"), ("max", "inf"), ("size", "x y")):
        builder, given = relax.BlockBuilder(), [relax.Var(n, relax.TensorType(x.shape, "float32")) for n in names]
        with builder.function("main", given):
            with builder.dataflow():
                scores = builder.emit(relax.op.matmul(given[0], relax.op.permute_dims(given[1], [0, 1, 3, 2])), "a-b")
                out = builder.emit_output(relax.op.matmul(relax.op.nn.softmax(scores), given[1]), "return")
            builder.emit_func_output(out)
        fused = FuseRegions(tune="off", strict=True)(builder.get())
        assert len(ours(fused)) == 1
        wanted = torch.softmax(x @ y.mT, -1) @ y
        torch.testing.assert_close(built(fused)(x, y)[0], wanted, rtol=1e-5, atol=1e-5)


@I.ir_module
class InPlace:
    @X.prim_func(s_tir=True)
    def clear(x: X.Buffer((1, 2, 9, 8), "float32")):
        for i, j, k, n in X.grid(1, 2, 9, 8):
            with X.sblock("b"):
                a, b, c, d = X.axis.remap("SSSS", [i, j, k, n])
                x[a, b, c, d] = X.float32(0)

    @R.function
    def main(q: R.Tensor((1, 2, 9, 8), "float32"), k: R.Tensor((1, 2, 17, 8), "float32")):
        cls = InPlace
        with R.dataflow():
            before = R.matmul(R.nn.softmax(R.matmul(k, R.permute_dims(q, [0, 1, 3, 2]))), q)
            scores = R.matmul(q, R.permute_dims(k, [0, 1, 3, 2]))
            none = R.call_tir_inplace(cls.clear, (q,), inplace_indices=[0], out_ty=R.Tensor((1, 2, 9, 8), "float32"))
            after = R.matmul(R.nn.softmax(scores), k)
            R.output(before, after, none)
        return (before, after, none)


def test_nothing_is_read_after_it_was_overwritten() -> None:
    """What stands around a write in place would be computed behind it."""
    with pytest.warns(Fallback, match="in the middle of it writes in place"):
        fused = FuseRegions(tune="off")(InPlace)
    assert len(ours(fused)) == 1
    q, k = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (9, 17))
    machine = relax.VirtualMachine(tvm.compile(fused, "llvm"), tvm.cpu())
    before, after, none = flat(machine["main"](*(tvm.runtime.from_dlpack(x.clone()) for x in (q, k))))
    assert not none.any()
    for got, (x, y) in ((before, (k, q)), (after, (q, k))):
        torch.testing.assert_close(got, torch.softmax(x @ y.mT, -1) @ y, rtol=1e-5, atol=1e-5)


def test_a_module_that_has_grown_since(tmp_path: Path) -> None:
    """The pass may run again, where a function has come that needs kernels that are there, or others."""
    once = FuseRegions(tune="off")(attention(2, 8))
    for name, f in (("same", attention(2, 8)["main"]), ("other", attention(2, 16)["main"])):
        once.update_func(tvm.ir.GlobalVar(name), f.with_attr("global_symbol", name))
    twice = FuseRegions(tune="off", strict=True)(once)
    assert FuseRegions(tune="off", strict=True)(twice).same_as(twice)
    assert len(ours(twice)) == 3 and len(twice.get_attr("external_mods")) == 2
    tvm.compile(twice, "llvm").export_library(str(tmp_path / "x.so"))
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "x.so")), tvm.cpu())
    for name, size in (("main", 8), ("same", 8), ("other", 16)):
        q = torch.randn(1, 2, 11, size, generator=torch.Generator().manual_seed(size))
        (got,) = flat(machine[name](tvm.runtime.from_dlpack(q)))
        torch.testing.assert_close(got, torch.softmax(q @ q.mT, -1) @ q, rtol=1e-5, atol=1e-5)


@I.ir_module
class Decode:
    @R.function
    def main(q: R.Tensor((1, 1, 1, 64), "float32"), k: R.Tensor((1, "n", 1, 64), "float32"),
             v: R.Tensor((1, "n", 1, 64), "float32")):
        with R.dataflow():
            o = R.nn.attention(q, k, v)
            R.output(o)
        return o


def test_memory_that_kernels_work_in_is_planned_too() -> None:
    """One query over a long cache goes in shares, whose states lie in memory that TVM gives."""
    fused = FuseRegions("cpu", sizes={"n": 65536}, tune="off", strict=True)(Decode)
    call = next(b.value for b in bindings(fused) if isinstance(b.value, relax.Call))
    assert isinstance(call.ty, relax.TupleType) and len(call.ty.fields) > 1, "a result, and states"
    q, k, v = (torch.randn(1, n, 1, 64, generator=torch.Generator().manual_seed(n)) for n in (1, 3000, 3000))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(built(fused)(q, k, v)[0].double(), exact.transpose(1, 2), rtol=1e-5, atol=1e-5)


def attention(heads: int, size: Any) -> Any:
    """softmax(q q^T) q over a symbolic length, size of a head as given."""
    n = tvm.ir.Var("n", "int64")
    builder, q = relax.BlockBuilder(), relax.Var("q", relax.TensorType((1, heads, n, size), "float32"))
    with builder.function("main", [q]):
        with builder.dataflow():
            scores = builder.emit(relax.op.matmul(q, relax.op.permute_dims(q, [0, 1, 3, 2])))
            out = builder.emit_output(relax.op.matmul(relax.op.nn.softmax(scores), q))
        builder.emit_func_output(out)
    return builder.get()


def test_refusals() -> None:
    module = attention(2, tvm.ir.Var("size", "int64"))
    with pytest.warns(Fallback, match="stays with TVM: .* extent of rank"):
        assert FuseRegions(tune="off")(module).same_as(module)
    with pytest.raises(memcomp.Refusal, match="extent of rank"):
        FuseRegions(tune="off", strict=True)(module)
    with pytest.raises(memcomp.OptionError, match="h100"):
        FuseRegions("h100")
    with pytest.raises(memcomp.OptionError, match="h100"):
        FuseRegions("h100", backend="tvm")
    with pytest.raises(memcomp.OptionError, match="unknown option 'tun'"):
        FuseRegions(tun="off")


E = relax.op
SHAPES = {"x": (2, 3, 4), "y": (2, 3, 4), "w": (4,), "m": (2, 4, 5), "h": (2, 6, 3, 8), "b": (2, 3, 6, 6)}
CASES: dict[str, Callable[..., Any]] = {  # a call of each row's operator
    **{n: lambda t, n=n: getattr(E.nn if n[:3] == "nn." else E, n.removeprefix("nn."))(t["x"]) for n in (
        "abs ceil cos erf exp floor negative round sigmoid sign sin square tan tanh trunc isnan isinf isfinite nn.relu "
        "nn.relu6 nn.silu nn.gelu nn.gelu_tanh nn.leakyrelu nn.softplus flatten zeros_like ones_like sum mean max min "
        "variance nn.softmax nn.log_softmax tril triu permute_dims").split()},
    **{n: lambda t, n=n: getattr(E, n)(t["x"], t["y"]) for n in (
        "add subtract multiply divide maximum minimum equal not_equal greater greater_equal less less_equal "
        "floor_divide floor_mod").split()},
    **{n: lambda t, n=n: getattr(E, n)(E.exp(t["x"])) for n in ("log", "rsqrt", "sqrt")},
    **{n: lambda t, n=n: getattr(E, n)(E.less(t["x"], t["y"]), E.less(t["y"], relax.const(0.5, "float32")))
       for n in ("logical_and", "logical_or", "logical_xor")},
    **{n: lambda t, n=n: getattr(E, n)(t["i"], relax.const(1, "int64")) for n in (
        "bitwise_and", "bitwise_or", "bitwise_xor")},
    "logical_not": lambda t: E.logical_not(E.less(t["x"], t["y"])), "bitwise_not": lambda t: E.bitwise_not(t["i"]),
    "power": lambda t: E.power(t["x"], relax.const(2.0, "float32")), "outer": lambda t: E.outer(t["w"], t["w"]),
    "where": lambda t: E.where(E.less(t["x"], t["y"]), t["x"], relax.const(0.0, "float32")),
    "broadcast_to": lambda t: E.broadcast_to(t["x"], (5, 2, 3, 4)), "reshape": lambda t: E.reshape(t["x"], (6, 2, -1)),
    "prod": lambda t: E.prod(t["x"], 1, True), "argmax": lambda t: E.argmax(t["x"], 1),
    "argmin": lambda t: E.argmin(t["x"], -1, True),
    "topk": lambda t: E.topk(t["x"], 2, dtype="int64"), "cumsum": lambda t: E.cumsum(t["x"], 1),
    "take": lambda t: E.take(t["x"], t["i"], axis=1), "strided_slice": lambda t: E.strided_slice(
        t["x"], [1, 2], [-2, 0], [3, 9223372036854775807], [1, 2]),
    "split": lambda t: E.split(t["x"], [1, 3], axis=2), "item": lambda t: relax.TupleGetItem(E.split(t["x"], 2, 2), 1),
    "gather_elements": lambda t: E.gather_elements(t["x"], E.broadcast_to(t["i"], (2, 3, 2)), axis=2),
    "expand_dims": lambda t: E.expand_dims(t["x"], [0, -1]), "squeeze": lambda t: E.squeeze(
        E.expand_dims(t["x"], [1]), [1]), "clip": lambda t: E.clip(t["x"], -0.5, 0.5),
    "full": lambda t: E.full((2, 3), relax.const(True, "bool"), dtype="bool"),
    "full_like": lambda t: E.full_like(t["x"], relax.const(2.0, "float32")),
    "concat": lambda t: E.concat([t["x"], t["y"]], 1), "stack": lambda t: E.stack([t["x"], t["y"]], 2),
    "astype": lambda t: E.astype(t["x"], "int32"), "arange": lambda t: E.arange(2, 11, 3, dtype="int64"),
    "zeros": lambda t: E.zeros((2, 3), "float32"), "ones": lambda t: E.ones((2, 3), "int64"),
    "matmul": lambda t: E.matmul(t["x"], t["m"]), "einsum": lambda t: E.einsum([t["x"], t["m"]], "abc,acd->bad"),
    "nn.attention": lambda t: E.nn.attention(t["h"], t["h"], t["h"], causal_mask="TopLeft"),
    "nn.attention_bias": lambda t: E.nn.attention(t["h"], t["h"], t["h"], t["b"], scale=0.3),
    "nn.layer_norm": lambda t: E.nn.layer_norm(t["x"], t["w"], t["w"], [-1]),
    "nn.rms_norm": lambda t: E.nn.rms_norm(t["x"], t["w"], [-1]),
}


def test_every_row_means_what_tvm_computes() -> None:
    """Each operator of the table, built by TVM and run by torch as the table says."""
    assert CASES.keys() == ROWS.keys()
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    given["i"] = torch.tensor([2, 0])
    builder = relax.BlockBuilder()
    for name, case in CASES.items():
        t = {n: relax.Var(n, relax.TensorType(x.shape, str(x.dtype).removeprefix("torch."))) for n, x in given.items()}
        with builder.function(name.replace(".", "_"), list(t.values())):
            with builder.dataflow():
                out = builder.emit_output(case(t))
            builder.emit_func_output(out)
    module = builder.get()
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    for name in CASES:
        wanted = flat(machine[name.replace(".", "_")](*(tvm.runtime.from_dlpack(x) for x in given.values())))
        torchs, _, _ = function(module, name.replace(".", "_"))
        names = [n.target for n in torchs.graph.nodes if n.op == "placeholder"]
        got = [x.detach() for x in torchs(*(given[n] for n in names))]
        assert len(got) == len(wanted), name
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda why, name=name: f"{name}: {why}")


INPUT = """
from tvm.script import ir as I, relax as R

@I.ir_module
class Attention:
    @R.function
    def main(q: R.Tensor((2, 7, 4, 16), "float32"), k: R.Tensor((2, "n", 4, 16), "float32")):
        with R.dataflow():
            o = R.nn.attention(q, k, k)
            R.output(o)
        return o

@I.ir_module
class Pool:
    @R.function
    def main(x: R.Tensor((2, 3, 8, 8), "float32")):
        with R.dataflow():
            o = R.nn.max_pool2d(x, pool_size=[2, 2])
            R.output(o)
        return o

def made():
    return Attention

@I.ir_module
class Several:
    @R.function
    def first(x: R.Tensor((2, "n", 16), "float32")):
        with R.dataflow():
            o = R.matmul(R.nn.softmax(R.matmul(x, R.permute_dims(x, [0, 2, 1]))), x)
            R.output(o)
        return o

    @R.function
    def second(x: R.Tensor((3, "n", 8), "float32")):
        with R.dataflow():
            o = R.matmul(R.sigmoid(R.matmul(x, R.permute_dims(x, [0, 2, 1]))), x)
            R.output(o)
        return o

def plain(x):
    return x
"""


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A Relax module is an input as a factory or by its own name; `check` compares it with float64."""
    (tmp_path / "relaxed.py").write_text(INPUT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "relaxed", raising=False)
    assert main(["show", "relaxed:Attention"]) == 0
    text = capsys.readouterr().out
    assert "in K[B, M, H, E]: f32" in text and "\nrank M\n" in text
    assert main(["check", "relaxed:made"]) == 0 and "ok" in capsys.readouterr().out
    assert main(["check", "relaxed:Pool"]) == 2
    assert "nn.max_pool2d: it has no row" in capsys.readouterr().err
    assert main(["show", "relaxed:made", "--input", "q=f32[2,7,4,16]"]) == 2
    assert "says itself what its inputs are" in capsys.readouterr().err


def test_the_command_line_chooses_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """`module:name@function`; without it the only one, else main; what is wrong lists those that there are."""
    (tmp_path / "relaxed.py").write_text(INPUT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "relaxed", raising=False)
    for name, wanted in (
            ("Several@first", "rank E = 16\n"), ("Several@second", "rank E = 8\n"), ("made@main", "rank M\n")):
        assert main(["show", f"relaxed:{name}"]) == 0, name
        assert wanted in capsys.readouterr().out
    for name, wanted in (
            ("Several", "several Relax functions, and none is called main\nhint: say which, module:name@function: "
                        "first, second"),
            ("Several@frist", "no Relax function 'frist'\nhint: did you mean 'first'?"),
            ("Attention@other", "no Relax function 'other'"), ("plain@main --arg x=1", "no Relax module"),
            ("plain@main --input x=f32[3]", "relaxed:plain@main fails")):
        assert main(["show", *f"relaxed:{name}".split()]) == 2
        err = capsys.readouterr().err
        assert wanted in err and err.count("\n") <= 3, err


@pytest.mark.slow
def test_compiled_to_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`memcomp compile` takes a Relax module; what it writes computes what TVM's own build of the module does."""
    (tmp_path / "relaxed.py").write_text(INPUT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "relaxed", raising=False)
    assert main(["compile", "relaxed:Attention", "-o", str(tmp_path / "made")]) == 0
    q, k = (torch.randn(2, n, 4, 16, generator=torch.Generator().manual_seed(n)) for n in (7, 50))
    (got,) = memcomp.load(tmp_path / "made")(q, k)
    (wanted,) = built(import_module("relaxed").Attention)(q, k)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


ALONE = """
import sys, threading
import numpy as np
import tvm
from tvm import relax
q = np.load(sys.argv[2])
library = tvm.runtime.load_module(sys.argv[1])
found = []
def work():
    machine = relax.VirtualMachine(library, tvm.cpu())
    found.extend(machine["main"](tvm.runtime.tensor(q)).numpy() for _ in range(20))
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 40 and all((x == found[0]).all() for x in found)
assert "memcomp" not in sys.modules
np.save(sys.argv[3], found[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", ("1", "3"))
def test_a_library_runs_without_memcomp(threads: str, tmp_path: Path) -> None:
    """Exported as TVM exports, run in a process that never heard of memcomp, on TVM's threads, by two callers."""
    import numpy as np

    fused = FuseRegions(tune="off", strict=True)(attention(8, 16))
    tvm.compile(fused, "llvm").export_library(str(tmp_path / "x.so"))
    q = torch.randn(1, 8, 200, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "q.npy", q.numpy())
    done = subprocess.run([sys.executable, "-c", ALONE, *(str(tmp_path / n) for n in ("x.so", "q.npy", "o.npy"))],
                          env={**os.environ, "TVM_NUM_THREADS": threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exact = torch.nn.functional.scaled_dot_product_attention(*(q.double(),) * 3, scale=1.0)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "o.npy")).double(), exact, rtol=1e-5, atol=1e-5)
