"""A directory of kernels: what is damaged, foreign or from elsewhere is refused before anything of it is loaded, and
what is loaded computes what was compiled, without a compiler."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import memcomp
from memcomp.artifact import Pack, machines, manifest, schema, verified
from memcomp.artifact.kernel import Kernel
from memcomp.artifact.manifest import NAME, Lookup, Machine, Manifest
from memcomp.artifact.memory import Array, empty, tensor
from memcomp.codegen import threads
from memcomp.config import config
from memcomp.ir.errors import InputError, MemcompError, OptionError, Refusal
from memcomp.ir.text import parse
from memcomp.pipeline import Compiled, compile_program

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = """
program attention
rank B
rank H = 2
rank P
rank M
rank E = 16
in Q[B, H, P, E]: f32
in K[B, H, M, E]: f32
in V[B, H, M, E]: f32
out O[B, H, P, E]: f32
S[b, h, p, m] = sum{e} Q[b, h, p, e] * K[b, h, m, e]
G[b, h, p] = max{m} S[b, h, p, m]
D[b, h, p] = sum{m} exp(S[b, h, p, m] - G[b, h, p])
N[b, h, p, e] = sum{m} exp(S[b, h, p, m] - G[b, h, p]) * V[b, h, m, e]
O[b, h, p, e] = N[b, h, p, e] / D[b, h, p]
"""
DECODE = """
program decode
rank H
rank M
rank E = 16
in Q[H, E]: f32
in K[H, M, E]: f32
in V[H, M, E]: f32
out O[H, E]: f32
S[h, m] = sum{e} Q[h, e] * K[h, m, e]
G[h] = max{m} S[h, m]
D[h] = sum{m} exp(S[h, m] - G[h])
N[h, e] = sum{m} exp(S[h, m] - G[h]) * V[h, m, e]
O[h, e] = N[h, e] / D[h]
"""
DOUBLE = """
program double
rank P
in X[P]: bf16
out Y[P]: bf16
Y[p] = X[p] + X[p]
"""
ROWS = """
program rows
rank P
rank E = 4
rank W = 10
in T[W, E]: f32
in I[P]: i64
out Y[P, E]: f32
Y[p, e] = T[I[p], e]
"""


def compiled(text: str, target: str = "cpu", **sizes: int) -> Compiled:
    return compile_program(parse(text), config=config({"target": target}), sizes=sizes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels for two machines."""
    pack, place = Pack("kernels"), tmp_path_factory.mktemp("artifact") / "kernels"
    both = {t: compiled(ATTENTION, t) for t in ("avx2", "cpu")}
    assert pack.kernel(parse(ATTENTION), both, ranges={"M": (1, 4096)}) == "attention"
    assert pack.kernel(parse(ATTENTION), both, "again", ranges={"M": (1, 4096)}) == "attention"  # the same kernel
    assert pack.kernel(parse(DOUBLE), {t: compiled(DOUBLE, t) for t in both}) == "double"
    pack.kernel(parse(ROWS), {t: compiled(ROWS, t) for t in both}, lookups=[Lookup(1, "10", True, None)])
    pack.kernel(parse(DECODE), {t: compiled(DECODE, t, H=1, M=65536) for t in both})
    pack.file("notes/read.me", b"any file is held to its digest")
    digest = pack.write(place)
    assert verified(place, f"sha256:{digest}").manifest.digest == digest
    return place


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def changed(place: Path, **parts: Any) -> None:
    """Another manifest, with a digest that is right: what somebody else may write."""
    held = json.loads((place / NAME).read_text())
    sound = schema.read(Manifest, held, "")
    (place / NAME).write_text(replace(sound, **parts).text())


def attention(p: int = 5, m: int = 7, b: int = 2) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    r = np.random.default_rng(p + 10 * m)
    q, k, v = (r.standard_normal((b, 2, n, 16), dtype=np.float32) for n in (p, m, m))
    s = (q.astype("f8") @ k.astype("f8").swapaxes(-1, -2))
    w = np.exp(s - s.max(-1, keepdims=True))
    return [q, k, v], w @ v.astype("f8") / w.sum(-1, keepdims=True)


# -- refused before anything is loaded ---------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm_ffi

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(tvm_ffi, "load_module", load)


