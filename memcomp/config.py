"""Options: one frozen value, and the only reader of MEMCOMP_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from memcomp.ir.errors import OptionError, nearest

RESTS = ("inductor", "eager")
TUNES = ("cached", "off", "quick", "full")
CHAINS = ("gain", "all")
CACHES = ("on", "read", "off")


@dataclass(frozen=True, slots=True)
class Config:
    """How to compile.

    target:       a name of `memcomp targets`; kernels are emitted for it.
    backend:      the folder of codegen that writes the kernels; "" is the target's own.
    rest:         who runs what memcomp does not: "inductor" or "eager".
    rest_options: handed to Inductor as its config patches.
    strict:       an own failure or a refused region is an error instead of a fallback with a warning.
    tune:         "cached" takes what was measured on this machine, where the cache knows it, else what the cost model
                  says; "off" asks the model alone; "quick" and "full" measure what is not known, and keep it.
    chains:       reductions without a product: "gain" takes those whose result is small and needs fewer passes than it
                  was written with; "all" also those that write as much as they read, as torch's own kernels do.
    interpret:    kernels for a GPU are run by their language's interpreter, on the CPU: slow, to check them.
    cache:        "on" keeps and takes tuning results, "read" only takes them, "off" does neither.
    cache_dir:    the user's folder of them; "" is the usual one (`memcomp.cache`).
    dump:         stations whose program is printed to stderr (MEMCOMP_DUMP=capture,reduce_passes,tvm).
    """

    target: str = "cpu"
    backend: str = ""
    rest: str = "inductor"
    rest_options: tuple[tuple[str, Any], ...] = ()
    strict: bool = False
    tune: str = "cached"
    chains: str = "gain"
    interpret: bool = False
    cache: str = "on"
    cache_dir: str = ""
    dump: tuple[str, ...] = ()


def config(options: Mapping[str, Any] | None = None) -> Config:
    """The `Config` of user options (names and values as the user wrote them) and the environment.

    Variables: MEMCOMP_ and the name in capitals, for DUMP, TARGET, BACKEND, REST, STRICT and INTERPRET (1 or 0), TUNE,
    CHAINS, CACHE, CACHE_DIR; an explicit option wins.  Raises OptionError for an unknown name or an illegal value.
    """
    if not isinstance(options, Mapping | None):
        raise OptionError(f"options={options!r} are not names and values", hint='e.g. {"target": "cpu"}')
    given = {**_environment(), **dict(options or {})}
    known = {f.name for f in fields(Config)}
    for name in given:
        if name not in known:
            raise OptionError(f"unknown option {name!r}", f"options = {dict(options or {})!r}",
                              nearest(str(name), known))
    for name, legal in (("rest", RESTS), ("tune", TUNES), ("chains", CHAINS), ("cache", CACHES)):
        _choice(given, name, legal)
    for name in ("strict", "interpret"):
        if not isinstance(given.get(name, False), bool):
            raise OptionError(f"option {name}={given[name]!r} is not a truth value", hint="use True or False")
    rest = given.get("rest_options", {})
    if not isinstance(rest, Mapping) or not all(isinstance(name, str) for name in rest):
        raise OptionError(f"option rest_options={rest!r} is not a mapping of names", hint='e.g. {"max_autotune": True}')
    given["rest_options"] = tuple(sorted(rest.items(), key=lambda item: item[0]))
    given["cache_dir"] = _folder(given.get("cache_dir", ""))
    if "target" in given:
        if not isinstance(given["target"], str):
            raise OptionError(f"option target={given['target']!r} is not a name", hint="see `memcomp targets`")
        from memcomp.ir.target import target

        target(given["target"])  # raises OptionError listing what is known
    if given.get("backend", "") != "":
        from memcomp.backends import backends, unfit

        _choice(given, "backend", tuple(backends()))
        machine = given.get("target", Config().target)
        why, others = unfit(given["backend"], machine)
        if why:
            raise OptionError(f"the backend {given['backend']} has no kernels for {machine}", why, others)
    given["dump"] = _stations(given.get("dump", ()))
    return Config(**given)


def _folder(place: Any) -> str:
    text = place if isinstance(place, str) else place.__fspath__() if isinstance(place, os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise OptionError(f"option cache_dir={place!r} is not a folder's name", hint='e.g. "~/tuned"')
    return text


def _stations(dump: Any) -> tuple[str, ...]:
    """The stations of a text `a,b` or of several names."""
    names = dump.split(",") if isinstance(dump, str) else dump
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise OptionError(f"option dump={dump!r} does not name stations", hint='e.g. ("capture", "reduce_passes")')
    found = tuple(n.strip() for n in names if n.strip())
    if found:
        from memcomp.backends import backends
        from memcomp.stations import STATIONS

        known = (*STATIONS, *backends())
        for name in found:
            if name not in known:
                raise OptionError(f"unknown station {name!r}", f"dump = {dump!r}", nearest(name, known))
    return found


def _choice(given: Mapping[str, Any], name: str, legal: tuple[str, ...]) -> None:
    if name in given and not (isinstance(given[name], str) and given[name] in legal):
        raise OptionError(f"option {name}={given[name]!r} is not legal", hint=nearest(str(given[name]), legal))


def _environment() -> dict[str, Any]:
    env: dict[str, Any] = {}
    for name in ("target", "backend", "rest", "tune", "chains", "cache", "cache_dir"):
        if value := os.environ.get(f"MEMCOMP_{name.upper()}"):
            env[name] = value
    for name in ("strict", "interpret"):
        if value := os.environ.get(f"MEMCOMP_{name.upper()}"):
            if value not in ("0", "1"):
                raise OptionError(f"MEMCOMP_{name.upper()}={value!r} is not 0 or 1",
                                  hint="unset it for the default (0)")
            env[name] = value == "1"
    if value := os.environ.get("MEMCOMP_DUMP"):
        env["dump"] = value
    return env
