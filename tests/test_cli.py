"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memcomp.__main__ import main

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


@pytest.mark.parametrize("command", ["explain", "opt", "cost", "emit"])
def test_every_command_takes_a_program(capsys: pytest.CaptureFixture[str], program: str, command: str) -> None:
    code, text, err = run(capsys, command, program)
    assert code == 0 and text.strip(), err
    code, text, _ = run(capsys, command, program, "--json")
    assert code == 0
    json.loads(text)


@pytest.mark.parametrize("command", ["show", "explain", "opt", "cost", "emit", "check"])
def test_every_command_takes_a_function(capsys: pytest.CaptureFixture[str], factory: str, command: str) -> None:
    code, text, err = run(capsys, command, f"{factory}:attend")
    assert code == 0 and text.strip(), err


def test_check_of_a_program(capsys: pytest.CaptureFixture[str], program: str) -> None:
    code, text, _ = run(capsys, "check", program, "--json")
    assert code == 0 and json.loads(text)["ok"]


def test_opt_dumps_after_a_station(capsys: pytest.CaptureFixture[str], program: str) -> None:
    code, text, err = run(capsys, "opt", program, "--dump-after", "canonicalize")
    assert code == 0 and err.startswith("# after canonicalize\nprogram") and "# after fuse" not in err


def test_an_exported_program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    file = tmp_path / "attend.pt2"
    torch.export.save(torch.export.export(Attend(), attend()[1]), file)
    code, text, err = run(capsys, "show", str(file))
    assert code == 0 and text.startswith("program"), err


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "targets", "--json")
    assert code == 0 and {"cpu", "h100"} <= {t["name"] for t in json.loads(text)}
    code, text, _ = run(capsys, "models", "--json")
    assert code == 0
    for row in json.loads(text):
        assert row["what it is"], row


@pytest.mark.parametrize("argv", [
    ["show", "missing.mc"], ["show", "no_such_module:f"], ["show", "users_code:missing"], ["show", "users_code:wrong"],
    ["show", "users_code:plain"], ["show", "bad.mc"], ["show", "bad.pt2"], ["show", "bad.json"], ["show", "bad.txt"],
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

    monkeypatch.setattr("memcomp.__main__.read", fail)
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

    monkeypatch.setattr("memcomp.__main__.read", interrupted)
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
