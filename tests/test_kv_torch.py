"""Caches in torch: what a codec's cascade says, as torch operators, and caches made of it, held to the interpreter."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import memcomp  # noqa: E402
from memcomp.ir.errors import InputError, Refusal  # noqa: E402
from memcomp.kv.spell import run  # noqa: E402
from memcomp.kv.storage import Storage  # noqa: E402
from memcomp.passes.kv import store  # noqa: E402
from memcomp.passes.kv.account import Shape  # noqa: E402
from memcomp.passes.kv.codecs import FAMILIES, NUMPY, codec, decode, encode  # noqa: E402
from memcomp.passes.kv.text import parse  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_encodes_and_decodes_bit_for_bit(family: str) -> None:
    made = codec(family)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(40, made.group)) * np.exp(rng.normal(size=(40, 1)) * 3)).astype(np.float32)
    x[0] = 0
    x[1] = 1.5
    x[2, ::2] = 0
    tables = {t.name: rng.normal(size=t.shape).astype(NUMPY[t.dtype]) if t.values is None else t.array()
              for t in made.tables}
    want = encode(made, x, tables)
    given = {n: torch.from_numpy(np.ascontiguousarray(t)) for n, t in tables.items()}
    got = run(made.encode, {"X": torch.from_numpy(x), **given})
    for p in made.planes:
        assert np.array_equal(got[p.name].float().numpy() if p.dtype == "bf16" else got[p.name].numpy(), want[p.name])
    back = run(made.decode, {**got, **given})["X"].float().numpy()
    assert np.array_equal(back, decode(made, want, tables))


SPECS = (
    "kivi{bits=4, group=8, residual=16}", "kivi{bits=2, group=16, residual=0}",
    "kv a\nregion all: rest\n  k: int{bits=8, group=32, mode=sym}\n  v: q4_0\n",
    "kv b\nregion sinks: first 3\n  k, v: bf16\nregion new: last 5\n  k, v: f16\nregion body: rest\n  k, v: mx\n",
    "kv c\nregion sinks: first 2\n  k, v: f32\nregion new: last 0\n  k, v: bf16\nregion body: rest\n"
    "  k: int{bits=4, group=4} along n\n  v: lut{group=32}\nupdate group{every=8}\n",
    "kv d\nregion sinks: first 50\n  k, v: f32\nregion body: rest\n  k, v: bf16\n",
)


@pytest.mark.parametrize("text", SPECS, ids=("kivi4", "kivi2", "int8-q4_0", "sinks-mx", "sinks-along-n", "sinks-alone"))
@pytest.mark.parametrize("steps", [(1,) * 40, (37, 1, 1, 1), (5, 9, 1, 2, 20, 1, 1, 1)],
                         ids=("single", "prompt", "mixed"))
def test_what_is_read_is_what_the_interpreter_reads(text: str, steps: tuple[int, ...]) -> None:
    spec, width, most = parse(text), 32, 40
    shape = Shape(layers=1, batch=2, heads=2, tokens=most, head=width)
    storage = Storage(spec, batch=2, heads=2, width=width, tokens=most)
    model = store.Cache(spec, shape)
    addresses = {n: b.data_ptr() for n, b in storage.named_buffers()}
    rng, done = np.random.default_rng(1), 0
    for n in steps:
        k, v = rng.normal(size=(2, 2, 2, n, width)).astype(np.float32)
        storage.append(torch.from_numpy(k), torch.from_numpy(v))
        model.append({"k": k, "v": v})
        done += n
        got = [x.numpy() for x in storage.read()]
        seen = np.zeros((2, 2, done), int)
        for _, _, *want, at in model.read():
            for x, y in zip(got, want, strict=True):
                assert np.array_equal(np.take_along_axis(x, at[..., None], 2), y.astype(np.float32))
            np.put_along_axis(seen, at, 1, 2)
        assert seen.all() and int(storage.length) == done
    assert {n: b.data_ptr() for n, b in storage.named_buffers()} == addresses


@pytest.mark.parametrize(("text", "words"), [
    ("kv x\nregion all: rest\n  k: hadamard | int{bits=4}\n  v: f16\n", "does more than encode"),
    ("kv x\ncut k{rope=before}, v\nregion all: rest\n  k, v: f16\n", "other streams"),
    ("kv x\nregion sinks: first 4\n  k, v: f16\nregion all: rest\n  drop\n", "keeps nothing"),
    ("kv x\nshare heads{group=2}\nregion all: rest\n  k, v: f16\n", "heads or sequences share storage"),
    ("kv x\nshare layers{map=[1, 1]}\nregion all: rest\n  k, v: f16\n", "a producer behind its readers")])
def test_what_has_no_form_is_refused(text: str, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        Storage(parse(text), batch=1, heads=2, width=32, tokens=64, layers=2)
    config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(Refusal, match=words):
        memcomp.KVCache(text, config, tokens=64)


@pytest.mark.parametrize("text", ["plain", "kivi{residual=8, group=8}"])
def test_a_token_more_than_there_is_room_for_is_an_error_and_changes_nothing(text: str) -> None:
    storage = Storage(parse(text), batch=1, heads=1, width=8, tokens=20)
    x = torch.randn(1, 1, 21, 8)
    storage.append(x[:, :, :20], x[:, :, :20])
    before = {n: b.clone() for n, b in storage.named_buffers()}
    storage.append(x[:, :, :0], x[:, :, :0])
    with pytest.raises(InputError, match="21 tokens for a storage of 20"):
        storage.append(x[:, :, 20:], x[:, :, 20:])
    if text == "plain":  # in a graph, where the length is data
        with pytest.raises(RuntimeError, match="more tokens than a storage of 20 holds"):
            torch.compile(storage.append, backend="eager", fullgraph=True)(x[:, :, 20:], x[:, :, 20:])
    assert all(torch.equal(b, before[n]) for n, b in storage.named_buffers())
    with pytest.raises(InputError, match="tokens=0"):
        Storage(parse(text), batch=1, heads=1, width=8, tokens=0)


def test_a_table_is_given_in_the_shape_that_the_codec_says() -> None:
    spec = parse("kv a\nregion all: rest\n  k, v: lut{table=given, group=32}")
    table = {"k.T": torch.arange(16.0), "v.T": torch.arange(16.0)}
    Storage(spec, batch=1, heads=1, width=32, tokens=4, tables=table)
    with pytest.raises(InputError, match=r"'v.T' has shape \(15,\), not \(16,\)"):
        Storage(spec, batch=1, heads=1, width=32, tokens=4, tables=table | {"v.T": torch.arange(15.0)})


def test_generate_in_batches_with_padding_beams_and_again() -> None:
    model, spec = tiny(), "kv plain\nregion all: rest\n  k, v: f32\n"
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    cache = memcomp.KVCache(spec, model.config, tokens=20)
    for beams in (1, 3):
        said = {"attention_mask": mask, "max_new_tokens": 2, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        want = model.generate(ids, **said)
        assert torch.equal(model.generate(ids, past_key_values=cache, **said), want)
        cache = memcomp.KVCache(spec, model.config, tokens=20)
    for begin in (0, 40):  # one cache, another prompt
        cache.reset()
        ids = torch.arange(begin, begin + 12)[None]
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False),
                           model.generate(ids, max_new_tokens=2, do_sample=False))
    with pytest.raises(InputError, match="22 tokens for a storage of 20"):
        model.generate(torch.arange(22)[None], past_key_values=cache, max_new_tokens=2, do_sample=False)


def tiny() -> "transformers.LlamaForCausalLM":
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, intermediate_size=64,
        vocab_size=128, head_dim=32, max_position_embeddings=128)
    return transformers.LlamaForCausalLM(config).eval()


def test_generate_with_numbers_stored_as_they_are_says_what_it_says_without() -> None:
    model, ids = tiny(), torch.arange(12)[None]
    want = model.generate(ids, max_new_tokens=10, do_sample=False)
    cache = memcomp.KVCache("kv plain\nregion all: rest\n  k, v: f32\n", model.config, tokens=32)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False), want)
    assert cache.bytes == 2 * 2 * 32 * 32 * 4   # layers, keys and values, tokens, channels, bytes


@pytest.mark.slow
def test_a_compiled_step_reads_codes_and_is_compiled_once() -> None:
    """Tokens equal those of eager mode; one graph, a region a layer, all with one kernel that reads the codes."""
    model, ids = tiny(), torch.arange(12)[None]
    text = "kivi{bits=4, group=8, residual=8}"
    with torch.no_grad():
        want = model.generate(ids, past_key_values=memcomp.KVCache(text, model.config, 48), max_new_tokens=24,
                              do_sample=False)[:, 12:]
        cache = memcomp.KVCache(text, model.config, 48)
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        torch._dynamo.reset()
        memcomp.reset()
        got, step = [token], torch.compile(model.forward, backend="memcomp", fullgraph=True, dynamic=False)
        for n in range(23):
            token = step(token, past_key_values=cache, position_ids=torch.tensor([[12 + n]])).logits[:, -1:].argmax(-1)
            got.append(token)
    assert torch.equal(torch.cat(got, 1), want)
    told = memcomp.stats()
    assert told | {"launches": 0} == {"regions": 2, "kernels": 1, "launches": 0, "graphs": 1, "recompilations": 0,
                                      "fallbacks": {}}
