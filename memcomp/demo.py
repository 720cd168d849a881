"""The demo: SmolLM2-135M compiled by memcomp, token for token equal to eager, timed beside eager and torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import memcomp
from memcomp import smollm

PROMPT, TOKENS, TIMED = 512, 64, 24  # lengths: of the prompt, of what is compared, of what is timed
QUESTION = "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
ROUNDS, SECONDS = 3, 30.0  # at least so many rounds of timing, more while they take less than this


def main(console: Console | None = None) -> int:
    """Run it; the exit code is 1 if a token differs from eager's or an attention layer is not memcomp's."""
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    lm = smollm.load(progress=console.print)
    config = lm.model.config
    console.print(f"SmolLM2-135M: {config.num_hidden_layers} layers, {config.num_attention_heads} query heads on "
                  f"{config.num_key_value_heads} KV heads, float32, {torch.get_num_threads()} threads")
    memcomp.reset()
    steps: dict[str, Callable[..., Any]] = {"eager": lm.model}
    if _has_compiler():
        steps["torch.compile"] = torch.compile(lm.model, dynamic=True)
        steps["memcomp"] = torch.compile(lm.model, dynamic=True, backend="memcomp")
    else:
        console.print("no C++ compiler: Inductor is left out, and what memcomp does not compile runs eagerly")
        steps["memcomp"] = torch.compile(lm.model, dynamic=True, backend="memcomp", options={"rest": "eager"})
    long = prompt(lm)
    expected: torch.Tensor | None = None
    ok = True
    for name, step in steps.items():
        compiling = ", compiling" if step is not lm.model else ""
        with _busy(console, f"{name}: {TOKENS} tokens after {PROMPT}{compiling}"):
            found = smollm.greedy(step, config, long, TOKENS)
        expected = found.tokens if expected is None else expected
        same = int((found.tokens == expected).sum())
        console.print(f"  {same} of {TOKENS} tokens equal eager's; first call: prefill {found.prefill:.1f} s, "
                      f"{TOKENS - 1} decode steps {found.decode:.1f} s")
        ok &= name != "memcomp" or same == TOKENS

    stats = memcomp.stats()
    console.print(f"  memcomp: {stats['regions']} attention regions in {stats['graphs']} graphs, {stats['kernels']} "
                  f"distinct kernels, fallbacks: {stats['fallbacks'] or 'none'}")
    ok &= not stats["fallbacks"] and stats["regions"] == stats["graphs"] * config.num_hidden_layers

    question = lm.encode(QUESTION)
    answers = {name: smollm.greedy(steps[name], config, question, TOKENS).tokens for name in ("eager", "memcomp")}
    ok &= torch.equal(answers["eager"], answers["memcomp"])
    console.print(f"\n{lm.decode(question)}{lm.decode(answers['memcomp'])}\n", markup=False)

    console.print(_timed(console, steps, config, long))
    console.print("\none attention layer, explained:")
    console.print(memcomp.explain(_layer(lm.model), lm.model.model.embed_tokens(long)))
    console.print("every token equals eager's, every attention layer is memcomp's" if ok else
                  "FAILED: a token differs from eager's, or an attention layer was left to torch")
    return 0 if ok else 1


def prompt(lm: smollm.SmolLM2, length: int = PROMPT) -> torch.Tensor:
    """The first `length` tokens of Python's own help pages, shape (1, length)."""
    from pydoc_data.topics import topics

    return lm.encode("\n".join(topics[k] for k in sorted(topics))[: 16 * length])[:, :length]


def _timed(console: Console, steps: dict[str, Callable[..., Any]], config: Any, ids: torch.Tensor) -> Table:
    """Medians over rounds in which the three take turns, so that a busy machine is busy for all of them."""
    runs: dict[str, list[smollm.Generated]] = {name: [] for name in steps}
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < SECONDS:
        rounds += 1
        with _busy(console, f"timing, round {rounds}"):
            for name, step in steps.items():
                runs[name].append(smollm.greedy(step, config, ids, TIMED))
    table = Table("", "prefill, tokens/s", "decode, tokens/s", title=f"median of {rounds} interleaved rounds")
    for name, found in runs.items():
        table.add_row(name, f"{ids.shape[1] / statistics.median(g.prefill for g in found):.0f}",
                      f"{(TIMED - 1) / statistics.median(g.decode for g in found):.1f}")
    return table


def _layer(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    attention, rotary = model.model.layers[0].self_attn, model.model.rotary_emb

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        where = torch.arange(hidden.shape[1])[None]
        out: torch.Tensor = attention(hidden, position_embeddings=rotary(hidden, where), attention_mask=None)[0]
        return out

    return layer


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@contextmanager
def _busy(console: Console, what: str) -> Iterator[None]:
    """A spinner on a terminal, plain lines elsewhere; the seconds it took at the end."""
    begin = time.perf_counter()
    if not console.is_terminal:
        console.print(f"{what} …")
    with console.status(what):
        yield
    console.print(f"{what}: {time.perf_counter() - begin:.1f} s")
