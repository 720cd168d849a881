"""`memcomp bench --device cuda`: rehearsed on this machine, with everything but the GPU; what is wrong is noticed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

from memcomp.__main__ import main  # noqa: E402
from memcomp.bench.cuda import Gpu, copies, target_of  # noqa: E402
from memcomp.bench.gpu import Plan, behind, chosen, entries, run, summary, times  # noqa: E402
from memcomp.bench.tasks import OWN, Tasks, apart, compared, parts  # noqa: E402
from memcomp.cache import Store  # noqa: E402
from memcomp.ir.errors import OptionError  # noqa: E402
from memcomp.models.bench import cases  # noqa: E402
from memcomp.models.bench.operators import listed  # noqa: E402
from memcomp.workers import FAILED, OK, REFUSED, WRONG, Answer, Here, Job, Worker, spread  # noqa: E402

SMALL = tuple(listed(small=True))
# of those that differ in nothing but sizes, one
DISTINCT = tuple(c for c in SMALL if " D " not in c.name.replace(" D 128", "") and "16k" not in c.name
                 and ("/8" not in c.name or "batch 8" in c.name) and (" group " not in c.name or "group 3" in c.name))


# -- cases and their errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DISTINCT, ids=lambda c: c.name)
def test_parts_of_a_case_are_computed_alone(case: Any) -> None:
    """What a part of the arguments gives is that part of the result: the error of a sample is one of the whole."""
    args = tuple(t.double() if t.is_floating_point() else t for t in case.inputs())
    seen = 0
    for given, there in parts(case, args, case.fn(*args)):
        torch.testing.assert_close(case.fn(*given), there)
        seen += there.numel()
    assert seen


@pytest.mark.parametrize("case", DISTINCT, ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_compute_what_the_case_does(case: Any) -> None:
    """Without compiling them; those of torch's kernels that this machine has."""
    args = case.inputs()
    ran = []
    with torch.inference_mode():
        for name, rival in case.rivals.items():
            if name in ("SDPA cuDNN", "Triton, plain"):
                continue  # the second one: below, in a process that interprets
            error, bound, _ = compared(case, args, rival.made(*args)(*args))
            assert error.rms < 2 * bound.rms and error.max < 2 * bound.max, (name, error, bound)
            ran.append(name)
    assert ran


def test_small_and_full_cases_are_the_same_ones() -> None:
    full = cases("cuda")
    assert [c.name for c in full] == [c.name for c in SMALL] and len({c.name for c in full}) == len(full)
    for a, b in zip(full, SMALL, strict=True):
        with torch.device("meta"):
            args = a.inputs()
        assert [t.dim() for t in args] == [t.dim() for t in b.inputs()] and set(a.rivals) == set(b.rivals)
        assert len(a.alone[0]) == len(args) + 1 and a.flops > b.flops > 0


def test_an_error_is_seen_wherever_it_is() -> None:
    case = next(c for c in SMALL if c.name == "decode 64/8 batch 8 keys 8192")
    args = case.inputs()
    right = case.fn(*args)
    error, bound, eager = compared(case, args, right)
    assert bound.admits(error) and error == eager and error.rms > 0
    for at in ((0, 0), (-1, -1)):  # the first and the last of all parts are among those that are compared
        wrong = right.clone()
        wrong[at] += 0.5
        assert not bound.admits(compared(case, args, wrong)[0])
    empty = right.clone()
    empty[1, 3, 0, 5] = math.nan  # whether it is compared or not
    assert compared(case, args, empty)[0].rms == math.inf


# -- jobs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [None, 0.0, 1.0])
def test_a_wrong_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch, fill: float | None) -> None:
    """One that writes nothing (what was in memory before may be right), one that writes zeros, one that writes ones."""

    def build(kernel: Any, config: Any) -> Any:
        outs = [n for n, p in enumerate(kernel.program.params) if p.role == "out"]

        def write(*given: Any) -> None:
            for n in outs:
                if fill is not None:
                    given[n].fill_(fill)

        return write

    monkeypatch.setattr("memcomp.pipeline.build", build)
    for kept in ("pipeline._READ", "pipeline._BUILT", "runtime._ENTRIES"):  # no other test is to find these kernels
        monkeypatch.setattr(f"memcomp.{kept}", {})
    found = run(Plan(chosen(["decode_gqa"], True), rehearse=True, forms=(OWN + "triton",), apart=False),
                lambda text: None)
    kept = found.data["cases"]["decode_gqa"]["forms"][OWN + "triton"]
    assert kept["state"] == WRONG and len(found.faults) == 1 and "time" not in kept


def test_what_is_refused_or_fails_says_why() -> None:
    tasks = Tasks(True)
    assert tasks.answer(Job("check", ("no such case", OWN + "triton"))).state == FAILED
    assert "KeyError" in tasks.answer(Job("check", ("no such case", OWN + "triton"))).why
    answer = tasks.answer(Job("check", ("decode_gqa", "SDPA cuDNN")))
    assert answer.state == FAILED and "backend" in answer.why  # it is for a GPU


