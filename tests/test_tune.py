"""Tuning: the fastest right way wins and is kept; a wrong, crashing, hanging or greedy one costs itself only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memcomp.__main__ import main
from memcomp.cache import Choice, Store
from memcomp.config import Config
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.pipeline import compile_program, forget, tunable
from memcomp.tune.progress import words
from memcomp.tune.search import State, Tuner, ranked, winners
from tests.planted import Planted

pytest.importorskip("optuna", reason="Optuna is not installed")
FILE = Path(__file__).parent / "cases" / "attention_3pass.mc"
SIZES = {"P": 64, "M": 100}


def program() -> Program:
    return parse(FILE.read_text())


def test_what_wins_is_a_member_that_was_compared_with_float64() -> None:
    seen: list[State] = []
    with Tuner(1) as tuner:
        entry = tuner.tune(program(), Config(), SIZES, seconds=0.5, watch=seen.append)
    opened = tunable(program(), config=Config(), sizes=SIZES)
    assert entry.problem == opened.problem and entry.choice in list(opened.space.choices())
    assert 0 < entry.measured.error <= entry.measured.bound and entry.measured.repetitions >= 3
    assert entry.measured.median > 0 and not entry.rejected
    assert [s.done for s in seen] == list(range(1, len(seen) + 1)) and seen[-1].done <= seen[-1].of
    assert "left" in words(seen[-1])


@pytest.mark.parametrize("how, why", [
    ("wrong", "exceeds"), ("crash", "ended (7)"), pytest.param("memory", "MemoryError", marks=pytest.mark.slow),
    pytest.param("hang", "not done after", marks=pytest.mark.slow)])
def test_a_bad_candidate_costs_itself_only_and_is_recorded(how: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memcomp.tune.search.LIMIT", 15.0 if how == "hang" else 60.0)
    with Tuner(1, partial(Planted, how)) as tuner:
        entry = tuner.tune(program(), Config(), SIZES, seconds=0.5)
    model = tunable(program(), config=Config(), sizes=SIZES).modelled
    assert entry.choice == model, "the only right one"
    assert entry.rejected and all(why in r.why for r in entry.rejected), entry.rejected
    assert model not in [r.choice for r in entry.rejected]


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


def test_noise_does_not_win_over_the_model() -> None:
    model, other = Choice("", {"k0": 1}), Choice("", {"k0": 2})
    assert winners({model: (1.05, 0.1, 9), other: (1.0, 0.2, 9)}, model)[0] == model
    assert winners({model: (1.50, 0.1, 9), other: (1.0, 0.2, 9)}, model)[0] == other
    assert winners({other: (1.0, 0.2, 9)}, model) == [other]


def test_a_tuned_program_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with `quick`: measured, kept, taken the next time; a cache that cannot keep it says so."""
    from memcomp.cache import CacheWarning
    from memcomp.tune import search

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
    forget()
    with pytest.warns(CacheWarning, match="not kept"):
        compile_program(program(), config=Config(tune="quick", cache="off"), sizes=SIZES)
    forget()
    search.tuner().close()


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
