"""What the README says is run: its Python blocks in order, its make targets by name."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from memcomp.config import Config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    shown = [line for language, text in BLOCKS if language == "text" for line in text.splitlines()]
    assert shown and not [line for line in shown if line not in printed], printed


def test_options_are_listed() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == sorted(f.name for f in fields(Config))


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "".join(code for language, code in BLOCKS if language == "sh"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets), targets


def test_files_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links if "://" not in link), links


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_pages_hold(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs shown in docs/ parse, verify and print back, Python runs; files and links they name exist."""
    from memcomp.ir.text import parse, show
    from memcomp.ir.verify import verify

    text = page.read_text()
    for code in re.findall(r"^```\n(program .*?)^```", text, re.DOTALL | re.MULTILINE):
        verify(parse(code))
        assert parse(show(parse(code))) == parse(code)
    monkeypatch.setenv("MEMCOMP_REST", "eager")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(code, page.name, "exec"), {"__name__": "page"})
    assert all((page.parent / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", text))
    for name in re.findall(r"`((?:ir|passes|codegen|models|tests|memcomp)/[\w/.]*\w)`", text):
        assert Path(name).stem == "x" or any((ROOT / (name + end)).exists() for end in ("", ".py")), name
