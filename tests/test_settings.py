"""Who writes a mapping's kernels, and how, are members of the space too: timed by a tuner, kept, validated, taken.

No GPU is needed: kernels are checked by the interpreters, and what they take is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memcomp.backends import ways
from memcomp.cache import CacheWarning, Choice, Entry, Measured, Store
from memcomp.codegen.triton.emit import settings_of
from memcomp.config import Config
from memcomp.ir.errors import OptionError
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.pipeline import Tunable, compile_program, forget, tunable
from memcomp.tune.search import Tuner, ranked
from memcomp.tune.tasks import Tasks, _Work
from memcomp.workers import OK, Answer, Here, Job, answered

GPU = Config(target="h100")
THERE = {"device": {"kind": "cuda", "name": "imagined"}, "code": "c0de", "versions": {}}


def case(name: str) -> Program:
    return parse((Path(__file__).parent / "cases" / f"{name}.mc").read_text())


def opened(name: str, config: Config = GPU) -> Tunable:
    p = case(name)
    return tunable(p, config=config, sizes={r.name: 64 for r in p.cascade.ranks if r.extent is None})


def test_each_member_is_written_as_it_says() -> None:
    """By the backend that it names, with the settings of its words; all texts of one mapping differ."""
    from memcomp.backends import emit
    from memcomp.stations import observers

    t = opened("attention_1pass")
    members = list(t.space.choices())
    assert len(set(members)) == len(members) and {c.backend for c in members} == {"", "cuda"}
    assert [c for c in members if not c.backend and not c.setting] == list(t.space.mappings())
    mapping = t.modelled
    texts = []
    for c in t.space.written(mapping):
        config = replace(GPU, backend=c.backend or "triton")
        _, kernel = emit(t.space.closed(c), config=config, observe=observers(config), setting=c.setting)
        texts.append(kernel.source)
        assert kernel.backend == config.backend
        if c.setting:
            launch, words = c.setting.removeprefix("launch ").split(": ")
            assert str(list(settings_of(kernel.source).values())[int(launch)]) == words
    assert len(set(texts)) == len(texts) > 2


def test_what_is_no_member_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    t = opened("cascade_2")
    own = t.modelled
    other = next(c.setting for c in t.space.choices() if c.setting)
    monkeypatch.setattr("memcomp.codegen.triton.emit", lambda *a, **k: pytest.fail("it was written"))
    for wrong in (replace(own, backend="gluon"), replace(own, backend="python"), replace(own, backend="../x"),
                  replace(own, setting=f"{other} "), replace(own, setting="launch 0: 64 warps, 3 stages"),
                  replace(own, backend="cuda", setting=other)):
        with pytest.raises(OptionError):
            t.compiled(wrong)


def test_one_backend_has_its_own_ways_only() -> None:
    assert {c.backend for c in opened("cascade_2", replace(GPU, backend="cuda")).space.choices()} == {""}
    assert list(ways(case("attention_1pass"), Config())) == [("", "")], "TVM alone, and without settings"


def test_likely_candidates_are_of_all_backends_and_settings() -> None:
    t = opened("attention_1pass")
    found = ranked(t, 1e9)
    assert set(found) == set(t.space.choices()) and len(found) == len(set(found)) and found[0] == t.modelled
    assert {replace(c, setting="") for c in found[:4]} != {found[0]}, "other mappings come before all ways of the first"


class Imagined(Tasks):
    """Candidates are checked by the interpreters; `best`, in words, is twice as fast as all others."""

    def __init__(self, best: str) -> None:
        super().__init__()
        self.best, self.timed = best, []  # type: ignore[var-annotated]

    def answer(self, job: Job) -> Answer:
        given, *rest = job.given
        if self._work is None:
            self._work = _Work(given)
            self._work.__dict__["_config"] = replace(GPU, interpret=True, tune="off")
        if job.do in ("time", "race"):
            self.timed.append(rest[0])
            return getattr(self, job.do)(rest[0])  # type: ignore[no-any-return]
        return answered(lambda: getattr(self._work, job.do)(*rest))

    def seconds(self, c: Choice) -> float:
        return 1e-3 if self.best in str(c) else 2e-3

    def time(self, c: Choice) -> Answer:
        return Answer(OK, told={"seconds": self.seconds(c)})

    def race(self, choices: Sequence[Choice]) -> Answer:
        return Answer(OK, told={"rounds": 9, "medians": [self.seconds(c) for c in choices],
                                "spreads": [0.1] * len(choices)})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_setting_that_is_faster_is_found_kept_and_taken(backend: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="Optuna is not installed")
    pytest.importorskip("triton", reason="Triton is not installed")
    p = case("cascade_2")
    sizes = {r.name: 64 for r in p.cascade.ranks if r.extent is None}
    best = backend if backend == "cuda" else next(c.setting for c in opened("cascade_2").space.choices() if c.setting)
    with Tuner([Here(lambda: Imagined(best))], there=THERE) as tuner:
        entry = tuner.tune(p, GPU, sizes, seconds=60.0)
    assert best in str(entry.choice) and entry.measured.median == 1e-3 and not entry.rejected
    assert entry.choice in list(opened("cascade_2").space.choices())
    Store(tmp_path).put(entry)
    (read,) = Store(tmp_path).entries()
    assert read == replace(entry, origins=read.origins)
    made = taken(p, sizes, tmp_path, monkeypatch)
    assert made.choice == entry.choice and made.kernel.backend == backend
    if backend == "triton":
        assert str(settings_of(made.kernel.source).popitem()[1]) in best


def test_an_entry_of_a_setting_that_is_none_is_a_miss_that_is_told(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    p, t = case("cascade_2"), opened("cascade_2")
    for wrong in ({"setting": "launch 0: 7 warps, 3 stages"}, {"backend": "gluon"}):
        e = Entry(t.problem, THERE, replace(t.modelled, **wrong), Measured(1e-3, 0.1, 9, 0.5, 1.0))
        Store(tmp_path).put(e)
        with pytest.warns(CacheWarning, match="is not used"):
            made = taken(p, {r.name: 64 for r in p.cascade.ranks if r.extent is None}, tmp_path, monkeypatch)
        assert made.choice == t.modelled


def taken(p: Program, sizes: dict[str, int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, compiled for a machine that a cache in `folder` was measured on."""
    monkeypatch.setattr("memcomp.forms.environment", lambda device: THERE)
    monkeypatch.setattr("memcomp.forms.present", lambda device: True)
    forget()
    return compile_program(p, config=replace(GPU, cache_dir=str(folder)), sizes=sizes)
