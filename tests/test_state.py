"""Models that write into their buffers and inputs, as directories: a static cache of keys and values above all."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tvm")

from memcomp.__main__ import main
from memcomp.artifact import compile as artifact
from memcomp.artifact.execute import Model
from memcomp.artifact.loading import Artifact, load
from memcomp.artifact.plan import Step, check
from memcomp.config import config
from memcomp.inputs import Function
from memcomp.ir.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
STRICT = {"tune": "off", "strict": True}


class Decoder(torch.nn.Module):
    """One token in, the next out: keys and values go into a cache of fixed length, whose end is counted."""

    def __init__(self, width: int = 16, heads: int = 2, words: int = 23, room: int = 40) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.heads = heads
        self.table = torch.nn.Embedding(words, width)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.head = torch.nn.Linear(width, words, bias=False)
        self.register_buffer("keys", torch.zeros(1, heads, room, width // heads))
        self.register_buffer("values", torch.zeros(1, heads, room, width // heads), persistent=False)
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        keys, values, at = self.keys, self.values, self.at
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and isinstance(at, torch.Tensor)
        x = self.table(token)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keys.index_copy_(2, at, k)
        values[:, :, at] = v
        seen = (torch.arange(keys.shape[2]) <= at)[None]
        y = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        at.add_(1)
        return torch.as_tensor(self.head(x + y.transpose(1, 2).flatten(2))[:, -1].argmax(-1, keepdim=True))


def written(fn: Any, inputs: tuple[torch.Tensor, ...], place: Path) -> artifact.Made:
    made = artifact.whole(Function(copy.deepcopy(fn), inputs), [config(STRICT)])
    artifact.write(made, place)
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("state") / "decoder"
    made = written(Decoder().eval(), (torch.tensor([[3]]),), there)
    assert made.plan is not None
    steps = {(s.kind, s.writes) for s in made.plan.steps if s.kind in ("put", "copy")}
    # a token's keys go to where they stay, and nothing else is moved
    assert steps == {("put", ("keys",)), ("put", ("values",)), ("copy", ("at",))}
    return there


def generated(step: Any, tokens: int, first: int = 3) -> list[int]:
    token, found = torch.tensor([[first]]), []
    for _ in range(tokens):
        token = step(token)
        found.append(int(token))
    return found


def loaded(place: Path) -> tuple[Artifact, Any]:
    run = load(place)
    return run, lambda token: run(token)[0]


def test_32_tokens_are_torchs(place: Path) -> None:
    run, step = loaded(place)
    with torch.no_grad():
        want = generated(Decoder().eval(), 32)
    assert len(set(want)) > 3, "the case says nothing"
    assert generated(step, 32) == want
    assert generated(step, 5) != want[:5], "nothing was kept"
    run.reset()
    assert generated(step, 32) == want
    assert [(t.name, t.dtype, t.shape) for t in run.states] == [
        ("keys", "f32", ("1", "2", "40", "8")), ("values", "f32", ("1", "2", "40", "8")), ("at", "i64", ("1",))]


def test_each_loaded_one_has_a_state_of_its_own(place: Path) -> None:
    (_, one), (_, other) = loaded(place), loaded(place)
    with torch.no_grad():
        want = generated(Decoder().eval(), 12)
    assert generated(one, 6) == want[:6]
    assert generated(other, 12) == want
    assert generated(one, 6, want[5]) == want[6:]


def test_no_room_is_an_error_as_in_torch(place: Path) -> None:
    run, step = loaded(place)
    generated(step, 40)
    with pytest.raises(IndexError, match="index 40 is out of bounds for a dimension of 40 elements"):
        step(torch.tensor([[3]]))


def test_threads_take_turns(place: Path) -> None:
    """Calls of one model do not mix: the counter says how many there were."""
    run, step = loaded(place)
    threads = [threading.Thread(target=generated, args=(step, 10)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert int(run._model.state["at"].data[0]) == 40  # type: ignore[union-attr]


BARE = """
import sys
for name in ("torch", "tvm", "triton", "sympy", "networkx", "safetensors"):
    sys.modules[name] = None
