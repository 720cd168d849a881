"""Targets: package data, detection on this and on foreign machines, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from memcomp.codegen.tvm.isa import isa
from memcomp.ir.detect import KNOWN, cpu
from memcomp.ir.errors import OptionError
from memcomp.ir.target import Target, target, targets


@pytest.mark.parametrize("name", targets())
def test_figures_make_sense(name: str) -> None:
    t = target(name)
    assert t.name == name and t.source and t.backend and hash(t) == hash(target(name))
    assert t.memory is t.levels[-1] and t.memory.name == "dram"
    farther = [level.bandwidth for level in t.levels]
    assert farther == sorted(farther, reverse=True), "nearer levels are faster"
    sizes = [level.bytes * level.count for level in t.levels if level.bytes]
    assert all(s > 0 for s in sizes) and sizes[0] < sizes[-1]
    assert t.peak("bf16") >= t.peak("f32") > t.special > 0
    assert t.peak("i16") == t.peak("f32"), "a dtype that no unit multiplies runs as f32"
    assert t.threads >= 1 and t.lanes >= 4
    assert t.level(t.levels[0].name) is t.levels[0]


def test_unknown_names_list_what_is_known() -> None:
    with pytest.raises(OptionError) as e:
        target("h10")
    assert str(e.value) == "unknown target 'h10'\nhint: did you mean 'h100'? known: " + ", ".join(targets())
    with pytest.raises(OptionError, match="target cpu has no level 'smem'"):
        target("cpu").level("smem")


def test_compute_capabilities() -> None:
    known = {n: target(n).capability for n in targets() if target(n).backend == "triton"}
    assert set(known.values()) == {80, 89, 90, 100} and known["a100"] == 80 and known["h100"] == known["h200"] == 90
    with pytest.raises(OptionError, match="target flat has no compute capability"):
        _ = target("flat").capability


def test_the_cpu_is_the_same_each_time() -> None:
    target.cache_clear()
    first = target("cpu")
    target.cache_clear()
    assert isinstance(first, Target) and first == target("cpu")


def fake(folder: Path, flags: str, caches: dict[str, tuple[str, str, str]]) -> tuple[Path, Path]:
    proc, sys = folder / "proc", folder / "sys"
    proc.mkdir()
    (proc / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\nmodel name : masked\n")
    (proc / "meminfo").write_text("MemTotal:       1024 kB\nMemFree: 3 kB\n")
    for core in range(256):
        for index, (level, kind, size) in caches.items():
            at = sys / "devices/system/cpu" / f"cpu{core}" / "cache" / index
            at.mkdir(parents=True)
            (at / "level").write_text(level + "\n")
            (at / "type").write_text(kind + "\n")
            (at / "size").write_text(size + "\n")
            (at / "shared_cpu_list").write_text("0-255\n" if level == "3" else f"{core}\n")
    return proc, sys


def test_features_and_caches_are_read_not_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("memcomp.ir.detect._affinity", lambda: {0, 5})
    proc, sys = fake(tmp_path, "fpu avx2 fma avx512f amx_tile amx_bf16 hypervisor", {
        "index0": ("1", "Data", "48K"), "index1": ("1", "Instruction", "32K"), "index2": ("2", "Unified", "2M"),
        "index3": ("3", "Unified", "260M")})
    found = cpu(proc, sys)
    assert found.cores == 2 and found.lanes == 16 and found.memory == 1 << 20 and found.clock == 0.0
    assert found.features == ("fma", "avx2", "avx512f", "amx_tile", "amx_bf16") and set(found.features) <= set(KNOWN)
    assert found.caches == {"l1": (48 << 10, 2), "l2": (2 << 20, 2), "l3": (260 << 20, 1)}


def test_a_system_that_tells_nothing_still_has_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, lanes, features in (("x86_64", 4, ()), ("arm64", 4, ("neon",))):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        found = cpu(tmp_path, tmp_path)
        assert (found.lanes, found.features, found.caches) == (lanes, features, {}) and found.cores >= 1
    monkeypatch.setattr("memcomp.ir.detect.cpu", lambda: found)
    target.cache_clear()
    t = target("cpu")
    target.cache_clear()
    assert [level.name for level in t.levels] == ["reg", "l1", "l2", "l3", "dram"] and t.peak("f32") > 0


def test_a_machine_like_another_says_what_it_lacks() -> None:
    """The CPU without AVX-512: the same cores and caches, narrower vectors, and kernels for older instructions."""
    whole, older = target("cpu"), target("avx2")
    assert set(older.features) == {f for f in whole.features if not f.startswith(("avx512", "amx"))}
    assert older.lanes == min(whole.lanes, 8) and older.threads == whole.threads
    assert [x.name for x in older.levels] == [x.name for x in whole.levels]
    assert older.peak("f32") * whole.lanes == whole.peak("f32") * older.lanes
    assert isa(older).name in ("avx2", isa(whole).name)