def refused(place: Path, **options: Any) -> str:
    with pytest.raises(MemcompError) as caught:
        memcomp.load(place, **options)
    assert "\n" not in caught.value.what and str(place) in str(caught.value)
    return caught.value.what


def files(place: Path) -> list[str]:
    return sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file())


def test_every_file_is_held_to_its_digest(copy: Path, nothing_is_loaded: None) -> None:
    """A bit flipped anywhere, a byte more, a byte less."""
    dice = random.Random(0)
    assert len(files(copy)) > 9
    for name in files(copy):
        whole = (copy / name).read_bytes()
        for at in {0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(8))}:
            flipped = whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1:]
            (copy / name).write_bytes(flipped)
            refused(copy)
        for other in (whole[:-1], whole + b"\n", b""):
            (copy / name).write_bytes(other)
            refused(copy)
        (copy / name).write_bytes(whole)
    assert verified(copy)


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_any_flipped_bit_of_the_manifest_is_seen(made: Path, step: int) -> None:
    whole, dice = (made / NAME).read_bytes(), random.Random(1)
    for at in range(0, len(whole), step):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1:]
        with pytest.raises(InputError):
            manifest.read(flipped, "manifest")


def test_only_listed_files_and_no_links(copy: Path, tmp_path: Path, nothing_is_loaded: None) -> None:
    (copy / "kernels" / "more.so").write_bytes(b"\x7fELF")
    assert "does not list: kernels/more.so" in refused(copy)
    (copy / "kernels" / "more.so").unlink()
    note = copy / "notes" / "read.me"
    shutil.move(note, tmp_path / "elsewhere")
    assert "lacks a file of its manifest: notes/read.me" in refused(copy)
    note.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused(copy)
    note.unlink()
    os.mkfifo(note)
    assert "is no file" in refused(copy)
    note.unlink()
    shutil.move(copy / "notes", tmp_path / "notes")
    (copy / "notes").symlink_to(tmp_path / "notes")
    assert "is a link" in refused(copy)
    assert "no directory" in refused(copy / "none") and f"no {NAME}" in refused(tmp_path / "notes")


@pytest.mark.parametrize("path", ["../kernels/x", "/etc/hostname", "a/../../b", "kernels//x", "kernels/.x", "a\\b", "",
                                  NAME, "a\nb"])
def test_paths_stay_inside(copy: Path, path: str, nothing_is_loaded: None) -> None:
    sound = verified(copy).manifest
    changed(copy, files={**sound.files, path: next(iter(sound.files.values()))})
    assert "no path inside" in refused(copy)


def test_other_versions_are_told(copy: Path, nothing_is_loaded: None) -> None:
    now = manifest.VERSION
    for other, age in ((0, "an older"), (now - 1, "an older"), (now + 1, "a newer")):
        changed(copy, version=other)
        assert f"is of {age} format, {other}; this memcomp reads {now}" in refused(copy)
    changed(copy, format="a recipe")
    assert "is no manifest of an artifact" in refused(copy)


def test_a_pinned_digest(copy: Path) -> None:
    known = verified(copy).manifest.digest
    assert memcomp.load(copy, digest=known).report.digest == known
    changed(copy, name="another")
    assert "is another artifact" in refused(copy, digest=known)


