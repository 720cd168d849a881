"""Random tiny models of transformers, no hub: every attention compiled, the result equal to eager's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memcomp.oracle import measure, tolerance

tf = pytest.importorskip("transformers")

VOCAB, TOKENS, DECODED = 97, 19, 6
LAYERS = 2  # where they differ, and of one family where they are alike; of the others one is as good
# weights large enough that scores spread over many units: a mask, window or cap that is missed changes the result
BASE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=8)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=8, attn_logit_softcapping=5.0, attn_implementation="eager")),
    "gemma3": ("Gemma3", dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])),
    "gpt2": ("GPT2", {}),
    "deepseek_v3": ("DeepseekV3", dict(
        num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, **MOE)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, **MOE)),
}
ALIKE = {"mistral", "qwen2", "qwen3", "gpt2", "mixtral", "bert"}
DECODERS = sorted(CONFIGS)
QUICK = {"llama", "gemma2"}  # tried in every mode by `make test`; the others in the sweep, apart from prefill


def layers(name: str) -> int:
    return 1 if name in ALIKE else LAYERS


def decoder(name: str, **changed: Any) -> Any:
    """The tiny causal model, float32, eval; the same weights whatever is `changed` in its configuration."""
    family, extra = CONFIGS[name]
    made = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(0)
    options = {**BASE, **extra, "num_hidden_layers": layers(name), **changed}
    attention = options.pop("attn_implementation", "sdpa")
    config = getattr(tf, made)(**options)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def in_float64(model: Any) -> Any:
    """A float64 copy, without the grouped matrix product of experts, which has no float64 form."""
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")
    return twin


def tokens(batch: int, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if backend == "memcomp":
        import memcomp

        memcomp.reset()


@pytest.fixture
def compile(backend: str) -> Callable[[Any], Callable[..., Any]]:
    """torch.compile with the backend under test, without Inductor (its rest is not what is tested here)."""
    options = {"options": {"rest": "eager", "strict": True}} if backend == "memcomp" else {}
    return lambda module: torch.compile(module, fullgraph=True, backend=backend, **options)


@pytest.fixture
def compiled(backend: str) -> Callable[[int], None]:
    """Asserts that `regions` attention regions run in memcomp's kernels and none fell back."""

    def check(regions: int) -> None:
        if backend == "memcomp":
            import memcomp

            stats = memcomp.stats()
            assert not stats["fallbacks"], stats
            assert stats["regions"] >= regions and stats["launches"] >= regions, stats

    return check


def agree(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` is as near to float64 as the oracle asks, seeing how near eager float32 is."""
    error, reference = (measure(x.double().numpy(), exact.numpy()) for x in (got, eager))
    bound = tolerance(["f32"], "f32", elements=exact.numel(), length=None, torch_error=reference)
    assert bound.admits(error), (error, bound)


def modes(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_prefill(name: str, compile: Any, compiled: Any) -> None:
    model, x = decoder(name), tokens(2)
    exact = in_float64(model)(x, use_cache=False).logits
    eager = model(x, use_cache=False).logits
    agree(compile(model)(x, use_cache=False).logits, eager, exact)
    compiled(layers(name))


@pytest.mark.parametrize("name", modes(DECODERS))
@torch.no_grad()
def test_prefill_with_cache(name: str, compile: Any, compiled: Any) -> None:
    model, x = decoder(name), tokens(1)
    exact = in_float64(model)(x, use_cache=False).logits
    eager = model(x, use_cache=False).logits
    agree(compile(model)(x, past_key_values=tf.DynamicCache(config=model.config)).logits, eager, exact)
    compiled(layers(name))


@pytest.mark.parametrize("name", modes(DECODERS))
@torch.no_grad()
def test_padded(name: str, compile: Any, compiled: Any) -> None:
    model, x, pads = decoder(name), tokens(3), (0, 5, 1)  # padding on the left, as for generation
    mask = torch.stack([(torch.arange(TOKENS) >= n).long() for n in pads])
    live = mask.bool()
    # the reference never sees the padding: each row alone, at its own positions
    alone, place = in_float64(model), torch.arange(TOKENS)[None]
    exact = torch.cat([alone(x[i : i + 1, n:], position_ids=place[:, n:], use_cache=False).logits[0]
                       for i, n in enumerate(pads)])
    eager = model(x, attention_mask=mask, use_cache=False).logits[live]
    agree(compile(model)(x, attention_mask=mask, use_cache=False).logits[live], eager, exact)
    compiled(layers(name))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", modes(DECODERS))
@torch.no_grad()
def test_decode(name: str, cache: str, compile: Any, compiled: Any) -> None:
    """A growing cache, one token a step: every step right, at most two graphs."""
    model, x = decoder(name), tokens(1)
    exact = in_float64(model)(x, use_cache=False).logits
    eager = model(x, use_cache=False).logits
    prompt = TOKENS - DECODED
    config = model.config
    past = tf.DynamicCache(config=config) if cache == "dynamic" else tf.StaticCache(config=config, max_cache_len=32)
    model(x[:, :prompt], past_key_values=past)
    step = compile(model)
    for i in range(prompt, TOKENS):
        agree(step(x[:, i : i + 1], past_key_values=past).logits[:, 0], eager[:, i], exact[:, i])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    compiled(layers(name))


@pytest.mark.parametrize("name, changed", [
    ("mistral", dict(sliding_window=9)), ("gemma2", dict(attn_logit_softcapping=6.0)),
    ("gemma3", dict(sliding_window=7)), ("llama", dict(rope_theta=1e3)),
])
@torch.no_grad()
def test_a_small_change_is_seen(name: str, changed: dict[str, Any]) -> None:
    model, x = decoder(name), tokens(2)
    exact, eager = in_float64(model)(x, use_cache=False).logits, model(x, use_cache=False).logits
    agree(eager, eager, exact)
    with pytest.raises(AssertionError):
        agree(decoder(name, **changed)(x, use_cache=False).logits, eager, exact)


def encoder(name: str) -> tuple[Any, dict[str, torch.Tensor], int]:
    """(model, inputs, attention regions) of an encoder or encoder-decoder with padding."""
    torch.manual_seed(0)
    x = tokens(2)
    mask = torch.ones_like(x)
    mask[1, 12:] = 0
    if name == "bert":
        config = tf.BertConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=layers(name),
                               num_attention_heads=4, max_position_embeddings=64, initializer_range=0.25)
        model = tf.BertModel(config, add_pooling_layer=False).eval()
        return model, dict(input_ids=x, attention_mask=mask), layers(name)
    config = tf.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=LAYERS, num_heads=4,
                         decoder_start_token_id=0, initializer_factor=2.0, use_cache=False)
    if name == "t5_encoder":
        return tf.T5EncoderModel(config).eval(), dict(input_ids=x, attention_mask=mask), LAYERS
    inputs = dict(input_ids=x, attention_mask=mask, decoder_input_ids=tokens(2, 7))
    return tf.T5ForConditionalGeneration(config).eval(), inputs, 3 * LAYERS  # self, self and cross attention


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "t5"])
@torch.no_grad()
def test_encoder(name: str, compile: Any, compiled: Any) -> None:
    model, inputs, regions = encoder(name)
    live = slice(None) if name == "t5" else inputs["attention_mask"].bool()  # t5's result belongs to the decoder
    exact = in_float64(model)(**inputs)[0][live]
    eager = model(**inputs)[0][live]
    agree(compile(model)(**inputs)[0][live], eager, exact)
    compiled(regions)