import numpy as np, json, memcomp
run = memcomp.load(sys.argv[1])
token, found = np.array([[3]]), []
for _ in range(32):
    token, = run(token)
    found.append(int(token[0, 0]))
print(json.dumps(found))
"""


def test_where_no_torch_is(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BARE, str(place)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert json.loads(done.stdout) == generated(Decoder().eval(), 32)


class Turns(torch.nn.Module):
    """Values that depend on each other's old ones, and old ones that are given back; nothing here needs a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.arange(9.0).reshape(3, 3))
        self.register_buffer("b", torch.zeros(3, 3))
        self.register_buffer("ring", torch.zeros(4, 3))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, ring = (getattr(self, n) for n in ("a", "b", "ring"))
        before, old = ring.clone(), a.clone()
        a.copy_(b.clone())
        b.copy_(old.T)
        ring[i] = x[1]
        return old, before, ring, a.T


def test_old_values_are_read_before_they_go(tmp_path: Path) -> None:
    model, rng = Turns(), torch.Generator().manual_seed(0)
    calls = [(torch.randn(2, 3, generator=rng), torch.tensor(i)) for i in ([0, 2], [3, 1], [-1, 0], [1, 2])]
    written(model, calls[0], tmp_path / "out")
    run, plain = load(tmp_path / "out"), load(tmp_path / "out")
    for inputs in calls:
        want = model(*inputs)
        for got, again, x in zip(run(*inputs), plain(*(y.numpy() for y in inputs)), want, strict=True):
            assert torch.equal(got, x) and np.array_equal(again, x.numpy())
    kept = run._model.state["ring"].data.copy()  # type: ignore[union-attr]
    with pytest.raises(IndexError, match="index 4 is out of bounds for a dimension of 4 elements"):
        run(calls[0][0], torch.tensor([1, 4]))
    assert np.array_equal(run._model.state["ring"].data, kept)  # type: ignore[union-attr]


