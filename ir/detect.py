"""What the CPU of this machine is: cores, caches, instruction sets.  Never its name: names are masked and lie."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# names as Linux spells them in /proc/cpuinfo; only those that a backend or the cost model asks for
KNOWN = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
         "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
         "neon", "sve", "i8mm", "bf16")
_ARM = {"asimd": "neon", "sve": "sve", "i8mm": "i8mm", "bf16": "bf16"}


@dataclass(frozen=True, slots=True)
class Cpu:
    """cores: that this process may use; lanes: f32 in a vector; clock: Hz, 0.0 if not told; memory: bytes, 0 if not
    told; caches: level -> (bytes of one, how many serve these cores)."""

    cores: int
    lanes: int
    clock: float
    memory: int
    features: tuple[str, ...]
    caches: dict[str, tuple[int, int]]


def cpu(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Cpu:
    """Detect; what the system does not tell falls back to the least of its architecture."""
    info = _text(proc / "cpuinfo")
    pairs = [line.split(":", 1) for line in info.splitlines() if ":" in line]
    fields = {k.strip().lower(): v.strip() for k, v in pairs}
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        flags = {_ARM[f] for f in flags if f in _ARM} | {"neon"}  # every 64-bit ARM has it
    features = tuple(f for f in KNOWN if f in flags)
    # the current frequency in cpuinfo wanders from call to call, and a target must not
    khz = _text(sys / "devices" / "system" / "cpu" / "cpu0" / "cpufreq" / "cpuinfo_max_freq").strip()
    memory = next((int(line.split()[1]) * 1024 for line in _text(proc / "meminfo").splitlines()
                   if line.startswith("MemTotal:")), 0)
    mine = _affinity()
    return Cpu(len(mine), lanes_of(features), float(khz) * 1e3 if khz.isdigit() else 0.0, memory, features,
               _caches(sys / "devices" / "system" / "cpu", mine))


def lanes_of(features: Collection[str]) -> int:
    """f32 values in a vector register."""
    return 16 if "avx512f" in features else 8 if "avx2" in features or "avx" in features else 4


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _caches(folder: Path, mine: set[int]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, set[str]]] = {}
    for core in sorted(mine):
        for index in sorted((folder / f"cpu{core}" / "cache").glob("index*")):
            if _text(index / "type").strip() == "Instruction":
                continue
            size, shared = _text(index / "size").strip(), _text(index / "shared_cpu_list").strip()
            level = "l" + _text(index / "level").strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
            digits = size.rstrip("KM")
            if digits.isdigit():
                bytes_, instances = found.get(level, (int(digits) * unit, set()))
                found[level] = bytes_, instances | {shared or str(core)}
    return {level: (size, len(where)) for level, (size, where) in found.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or hidden in a container: the fall-backs stand
        return ""
