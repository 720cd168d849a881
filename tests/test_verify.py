"""verify: what is well formed passes, and every bad program has its exact message (cases/bad/*.txt)."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Reduce, Tensor
from memcomp.ir.errors import MemcompError, ParseError, VerifyError
from memcomp.ir.expr import Access, Call, Const, Var, call, walk
from memcomp.ir.flow import loops
from memcomp.ir.interpret import interpret
from memcomp.ir.ops import OPS
from memcomp.ir.program import Group, Mapping, Program
from memcomp.ir.text import parse
from memcomp.ir.verify import verify
from tests.programs import programs
from tests.references import CASES as REFERENCES

FOLDER = Path(__file__).parent / "cases"
BAD = sorted((FOLDER / "bad").glob("*.mc"))
CASES = [parse(f.read_text()) for f in sorted(FOLDER.glob("*.mc"))]
cases = pytest.mark.parametrize("program", CASES, ids=[p.name for p in CASES])


def said(error: Exception) -> str:
    """The message, with the list of operators (which users may extend) left out."""
    return str(error).replace(", ".join(sorted(OPS)), "<operators>")


@pytest.mark.parametrize("file", BAD, ids=[f.stem for f in BAD])
def test_bad_programs_say_what_is_wrong(file: Path) -> None:
    with pytest.raises((ParseError, VerifyError)) as caught:
        verify(parse(file.read_text()))
    assert said(caught.value) + "\n" == file.with_suffix(".txt").read_text()
    assert (caught.type is ParseError) == file.stem.startswith("text_")


@pytest.mark.parametrize("file", BAD, ids=[f.stem for f in BAD])
def test_messages_have_three_parts(file: Path) -> None:
    """What is wrong, the line with carets under something in it, a hint."""
    what, *where, hint = file.with_suffix(".txt").read_text().splitlines()
    assert what and hint.startswith("hint: ") and len(hint) > len("hint: ")
    if file.stem != "text_nothing":
        line, carets = where
        at, width = carets.index("^"), carets.count("^")
        assert carets.rstrip().endswith("^" * width) and at + width <= max(len(line), at + 1)


def test_every_message_is_of_some_program() -> None:
    assert {f.stem for f in BAD} == {f.stem for f in (FOLDER / "bad").glob("*.txt")}


@cases
def test_cases_are_well_formed(program: Program) -> None:
    verify(program)


@settings(deadline=None, max_examples=40)
@given(programs())
def test_random_programs_are_well_formed(program: Program) -> None:
    verify(program)


# -- what breaks a good program is seen -------------------------------------------------------------------------------


def changed(p: Program, einsums: list[Einsum]) -> Program:
    return replace(p, cascade=replace(p.cascade, einsums=tuple(einsums)), mapping=Mapping())


@cases
def test_a_missing_statement_is_seen(program: Program) -> None:
    """Every tensor of the cases is needed; one with two statements that are no loop may be half written."""
    c = program.cascade
    for i, s in enumerate(c.einsums):
        rest = [t for t in c.einsums if t is not s]
        if len(c.writers(s.out.tensor)) > 1 and not any(isinstance(x, Const) for x in s.out.index):
            continue
        with pytest.raises(VerifyError):
            verify(changed(program, rest))
        assert c.einsums[i] is s


@cases
def test_the_wrong_order_is_seen(program: Program) -> None:
    """Swapping two neighbours, one of which reads the very element that the other writes."""
    es = list(program.cascade.einsums)
    with pytest.raises(VerifyError):
        verify(changed(program, es[::-1]))
    for i, (a, b) in enumerate(itertools.pairwise(es)):
        if set(a.outs) & {n for e in (b.body, *b.guards()) for n in walk(e)}:
            with pytest.raises(VerifyError):
                verify(changed(program, [*es[:i], b, a, *es[i + 2:]]))


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_another_order_is_an_error_or_the_same_program(name: str) -> None:
    """Single assignment and written before read leave the order of statements no say in the result."""
    program = parse((FOLDER / f"{name}.mc").read_text())
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    inputs, expected = REFERENCES[name](rng)
    es = list(program.cascade.einsums)
    orders = [[*es[:i], es[i + 1], es[i], *es[i + 2:]] for i in range(len(es) - 1)]
    orders += [[es[k] for k in rng.permutation(len(es))] for _ in range(20)]
    for order in orders:
        other = changed(program, order)
        try:
            verify(other)
        except VerifyError:
            continue
        got = interpret(other, inputs)
        for tensor, want in expected.items():
            np.testing.assert_allclose(got[tensor], want, rtol=1e-7, atol=1e-7, err_msg=str(other))


@cases
def test_loops_that_forget_their_order_are_seen(program: Program) -> None:
    """A carried value without `iter` is an error, not another meaning."""
    c = program.cascade
    if not any(loops(c)):
        return
    plain = replace(program, cascade=replace(c, ranks=tuple(replace(r, iterative=False) for r in c.ranks)),
                    mapping=Mapping())
    with pytest.raises(VerifyError):
        verify(plain)


# -- values that no text can say --------------------------------------------------------------------------------------

M = Rank("M")
X, Y = Tensor("X", ("M",), "f32", "in"), Tensor("Y", ("M",), "f32", "out")
m = Var("m")
COPY = Einsum((Access("Y", (m,)),), Access("X", (m,)))


def made(rank: Rank = M, x: Tensor = X, s: Einsum = COPY, **parts: object) -> Program:
    return replace(Program("t", Cascade((rank,), (x, Y), (s,))), **parts)  # type: ignore[arg-type]


def test_the_value_is_well_formed() -> None:
    verify(made())


VALUES = {
    "no name": (made(name=""), """