@pytest.mark.parametrize("machine, why", [
    (Machine("far", "cpu", "sparc", "linux"), "it is for sparc"),
    (Machine("far", "cpu", machines.platform.machine(), "plan9"), "it is for plan9"),
    (Machine("far", "cpu", machines.platform.machine(), "linux", ("avx512f", "wings")), "this processor lacks wings"),
    (Machine("far", "cuda", capability=90), "there is no GPU"),
])
def test_another_machine_is_refused(copy: Path, machine: Machine, why: str, nothing_is_loaded: None,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    if machine.device == "cuda":
        monkeypatch.setattr(machines, "_no_gpu", lambda capability: "there is no GPU")
    changed(copy, targets=(machine, replace(machine, name="farther")))
    what = refused(copy)
    assert "does not run on this machine" in what and "target farther" in what
    assert machine.name in what and (why in what or "avx512f" in what and "wings" in what)
    assert "known: far, farther" in str(pytest.raises(OptionError, memcomp.load, copy, target="near").value)


@pytest.mark.parametrize("fault, what", [
    ({"name": 3}, "name is not a text"), ({"name": None}, "name is not a text"), ({"more": 1}, "unknown field more"),
    ({"files": []}, "files is no mapping"), ({"targets": {}}, "targets is no list"), ({"version": True}, "format"),
    ({"version": 10**400}, "newer format"), ({"kernels": [3]}, "kernels[0] is no mapping")])
def test_what_is_no_manifest_is_told_apart(made: Path, fault: dict[str, Any], what: str) -> None:
    held = json.loads((made / NAME).read_text()) | fault
    with pytest.raises(InputError, match=what.replace("[", r"\[")):
        manifest.read(schema.canonical(held).encode(), "manifest")


@pytest.mark.parametrize("text", ["B // 0", "B[0]", "b", "__import__('os')", "B + X", "1.5", "B M", "(" * 300,
                                  "B" * 500, "exp(B)", "B % M"])
def test_extents_are_arithmetic_over_sizes(copy: Path, text: str, nothing_is_loaded: None) -> None:
    sound = verified(copy).manifest
    k = sound.kernels[0]
    odd = replace(k, inputs=(replace(k.inputs[0], shape=(text, *k.inputs[0].shape[1:])), *k.inputs[1:]))
    changed(copy, kernels=(odd, *sound.kernels[1:]))
    with pytest.raises(MemcompError):
        memcomp.load(copy)


def test_garbage_is_no_manifest() -> None:
    for data in (b"", b"null", b"[" * 100_000, b"\xff\xfe", b'{"format": NaN}', b"3" * 5000):
        with pytest.raises(InputError):
            manifest.read(data, "manifest")


# -- what runs ---------------------------------------------------------------------------------------------------------


def test_equal_to_what_was_compiled(made: Path) -> None:
    torch = pytest.importorskip("torch")
    run, entry = memcomp.load(made), compiled(ATTENTION).entry
    assert list(run.kernels) == ["attention", "double", "rows", "decode"] and run.report.target.name == "cpu"
    assert "avx2: it runs here too" in str(run.report)
    for p, m in ((5, 7), (1, 130), (65, 1)):
        (q, k, v), want = attention(p, m)
        o, = run["attention"](q, k, v)
        mine = torch.empty(q.shape)
        entry(*map(torch.from_numpy, (q, k, v)), mine, 2, 2, p, m)
        assert isinstance(o, np.ndarray) and np.array_equal(o, mine.numpy())
        assert np.abs(o - want).max() < 1e-5
        again, = run["attention"](*map(torch.from_numpy, (q, k, v)))
        assert isinstance(again, torch.Tensor) and torch.equal(again, mine)
    old = memcomp.load(made, target="avx2")
    assert old.report.target.name == "avx2" and np.abs(old["attention"](q, k, v)[0] - want).max() < 1e-5


def test_partial_results_have_memory_of_their_own(made: Path) -> None:
    decode, r = memcomp.load(made)["decode"], np.random.default_rng(0)
    assert len(decode.work({"H": 3, "M": 5})) == 3 or os.cpu_count() == 1
    for h, m in ((1, 20000), (3, 5)):
        q, k, v = (r.standard_normal(s, dtype=np.float32) for s in ((h, 16), (h, m, 16), (h, m, 16)))
        s = np.einsum("he,hme->hm", q.astype("f8"), k)
        w = np.exp(s - s.max(-1, keepdims=True))
        want = np.einsum("hm,hme->he", w, v) / w.sum(-1, keepdims=True)
        assert np.abs(decode(q, k, v)[0] - want).max() < 1e-5


def test_tensors_as_they_come(made: Path) -> None:
    """Misaligned, column by column, read-only, empty, with strides of nobody's, of other libraries."""
    run = memcomp.load(made)["attention"]
    (q, k, v), want = attention()

    def shifted(x: np.ndarray[Any, Any], by: int) -> np.ndarray[Any, Any]:
        room = np.zeros(x.nbytes + 128, np.uint8)
        at = -room.ctypes.data % 64 + by
        held = room[at:at + x.nbytes].view(np.float32).reshape(x.shape)
        held[:] = x
        return held

    frozen = k.copy()
    frozen.flags.writeable = False
    ways: list[Callable[[np.ndarray[Any, Any]], Any]] = [
        lambda x: shifted(x, 4), lambda x: shifted(x, 36), lambda x: shifted(x, 1), tensor, np.asfortranarray,
        lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2), lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: np.repeat(x, 3, axis=2)[:, :, ::3]]
    for way in ways:
        o, = run(way(q), way(k), way(v))
        assert np.abs(o - want).max() < 1e-5
    assert np.abs(run(q, frozen, v)[0] - want).max() < 1e-5
    one = attention(1, 1, 1)
    assert np.abs(run(*map(np.asfortranarray, one[0]))[0] - one[1]).max() < 1e-5
    assert run(q[:, :, :0], k, v)[0].shape == (2, 2, 0, 16)
    torch = pytest.importorskip("torch")
    turned = [torch.from_numpy(x).mT.contiguous().mT for x in (q, k, v)]
    assert np.abs(run(*turned)[0].numpy() - want).max() < 1e-5
    around = torch.compile(lambda *x: 2 * torch.compiler.disable(run)(*x)[0], backend="eager")
    with torch.no_grad():
        assert np.abs(around(*turned).numpy() - 2 * want).max() < 2e-5


