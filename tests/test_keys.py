"""Key hygiene: what the tuning cache calls a problem changes with what a kernel reads, and with nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from memcomp.cache.entry import canonical
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.errors import MemcompError
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.pipeline import tunable

CASES = Path(__file__).parent / "cases"
FAST = {"attention_1pass": False, "cascade_2": False, "layer_norm": True, "append": True}  # has it what is not read?
MORE = ("attention_3pass", "causal_gqa", "softcap_window", "onepass_mla", "paged_decode", "int4_attention",
        "split_keys")
OTHER = {"f32": "bf16", "i64": "i32", "i32": "i64", "exp": "exp2", "tanh": "sigmoid", "rsqrt": "sqrt", "square": "abs",
         "max": "min"}
LENGTH = 100


def text(name: str) -> str:
    lines = (CASES / f"{name}.mc").read_text().splitlines()
    return "\n".join(line.partition("#")[0].rstrip() for line in lines)


def sizes(p: Program, n: int = LENGTH) -> dict[str, int]:
    return {r.name: min(n, r.bound or n) for r in p.cascade.ranks if r.extent is None}


@cache
def known(source: str) -> tuple[str, str]:
    """The key of a program, and what the kernel of the first of its mappings does."""
    p = parse(source)
    t = tunable(p, config=Config(), sizes=sizes(p))
    return canonical(t.problem), str(lower(t.space.closed(next(t.space.mappings()))))


def varied(source: str) -> Iterator[tuple[str, str]]:
    """The text with one value changed: a number (an extent stays in its bucket), a format, a function.

    Not what says which programs are this one: choices for knobs, bounds, extents that follow from others."""
    head = source.index("\n", source.index("program ")) + 1
    for m in re.finditer(r"(?<![\w.'])(\d+(?:\.\d+)?(?:e-\d+)?)(?![\w.])|\b(" + "|".join(OTHER) + r")\b", source):
        line = source[source.rfind("\n", 0, m.start()) + 1:source.find("\n", m.end())]
        said = line.startswith("rank") and not re.fullmatch(r"rank \w+ = \d+ *", line)
        if m.start() < head or said or line.startswith(("  ", "mapping")):
            continue
        if m[2]:
            new = OTHER[m[2]]
        elif m[1].isdigit():
            n = int(m[1])
            new = str(n - 1 if n > 2 and (n - 2).bit_length() == (n - 1).bit_length() else n + 1)
        else:
            new = str(2 * float(m[1]) + 1)
        yield f"{m[0]} -> {new} in {line}", source[:m.start()] + new + source[m.end():]


def hygienic(name: str) -> tuple[int, int]:
    """How many values of a program were read, and how many not."""
    source = text(name)
    key, tiles = known(source)
    read = unread = 0
    for what, other in varied(source):
        try:
            found = known(other)
        except (MemcompError, ZeroDivisionError):
            continue  # no program, or one that is not ours
        same = found[1] == tiles
        assert (found[0] == key) == same, f"{what}: the kernel {'stays' if same else 'changes'}, the key does not"
        read, unread = read + (not same), unread + same
    return read, unread


@pytest.mark.parametrize("name", FAST)
def test_a_key_changes_with_what_the_kernel_reads_and_with_nothing_else(name: str) -> None:
    read, unread = hygienic(name)
    assert read > 2 and bool(unread) == FAST[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_key_changes_with_what_the_kernel_reads_in_larger_programs(name: str) -> None:
    assert hygienic(name)[0] > 5


def renamed(p: Program) -> str:
    """Other names of ranks and of their variables."""
    out = str(p)
    for n in sorted({r.name for r in p.cascade.ranks}, key=len, reverse=True):
        for word in (n, n.lower()):
            out = re.sub(rf"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])", f"{word}{'X' if word.isupper() else 'x'}", out)
    return out


@pytest.mark.parametrize("name", ["attention_3pass", "append", "cascade_2", "causal_gqa", "layer_norm"])
def test_names_and_lengths_that_are_near_make_no_new_key(name: str) -> None:
    """And other lengths do, where a kernel takes lengths at all."""
    p = parse(text(name))
    key = known(text(name))[0]
    other = replace(parse(renamed(p)), name="another")
    assert canonical(tunable(other, config=Config(), sizes=sizes(other)).problem) == key

    def at(n: int) -> str:
        return canonical(tunable(p, config=Config(), sizes=sizes(p, n)).problem)

    assert at(LENGTH + 1) == key and at(65) == key and (at(16 * LENGTH) != key) == bool(sizes(p))


def test_of_all_options_only_those_that_kernels_differ_with_make_a_new_key() -> None:
    p = parse(text("cascade_2"))
    others: dict[str, Any] = {
        "target": "h100", "backend": "python", "rest": "eager", "rest_options": (("a", 1),), "strict": True,
        "tune": "full", "chains": "all", "interpret": True, "cache": "read", "cache_dir": "/x", "dump": ("lower",)}
    assert others.keys() == {f.name for f in fields(Config)}, "a new option: is it read?"
    key = known(text("cascade_2"))[0]

    def changed(name: str) -> bool:
        config = Config(**{name: others[name]})
        given = replace(p, target=config.target)
        return canonical(tunable(given, config=config, sizes=sizes(p)).problem) != key

    assert {name for name in others if changed(name)} == {"target", "backend"}
