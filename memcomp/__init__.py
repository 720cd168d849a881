"""memcomp: a compiler for attention and memory layers.

    import memcomp
    fast = memcomp.compile(model, tokens)               # or torch.compile(model, backend="memcomp")
    print(memcomp.explain(model, tokens))               # what was read, rewritten, emitted; passes and traffic
    assert memcomp.check(model, tokens).ok              # against float64
    run = memcomp.load("DIR")                           # what `memcomp compile` wrote, where no compiler is

Names are resolved on first use, so that `import memcomp.ir` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memcomp.artifact.loading import load
    from memcomp.backend import compile
    from memcomp.config import Config
    from memcomp.ir.errors import InputError, MemcompError, OptionError, ParseError, Refusal, VerifyError
    from memcomp.kv.hf import KVCache
    from memcomp.operators import register
    from memcomp.oracle import check
    from memcomp.report import explain
    from memcomp.runtime import reset, stats

__version__ = "0.1.0"

_HOMES = {
    "compile": "memcomp.backend", "explain": "memcomp.report", "check": "memcomp.oracle",
    "stats": "memcomp.runtime", "reset": "memcomp.runtime", "Config": "memcomp.config",
    "register": "memcomp.operators", "load": "memcomp.artifact.loading", "KVCache": "memcomp.kv.hf",
    **{n: "memcomp.ir.errors"
       for n in ("MemcompError", "ParseError", "VerifyError", "Refusal", "OptionError", "InputError")},
}

__all__ = [
    "Config", "InputError", "KVCache", "MemcompError", "OptionError", "ParseError", "Refusal", "VerifyError",
    "check", "compile", "explain", "load", "register", "reset", "stats",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'memcomp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
