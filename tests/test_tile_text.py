"""The text of tile programs reads back, and says where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.ir.cascade import DTYPES
from memcomp.ir.errors import MemcompError, ParseError, VerifyError
from memcomp.ir.expr import Access, Const, Size
from memcomp.ir.ops import MONOIDS
from memcomp.ir.program import close, knobs
from memcomp.ir.text import parse
from memcomp.ir.tile import (
    Best,
    Dim,
    Dot,
    Fold,
    Load,
    Loop,
    Map,
    Param,
    Statement,
    Store,
    Tile,
    TileKernel,
    TileProgram,
    When,
)
from memcomp.ir.tile_text import parse_tile, show_tile
from memcomp.ir.tile_verify import verify_tile
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from tests.programs import EXPRESSIONS

FOLDER = Path(__file__).parent / "cases"
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,3}'?", fullmatch=True)
DTYPE = st.sampled_from(DTYPES)


def several(s: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[Any]:
    return st.lists(s, max_size=most).map(tuple)


ACCESS = st.builds(Access, NAME, several(EXPRESSIONS))
SIMPLE: st.SearchStrategy[Statement] = st.one_of(
    st.builds(Load, NAME, ACCESS), st.builds(Map, NAME, EXPRESSIONS),
    st.builds(Store, ACCESS, NAME, st.none() | EXPRESSIONS),
    st.builds(Fold, NAME, st.sampled_from(sorted(MONOIDS)), several(NAME), EXPRESSIONS, st.booleans()),
    st.builds(Best, NAME, NAME, NAME, several(NAME), EXPRESSIONS, EXPRESSIONS, st.booleans()),
    st.builds(Dot, NAME, ACCESS, ACCESS, several(NAME), st.booleans(), st.sampled_from(("", "bf16"))))
STATEMENTS: st.SearchStrategy[Statement] = st.recursive(SIMPLE, lambda s: st.one_of(
    st.builds(Loop, NAME, EXPRESSIONS, EXPRESSIONS, several(s)), st.builds(When, EXPRESSIONS, several(s), several(s))),
    max_leaves=6)
KERNELS = st.builds(TileKernel, NAME, several(st.tuples(NAME, EXPRESSIONS), 2),
                    several(st.builds(Dim, NAME, st.integers(1, 512), EXPRESSIONS, EXPRESSIONS)),
                    several(st.builds(Tile, NAME, several(NAME), DTYPE)), several(STATEMENTS))
TILES = st.builds(TileProgram, st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True),
                  several(st.builds(Param, NAME, DTYPE, several(EXPRESSIONS),
                                    st.sampled_from(["in", "out", "state", "work"]))),
                  several(NAME), several(KERNELS, 2), st.sampled_from(["", "cpu"]))


@settings(deadline=None, max_examples=40)
@given(TILES)
def test_whatever_can_be_written_reads_back(program: TileProgram) -> None:
    assert parse_tile(show_tile(program)) == program
    assert str(program) == show_tile(program)


def test_what_lower_makes_of_the_cases_reads_back() -> None:
    seen = 0
    for file in sorted(FOLDER.glob("*.mc")):
        program = parse(file.read_text())
        try:
            program = partition(fuse(program))
            tiles = lower(close(program, {k.name: k.choices[0] for k in knobs(program)}))
        except MemcompError:  # what cannot be lowered, and why, is tested with lower
            continue
        seen += 1
        assert parse_tile(show_tile(tiles)) == tiles
    assert seen >= 3


def test_layout_does_not_count() -> None:
    body = (When(Const(True), (Store(Access("X", ()), "S"),), (Map("S", Const(1)),)),
            Loop("m", Const(0), Size("M"), (Map("S", Const(0.5)),)))
    program = TileProgram("t", (), ("M",), (TileKernel("k", (), (), (), body),))
    text = show_tile(program)
    assert parse_tile("# head\n\n" + "\n".join(f"   {line.strip()}  # note\n" for line in text.splitlines())) == program


BAD = {
    "": """
the text holds no tile program
hint: the first line is tiles NAME, or tiles NAME on cpu""",
    "program t\n": """