a program's name is one word, found ''
  program
  ^^^^^^^
hint: write program NAME, or program NAME on TARGET"""),
    "two names": (made(name="a b"), """
a program's name is one word, found 'a b'
  program a b
          ^^^
hint: write program NAME, or program NAME on TARGET"""),
    "target": (made(target="c#"), """
a program's target is one word, found 'c#'
  program t on c#
               ^^
hint: write program NAME, or program NAME on TARGET"""),
    "proof": (made(proofs=("a\nb",)), """
a proof is one line of text
  proof 'a\\nb'
  ^^^^^^^^^^^^
hint: join the lines, and strip them"""),
    "rank": (made(rank=Rank("m")), """
'm' cannot be the name of a rank
  rank m
       ^
hint: a rank is an upper-case name whose lower-case form is no word of the language"""),
    "knob": (made(rank=Rank("M", Knob("m", ()))), """
the choices of knob 'm' are not positive integers
  rank M = ?m in
           ^^^^^
hint: write ?m0 in 32|64|128"""),
    "dtype": (made(x=replace(X, dtype="f8")), """
unknown dtype 'f8'
  in X[M]: f8
           ^^
hint: known: bf16, bool, e4m3, e5m2, f16, f32, f64, i16, i32, i64, i8, u8"""),
    "role": (made(x=replace(X, role="input")), """
unknown role 'input'
  input X[M]: f32
  ^^^^^
hint: known: in, out, state, temp"""),
    "operator": (made(s=replace(COPY, body=Call("sofmax", (m,)))), """
unknown operator 'sofmax'
  Y[m] = sofmax(m)
         ^^^^^^
hint: did you mean 'max'? known: <operators>"""),
    "arity": (made(s=replace(COPY, body=call("exp", m, m))), """
'exp' takes 1 argument, found 2
  Y[m] = exp(m, m)
         ^^^
hint: write exp(x)"""),
    "reduction": (made(s=replace(COPY, reduce=Reduce("mean", ("m",)))), """
unknown reduction 'mean'
  Y[m] = mean{m} X[m]
         ^^^^
hint: known: and, argmax, argmin, max, min, or, prod, sum, topk"""),
    "tile": (made(mapping=Mapping((Group("g0", ("Y",), (("M", call("mul", 2, 8)),)),))), """
the size of a tile of 'M' is not a positive integer
  partition M: 2*8
            ^
hint: write partition P: 64, or partition P: ?p0 in 32|64"""),
}


@pytest.mark.parametrize(("program", "message"), VALUES.values(), ids=VALUES)
def test_bad_values_say_what_is_wrong(program: Program, message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert said(caught.value) == message[1:]


@pytest.mark.parametrize("text", [
    "X[m1*M0 + m0] = 1.0",                       # mixed radix
    "X[m1*M0 + m0] = 1.0 where m1*M0 + m0 < M",
    "X[(m1*M0 + m0)*4 + h] = 1.0",               # of three digits
    "X[m] = 1.0 where m < 4\nX[m] = 2.0 where m >= 4",   # guards exclude each other
    "X[m] = 1.0 where A[m] <= 4\nX[m] = 2.0 where A[m] > 4",
    "X[m] = 1.0\nX[M + m0] = 2.0",               # one after the other
    "X[(h*M + m)*M0 + m0] = 1.0",                # of symbolic digits
    "X[m1*M0 + m0] = 1.0 where m0 < A[m1]",      # the extent still holds under a guard that says less
    "X[A[m]] = 1.0",                             # a scatter is taken at its word
    "X[m // 2] = 1.0 where m % 2 == 0",          # the guard pins the rest
    "X[M - 1 - m] = 1.0",                        # backwards
])
def test_writes_that_are_provably_single(text: str) -> None:
    verify(parse("program t\nrank M\nrank M0 = 16\nrank M1 = ceil(M/M0)\nrank H = 4\nrank N\nin A[M]: i64\n"
                 f"temp X[N]: f32\nout O[N]: f32\n{text}\nO[n] = X[n]\n"))


@pytest.mark.parametrize("text", [
    "X[m1*15 + m0] = 1.0",
    "X[m1 + m0] = 1.0",
    "X[m % 4] = 1.0",
    "X[m] = 1.0 where m < 5\nX[m] = 2.0 where m >= 4",
    "X[m] = 1.0\nX[M - 1 + m0] = 2.0",
    "X[m*0 + h] = 1.0",
])
def test_writes_that_collide(text: str) -> None:
    with pytest.raises(VerifyError, match="nothing shows"):
        verify(parse("program t\nrank M\nrank M0 = 16\nrank M1 = ceil(M/M0)\nrank H = 4\nrank N\nin A[M]: i64\n"
                     f"temp X[N]: f32\nout O[N]: f32\n{text}\nO[n] = X[n]\n"))


def test_loops_nest_the_longest_outermost() -> None:
    c = parse("program t\nrank A iter\nrank B iter\nX[a] = 1.0\nX[a, b] = 1.0\nY[b, a] = 1.0\nZ[b] = 1.0\n").cascade
    assert loops(c) == ((("a", 0),), (("a", 0), ("b", 1)), (("a", 0), ("b", 1)), (("b", 3),))


def test_errors_are_ours() -> None:
    for file in BAD:
        with pytest.raises(MemcompError):
            verify(parse(file.read_text()))