class Shares(torch.nn.Module):
    """A buffer that is part of another tensor, which is read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.arange(12.0).reshape(4, 3))
        self.b = self.get_buffer("a")[1:3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("a")[1] = x
        return self.b * 2


class Rebinds(torch.nn.Module):
    """Numbers of another dtype and shape that are written over all of a buffer; and a zero's sign."""

    def __init__(self) -> None:
        super().__init__()
        for name, kind in (("short", torch.float16), ("whole", torch.int8)):
            self.register_buffer(name, torch.zeros(2, 3, dtype=kind))
        self.register_buffer("zero", torch.tensor([-0.0]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        short, whole, zero = map(self.get_buffer, ("short", "whole", "zero"))
        old = short.clone(), whole.clone(), zero.clone()
        short.copy_(x)
        whole.copy_(x * 2)
        zero.add_(x[:1])
        return old


def test_what_is_written_over_another_dtype_is_converted(tmp_path: Path) -> None:
    model, x = Rebinds(), torch.tensor([3.7, -2.2, 1e-3])
    artifact.write(artifact.whole(Function(copy.deepcopy(model), (x,)), [config({"tune": "off"})]), tmp_path / "out")
    run = load(tmp_path / "out")
    for scale in (1, 5):
        for got, y in zip(run(x * scale), model(x * scale), strict=True):
            assert torch.equal(got, y) and torch.equal(got.signbit(), y.signbit())


def test_buffers_that_share_memory_are_refused() -> None:
    with pytest.raises(InputError, match="cannot tell what it writes into"):
        artifact.whole(Function(Shares(), (torch.ones(3),)), [config({"tune": "off"})])


def _into(x: torch.Tensor, i: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    cache[:, i] = x
    return cache.clone()


def test_what_is_written_into_is_the_callers(tmp_path: Path) -> None:
    x, i = torch.randn(5, 2), torch.tensor([3, 0])
    made = written(_into, (x, i, torch.zeros(5, 9)), tmp_path / "out")
    assert made.plan is not None and ("put", ("cache",)) in {(s.kind, s.writes) for s in made.plan.steps}
    run, mine, want = load(tmp_path / "out"), torch.zeros(5, 9), torch.zeros(5, 9)
    array = mine.numpy().copy()
    _into(x, i, want)
    run(x, i, mine)
    run(x.numpy(), i.numpy(), array)
    assert torch.equal(mine, want) and np.array_equal(array, want.numpy()) and not run.states
    array.flags.writeable = False
    for bad in (torch.zeros(9, 5).T, array, torch._neg_view(torch.zeros(5, 9))):
        with pytest.raises(InputError, match="the model writes into cache"):
            run(x, i, bad)


def test_a_step_that_reaches_out_is_refused(tmp_path: Path) -> None:
    """Machine code asks nothing: what would reach out of a tensor is refused before it runs."""
    x, i, mine = torch.randn(5, 2), torch.tensor([3, 0]), torch.zeros(5, 9)
    made = written(_into, (x, i, mine), tmp_path / "out")
    run, plan = load(tmp_path / "out"), made.plan
    assert plan is not None
    numbers: dict[str, dict[str, str]] = {"copy": {}, "put": {"dim": "1"}, "check": {"size": "9"}}
    names = [k.name for k in made.kernels]
    for kind, reads, writes, sizes in (
            ("copy", ("x",), ("cache",), None), ("copy", ("i",), ("x",), None), ("copy", ("x",), (), None),
            ("put", ("x", "i"), ("x",), {"dim": "7"}), ("put", ("x", "i"), ("cache",), {"dim": "0"}),
            ("put", ("x", "i"), ("cache",), {}), ("put", ("x", "x"), ("cache",), None),
            ("put", ("x",), ("cache",), None), ("put", ("cache", "i"), ("x",), None),
            ("check", (), (), None), ("check", ("i",), (), {}), ("check", ("x",), (), None)):
        step = Step(kind, "", reads, writes, numbers[kind] if sizes is None else sizes)
        bad = replace(plan, steps=(*plan.steps, step))
        with pytest.raises(InputError, match=f"the plan cannot be run: step {len(plan.steps)}"):
            check(bad, names)
            Model(bad, run.kernels, {}, run._model._walker)(x, i, mine)  # type: ignore[union-attr]
    for wrong in ({"dtype": "f99"}, {"kind": "alias", "of": "i", "strides": ("1", "1")},
                  {"kind": "alias", "of": "cache", "strides": ()}):
        bad = replace(plan, tensors=(*plan.tensors, replace(plan.tensor("x"), name="more", **wrong)))
        with pytest.raises(InputError, match="the plan cannot be run: more "):
            check(bad, names)


def test_the_command_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "counting.py").write_text(
        "import torch\nclass Count(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('last', torch.ones(3))\n    def forward(self, x, y):\n"
        "        old = self.last.clone()\n        self.last.copy_(x)\n        y.copy_(old)\n        return old\n"
        "def make():\n    return Count(), (torch.zeros(3), torch.zeros(3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["compile", "counting:make", "-o", "out", "--strict"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "state    last f32[3]" in told and "writes   y" in told
    assert main(["run", "out", "--repeat", "3"]) == 0
    assert "state    last f32[3]" in (told := capsys.readouterr().out) and ", 1 to 1, mean 1" in told
    run, y = load("out"), np.zeros(3, np.float32)
    for x in (2, 5):
        (got,) = run(np.full(3, x, np.float32), y)
    assert got.tolist() == y.tolist() == [2, 2, 2]
    run.reset()
    assert run(y, y.copy())[0].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_hugging_faces_static_cache(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    torch.manual_seed(0)
    settings = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    model.generation_config = transformers.GenerationConfig(
        use_cache=True, cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 40, "device": "cpu"})

    class Next(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TorchExportableModuleWithStaticCache(copy.deepcopy(model))

        def forward(self, token: torch.Tensor, at: torch.Tensor) -> Any:
            return self.model(input_ids=token, cache_position=at)[:, -1].argmax(-1, keepdim=True)

    token = torch.tensor([[3]])
    written(Next(), (token, torch.tensor([0])), tmp_path / "out")
    run, eager = load(tmp_path / "out"), Next()
    mine = theirs = token
    for k in range(32):
        at = torch.tensor([k])
        with torch.no_grad():
            theirs = eager(theirs, at)
        (mine,) = run(mine, at)
        assert torch.equal(mine, theirs), k
