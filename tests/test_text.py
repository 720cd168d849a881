"""The text form: it round-trips, and the digest is blind to names and to nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank, Tensor
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, transform
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Group, Mapping, Program
from memcomp.ir.text import canonical, digest, parse, show, show_expr
from memcomp.ir.verify import verify
from tests.programs import EXPRESSIONS, arrays, programs, texts
from tests.references import CASES

FOLDER = Path(__file__).parent / "cases"
CASE_FILES = sorted(FOLDER.glob("*.mc"))
PROGRAMS = [parse(f.read_text()) for f in CASE_FILES]
cases = pytest.mark.parametrize("program", PROGRAMS, ids=[f.stem for f in CASE_FILES])


def body(text: str) -> Expr:
    return parse(f"program t\nX[] = {text}\n").cascade.einsums[0].body


# -- round trip -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(texts())
def test_whatever_can_be_written_reads_back(program: Program) -> None:
    assert parse(show(program)) == program


@settings(deadline=None, max_examples=60)
@given(programs())
def test_random_programs_read_back(program: Program) -> None:
    assert parse(show(program)) == program
    assert parse(str(program)) == program


@settings(deadline=None, max_examples=300)
@given(EXPRESSIONS)
def test_expressions_read_back(e: Expr) -> None:
    assert body(show_expr(e)) == e


@cases
def test_printing_is_a_fixed_point(program: Program) -> None:
    assert show(parse(show(program))) == show(program)


@cases
def test_layout_does_not_count(program: Program) -> None:
    lines = [f"\t{line}   # note" if not line.startswith("proof") else line for line in show(program).splitlines()]
    assert parse("\n\n".join(["# head", *lines])) == program


def test_binding() -> None:
    """Infix spellings group as the table says; each pair of texts is one expression."""
    for plain, explicit in (
        ("a + b*c", "a + (b*c)"), ("a - b - c", "(a - b) - c"), ("a / b * c", "(a/b) * c"), ("a*b << 2", "a*(b << 2)"),
        ("a + b < c and d or e", "(((a + b) < c) and d) or e"), ("not a < b and c", "(not (a < b)) and c"),
        ("-a*b", "(-a)*b"), ("a & 15 | b >> 4", "((a&15) | b) >> 4"), ("a % b // c", "(a % b) // c"),
        ("ceil(M/M0)", "ceildiv(M, M0)"), ("a - -3", "sub(a, -3)"), ("--a", "neg(neg(a))"), ("neg(3)", "neg((3))"),
    ):
        assert body(plain) == body(explicit), plain
    assert body("-3") == Const(-3)
    assert body("neg(3)") == Call("neg", (Const(3),))
    assert body("ceil(M/M0)") == Call("ceildiv", (Size("M"), Size("M0")))
    assert body("3") != body("3.0")


def test_a_word_of_the_language_may_name_a_tensor() -> None:
    for name in ("in", "rank", "group", "space", "proof", "where", "exp", "inf", "not"):
        p = parse(f"program t\n{name}[] = {name}[] + exp({name}[]) where {name}[] > 0.0\n")
        assert p.cascade.einsums[0].reads() == {name} and parse(show(p)) == p


# -- digest -----------------------------------------------------------------------------------------------------------


def renamed(p: Program, salt: str) -> Program:
    """The same program with every name but the target's replaced."""

    def rank(n: str) -> str:
        return f"Z{salt.upper()}{n}Q"

    def tensor(n: str) -> str:
        return f"{salt}_{n}"

    def expr(e: Expr) -> Expr:
        def f(n: Expr) -> Expr:
            if isinstance(n, Var):
                return Var(rank(n.name.upper()).lower())
            if isinstance(n, Size):
                return Size(rank(n.rank))
            return Access(tensor(n.tensor), n.index) if isinstance(n, Access) else n

        return transform(e, f)

    def size(e: Expr | Knob | None) -> Expr | Knob | None:
        return None if e is None else Knob(salt + e.name, e.choices) if isinstance(e, Knob) else expr(e)

    def access(a: Access) -> Access:
        return Access(tensor(a.tensor), tuple(expr(i) for i in a.index))

    c = p.cascade
    parts = {r + d: rank(r) + d for g in p.mapping.groups for r, _ in g.partition for d in "01"}

    def part(n: str) -> str:
        return parts.get(n, rank(n))

    return Program(
        f"{salt}_{p.name}",
        Cascade(
            tuple(Rank(rank(r.name), size(r.extent), r.bound, r.iterative) for r in c.ranks),
            tuple(Tensor(tensor(t.name), tuple(map(rank, t.ranks)), t.dtype, t.role, t.empty) for t in c.tensors),
            tuple(Einsum(tuple(map(access, s.outs)), expr(s.body),
                         s.reduce and replace(s.reduce, over=tuple(rank(v.upper()).lower() for v in s.reduce.over)),
                         None if s.guard is None else expr(s.guard)) for s in c.einsums),
        ),
        Mapping(tuple(
            Group(salt + g.name, tuple(map(tensor, g.tensors)),
                  tuple((rank(r), n) for r, x in g.partition if (n := size(x)) is not None),
                  tuple(map(part, g.space)), tuple(map(part, g.loop_order)), g.lane and part(g.lane),
                  tuple((tensor(t), level) for t, level in g.keep))
            for g in p.mapping.groups)),
        p.target, (*p.proofs, f"{salt}: renamed"),
    )


