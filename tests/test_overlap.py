"""What runs beside the tensor cores is read off the machine code, and every way to lose it is seen."""

import re
from functools import lru_cache

import pytest

from memcomp.codegen import overlap

pytest.importorskip("triton", reason="triton is not installed")

from memcomp.codegen.triton import offline
from tests.gluon_text import ATTENTION

WAIT_0 = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_1 = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@lru_cache(maxsize=2)
def machine_code(text: str = ATTENTION) -> str:
    types = {n: "*bf16" for n in "QKV"} | {"O": "*fp32", "M": "i32", "N": "i32", "scale": "fp32"}
    made = offline.compile_text(text, "attention", types, {"BN": 64, "D": 64, "ST": 2}, [*"QKVO"], 90)
    assert made.warps == 12 and not made.spills
    return made.sass


def test_exponentials_stand_between_the_waits() -> None:
    found = overlap.loops(machine_code())
    assert overlap.faults(machine_code()) == () and len(found) == 2
    for loop in found:
        events = [str(e) for e in loop.events]
        # a consumer's thread holds 64 x 64 / 128 scores and two rows: one power each, and one for each row's maximum
        assert events == ["HGMMA x8", "WAIT 1", "MUFU.EX2 x34", "EDGE", "WAIT 0"] and loop.covered == 34


def test_without_a_block_s_edge_the_assembler_undoes_it() -> None:
    """The text asks for the same order; only the wait for the next values has moved before the weights."""
    wait = "        mbarrier.wait(v_full.index(at), turn)  # v full\n"
    first = "        top, total, again, p = weights(s, top, total, scale, N - i * BN, BN, mma, out)\n"
    assert first + wait in ATTENTION
    found = overlap.loops(machine_code(ATTENTION.replace(first + wait, wait + first)))
    assert len(found) == 2 and all(x.covered < x.count("MUFU.EX2") for x in found)
    assert overlap.faults(machine_code(ATTENTION.replace(first + wait, wait + first)))


def moved(lines: list[str], source: int, to: int) -> str:
    line = lines.pop(source)
    return "\n".join([*lines[:to], line, *lines[to:]])


@pytest.mark.parametrize("name", ["wait 0 hoisted", "wait 1 is 0", "no wait 1", "no wait 0", "no edge", "spilled",
                                  "registers", "loads", "one consumer"])
def test_every_loss_is_seen(name: str) -> None:
    text = machine_code()
    lines = text.splitlines()
    loop = next(n for n, x in enumerate(lines) if WAIT_1 in x)
    last = next(n for n in range(loop, len(lines)) if WAIT_0 in lines[n])
    label = max(n for n in range(last) if lines[n].startswith(".L_"))
    changed = {
        "wait 0 hoisted": lambda: moved(lines, last, loop + 1),
        "wait 1 is 0": lambda: text.replace(WAIT_1, WAIT_0),
        "no wait 1": lambda: text.replace(WAIT_1, "NOP"),
        "no wait 0": lambda: "\n".join([*lines[:last], *lines[last + 1:]]),
        "no edge": lambda: "\n".join([*lines[:label - 1], *lines[label + 1:]]),
        "spilled": lambda: text.replace("MUFU.EX2", "STL [R1], R2 ;\n        /*0000*/ MUFU.EX2", 1),
        "registers": lambda: re.sub("USETMAXREG", "NOP", text),
        "loads": lambda: re.sub("UTMALDG", "LDG", text),
        "one consumer": lambda: "\n".join(x for n, x in enumerate(lines) if "HGMMA" not in x or n < last + 60),
    }[name]()
    assert changed != text and overlap.faults(changed)


def test_text_without_code_is_no_proof() -> None:
    with pytest.raises(ValueError, match="no machine code"):
        overlap.loops("nothing")
