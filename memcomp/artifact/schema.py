"""Frozen dataclasses as JSON and back.  What is read is not trusted: every field is there, has its type, and no other
is.

Types: bool, int, float, str, `X | None`, tuple[X, ...], dict[str, X], and dataclasses of these.  No type is named in
the text, so the text decides on nothing but values.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from memcomp.ir.errors import InputError

T = TypeVar("T")
WHOLE = 2**63  # integers stay below
LINES = 3      # values that lie so deep have lines of their own
_PLAIN = {str: "a text", int: "an integer below 2**63", float: "a finite number", bool: "true or false"}


def canonical(value: Any) -> str:
    """The one text of a value: sorted names, ASCII, what lies deeper than LINES on one line, a line end at the end."""
    return text(plain(value))


def text(value: Any) -> str:
    """The same of a value that is plain."""
    return _lines(value, 0) + "\n"


def _lines(value: Any, depth: int) -> str:
    if depth == LINES or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True, allow_nan=False)
    items = [f"{json.dumps(k)}: {_lines(value[k], depth + 1)}" for k in sorted(value)] if isinstance(value, dict) else [
        _lines(v, depth + 1) for v in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    pad = "\n" + " " * depth
    return begin + pad + " " + f",{pad} ".join(items) + pad + end


def plain(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def parsed(text: bytes, where: str) -> Any:
    """JSON as plain values.  InputError where it is none, or nested beyond reason."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON", str(error).splitlines()[0]) from None


def read(kind: type[T], value: Any, where: str) -> T:
    """A value of that type.  InputError names the place of the first fault."""
    return _read(kind, value, where)  # type: ignore[no-any-return]


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, args, known = _parts(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} is no list")
        return tuple(_read(args[0], v, f"{where}[{n}]") for n, v in enumerate(value))
    if origin is dict:
        return {k: _read(args[1], v, f"{where}.{k}") for k, v in _mapping(value, where).items()}
    if known is not None:
        given = _mapping(value, where)
        for name in sorted(given.keys() ^ known.keys()):
            raise InputError(f"{where} {'lacks' if name in known else 'has an unknown field'} {name}")
        return kind(**{n: _read(t, given[n], f"{where}.{n}") for n, t in known.items()})
    if not _right(kind, value):
        raise InputError(f"{where} is not {_PLAIN[kind]}")
    return kind(value)


def _right(kind: Any, value: Any) -> bool:
    if isinstance(value, bool) or kind in (bool, str):
        return type(value) is kind
    if kind is int:
        return isinstance(value, int) and -WHOLE < value < WHOLE
    return kind is float and isinstance(value, (int, float)) and abs(value) < WHOLE and math.isfinite(value)


@lru_cache(maxsize=None)
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any] | None]:
    """Origin, arguments, and the types of a dataclass's fields."""
    known = get_type_hints(kind) if isinstance(kind, type) and is_dataclass(kind) else None
    return get_origin(kind), get_args(kind), known


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is no mapping")
    return value
