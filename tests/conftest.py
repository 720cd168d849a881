"""What every test stands on: no hub, no threads fighting for two cores, a compile cache of its own."""

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MEMCOMP_CACHE"] = "off"  # what was tuned on this machine decides no test
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # OpenMP pools spin: more threads than cores cost 3x
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="memcomp", help="torch.compile backend of the model tests")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--backend"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was compiled before, and random numbers start anew.  Kernels stay built: they depend on their digest."""
    import torch

    import memcomp

    monkeypatch.setattr("memcomp.pipeline.forget", lambda: None)
    torch.manual_seed(0)
    torch._dynamo.reset()
    memcomp.reset()


@pytest.fixture
def operators() -> Iterator[None]:
    """The operator table is afterwards what it was."""
    from memcomp.capture import table
    from memcomp.ir import ops

    rows, rules = dict(ops.OPS), dict(table._OWN)
    yield
    ops.OPS.clear()
    ops.OPS.update(rows)
    table._OWN.clear()
    table._OWN.update(rules)


@pytest.fixture
def no_grad() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """What all modules hold by now stays: the collector need not walk through torch again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # `import ir` would make a second copy of every module of memcomp.ir
    twice = {"ir", "passes", "codegen"} & set(sys.modules)
    if twice:
        raise pytest.UsageError(f"imported without the memcomp prefix: {', '.join(sorted(twice))}")


# `make test` is the same every time, on every machine; `make sweep` and HYPOTHESIS_PROFILE=random look further
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of a fresh environment that holds nothing but memcomp and its extra `runtime`."""
    import shutil
    import subprocess
    import sys
    import tomllib
    from pathlib import Path

    root, place = Path(__file__).resolve().parent.parent, tmp_path_factory.mktemp("runtime")
    needs = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["runtime"]
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    python = str(place / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(root / "constraints.txt"), *needs], check=True)
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "benchmarks", "docs")
    shutil.copytree(root, place / "copy", symlinks=True, ignore=ignored)  # building leaves its traces
    subprocess.run([*pip, "--no-deps", str(place / "copy")], check=True)
    return python