expected a tile program
   1 | program t
     | ^^^^^^^^^
hint: the first line is tiles NAME, or tiles NAME on cpu""",
    "tiles t\nkernel k\n  loat S = X[p]\n": """
a line cannot start with 'loat' here
   3 |   loat S = X[p]
     |   ^^^^
hint: did you mean 'load'? known: best, dim, dot, fold, for, grid, if, kernel, load, map, param, sizes, store, tile, \
when""",
    "tiles t\nload S = X[p]\n": """
a line cannot start with 'load' here
   2 | load S = X[p]
     | ^^^^
hint: known: kernel, param, sizes""",
    "tiles t\nkernel k\n  for m = 0 to M {\n    map S = 1\n": """
expected '}', found the end of the text
   4 |     map S = 1
     |              ^
hint: a block that opens must close""",
    "tiles t\nkernel k\n  for m = 0 to M\n    map S = 1\n": """
expected '{', found the end of the line
   3 |   for m = 0 to M
     |                 ^
hint: a block opens with { at the end of the line""",
    "tiles t\nkernel k\n  for m = 0 .. M {\n  }\n": """
expected 'to', found '.'
   3 |   for m = 0 .. M {
     |             ^
hint: write for m1 = 0 to M1 {""",
    "tiles t\nkernel k\n  dot S = {e} A[e] + B[e]\n": """
expected '*', found '+'
   3 |   dot S = {e} A[e] + B[e]
     |                    ^
hint: write dot S = {e} A[e] * B[e]""",
    "tiles t\nkernel k\n  best V, I: k = {e} A[e]\n": """
expected 'at', found the end of the line
   3 |   best V, I: k = {e} A[e]
     |                          ^
hint: write best V, I: k = {m0} X[m0] at m0""",
    "tiles t\nkernel k\n  fold S = som{e} A[e]\n": """
unknown reduction 'som'
   3 |   fold S = som{e} A[e]
     |            ^^^
hint: did you mean 'sum'? known: and, argmax, argmin, max, min, or, prod, sum, topk""",
    "tiles t\nparam X[M]: f32 input\n": """
unknown role 'input'
   2 | param X[M]: f32 input
     |                 ^^^^^
hint: known: in, out, state, work""",
    "tiles t\nkernel k\n  dim p0 count 3 start 0\n": """
expected '[', found 'count'
   3 |   dim p0 count 3 start 0
     |          ^^^^^
hint: write dim p0[32] count min(32, P - p1*32) start p1*32""",
    "tiles t\nkernel k\n  map S = 1 2\n": """
expected the end of the line, found '2'
   3 |   map S = 1 2
     |             ^
hint: one statement to a line""",
}


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_bad_texts_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_tile(text)
    assert str(caught.value) == message[1:]


SOMETIMES = """tiles p on cpu

param X[P]: f32 in
param O[P]: f32 out
sizes P
kernel k
  grid p1: ceil(P/16)
  dim p0[16] count min(P - p1*16, 16) start p1*16
  tile X_t[p0]: f32
  tile Y[p0]: f32
  load X_t = X[p1*16 + p0]
  if {first} {{
    map Y = X_t[p0] * 2.0
  }}
  if {second} {{
    map X_t = Y[p0]
  }}
  store O[p1*16 + p0] = X_t
"""


@pytest.mark.parametrize("first, second, fine", [
    ("P >= 4", "P >= 4", True),
    ("P >= 4", "P >= 4 and p1%2 == 1", True),
    ("p1 == 0", "p1 == 0", True),
    ("P >= 4", "P >= 5 or P >= 4", False),  # no conjunction of it
    ("P >= 4", "p1 == 0", False),
    ("P >= 4 and p1 == 0", "P >= 4", False),
])
def test_a_tile_may_be_read_where_it_was_written(first: str, second: str, fine: bool) -> None:
    """Under the condition of its writer, which sizes and the task alone decide."""
    tp = parse_tile(SOMETIMES.format(first=first, second=second))
    if fine:
        verify_tile(tp)
    else:
        with pytest.raises(VerifyError, match="before it is written"):
            verify_tile(tp)