def test_what_a_kernel_does_not_take(made: Path) -> None:
    run = memcomp.load(made)["attention"]
    (q, k, v), _ = attention()
    long = np.zeros((2, 2, 4097, 16), np.float32)
    for inputs, what in (((q, k), "takes 3 inputs, got 2"), ((q[0], k, v), "tensor of rank 4, not one of rank 3"),
                         ((q, k, v[:, :, :3]), "takes V of shape [2, 2, 7, 16], not [2, 2, 3, 16]"),
                         ((q, k.astype("f8"), v), "takes K as f32, not as f64"), (([1], k, v), "not list"),
                         ((q[..., :8], k, v), "takes Q of shape"), ((q, k.astype("c8"), v), "K"),
                         ((q, k[:, :, :0], v[:, :, :0]), "takes M from 1 to 4096, not 0"),
                         ((q, long, long), "takes M from 1 to 4096, not 4097")):
        with pytest.raises(Refusal) as caught:
            run(*inputs)
        assert what in caught.value.what
    with pytest.raises(Refusal, match="takes no size M"):
        run(q, k, v, M=3)
    torch = pytest.importorskip("torch")
    with pytest.raises(Refusal, match="has no gradient"):
        run(torch.from_numpy(q).requires_grad_(), torch.from_numpy(k), torch.from_numpy(v))
    with pytest.raises(Refusal, match="cannot take Q: Cannot pack tensors on meta"):
        run(torch.from_numpy(q).to("meta"), torch.from_numpy(k), torch.from_numpy(v))


def test_numbers_that_numpy_has_not(made: Path) -> None:
    x = empty("bf16", [33])
    x.data[:] = np.arange(33, dtype=np.float32).view(np.uint32) >> 16
    y, = memcomp.load(made)["double"](x)
    assert isinstance(y, Array) and y.dtype == "bf16" and np.array_equal(y.numpy(), 2 * np.arange(33))
    with pytest.raises(Refusal, match="takes X as bf16, not as f32"):
        memcomp.load(made)["double"](x.numpy())


def test_places_that_do_not_exist(made: Path) -> None:
    rows = memcomp.load(made)["rows"]
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    assert np.array_equal(rows(table, np.array([3, 0, 9]))[0], table[[3, 0, 9]])
    for index in (np.array([3, 10]), tensor(np.array([3, 10])), np.array([3, 3, 10, 10])[::2]):
        with pytest.raises(IndexError, match="index 10 is out of bounds for a dimension of 10 elements"):
            rows(table, index)
    with pytest.raises(Refusal, match="takes I as i64, not as bf16"):
        rows(table, empty("bf16", [3]))


