"""Tuning: the fastest right way wins and is kept; a wrong, crashing, hanging or greedy one costs itself only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memcomp.__main__ import main
from memcomp.cache import Choice, Store
from memcomp.config import Config
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.pipeline import compile_program, forget, tunable
from memcomp.tune import search
from memcomp.tune.progress import words
from memcomp.tune.search import INTERRUPTED, State, Tuner, ranked, winners
from memcomp.tune.tasks import Tasks
from memcomp.workers import Does
from tests.planted import Planted, Quick

pytest.importorskip("optuna", reason="Optuna is not installed")
FILE = Path(__file__).parent / "cases" / "attention_3pass.mc"
SIZES = {"P": 64, "M": 100}


def program() -> Program:
    return parse(FILE.read_text())


@pytest.fixture(scope="module")
def one() -> Iterator[Tuner]:
    """The tuner of this process, as on a machine of one core: a process of its own for one program after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "cpu", lambda: SimpleNamespace(cores=1))
        search.tuner.cache_clear()
        made = search.tuner()
    yield made
    made.close()
    search.tuner.cache_clear()


def test_what_wins_is_a_member_that_was_compared_with_float64(one: Tuner) -> None:
    seen: list[State] = []
    entry = one.tune(program(), Config(), SIZES, seconds=0.5, watch=seen.append)
    opened = tunable(program(), config=Config(), sizes=SIZES)
    assert entry.problem == opened.problem and entry.choice in list(opened.space.choices())
    assert 0 < entry.measured.error <= entry.measured.bound and entry.measured.repetitions >= 3
    assert entry.measured.median > 0 and not entry.rejected
    assert [s.done for s in seen] == list(range(1, len(seen) + 1)) and seen[-1].done <= seen[-1].of
    assert "left" in words(seen[-1])


@pytest.mark.parametrize("how, why", [
    ("wrong", "exceeds"), *(pytest.param(how, why, marks=pytest.mark.slow) for how, why in (
        ("crash", "ended (7)"), ("memory", "MemoryError"), ("hang", "not done after")))])
