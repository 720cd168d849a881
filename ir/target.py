"""Machines: levels of memory, units of arithmetic, features.  Read from `ir/targets/*.toml`; the CPU is detected."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from memcomp.ir.errors import OptionError, nearest

BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1,
         "bool": 1}
INTEGERS = {"i64": (-2**63, 2**63 - 1), "i32": (-2**31, 2**31 - 1), "i16": (-2**15, 2**15 - 1), "i8": (-128, 127),
            "u8": (0, 255), "bool": (0, 1)}  # the least and the greatest of each dtype


def sums_fit(terms: int, a: str, b: str, into: str = "i32") -> bool:
    """Is every sum of at most `terms` products of integers of dtypes a and b one of dtype `into`?"""
    ends = [x * y for x in INTEGERS[a] for y in INTEGERS[b]]
    least, greatest = INTEGERS[into]
    return least <= min(0, terms * min(ends)) and terms * max(ends) <= greatest


@dataclass(frozen=True, slots=True)
class Level:
    """A level of memory.  bytes: of one instance (0 = unknown); bandwidth: bytes/s of all instances together;
    count: instances; addressed: placed by the program (registers, shared memory), else a cache; alone: the share of the
    bandwidth that one core draws while the others idle."""

    name: str
    bytes: int
    bandwidth: float
    count: int = 1
    addressed: bool = False
    alone: float = 1.0


@dataclass(frozen=True, slots=True)
class Array:
    """Processing elements in rows and columns that work in step.

    cycles:    (operator, cycles of one element for it); "mac" is a product added to a sum.  Who lacks an operator
               cannot run it.
    pipelined: the operators of one statement overlap, so that it takes as long as its slowest, not their sum.
    """

    rows: int
    columns: int
    cycles: tuple[tuple[str, float], ...]
    pipelined: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Unit:
    """A kind of arithmetic unit, all instances together.  peaks: (dtype of the operands, operations/s); a
    multiply-add counts as two.  `special` does exp, log, tanh and the like, one operation each.  array: the elements
    that it is made of, where statements are bound to it one by one.  rows: of an operand that one instruction takes;
    fewer take as long."""

    name: str
    peaks: tuple[tuple[str, float], ...]
    array: Array | None = None
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Target:
    """A machine.  backend: the codegen folder that writes for it; levels: nearest first, memory last;
    threads: cores or multiprocessors; lanes: f32 values in a vector register; clock: Hz, where units are arrays;
    launch: seconds that a kernel takes to start; long_sums: dtype of running sums of few elements, where f64 costs next
    to nothing; source: where the figures come from."""

    name: str
    backend: str
    levels: tuple[Level, ...]
    units: tuple[Unit, ...]
    features: tuple[str, ...] = ()
    threads: int = 1
    lanes: int = 32
    source: str = ""
    clock: float = 0.0
    launch: float = 0.0
    long_sums: str = "f32"

    def level(self, name: str) -> Level:
        for level in self.levels:
            if level.name == name:
                return level
        known = [level.name for level in self.levels]
        raise OptionError(f"target {self.name} has no level {name!r}", hint=nearest(name, known))

    @property
    def memory(self) -> Level:
        """The farthest level, where arguments lie."""
        return self.levels[-1]

    def peak(self, dtype: str) -> float:
        """Operations/s of products of this dtype on the fastest unit; a dtype no unit multiplies runs as f32."""
        best = [p for u in self.units if u.name != "special" for d, p in u.peaks if d == dtype]
        return max(best) if best else self.peak("f32")

    def rows(self, dtype: str) -> int:
        """Rows of an operand that the fastest unit for products of this dtype takes at a time."""
        found = [(p, u.rows) for u in self.units if u.name != "special" for d, p in u.peaks if d == dtype]
        return max(found)[1] if found else 1

    @property
    def special(self) -> float:
        """Transcendental functions per second."""
        return max(p for u in self.units if u.name == "special" for _, p in u.peaks)

    @property
    def arrays(self) -> dict[str, Array]:
        """Units that statements are bound to, by name; none where a machine is told by its peaks alone."""
        return {u.name: u.array for u in self.units if u.array is not None}

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def capability(self) -> int:
        """CUDA's compute capability, 90 for 9.0: the highest of the features `sm..`.  OptionError without one."""
        known = [int(f[2:]) for f in self.features if f.startswith("sm") and f[2:].isdigit()]
        if not known:
            raise OptionError(f"target {self.name} has no compute capability", hint=", ".join(self.features))
        return max(known)


