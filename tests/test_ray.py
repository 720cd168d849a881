"""Tuning on a Ray cluster: of two processes on this machine, which is one device."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from memcomp.__main__ import main
from memcomp.cache import Entry, environment
from memcomp.config import Config
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.tune.cluster import Remote, _kinds, tuners
from memcomp.tune.search import Tuner
from memcomp.tune.tasks import Given
from memcomp.workers import Job
from tests.planted import Timed

pytest.importorskip("optuna", reason="Optuna is not installed")
FILE = Path(__file__).parent / "cases" / "attention_3pass.mc"
SIZES = {"P": 512, "M": 512}


@pytest.fixture(scope="module")
def two() -> Iterator[None]:
    """A cluster of its own, of two processes; it ends with the tests."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install memcomp[ray]")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def program() -> Program:
    return parse(FILE.read_text())


def tuned(workers: int, folder: Path, dies: bool = False) -> Entry:
    folder.mkdir()
    with tuners("auto", "cpu", workers, partial(Timed, str(folder), dies)) as (tuner,):
        return tuner.tune(program(), Config(), SIZES, seconds=20.0)


def turns(folder: Path) -> list[tuple[float, float]]:
    lines = [line.split() for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    return sorted((float(a), float(b)) for a, b in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_two_processes_choose_as_one_does_and_never_time_at_once(tmp_path: Path) -> None:
    one, both = tuned(1, tmp_path / "one"), tuned(2, tmp_path / "both")
    assert one.problem == both.problem and one.environment == both.environment and not one.rejected + both.rejected
    if one.choice != both.choice:  # in one race they are as fast as one another, as far as can be told
        given = Given(str(program()), (("tune", "off"), ("cache", "off")), tuple(SIZES.items()))
        with Tuner(1) as tuner:
            told = tuner.ask(Job("race", (given, (one.choice, both.choice), 4.0))).told
        a, b = told["medians"]
        assert abs(a / b - 1) <= max(told["spreads"]), told
    assert len(list((tmp_path / "one").glob("*.log"))) == 1 and len(list((tmp_path / "both").glob("*.log"))) == 2
    seen = turns(tmp_path / "both")
    assert len(seen) > 3 and all(before[1] <= after[0] for before, after in zip(seen, seen[1:], strict=False))


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_a_killed_process_costs_the_candidate_that_it_had(tmp_path: Path) -> None:
    entry = tuned(2, tmp_path / "killed", dies=True)
    (lost,) = entry.rejected
    assert str(lost.choice) == (tmp_path / "killed" / "dead").read_text() and "its process ended" in lost.why
    assert len(list((tmp_path / "killed").glob("*.log"))) == 3, "another one took its place"
    tried = int(entry.measured.how.removeprefix("quick: ").split(" of ")[0])
    assert tried > 2 and entry.choice != lost.choice, "all others ran"


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_the_command_keeps_what_the_cluster_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path))
    command = ["tune", str(FILE), "--ray", "auto", "--seconds", "1", "--json"]
    assert main(command) == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert main([*command[:2], "--json"]) == 0, "without the cluster: this machine is one of its devices"
    (known,) = json.loads(capsys.readouterr().out)
    assert first["fresh"] and not known["fresh"] and known["choice"] == first["choice"]


def test_without_ray_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path))
    assert main(["tune", str(FILE), "--ray", "auto"]) == 2
    assert capsys.readouterr().err.startswith("error: --ray needs Ray, which is not installed")


def test_devices_that_differ_are_searched_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """On GPUs each kind for itself; a CPU unlike this machine's, and another memcomp, are left out."""
    own = environment("cpu")

    def there(**other: object) -> Remote:
        found = Remote(Timed, "cuda")  # type: ignore[arg-type]
        found.place, found.environment = f"node {len(other)}", {**own, **other}
        return found

    a, b, c, d = there(device="A"), there(device="B"), there(device="B"), there()
    kinds = _kinds([a, b, there(code="another", device="A"), c], "cuda")
    assert [list(k._asked) for k in kinds] == [[b, c], [a]], "most devices first"
    assert [k.environment(Config())["device"] for k in kinds] == ["B", "A"]
    assert capsys.readouterr().err == "left out: node 2: its memcomp is not like this machine's\n"
    assert [list(k._asked) for k in _kinds([a, d], "cpu")] == [[d]]
    with pytest.raises(OptionError, match="no device"):
        _kinds([a], "cpu")