class Deadly:
    """Ends, or stops, the process that unpacks it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return (os._exit, (3,)) if self.how == "dies" else (time.sleep, (60.0,))


@pytest.mark.parametrize(("how", "why"), [("dies", "ended (3)"), ("stops", "not done")])
def test_a_job_that_takes_its_process_along_costs_nothing_else(how: str, why: str, monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    worker = Worker(partial(Tasks, True))
    monkeypatch.setattr("memcomp.workers.START", 0.0)
    try:
        answer = worker.ask(Job("facts", (Deadly(how),)), 1.0 if how == "stops" else 60.0)
        assert answer.state == FAILED and answer.lost and why in answer.why
        assert worker.ask(Job("facts"), 60.0).state == OK
    finally:
        worker.close()


def test_jobs_are_spread_and_those_without_time_are_told() -> None:
    class Counts:
        def ask(self, job: Job, limit: float) -> Answer:
            return Answer(OK)

        def close(self) -> None:
            pass

    jobs, seen = [Job("facts", (str(n),)) for n in range(20)], []
    many = [Counts() for _ in range(3)]
    assert not spread(many, jobs, lambda: 1.0, time.monotonic() + 60, lambda j, a: seen.append(j))
    assert sorted(map(str, seen)) == sorted(map(str, jobs))
    assert spread(many, jobs, lambda: 1.0, time.monotonic() - 1, lambda j, a: None) == jobs

    def fails(job: Job, answer: Answer) -> None:
        raise ValueError("the record cannot be written")

    with pytest.raises(ValueError, match="written"):
        spread(many, jobs, lambda: 1.0, time.monotonic() + 60, fails)


class Device:
    """What `Gpu` asks of torch.cuda, written down; `captured`: work in a graph is kept and not done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
        self.done, self.now, self.kept, self.captured = 0, 0.0, 0, False
        device = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self) -> None:
                device.done += device.kept
                device.now += device.kept * 1e-4

        class graph(contextlib.AbstractContextManager[None]):
            def __init__(self, graph: Any) -> None:
                assert isinstance(graph, Graph)

            def __enter__(self) -> None:
                device.captured = True

            def __exit__(self, *error: Any) -> None:
                device.captured = False
                if refuses:
                    raise RuntimeError("operation not permitted when stream is capturing\nand more")

        for name, x in {"is_available": lambda: True, "Stream": Stream, "current_stream": Stream, "Event": Event,
                        "stream": contextlib.nullcontext, "CUDAGraph": Graph, "graph": graph,
                        "synchronize": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, x)

    def work(self) -> None:
        """A kernel of a tenth of a millisecond."""
        if self.captured:
            self.kept += 1
        else:
            self.done += 1
            self.now += 1e-4


@pytest.mark.parametrize("refuses", [False, True])
def test_what_is_timed_is_a_graph_of_all_buffers_in_turn(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, refuses)
    machine = Gpu()
    loop = machine.loop([device.work, device.work])
    assert loop.calls == 2 * 5  # so many of 0.2 ms are a millisecond
    assert loop.why == ("RuntimeError: operation not permitted when stream is capturing" if refuses else "")
    before = device.done
    assert math.isclose(machine.clock(loop.run), loop.calls * 1e-4) and device.done - before == loop.calls


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_a_rehearsal_leaves_a_whole_record(tmp_path: Path) -> None:
    """Two cases, checked and timed, the cache's entries read back as they were measured."""
    out, said = tmp_path / "found.json", []
    plan = Plan(chosen(["decode_gqa", "sigmoid D 64"], True), 300.0, True, output=out, tuned=tmp_path / "tuned",
                forms=("SDPA flash", OWN + "triton"), apart=False)
    found = run(plan, said.append)
    stored = json.loads(out.read_text())
    assert stored["rehearsal"] and stored["device"]["name"] == "rehearsal" and stored["target"] == "h100"
    assert not found.faults and not stored["left"] and stored["cases"].keys() == {"decode_gqa", "sigmoid D 64"}
    assert stored["peaks"]["operation"]["median"] > 0 and stored["peaks"]["byte"]["median"] > 0
    for name, kept in stored["cases"].items():
        assert kept["ready"] == OK and kept["sets"] > 1
        for form, x in kept["forms"].items():
            assert x["state"] == OK and 0 < x["rms"] <= x["bound_rms"] and x["time"]["median"] > 0, (name, form)
    assert set(stored["cases"]["decode_gqa"]["forms"]) == {OWN + "triton", "SDPA flash"}
    store = Store(tmp_path / "tuned", False)
    written = [e for kept in stored["cases"].values() for e in entries(kept, stored["environment"])]
    assert len(written) == 2
    for one in written:
        back = store.get(one.problem, one.environment)
        assert back is not None and back.choice == one.choice and back.choice.backend == "", "the target's own"
        assert back.measured == one.measured
    # what is asked for where no backend is named
    open_ = Tasks(True).answer(Job("check", ("decode_gqa", OWN))).told["own"][0]["problem"]
    assert store.get(open_, stored["environment"]) is not None and open_["backend"] == ""
    assert any("decode_gqa" in line for line in summary(stored)) and any("checks: 3 ok" in line for line in said)
    assert all(line.startswith("rehearsal ") for line in said)


