"""Few rows over a long cache: what is asked for ahead, and how long the tiles are."""

from __future__ import annotations

import re

import pytest

from memcomp.codegen.lower import lower
from memcomp.codegen.tvm.ahead import PLACES, SOON
from memcomp.codegen.tvm.emit import emit
from memcomp.codegen.tvm.isa import AVX2, AVX512, Isa
from memcomp.config import Config
from memcomp.ir.expr import Const
from memcomp.ir.program import close, knobs
from memcomp.ir.text import parse
from memcomp.passes.fuse import fuse
from memcomp.passes.partition import partition
from memcomp.pipeline import map_program
from tests.mapped import CASES, load, mapped

TILE, WIDE = 64, 64


def asked(source: str, tensor: str) -> list[list[int]]:
    """Per request in the text the keys that it asks for in step 5, over all values of its loops."""
    found = []
    for line in re.findall(rf"prefetch\(T.address_of\({tensor}\[(.*)\]\)\)", source):
        key = next(x for x in re.split(r", (?![^()]*\))", line) if "m1" in x)
        loops = [v for v in dict.fromkeys(re.findall(r"[a-z]\w*", key)) if not v.startswith("m1") and v != "i64"]
        step = next(v for v in re.findall(r"[a-z]\w*", key) if v.startswith("m1"))
        block = int(m[1]) if (m := re.search(rf"{loops[0]} \* (\d+)", key)) else 1
        inner = range(block) if len(loops) > 1 else (0,)
        found.append([eval(key, {"i64": int, step: 5, loops[0]: k, loops[-1] if len(loops) > 1 else "_": n})
                      for k in range(TILE // block) for n in inner])
    return found


@pytest.mark.parametrize("isa", [AVX512, AVX2])
@pytest.mark.parametrize("tensor", ["K", "V"])
def test_the_next_tile_is_asked_for_once(isa: Isa, tensor: str) -> None:
    """Every row of it, and every row of this one `SOON` bytes before it is read."""
    text = re.sub(r"rank ([EF]) = \d+", rf"rank \1 = {WIDE}", (CASES / "onepass_decode_gqa.mc").read_text())
    requests = asked(emit(lower(mapped(parse(text), 2)), isa).source, tensor)
    far = sorted(k for r in requests if min(r) >= 6 * TILE for k in r)
    soon = sorted(k for r in requests if min(r) < 6 * TILE for k in r)
    rows = SOON // (4 * WIDE)
    assert far == list(range(6 * TILE, 7 * TILE))
    assert soon == list(range(5 * TILE + rows, 6 * TILE + rows))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_few_keys_are_read_side_by_side(group: int) -> None:
    """More places at a time than a core follows would be asked for in bursts, and bursts are not heard."""
    text = re.sub(r"rank ([EF]) = \d+", rf"rank \1 = {WIDE}", (CASES / "onepass_decode_gqa.mc").read_text())
    text = text.replace("rank G = 3", f"rank G = {group}").replace("j*3", f"j*{group}").replace("J*3", f"J*{group}")
    source = emit(lower(mapped(parse(text), 2)), AVX512).source
    sums = [line.count("at(16)]") for line in source.splitlines() if "row_sums(" in line]
    assert max(sums) == group * min(PLACES, 16 // group) and source.count("prefetch(")


def test_few_rows_may_take_longer_steps() -> None:
    """Where rows stay whole, a step is long by default; a size that was written down stays among the choices."""
    written = load("onepass_decode_gqa")
    choices = {k.name: k.choices for k in knobs(written)}["m0"]
    assert {k.name: k.choices for k in knobs(partition(fuse(written)))}["m0"] == (*choices, 2 * max(choices))
    settled = close(written, {"m0": 8})
    assert partition(fuse(settled)).cascade.rank("M0") == settled.cascade.rank("M0")


@pytest.mark.parametrize("rows,most", [(16, 16), (300, 64)])
def test_a_tile_is_not_longer_than_its_rank(rows: int, most: int) -> None:
    read = parse((CASES / "attention_3pass.mc").read_text())
    closed = map_program(read, config=Config(), sizes={"P": rows, "M": 4000})
    sizes = [s.value for g in closed.mapping.groups for r, s in g.partition if r == "P" and isinstance(s, Const)]
    assert sizes and max(sizes) <= most and (rows < 32 or min(sizes) > 16)
