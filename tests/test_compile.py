"""Whole models as directories: the plan's laws, results as torch's, what is refused, and the commands."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm_ffi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp import inputs
from memcomp.__main__ import main
from memcomp.artifact import compile as artifact
from memcomp.artifact.arena import ALIGNED, least, placed
from memcomp.artifact.execute import Model
from memcomp.artifact.loading import Artifact, load
from memcomp.artifact.memory import NUMPY, Array
from memcomp.artifact.plan import Life, Plan, Size, Step, Tensor, check, lives
from memcomp.artifact.weights import read
from memcomp.config import config
from memcomp.inputs import Function
from memcomp.ir.errors import InputError, MemcompError, OptionError, Refusal
from memcomp.oracle import measure, tolerance
from memcomp.signature import Dim, asked

OFF = {"tune": "off"}


class Small(torch.nn.Module):
    """Tokens in, logits out: one layer of attention with rotated keys, a gated layer, the table tied to the head."""

    def __init__(self, width: int = 16, heads: int = 2, words: int = 23) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.table = torch.nn.Embedding(words, width)
        self.norm = torch.nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (torch.nn.Linear(width, width) for _ in range(2))
        self.head = torch.nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(tokens)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        angle = torch.arange(tokens.shape[1]).unsqueeze(1) * 0.1
        q, k = (y * torch.cos(angle) + y.flip(-1) * torch.sin(angle) for y in (q, k))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + torch.nn.functional.silu(self.gate(x)) * self.up(x)
        logits = self.head(x)
        return {"logits": logits, "next": logits[:, -1].argmax(-1)}


SMALL = Function(Small().eval(), (torch.arange(12).reshape(2, 6),), ({0: Dim("B", 2, 4), 1: Dim("S", 2, 32)},))


@pytest.fixture(scope="module")
def made() -> artifact.Made:
    return artifact.whole(SMALL, [config({**OFF, "strict": True})])


@pytest.fixture(scope="module")
def place(made: artifact.Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("whole") / "small"
    artifact.write(made, there)
    return there


@pytest.fixture(scope="module")
def loaded(place: Path) -> Artifact:
    return load(place)


def _like(fn: torch.nn.Module, actual: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    """As near to float64 as the oracle asks for, where torch's own result is measured beside."""
    double = type(fn)().eval().double()
    double.load_state_dict({k: v.double() for k, v in fn.state_dict().items()})
    with torch.no_grad():
        eager, exact = fn(*inputs)["logits"].numpy(), double(*inputs)["logits"].numpy()
    bound = tolerance(["f32"], "f32", elements=exact.size, length=None, torch_error=measure(eager, exact))
    assert bound.admits(measure(np.asarray(actual, np.float64), exact))


# -- a whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6), (4, 32), (3, 2)])
def test_any_length_in_range_gives_what_torch_gives(loaded: Artifact, shape: tuple[int, ...]) -> None:
    tokens = torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))
    logits, following = loaded(tokens)
    _like(SMALL.fn, logits, (tokens,))  # type: ignore[arg-type]
    assert isinstance(logits, torch.Tensor) and torch.equal(following, logits[:, -1].argmax(-1))
    plain, by_name = loaded(tokens.numpy()), loaded(tokens=tokens.numpy())
    assert isinstance(plain[0], np.ndarray) and np.array_equal(plain[0], logits.numpy())
    assert np.array_equal(plain[1], by_name[1])


def test_nothing_needs_torch_and_every_step_is_a_kernel_or_listed(made: artifact.Made) -> None:
    assert made.plan is not None and not made.plan.torch and not made.torch
    assert {s.kind for s in made.plan.steps} <= {"kernel", "check", "copy"}


def test_outputs_are_the_callers(loaded: Artifact) -> None:
    tokens = np.arange(12).reshape(2, 6)
    first = loaded(tokens)[0]
    kept = first.copy()
    assert not np.array_equal(loaded((tokens + 1) % 23)[0], kept) and np.array_equal(first, kept)


