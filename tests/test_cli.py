"""The command line: inputs that are none, outputs that cannot be written.  What each option prints is in
test_cli_options."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memcomp.__main__ import main
from memcomp.backends import backends
from memcomp.cli.out import dumped
from memcomp.inputs import workloads
from memcomp.ir.target import target as machine
from memcomp.ir.target import targets

PROGRAM = """program weigh on cpu
rank P <= 64
rank M
rank E = 8
in W[P, M]: f32
in V[M, E]: f32
out O[P, E]: f32
GM[p] = max{m} W[p, m]
SN[p, m] = exp(W[p, m] - GM[p])
SD[p] = sum{m} SN[p, m]
O[p, e] = sum{m} SN[p, m] / SD[p] * V[m, e]
"""


def attend() -> tuple[object, tuple[Tensor, ...]]:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return fn, tuple(torch.randn(1, 2, 24, 16) for _ in range(3))


def plain() -> tuple[object, tuple[Tensor, ...]]:
    return (lambda x: x + 1), (torch.ones(3),)


def wrong() -> int:
    return 3


def broken() -> None:
    raise ValueError("no weights here")


def needy(x: int) -> int:
    return x


def mismatched() -> tuple[object, tuple[Tensor, ...]]:
    return torch.matmul, (torch.ones(3, 4), torch.ones(3, 4))


def too_few() -> tuple[object, tuple[Tensor, ...]]:
    return torch.nn.Linear(3, 3), ()


@pytest.fixture
def program(tmp_path: Path) -> str:
    file = tmp_path / "weigh.mc"
    file.write_text(PROGRAM)
    return str(file)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_code.py").write_text(Path(__file__).read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    return "users_code"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_show_round_trips(capsys: pytest.CaptureFixture[str], program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text, _ = run(capsys, "show", program)
    assert code == 0 and text.startswith("program weigh")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert run(capsys, "show", "-") == (0, text, "")


@pytest.mark.parametrize("command", ["emit", "check"])
def test_a_command_takes_a_function(capsys: pytest.CaptureFixture[str], factory: str, command: str) -> None:
    code, text, err = run(capsys, command, f"{factory}:attend")
    assert code == 0 and text.strip(), err


@pytest.mark.parametrize("argv", [
    ["show", "missing.mc"], ["show", "no_such_module:f"], ["show", "users_code:missing"], ["show", "users_code:wrong"],
    ["show", "users_code:plain"], ["show", "bad.mc"], ["show", "bad.pt2"], ["show", "bad.json"], ["show", "bad.txt"],
    ["show", "users_code:broken"], ["show", "users_code:needy"], ["show", "half_written:f"],
    ["show", "users_code:mismatched"], ["explain", "users_code:too_few"], ["check", "users_code:mismatched"],
    ["show", "deep.mc"], ["show", "binary.mc"], ["show", "x" * 5000], ["show", "users_code:PROGRAM"], ["show", ":f"],
    ["show", "no module:f"], ["cost", "weigh.mc", "--size", "M=" + "9" * 30], ["cost", "weigh.mc", "--size", "M=²"],
    ["opt", "weigh.mc", "--dump-after", "nowhere"], ["cost", "weigh.mc", "--size", "M"],
    ["cost", "weigh.mc", "--size", "Z=3"], ["emit", "weigh.mc", "--target", "z80"],
    ["emit", "weigh.mc", "--backend", "fortran"], ["show", "weigh.mc", "-o", "no/such/folder/x.mc"],
])
def test_bad_input_is_an_error_and_two(capsys: pytest.CaptureFixture[str], tmp_path: Path, factory: str, program: str,
                                       monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bad.mc", "bad.pt2", "bad.json", "bad.txt"):
        Path(name).write_text("{")
    Path("half_written.py").write_text("def f(:")
    deep = "(" * 9999 + "X[n]" + ")" * 9999
    Path("deep.mc").write_text(f"program p\nrank N = 4\nin X[N]: f32\nout O[N]: f32\nO[n] = {deep}")
    Path("binary.mc").write_bytes(b"\xff\xfe")
    before = sorted(tmp_path.rglob("*.mc"))
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err
    assert sorted(tmp_path.rglob("*.mc")) == before


@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError()])
def test_a_machine_that_is_too_small_is_an_error(capsys: pytest.CaptureFixture[str], program: str, error: Exception,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("memcomp.cli.given.read", fail)
    code, out, err = run(capsys, "show", program)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 3


def test_a_byte_order_mark_is_no_part_of_the_text(capsys: pytest.CaptureFixture[str], program: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(program).read_text()
    plain = run(capsys, "show", program)
    Path(program).write_text(text, encoding="utf-8-sig")
    assert run(capsys, "show", program) == plain
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + text))
    assert run(capsys, "show", "-") == plain


def test_stdin_that_is_no_text_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    code, out, err = run(capsys, "show", "-")
    assert (code, out) == (2, "") and err.startswith("error: cannot read -")


def test_an_interrupted_command_is_one_line(capsys: pytest.CaptureFixture[str], program: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memcomp.cli.given.read", interrupted)
    code, out, err = run(capsys, "show", program, "-o", str(tmp_path / "out.mc"))
    assert (code, out) == (130, "") and err.startswith("interrupted") and err.count("\n") == 1
    assert not (tmp_path / "out.mc").exists()


def test_output_that_cannot_be_put_in_place_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                           program: str) -> None:
    (tmp_path / "taken.mc").mkdir()
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, "show", program, "-o", str(tmp_path / "taken.mc"))
    assert (code, out) == (2, "") and err.startswith("error: cannot write") and sorted(tmp_path.iterdir()) == before


def test_output_is_whole_or_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, program: str) -> None:
    target = tmp_path / "out.mc"
    assert run(capsys, "show", program, "-o", str(target))[:2] == (0, "")
    assert target.read_text().startswith("program weigh")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_output_goes_where_the_path_leads(capsys: pytest.CaptureFixture[str], tmp_path: Path, program: str) -> None:
    """A link stays a link, a pipe a pipe; who may read a file is not changed."""
    text = run(capsys, "show", program)[1]
    kept, link, pipe, new = (tmp_path / n for n in ("kept.mc", "link.mc", "pipe", "new.mc"))
    kept.write_text("old")
    kept.chmod(0o640)
    link.symlink_to(kept)
    assert run(capsys, "show", program, "-o", str(link))[:2] == (0, "")
    assert link.is_symlink() and kept.read_text() == text and kept.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run(capsys, "show", program, "-o", str(pipe))[:2] == (0, "")
        assert pipe.is_fifo() and os.read(reader, 1 << 16).decode() == text
    finally:
        os.close(reader)
    assert run(capsys, "show", program, "-o", str(new))[:2] == (0, "")
    (tmp_path / "plain").touch()
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("place", ["folder", "no/such/x.json"])
def test_a_place_that_cannot_be_written_is_found_before_any_work(
        capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    monkeypatch.setattr("memcomp.bench.measure", lambda *a, **k: pytest.fail("it was measured"))
    monkeypatch.setattr("memcomp.cli.given.read", lambda *a: pytest.fail("it was read"))
    for argv in (["bench", "-o", place], ["explain", "x.mc", "--html", place]):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and err.startswith(f"error: cannot write {place}")


@pytest.mark.parametrize("target", [n for n in targets() if machine(n).backend not in backends()])
def test_a_machine_without_kernels_can_be_shown_and_costed(capsys: pytest.CaptureFixture[str], factory: str,
                                                           target: str) -> None:
    shown = run(capsys, "show", f"{factory}:attend")
    assert run(capsys, "show", f"{factory}:attend", "--target", target) == shown
    code, text, err = run(capsys, "cost", f"{factory}:attend", "--target", target)
    assert (code, err) == (0, "") and "time" in text
    code, text, err = run(capsys, "emit", f"{factory}:attend", "--target", target)
    assert (code, text) == (2, "") and err.startswith("error: unknown backend")


def test_json_is_json_whatever_the_numbers_are() -> None:
    """Every reader takes what is printed: there is no NaN in JSON, nor Infinity."""
    inf, nan = float("inf"), float("nan")
    text = dumped({"rows": [{"least": nan, "most": (inf, -inf, 1.5)}], "n": 3, "ok": True})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "rows": [{"least": None, "most": [None, None, 1.5]}], "n": 3, "ok": True}


def test_a_fault_of_the_users_is_three_lines(tmp_path: Path) -> None:
    """What torch tells at length of a wrong shape is not among them."""
    (tmp_path / "wrong.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(64, 8)\n")
    line = [sys.executable, "-m", "memcomp", "check", "wrong.py:make", "--input", "input=f32[2,S,65]"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be multiplied" in done.stderr and done.stderr.count("\n") <= 3, done.stderr


def test_every_workload_says_what_it_is() -> None:
    rows = workloads()
    assert rows and all(what for _, what in rows), rows
