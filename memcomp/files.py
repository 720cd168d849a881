"""Files as a user means them: whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from memcomp.ir.errors import InputError


def put(target: Path, data: str | bytes) -> None:
    """Write where the path leads to, keeping who may read it: a reader never sees half of it.  A pipe or a device is
    written to as it is.  Raises InputError where it cannot be written."""
    place, whole = Path(os.path.realpath(target)), data.encode() if isinstance(data, str) else data
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        if place.exists() and not (place.is_file() or place.is_dir()):
            place.write_bytes(whole)
            return
        try:
            with part.open("xb") as f:
                f.write(whole)
            if place.is_file():
                shutil.copymode(place, part)
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}", error.strerror or str(error)) from error


def check_place(target: Path) -> None:
    """Before any work: can the file be written at all?  Raises InputError."""
    place = os.path.realpath(target)
    if os.path.isdir(place) or not os.path.isdir(os.path.dirname(place)):
        why = "it is a folder" if os.path.isdir(place) else "there is no such folder"
        raise InputError(f"cannot write {target}", why, "name a file in a folder that exists")
