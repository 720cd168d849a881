"""Who may import whom, who may name what: the shape of docs/architecture.md section 1, read off the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"ir": {"ir"}, "passes": {"ir", "passes"}, "codegen": {"ir", "codegen"}, "models": {"ir", "models"}}
FOREIGN = {  # third-party package -> folders (or files) that may import it, besides memcomp/ itself where it says so
    "torch": ("memcomp", "models"),
    "transformers": ("memcomp",),
    "triton": ("codegen/triton", "codegen/gluon", "models/bench/_flash", "memcomp/artifact"),
    "cuda": ("codegen/cuda", "memcomp/artifact"),
    "tvm": ("codegen/tvm", "memcomp/artifact", "memcomp/capture/relax", "memcomp/relax"),
    "tvm_ffi": ("codegen/tvm", "memcomp/artifact", "memcomp/capture/relax", "memcomp/relax"),
    "numpy": ("ir", "codegen/python", "codegen/gluon/model", "passes/kv", "memcomp"),
}


def sources() -> list[Path]:
    """Every .py file of the package, each once (links are not followed)."""
    return sorted(f for room in (*ROOMS, "memcomp") for f in (ROOT / room).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names)


def wrong(place: str, name: str) -> str:
    """Why the file at `place` (relative to the root) may not import `name`; empty if it may."""
    first, _, rest = name.partition(".")
    room = place.partition("/")[0]
    if first in ROOMS:
        return f"{first} is imported without memcomp: a second copy of its modules"
    if first == "memcomp" and room in ROOMS and rest.partition(".")[0] not in ROOMS[room]:
        return f"{room} may import only {', '.join(sorted(ROOMS[room]))} of memcomp"
    allowed = FOREIGN.get(first)
    if allowed is not None and not any(place.startswith((f"{a}/", f"{a}.py")) for a in allowed):
        return f"{first} may be imported only in {', '.join(allowed)}"
    return ""


def test_arrows() -> None:
    files = sources()
    assert files
    faults = [f"{place}:{line}: {why}" for f in files for place in [str(f.relative_to(ROOT))]
              for line, name in imported(f) if (why := wrong(place, name))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("place, name", [
    ("passes/fuse.py", "memcomp.codegen.lower"), ("ir/text.py", "torch.nn"), ("codegen/lower.py", "tvm.tirx"),
    ("models/mha.py", "memcomp.backend"), ("memcomp/backend.py", "ir.text"), ("passes/fuse.py", "memcomp.config"),
])
def test_wrong_arrows_are_seen(place: str, name: str) -> None:
    assert wrong(place, name)


def test_composites_have_no_name() -> None:
    """Softmax is constructed from monoids and laws; only what reads or writes torch may know the word."""
    files = [f for f in (*sources(), *(ROOT / "ir").rglob("*.toml")) if f.relative_to(ROOT).parts[0] != "models"
             and f.relative_to(ROOT).parts[:2] != ("memcomp", "capture")]
    named = [f"{f.relative_to(ROOT)}:{n}" for f in files
             for n, line in enumerate(f.read_text().splitlines(), 1) if "softmax" in line.lower()]
    assert files and not named, named
