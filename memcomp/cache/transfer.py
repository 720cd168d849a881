"""Entries on their way between machines: one JSON file of many, merged in any order to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from memcomp.cache.entry import FORMAT, Entry, better, canonical, entry_of
from memcomp.cache.store import Store

LARGEST = 1 << 28  # bytes of a file of entries


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a file's entries.  bad: why some are none."""

    new: int
    known: int
    bad: tuple[str, ...] = ()


def exported(entries: Iterable[Entry]) -> str:
    """The text of a file of entries; the same for the same entries in any order."""
    kept: dict[tuple[str, str], Entry] = {}
    for e in entries:
        at = (e.place, e.key)
        kept[at] = better(kept[at], e) if at in kept else e
    rows = [json.loads(kept[at].text()) for at in sorted(kept)]
    lines = ",\n".join(canonical(r) for r in rows)
    return f'{{"format":{FORMAT},"entries":[\n{lines}\n]}}\n'


def entries(text: str, bad: list[str] | None = None) -> Iterator[Entry]:
    """The entries of a file's text; those that are none are skipped, and `bad` is told why.

    Raises ValueError where the text is no such file.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} bytes; a file of entries has at most {LARGEST}")
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(data, dict) or data.keys() != {"format", "entries"} or not isinstance(data["entries"], list):
        raise ValueError("no file of entries: it needs `format` and a list `entries`")
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}; this memcomp reads {FORMAT}")
    for n, x in enumerate(data["entries"]):
        try:
            yield entry_of(x)
        except (ValueError, RecursionError) as error:
            if bad is not None:
                bad.append(f"entry {n}: {error}")


def taken(store: Store, text: str) -> Taken:
    """Join the entries of a file's text to a store's.  What was measured elsewhere keeps its environment, so that it is
    a hint here.  Raises ValueError as `entries`, PermissionError where the store is read only."""
    bad: list[str] = []
    counts = [store.join(e) for e in entries(text, bad)]
    return Taken(sum(counts), len(counts) - sum(counts), tuple(bad))


@dataclass(frozen=True, slots=True)
class Difference:
    """Problems (with environments) that one side lacks, and those whose choices differ."""

    left: tuple[Entry, ...]
    right: tuple[Entry, ...]
    changed: tuple[tuple[Entry, Entry], ...]


def difference(left: Iterable[Entry], right: Iterable[Entry]) -> Difference:
    a, b = ({(e.place, e.key): e for e in side} for side in (left, right))
    both = sorted(a.keys() & b.keys())
    return Difference(tuple(a[x] for x in sorted(a.keys() - b.keys())),
                      tuple(b[x] for x in sorted(b.keys() - a.keys())),
                      tuple((a[x], b[x]) for x in both if a[x].choice != b[x].choice))