def test_a_bad_candidate_costs_itself_only_and_is_recorded(how: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memcomp.tune.search.LIMIT", 40.0 if how == "hang" else 60.0)
    with Tuner(1, partial(Planted, how)) as tuner:
        entry = tuner.tune(program(), Config(), SIZES, seconds=0.5)
    model = tunable(program(), config=Config(), sizes=SIZES).modelled
    assert entry.choice == model, "the only right one"
    assert entry.rejected and all(why in r.why for r in entry.rejected), entry.rejected
    assert model not in [r.choice for r in entry.rejected]


def test_the_end_of_a_process_costs_the_candidate_that_it_worked_on() -> None:
    model = tunable(program(), config=Config(), sizes=SIZES).modelled
    with Tuner(1, partial(Quick, model)) as tuner:
        entry = tuner.tune(program(), Config(), SIZES, seconds=0.5)
    assert entry.choice == model and entry.rejected, "the only one that survives it"
    assert all("ended (7)" in r.why and r.choice != model for r in entry.rejected), entry.rejected


def test_candidates_are_ranked_and_all_of_them_are_asked_for_once() -> None:
    from memcomp.tune.search import _Order

    opened = tunable(program(), config=Config(), sizes=SIZES)
    few, many = ranked(opened, 1.0), ranked(opened, 1e9)
    assert ranked(opened, 1.0, [many[-1], Choice("nobody's")])[1] == many[-1], "a hint comes early"
    assert few[0] == many[0] == opened.modelled and set(few) <= set(many) == set(opened.space.choices())
    order, asked = _Order(many), []
    while (c := order.next()) is not None:
        asked.append(c)
        order.tell(c, 1e-3 * (1 + sum(c.knobs.values())) if len(asked) % 5 else float("inf"))
    assert sorted(map(str, asked)) == sorted(map(str, many))


def test_of_too_many_mappings_those_near_the_model_s_and_hints_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many knobs a hint is away, as long as it is a member."""
    opened = tunable(program(), config=Config(), sizes=SIZES)
    every, model = list(opened.space.mappings()), opened.modelled

    def away(c: Choice) -> int:
        return sum(c.knobs.get(n) != x for n, x in model.knobs.items()) if c.form == model.form else 99

    far = max(every, key=away)
    monkeypatch.setattr("memcomp.tune.search.MEMBERS", len(every) - 1)
    monkeypatch.setattr("memcomp.tune.space.Space.near", lambda self, choice: iter([choice]))  # it has few knobs
    assert away(far) and ranked(opened, 1e9) == [model]
    wrong = Choice(far.form, {n: 7 for n in far.knobs})
    assert wrong not in opened.space and far in opened.space
    assert ranked(opened, 1e9, [wrong, far, Choice("nobody's")]) == [model, far]


def test_noise_does_not_win_over_the_model() -> None:
    model, other = Choice("", {"k0": 1}), Choice("", {"k0": 2})
    assert winners({model: (1.05, 0.1, 9), other: (1.0, 0.2, 9)}, model)[0] == model
    assert winners({model: (1.50, 0.1, 9), other: (1.0, 0.2, 9)}, model)[0] == other
    assert winners({other: (1.0, 0.2, 9)}, model) == [other]


@pytest.mark.parametrize("bad", ["one", "all together"])
def test_of_a_race_that_does_not_end_only_those_are_blamed_that_do_not_end_alone(bad: str) -> None:
    from memcomp.tune.search import MODES, Search, Trial
    from memcomp.tune.tasks import Given
    from memcomp.workers import FAILED, OK, Answer

    opened = tunable(program(), config=Config(), sizes=SIZES)
    ways = list(opened.space.choices())[:5]
    search = Search(opened, MODES["quick"], Given("", (), ()), lambda state: None, begin=time.monotonic(), trials={
        c: Trial(c, OK, 1e-3 * (1 + n), error=0.1, bound=1.0) for n, c in enumerate(ways)})

    class Racing:
        place = ""

        def ask(self, job: Any, limit: float) -> Answer:
            _, racing, _ = job.given
            if ways[1] in racing if bad == "one" else len(racing) > 1:
                return Answer(FAILED, "not done after 30 s", lost=True)
            return Answer(OK, told={"rounds": 9, "medians": [1.0] * len(racing), "spreads": [0.0] * len(racing)})

    timed = search.race(Racing())  # type: ignore[arg-type]
    if bad == "one":
        assert ways[1] not in timed and ways[0] in timed and [r.choice for r in search.rejected] == [ways[1]]
        assert "in the race" in search.rejected[0].why
    else:
        assert not timed and not search.rejected


def test_equal_programs_of_other_sizes_are_tuned_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is named by where it was found.  Nothing of it runs, so no machine code is made."""
    from memcomp.cli import given
    from memcomp.cli.parser import parser

    (tmp_path / "layers.py").write_text(
        "import torch\n"
        "def attend(a, b, c):\n"
        "    f = torch.nn.functional.scaled_dot_product_attention\n"
        "    return f(a, a, a), f(b, b, b), f(c, c, c)\n"
        "def made():\n"
        "    return attend, tuple(torch.randn(1, 2, n, 16) for n in (100, 1000, 120))\n")
    args = parser().parse_args(["tune", f"{tmp_path / 'layers.py'}:made", *(
        x for name in "abc" for x in ("--dynamic", f"{name}.2=16:4096"))])
    forget()
    monkeypatch.setattr("memcomp.pipeline.build", lambda kernel, config: lambda *a: None)
    found = given.sourced(args)
    forget()
    assert len({p.digest for _, p, _ in found}) == 1 == len(given.programs(args))
    assert sorted(max(sizes.values()) for *_, sizes in found) == [120, 1000], "two of them are near enough"
    assert all("layers.py:4" in at for at, *_ in found)


@pytest.mark.usefixtures("one")
def test_a_tuned_program_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with `quick`: measured, kept, taken the next time; a cache that cannot keep it says so."""
    from memcomp.cache import CacheWarning

    calls: list[str] = []
    tune = Tuner.tune

    def counted(self: Tuner, *a: Any, **k: Any) -> Any:
        calls.append(k["mode"])
        return tune(self, *a, **k, seconds=0.5)

    monkeypatch.setattr(Tuner, "tune", counted)
    forget()
    first = compile_program(program(), config=Config(tune="quick", cache_dir=str(tmp_path)), sizes=SIZES)
    forget()
    again = compile_program(program(), config=Config(tune="quick", cache_dir=str(tmp_path)), sizes=SIZES)
    forget()
    cached = compile_program(program(), config=Config(cache_dir=str(tmp_path)), sizes=SIZES)
    assert calls == ["quick"] and first.choice == again.choice == cached.choice
    assert "by measurement" in cached.program.proofs[-1]
    monkeypatch.setattr("memcomp.cache.shipped", lambda: Store(tmp_path, False))
    monkeypatch.setattr("memcomp.workers.Worker.ask", lambda *_: pytest.fail("a process was asked to measure"))
    for mode, cache in (("quick", "on"), ("full", "read"), ("cached", "on")):  # what came with the package is known
        forget()
        config = Config(tune=mode, cache=cache, cache_dir=str(tmp_path / "of the user"))
        assert compile_program(program(), config=config, sizes=SIZES).choice == first.choice
    assert calls == ["quick"] and not (tmp_path / "of the user").exists(), "no measurement, nothing to keep"
    monkeypatch.undo()
    monkeypatch.setattr(Tuner, "tune", counted)
    forget()
    with pytest.warns(CacheWarning, match="not kept"):
        compile_program(program(), config=Config(tune="quick", cache="off"), sizes=SIZES)
    forget()


def test_the_command_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path))
    assert main(["tune", str(FILE), "--seconds", "0.5", "--workers", "1"]) == 0
    told = capsys.readouterr()
    assert told.out == "1 of 1 programs measured, the others were known\n"
    assert told.err.startswith("attention_3pass: ") and " ms +- " in told.err
    assert len(list(Store(tmp_path).entries())) == 1
    assert main(["tune", str(FILE), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["fresh"] is False and row["choice"]["knobs"]
    for wrong in (["--seconds", "0"], ["--workers", "-1"], ["--target", "nowhere"]):
        assert main(["tune", str(FILE), *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setenv("MEMCOMP_CACHE", "read")
    assert main(["tune", str(FILE)]) == 2 and "read only" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_found(tmp_path: Path) -> None:
    """Once a candidate has run; the entry that is kept is one of them."""
    env = {**os.environ, "MEMCOMP_CACHE": "on", "MEMCOMP_CACHE_DIR": str(tmp_path)}
    code = ("import sys, os, signal, threading; from memcomp.tune import search\n"
            "class S(search.Search):\n"
            "    def race(self, worker):\n"
            "        os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)\n"
            "search.Search = S\n"
            "from memcomp.__main__ import main\n"
            f"sys.exit(main(['tune', {str(FILE)!r}, '--seconds', '0.5', '--workers', '1']))\n")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (kept,) = Store(tmp_path).entries()
    assert kept.measured.repetitions == 1 and "attention_3pass" in done.stderr


def test_ctrl_c_before_anything_ran_ends_it(tmp_path: Path) -> None:
    env = {**os.environ, "MEMCOMP_CACHE": "on", "MEMCOMP_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-m", "memcomp", "tune", str(FILE), "--workers", "1"], env=env,
                               stderr=subprocess.PIPE, text=True)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, -2) and not list(Store(tmp_path).entries()), err


def test_a_wrong_mode_is_an_error() -> None:
    with Tuner(1) as tuner, pytest.raises(OptionError, match="quick"):
        tuner.tune(program(), Config(), SIZES, mode="fast")


def test_an_answer_that_nobody_waited_for_is_not_that_of_the_next_job() -> None:
    """Ctrl-C while a process works: what it says later is about a job that is forgotten."""
    from memcomp.workers import OK, Job, Worker

    worker = Worker(Slow)
    try:
        assert worker.ask(Job("a", (0.0,)), 60.0).why == "a"
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            worker.ask(Job("late", (1.5,)), 60.0)
        assert worker.ask(Job("b", (0.0,)), 60.0).why == "b"
        got: list[tuple[str, str]] = []
        threads = [threading.Thread(target=lambda n=n: got.append((n, worker.ask(Job(n, (0.1,)), 60.0).why)))
                   for n in "cdef"]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(a == b for a, b in got) and len(got) == 4, "several that ask wait for one another"
        threading.Timer(0.3, worker.stop).start()
        assert worker.ask(Job("stopped", (60.0,)), 100.0).state != OK
        if (child := os.fork()) == 0:  # the parent's process is not the child's to talk with, or to end
            same = worker._running is None
            try:
                same = worker.ask(Job("child", (0.0,)), 60.0).why == "child"
                worker._end()
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert worker.ask(Job("g", (0.0,)), 60.0).why == "g"
    finally:
        worker.close()


class Slow:
    """Says the name of a job, after as many seconds as it is given."""

    def answer(self, job: Any) -> Any:
        from memcomp.workers import OK, Answer

        time.sleep(job.given[0])
        return Answer(OK, job.do)


@pytest.mark.parametrize("make", [Quick, pytest.param(Tasks, marks=pytest.mark.slow)])
def test_ctrl_c_with_several_processes_rejects_nothing_that_was_stopped_by_it(make: Callable[[], Does]) -> None:
    with Tuner(2, make) as tuner:
        def watch(state: State) -> None:
            if state.done == 2:
                os.kill(os.getpid(), signal.SIGINT)

        entry = tuner.tune(program(), Config(), SIZES, seconds=60.0, watch=watch)
        assert INTERRUPTED in entry.measured.how and not entry.rejected
        after = tuner.tune(program(), Config(), SIZES, seconds=0.5)
        assert not after.rejected and INTERRUPTED not in after.measured.how


def test_a_registered_operator_is_known_to_the_processes(one: Tuner) -> None:
    """Whenever they began."""
    from memcomp.ir.expr import Call, Var
    from memcomp.ir.ops import PARAMETERS, Op
    from memcomp.ir.register import register

    x = Var(PARAMETERS[0])
    register(Op("tuned_twice", 1, float, definition=Call("add", (x, x))))
    text = FILE.read_text().replace("exp(QK[m, p] - GM[p])", "exp(tuned_twice(QK[m, p]) - tuned_twice(GM[p]))")
    entry = one.tune(parse(text), Config(), SIZES, seconds=0.5)
    assert not entry.rejected and entry.measured.median > 0


def test_without_optuna_the_cost_model_decides_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memcomp.cache import CacheWarning

    def missing(self: Tuner, *a: Any, **k: Any) -> Any:
        raise search.Missing("Optuna is not installed")

    monkeypatch.setattr(Tuner, "tune", missing)
    forget()
    with pytest.warns(CacheWarning, match="not tuned.*\n*.*Optuna"):
        made = compile_program(program(), config=Config(tune="quick", cache_dir=str(tmp_path)), sizes=SIZES)
    forget()
    assert made.choice == compile_program(program(), config=Config(tune="off"), sizes=SIZES).choice


@pytest.mark.parametrize("wrong, why", [
    (["--seconds", "inf"], "no time"), (["--seconds", "nan"], "no time"), (["--workers", "9999"], "processes"),
    (["--target", "h100"], "device")])
def test_what_cannot_be_measured_is_said_before_anything_is(wrong: list[str], why: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEMCOMP_CACHE", "on")
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("memcomp.tune.command.present", lambda device: device == "cpu")
    assert main(["tune", str(FILE), *wrong]) == 2
    assert why in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMCOMP_CACHE_DIR", str(tmp_path / "file"))
    assert main(["tune", str(FILE)]) == 2
    assert "cannot be written" in capsys.readouterr().err
