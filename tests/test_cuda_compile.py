"""CUDA C++ to machine code with no GPU there: by NVRTC and by nvcc, for every capability, and what a bad text says."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from memcomp.codegen.binary import tool_of
from memcomp.codegen.cuda import compile as station
from memcomp.codegen.elf import parameters
from memcomp.codegen.launches import Argument, Form, Launch, Layout
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Const

COMPILERS = [pytest.param(c, marks=pytest.mark.skipif(c not in station.compilers(), reason=f"{c} is not installed"))
             for c in ("nvrtc", "nvcc")]
TEXT = """
extern "C" __global__ void __launch_bounds__(128) twice(const float *X, float *Y, int X_s0, int N) {
  int at = blockIdx.x * 128 + threadIdx.x;
  if (at < N) Y[at] = 2.0f * X[(long long)at * X_s0];
}

extern "C" __global__ void __launch_bounds__(256) sums(const float4 *X, float *Y, int N) {
  extern __shared__ float part[];
  float4 x = X[threadIdx.x];
  part[threadIdx.x] = x.x + x.y + x.z + x.w;
  __syncthreads();
  if (threadIdx.x < N) Y[threadIdx.x] = part[255 - threadIdx.x];
}
"""
X, Y = Argument("X", "pointer", "X", type="*fp32", multiple=16), Argument("Y", "pointer", "Y", type="*fp32")
LAUNCHES = (Launch("twice", (Const(4),), 128, 0, (X, Y, Argument("X_s0", "stride", "X"), Argument("N", "size", "N"))),
            Launch("sums", (Const(1),), 256, 1024, (X, Y, Argument("N", "size", "N"))))


def readable() -> bool:
    """Is there a program that reads machine code?"""
    try:
        return bool(tool_of("nvdisasm"))
    except Refusal:
        return False


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_capability(compiler: str, capability: int) -> None:
    twice, sums = station.compile_text(TEXT, LAUNCHES, capability, compiler)
    assert twice.cubin == sums.cubin and twice.version.startswith(compiler)
    assert (twice.name, twice.warps, sums.warps, sums.shared) == ("twice", 4, 8, 1024)
    assert all(0 < b.resources.registers <= 64 and b.resources.stack == 0 for b in (twice, sums))
    assert sums.resources.static == (1024 if capability >= 90 else 0), "the system's"
    assert [size for _, size in parameters(twice.cubin, "twice").places] == [8, 8, 4, 4]
    assert parameters(twice.cubin, "sums").threads == 256
    if readable():
        assert "LDG.E.128" in twice.sass and f"sm_{capability}" in twice.sass
        assert twice.instructions("STS", "LDS", "STG") == {"STS": 1, "LDS": 1, "STG": 2} and twice.spills == 0
    Form(Layout((0, 0)), twice.version, LAUNCHES, (twice.cubin, sums.cubin))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_what_one_capability_alone_has_is_there(compiler: str) -> None:
    """wgmma belongs to sm_90a, not to sm_90."""
    text = TEXT.replace("  int at", '  asm volatile("wgmma.fence.sync.aligned;");\n  int at')
    station.compile_text(text, LAUNCHES, 90, compiler)
    with pytest.raises(Refusal, match="wgmma"):
        station.compile_text(text, LAUNCHES, 80, compiler)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_one_text_gives_one_file_with_nothing_of_this_machine(compiler: str) -> None:
    first, again = (station.compile_text(TEXT, LAUNCHES, 90, compiler)[0] for _ in range(2))
    assert first == again
    kept = first.cubin.decode("latin-1")
    assert not any(r in kept for r in (sys.prefix, os.getcwd(), os.path.expanduser("~"), "/tmp/") if len(r) > 1)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("text, words", [
    (TEXT.replace("2.0f", "two"), 'line 4: identifier "two" is undefined'),
    (TEXT.replace("  int at", '  asm volatile("nonsense.f32 %0;" : : "f"(X[0]));\n  int at'), "nonsense"),
    ("#include <nothing.h>\n" + TEXT, "nothing.h"),
    (TEXT.replace("sums(", "summed("), "'sums'"),
])
def test_a_failing_text_says_why_and_prints_nothing(text: str, words: str, compiler: str,
                                                    capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refusal) as refused:
        station.compile_text(text, LAUNCHES, 90, compiler)
    assert words in str(refused.value) and len(str(refused.value)) < 300 and capfd.readouterr() == ("", "")


def test_with_no_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(station, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"pip install memcomp\[cuda\]"):
        station.compile_text(TEXT, LAUNCHES, 90)


def test_nvcc_serves_where_the_wheel_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    if "nvcc" not in station.compilers():
        pytest.skip("nvcc is not installed")
    monkeypatch.setattr(station, "find_spec", lambda name: None)
    assert station.compile_text(TEXT, LAUNCHES, 90)[0].version.startswith("nvcc")
