"""What the cache keeps of one problem: what was chosen, how that was measured, what was rejected.  JSON, never code.

A text that comes from a file is not trusted: every field has a type and a bound, numbers are finite, and what is not
known is refused (`ValueError` with the place and the reason).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 2
LONGEST = 1 << 18   # bytes of a file
WHOLE = 2**53       # integers that JSON readers agree on
TEXT, ITEMS, DEPTH = 2048, 512, 6  # of a string, of a list or mapping, of nested ones


@dataclass(frozen=True, slots=True)
class Choice:
    """One point of a problem's space.  form: of the program, in the words of `memcomp.choice`; knobs: of its mapping;
    backend: the folder of codegen that writes the kernels, "" for the target's own; setting: how, in the words of the
    backend's `options`, "" for what the backend writes unless it is told."""

    form: str = ""
    knobs: Mapping[str, int] = field(default_factory=dict)
    backend: str = ""
    setting: str = ""

    def __hash__(self) -> int:
        return hash((self.form, self.backend, self.setting, *sorted(self.knobs.items())))

    def __str__(self) -> str:
        knobs = ", ".join(f"{k}={v}" for k, v in sorted(self.knobs.items()))
        return "; ".join(filter(None, (self.backend, self.form, knobs, self.setting))) or "its only mapping"


@dataclass(frozen=True, slots=True)
class Measured:
    """How a choice was measured.  median, runner_up: seconds a call, the second the next best choice's (0: there was
    none); spread: distance of the quartiles over the median; error, bound: largest error against float64 over that of
    the eager form, and the most that was allowed; how: what was timed, in words; when: a date."""

    median: float
    spread: float
    repetitions: int
    error: float
    bound: float
    runner_up: float = 0.0
    how: str = ""
    when: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A choice that may not win, and why: a wrong result, a crash, its time limit."""

    choice: Choice
    why: str


@dataclass(frozen=True, slots=True)
class Entry:
    """problem: everything that decides which choices there are and what they mean, the same on all machines;
    environment: the machine and the versions it was measured with; origins: digests of the environments that measured
    the problem, of all entries that were merged into this one."""

    problem: Mapping[str, Any]
    environment: Mapping[str, Any]
    choice: Choice
    measured: Measured
    rejected: tuple[Rejected, ...] = ()
    origins: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        return digest(self.problem)

    @property
    def place(self) -> str:
        return digest(self.environment)

    @property
    def doubted(self) -> bool:
        """Was the choice rejected by another measurement?"""
        return any(r.choice == self.choice for r in self.rejected)

    def text(self) -> str:
        """Canonical JSON with its digest: equal entries have equal texts, and no damage goes unseen."""
        held = {"format": FORMAT, **_plain(self)}
        return canonical({**held, "digest": digest(held)}) + "\n"

    @staticmethod
    def read(text: str | bytes) -> Entry:
        """The entry of a file's text.  Raises ValueError where it is not one of this format."""
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} bytes; an entry has at most {LONGEST}")
        try:
            data = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        return entry_of(data)


