"""A directory on disk, believed only as a whole: every file is what the manifest says before any of them is used."""

from __future__ import annotations

import hashlib
import hmac
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcomp.artifact.manifest import LONGEST, NAME, File, Manifest, read
from memcomp.ir.errors import InputError

THREADS = 4  # that read files at once


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path
    manifest: Manifest

    def place(self, name: str) -> Path:
        """Where a listed file lies."""
        if name not in self.manifest.files:
            raise InputError(f"{self.path} lists no file {name}")
        return self.path / name


def verified(place: str | Path, digest: str | None = None, meanwhile: Callable[[Manifest], None] = lambda _: None
             ) -> Folder:
    """The directory, all of whose files have the size and the SHA-256 that its manifest lists; nothing was loaded.

    digest: what the manifest's own must be, as `memcomp compile` printed it; meanwhile: done while files are read, and
    must use nothing of theirs.  Raises InputError, in one sentence, where
    the manifest is missing, damaged or of another version, where a file is missing, is not listed, is a link or is
    another than it was.
    """
    root = Path(place)
    if not root.is_dir():
        raise InputError(f"{root} is no directory", hint="`memcomp compile MODEL -o DIR` writes one")
    found = dict(entries(root))
    if NAME not in found:
        raise InputError(f"{root} has no {NAME}", hint="`memcomp compile MODEL -o DIR` writes one")
    if found.pop(NAME) > LONGEST:
        raise InputError(f"{root / NAME} has more than {LONGEST} bytes")
    manifest = read((root / NAME).read_bytes(), str(root / NAME))
    if digest is not None and not hmac.compare_digest(digest.removeprefix("sha256:").lower().encode(),
                                                      manifest.digest.encode()):
        raise InputError(f"{root} is another artifact: its digest is sha256:{manifest.digest}, not {digest}")
    for path in sorted(found.keys() ^ manifest.files.keys()):
        what = "has a file that its manifest does not list" if path in found else "lacks a file of its manifest"
        raise InputError(f"{root} {what}: {path}")
    for path, f in manifest.files.items():
        if found[path] != f.bytes:
            raise InputError(f"{root / path} is damaged: it has {found[path]} bytes, not {f.bytes}")
    with ThreadPoolExecutor(THREADS) as pool:  # the longest, the weights, first; hashing leaves Python to others
        order = sorted(manifest.files, key=lambda path: -found[path])
        checks = [pool.submit(_same, root / path, manifest.files[path]) for path in order]
        meanwhile(manifest)
        for check in checks:
            check.result()
    return Folder(root, manifest)


def _same(path: Path, f: File) -> None:
    try:
        with path.open("rb") as data:
            whole: Any = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) if f.bytes else b""
        digest = hashlib.sha256(whole).hexdigest()
    except (OSError, ValueError) as error:  # it has become empty, say
        raise InputError(f"cannot read {path}", str(error)) from error
    if digest != f.sha256:
        raise InputError(f"{path} is damaged: it is not what its digest says")


def entries(root: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(path, bytes) of each file.  InputError at what is neither a file nor a folder: no link is followed."""
    try:
        with os.scandir(root / below) as found:
            for e in found:
                path = f"{below}{e.name}"
                if e.is_dir(follow_symlinks=False):
                    yield from entries(root, f"{path}/")
                elif e.is_file(follow_symlinks=False):
                    yield path, e.stat(follow_symlinks=False).st_size
                else:
                    kind = "a link" if stat.S_ISLNK(e.stat(follow_symlinks=False).st_mode) else "no file"
                    raise InputError(f"{root / path} is {kind}, which an artifact does not have")
    except OSError as error:
        raise InputError(f"cannot read {root / below}", error.strerror or str(error)) from error
