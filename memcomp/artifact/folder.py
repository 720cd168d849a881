"""A directory on disk, believed only as a whole: every file is what the manifest says before any of them is used."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memcomp.artifact.manifest import LONGEST, NAME, File, Manifest, read
from memcomp.ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path
    manifest: Manifest

    def place(self, name: str) -> Path:
        """Where a listed file lies."""
        if name not in self.manifest.files:
            raise InputError(f"{self.path} lists no file {name}")
        return self.path / name


def verified(place: str | Path, digest: str | None = None) -> Folder:
    """The directory, all of whose files have the size and the SHA-256 that its manifest lists; nothing was loaded.

    digest: what the manifest's own must be, as `memcomp compile` printed it.  Raises InputError, in one sentence, where
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
        _same(root / path, f, found[path])
    return Folder(root, manifest)


def _same(path: Path, f: File, size: int) -> None:
    if size != f.bytes:
        raise InputError(f"{path} is damaged: it has {size} bytes, not {f.bytes}")
    with path.open("rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != f.sha256:
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