def test_threads_at_once(loaded: Artifact) -> None:
    """Each thread has an arena of its own: eight at once, with several shapes, give what one gives alone."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 23, (2 + k % 3, 3 + k)) for k in range(8)]
    alone = [loaded(x)[0] for x in inputs]
    wrong: list[int] = []

    def call(k: int) -> None:
        for n in range(12):
            at = (k + n) % len(inputs)
            if not np.array_equal(loaded(inputs[at])[0], alone[at]):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize(("tokens", "kind", "why"), [
    (torch.zeros(2, 33).long(), InputError, "dimension 1 of tokens is 33; the model was compiled for 2 to 32"),
    (torch.zeros(5, 6).long(), InputError, "dimension 0 of tokens is 5; the model was compiled for 2 to 4"),
    (torch.zeros(6).long(), InputError, "tokens has 1 dimensions; the model takes 2"),
    (torch.zeros(2, 6), InputError, "tokens is f32; the model takes i64"),
    (torch.full((2, 6), 23), IndexError, "index 23 is out of bounds for a dimension of 23 elements"),
    (torch.full((2, 6), -1), IndexError, "index -1 is out of bounds for a dimension of 23 elements"),
])
def test_what_the_model_does_not_take(loaded: Artifact, tokens: torch.Tensor, kind: type[Exception], why: str) -> None:
    with pytest.raises(kind) as found:
        loaded(tokens)
    assert str(found.value).splitlines()[0] == why


def test_wrong_number_of_inputs(loaded: Artifact) -> None:
    for args, named in (((), {}), ((1, 2), {}), ((), {"x": 1})):
        with pytest.raises(TypeError, match="takes 1 inputs, tokens"):
            loaded(*args, **named)


class _Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, shift: float = 1.0, *, scale: torch.Tensor) -> torch.Tensor:
        return x * self.weight * scale + shift


def test_inputs_by_keyword_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come after the others, under their names."""
    model, x, scale = _Named(), torch.randn(2, 4), torch.randn(4)
    with pytest.raises(InputError, match="its inputs scale are given by keyword only"):
        artifact.whole(Function(model, (x,)), [config(OFF)])
    monkeypatch.setattr(sys.modules[__name__], "named", model, raising=False)
    monkeypatch.setitem(sys.modules, "named", sys.modules[__name__])
    given = inputs.read("named:named", asked(["x=f32[2,4]", "scale=f32[4]"]))
    assert isinstance(given, Function) and given.names == ("x", "shift", "scale")
    artifact.write(artifact.whole(given, [config({**OFF, "strict": True})]), tmp_path / "out")
    run = load(tmp_path / "out")
    with torch.no_grad():
        for (got,) in (run(x, scale), run(x, scale=scale), run(scale=scale, x=x)):
            torch.testing.assert_close(got, model(x, scale=scale))
    with pytest.raises(OptionError, match="no input is given for scale"):
        inputs.read("named:named", asked(["x=f32[2,4]"]))


def test_a_gradient_is_refused(tmp_path: Path) -> None:
    x = torch.randn(3, requires_grad=True)
    artifact.write(artifact.whole(Function(lambda x: x.exp(), (x,)), [config(OFF)]), tmp_path / "out")
    run = load(tmp_path / "out")
    with pytest.raises(Refusal, match="no gradient"):
        run(x)
    with torch.no_grad():
        assert torch.allclose(run(x)[0], x.exp())


BARE = """
import sys
for name in ("torch", "tvm", "triton", "sympy", "networkx", "safetensors", "rich"):
    sys.modules[name] = None
import numpy as np
import memcomp
run = memcomp.load(sys.argv[1])
case = np.load(sys.argv[2])
for k in range(3):
    logits, _ = run(case[f"tokens{k}"])
    assert np.array_equal(logits, case[f"logits{k}"])
from memcomp.__main__ import main
assert main(["run", sys.argv[1], "--json"]) == 0
"""


