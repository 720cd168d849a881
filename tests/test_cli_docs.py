"""docs/cli.md: its examples print what it says; its commands, options and exit codes are those that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from memcomp.__main__ import main
from memcomp.cli.parser import CODES
from tests.test_cli_options import commands, parser

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "cli.md").read_text()
EXAMPLES = [(line, said) for block in re.findall(r"^```console\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
            for line, said in re.findall(r"^\$ memcomp ([^\n]*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)]


def pattern(said: str) -> str:
    """What is shown, where a line `...` stands for lines and `...` at a line's end for the rest of it."""
    lines = said.splitlines(keepends=True)
    return "".join("(?:.*\n)*" if x == "...\n" else re.escape(x).replace(re.escape("...\n"), ".*\n") for x in lines)


def test_examples_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    (tmp_path / "model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path / "cache"))
    assert len(EXAMPLES) > 10
    for line, said in EXAMPLES:
        torch._dynamo.reset()  # each is a process of its own
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        assert re.fullmatch(pattern(said), err if code else out), (line, out, err)
        assert code in CODES and (code == 2) == said.startswith("error: "), line


def test_commands_and_codes_are_those_there_are() -> None:
    names = {path[0] for path, _ in commands(parser()) if path}
    table = TEXT[:TEXT.index("## ")]
    assert set(re.findall(r"`(\w+)`", "".join(x for x in table.splitlines(True) if x.startswith("| `")))) == names
    assert [int(x) for x in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)] == sorted(CODES)


def test_options_it_names_exist() -> None:
    known = {o for _, p in commands(parser()) for a in p._actions for o in a.option_strings}
    assert set(re.findall(r"`(--?[a-z][\w-]*)", TEXT)) <= known
