"""Legal programs at the limits of the language: they run and mean what `interpret` says, or are refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memcomp.__main__ import main
from memcomp.config import config
from memcomp.ir.errors import Refusal
from memcomp.ir.interpret import interpret
from memcomp.ir.parse import DEPTH
from memcomp.ir.text import parse
from memcomp.ir.verify import verify
from memcomp.pipeline import compile_program

HEAD = """program p
rank N = 6
rank M = 5
in X[N]: f32
in Y[N, M]: f32
in I[N]: i64
out O[N]: f32
"""
DEEP = DEPTH - 5


def chain(first: str, step: str, length: int, last: str) -> str:
    """Maps of which each reads the one before; `step` says what `{}` becomes."""
    return "\n".join([f"T0[n] = {first}", *(f"T{k + 1}[n] = " + step.format(f"T{k}[n]") for k in range(length)),
                      last.format(f"T{length}[n]")])


PROGRAMS = {
    "300 maps": chain("X[n]", "tanh({}) * 1.25", 300, "O[n] = {}"),
    "maps before a reduction": chain("X[n]", "tanh({}) * 1.25", 100, "O[n] = sum{{m}} {} * Y[n, m]"),
    "a sum": "O[n] = " + " + ".join(["X[n]"] * DEEP),
    "a reduced sum": "O[n] = sum{m} " + " + ".join(["Y[n, m]"] * DEEP),
    "choices": "O[n] = " + "".join(f"where(X[n] > {k}.0, {k}.0, " for k in range(60)) + "X[n]" + ")" * 60,
    "alternatives": "O[n] = X[n] where " + " or ".join(f"X[n] > {k}.5" for k in range(DEEP // 2)),
    "conditions": "O[n] = X[n] where " + " and ".join(f"X[n] != {k}.5" for k in range(DEEP // 2)),
    "conditions of a reduction": "O[n] = max{m} Y[n, m] where " + " and ".join(
        f"Y[n, m] != {k}.5" for k in range(DEEP // 2)),
    "an index": "O[n] = X[(" + " + ".join(["I[n]*2"] * (DEEP // 2)) + ") % 6]",
    "gathers": "O[n] = X[" + "I[" * 8 + "n" + "]" * 8 + "]",
    "no input": "O[n] = n * 0.5",
    "divisors that may be 0": "O[n] = I[n] // (I[n] - 2) + I[n] % (I[n] - 3)",
    "large integers": "O[n] = where(I[n]*1000000007*1000000007 // 1000000007 == I[n]*1000000007, X[n], 0.0)",
}


@pytest.mark.parametrize("backend", ["python", "tvm"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_its_meaning(name: str, backend: str) -> None:
    import torch

    from memcomp.binding import DTYPES, make_entry
    from memcomp.runtime import run

    program = parse(HEAD + PROGRAMS[name] + "\n")
    rng = np.random.default_rng(0)
    given = {"X": rng.normal(size=6).astype(np.float32), "Y": rng.normal(size=(6, 5)).astype(np.float32),
             "I": rng.integers(0, 6, 6)}
    compiled = compile_program(program, config=config({"backend": backend}))

    def kernel(*args: object) -> None:
        compiled.entry(*(a.numpy() if isinstance(a, torch.Tensor) and backend == "python" else a for a in args))

    entry = make_entry(name, program, compiled.tiles, kernel, (), [], None)
    out, = run(entry, [torch.from_numpy(x).to(DTYPES[t.dtype]) for t in program.cascade.inputs()
                       for x in [given[t.name]]], [])
    want = interpret(program, {t.name: given[t.name] for t in program.cascade.inputs()})["O"]
    np.testing.assert_allclose(out.numpy(), want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("command", ["show", "explain", "opt", "cost", "emit", "check"])
@pytest.mark.parametrize("name", ["300 maps", "conditions", "no input"])
def test_every_command_takes_it(name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "large.mc"
    file.write_text(HEAD + PROGRAMS[name] + "\n")
    assert main([command, str(file)]) == 0, capsys.readouterr().err


LIMITS = {  # what a program asks for -> what the error names
    "rank N = 1099511627776\nin X[N]: f32\nout O[]: f32\nO[] = sum{n} X[n]": "GiB",
    "rank N <= 4611686018427387904\nin X[N]: f32\nout O[]: f32\nO[] = sum{n} X[n]": "GiB",
    "rank N = 4\nin X[N]: f32\nout O[N]: f32\nO[n] = X[n] * 1e300 * 1e-300": "does not fit f32",
}


@pytest.mark.parametrize("text", LIMITS)
def test_what_does_not_fit_is_said(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "large.mc"
    file.write_text(f"program p\n{text}\n")
    assert main(["check", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and LIMITS[text] in err and "Traceback" not in err


def test_f64_holds_what_f32_does_not() -> None:
    text = "program p\nrank N = 4\nin X[N]: {0}\nout O[N]: {0}\nO[n] = X[n] * 1e300 * 1e-300\n"
    compile_program(parse(text.format("f64")), config=config({"backend": "python"}))
    with pytest.raises(Refusal):
        compile_program(parse(text.format("f32")), config=config({"backend": "python"}))


def test_reductions_keep_elements_apart_by_index_only() -> None:
    """Two maps may share an index under guards that exclude each other; a reduction writes its identity there."""
    head = "program p\nrank P = 4\nrank Q = 2\nrank M = 3\nin X[P, M]: f32\nout O[P]: f32\n"
    program = parse(head + "O[q] = sum{m} X[q, m] where m < 1\nO[q + 2] = sum{m} X[q + 2, m]\n")
    verify(program)
    x = np.arange(12.0).reshape(4, 3)
    assert interpret(program, {"X": x})["O"].tolist() == [0.0, 3.0, 21.0, 30.0]
    verify(parse(head + "O[p] = 1.0 where p < 2\nO[p] = 2.0 where p >= 2\n"))