def test_where_no_torch_and_no_compiler_is(loaded: Artifact, place: Path, tmp_path: Path) -> None:
    case = {}
    for k, shape in enumerate(((2, 6), (3, 31), (4, 2))):
        case[f"tokens{k}"] = np.random.default_rng(k).integers(0, 23, shape)
        case[f"logits{k}"] = loaded(case[f"tokens{k}"])[0]
    np.savez(tmp_path / "case.npz", **case)
    done = subprocess.run([sys.executable, "-c", BARE, str(place), str(tmp_path / "case.npz")], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    assert [x["name"] for x in json.loads(done.stdout)["outputs"]] == ["logits", "next"]


def test_weights_are_stored_once(made: artifact.Made, place: Path) -> None:
    model = SMALL.fn
    assert isinstance(model, Small) and model.head.weight is model.table.weight
    held = read(place / "weights.safetensors")
    shapes = sorted(tuple(p.shape) for p in model.parameters())  # torch, too, lists a tied one once
    assert sorted(t.shape for t in held.values()) == shapes
    assert {n for n, x in made.weights.items()} == set(held)


def test_the_directory_says_what_is_in_it(made: artifact.Made, place: Path) -> None:
    manifest = json.loads((place / "manifest.json").read_text())
    files = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    assert {"tuning.json", "weights.safetensors"} <= files
    from memcomp.ir.text import parse

    texts = {parse((place / k["text"]).read_text()).name for k in manifest["kernels"]}
    assert texts == {k.name for k in made.kernels}
    tuning = json.loads((place / "tuning.json").read_text())
    assert {(t["kernel"], t["target"]) for t in tuning} == {(k.name, "cpu") for k in made.kernels}


def test_a_plan_that_does_not_fit_is_not_run(made: artifact.Made) -> None:
    plan, names = made.plan, [k.name for k in made.kernels]
    assert plan is not None
    check(plan, names)
    broken = [
        replace(plan, steps=plan.steps[1:]), replace(plan, steps=plan.steps[::-1]), replace(plan, lives=plan.lives[1:]),
        replace(plan, outputs=("no_such",)), replace(plan, tensors=plan.tensors + plan.tensors[:1]),
        replace(plan, tensors=tuple(replace(t, kind="alias", of=t.name) if t.kind == "buffer" else t
                                    for t in plan.tensors)),
        replace(plan, steps=(replace(plan.steps[-1], kind="shell"), *plan.steps)),
        *(replace(plan, sizes=(replace(plan.sizes[0], **wrong), *plan.sizes[1:]))
          for wrong in ({"dim": 2}, {"divisor": 0}, {"of": plan.outputs[0]})),
        replace(plan, inputs=plan.outputs[:1]), replace(plan, outputs=plan.inputs),
    ]
    for bad in broken:
        with pytest.raises(InputError, match="the plan cannot be run"):
            check(bad, names)
    with pytest.raises(InputError, match="no such kernel"):
        check(plan, names[1:])


# -- what torch must do ---------------------------------------------------------------------------------------------


def _sorting(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.exp()
    values, places = y.sort(-1)
    return values * 2, places, y.T, x


def test_what_has_no_kernel_runs_in_torch_or_is_refused_with_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    given = Function(_sorting, (torch.randn(4, 8),))
    why = "1 operator would need torch at run time\n  aten.sort.default .*sort has no rule"
    with pytest.raises(Refusal, match=why):
        artifact.whole(given, [config({**OFF, "strict": True})])
    artifact.write(artifact.whole(given, [config(OFF)]), tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.plan is not None and model.plan.torch == ("aten.sort.default",)
    x = torch.randn(4, 8)
    for got, want in zip(model(x), _sorting(x), strict=True):
        torch.testing.assert_close(got, want)
    assert all(map(np.allclose, model(x.numpy()), (t.numpy() for t in _sorting(x))))
    monkeypatch.setattr("memcomp.artifact.foreign.find_spec", lambda name: None)
    with pytest.raises(Refusal, match="out needs torch, which is not installed, for aten.sort.default"):
        load(tmp_path / "out")


class _Views(torch.nn.Module):
    """What torch runs reads views of views, of an input and of a buffer that is itself part of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(6, 4, generator=torch.Generator().manual_seed(3))[2:])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x[1:].view(-1, 2, 4)
        return (rows[:, 1:].sort(-1).values, rows.roll(1, 0), self.table[1:].roll(1, 0), self.table[2:].sort(-1).values,
                x.exp()[1:, 2:].sort(0).indices)


def test_views_for_torch_are_where_they_were(tmp_path: Path) -> None:
    model, x = _Views(), torch.randn(6, 5, 4)[1:, 0]
    artifact.write(artifact.whole(Function(model, (x,)), [config(OFF)]), tmp_path / "out")
    run = load(tmp_path / "out")
    assert run.plan is not None and any(t.kind == "alias" and t.offset != "0" for t in run.plan.tensors)
    for y in (x, torch.randn(5, 4)):
        for got, again, want in zip(run(y), run(y.contiguous().numpy()), model(y), strict=True):
            assert torch.allclose(got, want) and np.allclose(again, want.numpy())


def _strided(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    return torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_extents_of_none_and_one_in_any_order(sums: Artifact, data: st.DataObject) -> None:
    """What strides an extent of 0 or 1 has means nothing, whoever made the array."""
    shape = tuple(data.draw(st.lists(st.integers(0, 3), min_size=3, max_size=3)))
    x = _strided(shape, tuple(data.draw(st.permutations(range(3)))))
    plain = x.numpy() if data.draw(st.booleans()) else np.array(x.numpy())
    for got, again, want in zip(sums(x), sums(plain), _sums(x), strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.tensor(again), want)
    for kernel in sums.kernels.values():
        for got, want in zip(kernel(plain), kernel(x), strict=True):
            assert torch.equal(torch.tensor(got), want)


def _sums(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.sum(1) + 0.5, x.sum((0, 2)), x * 2


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("sums") / "sums"
    given = Function(_sums, (torch.randn(2, 3, 4),), ({d: Dim(n, 0, 9) for d, n in enumerate("ABC")},))
    artifact.write(artifact.whole(given, [config({**OFF, "strict": True})]), place)
    return load(place)


def test_arrays_of_anybody_are_inputs(sums: Artifact) -> None:
    import tvm_ffi

    x = torch.randn(2, 3, 4)
    odd = np.frombuffer(b"x" + x.numpy().tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3, 4)
    for y in (tvm_ffi.from_dlpack(x), odd, np.asfortranarray(odd), torch._neg_view(-x)):
        assert np.allclose(np.asarray(sums(y)[1]), _sums(x)[1].numpy(), atol=1e-6)
    for wrong, why in ((x.to("meta"), "on meta"), (odd.astype(">f4"), "is >f4"), ([[[1.0]]], "is f64")):
        with pytest.raises(InputError, match=why):
            sums(wrong)


@pytest.mark.parametrize("fn", [lambda x: x, lambda x: tuple(x.sort())])
def test_models_without_a_kernel(fn: Any, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    artifact.write(artifact.whole(Function(fn, (x,)), [config(OFF)]), tmp_path / "out")
    run = load(tmp_path / "out")
    assert not run.kernels and run.report.target.name == "cpu" and not run.report.target.features
    want = fn(x)
    for got, y in zip(run(x), want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.equal(got, y)


def _in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1:3] = 0
    y.add_(1)
    return y.relu_() * x


def test_writes_in_place_are_read_as_values(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    artifact.write(artifact.whole(Function(_in_place, (x,)), [config({**OFF, "strict": True})]), tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")(x)[0], _in_place(x))


@pytest.mark.parametrize(("fn", "kind", "why"), [
    (lambda x: x.nonzero() * 2, Refusal, "depends on data"),
    (lambda x: 3, InputError, "returns what is no tensor"),
    (lambda x: x if x.sum() > 0 else -x, InputError, "torch.export does not export it"),
    (lambda x: (x.T * 2).as_strided((2, 2), (1, 2)), Refusal, "as_strided.* names places in memory"),
    (lambda x: torch.fft.rfft(x).abs(), Refusal, "is torch.complex64"),
])
def test_models_that_cannot_be_kept(fn: Any, kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why):
        artifact.whole(Function(fn, (torch.randn(3, 4),)), [config(OFF)])


def test_why_torch_does_not_export_it_is_said() -> None:
    given = Function(lambda x: x.unflatten(0, (-1, 2)), (torch.randn(6, 4),), ({0: Dim("N", 2, 9)},))
    with pytest.raises(InputError, match=r"Constraints violated \(N\)!\n.*% 2"):
        artifact.whole(given, [config(OFF)])


def test_tensors_that_no_input_feeds(tmp_path: Path) -> None:
    fn = lambda x: (torch.linspace(0, 1, 5), torch.tril_indices(2, 2), torch.full((2,), True), x + 1)  # noqa: E731
    artifact.write(artifact.whole(Function(fn, (torch.randn(3),)), [config(OFF)]), tmp_path / "out")
    for got, want in zip(load(tmp_path / "out")(torch.ones(3)), fn(torch.ones(3)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_whole_model_is_for_cpus() -> None:
    with pytest.raises(OptionError, match="a whole model for h100"):
        artifact.whole(SMALL, [config({**OFF, "target": "h100", "backend": "cuda"})])


# -- arenas ---------------------------------------------------------------------------------------------------------

BUFFERS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 6)), max_size=24)


@given(BUFFERS)
def test_no_two_live_buffers_share_a_byte(buffers: list[tuple[int, int, int]]) -> None:
    sizes, spans = [n for n, _, _ in buffers], [(a, a + k) for _, a, k in buffers]
    offsets, total = placed(sizes, spans)
    for j, (at, size, (first, last)) in enumerate(zip(offsets, sizes, spans, strict=True)):
        assert at % ALIGNED == 0 and 0 <= at and at + size <= total
        for at2, size2, (first2, last2) in list(zip(offsets, sizes, spans, strict=True))[:j]:
            if first <= last2 and first2 <= last:
                assert at + size <= at2 or at2 + size2 <= at
    assert least(sizes, spans) <= total <= sum(-(-n // ALIGNED) * ALIGNED for n in sizes)


def _array(x: tvm_ffi.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as a kernel gets it: it may be that of a program, without an owner."""
    x, kind = x if isinstance(x, tvm_ffi.Tensor) else tvm_ffi.from_dlpack(x), np.dtype(str(x.dtype))
    steps = [s * kind.itemsize for s in x.strides]
    reach = kind.itemsize + sum((n - 1) * s for n, s in zip(x.shape, steps, strict=True))
    return np.ndarray(tuple(x.shape), kind, (ctypes.c_char * reach).from_address(x.data_ptr()), 0, steps)


class _Sums:
    """A kernel whose outputs tell all its inputs, and which leaves dirt in its scratch."""

    def __init__(self, scratch: int) -> None:
        self.scratch = scratch

    def function(self, *args: Any) -> None:
        *arrays, ins, salt = args
        held = [_array(a) for a in arrays]
        for s in held[len(held) - 1:] if self.scratch else ():
            s[...] = 255
        outs = held[ins:len(held) - bool(self.scratch)]
        total = salt + sum((k + 1) * int(x.sum()) for k, x in enumerate(held[:ins]))
        for k, out in enumerate(outs):
            out[...] = (total + k) % 251

    def arguments(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return sizes["INS"], sizes["SALT"]

    def work(self, sizes: dict[str, int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("u8", (self.scratch,)),) if self.scratch else ()


@st.composite
def _plans(draw: st.DrawFn) -> tuple[Plan, dict[str, _Sums]]:
    tensors = [Tensor("x", "input", "i64", ("N", "3")), Tensor("i", "input", "i64", ("2",)),
               Tensor("two", "input", "i64", ("2", "3")), Tensor("wide", "input", "i64", ("4", "2")),
               Tensor("kept", "state", "i64", ("4", "3")), Tensor("turned", "alias", "i64", ("3", "4"), "kept",
                                                                  ("1", "3"))]
    steps: list[Step] = []
    kernels: dict[str, _Sums] = {}
    for k in range(draw(st.integers(1, 9))):
        match draw(st.integers(0, 7)):
            case 0:
                steps.append(Step("put", draw(st.sampled_from(["", "wraps"])), ("two", "i"), ("kept",), {"dim": "0"}))
            case 1:
                steps.append(Step("put", "wraps", ("wide", "i"), ("kept",), {"dim": "1"}))
            case 2:
                tensors.append(Tensor(f"c{k}", "buffer", "i64", ("3", "4")))
                steps.append(Step("copy", "", ("turned",), (f"c{k}",), {}))
            case 3:
                steps.append(Step("check", "", ("i",), (), {"size": "3"}))
        reads = tuple(draw(st.lists(st.sampled_from([t.name for t in tensors]), min_size=1, max_size=3)))
        writes = tuple(f"b{k}_{j}" for j in range(draw(st.integers(1, 2))))
        kernels[f"k{k}"] = _Sums(draw(st.sampled_from([0, 1, 100, 5000])))
        steps.append(Step("kernel", f"k{k}", reads, writes, {"INS": str(len(reads)), "SALT": str(k)}))
        for name in writes:
            tensors.append(Tensor(name, "buffer", "i64", ("N", str(draw(st.integers(1, 40))))))
            if draw(st.booleans()):
                tensors.append(Tensor(f"{name}v", "alias", "i64", ("N",), name, (tensors[-1].shape[1],), "0"))
    outs = draw(st.lists(st.sampled_from([t.name for t in tensors if t.kind == "buffer"]), min_size=1, max_size=3))
    tensors = [replace(t, kind="output") if t.name in outs else t for t in tensors]
    spans = lives(tensors, steps)
    return Plan((Size("N", "x", 0, 1, 1, 9),), tuple(tensors), ("x", "i", "two", "wide"), tuple(outs), tuple(steps),
                tuple(Life(n, *span, 0, 0) for n, span in spans.items()), {"N": 4}, 0), kernels


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_plans(), st.integers(1, 9), st.booleans(), st.lists(st.integers(-4, 3), min_size=2, max_size=2, unique=True))
def test_a_plan_means_the_same_with_and_without_an_arena(
        loaded: Artifact, drawn: tuple[Plan, dict[str, _Sums]], n: int, native: bool, places: list[int]) -> None:
    """Random plans on an arena, scratch, state and all, give what they give where every tensor has memory of its own;
    walked by machine code, and step by step."""
    plan, kernels = drawn
    check(plan, kernels)
    if native:
        for k in kernels.values():
            k.function = tvm_ffi.convert(k.function)  # type: ignore[method-assign]
    walker = loaded._model._walker if native and isinstance(loaded._model, Model) else None
    model, rng = Model(plan, kernels, {}, walker), np.random.default_rng(n)
    own = {"kept": np.zeros((4, 3), np.int64), "i": np.array(places)}
    for _ in range(2):
        own |= {"x": np.arange(3 * n).reshape(n, 3), "two": rng.integers(0, 9, (2, 3)),
                "wide": rng.integers(0, 9, (4, 2))}
        try:
            _one_by_one(plan, own, n)
        except IndexError:
            with pytest.raises(IndexError, match="out of bounds"):
                model(*(own[name] for name in plan.inputs))
            break
        for got, name in zip(model(*(own[name] for name in plan.inputs)), plan.outputs, strict=True):
            assert np.array_equal(got, own[name])
    assert np.array_equal(model.state["kept"].data, own["kept"])
    model.reset()
    assert not model.state["kept"].data.any()


def _one_by_one(plan: Plan, own: dict[str, Any], n: int) -> None:
    """What the plan says, in `own`."""
    for t in plan.tensors:
        if t.kind == "alias":
            own[t.name] = own[t.of].T if t.of == "kept" else own[t.of][:, 0]
        elif t.kind in ("buffer", "output"):
            own[t.name] = np.zeros((n if t.shape[0] == "N" else int(t.shape[0]), int(t.shape[1])), np.int64)
    for step in plan.steps:
        ins, outs = [own[name] for name in step.reads], [own[name] for name in step.writes]
        if step.kind == "copy":
            outs[0][...] = ins[0]
        elif step.kind != "kernel":
            size = int(step.sizes["size"]) if step.kind == "check" else outs[0].shape[int(step.sizes["dim"])]
            if own["i"].max() >= size or own["i"].min() < (-size if step.what else 0):
                raise IndexError
            if step.kind == "put":
                np.moveaxis(outs[0], int(step.sizes["dim"]), 0)[own["i"]] = np.moveaxis(
                    ins[0], int(step.sizes["dim"]), 0)
        else:
            total = int(step.sizes["SALT"]) + sum((k + 1) * int(a.sum()) for k, a in enumerate(ins))
            for k, out in enumerate(outs):
                out[...] = (total + k) % 251


def test_every_byte_is_accounted_for(made: artifact.Made, loaded: Artifact) -> None:
    """What the manifest says of the arena is what its lives take, and scratch comes on top of it."""
    plan = made.plan
    assert plan is not None and isinstance(loaded._model, Model)
    ends = [x.at + x.bytes for x in plan.lives]
    assert max(ends) <= plan.arena < max(ends) + ALIGNED
    assert {x.name for x in plan.lives} == {t.name for t in plan.tensors if t.kind == "buffer"}
    sizes = plan.example
    for x in plan.lives:
        shape = [eval(e, {}, dict(sizes)) for e in plan.tensor(x.name).shape]
        assert x.bytes == np.prod(shape) * np.dtype(NUMPY[plan.tensor(x.name).dtype]).itemsize
    assert loaded._model.bytes(**sizes) >= plan.arena


# -- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "layer.py").write_text(
        "import torch\ndef make():\n    f = lambda q, k: (q @ k.mT * 0.5).softmax(-1) @ k\n"
        "    return f, (torch.randn(2, 5, 8), torch.randn(2, 7, 8))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "layer:make"


def test_compile_and_run(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCOMP_TUNE", "off")
    assert main(["compile", factory, "-o", "out", "--dynamic", "k.1=2:64", "--strict"]) == 0
    told = capsys.readouterr().out
    for line in ("wrote    out", "targets  cpu", "input    q f32[2, 5, 8]", "input    k f32[2, K_1, 8]",
                 "output   out f32[2, 5, 8]", "size     K_1: 2 to 64", "steps    1, 1 kernels"):
        assert line in told.splitlines()
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 5, 8), np.float32), rng.standard_normal((2, 11, 8), np.float32)
    np.save("q.npy", q)
    np.save("k.npy", k)
    line = "run out --input q=q.npy --input k=k.npy -o results --repeat 2 --json"
    assert main(line.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert told.splitlines()[-1].split()[-1] == said["digest"] and said["call_seconds"] > 0
    assert said["outputs"][0]["shape"] == [2, 5, 8]
    x = torch.from_numpy(k)
    want = (torch.from_numpy(q) @ x.mT * 0.5).softmax(-1) @ x
    torch.testing.assert_close(torch.from_numpy(np.load("results/out.npy")), want)
    assert main(["run", "out", "--size", "K_1=9"]) == 0
    assert "output   out f32[2, 5, 8], " in capsys.readouterr().out
    for words, why in (
            (["run", "out", "--input", "x=2,3"], "error: --input x: there is no such input"),
            (["run", "out", "--size", "M=3"], "error: --size M: there is no such size"),
            (["run", "out", "--input", "k=2,65,8"], "error: dimension 1 of k is 65; the model was compiled for 2 to"),
            (["run", "out", "--input", "k=none.npy"], "error: --input k: cannot read none.npy"),
            (["run", "out", "--digest", "0" * 64], "error: out is another artifact"),
            (["run", "nowhere"], "error: nowhere is no directory"),
            (["compile", factory, "-o", "layer.py"], "error: layer.py is there and is no artifact")):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(why)


def test_what_was_tuned_goes_with_the_artifact_and_is_not_asked_for_again(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of the cache decides the mapping and is written beside the kernel, whole; running asks no cache."""
    from memcomp.cache import Entry, Measured, Store, environment
    from memcomp.ir.text import parse
    from memcomp.pipeline import forget, tunable

    monkeypatch.chdir(tmp_path)
    case = Path(__file__).parent / "cases" / "attention_3pass.mc"
    for name, value in (("CACHE", "on"), ("CACHE_DIR", str(tmp_path / "cache")), ("TUNE", "cached")):
        monkeypatch.setenv(f"MEMCOMP_{name}", value)
    opened = tunable(parse(case.read_text()), config=config(OFF), sizes={})
    other = next(c for c in opened.space.choices() if c.knobs != opened.modelled.knobs)
    entry = Entry(opened.problem, environment("cpu"), other, Measured(1e-3, 0.1, 9, 0.5, 1.0, 2e-3, "by hand"))
    Store(tmp_path / "cache").put(entry)
    forget()
    assert main(["compile", str(case), "-o", "out"]) == 0
    (kept,) = json.loads(Path("out/tuning.json").read_text())
    assert "tuning.json" in json.loads(Path("out/manifest.json").read_text())["files"]
    assert (kept["kernel"], kept["target"], kept["backend"]) == ("attention_3pass", "cpu", "tvm")
    assert (kept["form"], kept["knobs"], kept["setting"]) == (other.form, dict(other.knobs), other.setting)
    found = Entry.read(json.dumps(kept["entry"]))
    assert (found.choice, found.measured, found.problem) == (other, entry.measured, entry.problem)
    shutil.rmtree("cache")
    monkeypatch.setenv("MEMCOMP_CACHE", "off")

    def asked(*_: Any) -> Any:
        raise AssertionError("the cache was asked")

    monkeypatch.setattr("memcomp.cache.store.Store.get", asked)
    capsys.readouterr()
    assert main(["run", "out", "--size", "M=40", "--size", "P=9"]) == 0
    assert "called" in capsys.readouterr().out and not Path("cache").exists()


def test_regions_are_kernels_by_name(factory: str, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCOMP_TUNE", "off")
    assert main(["compile", factory, "-o", "out", "--dynamic", "k.1=2:64", "--regions", "--target", "cpu", "--target",
                 "avx2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["targets"] == ["avx2", "cpu"] and told["steps"] == 0 and len(told["kernels"]) == 1
    q, k = torch.randn(2, 5, 8), torch.randn(2, 9, 8)
    for target in told["targets"]:
        try:
            kernel = load("out", target=target)[told["kernels"][0]["name"]]
        except Refusal:  # this machine is none
            continue
        torch.testing.assert_close(kernel(q, k)[0] if len(kernel.inputs) == 2 else kernel(q, k, k)[0],
                                   (q @ k.mT * 0.5).softmax(-1) @ k)
        with pytest.raises(MemcompError, match="from 2 to 64"):
            kernel(q, torch.randn(2, 65, 8))


@pytest.mark.slow
def test_a_small_llama_whole_and_its_regions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    given = Function(model, (torch.arange(32).reshape(2, 16),), ({1: Dim("S", 2, 64)},))
    artifact.write(artifact.whole(given, [config({**OFF, "strict": True})]), tmp_path / "whole")
    loaded = load(tmp_path / "whole")
    for length in (2, 16, 61):
        tokens = torch.randint(0, 97, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens)[0], model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert loaded.plan is not None and loaded.plan.outputs == ("logits",)
    regions = artifact.regions(given, [config(OFF)])
    assert [k.name for k in regions.kernels] == ["self_attn"] and regions.kernels[0].calls == 2
    artifact.write(regions, tmp_path / "regions")
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 9, 2, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(load(tmp_path / "regions")["self_attn"](q, k, v)[0], want.transpose(1, 2))


def test_arrays_of_any_dtype_are_inputs(tmp_path: Path) -> None:
    """bf16 without torch: bits in, bits out."""
    x = torch.randn(4, 8).bfloat16()
    artifact.write(artifact.whole(Function(lambda x: x * 2, (x,)), [config(OFF)]), tmp_path / "out")
    (got,) = load(tmp_path / "out")(Array("bf16", x.view(torch.uint16).numpy()))
    assert isinstance(got, Array) and np.array_equal(got.numpy(), (x * 2).float().numpy())


SMOLLM = """
import json, sys, time
import memcomp
before = time.process_time(), time.perf_counter()
run = memcomp.load(sys.argv[1])
load = [time.process_time() - before[0], time.perf_counter() - before[1]]
import numpy as np
case = np.load(sys.argv[2])
calls = {}
for name in case.files:
    logits, = run(case[name])
    start = time.perf_counter()
    run(case[name])
    calls[name] = time.perf_counter() - start
    np.save(f"{sys.argv[3]}/{name}.npy", logits)
print(json.dumps({"load": load, "calls": calls, "threads": run.report.threads, "bytes": run.report.bytes}))
"""


@pytest.mark.slow
def test_smollm2_whole_where_only_the_runtime_is(tmp_path: Path, runtime: str) -> None:
    """SmolLM2-135M at any length, in an environment of the extra `runtime`: as near to float64 as the oracle asks."""
    from memcomp import smollm

    try:
        lm = smollm.load()
    except InputError as error:
        pytest.skip(error.what)
    given = Function(lm.model, (torch.arange(64)[None],), ({1: Dim("S", 2, 2048)},))
    made = artifact.whole(given, [config({**OFF, "strict": True})], name="smollm2")
    assert made.plan is not None and not made.plan.torch
    artifact.write(made, tmp_path / "smollm2")
    ids = lm.encode("Gravity is the force by which a planet draws objects toward its center. " * 8)
    cases = {f"p{n}": ids[:, :n] for n in (2, 17, 96)}
    np.savez(tmp_path / "case.npz", **{n: x.numpy() for n, x in cases.items()})
    done = subprocess.run([runtime, "-c", SMOLLM, str(tmp_path / "smollm2"), str(tmp_path / "case.npz"), str(tmp_path)],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    with torch.no_grad():
        eager = {n: lm.model(x, use_cache=False).logits.numpy() for n, x in cases.items()}
        lm.model.double()
        for n, x in cases.items():
            exact = lm.model(x, use_cache=False).logits.numpy()
            bound = tolerance(["f32"], "f32", elements=exact.size, length=None, torch_error=measure(eager[n], exact))
            assert bound.admits(measure(np.load(tmp_path / f"{n}.npy").astype(np.float64), exact)), n
    assert told["load"][0] < 1, told  # of the processor's time, of which half is hashing; docs/artifact.md says more
