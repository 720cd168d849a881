"""docs/kv.md: its specifications are legal, its programs print what it says, its table of rules is that of the code."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from memcomp.__main__ import main
from memcomp.passes.kv.rules import RULES, verify
from memcomp.passes.kv.text import parse, show
from memcomp.passes.kv.words import WORDS
from tests.test_cli_docs import pattern

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "kv.md").read_text()


def test_specifications_are_legal() -> None:
    blocks = re.findall(r"^```kv\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert blocks
    for text in blocks:
        spec = verify(parse(text))
        assert parse(show(spec)) == spec
    for line in re.findall(r"^\| [A-Z]{3,4}: [^|]*\| `\s*((?:cut|share|map|place|update) [^`]*)`", TEXT, re.MULTILINE):
        parse(f"kv a\n{line}")


def test_programs_print_what_is_shown() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == TEXT.count("```python\n")
    for code, said in blocks:
        if "transformers" in code and importlib.util.find_spec("transformers") is None:
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, {})
        assert out.getvalue() == said


def test_commands_print_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```console\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    for line, said in re.findall(r"^\$ memcomp ([^\n]*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        assert main(shlex.split(line)) == 0
        assert re.fullmatch(pattern(said), capsys.readouterr().out), line


def test_rules_and_words_are_those_of_the_code() -> None:
    assert dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", TEXT, re.MULTILINE)) == {r.name: r.says for r in RULES}
    known = {w for words in WORDS.values() for w in words} | {"group", "map"}
    for row in re.findall(r"^\| [A-Z]{3,4}: [^\n]*", TEXT, re.MULTILINE):
        listed = row.split(" | ")[-1].partition(";")[0]
        if not row.startswith(("| PART", "| ENC")):
            assert set(re.findall(r"`([a-z]+)`", listed)) <= known, row
