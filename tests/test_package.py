"""The package as users get it: what is in wheel and sdist, what importing costs, what the entry points name."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("ir", "passes", "codegen", "models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str) -> str:
    """Run `code` in a fresh interpreter that sees the checkout and nothing else of this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/",
                          env=environment).stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in the wheel and (without the top folder) in the sdist, built from a copy of the checkout."""
    pytest.importorskip("build")
    copy, out = tmp_path_factory.mktemp("copy") / "memcomp", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "benchmarks")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)], check=True,
                   capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as z, tarfile.open(sdist) as t:
        assert not any(m.issym() or m.islnk() for m in t.getmembers())
        return set(z.namelist()), {m.name.partition("/")[2] for m in t.getmembers()}


@pytest.mark.parametrize("which", ["wheel", "sdist"])
def test_distributions_hold_real_folders(built: tuple[set[str], set[str]], which: str) -> None:
    names = built[which == "sdist"]
    own = [f for f in (ROOT / "memcomp").rglob("*.py") if "__pycache__" not in f.parts]
    rooms = [f for room in ROOMS for f in (ROOT / room).rglob("*.py")]
    expected = {str(f.relative_to(ROOT)) for f in own} | {f"memcomp/{f.relative_to(ROOT)}" for f in rooms}
    expected |= {f"memcomp/{f.relative_to(ROOT)}" for f in (ROOT / "ir" / "targets").glob("*.toml")}
    expected |= {f"memcomp/{f.relative_to(ROOT)}" for f in (ROOT / "passes" / "kv" / "systems").glob("*.kv")}
    assert expected | {"memcomp/py.typed", "memcomp/page.css"} <= names
    assert not {n for n in names if n.startswith(("tests/", "benchmarks/", *(f"{r}/" for r in ROOMS)))}


def test_the_ir_needs_no_torch() -> None:
    modules = [f"memcomp.ir.{f.stem}" for f in (ROOT / "ir").glob("*.py") if f.stem != "__init__"]
    seen = python(f"import sys, importlib; [importlib.import_module(m) for m in {modules}];"
                  f"print(*({{'torch', 'tvm', 'triton', 'transformers', 'ir'}} & set(sys.modules)))")
    assert seen == ""


def test_compilers_are_imported_where_they_are_used() -> None:
    """A user without TVM, Triton or transformers can import everything that is public, but a cache for transformers,
    which says what it lacks."""
    assert python("""if True:
        import sys; sys.modules.update(dict.fromkeys(['tvm', 'tvm_ffi', 'triton', 'transformers', 'gguf']))
        import memcomp; [getattr(memcomp, n) for n in memcomp.__all__ if n != 'KVCache']
        try:
            memcomp.KVCache
        except memcomp.InputError as error:
            print(error.hint)""").startswith("pip install memcomp[hf]")


@pytest.mark.parametrize("group, name, value", [
    *(("console", n, v) for n, v in PROJECT["scripts"].items()),
    *((g, n, v) for g, rows in PROJECT["entry-points"].items() for n, v in rows.items()),
])
def test_entry_points_exist(group: str, name: str, value: str) -> None:
    module, _, function = value.partition(":")
    assert name == "memcomp" and callable(getattr(import_module(module), function)), group


def test_constraints_pin_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    ranges = {line.split(">")[0] for line in lines if "==" not in line and "<" in line}
    pinned = {name.lower().replace("_", "-") for name, _, version in (x.partition("==") for x in lines) if version}
    assert ranges == {"triton", "nvidia-cuda-nvrtc"}, "a torch for GPUs names its own"
    assert len(pinned) + len(ranges) == len(lines) and "torch==2.13.0" in lines
    pinned |= ranges
    for requirement in (*PROJECT["dependencies"], *(x for e in PROJECT["optional-dependencies"].values() for x in e)):
        name = requirement.split(";")[0].split(">")[0].split("=")[0].strip()
        assert name in pinned, requirement