def test_a_gpu_among_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU the CPU's code runs; where one is, the launches are those of the file."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.test_launch import Recorder, needs

    needs("cuda")
    gpu = compile_program(parse(DOUBLE), config=config({"target": "h100", "backend": "cuda"}))
    pack = Pack("both")
    pack.kernel(parse(DOUBLE), {"cpu": compiled(DOUBLE), "h100": gpu})
    pack.write(tmp_path / "both")
    monkeypatch.setattr(machines, "_no_gpu", lambda capability: "there is no GPU")
    run = memcomp.load(tmp_path / "both")
    assert run.report.target.name == "cpu" and run.report.others == ("h100: there is no GPU",)
    assert "h100: there is no GPU" in refused(tmp_path / "both", target="h100")
    monkeypatch.setattr(machines, "_no_gpu", lambda capability: "" if capability == 90 else "another GPU")
    run = memcomp.load(tmp_path / "both")
    assert run.report.target.name == "h100" and run.report.threads == "the GPU's"
    driver: Any = Recorder()
    run["double"].function._driver = driver  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    with FakeTensorMode():
        y, = run(torch.empty(1000, dtype=torch.bfloat16, device="cuda"))
        assert y.is_cuda and y.shape == (1000,) and y.dtype == torch.bfloat16
    assert len(driver.loaded) == len(driver.launches) == run["double"].code.launches
    with pytest.raises(Refusal, match="its tensors are not on one"):
        run(torch.empty(1000, dtype=torch.bfloat16))
    with pytest.raises(Refusal, match="takes torch's tensors"):
        run(empty("bf16", [1000]))


def test_threads_at_the_same_time(made: Path) -> None:
    run = memcomp.load(made)["attention"]
    wrong: list[int] = []

    def work(n: int) -> None:
        (q, k, v), want = attention(8 + n, 40 + n)
        for _ in range(30):
            if np.abs(run(q, k, v)[0] - want).max() > 1e-5:
                wrong.append(n)

    every = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in every:
        t.start()
    for t in every:
        t.join()
    assert not wrong


def test_a_library_that_is_none(copy: Path) -> None:
    """Whole, listed, and no kernel: the words of who could not load it."""
    sound = verified(copy).manifest
    k = sound.kernels[0]
    changed(copy, kernels=(replace(k, code=tuple(replace(c, entry="other") for c in k.code)), *sound.kernels[1:]))
    assert "cannot be loaded" in refused(copy)
    changed(copy, kernels=(replace(k, code=tuple(replace(c, file="notes/read.me") for c in k.code)),))
    assert "read.me cannot be loaded" in refused(copy)


def test_only_kernels_have_no_call(made: Path) -> None:
    run = memcomp.load(made)
    with pytest.raises(Refusal, match="has 4 kernels and no model"):
        run(1)
    with pytest.raises(OptionError, match="known: attention, decode, double, rows"):
        run["attend"]
    assert isinstance(run["rows"], Kernel)


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    pack = Pack("one")
    pack.kernel(parse(DOUBLE), {"cpu": compiled(DOUBLE)})
    digest = pack.write(tmp_path / "a")
    assert pack.write(tmp_path / "a") == digest == pack.write(tmp_path / "b")  # equal kernels give equal files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="is no artifact"):
        pack.write(tmp_path / "mine")
    (tmp_path / "mine" / NAME).write_text('{"name": "an app of the web"}')
    with pytest.raises(InputError, match="is no artifact"):
        pack.write(tmp_path / "mine")
    shutil.move(tmp_path / "mine" / "thesis.txt", tmp_path / "b" / "kernels")
    with pytest.raises(InputError, match="has a file that is not the artifact's: kernels/thesis.txt"):
        pack.write(tmp_path / "b")
    (tmp_path / "b" / "kernels" / "thesis.txt").unlink()
    assert pack.write(tmp_path / "b" / "kernels" / "..") == digest
    half = Pack("half")
    half.kernel(parse(DOUBLE), {"cpu": compiled(DOUBLE), "avx2": compiled(DOUBLE, "avx2")})
    half.kernel(parse(ROWS), {"cpu": compiled(ROWS)})
    with pytest.raises(InputError, match="rows has no code for every target"):
        half.write(tmp_path / "half")
    pack.file("gone", tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot write"):
        pack.write(tmp_path / "a")
    assert verified(tmp_path / "a").manifest.digest == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "mine"]


def test_a_linker_is_needed_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Refusal, match="linked by a C compiler, and there is none"):
        Pack("one").kernel(parse(DOUBLE), {"cpu": compiled(DOUBLE)})


# -- where no compiler is ----------------------------------------------------------------------------------------------