@cases
def test_digest_is_blind_to_names(program: Program) -> None:
    assert digest(renamed(program, "x")) == digest(renamed(program, "longer")) == digest(program) == program.digest


@settings(deadline=None, max_examples=40)
@given(programs(), st.from_regex(r"[a-z]{1,4}", fullmatch=True))
def test_digest_of_random_programs_is_blind_to_names(program: Program, salt: str) -> None:
    assert digest(renamed(program, salt)) == digest(program)


def changes(p: Program) -> list[Program]:
    """Programs that are not `p`, each a small step away."""
    c = p.cascade
    out = [replace(p, target=p.target + "x")]

    def cascade(**parts: object) -> None:
        out.append(replace(p, cascade=replace(c, **parts)))

    for i, s in enumerate(c.einsums):
        def put(new: Einsum, i: int = i) -> None:
            cascade(einsums=(*c.einsums[:i], new, *c.einsums[i + 1:]))

        put(replace(s, body=Call("neg", (s.body,))))
        put(replace(s, guard=Call("lt", (Const(0), Const(1))) if s.guard is None else None))
        if s.reduce:
            put(replace(s, reduce=replace(s.reduce, monoid="min" if s.reduce.monoid == "sum" else "sum")))
    for i, t in enumerate(c.tensors):
        cascade(tensors=(*c.tensors[:i], replace(t, dtype="f64" if t.dtype != "f64" else "f32"), *c.tensors[i + 1:]))
        cascade(tensors=(*c.tensors[:i], replace(t, empty=t.empty + 1), *c.tensors[i + 1:]))
    for i, r in enumerate(c.ranks):
        cascade(ranks=(*c.ranks[:i], replace(r, iterative=not r.iterative), *c.ranks[i + 1:]))
        cascade(ranks=(*c.ranks[:i], replace(r, extent=Const(7) if r.extent != Const(7) else None), *c.ranks[i + 1:]))
    for i, g in enumerate(p.mapping.groups):
        for new in (replace(g, space=(*g.space, "E")), replace(g, lane=None if g.lane else "E"),
                    replace(g, keep=(*g.keep, (g.tensors[0], "smem")))):
            out.append(replace(p, mapping=Mapping((*p.mapping.groups[:i], new, *p.mapping.groups[i + 1:]))))
    return out


@cases
def test_digest_sees_every_change(program: Program) -> None:
    others = changes(program)
    assert digest(program) not in {digest(q) for q in others}
    assert len({digest(q) for q in others}) == len({show(replace(q, name="", proofs=())) for q in others})


@cases
def test_canonical_is_the_same_program(program: Program) -> None:
    again = canonical(program)
    verify(again)
    assert canonical(again) == again and digest(again) == digest(program)


@pytest.mark.parametrize("name", sorted(CASES))
def test_canonical_means_the_same(name: str) -> None:
    inputs, _ = CASES[name](np.random.default_rng(7))
    program = parse((FOLDER / f"{name}.mc").read_text())
    again = canonical(program)
    names = {a.name: b.name for a, b in zip(program.cascade.tensors, again.cascade.tensors, strict=True)}
    want, got = interpret(program, inputs), interpret(again, {names[n]: x for n, x in inputs.items()})
    assert {names[n] for n in want} == set(got)
    for n, x in want.items():
        np.testing.assert_array_equal(got[names[n]], x)


def test_swapped_operands_are_another_program() -> None:
    one = "program t\nrank M\nin A[M]: f32\nin B[M]: f32\nout X[M]: f32\nX[m] = A[m] - B[m]\n"
    assert digest(parse(one)) != digest(parse(one.replace("A[m] - B[m]", "B[m] - A[m]")))


def test_when_a_bound_counts() -> None:
    def of(bound: str, mapping: str = "", m: str = "rank M") -> str:
        return digest(parse(f"program t\nrank B\nin n[B]: i64\n{m}{bound}\nin A[B, M]: f32\nout X[B]: f32\n"
                            f"X[b] = sum{{m}} A[b, m]\n{mapping}"))

    group = "group g0: X\n  space B\n"
    assert of(" <= 8") != of(" <= 16") != of("")  # it may become the capacity of a tile
    assert of(" <= 8", group) != of(" <= 16", group)
    assert of(" <= 8", group + "  loop-order M\n") == of(" <= 16", group + "  loop-order M\n")
    assert of(" <= 8", group + "  partition M: 4\n") == of("", group + "  partition M: 4\n")
    ragged = "rank M = n[b]"
    assert of(" <= 8", group + "  loop-order M\n", ragged) != of(" <= 16", group + "  loop-order M\n", ragged)


def test_digest_does_not_depend_on_the_process() -> None:
    text = show(PROGRAMS[0])
    code = "import sys; from memcomp.ir.text import *; print(digest(parse(sys.stdin.read())), 'torch' in sys.modules)"
    for seed in ("1", "2"):
        run = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True,
                             cwd=FOLDER.parent.parent, env={**os.environ, "PYTHONHASHSEED": seed})
        assert run.stdout.split() == [digest(PROGRAMS[0]), "False"]


@settings(deadline=None, max_examples=40)
@given(programs(), st.integers(0, 99))
def test_random_programs_are_well_formed_and_run(program: Program, seed: int) -> None:
    verify(program)
    inputs = arrays(program, seed)
    one, two = interpret(program, inputs), interpret(parse(show(program)), inputs)
    assert set(one) == {t.name for t in program.cascade.outputs()}
    for n in one:
        np.testing.assert_array_equal(one[n], two[n])
