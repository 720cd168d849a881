"""Folders of entries: `ROOT/v2/ENVIRONMENT/PROBLEM.json`, one file an entry.

No locks: a file is written beside its place and moved there in one step, so that a reader sees all of it or nothing,
and of two writers the last one wins with a whole entry.  A file that is damaged, of another version or of another key
is a miss, told once, and never an error.
"""

from __future__ import annotations

import os
import secrets
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memcomp.cache.entry import FORMAT, LONGEST, Entry, better, digest

VERSION = f"v{FORMAT}"
OLD = 3600.0  # seconds after which what a writer left unfinished is nobody's


class CacheWarning(UserWarning):
    """A file of the cache is not used; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file and what is in it, or why that is no entry."""

    path: Path
    entry: Entry | None
    why: str = ""


class Store:
    """The entries under one folder, which need not exist."""

    def __init__(self, root: Path, writable: bool = True) -> None:
        self.root, self.writable = Path(root), writable

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r}, writable={self.writable})"

    def path(self, problem: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
        return self.root / VERSION / digest(environment) / f"{digest(problem)}.json"

    def get(self, problem: Mapping[str, Any], environment: Mapping[str, Any]) -> Entry | None:
        """What was measured for this problem in this environment; None where there is nothing that can be used."""
        found = look(self.path(problem, environment))
        if found is None:
            return None
        if found.entry is None:
            _warn(found)
        elif found.entry.doubted:
            return None
        return found.entry

    def hints(self, problem: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Entry]:
        """What other environments chose for this problem: candidates to measure first, nothing to trust."""
        own, name = digest(environment), f"{digest(problem)}.json"
        folders = sorted(self._folders())
        seen = (look(f / name) for f in folders if f.name != own)
        return [x.entry for x in seen if x is not None and x.entry is not None]

    def check(self) -> None:
        """Raises OSError where the folder cannot be written."""
        top = self.root / VERSION
        top.mkdir(parents=True, exist_ok=True)
        part = top / f".{secrets.token_hex(8)}"
        part.touch(exist_ok=False)
        part.unlink()

    def put(self, entry: Entry) -> Path:
        """Keep an entry, in the place of one that is there.  Raises PermissionError where the store is read only, and
        OSError where the folder cannot be written."""
        if not self.writable:
            raise PermissionError(f"the cache {self.root} is read only")
        entry = replace(entry, origins=entry.origins or (entry.place,))
        text = entry.text().encode()
        Entry.read(text)  # what could not be read again is not written
        path = self.path(entry.problem, entry.environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with part.open("xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def join(self, entry: Entry) -> bool:
        """Keep an entry beside what is there for its problem, by `better`; is anything new?"""
        found = look(self.path(entry.problem, entry.environment))
        there = found.entry if found is not None else None
        joined = replace(entry, origins=entry.origins or (entry.place,))
        joined = joined if there is None else better(there, joined)
        if joined == there:
            return False
        self.put(joined)
        return True

    def files(self) -> Iterator[Found]:
        """Every file, in the order of names, with what is in it."""
        for folder in sorted(self._folders()):
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                yield Found(folder, None, f"not readable: {error.strerror}")
                continue
            for path in paths:
                if path.suffix == ".json" and not path.name.startswith(".") and (found := look(path)) is not None:
                    yield found

    def entries(self) -> Iterator[Entry]:
        return (f.entry for f in self.files() if f.entry is not None)

    def unfinished(self) -> Iterator[Path]:
        """What writers left that were stopped long ago."""
        import time

        for folder in sorted(self._folders()):
            for path in sorted(folder.glob(".*.json.*")):
                with suppress(FileNotFoundError):  # its writer is done
                    if time.time() - path.lstat().st_mtime > OLD:
                        yield path

    def _folders(self) -> list[Path]:
        try:
            with os.scandir(self.root / VERSION) as found:
                return [Path(f.path) for f in found if f.is_dir(follow_symlinks=False)]
        except OSError:  # it is not there, or not ours to read
            return []


def look(path: Path) -> Found | None:
    """The file at a place; None where there is none.  What is no plain file is not opened."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return Found(path, None, f"not readable: {error.strerror}")
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # a folder could not even be wrapped
        os.close(handle)
        return Found(path, None, "no plain file")
    with os.fdopen(handle, "rb") as file:
        try:
            entry = Entry.read(file.read(LONGEST + 1))
        except (ValueError, OSError) as error:
            return Found(path, None, str(error))
    if path.name != f"{entry.key}.json" or path.parent.name != entry.place:
        return Found(path, None, "it is of another problem or environment than its name says")
    return Found(path, entry)


_warned: set[Path] = set()
_lock = threading.Lock()


def _warn(found: Found) -> None:
    with _lock:
        if found.path in _warned:
            return
        _warned.add(found.path)
    warnings.warn(f"memcomp: {found.path} is not used: {found.why}", CacheWarning, stacklevel=4)


class Layers:
    """Stores over one another, the nearest first; new entries go into the nearest that can be written."""

    def __init__(self, *stores: Store) -> None:
        self.stores = stores

    def get(self, problem: Mapping[str, Any], environment: Mapping[str, Any]) -> Entry | None:
        return next((e for s in self.stores if (e := s.get(problem, environment)) is not None), None)

    def hints(self, problem: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Entry]:
        return [e for s in self.stores for e in s.hints(problem, environment)]

    @property
    def empty(self) -> bool:
        return not any(os.path.isdir(s.root / VERSION) for s in self.stores)

    @property
    def writable(self) -> Store | None:
        return next((s for s in self.stores if s.writable), None)