BARE = """
import os, sys, time
from importlib.abc import MetaPathFinder

class NoCompiler(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tvm", "triton", "sympy", "networkx", "optuna", "rich", "cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoCompiler())
import numpy as np
import memcomp
start = time.perf_counter()
run = memcomp.load(sys.argv[1])
seconds = time.perf_counter() - start
q, k, v = (np.load(sys.argv[2])[x] for x in "qkv")
o, = run["attention"](q, k, v)
assert np.abs(o - np.load(sys.argv[2])["o"]).max() < 1e-5
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(run["attention"](q, k, v)[0], o) else 3)
assert os.waitpid(child, 0)[1] == 0
maps = open("/proc/self/maps").read()
assert "libtvm_compiler" not in maps and "libtvm_runtime" not in maps and "libtorch" not in maps
print(round(seconds, 3), run.report.threads, sep="|")
"""


def bare(python: str, made: Path, place: Path, before: str = "", **environment: str) -> tuple[float, str]:
    (q, k, v), o = attention(70, 90)
    np.savez(place / "case.npz", q=q, k=k, v=v, o=o)
    done = subprocess.run([python, "-c", BARE.replace("import memcomp\n", f"import memcomp\n{before}\n"), str(made),
                           str(place / "case.npz")], capture_output=True, text=True, cwd=place, timeout=120,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    seconds, _, how = done.stdout.strip().partition("|")
    return float(seconds), how


@pytest.mark.parametrize("before, how", [
    ("", "OpenMP of libgomp"),
    ("from memcomp.codegen import threads; threads._library = lambda name: None", threads.ALONE)])
def test_no_compiler_is_needed(made: Path, tmp_path: Path, before: str, how: str) -> None:
    if not before and threads._library("libgomp.so.1") is None:
        pytest.skip("the system has no libgomp")
    assert how in bare(sys.executable, made, tmp_path, before, PYTHONPATH=str(ROOT))[1]


SMOLLM = BARE.partition("q, k, v = ")[0] + """
(kernel,) = run.kernels.values()
for p in (2, 33, 257):
    r = np.random.default_rng(p)
    q, k, v = (r.standard_normal((1, h, p, 64), dtype=np.float32) for h in (9, 3, 3))
    s = q.astype("f8") @ np.repeat(k, 3, 1).astype("f8").swapaxes(-1, -2) / 8
    w = np.exp(np.where(np.tri(p, dtype=bool), s - s.max(-1, keepdims=True), -np.inf))
    want = w @ np.repeat(v, 3, 1) / w.sum(-1, keepdims=True)
    o, = kernel(q, k, np.ascontiguousarray(v.swapaxes(1, 2)))
    assert np.abs(o.swapaxes(1, 2) - want).max() < 1e-5
print(seconds)
"""


@pytest.mark.slow
def test_smollm2s_attention(tmp_path: Path) -> None:
    """Its 30 layers are one kernel, right where no compiler is, and in the model, called from torch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from memcomp import smollm
    from memcomp.artifact.compile import regions, write
    from memcomp.inputs import Function
    from memcomp.signature import Dim

    try:
        model = smollm.load().model
    except InputError as error:
        pytest.skip(error.what)

    class Body(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any) -> Any:
            return self.model(ids, use_cache=False).logits

    example = torch.arange(32)[None]
    made = regions(Function(Body(), (example,), ({1: Dim("S", 1, 4096)},)), [config({"target": "cpu"})])
    assert [k.calls for k in made.kernels] == [30]
    write(made, tmp_path / "smollm2")
    done = subprocess.run([sys.executable, "-c", SMOLLM, str(tmp_path / "smollm2")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    (kernel,) = memcomp.load(tmp_path / "smollm2").kernels.values()
    calls = []

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[Any, None]:
        calls.append(module)
        return kernel(q, k, v.transpose(1, 2))[0], None

    ids = torch.randint(0, 1000, (1, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        transformers.AttentionInterface.register("artifact", attend)
        model.set_attn_implementation("artifact")
        got = model(ids, use_cache=False).logits
    assert len(calls) == 30 and (got - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.slow
def test_in_an_environment_of_its_own(made: Path, tmp_path: Path, runtime: str) -> None:
    seconds, how = bare(runtime, made, tmp_path)
    assert seconds < 0.5, seconds
    listed = subprocess.run([runtime, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not [w for w in ("torch ", "sympy", "triton", "apache-tvm ") if w in listed], listed