def targets() -> tuple[str, ...]:
    """Names of the known machines."""
    folder = files("memcomp.ir") / "targets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


@lru_cache(maxsize=64)
def target(name: str) -> Target:
    """The machine of that name; OptionError lists what is known."""
    if name not in targets():
        raise OptionError(f"unknown target {name!r}", hint=nearest(name, targets()))
    data = _table(name)
    return _detected(name, data) if data.get("detect") else _read(name, data)


def _table(name: str) -> dict[str, Any]:
    """A machine's file; one that is `like` another says only what differs."""
    data = tomllib.loads((files("memcomp.ir") / "targets" / f"{name}.toml").read_text(encoding="utf-8"))
    return {**_table(data.pop("like")), **data} if "like" in data else data


def _read(name: str, data: dict[str, Any]) -> Target:
    levels = tuple(Level(x["name"], int(x["bytes"]), float(x["bandwidth"]), int(x.get("count", 1)),
                         bool(x.get("addressed", False)), float(x.get("alone", 1.0))) for x in data["levels"])
    clock = float(data.get("clock", 0.0))
    units = [Unit(u["name"], tuple((d, float(p)) for d, p in u["peaks"].items()), rows=int(u.get("rows", 1)))
             for u in data.get("units", ())]
    for u in data.get("arrays", ()):
        array = Array(int(u["rows"]), int(u.get("columns", 1)), tuple((o, float(n)) for o, n in u["cycles"].items()),
                      bool(u.get("pipelined", False)))
        rate = array.elements * clock
        cost = dict(array.cycles)
        # one word size: an array multiplies every dtype alike
        units.append(Unit(u["name"], tuple((d, 2 * rate / cost["mac"]) for d in BYTES if "mac" in cost), array))
        if "exp" in cost:
            units.append(Unit("special", (("f32", rate / cost["exp"]),)))
    return Target(name, data["backend"], levels, tuple(units), tuple(data.get("features", ())),
                  int(data.get("threads", 1)), int(data.get("lanes", 32)), data.get("source", ""), clock,
                  float(data.get("launch", 0.0)), data.get("long_sums", "f32"))


def _detected(name: str, data: dict[str, Any]) -> Target:
    from memcomp.ir.detect import cpu, lanes_of

    found = cpu()
    features = tuple(f for f in found.features if not f.startswith(tuple(data.get("without", ()))))
    clock = found.clock or float(data["clock"])
    lanes = lanes_of(features)
    levels = []
    for x in data["levels"]:
        size, count = found.caches.get(x["name"], (int(x["bytes"]), 1 if x["name"] in ("l3", "dram") else found.cores))
        if x["name"] == "reg":
            size = lanes * 4 * (32 if lanes >= 16 or "neon" in features else 16)
        elif x["name"] == "dram":
            size = found.memory
        elif x["name"] in ("l2", "l3") and found.caches and x["name"] not in found.caches:
            continue  # this machine has no such cache
        bandwidth = float(x["bandwidth"]) if "bandwidth" in x else x["rate"] * clock * count
        levels.append(Level(x["name"], size, bandwidth, count, x["name"] == "reg", float(x.get("alone", 1.0))))
    base = found.cores * clock * int(data["pipes"]) * 2 * lanes
    units = [Unit(u["name"], tuple((d, base * k) for d, k in u["peaks"].items())) for u in data.get("units", ())
             if set(u.get("needs", ())) <= set(features)]
    return Target(name, data["backend"], tuple(levels), tuple(units), features, found.cores, lanes,
                  data["source"], launch=float(data["launch"]), long_sums=data["long_sums"])
