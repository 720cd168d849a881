"""Kernel text to machine code with no GPU there: what the compiled file says, and what a failing text says."""

import dataclasses
import os
import sys
from functools import lru_cache

import pytest

from memcomp.ir.errors import Refusal
from memcomp.ir.target import target

triton = pytest.importorskip("triton", reason="triton is not installed")

from memcomp.codegen.binary import Binary, tool_of  # noqa: E402
from memcomp.codegen.triton import offline  # noqa: E402

TEXT = '''import triton
import triton.language as tl


@triton.jit
def product(A, B, C, stride, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr = 2):
    """C = A B over n blocks of K, rows of A and of B one behind another."""
    m, c, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for j in tl.range(0, n, num_stages=S):
        a = tl.load(A + m[:, None] * stride + j * K + k[None, :])
        b = tl.load(B + (j * K + k[:, None]) * stride + c[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + m[:, None] * stride + c[None, :], total)
'''
NONSENSE = TEXT.replace("tl.store(", "total = tl.inline_asm_elementwise("
                        "'nonsense.f32 $0, $1;', '=f,f', [total], tl.float32, True, 1)\n    tl.store(")  # ptxas says no
TYPES = {"A": "*bf16", "B": "*bf16", "C": "*bf16", "stride": "i32", "n": "i32"}
POINTERS, SIZES = ("A", "B", "C"), {"M": 64, "N": 64, "K": 32}


@lru_cache(maxsize=32)
def made(capability: int, text: str = TEXT, divisible: tuple[str, ...] = (*POINTERS, "stride"), warps: int = 4,
         **constants: int) -> Binary:
    return offline.compile_text(text, "product", TYPES, SIZES | constants, divisible, capability, warps)


@pytest.mark.parametrize("capability, words", [(80, "HMMA"), (90, "HGMMA")])
def test_the_file_says_what_it_is(capability: int, words: str) -> None:
    b = made(capability)
    assert b.name == "product" and b.capability == capability and b.version == triton.__version__
    assert b.parameters == tuple(TYPES.items()), "constants are no parameters"
    assert b.cubin[:4] == b"\x7fELF" and f".target sm_{capability}" in b.ptx and "tt.func" in b.ttgir
    assert b.warps == 4 and b.scratch == 0 and 0 < b.shared <= target("a100").level("smem").bytes
    counts = b.instructions("HMMA", "HGMMA", "LDGSTS", "STL")
    assert counts[words] and counts["LDGSTS"] and counts["HMMA" if words == "HGMMA" else "HGMMA"] == 0
    assert b.resources.stack == 0 and b.spills == counts["STL"] == 0
    assert 0 < b.resources.registers <= 255
    assert counts["LDGSTS"] == b.ptx.count("cp.async.cg.shared.global") + b.ptx.count("cp.async.ca.shared.global")


def test_registers_are_those_that_the_toolkit_reads() -> None:
    import re
    import subprocess
    import tempfile

    b = made(80, M=128, N=128, warps=4, K=64)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(b.cubin)
        file.flush()
        told = subprocess.run([tool_of("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True,
                              text=True, check=True).stdout
    found = {k: int(n) for k, n in re.findall(r"(REG|STACK|SHARED):(\d+)", told)}
    assert found == {"REG": b.resources.registers, "STACK": b.resources.stack, "SHARED": b.resources.static}


def test_spills_are_counted_and_registers_can_be_kept_down() -> None:
    b = offline.compile_text(TEXT, "product", TYPES, SIZES | {"M": 128, "N": 128}, (*POINTERS, "stride"), 80, 4,
                             registers=64)
    assert b.resources.registers <= 64 and b.resources.stack and b.spills


def test_strides_must_be_divisible_too() -> None:
    narrow = made(80, divisible=POINTERS)
    assert made(80).instructions("LDGSTS")["LDGSTS"] and not narrow.instructions("LDGSTS")["LDGSTS"]


def test_one_text_gives_one_file() -> None:
    first, again = made(80), made.__wrapped__(80)
    assert first == again and first.cubin == again.cubin and first.ttgir == again.ttgir
    assert offline.module(TEXT) is offline.module(TEXT)
    assert first.cubin != made(80, S=3).cubin


def test_nothing_of_this_machine_is_kept() -> None:
    b = made(90, text=TEXT.replace("total)\n", "total + tl.sum(total, 1)[:, None])\n"))  # a function of Triton's own
    roots = {sys.prefix, os.path.dirname(triton.__file__), os.getcwd(), os.path.expanduser("~"), "/tmp/"}
    for field in dataclasses.fields(b):
        text = getattr(b, field.name)
        text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        assert not any(r in text for r in roots if len(r) > 1), field.name
    assert "loc(" not in b.ttgir


def test_nothing_is_written(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made.__wrapped__(80)
    for text, constants in ((TEXT, {"K": 24}), (NONSENSE, {})):
        with pytest.raises(Refusal):
            made(80, text, **constants)
    assert os.listdir(str(tmp_path)) == [] and os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/cache"


@pytest.mark.parametrize("text, constants, words", [
    (TEXT, {"K": 24}, "power of 2"),
    (NONSENSE, {}, "nonsense"),
    (TEXT.replace("tl.dot(a, b, total)", "tl.dott(a, b, total)"), {}, "dott"),
    (TEXT.replace("a = tl.load", "a = tl.static_assert(False, 'no such thing'); a = tl.load"), {}, "no such thing"),
])
def test_a_failing_text_says_why_and_prints_nothing(text: str, constants: dict[str, int], words: str,
                                                    capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refusal) as refused:
        made(80, text, **constants)
    assert words in str(refused.value) and "sm_80" in refused.value.what and "/" not in refused.value.where
    assert len(str(refused.value)) < 1000 and capfd.readouterr() == ("", "")


def test_arguments_are_checked() -> None:
    for constants, words in [({"Z": 1}, "no argument 'Z'"), ({}, "no type or value for 'M'")]:
        with pytest.raises(Refusal, match=words):
            offline.compile_text(TEXT, "product", TYPES, constants, POINTERS, 80)


@pytest.mark.parametrize("name, used", [("case onepass_causal_gqa", "HGMMA"), ("case onepass_decode_gqa", "HMMA")])
def test_programs_compile_for_the_machine_that_they_are_mapped_for(name: str, used: str) -> None:
    """Two of `make gpu-offline`: warpgroups multiply where a product has 64 rows, warps where it has fewer; what lies
    in rows is read 16 bytes at a time."""
    from benchmarks.gpu_offline import compiled

    first = compiled(name, "h100")["launches"][0]
    assert (first["rows"] >= 64) == (used == "HGMMA") and first["spills"] == 0
    assert {i for i in ("HGMMA", "HMMA") if first["instructions"][i]} == {used}
    assert first["loads"]["128"] > sum(n for bits, n in first["loads"].items() if bits != "128")
