"""Kernel text is read as TVM's own parser reads it, and sooner."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import pytest

from memcomp.codegen.lower import lower
from memcomp.ir.text import parse
from memcomp.ir.tile import Kernel
from tests.mapped import ONEPASS, load, mapped

pytest.importorskip("tvm")

import tvm_ffi
from tvm.script import from_source
from tvm.script import tirx as T

from memcomp.codegen.tvm import emit, launcher
from memcomp.codegen.tvm.isa import AMX, AVX2, AVX512_BF16, SSE, Isa
from memcomp.codegen.tvm.script import read

build = import_module("memcomp.codegen.tvm.build")
BF16 = """program p
rank N
{rank}
rank M
in X[N, E]: bf16
in Y[M, E]: bf16
out O[N, M]: f32
O[n, m] = sum{{e}} X[n, e] * Y[m, e]
"""


def both(kernel: Kernel, form: Isa) -> tuple[Any, Any]:
    words = build.vocabulary()
    with build.machine(form):
        return read(kernel.source, words)["main"], from_source(kernel.source, extra_vars={**words, "T": T})


@pytest.mark.parametrize("form", [SSE, AVX2, AVX512_BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["onepass_causal_gqa", "onepass_padding", "onepass_decode_static",
                                  "onepass_positions"])
def test_both_give_the_same_function(name: str, form: Isa) -> None:
    assert name in ONEPASS
    own, theirs = both(emit(lower(mapped(load(name), 1)), form), form)
    assert tvm_ffi.structural_equal(own, theirs, map_free_vars=True)


@pytest.mark.parametrize("form", [AVX512_BF16, AMX], ids=lambda f: f.name)
@pytest.mark.parametrize("rank", ["rank E = 32", "rank E = 66", "rank E <= 99"])
def test_products_of_bf16_too(rank: str, form: Isa) -> None:
    own, theirs = both(emit(lower(mapped(parse(BF16.format(rank=rank)), 2)), form), form)
    assert tvm_ffi.structural_equal(own, theirs, map_free_vars=True)


def test_it_is_sooner() -> None:
    kernel = emit(lower(mapped(load("onepass_causal_gqa"), 2)), AVX2)
    words = build.vocabulary()
    with build.machine(AVX2):
        times = []
        for call in (lambda: read(kernel.source, words),
                     lambda: from_source(kernel.source, extra_vars={**words, "T": T})) * 2:
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
    assert min(times[::2]) < min(times[1::2]) / 2


def test_the_launchers_functions_are_read() -> None:
    assert set(read(launcher._SCRIPT, {})) == {"memcomp_worker", "memcomp_launch", "memcomp_install"}


HEAD = "@T.prim_func(s_tir=True)\ndef main(N: T.int64):\n"


@pytest.mark.parametrize(("line", "why"), [
    ("x = N + 1", "x is neither a size nor a buffer"),
    ("with N:\n        pass", "no statement of kernel text: with N:"),
    ("x: T.let = nothing(N)", "line 3: NameError"),
    ("for i in T.serial(N, 1, 2, 3, 4, 5, 6, 7):\n        pass", "line 3: TypeError"),
])
def test_a_statement_that_makes_no_sense_is_named(line: str, why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        read(f"{HEAD}    {line}\n", {})


def test_names_of_undefined_variables_are_refused() -> None:
    with pytest.raises(RuntimeError):
        read(f"{HEAD}    for i in T.serial(N):\n        pass\n    T.evaluate(i)\n", {})
