"""The tuning cache: what was measured to be best, for which problem, where, and how.

Nearest first: the user's folder (MEMCOMP_CACHE_DIR, else `memcomp` in the XDG cache folder), the system's (`memcomp` in
the XDG configuration folders), and what ships with the package (`memcomp/tuned`).
"""

from __future__ import annotations

import os
from pathlib import Path

from memcomp.cache.entry import Choice, Entry, Measured, Rejected
from memcomp.cache.environment import environment, present
from memcomp.cache.store import CacheWarning, Layers, Store

__all__ = ["CacheWarning", "Choice", "Entry", "Layers", "Measured", "Rejected", "Store", "environment", "layers",
           "present", "shipped"]


def layers(folder: str = "", mode: str = "on") -> Layers:
    """The stores in use.  folder: the user's, "" for the usual one; mode: on, read (nothing is written) or off."""
    if mode == "off":
        return Layers()
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "memcomp"
    if str(home).startswith("~"):  # nobody's: a user that the system does not know
        home = Path(os.devnull) / "memcomp"
    system = [Path(p) / "memcomp" for p in (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep) if p]
    own = Path(os.path.expanduser(folder)) if folder else home
    return Layers(Store(own, mode == "on"), *(Store(p, False) for p in system), shipped())


def shipped() -> Store:
    """The entries in the package."""
    return Store(Path(__file__).parent.parent / "tuned", False)
