"""Launching: from text or from a file to the driver, which is one of ours here: it writes down what it is told.

No machine here has a GPU.  What the machine code takes is read from the machine code itself (its parameter table), the
driver's side of cuda.core is a library in C (`driver/cuda.c`), and tensors are torch's fake ones, which raise where
anybody asks for an element.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # noqa: E402

import memcomp  # noqa: E402
from memcomp import runtime  # noqa: E402
from memcomp.__main__ import main  # noqa: E402
from memcomp.artifact import Launched, files, load, save, saved  # noqa: E402
from memcomp.codegen.elf import parameters  # noqa: E402
from memcomp.codegen.launches import Argument, Form, Launch, Layout, described, packed  # noqa: E402
from memcomp.codegen.lower import lower  # noqa: E402
from memcomp.config import config  # noqa: E402
from memcomp.ir.errors import InputError, Refusal  # noqa: E402
from memcomp.ir.expr import Const, Size  # noqa: E402
from memcomp.ir.text import parse  # noqa: E402
from memcomp.ir.tile import Kernel, Param  # noqa: E402
from memcomp.pipeline import map_program  # noqa: E402
from tests.driver.launch import Given  # noqa: E402

BACKENDS = ("triton", "cuda")
DRIVER = Path(__file__).parent / "driver"
DECODE = """
program decode
rank H
rank M
rank E = 64
rank F = 64
in Q[H, E]: bf16
in K[H, M, E]: bf16
in V[H, M, F]: bf16
out O[H, F]: bf16
S[h, m] = sum{e} Q[h, e] * K[h, m, e]
G[h] = max{m} S[h, m]
D[h] = sum{m} exp(S[h, m] - G[h])
N[h, f] = sum{m} exp(S[h, m] - G[h]) * V[h, m, f]
O[h, f] = N[h, f] / D[h]
"""
SIZES = {"H": 4, "M": 65536}


def needs(backend: str) -> Any:
    """The backend, or the test is skipped where its compiler is not installed."""
    found = import_module(f"memcomp.codegen.{backend}")
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    elif not found.compile.compilers():
        pytest.skip("neither NVRTC nor nvcc is installed")
    return found


@lru_cache(maxsize=None)
def kernel(backend: str) -> Kernel:
    """Decoding in shares: two launches, with partial results between them."""
    program = map_program(parse(DECODE), config=config({"target": "h100", "backend": backend}), sizes=SIZES)
    made: Kernel = import_module(f"memcomp.codegen.{backend}").emit(lower(program), "h100")
    assert len(made.program.kernels) == 2
    return made


@lru_cache(maxsize=None)
def form(backend: str, layout: Layout) -> Form:
    found: Form = needs(backend).compiled(kernel(backend), layout)
    return found


@lru_cache(maxsize=None)
def made(backend: str) -> files.Saved:
    return saved(kernel(backend), lambda k, layout: form(backend, layout))


@dataclass
class Recorder:
    """A driver that remembers."""

    version: int = 90
    loaded: list[tuple[int, str, int]] = field(default_factory=list)
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    maps: list[tuple[Any, ...]] = field(default_factory=list)

    def capability(self, device: int) -> int:
        return self.version

    def load(self, device: int, cubin: bytes, function: str, shared: int) -> tuple[bytes, str]:
        self.loaded.append((device, function, shared))
        return cubin, function

    @contextlib.contextmanager
    def stream(self, device: int) -> Iterator[str]:
        yield f"the current stream of {device}"

    def room(self, device: int, kernel: Any, block: int, shared: int) -> int:
        return 2 * 132

    def launch(self, kernel: Any, stream: Any, grid: tuple[int, int, int], block: int, shared: int, data: bytes,
               places: Sequence[int], together: bool) -> None:
        each = [data[at:end] for at, end in zip(places, [*places[1:], len(data)], strict=False)]
        self.launches.append((kernel, stream, grid, block, shared, each))

    def map(self, *given: Any) -> bytes:
        self.maps.append(given)
        return bytes(128)


def tensors(k: Kernel, **sizes: int) -> list[Given]:
    from memcomp.dtypes import DTYPES
    from memcomp.sizes import evaluate

    return [Given(tuple(evaluate(x, sizes) for x in p.shape), DTYPES[p.dtype], (n + 1) << 36)
            for n, p in enumerate(k.program.params)]


def launched(backend: str, driver: Recorder) -> Launched:
    s = made(backend)
    return replace_driver(files.Loaded(s).launched, driver)


def replace_driver(x: Launched, driver: Recorder) -> Launched:
    x._driver = driver
    return x


# -- what the machine code takes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_those_that_the_machine_code_takes(backend: str) -> None:
    for f in made(backend).forms:
        for launch, cubin in zip(f.launches, f.cubins, strict=True):
            told = parameters(cubin, launch.function)
            assert told.places == tuple(packed(launch.args)), "as C would lay them out"
            assert told.threads == launch.block


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_arguments_are_refused(backend: str) -> None:
    f = made(backend).forms[0]
    first = f.launches[0]
    size = next(n for n, a in enumerate(first.args) if a.kind == "size")
    for wrong, why in [
        (replace(first, args=first.args[1:]), "is launched with arguments of"),
        (replace(first, args=(*first.args, Argument("more", "null", type="*i8"))), "is launched with arguments of"),
        (replace(first, args=(*first.args[:size], replace(first.args[size], type="i64"), *first.args[size + 1:])),
         "is launched with arguments of"),
        (replace(first, block=first.block + 32), "threads, its machine code is for"),
        (replace(first, function="another"), "no kernel 'another'"),
    ]:
        with pytest.raises(Refusal, match=why):
            replace(f, launches=(wrong, *f.launches[1:]))


# -- a launch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_launches_every_kernel_with_its_arguments(backend: str) -> None:
    driver, given = Recorder(), tensors(kernel(backend), H=16, M=1000)
    call = launched(backend, driver)
    call(*given, *(dict(H=16, M=1000)[r] for r in kernel(backend).program.sizes))
    usual = made(backend).forms[0]
    place = {p.name: t for p, t in zip(kernel(backend).program.params, given, strict=True)}
    for launch, cubin, (code, stream, grid, block, shared, values) in zip(usual.launches, usual.cubins,
                                                                         driver.launches, strict=True):
        assert code == (cubin, launch.function) and stream == "the current stream of 1"
        assert (block, shared) == (launch.block, launch.shared) and grid == launch.blocks({"H": 16, "M": 1000})
        for a, x in zip(launch.args, values, strict=True):
            want = {"pointer": lambda a: place[a.of].place, "stride": lambda a: place[a.of].stride(a.at),
                    "size": lambda a: {"H": 16, "M": 1000}[a.of], "null": lambda a: 0, "scratch": lambda a: 0}
            assert int.from_bytes(x[:a.bytes], "little", signed=True) == want[a.kind](a) and not any(x[a.bytes:]), a
    call(*given, *(dict(H=16, M=1000)[r] for r in kernel(backend).program.sizes))
    assert len(driver.loaded) == 2 and len(driver.launches) == 4, "loaded once"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_as_taken_for_granted_takes_another_form_or_is_refused(backend: str) -> None:
    driver, given = Recorder(), tensors(kernel(backend), H=16, M=1000)
    call = launched(backend, driver)
    numbers = [dict(H=16, M=1000)[r] for r in kernel(backend).program.sizes]
    usual, plain = made(backend).forms[0], made(backend).forms[-1]
    assert usual.layout.loose == frozenset() and plain.layout.loose
    call(*[replace(t, place=t.place + 2) if n == 1 else t for n, t in enumerate(given)], *numbers)
    assert [x[0] for x in driver.launches] == list(zip(plain.cubins, [x.function for x in plain.launches], strict=True))
    alone = replace(made(backend), forms=(usual,))
    call = replace_driver(files.Loaded(alone).launched, driver)
    call(*given, *numbers)
    with pytest.raises(Refusal, match=f"K_ptr = {given[1].place + 2} is no multiple of 16"):
        call(*[replace(t, place=t.place + 2) if n == 1 else t for n, t in enumerate(given)], *numbers)
    with pytest.raises(Refusal, match="positions"):
        call(replace(given[0], strides=(1, 16)), *given[1:], *numbers)
    with pytest.raises(Refusal, match="O_s0 = 1099511627776 reaches beyond 32 bits"):
        call(*[replace(t, strides=(1 << 40, 1)) if n == 3 else t for n, t in enumerate(given)], *numbers)
    with pytest.raises(Refusal, match=f"O_s0 = {1 << 28} reaches beyond 32 bits"):  # the last of 16 rows does
        call(*[replace(t, strides=(1 << 28, 1)) if n == 3 else t for n, t in enumerate(given)], *numbers)


def test_one_row_may_have_any_stride() -> None:
    driver, given = Recorder(), tensors(kernel("triton"), H=1, M=64)
    needs("triton")
    call = launched("triton", driver)
    call(*[replace(t, strides=(7, *t.stride()[1:])) if n in (0, 1) else t for n, t in enumerate(given)], 1, 64)
    usual = made("triton").forms[0]
    assert driver.launches[0][0] == (usual.cubins[0], usual.launches[0].function), "nobody steps there"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_that_cannot_be_right_is_refused(backend: str) -> None:
    given, needed = tensors(kernel(backend), H=16, M=64), needs(backend)
    numbers = [dict(H=16, M=64)[r] for r in kernel(backend).program.sizes]
    for call in (launched(backend, Recorder()), Launched.of(kernel(backend), needed, Recorder())):
        with pytest.raises(TypeError, match="takes 7 tensors and"):
            call(*given)
        with pytest.raises(Refusal, match="takes K as torch.bfloat16, not as torch.float16"):
            call(given[0], replace(given[1], dtype=torch.float16), *given[2:], *numbers)
        for device in (torch.device("cpu"), torch.device("cuda", 0)):
            with pytest.raises(Refusal, match="not on one"):
                call(replace(given[0], device=device), *given[1:], *numbers)
        with pytest.raises(Refusal, match="counts in 32 bits"):
            call(*given, *(2**31 if r == "M" else n for r, n in zip(kernel(backend).program.sizes, numbers,
                                                                   strict=True)))
    for call in (launched(backend, Recorder(80)), Launched.of(kernel(backend), needed, Recorder(80))):
        with pytest.raises(Refusal, match=r"for compute capability 9.0 \(h100\), device 1 has 8.0"):
            call(*given, *numbers)


def test_memory_for_each_block_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, driver = "triton", Recorder()
    needs(backend)
    s = made(backend)
    wanting = replace(s.forms[0], launches=tuple(replace(x, scratch=384) for x in s.forms[0].launches))
    call = replace_driver(files.Loaded(replace(s, forms=(wanting,))).launched, driver)
    asked: list[int] = []

    class Memory:
        def __init__(self, size: int) -> None:
            asked.append(size)

        def data_ptr(self) -> int:
            return 0xABC0

    monkeypatch.setattr(Launched, "_scratch", lambda self, device, size: Memory(size))
    call(*tensors(kernel(backend), H=16, M=64), 16, 64)
    assert asked == [384 * x[2][0] * x[2][1] * x[2][2] for x in driver.launches]
    assert all((0xABC0).to_bytes(8, "little") in x[5] for x in driver.launches)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_is_what_was_saved(backend: str, tmp_path: Path) -> None:
    s = made(backend)
    save(s, tmp_path / "a.mcc")
    assert load(tmp_path / "a.mcc").saved == s and files.to_bytes(s) == (tmp_path / "a.mcc").read_bytes()
    data = files.to_bytes(s)
    for wrong, why in [(data[:-1], "damaged"), (data[:200] + b"?" + data[201:], "damaged"), (b"another", "no saved"),
                       (data[:8] + bytes([9]) + data[9:], "of version 9"), (b"", "no saved")]:
        (tmp_path / "b.mcc").write_bytes(wrong)
        with pytest.raises(InputError, match=why):
            load(tmp_path / "b.mcc")
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "c.mcc")


def test_the_command_line_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("cuda")
    (tmp_path / "sums.mc").write_text("program sums\nrank M\nrank N\nin X[M, N]: f32\nout O[M]: f32\n"
                                      "O[m] = sum{n} X[m, n]\n")
    assert main(["emit", str(tmp_path / "sums.mc"), "--target", "h100", "--backend", "cuda",
                 "--cubin", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "__global__" in said.out and f"wrote {tmp_path / 'sums.mcc'}" in said.err
    assert [p.name for p in load(tmp_path / "sums.mcc").saved.params][:2] == ["X", "O"]
    assert main(["emit", str(tmp_path / "sums.mc"), "--cubin", str(tmp_path)]) == 2
    assert "--cubin writes code for GPUs, and cpu is none" in capsys.readouterr().err


def test_a_saved_kernel_is_a_function_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("cuda")
    call, driver = files.Loaded(made("cuda")), Recorder()
    replace_driver(call.launched, driver)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    with FakeTensorMode():
        q, k, v = (torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in ((16, 64), *((16, 1000, 64),) * 2))
        o, = call(q, k, v)
        assert o.shape == (16, 64) and o.dtype == torch.bfloat16 and o.device == q.device
        with pytest.raises(TypeError, match="takes 3 tensors, got 2"):
            call(q, k)
        with pytest.raises(Refusal, match=r"takes V of shape \(16, 1000, 64\), not \(16, 999, 64\)"):
            call(q, k, v.narrow(1, 0, 999))
        for other, why in [(q.select(0, 0), "one of rank 1"), (3, "int")]:
            with pytest.raises(Refusal, match=f"takes Q as a tensor of rank 2, not {why}"):
                call(other, k, v)
    assert [x[2] for x in driver.launches] == [x.blocks({"H": 16, "M": 1000}) for x in made("cuda").forms[0].launches]


PREFILL = """
program prefill
rank H
rank P
rank M
rank E = 64
rank F = 64
in Q[H, P, E]: bf16
in K[H, M, E]: bf16
in V[H, M, F]: bf16
out O[H, P, F]: bf16
S[h, p, m] = sum{e} Q[h, p, e] * K[h, m, e]
G[h, p] = max{m} S[h, p, m]
D[h, p] = sum{m} exp(S[h, p, m] - G[h, p])
N[h, p, f] = sum{m} exp(S[h, p, m] - G[h, p]) * V[h, m, f]
O[h, p, f] = N[h, p, f] / D[h, p]
"""


def test_a_kernel_that_fetches_boxes_takes_aligned_tensors_only() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    gluon, sizes = import_module("memcomp.codegen.gluon"), {"H": 16, "P": 4096, "M": 4096}
    program = map_program(parse(PREFILL), config=config({"target": "h100", "backend": "gluon"}), sizes=sizes)
    k: Kernel = gluon.emit(lower(program), "h100")
    s, driver = saved(k), Recorder()
    assert len(s.forms) == 1 and s.left and files.from_bytes(files.to_bytes(s)) == s
    call, given = replace_driver(files.Loaded(s).launched, driver), tensors(k, **sizes)
    numbers = [sizes[r] for r in k.program.sizes]
    call(*given, *numbers)
    assert {place for _, place, *_ in driver.maps} == {t.place for t in given[:3]} and len(driver.launches) == 1
    with pytest.raises(Refusal, match=f"is no multiple of 16.*{s.left[0]}"):
        call(replace(given[0], place=given[0].place + 2), *given[1:], *numbers)


# -- the real cuda.core, on a driver in C ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the driver."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    if (cc := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run([cc, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", DRIVER / "cuda.c", "-ldl"], check=True)
    return folder


def told(library: Path, s: files.Saved, *calls: dict[str, int]) -> list[str]:
    """What the driver hears of calls of a saved kernel with these sizes."""
    save(s, library / "a.mcc")
    log = library / "log"
    log.unlink(missing_ok=True)
    takes = ";".join(",".join(str(n) for _, n in parameters(cubin, x.function).places)
                     for x, cubin in zip(s.forms[0].launches, s.forms[0].cubins, strict=True))
    env = os.environ | {"LD_LIBRARY_PATH": str(library), "DRIVER_LOG": str(log), "DRIVER_CAPABILITY": "90",
                        "DRIVER_SIZES": takes, "PYTHONPATH": str(DRIVER.parent.parent)}
    run = subprocess.run([sys.executable, DRIVER / "launch.py", library / "a.mcc",
                          ";".join(",".join(f"{r}={n}" for r, n in sizes.items()) for sizes in calls)],
                         env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return log.read_text().splitlines()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_driver_is_told(backend: str, library: Path) -> None:
    s, sizes = made(backend), {"H": 16, "M": 1000}
    given = {p.name: t for p, t in zip(s.params, tensors(kernel(backend), **sizes), strict=True)}
    number = {"pointer": lambda a: given[a.of].place, "stride": lambda a: given[a.of].stride(a.at),
              "size": lambda a: sizes[a.of], "null": lambda a: 0, "scratch": lambda a: 0}
    loads, launches = [], []
    for n, launch in enumerate(s.forms[0].launches):
        values = ",".join(number[a.kind](a).to_bytes(a.bytes, "little").hex() for a in launch.args)
        x, y, z = launch.blocks(sizes)
        loads += ["load 7fELF"] if s.forms[0].cubins[n] not in s.forms[0].cubins[:n] else []
        loads += [f"function {launch.function}"]
        loads += [f"attribute 8 {launch.shared} 0x300 1"] if launch.shared > 48 * 1024 else []
        launches += [f"launch 0x300 {x},{y},{z} {launch.block},1,1 {launch.shared} 0x1234 {values},"]
    # the second call asks the driver for nothing else, so it may be captured in a graph
    assert told(library, s, sizes, sizes) == [*loads, *launches, *launches]


BOXES = """
struct alignas(64) Map { char at[128]; };
extern "C" __global__ void __launch_bounds__(64) boxes(const __grid_constant__ Map X, int n0, int n1, int n2,
    long long s0, long long s1, long long s2, float *Y, int M) {
  Y[threadIdx.x] = n0 + n1 + n2 + s0 + s1 + s2 + M + X.at[threadIdx.x];
}
"""


def test_a_tensor_is_described_to_the_unit_that_fetches_boxes(library: Path) -> None:
    rows = 7
    args = (*described("X", "X", (1, 0, 2), (1, 64, 32), 64, 2), Argument("Y", "pointer", "Y", type="*fp32"),
            Argument("M", "size", "M"))
    launch = Launch("boxes", (Const(3),), 64, 0, args)
    b, = needs("cuda").compile.compile_text(BOXES, (launch,), 90)
    params = (Param("X", "bf16", (Size("M"), Size("H"), Const(96)), "in"), Param("Y", "f32", (Const(64),), "out"))
    s = files.Saved("boxes", "h100", 90, "cuda", params, ("M", "H"),
                    (Form(Layout((2, 0)), b.version, (launch,), (b.cubin,)),))
    heard = iter(told(library, s, *({"M": rows, "H": heads} for heads in (5, 5, 1)))[2:])
    # bf16, where it is, not interleaved, swizzled in 64 bytes, fetched into L2 by 128, zeros outside; then of each
    # rank, fastest first: extent, bytes to the next, elements of a box, and every one of them.  Where nobody steps,
    # 16 bytes are the least that the driver takes.  What is known is not described again
    for heads, step, calls in ((5, 192, 2), (1, 16, 1)):
        assert next(heard) == f"map 9 {hex(1 << 36)} 0 2 2 0 96:{192 * heads}:32:1 {rows}:{step}:64:1 {heads}:0:1:1"
        numbers = [(heads, 4), (rows, 4), (96, 4), (96 if heads > 1 else 0, 8), (96 * heads, 8), (1, 8), (2 << 36, 8),
                   (rows, 4)]
        given = ["5a" * 128, *(n.to_bytes(size, "little").hex() for n, size in numbers)]
        for _ in range(calls):
            assert next(heard).split()[-1] == "".join(f"{x}," for x in given)
    assert not list(heard)


# -- torch.compile, where nobody may wait for the device ---------------------------------------------------------------


def picked(x: Any, at: Any) -> Any:
    return torch.nn.functional.cross_entropy(x, at, ignore_index=3)


def decoding(q: Any, k: Any, v: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


CASES = {
    "decode": (decoding, lambda: (torch.empty(1, 8, 1, 64, dtype=torch.bfloat16, device="cuda:1"),
                                  *(torch.empty(1, 2, 65536, 64, dtype=torch.bfloat16, device="cuda:1"),) * 2)),
    "lookups": (picked, lambda: (torch.empty(64, 1024, device="cuda"), torch.zeros(64, dtype=torch.int64,
                                                                                  device="cuda"))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_call_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("triton")
    fn, inputs = CASES[name]
    memcomp.reset()
    torch._dynamo.reset()
    known = set(runtime._ENTRIES)
    driver = Recorder()
    launch = Launch("k", (Const(1),), 32, 0, ())
    loaded = ((launch, None, struct.Struct(""), ()),)
    monkeypatch.setattr(Launched, "_load", lambda self, device, layout, values: loaded)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    with FakeTensorMode(), torch.inference_mode():
        given = inputs()
        torch.compile(fn, backend="memcomp", options={"target": "h100", "rest": "eager"})(*given)
        entries = [runtime._ENTRIES[k] for k in set(runtime._ENTRIES) - known]
        assert entries
        for e in entries:
            assert isinstance(e.kernel, Launched)
            replace_driver(e.kernel, driver)
            if name == "lookups":
                assert e.checks
            outs = runtime.run(e, given if len(entries) == 1 else given[:2], [])
            assert all(o.device == given[0].device and o.is_cuda for o in outs)
    assert driver.launches and all(x[1] == f"the current stream of {given[0].device.index}" for x in driver.launches)


def test_on_the_cpu_a_check_does_wait() -> None:
    """So that the test above can fail."""
    check = runtime.Check(0, lambda t, s: (8,), True, None)
    with FakeTensorMode():
        check([torch.zeros(4, dtype=torch.int64, device="cuda")], [])
        with pytest.raises(DataDependentOutputException):
            check([torch.zeros(4, dtype=torch.int64)], [])