def entry_of(data: Any) -> Entry:
    """An entry from plain values.  Raises ValueError."""
    top = _mapping(data, "entry", {"format", "problem", "environment", "choice", "measured", "rejected", "origins",
                                   "digest"})
    if _integer(top["format"], "format") != FORMAT:
        raise ValueError(f"format {top['format']}; this memcomp reads {FORMAT}")
    _free(top["problem"], "problem")
    _free(top["environment"], "environment")
    for name in ("problem", "environment"):
        if not isinstance(top[name], dict) or not top[name]:
            raise ValueError(f"{name} is no mapping with something in it")
    seen = _mapping(top["measured"], "measured", set(Measured.__dataclass_fields__))
    times = {n: _number(seen[n], f"measured.{n}") for n in ("median", "spread", "error", "bound", "runner_up")}
    if not times["median"] > 0:
        raise ValueError("measured.median is not positive")
    if times["error"] > times["bound"]:
        raise ValueError("measured.error is above measured.bound")
    count = _integer(seen["repetitions"], "measured.repetitions")
    if count < 1:
        raise ValueError("measured.repetitions is not positive")
    how, when = (_text(seen[n], f"measured.{n}") for n in ("how", "when"))
    rejected = []
    for n, x in enumerate(_list(top["rejected"], "rejected")):
        parts = _mapping(x, f"rejected[{n}]", {"choice", "why"})
        rejected.append(Rejected(_choice(parts["choice"], f"rejected[{n}].choice"),
                                 _text(parts["why"], f"rejected[{n}].why")))
    origins = tuple(_text(x, "origins") for x in _list(top["origins"], "origins"))
    if _text(top["digest"], "digest") != digest({n: x for n, x in top.items() if n != "digest"}):
        raise ValueError("it is not what its digest says")
    return Entry(top["problem"], top["environment"], _choice(top["choice"], "choice"),
                 Measured(**times, repetitions=count, how=how, when=when), tuple(rejected), origins)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Of plain values; the name of a file or a folder."""
    return hashlib.sha256(canonical(_plain(value)).encode()).hexdigest()[:32]


def better(a: Entry, b: Entry) -> Entry:
    """Of two entries for one problem and one environment: the one measured more often, then the faster one, then the
    one whose choice comes first; with all that was rejected by either.  Associative and commutative, so that the order
    of merging does not matter."""
    first = min((a, b), key=lambda e: (-e.measured.repetitions, e.measured.median, canonical(_plain(e.choice)),
                                       canonical(_plain(e.measured))))
    rejected: dict[str, Rejected] = {}
    for r in (*a.rejected, *b.rejected):
        at = canonical(_plain(r.choice))
        rejected[at] = min(rejected.get(at, r), r, key=lambda x: x.why)
    return Entry(first.problem, first.environment, first.choice, first.measured,
                 tuple(rejected[x] for x in sorted(rejected)), tuple(sorted({*a.origins, *b.origins})))


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {n: _plain(getattr(value, n)) for n in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _mapping(x: Any, at: str, fields: set[str]) -> dict[str, Any]:
    if not isinstance(x, dict) or x.keys() != fields:
        raise ValueError(f"{at} does not have the fields {', '.join(sorted(fields))}")
    return x


def _list(x: Any, at: str) -> list[Any]:
    if not isinstance(x, list) or len(x) > ITEMS:
        raise ValueError(f"{at} is no list of at most {ITEMS}")
    return x


def _text(x: Any, at: str) -> str:
    if not isinstance(x, str) or len(x) > TEXT:
        raise ValueError(f"{at} is no text of at most {TEXT} characters")
    return x


def _integer(x: Any, at: str) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or abs(x) > WHOLE:
        raise ValueError(f"{at} is no integer within 2**53")
    return x


def _number(x: Any, at: str) -> float:
    if not isinstance(x, (int, float)) or isinstance(x, bool) or abs(x) > 1e18 or not math.isfinite(x) or x < 0:
        raise ValueError(f"{at} is no finite number, 0 or more")
    return float(x)


def _choice(x: Any, at: str) -> Choice:
    parts = _mapping(x, at, {"form", "knobs", "backend", "setting"})
    held = parts["knobs"]
    if not isinstance(held, dict) or len(held) > ITEMS:
        raise ValueError(f"{at}.knobs is no mapping of at most {ITEMS}")
    numbers = {_text(k, f"{at}.knobs"): _integer(v, f"{at}.knobs.{k[:40]}") for k, v in held.items()}
    form, backend, setting = (_text(parts[n], f"{at}.{n}") for n in ("form", "backend", "setting"))
    return Choice(form, numbers, backend, setting)


def _free(x: Any, at: str, depth: int = 0) -> None:
    """Plain values of any shape, within bounds."""
    if depth > DEPTH:
        raise ValueError(f"{at} is nested too deeply")
    if isinstance(x, dict):
        _list(list(x), at)
        for k, v in x.items():
            _free(v, f"{at}.{_text(k, at)[:40]}", depth + 1)
    elif isinstance(x, list):
        for v in _list(x, at):
            _free(v, at, depth + 1)
    elif isinstance(x, str):
        _text(x, at)
    elif isinstance(x, float):
        _number(abs(x), at)
    elif x is not None and not isinstance(x, bool):
        _integer(x, at)