def test_words_limit_everything(tmp_path: Path) -> None:
    """Operators, the programs of a folder of tests, families; and the tests of whole models are not for one of them."""
    tests = Path(__file__).parent
    assert {c.name for c in chosen(["decode_gqa"], True, tests)} == {"decode_gqa"}
    assert chosen(["paged_decode"], True, tests) == ()
    with pytest.raises(OptionError, match="no case is named like 'nothing'"):
        chosen(["nothing"], True, tests)
    plan = Plan((), 60.0, True, tests, forms=(OWN + "triton",), apart=False, words=("layer_norm",))
    found = run(plan, lambda text: None)
    assert found.data["checks"].keys() == {"program layer_norm"} and not found.data["tests"] and not found.faults


def test_nothing_of_a_rehearsal_is_kept_as_a_device_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(Store, "put", lambda self, entry: kept.append(entry))
    found = run(Plan(chosen(["decode_gqa"], True), rehearse=True, forms=("SDPA flash",), apart=False), lambda t: None)
    assert found.path is None and not kept


def test_what_had_no_memory_beside_others_is_asked_again_alone() -> None:
    class Crowded:
        asked = 0

        def ask(self, job: Job, limit: float) -> Answer:
            if job.do in ("facts", "peaks"):
                return Here(partial(Tasks, True)).ask(job, limit)
            Crowded.asked += 1
            return Answer(FAILED, "OutOfMemoryError: CUDA out of memory") if Crowded.asked < 3 else Answer(
                REFUSED, "not for this one")

        def close(self) -> None:
            pass

    plan = Plan(chosen(["decode_gqa"], True), rehearse=True, forms=("SDPA",), apart=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("memcomp.bench.gpu.Here", lambda make: Crowded())
        found = run(plan, lambda text: None)
    forms = found.data["cases"]["decode_gqa"]["forms"]
    assert Crowded.asked == 4 and {x["state"] for x in forms.values()} == {REFUSED} and len(forms) == 2


def test_what_is_behind_is_said() -> None:
    def form(median: float, rms: float) -> dict[str, Any]:
        return {"state": OK, "rms": rms, "time": {"median": median, "least": median, "spread": 0.0}}

    kept = {"forms": {OWN + "triton": form(2.0, 1e-3), OWN + "cuda": form(3.0, 1e-3), "FlexAttention": form(1.0, 1e-4),
                      "SDPA flash": form(4.0, 1e-3), "Inductor": {"state": FAILED}}}
    assert behind(kept) == ["memcomp triton is 0.50x FlexAttention",
                            "memcomp triton errs 10.00 times as much as FlexAttention"]
    assert set(times(kept)) == {OWN + "triton", OWN + "cuda", "FlexAttention", "SDPA flash"}


def test_the_target_of_a_device() -> None:
    for capability, gib, name in ((90, 80, "h100"), (90, 140, "h200"), (80, 40, "a100"), (89, 24, "rtx4090"),
                                  (100, 180, "b200")):
        assert target_of({"name": "", "capability": capability, "memory": gib << 30}) == name
    with pytest.raises(OptionError, match="8.6"):
        target_of({"name": "", "capability": 86, "memory": 24 << 30})
    assert copies(1 << 20, 50 << 20) == 32 and copies(1 << 30, 50 << 20) == 1 and copies(60 << 20, 50 << 20) == 2


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda", "--list", "decode group"]) == 0
    assert capsys.readouterr().out.splitlines() == [c.name for c in cases("cuda") if "decode group" in c.name]
    assert main(["bench", "--device", "cuda", "no such case"]) == 2 and "--list" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "--device", "cuda", "decode_gqa"]) == 2 and "no GPU" in capsys.readouterr().err


def test_neither_tvm_nor_rich_is_needed() -> None:
    code = """
import sys
for name in ("tvm", "tvm_ffi", "rich", "transformers", "gguf"):
    sys.modules[name] = None
from memcomp.__main__ import main
from memcomp.bench.tasks import Job, Tasks
import memcomp.bench.gpu
assert main(["bench", "--device", "cuda", "--list"]) == 0
tasks = Tasks(True)
for job in (Job("facts"), Job("check", ("decode_gqa", "SDPA flash"))):
    answer = tasks.answer(job)
    assert answer.state == "ok", answer
print(tasks.answer(Job("facts")).told["backends"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert "triton" in done.stdout and "tvm" not in done.stdout


def test_a_process_answers_as_this_one_does_and_interprets_plain_triton() -> None:
    job = Job("check", ("decode_gqa", "SDPA flash"))
    there = Worker(partial(apart, True))
    try:
        a, b = Here(partial(Tasks, True)).ask(job, 60.0), there.ask(job, 60.0)
        plain = [there.ask(Job("check", (name, "Triton, plain")), 60.0) for name in ("prefill_global", "prefill_gqa")]
    finally:
        there.close()
    assert a.state == b.state == OK and dict(a.told) == dict(b.told)
    assert [x.state for x in plain] == [OK, OK], plain
