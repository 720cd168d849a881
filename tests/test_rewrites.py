"""What every rewrite promises: its docstring holds, what it made is legal, and a second time it finds nothing to do."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from memcomp.ir.errors import Refusal
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.verify import verify
from memcomp.passes import PIPELINE

CASES = Path(__file__).parent / "cases"
PROGRAMS = sorted(f for folder in (CASES, CASES / "chains", CASES / "taxonomy") for f in folder.glob("*.mc"))


def rewrite(name: str) -> Callable[[Program], Program]:
    """The rewrite of this name: the only public function of its file that is its own."""
    found: Callable[[Program], Program] = getattr(import_module(f"memcomp.passes.{name}"), name)
    return found


@pytest.mark.parametrize("name", PIPELINE)
def test_docstring_holds(name: str) -> None:
    before, after = (inspect.getdoc(rewrite(name)) or "").split("before:\n")[1].split("after:\n")
    old, new = (parse(textwrap.dedent(text)) for text in (before, after))
    got = rewrite(name)(old)
    assert got != old and replace(got, proofs=()) == replace(new, proofs=())  # proofs are long lines


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_is_idempotent(path: Path) -> None:
    program = parse(path.read_text())
    for name in PIPELINE:
        try:
            new = rewrite(name)(program)
        except Refusal:  # here the way of this program ends
            return
        verify(new, since=program)
        assert rewrite(name)(new) is new, name
        program = new
